"""Tests of catdiffusion, to be read after it: what each formula promises, checked from outside.

    python -m pytest -q test_catdiffusion.py

Nothing here trains a good network: the formulas are checked against numbers from the literature,
against Bayes' rule worked out by brute force, and against chains whose end is known exactly. The
rest runs the two commands on cats drawn on the spot, in a temporary folder.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import nn

import catdiffusion as cd

SMALL = "--size 16 --channels 8 --mults 1 2 --attention 8 --batch 4 --every 1000".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cd, "draw_cat", draw_once)


DRAWN = {}


def draw_once(rng, size, draw_cat=cd.draw_cat):
    """draw_cat, but each cat is drawn only once in all the tests."""
    which = rng.getstate(), size
    if which not in DRAWN:
        DRAWN[which] = draw_cat(rng, size)
    return DRAWN[which]


def small_unet(seed=0):
    torch.manual_seed(seed)
    model = cd.UNet(16, 8, (1, 2), 1, (8,))
    for p in model.parameters():  # at the start the output is zero: give it something to say
        nn.init.normal_(p, std=0.1)
    return model


def drawn(n, size):
    """n drawn cats, as cache_pictures would prepare them: uint8 (n, size, size, 3)."""
    cats = b"".join(cd.draw_cat(random.Random(i), size).tobytes() for i in range(n))
    return torch.frombuffer(bytearray(cats), dtype=torch.uint8).view(n, size, size, 3)


def read(path, size):
    """read_picture with the picture as a tensor."""
    picture, complaint = cd.read_picture(path, size)
    return torch.frombuffer(bytearray(picture), dtype=torch.uint8).view(size, size, 3), complaint


def run(*words):
    return cd.main([str(w) for w in words])


# ------------------------------------------------------------------------------------------------
# The noise schedule
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, t, value",
    [
        ("alphas_cumprod", 0, 0.9999),
        ("alphas_cumprod", 499, 0.07858724288177824),
        ("alphas_cumprod", 999, 4.035829765375676e-05),
        ("posterior_variance", 0, 0.0),
        ("posterior_variance", 1, 5.4531876613021935e-05),
        ("posterior_log_variance_clipped", 0, -9.81672513529567),
        ("posterior_log_variance_clipped", 1, -9.81672513529567),
        ("posterior_mean_coef1", 1, 0.5452914995102903),
        ("posterior_mean_coef2", 1, 0.4547084989905303),
        ("posterior_mean_coef1", 999, 0.00012835148717224682),
        ("posterior_mean_coef2", 999, 0.9899486782675173),
    ],
)
def test_the_papers_tables_have_the_papers_numbers(table, t, value):
    assert getattr(cd.Diffusion(), table)[t].item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_from_picture_to_noise(schedule):
    d = cd.Diffusion(schedule=schedule)
    assert d.betas.dtype == torch.float64 and len(d.betas) == 1000
    assert (d.betas > 0).all() and (d.betas <= 0.999).all()
    assert (d.alphas_cumprod.diff() < 0).all()
    assert d.alphas_cumprod[0] > 0.999 and d.alphas_cumprod[-1] < 1e-4


def test_cosine_is_the_published_curve():
    abar = cd.Diffusion(schedule="cosine").alphas_cumprod
    for t in (0, 100, 499, 900):  # Nichol & Dhariwal 2021, Eq. 17, written out again
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t + 1, 0)]
        assert abar[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)


def test_min_snr_weights():
    for prediction in ("eps", "v"):
        d = cd.Diffusion(schedule="cosine", prediction=prediction, min_snr=5.0)
        for t in (10, 400, 500, 950):
            snr = (d.alphas_cumprod[t] / (1 - d.alphas_cumprod[t])).item()
            expected = min(snr, 5) / (snr if prediction == "eps" else snr + 1)
            assert d.loss_weight[t].item() == pytest.approx(expected)
    assert (cd.Diffusion().loss_weight == 1).all()


def test_losses_are_weighted():
    t, x0, eps = torch.tensor([900, 100]), torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain, weighted = (
        cd.Diffusion(prediction="v", min_snr=m).to("cpu").losses(Counting(), x0, t, eps)
        for m in (0, 5)
    )
    weight = cd.Diffusion(prediction="v", min_snr=5.0).loss_weight[t].float()
    torch.testing.assert_close(weighted, plain * weight)


# ------------------------------------------------------------------------------------------------
# The formulas
# ------------------------------------------------------------------------------------------------


def test_q_sample_is_many_small_steps_at_once():
    """Eq. 2 applied t+1 times gives the mean and variance that Eq. 4 states."""
    d, t = cd.Diffusion(), 300
    mean, variance = 1.0, 0.0
    for beta in d.betas[: t + 1].tolist():
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    ts = torch.tensor([t])
    assert d.q_sample(one, ts, zero).item() == pytest.approx(mean)
    assert d.q_sample(zero, ts, one).item() == pytest.approx(variance**0.5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_perfect_answer_gives_back_the_picture(prediction):
    d = cd.Diffusion(schedule="cosine", prediction=prediction)
    x0, eps = torch.rand(5, 3, 4, 4).double() * 2 - 1, torch.randn(5, 3, 4, 4).double()
    t = torch.tensor([0, 1, 500, 990, 998])
    x_t = d.q_sample(x0, t, eps)
    torch.testing.assert_close(d.x0_from(d.target(x0, t, eps), x_t, t), x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(d.predict_x0(x_t, t, eps), x0, rtol=0, atol=1e-8)


@pytest.mark.parametrize("t", [1, 2, 50, 500, 999])
def test_q_posterior_is_bayes_rule(t):
    """p(x_{t-1} | x_t, x0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x0), summed up on a fine grid."""
    d, x0, x_t = cd.Diffusion(), 0.4, 0.7
    beta, abar_prev = d.betas[t].item(), d.alphas_cumprod[t - 1].item()
    grid = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_p = -((x_t - (1 - beta) ** 0.5 * grid) ** 2) / (2 * beta)
    log_p += -((grid - abar_prev**0.5 * x0) ** 2) / (2 * (1 - abar_prev))
    p = (log_p - log_p.max()).exp()
    p /= p.sum()
    mean = (p * grid).sum()
    variance = (p * (grid - mean) ** 2).sum()
    x0, x_t = (torch.full((1, 1, 1, 1), v).double() for v in (x0, x_t))
    got_mean, got_variance, got_log = d.q_posterior(x0, x_t, torch.tensor([t]))
    assert got_mean.item() == pytest.approx(mean.item(), rel=1e-6)
    assert got_variance.item() == pytest.approx(variance.item(), rel=1e-6)
    assert got_log.item() == pytest.approx(variance.log().item(), rel=1e-6)


def test_one_step_back_with_eta_1_is_the_papers_posterior():
    d, z = cd.Diffusion(), torch.randn(3, 3, 4, 4).double()
    x0, x_t = torch.randn(2, 3, 3, 4, 4).double().unbind()
    t = torch.tensor([1, 300, 999])
    mean, variance, _ = d.q_posterior(x0, x_t, t)
    for sampler, v in (("ddpm", variance), ("ddpm-large", cd.at(d.betas, t))):
        got = cd.step_back(d, x_t, x0, t, t - 1, sampler, 0.0, lambda: z)
        torch.testing.assert_close(got, mean + v.sqrt() * z)
    got = cd.step_back(d, x_t, x0, t, t - 1, "ddim", 1.0, lambda: z)
    torch.testing.assert_close(got, mean + variance.sqrt() * z)


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "ddpm", "ddpm-large"])
def test_no_noise_after_the_last_step(sampler, monkeypatch):
    """What comes out is the network's last guess; the last step that adds noise is before it."""
    levels, step_back = [], cd.step_back
    monkeypatch.setattr(cd, "step_back", lambda *a: levels.append(a[4].tolist()) or step_back(*a))
    diffusion = cd.Diffusion(timesteps=20).to("cpu")
    *_, (t, x_t, x0) = cd.sample(Counting(), diffusion, 2, sampler, 20, seed=1)
    assert t == 0 and len(levels) == 19 and levels[-1] == [0, 0]
    guess = diffusion.predict_x0(x_t, torch.zeros(2, dtype=torch.long), x_t)  # not leaned
    assert torch.equal(x0, guess.clamp(-1, 1))  # Counting says: all of x_t is noise


def chain_std(d, rungs, sampler, std, eta=0.0):
    """The exact standard deviation at the end of a chain if the data is N(0, std²) per value.

    The ideal guess is then linear, x0 = √ᾱ·std²/(ᾱ·std² + 1−ᾱ)·x_t, so a step is x' = a·x + b·z,
    and a and b can be read off the program's own step by feeding it ones and zeros.
    """
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    variance = 1.0
    for t, t_next in zip(rungs, [*rungs[1:], None]):
        abar = d.alphas_cumprod[t]
        guess = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        if t_next is None:  # the last guess is the picture
            return guess.item() * variance**0.5
        now, then = torch.tensor([t]), torch.tensor([t_next])
        a = cd.step_back(d, one, guess * one, now, then, sampler, eta, lambda: zero).item()
        b = cd.step_back(d, zero, zero, now, then, sampler, eta, lambda: one).item()
        variance = a * a * variance + b * b


def test_the_whole_chain_ends_where_theory_says():
    d = cd.Diffusion()
    rungs = cd.ladder(d, 1000)
    assert chain_std(d, rungs, "ddpm-large", 1.0) ** 2 == pytest.approx(0.9999, abs=5e-5)
    assert chain_std(d, rungs, "ddpm", 1.0) ** 2 == pytest.approx(0.9911, abs=5e-5)
    assert chain_std(d, rungs, "ddim", 1.0, eta=1.0) ** 2 == pytest.approx(0.9911, abs=5e-5)
    assert chain_std(d, rungs, "ddim", 1.0) == pytest.approx(1.0, abs=2e-3)


def test_the_ladder_keeps_the_contrast():
    """The figures of ladder()'s docstring; 14 is the mean colour of a 64 px picture, times 64."""
    d = cd.Diffusion(schedule="cosine")
    assert chain_std(d, range(999, 0, -20), "ddim", 14.0) / 14 == pytest.approx(0.84, abs=0.01)
    assert chain_std(d, cd.ladder(d, 50), "ddim", 14.0) / 14 == pytest.approx(0.94, abs=0.01)


def test_looking_ahead_is_of_second_order(monkeypatch):
    """The flow without noise is known exactly for N(0, std²): x_t stays so many sigmas from 0."""
    d, std = cd.Diffusion(schedule="cosine", prediction="v").to("cpu"), 0.25

    class Ideal(Counting):
        def forward(self, x, t):
            abar = cd.at(d.alphas_cumprod, t)
            x0 = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar) * x
            return d.target(x0, t, (x - abar.sqrt() * x0) / (1 - abar).sqrt())

    def error(sampler, steps):
        chain = list(cd.sample(Ideal(), d, 1, sampler, steps))
        (first, x_T, _), (last, _, x0) = chain[0], chain[-1]
        abar = d.alphas_cumprod[[first, last]]
        sigma = (abar * std**2 + 1 - abar).sqrt()  # of x_t, at both ends
        exact = x_T / sigma[0] * abar[1].sqrt() * std**2 / sigma[1]
        return (x0 / exact - 1).abs().median().item()

    assert error("dpm", 25) < error("ddim", 50)
    monkeypatch.setattr(cd, "LEAN_ABOVE", 0)  # to the end, as the authors do
    assert error("dpm", 15) < 0.5 * error("ddim", 50)
    assert error("dpm", 40) < 0.3 * error("dpm", 20)  # twice the calls, a quarter of the error
    assert 0.4 < error("ddim", 40) / error("ddim", 20) < 0.6  # half of it


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A stand-in network that notes each t it is asked for."""

    size = 4

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(())), []

    def forward(self, x, t):
        self.asked.append(t.tolist())
        return self.weight * x


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 50, 333, 999, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_ladder_starts_at_the_top_and_never_stays(steps, schedule):
    rungs = cd.ladder(cd.Diffusion(schedule=schedule), steps)
    assert len(rungs) == steps and rungs[0] == 999 and rungs[-1] >= 0
    assert all(a > b for a, b in zip(rungs, rungs[1:]))


@pytest.mark.parametrize(
    "sampler, steps", [("dpm", 15), ("ddim", 1), ("ddim", 13), ("ddpm", 7), ("ddpm", 1000)]
)
def test_a_sampler_makes_exactly_the_calls_asked_for(sampler, steps):
    model = Counting()
    seen = list(cd.sample(model, cd.Diffusion().to("cpu"), 2, sampler, steps))
    assert len(model.asked) == len(seen) == steps
    assert model.asked[0] == [999, 999]
    assert [t for t, _, _ in seen] == [t for t, _ in model.asked]
    assert all(x_t.shape == x0.shape == (2, 3, 4, 4) for _, x_t, x0 in seen)
    assert all(x0.abs().max() <= 1 for _, _, x0 in seen)


@pytest.mark.parametrize("sampler, eta", [("dpm", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_picture_i_of_a_seed_is_always_the_same(sampler, eta):
    model, d = small_unet().eval(), cd.Diffusion(prediction="v", schedule="cosine").to("cpu")

    def draw(n, first, seed=3):
        *_, (_, _, x0) = cd.sample(model, d, n, sampler, 6, eta, seed, first)
        return x0

    together = draw(4, 0)
    torch.testing.assert_close(torch.cat([draw(1, 0), draw(3, 1)]), together, rtol=0, atol=2e-2)
    assert (draw(4, 0) == together).all()
    assert (draw(4, 0, seed=4) - together).abs().mean() > 0.05
    assert (together[0] - together[1]).abs().mean() > 0.05


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------


def test_the_papers_network_has_the_papers_size():
    model = cd.UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


@pytest.mark.parametrize("size, channels", [(32, 8), (48, 36), (64, 32)])
def test_shapes(size, channels):
    s = cd.complete(cd.Settings(data=("x",), size=size, channels=channels))
    model = cd.to_device(cd.make_unet(s), torch.device("cpu"))
    x = torch.randn(2, 3, size, size)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(x, torch.tensor([0, 999]))
        assert y.shape == x.shape and y.dtype == torch.float32


def test_time_embedding_is_sine_then_cosine():
    e = cd.time_embedding(torch.tensor([0, 1, 500]), 8)
    assert e.shape == (3, 8)
    assert e[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert e[2, 0].item() == pytest.approx(math.sin(500), abs=1e-4)
    assert e[1, 3].item() == pytest.approx(math.sin(1e-4), abs=1e-7)  # slowest: exponent half-1
    assert e[1, 5].item() == pytest.approx(math.cos(10000 ** (-1 / 3)), abs=1e-6)


def test_a_fresh_network_guesses_zero_and_so_has_loss_1():
    torch.manual_seed(0)
    model, d = cd.UNet(16, 8, (1, 2), 1, (8,)), cd.Diffusion().to("cpu")
    x0, eps = torch.rand(64, 3, 16, 16) * 2 - 1, torch.randn(64, 3, 16, 16)
    t = torch.randint(1000, (64,))
    assert (model(x0, t) == 0).all()
    assert d.loss(model, x0, t, eps).item() == pytest.approx(1.0, abs=0.03)


def test_the_network_uses_t_skips_and_every_weight():
    model, x = small_unet(), torch.randn(2, 3, 16, 16)
    assert (model(x, torch.tensor([0, 0])) - model(x, torch.tensor([900, 900]))).abs().max() > 1e-3
    model(x, torch.tensor([3, 700])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_downsampling_pads_right_and_bottom():
    layer = cd.Downsample(1, 1, 3, stride=2)
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    corner = layer(torch.ones(1, 1, 4, 4), None)
    assert corner.flatten().tolist() == [9, 6, 6, 4]


@pytest.mark.parametrize(
    "dtype, mean, tolerance",
    [(torch.float32, 1, 1e-5), (torch.float32, 30, 2e-3), (torch.bfloat16, 3, 3e-2)],
)
def test_our_group_norm_is_torchs(dtype, mean, tolerance):
    torch.manual_seed(0)
    ours, theirs = cd.GroupNorm(4, 16, eps=1e-6), nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x, weight = torch.randn(3, 16, 8, 8) * 2 + mean, torch.randn(3, 16, 8, 8)
    results = []
    for layer, data in ((ours, x.to(dtype)), (theirs, x.to(dtype).float())):
        data = data.to(memory_format=torch.channels_last).requires_grad_()
        y = layer(data)
        (y.float() * weight).sum().backward()
        results.append((y, data.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*results):
        assert ((a.float() - b).abs().max() / b.abs().max()).item() < tolerance


def test_attention_is_torchs():
    torch.manual_seed(0)
    layer = cd.Attention(16)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 16, 4, 4)
    y = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    y = F.scaled_dot_product_attention(layer.q(y), layer.k(y), layer.v(y))
    expected = x + layer.out(y).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_upsampling_repeats_pixels():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert cd.upsample(x)[0, 0].tolist() == rows


# ------------------------------------------------------------------------------------------------
# Averaging
# ------------------------------------------------------------------------------------------------


def test_ema_warms_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = cd.EMA(model, decay=0.9)
    expected = 0.0
    for n in range(200):
        nn.init.constant_(model.weight, n)
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        if n == 1:
            assert ema.model.weight.item() > 0.5  # after two steps the start is all but forgotten
    assert not ema.model.weight.requires_grad


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


def halves(width, height, left=(250, 0, 0), right=(0, 0, 250)):
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def near(pixel, colour, by=12):
    return all(abs(int(a) - b) <= by for a, b in zip(pixel, colour))


def test_every_kind_of_picture_is_read(tmp_path):
    red = Image.new("RGB", (40, 30), (250, 0, 0))
    for suffix in ("jpg", "JPEG", "png", "webp", "bmp", "gif"):
        red.save(tmp_path / f"red.{suffix}")
    for suffix in ("jpg", "JPEG", "png", "webp", "bmp", "gif"):
        picture, complaint = read(tmp_path / f"red.{suffix}", 16)
        assert picture.shape == (16, 16, 3) and picture.dtype == torch.uint8 and not complaint
        assert near(picture[8, 8], (250, 0, 0)), suffix
    Image.new("L", (20, 20), 100).save(tmp_path / "grey.jpg")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (20, 20), (0, 0)).save(tmp_path / "clear2.png")
    red.quantize(4).save(tmp_path / "palette.png")
    Image.new("I;16", (20, 20), 100 * 257).save(tmp_path / "deep.png")
    Image.new("1", (20, 20), 1).save(tmp_path / "bit.png")
    expected = {"grey.jpg": (100,) * 3, "cmyk.jpg": (255, 0, 0), "clear.png": (255,) * 3}
    expected |= {"clear2.png": (255,) * 3, "palette.png": (250, 0, 0), "deep.png": (100,) * 3}
    expected |= {"bit.png": (255,) * 3}
    for name, colour in expected.items():
        assert near(read(tmp_path / name, 16)[0][8, 8], colour), name


@pytest.mark.parametrize("width, height", [(500, 375), (1023, 768), (333, 777), (129, 65), (7, 9)])
def test_any_size_of_jpeg_is_read(tmp_path, width, height):
    """Decoding at reduced scale rounds the sides up; the crop must not follow."""
    halves(width, height).save(tmp_path / "a.jpg", quality=95)
    for size in (16, 32, 64):
        picture, _ = read(tmp_path / "a.jpg", size)
        assert near(picture[size // 2, 1], (250, 0, 0), 40), (width, height, size)
        assert near(picture[size // 2, -2], (0, 0, 250), 40), (width, height, size)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    halves(40, 40).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbagegarbage", quality=95)
    assert near(read(tmp_path / "a.jpg", 16)[0][8, 2], (250, 0, 0))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_wide_picture_is_cropped_not_squashed(tmp_path, suffix):
    image = Image.new("RGB", (900, 300), (0, 0, 0))
    image.paste((250, 0, 0), (300, 0, 450, 300))
    image.paste((0, 0, 250), (450, 0, 600, 300))
    image.save(tmp_path / f"wide.{suffix}", quality=95)
    picture, _ = read(tmp_path / f"wide.{suffix}", 16)
    assert near(picture[8, 1], (250, 0, 0)) and near(picture[8, 6], (250, 0, 0))
    assert near(picture[8, 9], (0, 0, 250)) and near(picture[8, 14], (0, 0, 250))


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me 90 degrees clockwise to see me upright"
    halves(40, 40).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture, _ = read(tmp_path / "turned.jpg", 16)
    assert near(picture[2, 8], (250, 0, 0)) and near(picture[13, 8], (0, 0, 250))


FACE = "9 110 60 130 60 120 75 100 50 100 25 105 45 135 45 140 25 140 50"


def test_a_cat_file_crops_to_the_face(tmp_path):
    image = Image.new("RGB", (200, 100), (0, 0, 0))
    image.paste((0, 250, 0), (90, 15, 150, 90))
    image.save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "a.jpg.cat").write_text(FACE + " ")
    picture, complaint = read(tmp_path / "a.jpg", 16)
    assert not complaint and all(near(picture[y, x], (0, 250, 0)) for y in (1, 14) for x in (1, 14))
    (tmp_path / "a.jpg.cat").write_text(
        "9 190 60 220 60 205 75 180 50 180 25 185 45 215 45 220 25 220 50"
    )
    left, top, right, bottom = cd.face_box(tmp_path / "a.jpg", 200, 100)  # points outside
    assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100 and right - left == bottom - top


BAD = ["", "9", "9 1 2", "8 " + FACE[2:], FACE + " 3", "9" + " 5" * 18, "nine cats", "\0\xff"]
BAD += ["9 nan" + " 5" * 17, "9" + " 999999999 1" * 9, FACE.replace(" 1", " 91")]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_cat_file_is_reported_and_ignored(tmp_path, text):
    halves(40, 20).save(tmp_path / "a.png")
    (tmp_path / "a.png.cat").write_text(text)
    picture, complaint = read(tmp_path / "a.png", 16)
    assert ".cat" in complaint and near(picture[8, 2], (250, 0, 0))


def test_bad_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    deep = tmp_path / "data" / "deep" / "er"
    deep.mkdir(parents=True)
    for i in range(3):
        cd.draw_cat(random.Random(i), 64).save(deep / f"{i}.JPG")
    whole = (deep / "0.JPG").read_bytes()
    (deep / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (deep / "empty.png").touch()
    (deep / "text.gif").write_text("not a picture")
    (deep / "evil\n\x1b[2J.bmp").write_text("nor this")
    (deep / "gone.jpg").symlink_to("nowhere")
    (deep / "folder.jpg").mkdir()
    (deep / "._0.JPG").write_text("macOS leaves these")
    (deep / "notes.txt").write_text("stray")
    (tmp_path / "data" / ".thumbs").mkdir()
    (tmp_path / "data" / ".thumbs" / "0.JPG").write_bytes(whole)
    os.mkfifo(deep / "pipe.jpg")
    os.mkfifo(deep / "0.JPG.cat")
    pictures = cd.map_pictures(cd.cache_pictures([tmp_path / "data", deep], 16, "run"), 16)
    told = capsys.readouterr().out
    assert pictures.shape == (3, 16, 16, 3)
    assert "7 of 10 pictures skipped" in told and "empty.png" in told and "half.jpg" in told
    assert "\x1b" not in told and "._0" not in told


def test_no_pictures_and_no_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("train", "--data", tmp_path / "empty") == 2
    assert ".jpg" in capsys.readouterr().err
    assert run("train", "--data", tmp_path / "missing") == 2
    assert "missing" in capsys.readouterr().err
    (tmp_path / "empty" / "bad.png").touch()
    assert run("train", "--data", tmp_path / "empty") == 2
    assert not list(Path("run").glob("*.u8")) and not Path("run/checkpoint.pt").exists()


def test_pictures_are_decoded_once_and_anew_when_something_changes(tmp_path, monkeypatch):
    data, decoded, read_picture = tmp_path / "data", [], cd.read_picture
    monkeypatch.setattr(cd, "read_picture", lambda *a: decoded.append(a) or read_picture(*a))
    data.mkdir()
    for i in range(3):
        cd.draw_cat(random.Random(i), 64).save(data / f"{i}.png")

    def files(size=16):
        decoded.clear()
        cache = cd.cache_pictures([data], size, "run")
        assert [p.name for p in Path("run").iterdir()] == [cache.name]  # and no old ones
        return len(decoded), len(cd.map_pictures(cache, size))

    assert files() == (3, 3)
    assert files() == (0, 3)
    assert files(32) == (3, 3)
    (data / "0.png.cat").write_text("9 10 10 50 10 30 40 5 5 8 2 12 5 50 5 55 2")
    assert files(32) == (3, 3)
    assert files(32) == (0, 3)
    os.utime(data / "1.png", (1, 1))
    assert files(32) == (3, 3)
    (data / "2.png").unlink()
    assert files(32) == (2, 2)
    assert (read(data / "1.png", 32)[0] == cd.map_pictures(*cache_of(data, 32))[1]).all()


def test_a_run_does_not_learn_its_own_previews(tmp_path):
    for name in ("cat.png", "run/previews/000001.png", "running/cat.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        cd.draw_cat(random.Random(0), 32).save(name)
    assert len(cd.map_pictures(cd.cache_pictures(["."], 16, "run"), 16)) == 2


def cache_of(data, size):
    return cd.cache_pictures([data], size, "run"), size


def test_a_half_written_cache_is_never_used(tmp_path, monkeypatch):
    calls = []

    def interrupted(*a):
        calls.append(1)
        yield bytes(16 * 16 * 3)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cd, "find_pictures", lambda folders: [tmp_path / "a.png"])
    monkeypatch.setattr(cd, "decode_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cd.cache_pictures(["x"], 16, "run")
    assert not list(Path("run").glob("*.u8"))
    assert cd.map_pictures(cd.cache_pictures(["x"], 16, "run"), 16).shape == (1, 16, 16, 3)
    assert len(calls) == 2


def test_drawn_cats_differ():
    cats = drawn(8, 32).float()
    assert cats.shape == (8, 32, 32, 3)
    assert all((a - b).abs().mean() > 5 for i, a in enumerate(cats) for b in cats[:i])


def test_a_batch_is_a_function_of_seed_and_step():
    s = cd.complete(cd.Settings(batch=64))
    pictures, cpu = drawn(20, 32), torch.device("cpu")
    a, again = (cd.draw_batch(pictures, s, 5, cpu) for _ in range(2))
    other = cd.draw_batch(pictures, s, 6, cpu)
    x0, t, eps = a
    assert all((u == v).all() for u, v in zip(a, again))
    assert not (x0 == other[0]).all() and not (eps == other[2]).all()
    assert x0.shape == eps.shape == (64, 3, 32, 32) and -1 <= x0.min() and x0.max() <= 1
    assert (t * 4 // 1000).bincount().tolist() == [16] * 4  # spread evenly
    back = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    for kind in (pictures, pictures.flip(2)):  # some as they are, some mirrored, nothing else
        back = [p for p in back if not any(torch.equal(p, q) for q in kind)]
        assert len(back) < 50
    assert not back


# ------------------------------------------------------------------------------------------------
# Checkpoint and pictures: nothing is lost
# ------------------------------------------------------------------------------------------------


def test_a_crash_while_saving_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    cd.save_checkpoint(path, {"step": 1})
    old = path.read_bytes()

    def crash(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError):
        cd.save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == old
    monkeypatch.undo()
    cd.save_checkpoint(path, {"step": 3})
    assert torch.load(path, weights_only=True)["step"] == 3


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, capsys):
    assert run("train", *SMALL, "--steps", 1) == 0
    good, path = Path("run/checkpoint.pt").read_bytes(), Path("bad.pt")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save({**state, "bomb": Bomb()}, "bomb.pt")
    for name, key, value in (
        ("huge", "mults", [64, 64]),
        ("huger", "channels", 10**9),
        ("other", "channels", 16),
        ("odd", "timesteps", "x"),
        ("long", "timesteps", 10**10),
        ("float", "mults", [1.0, 2.0]),
    ):
        torch.save({**state, "settings": {**state["settings"], key: value}}, f"{name}.pt")
    torch.save({**state, "format": "catdiffusion 0"}, "old.pt")
    torch.save({k: v for k, v in state.items() if k != "step"}, "stepless.pt")
    torch.save([1, 2], "list.pt")
    with zipfile.ZipFile("bomb2.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        with zipfile.ZipFile("run/checkpoint.pt") as whole:
            for name in whole.namelist():
                bomb.writestr(name, whole.read(name))
    written = [path.read_bytes() for path in Path(".").glob("*.pt")]
    for bad in (b"", b"hello", good[: len(good) // 2], good[:-30], *written):
        path.write_bytes(bad)
        capsys.readouterr()
        assert run("sample", "--checkpoint", path) == 2
        err = capsys.readouterr().err
        assert "bad.pt" in err and err.count("\n") == 1
    assert not Path("samples").exists() and not Path("code-was-run").exists()
    for bad in (None, [], {"state": {0: 1}}):
        torch.save({**state, "optimizer": bad}, "run/checkpoint.pt")
        assert run("train", *SMALL, "--steps", 2) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_does_not_end_the_run(monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) in (2, 3):  # the first is that of the cache of pictures
            raise OSError(28, "No space left on device", "run/checkpoint.pt.part")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    assert run("train", *SMALL, "--steps", 5, "--every", 0) == 0
    told = capsys.readouterr().out
    assert "NOT SAVED" in told and "No space left" in told and len(calls) > 3
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5


def test_a_full_disk_at_the_end_is_an_error(monkeypatch, capsys):
    assert run("train", *SMALL, "--steps", 2) == 0

    def full(number):
        raise OSError(28, "No space left on device", "run/checkpoint.pt.part")

    monkeypatch.setattr(os, "fsync", full)
    assert run("train", *SMALL, "--steps", 4) == 2
    assert "No space left" in capsys.readouterr().err
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 2


# Our layers and those of diffusers' UNet2DModel, for one residual block a floor and two floors.
LAYERS = """down.0 down_blocks.0.resnets.0|down.1 down_blocks.0.downsamplers.0.conv
down.2 down_blocks.1.resnets.0|down.2.attention down_blocks.1.attentions.0
middle.0 mid_block.resnets.0|middle.0.attention mid_block.attentions.0
middle.1 mid_block.resnets.1|up.0 up_blocks.0.resnets.0|up.0.attention up_blocks.0.attentions.0
up.1 up_blocks.0.resnets.1|up.1.attention up_blocks.0.attentions.1
up.2 up_blocks.0.upsamplers.0.conv|up.3 up_blocks.1.resnets.0|up.4 up_blocks.1.resnets.1
conv_in conv_in|norm_out conv_norm_out|conv_out conv_out
time.0 time_embedding.linear_1|time.2 time_embedding.linear_2"""
WORDS = [("time", "time_emb_proj"), ("shortcut", "conv_shortcut"), ("norm", "group_norm")]
CONFIG = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "layers_per_block": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "sample_size": 8,
}


def write_folder(folder, model, old=False):
    """A folder as diffusers writes it, in the format of today or the old one, by hand."""
    names = dict(pair.split() for pair in LAYERS.replace("\n", "|").split("|"))
    attention = [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")]
    if old:
        attention = [("q", "query"), ("k", "key"), ("v", "value"), ("out", "proj_attn")]
    weights, header, data = {}, {"__metadata__": {"format": "pt"}}, b""
    for name, value in model.state_dict().items():
        ours = max((layer for layer in names if name.startswith(f"{layer}.")), key=len)
        layer, kind = name[len(ours) + 1 :].rpartition(".")[::2]
        weights[
            ".".join(filter(None, (names[ours], dict(WORDS + attention).get(layer, layer), kind)))
        ] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if old:
        return torch.save(weights, folder / "diffusion_pytorch_model.bin")
    for name, value in weights.items():
        raw = bytes(value.contiguous().view(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    head = json.dumps(header).encode()
    whole = len(head).to_bytes(8, "little") + head + data
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("old", [False, True])
def test_a_network_in_the_layout_of_diffusers_is_read(old, tmp_path, capsys):
    torch.manual_seed(0)
    model = cd.UNet(8, 128, (1, 2), 1, (4,))
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    write_folder(tmp_path / "cat", model, old)
    loaded, diffusion, _ = cd.load_checkpoint(tmp_path / "cat")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert diffusion.prediction == "eps" and near([diffusion.betas[-1] * 1e6], [20000], 1)
    assert run("sample", "--checkpoint", tmp_path / "cat", "-n", 1, "--steps", 2) == 0
    capsys.readouterr()
    for name in (
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        "config.json",
    ):
        if (file := tmp_path / "cat" / name).exists():
            whole = file.read_bytes()
            for bad in (
                b"",
                b"\xff" * 9,
                whole[: len(whole) // 2],
                whole[: len(whole) - 40],
                b"{}",
            ):
                file.write_bytes(bad)
                assert run("sample", "--checkpoint", tmp_path / "cat", "-n", 1) == 2
                told = capsys.readouterr()
                assert told.err.count("\n") == 1 and "cat" in told.err
            file.write_bytes(whole)
    for key, value in (
        ("block_out_channels", [64, 128]),
        ("layers_per_block", 2),
        ("freq_shift", 0),
    ):
        (tmp_path / "cat" / "config.json").write_text(json.dumps(CONFIG | {key: value}))
        assert run("sample", "--checkpoint", tmp_path / "cat", "-n", 1) == 2
    assert run("sample", "--checkpoint", tmp_path) == 2


def test_a_different_picture_is_never_overwritten(tmp_path):
    a, b = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    first = cd.save_new(a, tmp_path / "new" / "cat.png")
    assert cd.save_new(a, tmp_path / "new" / "cat.png") == first
    second, third = (cd.save_new(x, tmp_path / "new" / "cat.png") for x in (b, b))
    assert second == third != first and Image.open(first).getpixel((0, 0)) == (255, 0, 0)


def test_images_and_grid():
    x = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 1.0, 9.0, -9.0)])
    images = cd.to_images(x)
    assert [i.getpixel((0, 0))[0] for i in images] == [0, 128, 255, 255, 0]
    assert cd.make_grid(images).size == (3 * 6 + 2, 2 * 6 + 2)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def tensors(path):
    """All tensors of a checkpoint, flat, by name."""

    def walk(value, name):
        if torch.is_tensor(value):
            yield name, value
        elif isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, v in items:
                yield from walk(v, f"{name}/{key}")

    return dict(walk(torch.load(path, weights_only=True), ""))


def test_stopped_and_resumed_is_bit_for_bit_the_run_that_was_not():
    common = [*SMALL, "--dropout", 0.2]
    assert run("train", *common, "--steps", 7, "--run", "whole") == 0
    assert run("train", *common, "--steps", 3, "--run", "parts") == 0
    assert run("train", *common, "--steps", 7, "--run", "parts") == 0
    whole, parts = tensors("whole/checkpoint.pt"), tensors("parts/checkpoint.pt")
    assert whole.keys() == parts.keys() and len(whole) > 100
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(number, code, monkeypatch, capsys):
    calls, losses = [], cd.Diffusion.losses

    def press(self, *rest):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the impatient press twice
        return losses(self, *rest)

    monkeypatch.setattr(cd.Diffusion, "losses", press)
    assert run("train", *SMALL, "--steps", 9) == code
    assert "step 3" in capsys.readouterr().out
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3
    assert run("train", *SMALL, "--steps", 9) == 0
    assert len(calls) == 9


def test_accumulating_gives_the_gradient_of_the_whole_batch():
    s = cd.complete(cd.Settings(batch=8, size=16, mults=(1, 2), attention=(8,)))
    batch = cd.draw_batch(drawn(8, 16), s, 0, torch.device("cpu"))
    results = []
    for accum in (1, 4):
        model, tally = small_unet(), torch.zeros(3, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cd, "autocast", lambda device: torch.autocast("cpu", enabled=False))
            diffusion = cd.Diffusion(prediction="v").to("cpu")
            cd.train_step(model, diffusion, optimizer, 0.1, batch, accum, tally)
        results.append((torch.cat([p.detach().flatten() for p in model.parameters()]), tally))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_the_gradient_is_cut_to_length_1():
    model, tally = small_unet(), torch.zeros(3, 4)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0))
    t, x0 = torch.tensor([1, 500]), torch.full((2, 3, 16, 16), 1e4)
    cd.train_step(model, cd.Diffusion().to("cpu"), optimizer, 1.0, (x0, t, x0), 1, tally)
    step = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert step.norm().item() == pytest.approx(1, rel=1e-2)


def test_the_rate_rises_stays_and_falls(monkeypatch):
    rates, train_step = [], cd.train_step
    monkeypatch.setattr(cd, "train_step", lambda *a: rates.append(a[3]) or train_step(*a))
    assert run("train", *SMALL, "--steps", 10, "--warmup", 4, "--lr", 0.08) == 0
    assert rates == pytest.approx([0.02, 0.04, 0.06, *[0.08] * 6, 0.04])


def test_training_averages_the_weights():
    assert run("train", *SMALL, "--steps", 12) == 0
    state = torch.load("run/checkpoint.pt", weights_only=True)
    name = "down.0.conv1.weight"
    model, ema = state["model"][name], state["ema"][name]
    torch.manual_seed(0)
    assert 0 < (model - ema).abs().max() < 0.1 and not torch.equal(model, ema)
    loaded, _, step = cd.load_checkpoint("run/checkpoint.pt")
    assert step == 12 and torch.equal(loaded.state_dict()[name], ema) and not loaded.training


def test_a_network_learns():
    """Twenty cats by heart: the loss falls to less than half within eighty steps."""
    s = cd.complete(cd.Settings(batch=8, size=16, mults=(1, 2), attention=(8,)))
    pictures, cpu = drawn(20, 16), torch.device("cpu")
    torch.manual_seed(0)
    model, diffusion = cd.to_device(cd.make_unet(s), cpu), cd.make_diffusion(s).to(cpu)
    optimizer, losses = cd.make_adam(model.parameters(), 0.0, cpu), []
    for step in range(80):
        tally = torch.zeros(3, 4)
        batch = cd.draw_batch(pictures, s, step, cpu)
        cd.train_step(model, diffusion, optimizer, 3e-3, batch, 1, tally)
        losses.append((tally[0].sum() / tally[1].sum()).item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_step_without_a_number_changes_nothing():
    s = cd.complete(cd.Settings(batch=4, size=16, mults=(1, 2), attention=(8,)))
    x0, t, eps = cd.draw_batch(drawn(8, 16), s, 0, torch.device("cpu"))
    model, tally, diffusion = small_unet(), torch.zeros(3, 4), cd.Diffusion().to("cpu")
    optimizer = cd.make_adam(model.parameters(), 0.1, torch.device("cpu"))
    cd.train_step(model, diffusion, optimizer, 0.1, (x0, t, eps), 1, tally)
    before = [p.detach().clone() for p in model.parameters()]
    for k, poison in enumerate((math.nan, math.inf), 1):
        cd.train_step(model, diffusion, optimizer, 0.1, (x0 * poison, t, eps), 1, tally)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert tally[2, :2].tolist() == [k, k]
    cd.train_step(model, diffusion, optimizer, 0.1, (x0, t, eps), 1, tally)
    assert not torch.equal(before[0], next(model.parameters())) and tally[2, :2].tolist() == [0, 2]
    assert tally.isfinite().all()


@pytest.mark.parametrize("spoil", [lambda v: v * math.nan, lambda v: v + math.inf])
def test_a_loss_that_is_no_number_for_ever_stops_the_run(spoil, monkeypatch, capsys):
    """Whether the gradient is no number, either, or as if nothing were wrong."""
    assert run("train", *SMALL, "--steps", 2) == 0
    good = Path("run/checkpoint.pt").read_bytes()
    monkeypatch.setattr(cd, "REPORT", 6)
    monkeypatch.setattr(
        cd.Diffusion, "losses", lambda self, m, x0, t, eps: spoil(m(x0, t).sum()) + t
    )
    assert run("train", *SMALL, "--steps", 300) == 2
    assert "not a number" in capsys.readouterr().err
    assert Path("run/checkpoint.pt").read_bytes() == good


def test_going_on_with_other_settings_is_refused(capsys):
    assert run("train", *SMALL, "--steps", 1) == 0
    capsys.readouterr()
    for other in (["--channels", 16], ["--seed", 5], ["--ema", 0.5], ["--prediction", "eps"]):
        assert run("train", *SMALL, "--steps", 2, *other) == 2
        err = capsys.readouterr().err
        assert other[0] in err and "--run" in err and err.count("\n") == 1


def test_the_two_commands_end_to_end(capsys, monkeypatch):
    monkeypatch.setattr(cd, "REPORT", 20)
    assert run("train", *SMALL, "--steps", 30) == 0
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [20, 30, 30]
    assert 0 < records[1]["loss"] < 1 and len(records[0]["loss_by_quarter"]) == 4
    assert 0 < records[2]["sample_std"] < 1 and abs(records[2]["data_mean"]) < 1
    assert Path("run/loss.png").exists() and Path("run/previews/000030.png").exists()
    assert Image.open("run/previews/000030.png").size == (4 * 18 + 2, 4 * 18 + 2)
    assert run("sample", "-n", 3, "--steps", 4, "--batch", 2, "--gif") == 0
    names = {p.name for p in Path("samples").iterdir()}
    assert names == {f"cat-0-{x}" for x in ("0000.png", "0001.png", "0002.png", "grid.png")} | {
        "cat-0.gif"
    }
    assert Image.open("samples/cat-0-0000.png").size == (16, 16)
    assert Image.open("samples/cat-0.gif").n_frames == 4
    assert run("sample", "-n", 1, "--steps", 4, "--out", "plots/sample") == 0
    assert Path("plots/sample-0-0000.png").exists()
    assert run("sample", "-n", 1, "--sampler", "ddpm", "--steps", 4, "--seed", 1) == 0
    assert run("train", *SMALL, "--steps", 30) == 0
    assert "--steps" in capsys.readouterr().out


def test_sample_takes_your_checkpoint_else_the_one_beside_the_program(monkeypatch, capsys):
    monkeypatch.setattr(cd, "__file__", str(Path("program", "catdiffusion.py").absolute()))
    assert run("sample", "-n", 1, "--steps", 1) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert run("train", *SMALL, "--steps", 2) == 0
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
    state["ema"] = {k: v.half() for k, v in state["ema"].items()}  # as it comes with the program
    Path("program", "samples").mkdir(parents=True)
    torch.save(state, "program/samples/catdiffusion.pt")
    assert run("sample", "-n", 1, "--steps", 1) == 0
    assert "with run/checkpoint.pt, step 2" in capsys.readouterr().out
    Path("run", "checkpoint.pt").unlink()
    assert run("sample", "-n", 1, "--steps", 1) == 0
    assert "program/samples/catdiffusion.pt" in capsys.readouterr().out


def test_the_weights_beside_the_program():
    path = Path(cd.__file__).parent / "samples" / "catdiffusion.pt"
    state = torch.load(path, weights_only=True)
    assert path.stat().st_size < 20e6 and not {"model", "optimizer"} & {*state}
    assert "AFHQ" in state["about"] and "CC BY-NC 4.0" in state["about"] and state["log"]
    model, diffusion, step = cd.load_checkpoint(path)
    *_, (_, _, x0) = cd.sample(model, diffusion, 4, steps=4)
    assert model.size == 64 and step > 1000 and 0.2 < x0.std() < 0.8


def test_few_pictures_train_with_a_warning(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    cd.draw_cat(random.Random(0), 32).save(tmp_path / "one" / "cat.png")
    assert run("train", "--data", tmp_path / "one", *SMALL, "--steps", 1) == 0
    assert "1 pictures are few" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# Looking at what came out: the best of many, the nearest in training, a picture half forgotten
# ------------------------------------------------------------------------------------------------


def save_small(path):
    """A checkpoint of a small network at random weights. Returns its path."""
    s = cd.complete(cd.Settings(size=16, channels=8, mults=(1, 2), attention=(8,)))
    weights = {"model": small_unet().state_dict(), "ema": small_unet().state_dict()}
    state = {"settings": dataclasses.asdict(s), "step": 7, "seconds": 0.0, **weights}
    cd.save_checkpoint(Path(path), state)
    return Path(path)


def save_drawn(n, folder):
    """n drawn cats of 16 px as PNG files."""
    Path(folder).mkdir()
    for i in range(n):
        cd.draw_cat(random.Random(i), 16).save(f"{folder}/{i}.png")


def test_a_picture_can_be_made_again_from_its_own_text(tmp_path):
    path = save_small("a.pt")
    assert (
        run("sample", "--checkpoint", path, "-n", 3, "--steps", 4, "--seed", 5, "--out", "x/p") == 0
    )
    picture = Image.open("x/p-5-0002.png")
    made = json.loads(picture.text["catdiffusion"])
    assert made["checkpoint"] == hashlib.sha256(path.read_bytes()).hexdigest()
    model, diffusion, step = cd.load_checkpoint(path)
    assert made["step"] == step
    chain = cd.sample(
        model,
        diffusion,
        1,
        made["sampler"],
        made["calls"],
        made["eta"],
        made["seed"],
        made["index"],
    )
    again = cd.to_images(list(chain)[-1][2])[0]
    assert max(max(pair) for pair in ImageChops.difference(again, picture).getextrema()) <= 1
    words = "--steps", 4, "--seed", 5, "-n", 1, "--first", 2, "--out", "y/p"
    assert run("sample", "--checkpoint", path, *words) == 0
    assert [p.name for p in sorted(Path("y").iterdir())] == ["p-5-0002.png", "p-5-grid.png"]


def test_best_of_keeps_what_the_judge_likes(monkeypatch, capsys):
    """The judge here likes bright pictures; seven in eight are thrown away, in several batches."""
    path = save_small("a.pt")
    monkeypatch.setattr(cd, "make_judge", lambda classes: lambda x: x.mean((1, 2, 3)))
    words = "--checkpoint", path, "--steps", 2, "--batch", 5
    assert run("sample", *words, "-n", 16, "--out", "all/p") == 0
    assert run("sample", *words, "-n", 2, "--best-of", 8, "--out", "best/p") == 0
    bright = {}
    for file in Path("all").glob("p-0-0*.png"):
        bright[file.name] = sum(Image.open(file).convert("RGB").tobytes())
        assert json.loads(Image.open(file).text["catdiffusion"])["score"] is None
    wanted = sorted(bright, key=bright.get)[-2:]
    assert sorted(p.name for p in Path("best").glob("p-0-0*.png")) == sorted(wanted)
    scores = [
        json.loads(Image.open(Path("best", name)).text["catdiffusion"])["score"] for name in wanted
    ]
    assert scores == sorted(scores) and f"{scores[-1]:.3f}" in capsys.readouterr().out
    assert run("sample", "--best-of", 2, "--classes", 1000) == 2


def test_the_judge_is_torchvisions_network(tmp_path, monkeypatch, capsys):
    """At random weights, put where torchvision's download would lie. A picture of one colour stays
    one when it is resized, so all of the preparation that is left is to be worked out by hand."""
    from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = mobilenet_v3_large().eval()
    file = tmp_path / "hub/checkpoints" / Path(MobileNet_V3_Large_Weights.IMAGENET1K_V2.url).name
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    colour = torch.tensor([0.2, -0.4, 0.9]).view(1, 3, 1, 1)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    ready = ((colour + 1) / 2 - mean) / std
    with torch.no_grad():
        expected = network(ready.expand(2, 3, 224, 224)).softmax(1)[:, [281, 7]].sum(1)
        found = cd.make_judge((281, 7))(colour.expand(2, 3, 64, 64))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def no_network(*_, **__):
        raise URLError("no route to host")

    save_small("a.pt")
    for spoil in (lambda: file.write_bytes(b"half a file"), file.unlink):
        spoil()
        monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
        assert run("sample", "--best-of", 2, "--checkpoint", "a.pt") == 2
        error = capsys.readouterr().err
        assert error.startswith("catdiffusion: --best-of: no classifier from https://")
        assert error.count("\n") == 1 and not Path("samples").exists()


def test_nearest_finds_a_copy_even_mirrored():
    torch.manual_seed(0)
    pictures = torch.randint(256, (700, 8, 8, 3), dtype=torch.uint8)
    ours = torch.cat(
        [pictures[[3, 650]].flip(2), torch.randint(256, (1, 8, 8, 3), dtype=torch.uint8)]
    )
    far, which = cd.nearest(ours, pictures)
    assert which[:2, 0].tolist() == [3, 650] and far[:2, 0].max() < 0.1 < far[:2, 1].min()
    straight = (ours[2].double() - pictures.double()).square().sum((1, 2, 3)).sqrt() / 127.5
    mirrored = (ours[2].double() - pictures.flip(2).double()).square().sum((1, 2, 3)).sqrt() / 127.5
    brute = torch.minimum(straight, mirrored).sort()
    assert which[2].tolist() == brute.indices[:2].tolist()
    assert far[2].tolist() == pytest.approx(brute.values[:2].tolist(), rel=1e-4)


def test_the_sheet_of_nearest_pictures(capsys):
    """Samples that are copies are found out; and without samples to compare with, one line."""
    path = save_small("a.pt")
    assert run("sample", "--checkpoint", path, "-n", 4, "--steps", 2, "--out", "x/p") == 0
    save_drawn(20, "data")
    words = "--checkpoint", path, "-n", 4, "--steps", 2, "--out", "x/p", "--nearest"
    assert run("sample", *words, "data") == 0
    before = capsys.readouterr().out
    for i in range(4):
        Image.open(f"x/p-0-000{i}.png").transpose(Image.FLIP_LEFT_RIGHT).save(f"data/copy{i}.png")
    assert run("sample", *words, "data", "--out", "y/p") == 0
    assert "100% are nearer" in capsys.readouterr().out and "100% are nearer" not in before
    sheet = Image.open("y/p-0-nearest.png")  # pairs of 16 px, eight pictures in a row
    for i in range(4):
        left = sheet.crop((2 + 36 * i, 2, 18 + 36 * i, 18))
        right = sheet.crop((20 + 36 * i, 2, 36 + 36 * i, 18)).transpose(Image.FLIP_LEFT_RIGHT)
        assert left.tobytes() == right.tobytes()
    assert run("sample", *words, "nowhere", "--out", "z/p") == 2 and not Path("z").exists()


class Knows(nn.Module):
    """A network that knows the one picture there is, and so always guesses right."""

    def __init__(self, x0, diffusion):
        super().__init__()
        self.x0, self.diffusion, self.size = nn.Parameter(x0), diffusion, x0.shape[-1]

    def forward(self, x, t):
        abar = cd.at(self.diffusion.alphas_cumprod, t)
        eps = (x - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return abar.sqrt() * eps - (1 - abar).sqrt() * self.x0


def test_reconstruction_by_a_network_that_knows_the_picture():
    """Three rows of six: the picture; then it with ever more noise; guessed; and drawn anew."""
    x0 = cd.as_floats(drawn(1, 16))
    d = cd.Diffusion(schedule="cosine", prediction="v").to("cpu")
    sheet = cd.reconstruct(Knows(x0, d), d, x0)
    tiles = [
        [sheet.crop((2 + 18 * i, 2 + 18 * k, 18 + 18 * i, 18 + 18 * k)) for i in range(6)]
        for k in range(3)
    ]
    clean = cd.to_images(x0)[0]

    def far(tile):
        return sum(abs(a - b) for a, b in zip(tile.tobytes(), clean.tobytes())) / 768

    assert tiles[0][0].tobytes() == clean.tobytes()
    noisy = [far(tile) for tile in tiles[0]]
    assert noisy == sorted(noisy) and noisy[1] > 5
    assert max(far(tile) for row in tiles[1:] for tile in row) < 1


def test_sampling_can_begin_half_way():
    model, d = small_unet(), cd.Diffusion(schedule="cosine", prediction="v").to("cpu")
    whole = list(cd.sample(model, d, 2, "ddim", 10))
    t, x_t, _ = whole[4]
    rest = list(cd.sample(model, d, 2, "ddim", 10, start=(t, x_t)))
    assert [step[0] for step in rest] == [step[0] for step in whole[4:]]
    torch.testing.assert_close(rest[-1][2], whole[-1][2])


def test_previews_become_a_film_and_drifting_is_told(monkeypatch, capsys):
    drawn_up, apart = cd.preview, iter([0.5, 0.1, 0.15, 0.4])
    monkeypatch.setattr(cd, "preview", lambda *a: drawn_up(*a) | {"apart": next(apart)})
    for steps in (1, 2, 3, 4):  # each run ends with a preview
        assert run("train", *SMALL, "--steps", steps) == 0
        assert ("drift" in capsys.readouterr().out) == (steps == 4)
    with Image.open("run/progress.gif") as film:
        assert film.n_frames == len(list(Path("run/previews").glob("*.png"))) == 4
    assert Image.open("run/reconstruction.png").size == (6 * 18 + 2, 3 * 18 + 2)
    numbers = [r for r in map(json.loads, open("run/log.jsonl")) if "apart" in r]
    assert {"sample_mean", "data_mean", "sample_std", "data_std"} <= set(numbers[0])


def spoil_shape(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)  # torch would write past its end


def spoil_average(state):
    state["optimizer"]["state"][0]["exp_avg_sq"] *= math.nan


def spoil_weight(state):
    for name in ("ema", "model"):
        state[name]["conv_in.bias"][0] = math.inf


def swell(state):
    for name in ("ema", "model"):  # few bytes in the file, many in memory
        shape = state[name]["conv_in.weight"].shape
        state[name]["conv_in.weight"] = torch.zeros(1).expand(shape)


def spoil_step(state):
    state["step"] = -5


def spoil_time(state):
    state["seconds"] = math.nan


@pytest.mark.parametrize(
    "spoil", [spoil_shape, spoil_average, spoil_weight, swell, spoil_step, spoil_time]
)
def test_a_checkpoint_with_odd_numbers_gets_one_line(spoil, capfd):
    assert run("train", *SMALL, "--steps", 1) == 0
    path = Path("run/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    before = path.read_bytes()
    capfd.readouterr()
    assert run("train", *SMALL, "--steps", 2) == 2 and path.read_bytes() == before
    error = capfd.readouterr().err
    assert error.startswith("catdiffusion: run/checkpoint.pt: ") and error.count("\n") == 1
    if spoil not in (spoil_shape, spoil_average):  # sample looks at no averages
        assert run("sample", "-n", 1, "--steps", 1) == 2


def test_one_flipped_bit_in_the_weights_is_noticed():
    path = save_small("a.pt")
    whole, small, noticed = path.read_bytes(), cd.read_checkpoint(path), 0
    for at in random.Random(0).sample(range(len(whole) // 8, 7 * len(whole) // 8), 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            state = cd.read_checkpoint(path)
        except cd.Failure:
            noticed += 1
        else:  # it lies between two parts, where nothing is said
            assert all(torch.equal(v, small["ema"][name]) for name, v in state["ema"].items())
    assert noticed > 10


def test_many_times_the_same_picture_is_few(capsys):
    save_drawn(1, "data")
    for i in range(1, 1000):
        os.link("data/0.png", f"data/{i}.png")
    assert run("train", *SMALL, "--data", "data", "--steps", 1) == 0
    assert "note: 1 pictures are few" in capsys.readouterr().out


def test_output_that_nobody_reads_costs_nothing():
    """`... | head -1`, with and without Python's buffer: trained, saved, and not a word."""
    words = [sys.executable, cd.__file__, "train", *SMALL, "--steps", "60", "--run"]
    pipe, children = subprocess.PIPE, {}
    for buffer in ("", "1"):
        environment = {**os.environ, "PYTHONUNBUFFERED": buffer, "OMP_NUM_THREADS": "1"}
        how = {"env": environment, "stdout": pipe, "stderr": pipe}
        children[buffer] = subprocess.Popen([*words, f"r{buffer}"], **how)
    for buffer, child in children.items():
        child.stdout.readline()
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 0)
        assert cd.read_checkpoint(f"r{buffer}/checkpoint.pt")["step"] == 60


def test_a_cut_cache_is_made_anew():
    save_drawn(5, "data")
    cache = cd.cache_pictures(["data"], 16, "run")
    whole = cache.read_bytes()
    for spoilt in (whole[:1000], b""):
        cache.write_bytes(spoilt)
        assert cd.cache_pictures(["data"], 16, "run").read_bytes() == whole


def test_other_pictures_are_told(capsys):
    save_drawn(5, "data")
    assert run("train", *SMALL, "--data", "./data", "--steps", 1) == 0
    assert run("train", *SMALL, "--data", "data", "--steps", 2) == 0
    assert "the pictures are not those" not in capsys.readouterr().out
    Path("data/4.png").unlink()
    assert run("train", *SMALL, "--data", "data", "--steps", 3) == 0
    assert "the pictures are not those" in capsys.readouterr().out


@pytest.mark.parametrize("size, side", [(32, 16), (64, 16), (96, 12), (128, 16), (256, 16)])
def test_every_size_has_a_network(size, side):
    s = cd.complete(cd.Settings(size=size, channels=8))
    assert s.attention == (side,) and 4 <= size >> len(s.mults) - 1 <= 15
    model = cd.make_unet(s)
    assert model(torch.zeros(1, 3, size, size), torch.tensor([5])).shape == (1, 3, size, size)
    looking = [cd.Attention is type(getattr(layer, "attention", None)) for layer in model.down]
    assert sum(looking) == s.blocks  # on one floor


def test_three_lines_of_python_draw_pictures():
    """Those of the README, word for word; and to import the program does nothing."""
    readme = (Path(cd.__file__).parent / "README.md").read_text()
    lines = re.search(r"(    from catdiffusion import .*\n(?:    .*\n)+)", readme)[1]
    code = textwrap.dedent(lines).replace('"samples/', f'"{Path(cd.__file__).parent}/samples/')
    environment = {**os.environ, "PYTHONPATH": str(Path(cd.__file__).parent)}
    for text, files in (("import catdiffusion", []), (code, ["cat.png"])):
        done = subprocess.run(
            [sys.executable, "-B", "-c", text], env=environment, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert sorted(os.listdir()) == files
    assert Image.open("cat.png").size == (64, 64)


# ------------------------------------------------------------------------------------------------
# Command line and devices
# ------------------------------------------------------------------------------------------------

ODD = """train --size 7|train --size -1|train --size 60|train --size x|train --batch 0
train --lr nan|train --lr -1|train --channels 33|train --channels 0|train --mults 0
train --mults 1 1 1 1 1 1 1 1 1|train --attention 17|train --dropout 1|train --steps -5
train --accum 5|train --schedule square|train --prediction x0|train --device nonsense
train --every nan|train --epochs 3|train --ema 2|train --seed -1|train --batch 1e999
train --data|train extra|paint|sample -n 0|sample -n x|sample --steps -1|sample --eta 2
sample --eta nan|sample --sampler magic|sample --seed 1.5|sample --checkpoint nowhere.pt
sample --batch 0|sample --device cuda:99|train --data \x1b[31mred"""


@pytest.mark.parametrize("words", ODD.replace("\n", "|").split("|"))
def test_odd_command_lines_get_one_line_and_write_nothing(words, capsys):
    if words == "train --data":  # means: drawn cats; only that it is no crash
        words += " --size 7"
    assert run(*words.split()) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("catdiffusion: ") and len(err) < 300
    assert err[:-1].isprintable()
    assert not list(Path(".").iterdir())


def test_large_variance_wants_every_step(capsys):
    assert run("train", *SMALL, "--steps", 1) == 0
    assert run("sample", "--sampler", "ddpm-large", "--steps", 50) == 2
    assert "ddpm-large" in capsys.readouterr().err


def test_every_flag_has_help_with_its_default(capsys):
    for command, table in (("train", cd.Settings), ("sample", cd.Drawing)):
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0
        flags = [f for f in cd.fields(table) if f.metadata["help"]]
        assert text.count("(default: ") == len(flags) > 9


def test_the_module_imports_only_what_it_may():
    code = "import sys, catdiffusion; print(*sys.modules)"
    here = Path(cd.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert out.returncode == 0
    assert not {"torch_xla", "matplotlib", "tqdm"} & set(out.stdout.split())
    assert cd.pick_device("cpu").type == "cpu"


TPU = """
import os, sys
import catdiffusion as cd, torch, torch_xla.debug.metrics as met
words = "train --device tpu --size 16 --channels 8 --mults 1 2 --attention 8 --batch 4".split()
seen = []
end_of_step = cd.end_of_step
def watch(device):
    end_of_step(device)
    items = met.counter_value("aten::_local_scalar_dense")
    seen.append((met.metric_data("CompileTime")[0], items))
cd.end_of_step = watch
cd.preview = lambda *a: {}
assert cd.main([*words, "--every", "1000", "--steps", "12"]) == 0
print("compiled", seen)
if os.environ["CPU_NUM_DEVICES"] == "2":  # a host with two cores
    pictures = torch.zeros(20, 16, 16, 3, dtype=torch.uint8)
    batch = cd.draw_batch(pictures, cd.Settings(batch=4), 0, cd.pick_device("tpu"))
    shares = [sys.modules["torch_xla"]._XLAC._get_xla_sharding_spec(part) for part in batch]
    shares = [share.split("]")[0] for share in shares]
    assert shares == ["{devices=[2,1,1,1", "{devices=[2", "{devices=[2,1,1,1"], shares
    sys.exit()
assert seen[-1] == seen[2] and seen[-1][0] <= 3, seen  # nothing compiled or fetched any more
aten = {n for n in met.counter_names() if n.startswith("aten::")}  # what left the device
assert aten <= {"aten::_local_scalar_dense"}, aten  # Adam looks at lr once, before the first step
state = torch.load("run/checkpoint.pt", weights_only=True)
assert all(v.device.type == "cpu" and v.dtype == torch.float32 for v in state["ema"].values())
assert cd.main("sample -n 2 --steps 3 --device tpu".split()) == 0
"""


def test_the_tpu_path_compiles_once_and_uses_all_cores(tmp_path):
    """Twelve steps on one core and on two: each its part of the batch, and the same losses."""
    pytest.importorskip("torch_xla")
    hosts, losses = {}, []
    for cores in "12":  # side by side: most of the time is compiling, on one core each
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": cores}
        environment["PYTHONPATH"] = str(Path(cd.__file__).parent)
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # half the waiting
        Path(cores).mkdir()
        with open(f"{cores}.txt", "w") as said:
            how = {"cwd": cores, "env": environment, "stdout": said, "stderr": said}
            hosts[cores] = subprocess.Popen([sys.executable, "-c", TPU], **how)
    for cores, host in hosts.items():
        assert host.wait(timeout=400) == 0, Path(f"{cores}.txt").read_text()[-4000:]
        log = map(json.loads, Path(cores, "run/log.jsonl").read_text().splitlines())
        losses += [r["loss"] for r in log if "loss" in r]  # one record, the mean of all steps
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-4)


TEAM = """
import sys, torch, catdiffusion as cd
cd.REPORT, cd.autocast = 1, lambda device: torch.autocast("cpu", enabled=False)
sys.exit(cd.main())
"""


def test_many_processes_do_what_one_does(tmp_path):
    """The processes talk over the loopback interface, by a port that nobody uses: torchrun's own
    (29500) may be taken by another run on the same machine, and a host's name may lead nowhere."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
            port = server.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this machine has no loopback interface: {error}")
    Path("team.py").write_text(TEAM)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(cd.__file__).parent),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "",
    }
    environment = {name: value for name, value in environment.items() if value}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += [f"--master-port={port}", "--"]
    common = [*SMALL, "--lr", "0.1", "--steps", "20"]
    draw = ["sample", "-n", "3", "--batch", "1", "--steps", "2", "--checkpoint", "a/checkpoint.pt"]
    for name, how in (("a", [sys.executable]), ("b", launch)):
        for words in (["train", *common, "--run", name], [*draw, "--out", f"{name}/out/cat"]):
            command = [*how, "team.py", *words]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    logs = [Path(name, "log.jsonl").read_text().splitlines() for name in "ab"]
    a, b = ([r["loss"] for r in map(json.loads, log) if "loss" in r] for log in logs)
    assert len(a) == 20 and a == pytest.approx(b, abs=1e-4) and max(a) > 1.05 * min(a)
    files = [sorted(Path(name, "out").iterdir()) for name in "ab"]
    assert [p.name for p in files[0]] == [p.name for p in files[1]] and len(files[0]) == 4
    assert all(p.read_bytes() == q.read_bytes() for p, q in zip(*files))


def test_cross_check_of_the_loss_with_plain_pytorch():
    """Algorithm 1 written out once more, on one batch."""
    model, d = small_unet(), cd.Diffusion().to("cpu")
    x0, eps, t = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.tensor([0, 9, 500, 999])
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(4, 1, 1, 1)
    expected = F.mse_loss(model(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps)
    torch.testing.assert_close(d.loss(model, x0, t, eps), expected, rtol=1e-3, atol=1e-4)
