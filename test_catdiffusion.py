"""The tests of catdiffusion, to be read after it: each promise, held against something else.

    python -m pytest -q test_catdiffusion.py

The first half is the second half of the lesson: formulas meet numbers from the literature, Bayes'
rule worked out by brute force, and chains whose end is known. The second half runs the program.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import catdiffusion as cd

HERE, CPU = Path(cd.__file__).parent, torch.device("cpu")
torch.set_num_threads(1)  # the other core compiles for a TPU meanwhile
SMALL = "--size 16 --channels 8 --mults 1 2 --attention 8 --batch 4 --every 1000".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    """The command line; where argparse ends the program itself, that is the exit code, too."""
    try:
        return cd.main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def small_unet():
    torch.manual_seed(0)
    model = cd.UNet(16, 8, (1, 2), 1, (8,))
    for p in model.parameters():  # at the start the output is zero: give it something to say
        nn.init.normal_(p, std=0.1)
    return model


def drawn(n, size=16):
    """n drawn cats as a run would have them: uint8 (n, size, size, 3)."""
    cats = b"".join(cd.draw_cat(random.Random(i), size).tobytes() for i in range(n))
    return torch.frombuffer(bytearray(cats), dtype=torch.uint8).view(n, size, size, 3)


def pixels(*values):
    """Numbers as pictures of one pixel, in float64: (1, 1, 1, 1) each."""
    return (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in values)


def levels(*values):
    return (torch.tensor([value]) for value in values)


# ==== THE LESSON ================================================================================

# ---- One training step -------------------------------------------------------------------------
# The oracle is Algorithm 1 written out once more in plain PyTorch: the schedule from its
# definition, torch's mse_loss, torch's clipping, torch's Adam. Only the network is shared.


def test_a_training_step_is_algorithm_1(monkeypatch):
    monkeypatch.setattr(cd, "autocast", lambda device: torch.autocast("cpu", enabled=False))
    ours, theirs, t = small_unet(), small_unet(), torch.tensor([0, 9, 500, 999])
    x0, eps = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(4, 1, 1, 1)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    loss = F.mse_loss(theirs(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps)
    loss.backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    adam.step()

    adam = torch.optim.Adam(ours.parameters(), lr=torch.tensor(0.0), fused=True)
    diffusion, lr = cd.Diffusion().to(CPU), torch.tensor(1e-3)
    told = cd.train_step(ours, diffusion, adam, lr, (x0, t, eps), accum=2)
    assert told.item() == pytest.approx(loss.item(), rel=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


# ---- Schedule and formulas ---------------------------------------------------------------------
# Constants of the published linear schedule, computed elsewhere in float64; for the cosine, its one
# formula. Eq. 4 meets Eq. 2 done t + 1 times; what belongs together must undo each other.


def test_the_schedules_and_the_jump_to_any_t():
    linear, cosine = (cd.Diffusion(schedule=name).alphas_cumprod for name in ("linear", "cosine"))
    published = {0: 0.9999, 499: 0.07858724288177824, 999: 4.035829765375676e-05}
    assert {t: linear[t].item() for t in published} == pytest.approx(published, rel=1e-12)
    for t in (0, 100, 499, 900):  # Nichol & Dhariwal 2021, Eq. 17
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t + 1, 0)]
        assert cosine[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert 0.69 < cosine[499].sqrt() < 0.71  # what the file says of t = 500
    mean, variance, (one, zero), (t,) = 1.0, 0.0, pixels(1, 0), levels(300)
    for beta in torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[:301].tolist():
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    assert cd.Diffusion().q_sample(one, t, zero).item() == pytest.approx(mean)
    assert cd.Diffusion().q_sample(zero, t, one).item() == pytest.approx(variance**0.5)


def test_a_perfect_answer_gives_back_the_picture_and_v_is_a_velocity():
    """That of x_t by its angle, in finite differences; and the angle grows evenly with t."""
    x0, eps = torch.rand(5, 3, 4, 4).double() * 2 - 1, torch.randn(5, 3, 4, 4).double()
    for prediction, t in (("eps", [0, 1, 500, 990, 998]), ("v", [0, 1, 500, 990, 999])):
        d, t = cd.Diffusion(schedule="cosine", prediction=prediction), torch.tensor(t)
        back = d.x0_from(d.target(x0, t, eps), d.q_sample(x0, t, eps), t)
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-8)
    angles, ((x0, eps), t) = (
        torch.atan2(d.noise_rate, d.signal_rate),
        (pixels(0.3, -0.8), [400, 401]),
    )
    velocity = d.q_sample(x0, torch.tensor(t), eps).flatten().diff() / angles[t].diff()
    v = d.target(x0, torch.tensor(t), eps).mean().item()
    assert velocity.item() == pytest.approx(v, rel=1e-5)
    assert angles.diff()[100:900].max() / angles.diff()[100:900].min() < 1.01


# ---- One step back -----------------------------------------------------------------------------
# We know nothing of Eq. 6 and 7 here: we multiply the two Gaussians that Bayes' rule names, on a
# grid of two million points, and take mean and variance of the product. For steps of any width.


@pytest.mark.parametrize("t, t_next", [(1, 0), (500, 499), (999, 998), (999, 400), (60, 20)])
def test_q_posterior_is_bayes_rule(t, t_next):
    d, x0, x_t = cd.Diffusion(), 0.4, 0.7
    abar, abar_next = d.alphas_cumprod[t].item(), d.alphas_cumprod[t_next].item()
    keep = abar / abar_next  # of the variance, from t_next to t
    grid = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_p = -((x_t - keep**0.5 * grid) ** 2) / (2 * (1 - keep))  # q(x_t given x at t_next)
    log_p += -((grid - abar_next**0.5 * x0) ** 2) / (2 * (1 - abar_next))  # times q(that given x0)
    p = (log_p - log_p.max()).exp()
    mean = (p * grid).sum() / p.sum()
    variance = (p * (grid - mean) ** 2).sum() / p.sum()
    got = [v.item() for v in d.q_posterior(*pixels(x0, x_t), *levels(t, t_next))]
    assert got == pytest.approx([mean.item(), variance.item(), 1 - keep], rel=1e-6)


def test_the_papers_coefficients_and_ddim_with_eta_1():
    """Of x0 and x_t; and Song et al. 2021, Eq. 12 with η = 1: Eq. 7 written differently."""
    d, (one, zero, x0, x_t) = cd.Diffusion(), pixels(1, 0, 0.4, 0.7)
    published = {1: (0.5452914995102903, 0.4547084989905303)}
    published[999] = 0.00012835148717224682, 0.9899486782675173
    for t, coefficients in published.items():
        means = [d.q_posterior(*x, *levels(t, t - 1))[0].item() for x in ((one, zero), (zero, one))]
        assert means == pytest.approx(coefficients, rel=1e-9)
    variance = d.q_posterior(one, one, *levels(1, 0))[1]
    assert variance.item() == pytest.approx(5.4531876613021935e-05, rel=1e-9)
    mean, variance, _ = d.q_posterior(x0, x_t, *levels(700, 650))
    abar, abar_next = d.alphas_cumprod[[700, 650]]
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    song = abar_next.sqrt() * x0 + (1 - abar_next - variance).sqrt() * eps
    torch.testing.assert_close(mean, song)


# ---- Whole chains ------------------------------------------------------------------------------
# If the data is N(0, std²) in each value, the ideal guess is known: x0 = √ᾱ·std²/(ᾱ·std²+1−ᾱ)·x_t.
# Each step is then x' = a·x + b·z; a and b are read off the program's own steps by feeding them
# ones and zeros, and the variance at the end of the chain follows without drawing anything.


def walk(d, chain, sampler, std):
    """abar, ideal guess for x_t = 1, and variance of x_t, at each level; for data N(0, std²)."""
    (one, zero), variance, large = pixels(1, 0), 1.0, sampler == "ddpm-large"
    for t, t_next in zip(chain, [*chain[1:], 0]):
        abar, way = d.alphas_cumprod[t].item(), [*levels(t, t_next)]
        guess = abar**0.5 * std**2 / (abar * std**2 + 1 - abar)
        yield abar, guess, variance
        if sampler == "ddim":
            a, b = cd.ddim_step(d, guess * one, one, *way), zero
        else:
            a = cd.ddpm_step(d, guess * one, one, *way, zero, large)
            b = cd.ddpm_step(d, zero, zero, *way, one, large)
        variance = a.item() ** 2 * variance + b.item() ** 2


def chain_std(d, chain, sampler, std):
    """The exact standard deviation of the last guess, which is the picture."""
    *_, (_, guess, variance) = walk(d, chain, sampler, std)
    return guess * variance**0.5


def noise_left(d, chain, sampler):
    """The noise in x_t if x0 is known to be 0, in units of what each level should have."""
    return [v / (1 - abar) for abar, _, v in walk(d, chain, sampler, 0.0)][1:]


def test_whole_chains_end_where_theory_says_and_large_breaks_in_50_steps():
    d, ends = cd.Diffusion(), {"ddpm-large": 0.9999, "ddpm": 0.9911, "ddim": 1.0}
    all_steps, few = cd.noise_levels(d, 1000), cd.noise_levels(d, 50)
    for n, chain in ((n, cd.noise_levels(d, n)) for n in (1, 2, 50, 333, 999, 1000)):
        assert len(chain) == n and chain[0] == 999 and sorted({*chain})[::-1] == chain
    got = {name: chain_std(d, all_steps, name, 1.0) ** 2 for name in ends}
    assert got == pytest.approx(ends, abs=4e-3)
    assert noise_left(d, few, "ddpm") == pytest.approx([1.0] * 49, abs=1e-4)
    assert max(noise_left(d, few, "ddpm-large")) > 1.4  # half as much again as the network expects
    assert noise_left(d, all_steps, "ddpm-large")[700] == pytest.approx(1.0, abs=0.01)
    d = cd.Diffusion(schedule="cosine")  # what DDIM leaves of a mean colour (64 px: std 14) in 50
    left = [chain_std(d, c, "ddim", 14) / 14 for c in (range(999, 0, -20), cd.noise_levels(d, 50))]
    assert left == pytest.approx([0.84, 0.95], abs=0.01)  # levels even in t, and ours


class Ideal(nn.Module):
    """The network that knows all data is N(0, 0.25²), and notes each t it is asked for."""

    def __init__(self, diffusion):
        super().__init__()
        self.d, self.asked, self.weight, self.size = diffusion, [], nn.Parameter(torch.ones(())), 4

    def forward(self, x, t):
        self.asked.append(t.tolist())
        abar = cd.at(self.d.alphas_cumprod, t)
        x0 = abar.sqrt() * 0.25**2 / (abar * 0.25**2 + 1 - abar) * x
        return self.d.target(x0, t, (x - abar.sqrt() * x0) / (1 - abar).sqrt())


def error(sampler, steps):
    """The flow without noise is known for N(0, std²): x_t stays as many sigmas from 0 as it was."""
    d = cd.Diffusion(schedule="cosine", prediction="v").to(CPU)
    chain = list(cd.sample(Ideal(d), d, 1, sampler, steps))
    (first, x_T, _), (last, _, x0) = chain[0], chain[-1]
    abar = d.alphas_cumprod[[first, last]]
    sigma = (abar * 0.25**2 + 1 - abar).sqrt()  # of x_t, at both ends
    exact = x_T / sigma[0] * abar[1].sqrt() * 0.25**2 / sigma[1]
    return (x0 / exact - 1).abs().median().item()


def test_looking_ahead_is_of_second_order(monkeypatch):
    assert 0.4 < error("ddim", 40) / error("ddim", 20) < 0.6  # twice the calls, half the error
    assert error("dpm", 25) < error("ddim", 50)
    monkeypatch.setattr(torch, "where", lambda holds, a, b: a)  # to the end, as its authors do
    assert error("dpm", 40) < 0.3 * error("dpm", 20)  # twice the calls, a quarter of the error


# ---- Drawing -----------------------------------------------------------------------------------
# The ideal network counts its calls; the small real one shows that picture i stays picture i.


@pytest.mark.parametrize(
    "sampler, steps", [("dpm", 15), ("ddim", 2), ("ddpm", 6), ("ddpm-large", 1000)]
)
def test_samplers_make_the_calls_asked_for_and_picture_i_is_always_the_same(sampler, steps):
    d = cd.Diffusion(schedule="cosine", prediction="v").to(CPU)
    ideal, model, calls = Ideal(d), small_unet().eval(), min(steps, 6)
    seen = list(cd.sample(ideal, d, 2, sampler, steps))
    assert [[t, t] for t, _, _ in seen] == ideal.asked and len(seen) == steps and seen[0][0] == 999
    assert all(x_t.shape == x0.shape == (2, 3, 4, 4) for _, x_t, x0 in seen)
    assert all(x0.abs().max() <= 1 for _, _, x0 in cd.sample(model, d, 4, sampler, calls))
    (_, x_t, x0), now = seen[-1], torch.tensor([seen[-1][0]] * 2)  # no noise after the last call
    torch.testing.assert_close(x0, d.x0_from(ideal(x_t, now), x_t, now).clamp(-1, 1))
    parts = [list(cd.sample(model, d, n, sampler, calls, 3, i))[-1][2] for n, i in ((1, 0), (3, 1))]
    whole, other = (list(cd.sample(model, d, 4, sampler, calls, seed))[-1][2] for seed in (3, 4))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=2e-2)
    assert (other - whole).abs().mean() > 0.03 < (whole[0] - whole[1]).abs().mean()


# ---- The network -------------------------------------------------------------------------------
# Its size is the published one; each layer of ours is held against torch's own or worked by hand.


@pytest.mark.parametrize("size, side", [(32, 16), (48, 12), (64, 16), (96, 12), (128, 16)])
def test_shapes(size, side):
    s = cd.complete(cd.parser().parse_args(["train", "--size", f"{size}", "--channels", "8"]))
    (model, _), x = cd.build(s, CPU), torch.randn(2, 3, size, size)
    assert s.attention == [side] and 4 <= size >> len(s.mults) - 1 <= 15
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = model(x, torch.tensor([0, 999]))
        assert y.shape == x.shape and y.dtype == torch.float32


def test_size_and_start_are_the_papers_and_every_weight_is_used():
    model = cd.UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    fresh, model = cd.UNet(16, 8, (1, 2), 1, (8,)), small_unet()
    x0, eps, t = torch.rand(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.randint(1000, (64,))
    assert cd.Diffusion().to(CPU).loss(fresh, x0, t, eps).item() == pytest.approx(1.0, abs=0.03)
    assert (fresh(x0, t) == 0).all() and (model(x0, t) - model(x0, t * 0)).abs().max() > 1e-3
    model(x0, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_small_layers_by_hand():
    e = cd.time_embedding(torch.tensor([0, 1, 500]), 8)  # sine, then cosine
    assert e.shape == (3, 8) and e[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert e[2, 0].item() == pytest.approx(math.sin(500), abs=1e-4)
    assert e[1, 3].item() == pytest.approx(math.sin(1e-4), abs=1e-7)  # slowest: exponent half-1
    layer = cd.Downsample(1, 1, 3, stride=2)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    assert layer(torch.ones(1, 1, 4, 4), None).flatten().tolist() == [9, 6, 6, 4]
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert cd.upsample(torch.arange(4.0).view(1, 1, 2, 2))[0, 0].tolist() == rows
    layer, x = cd.Attention(16), torch.randn(2, 16, 4, 4)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    y = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    weights = (layer.q(y) @ layer.k(y).transpose(1, 2) / 16**0.5).softmax(-1)
    expected = x + layer.out(weights @ layer.v(y)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


def test_our_group_norm_is_torchs():
    for dtype, by in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        ours, theirs, results = cd.GroupNorm(4, 16, eps=1e-6), nn.GroupNorm(4, 16, eps=1e-6), []
        nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict())
        x, weight = (torch.randn(3, 16, 8, 8) * 2 + 3).to(dtype), torch.randn(3, 16, 8, 8)
        for layer, data in ((ours, x), (theirs, x.float())):
            data = data.to(memory_format=torch.channels_last).detach().requires_grad_()
            y = layer(data)
            (y.float() * weight).sum().backward()
            results.append((y, data.grad, layer.weight.grad, layer.bias.grad))
        assert all(((a.float() - b).abs().max() / b.abs().max()) < by for a, b in zip(*results))


# ---- Learning and averaging --------------------------------------------------------------------
# What must hold of any step (no longer than 1; nothing changed by a loss that is no number), of the
# average (its recurrence in Python's own floats), and of the whole: the loss falls. Levels are held
# against the integral of their chances, and Muon against torch's, which is for matrices only.


@pytest.mark.parametrize("uniform", [1.0, 0.35, 0.25, 0.0])
def test_the_levels_asked_for_have_the_chances_promised(uniform):
    t, edges = cd.choose_t(torch.arange(1e5) / 1e5, 1000, uniform), torch.linspace(0, 1, 11)
    upto = uniform * edges + (1 - uniform) * (1 - torch.cos(math.pi * edges)) / 2  # ∫ π/2·sin πx dx
    shares = t.div(100, rounding_mode="floor").bincount(minlength=10) / len(t)
    torch.testing.assert_close(shares, upto.diff(), rtol=0, atol=1e-4)
    assert 0 <= t.min() and t.max() <= 999
    assert cd.choose_t(torch.tensor([1 - 2**-24]), 1000, uniform).item() == 999


def test_muon_is_torchs_own_for_matrices_convolutions_and_adam_for_the_rest():
    torch.manual_seed(0)
    shapes, lr = [(16, 40), (40, 16), (8, 6, 3, 3), (3, 8, 3, 3), (16,)], 0.01
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter((p.flatten(1) if p.dim() > 1 else p).detach().clone()) for p in ours]
    muon = torch.optim.Muon(theirs[:3], lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(theirs[3:], lr, betas=(0.95, 0.999))
    optimizer = cd.Muon(ours, torch.tensor(lr), betas=(0.95, 0.999), fused=True)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.view(q.shape).clone()
        for each in (optimizer, muon, adam):
            each.step()
    for p, q in zip(ours, theirs):  # torch's works in bf16 throughout, of steps of about 0.01
        torch.testing.assert_close(p.view(q.shape), q, rtol=0, atol=1.5e-3)
    values = torch.linalg.svdvals(cd.orthogonal(torch.randn(20, 50) * 7))
    assert 0.6 < values.min() and values.max() < 1.25


def step_of(model, optimizer, lr, batch):
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    loss = cd.train_step(model, cd.Diffusion().to(CPU), optimizer, torch.tensor(lr), batch)
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before, loss


def test_steps_are_cut_or_skipped_the_rate_rises_and_falls_and_the_average_warms_up():
    model, big = small_unet(), torch.full((2, 3, 16, 16), 1e4)
    sgd = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.0))
    change, _ = step_of(model, sgd, 1.0, (big, torch.tensor([1, 500]), big))
    assert change.norm().item() == pytest.approx(1, rel=1e-2)
    s = cd.parser().parse_args("train --lr 0.5 --steps 1000 --batch 4".split())
    rates = [cd.learning_rate(s, step) for step in (0, 99, 199, 799, 900, 999)]
    assert rates == pytest.approx([0.0025, 0.25, 0.5, 0.5, 0.25, 0.0025])
    model, expected = nn.Linear(1, 1, bias=False), 0.0
    nn.init.zeros_(model.weight)
    ema = cd.EMA(model, decay=0.9)
    for n in range(200):
        nn.init.constant_(model.weight, n)
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (20 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    model, (x0, t, eps) = small_unet(), cd.draw_batch(s, drawn(8), 1000, 0, CPU)
    adam = cd.Muon(model.parameters(), lr=torch.tensor(0.0), fused=True)
    for factor, holds in ((1, True), (math.nan, False), (math.inf, False), (1, True)):
        change, loss = step_of(model, adam, 0.1, (x0 * factor, t, eps))
        assert change.isfinite().all() and (change != 0).any() == holds == loss.isfinite()


def test_a_batch_is_a_function_of_seed_and_step_and_twenty_cats_are_learned_by_heart():
    pictures = drawn(20)
    s = argparse.Namespace(batch=64, uniform=1.0, seed=0)
    first, again, other = (cd.draw_batch(s, pictures, 1000, step, CPU) for step in (5, 5, 6))
    x0, t, eps = first
    assert all((u == v).all() for u, v in zip(first, again)) and x0.shape == eps.shape
    assert not (x0 == other[0]).all() and not (eps == other[2]).all()
    assert (t * 4 // 1000).bincount().tolist() == [16] * 4  # spread evenly
    back = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    other = [p for p in back if not any(torch.equal(p, q) for q in pictures)]
    assert 10 < len(other) < 54  # some are as they were, and the others mirrored
    assert all(any(torch.equal(p, q) for q in pictures.flip(2)) for p in other)
    model, d = small_unet(), cd.Diffusion(schedule="cosine", prediction="v").to(CPU)
    adam, losses, s.batch = cd.Muon(model.parameters(), torch.tensor(0.0)), [], 8
    for step in range(160):
        batch = cd.draw_batch(s, pictures, 1000, step, CPU)
        losses.append(cd.train_step(model, d, adam, torch.tensor(1e-2), batch).item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# ==== THE PROGRAM ===============================================================================

# ---- Pictures ----------------------------------------------------------------------------------
# Files are written here by Pillow in colours that we choose: what must come out is known.

RED, BLUE, WHITE = (250, 0, 0), (0, 0, 250), (255, 255, 255)
KINDS = [(f"a.{suffix}", "RGB", RED, RED) for suffix in "jpg JPEG png webp bmp gif".split()]
KINDS += [("g.jpg", "L", 100, (100, 100, 100)), ("c.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0))]
KINDS += [("t.png", "RGBA", (0, 0, 0, 0), WHITE), ("u.png", "LA", (0, 0), WHITE)]


def read(path, size=16):
    raw = bytearray(cd.read_picture(Path(path), size))
    return torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3)


def near(pixel, colour, by=12):
    return all(abs(int(a) - b) <= by for a, b in zip(pixel, colour))


def halves(side):
    image = Image.new("RGB", (side, side), RED)
    image.paste(BLUE, (side // 2, 0, side, side))
    return image


@pytest.mark.parametrize("name, mode, fill, colour", KINDS)
def test_every_kind_of_picture_is_read(name, mode, fill, colour):
    Image.new(mode, (40, 30), fill).save(name)
    assert near(read(name)[8, 8], colour)


@pytest.mark.parametrize("width, height", [(500, 375), (1023, 768), (333, 777), (7, 9)])
def test_a_picture_is_cropped_to_its_middle_square_and_never_squashed(width, height):
    side, image = min(width, height), Image.new("RGB", (width, height))
    image.paste(halves(side), ((width - side) // 2, (height - side) // 2))
    for name in ("a.jpg", "a.png"):
        image.save(name, quality=95)
        assert near(read(name, 32)[16, 2], RED, 40) and near(read(name, 32)[16, -3], BLUE, 40)


@pytest.mark.parametrize("side", [32, 125])
def test_a_jpeg_keeps_its_grain_when_it_is_shrunk(side):
    grain = Image.frombytes("RGB", (20, 20), random.Random(0).randbytes(3 * 20 * 20))
    grain.resize((side, side)).save("grain.jpg", quality=95)
    whole = ImageOps.fit(Image.open("grain.jpg"), (16, 16), Image.LANCZOS)  # decoded in full size
    wanted = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    error = (read("grain.jpg") / 255 - wanted / 255).std() / (wanted / 255).std()
    assert error < 0.2  # 0.5 if the JPEG's decoder does all the shrinking


def test_exif_rotation_is_undone_and_a_cat_file_crops_to_the_face():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me 90 degrees clockwise to see me upright"
    halves(40).save("turned.jpg", exif=exif, quality=95)
    halves(40).save("damaged.jpg", exif=b"Exif\0\0garbagegarbage", quality=95)
    turned, damaged = read("turned.jpg"), read("damaged.jpg")
    assert near(turned[2, 8], RED) and near(turned[13, 8], BLUE) and near(damaged[8, 2], RED)
    image = Image.new("RGB", (200, 100))
    image.paste((0, 250, 0), (90, 15, 150, 90))
    image.save("face.png")
    points = "110 60 130 60 120 75 100 50 100 25 105 45 135 45 140 25 140 50"
    Path("face.png.cat").write_text(f"9 {points} ")
    assert all(near(read("face.png")[y, x], (0, 250, 0)) for y in (1, 14) for x in (1, 14))


def test_bad_pictures_are_skipped_counted_and_named(capsys):
    deep = Path("data", "deep", "folder.jpg")
    deep.mkdir(parents=True)
    for i in range(7):
        cd.draw_cat(random.Random(i), 64).save(deep / f"{i}.JPG")
    bad = {"half.jpg": (deep / "0.JPG").read_bytes()[:500], "empty.png": b"", "text.gif": b"no gif"}
    texts = b"", b"9 1", b"nine", b"9" + b" 5" * 18
    bad |= {f"{i}.JPG.cat": text for i, text in enumerate(texts, 3)}
    bad |= {"._0.JPG": b"macOS leaves these", "notes.txt": b"stray"}  # not even counted
    for name, content in bad.items():
        (deep / name).write_bytes(content)
    assert cd.load_pictures(["data", deep], 16, "run").shape == (3, 16, 16, 3)
    told = capsys.readouterr().out
    assert "7 of 10 pictures skipped" in told and "half.jpg" in told and "6.JPG.cat" in told
    Path("alone").mkdir()
    Path("alone/bad.png").touch()
    for folder in ("nowhere", "alone"):
        assert run("train", "--data", folder) == 2 and capsys.readouterr().err.count("\n") == 1
    assert len(list(Path("run").glob("*.u8"))) == 1


def test_pictures_are_decoded_once_and_anew_when_something_changes(monkeypatch):
    decoded, read_picture = [], cd.read_picture
    monkeypatch.setattr(cd, "read_picture", lambda *a: decoded.append(a) or read_picture(*a))
    for name in ("data/0.png", "data/1.png", "data/2.png", "run/previews/000001.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        cd.draw_cat(random.Random(0), 64).save(name)
    face = "9 10 10 50 10 30 40 5 5 8 2 12 5 50 5 55 2 58 5"
    nothing, marked = (lambda: None), lambda: Path("data/0.png.cat").write_text(face)
    touched, gone = lambda: os.utime("data/1.png", (1, 1)), lambda: os.unlink("data/2.png")
    counts = []
    for change in (nothing, nothing, marked, touched, nothing, gone):
        change(), decoded.clear()
        counts.append((len(cd.load_pictures(["."], 16, "run")), len(decoded)))
    assert counts == [(3, 3), (3, 0), (3, 3), (3, 3), (3, 0), (2, 2)]  # without our own previews


# ---- Nothing is lost ---------------------------------------------------------------------------
# One small network is trained once and shared. Then: the same run in two parts against the run in
# one, bit for bit; signals; a full disk; files that are cut or mixed up.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a run of seven steps on drawn cats."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", *SMALL, "--dropout", 0.2, "--steps", 7, "--run", folder) == 0
    return folder / "checkpoint.pt"


def test_stopped_and_resumed_is_bit_for_bit_the_run_that_was_not(trained, capsys):
    for steps in (3, 7):
        assert run("train", *SMALL, "--dropout", 0.2, "--steps", steps) == 0
    whole, parts = (torch.load(p, weights_only=True) for p in (trained, "run/checkpoint.pt"))
    for name in ("model", "ema"):
        assert all(torch.equal(whole[name][key], v) for key, v in parts[name].items())
    for a, b in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"] == 7
    model, _, step = cd.load_checkpoint(trained)  # the average, not the last weights
    assert all(torch.equal(mean, whole["ema"][key]) for key, mean in model.state_dict().items())
    assert not torch.equal(whole["ema"]["conv_in.weight"], whole["model"]["conv_in.weight"])
    for other in ("--channels 16", "--seed 5", "--ema 0.5", "--uniform 1"):  # not the same run
        assert run("train", *SMALL, "--dropout", 0.2, "--steps", 9, *other.split()) == 2
        error = capsys.readouterr().err
        assert other.split()[0] in error and "--run" in error and error.count("\n") == 1


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(name, code, monkeypatch, capsys):
    calls, train_step, number = [], cd.train_step, getattr(signal, name)

    def press(*rest):
        calls.append(1)
        for _ in range(2 * (len(calls) == 3)):  # the impatient press twice
            os.kill(os.getpid(), number)
        return train_step(*rest)

    monkeypatch.setattr(cd, "train_step", press)
    before = signal.getsignal(number)
    assert run("train", *SMALL, "--steps", 5) == code
    assert "step 3" in capsys.readouterr().out and signal.getsignal(number) == before
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3
    for _ in range(2):  # to its end, and then there is nothing left to do
        assert run("train", *SMALL, "--steps", 5) == 0 and len(calls) == 5
    assert "--steps" in capsys.readouterr().out


def test_a_full_disk_or_a_loss_without_a_number_keeps_the_old_checkpoint(monkeypatch, capsys):
    assert run("train", *SMALL, "--steps", 2) == 0
    old = Path("run/checkpoint.pt").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device", "run/checkpoint.pt.part")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run("train", *SMALL, "--steps", 3) == 2
    assert "No space left" in capsys.readouterr().err
    monkeypatch.setattr(cd, "REPORT", 6)
    monkeypatch.setattr(cd.Diffusion, "loss", lambda self, m, x0, t, eps: m(x0, t).sum() * math.nan)
    assert run("train", *SMALL, "--steps", 300) == 2
    assert "smaller --lr" in capsys.readouterr().err
    assert Path("run/checkpoint.pt").read_bytes() == old


def test_damaged_checkpoints_are_refused_in_one_line(trained, capsys):
    good, state, path = trained.read_bytes(), torch.load(trained, weights_only=True), Path("bad.pt")
    files = [b"", b"hello", good[:-30], good[: len(good) // 2]]
    spoilt = [{**state, "code": os.getcwd}, {**state, "ema": {}}, [1, 2]]
    for key, value in (("mults", [64, 64]), ("channels", 16), ("size", "x")):
        spoilt.append({**state, "settings": {**state["settings"], key: value}})
    for bad in spoilt:
        torch.save(bad, path)
        files.append(path.read_bytes())
    for bad in files:
        path.write_bytes(bad)
        assert run("sample", "--checkpoint", path) == 2
        error = capsys.readouterr().err
        assert "bad.pt" in error and error.count("\n") == 1
    assert not Path("samples").exists()


# ---- The two commands --------------------------------------------------------------------------
# From end to end, as somebody would type them, in an empty folder.


def test_the_two_commands_end_to_end(monkeypatch):
    monkeypatch.setattr(cd, "REPORT", 20)
    assert run("train", *SMALL, "--steps", 30, "--every", 0) == 0
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [20, 30] and 0 < records[1]["loss"] < 1
    assert 0 < records[1]["sample_std"] < 1 and abs(records[1]["data_mean"]) < 1
    assert Image.open("run/previews/000030.png").size == (4 * 18 + 2, 4 * 18 + 2)
    assert Image.open("run/progress.gif").n_frames == 2
    state = torch.load("run/checkpoint.pt", weights_only=True)  # as older versions kept their log:
    state["log"].insert(1, {"step": 30, "sample_mean": 0.1})  # previews by themselves
    torch.save(state, "run/checkpoint.pt")
    assert run("train", *SMALL, "--steps", 31) == 0
    assert run("sample", "-n", 3, "--steps", 4, "--batch", 2, "--gif") == 0
    names = {f"cat-0{x}" for x in ("-0000.png", "-0001.png", "-0002.png", "-grid.png", ".gif")}
    assert set(os.listdir("samples")) == names and Image.open("samples/cat-0.gif").n_frames == 4
    for sampler in ("ddim", "ddpm", "ddpm-large"):
        words = "--sampler", sampler, "--steps", 4, "--out", f"plots/{sampler}"
        assert run("sample", "-n", 1, *words) == 0 and Path(f"plots/{sampler}-0-0000.png").exists()


def test_a_picture_is_made_again_from_its_text_found_by_its_nearest_and_never_overwritten(trained):
    words = "--checkpoint", trained, "--steps", 4, "--seed", 5
    assert run("sample", *words, "-n", 3, "--out", "x/p") == 0
    assert run("sample", *words, "-n", 1, "--first", 2, "--out", "y/p") == 0
    made = json.loads(Image.open("x/p-5-0002.png").text["catdiffusion"])
    model, diffusion, step = cd.load_checkpoint(made["checkpoint"])
    how = (made[name] for name in ("sampler", "calls", "seed", "number"))
    again = cd.to_images(list(cd.sample(model, diffusion, 1, *how))[-1][2])[0].tobytes()
    for name in ("x/p-5-0002.png", "y/p-5-0002.png"):
        assert max(abs(a - b) for a, b in zip(again, Image.open(name).tobytes())) <= 1
    cats = cd.as_floats(drawn(20))  # the nearest picture of a folder is found, even mirrored
    for i, image in enumerate(cd.to_images(cats)):
        image.save(f"y/{i:02}.png")
    sheet = cd.beside_nearest(cats[[3]].flip(3) + 0.01, sorted(Path("y").glob("??.png")))
    assert sheet.crop((18, 2, 34, 18)).tobytes() == Image.open("y/03.png").tobytes()
    for colour in ("red", "red", "blue", "blue", "red"):
        cd.save_new(Image.new("RGB", (4, 4), colour), Path("z/cat.png"), {})
    assert sorted(os.listdir("z")) == ["cat-2.png", "cat.png"] and made["step"] == step == 7


def test_what_comes_with_the_program():
    """It imports what it may, to import it does nothing; the README's lines draw a cat."""
    text, path = (HERE / "catdiffusion.py").read_text(), HERE / "samples" / "catdiffusion.pt"
    names = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert names == {"torch", "torchvision", "PIL", "torch_xla"}
    state = torch.load(path, weights_only=True)
    assert path.stat().st_size < 20e6 and not {"model", "optimizer"} & {*state} and state["log"]
    assert "AFHQ" in state["about"] and "CC BY-NC 4.0" in state["about"] and state["step"] > 1000
    readme = (HERE / "README.md").read_text()
    lines = re.search(r"(    from catdiffusion .*\n(?:    .*\n)+)", readme)[1]
    code = "import catdiffusion, os, sys; assert not os.listdir()\n"
    code += "assert not {'torch_xla', 'torchvision'} & set(sys.modules)\n"
    code += lines.replace("    ", "").replace('"samples/', f'"{HERE}/samples/')
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    assert subprocess.check_output([sys.executable, "-B", "-c", code], env=environment) == b""
    assert os.listdir() == ["cat.png"] and Image.open("cat.png").size == (64, 64)


def test_the_readme_can_be_followed():
    """Its commands are ones that the program takes; its lines for the sheet make such a sheet."""
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"python catdiffusion\.py ([^`#&;\n]+)", readme)
    assert len(commands) > 20 and {words.split()[0] for words in commands} == {"train", "sample"}
    for words in commands:
        cd.parser().parse_args(words.split())
    names = re.findall(r"--out what-if/(\S+)`", readme)  # of the rows
    assert len(names) > 11 and names == sorted({*names})
    os.mkdir("what-if")
    cells = [(row, i) for row in range(len(names)) for i in range(8)]
    for row, i in cells:
        colour = Image.new("RGB", (32, 32), (10 * row, 30 * i, 0))
        colour.save(f"what-if/{names[row]}-0-{i:04}.png")
    lines = re.search(r"    import pathlib\n(?:(?:    .*)?\n)+", readme)[0]
    exec(textwrap.dedent(lines))
    sheet, ours = Image.open("what-if.png"), Image.open(HERE / "samples" / "what-if.png")
    assert sheet.size == ours.size
    for row, i in cells:
        x = sheet.width - 66 * (8 - i)  # the last eight columns
        assert sheet.getpixel((x + 30, 66 * row + 30)) == (10 * row, 30 * i, 0)


def test_best_of_keeps_what_the_judge_likes_and_misses_it_early(trained, monkeypatch, capsys):
    """The judge here likes bright pictures; seven in eight are thrown away, in several batches."""
    words, make_judge = ("--checkpoint", trained, "--steps", 3, "--batch", 5), cd.make_judge
    judge = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000, bias=False))
    nn.init.ones_(judge.requires_grad_(False)[2].weight)
    monkeypatch.setattr(cd, "make_judge", lambda: judge)
    assert run("sample", *words, "-n", 16, "--out", "all/p") == 0
    assert run("sample", *words, "-n", 2, "--best-of", 8, "--out", "best/p") == 0
    light = {f.name: sum(Image.open(f).tobytes()) for f in Path("all").glob("p-0-0*.png")}
    best = sorted((f.name for f in Path("best").glob("p-0-0*.png")), key=light.get)
    assert best == sorted(light, key=light.get)[-2:]
    monkeypatch.setattr(cd, "make_judge", make_judge)  # the real one, without internet
    monkeypatch.setenv("TORCH_HOME", os.getcwd())
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: open("no/route"))
    assert run("sample", *words, "--best-of", 2, "--out", "none/p") == 2
    error = capsys.readouterr().err
    assert "--best-of: no classifier from https://" in error and error.count("\n") == 1
    assert not Path("none").exists()


ODD = """train --size 7|train --size -1|train --size 60|train --size x|train --batch 0
train --lr nan|train --channels 33|train --mults 0|train --attention 17|train --dropout 1
train --steps -5|train --schedule square|train --device nonsense|train --every nan
train --epochs 3|train --ema 2|train --accum 5|paint|sample -n 0|sample --steps 1001
sample --sampler magic|sample --seed 1.5|sample --checkpoint nowhere.pt|sample --device cuda:99"""


@pytest.mark.parametrize("words", ODD.replace("\n", "|").split("|"))
def test_odd_command_lines_get_one_line_and_write_nothing(words, capsys):
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("catdiffusion") and len(error) < 400
    assert not os.listdir()


# ---- The paper's own networks ------------------------------------------------------------------
# What diffusers' UNet2DModel calls its weights, today and in old files, and what they are here, for
# one block a floor; then a whole folder, in both formats, written by hand.

NAMES = """time_embedding.linear_1.bias time.0.bias|conv_norm_out.bias norm_out.bias
down_blocks.0.resnets.0.time_emb_proj.bias down.0.time.bias|conv_in.bias conv_in.bias
down_blocks.0.downsamplers.0.conv.bias down.1.bias
mid_block.resnets.1.conv1.bias middle.1.conv1.bias
down_blocks.1.attentions.0.to_out.0.bias down.2.attention.out.bias
mid_block.attentions.0.query.bias middle.0.attention.q.bias
up_blocks.0.resnets.1.conv_shortcut.bias up.1.shortcut.bias
up_blocks.0.upsamplers.0.conv.bias up.2.bias
up_blocks.1.attentions.0.group_norm.bias up.3.attention.norm.bias
up_blocks.1.attentions.1.proj_attn.bias up.4.attention.out.bias"""
CONFIG = {"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None}
CONFIG |= {"block_out_channels": [128, 256], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
CONFIG |= {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
CONFIG |= {"layers_per_block": 1, "norm_num_groups": 32, "sample_size": 8}
FOREIGN = [{"block_out_channels": [64, 128]}, {"layers_per_block": 2}, {"freq_shift": 0}]


def test_a_folder_in_the_layout_of_diffusers_is_read(tmp_path, capsys):
    for pair in NAMES.replace("\n", "|").split("|"):
        theirs, ours = pair.split()
        assert cd.our_name(theirs, blocks=1) == ours
    model, folder = cd.UNet(8, 128, (1, 2), 1, (4,)), tmp_path / "cat"
    weights, header, data = model.state_dict(), {"__metadata__": {"format": "pt"}}, b""
    for name, value in weights.items():
        raw = bytes(value.contiguous().view(-1).view(torch.uint8).tolist())
        about = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data + raw)]}
        header[name], data = about, data + raw
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    file, head = folder / "diffusion_pytorch_model.bin", json.dumps(header).encode()
    torch.save(weights, file)
    loaded = [cd.load_checkpoint(folder)]
    file.with_suffix(".safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    file.unlink()
    loaded, diffusion = [*loaded, cd.load_checkpoint(folder)], loaded[0][1]
    for model, _, _ in loaded:
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert diffusion.prediction == "eps" and diffusion.alphas_cumprod[0].item() > 0.99989
    assert run("sample", "--checkpoint", folder, "-n", 1, "--steps", 2) == 0
    for change in (*FOREIGN, {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}):
        (folder / "config.json").write_text(json.dumps(CONFIG | change))
        assert run("sample", "--checkpoint", folder, "-n", 1) == 2
        assert str(folder) in capsys.readouterr().err


# ---- Devices -----------------------------------------------------------------------------------
# No accelerator is needed: PJRT_DEVICE=CPU walks the whole TPU path, and torchrun's processes meet
# over the loopback interface. Several processes must give the losses of one.


TPU = """import sys, catdiffusion as cd, torch, torch_xla.debug.metrics as met
words = "train --device tpu --size 16 --channels 8 --mults 1 2 --attention 8 --batch 4 --steps 8"
seen, end_of_step, over_cores = [], cd.end_of_step, cd.over_cores
def watch(device):
    end_of_step(device)
    seen.append((met.metric_data("CompileTime")[0], met.counter_value("aten::_local_scalar_dense")))
def cut(*batch):
    spec = sys.modules["torch_xla"]._XLAC._get_xla_sharding_spec
    shares = [spec(tensor).split("]")[0] for tensor in over_cores(*batch)]
    assert shares == ["{devices=[2,1,1,1", "{devices=[2", "{devices=[2,1,1,1"], shares
    return batch
cd.end_of_step, cd.over_cores, cd.preview = watch, cut, lambda *a: {}
assert cd.main(words.split()) == 0
assert seen[-1] == seen[2] and seen[-1][0] <= 3, seen  # nothing compiled or fetched any more
aten = {n for n in met.counter_names() if n.startswith("aten::")}  # what left the device
assert aten <= {"aten::_local_scalar_dense"}, aten  # Adam looks at lr once, before all steps"""


@pytest.fixture(scope="module", autouse=True)
def tpu(tmp_path_factory):
    """A host with two cores trains while the other tests run: it waits for its compiler."""
    if not find_spec("torch_xla"):
        return None
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    environment |= {"PYTHONPATH": str(HERE), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    how = {"env": environment, "cwd": tmp_path_factory.mktemp("tpu"), "stderr": subprocess.STDOUT}
    return how["cwd"], subprocess.Popen([sys.executable, "-c", TPU], stdout=subprocess.PIPE, **how)


def test_the_tpu_path_compiles_once_and_uses_all_cores(tpu):
    """And what was saved there draws on the CPU."""
    if tpu is None:
        pytest.skip("no torch_xla")
    told, _ = tpu[1].communicate(timeout=400)
    assert tpu[1].returncode == 0, told[-4000:].decode()
    assert run("sample", "-n", 1, "--steps", 2, "--checkpoint", tpu[0] / "run/checkpoint.pt") == 0


TEAM = """import sys, torch, catdiffusion as cd
cd.REPORT, cd.autocast = 1, lambda device: torch.autocast("cpu", enabled=False)
sys.exit(cd.main())"""


def test_many_processes_do_what_one_does():
    """By a free port of the loopback interface, as a host's name may lead nowhere."""
    Path("team.py").write_text(TEAM)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
    launch += ["--local-addr=127.0.0.1", "--"]
    words, logs = ["team.py", "train", *SMALL, "--lr", "0.5", "--steps", "20", "--run"], []
    for name, how in (("a", [sys.executable]), ("b", launch)):
        done = subprocess.run([*how, *words, name], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
        lines = Path(name, "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert len(logs[0]) == 20 and logs[0] == pytest.approx(logs[1], abs=1e-3)
    assert max(logs[0]) > 1.05 * min(logs[0])
