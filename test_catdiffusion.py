"""The tests of catdiffusion, to be read after it: each promise, held against something else.

    python -m pytest -q test_catdiffusion.py

The first half is the second half of the lesson; the second half runs the program.
"""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
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
LINEAR, COSINE = cd.Diffusion(cd.linear_schedule()), cd.VDiffusion(cd.cosine_schedule())


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words):
    return cd.main([str(word) for word in words])


def small_unet():
    torch.manual_seed(0)
    model = cd.UNet(16, 8, (1, 2), 1, (8,))
    for p in model.parameters():  # at the start the output is zero: give it something to say
        nn.init.normal_(p, std=0.1)
    return model


def step(model, diffusion, optimizer, rate, *batch):
    """One training step. Returns its loss, and how the weights changed."""
    optimizer.param_groups[0]["lr"] = torch.tensor(rate)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    loss = cd.train_step(model, diffusion, optimizer, batch, accum=2)
    return loss.item(), nn.utils.parameters_to_vector(model.parameters()).detach() - before


def drawn(n):
    """n drawn cats as a run has them: uint8 (n, 3, 16, 16)."""
    raw = bytearray().join(cd.to_bytes(cd.draw_cat(random.Random(i), 16)) for i in range(n))
    return torch.frombuffer(raw, dtype=torch.uint8).view(n, 3, 16, 16)


# ==== THE LESSON ================================================================================

# ---- A world of two pictures --------------------------------------------------------------------
# Two pictures of one pixel: +1 with chance 3/4, -1 with chance 1/4. The best x0_hat is known, so this
# is a diffusion model without a network. With it, the samplers must end at one of the two pictures,
# and at +1 for three quarters of all seeds. Twice the noise would give 0.60, none 1.0.


class TwoPictures(nn.Module):
    """Predicts what the best x0_hat implies. 20,000 worlds side by side are one picture, 100 x 200."""

    def __init__(self, diffusion):
        super().__init__()
        self.d = diffusion

    def forward(self, x_t, t):
        abar = cd.at(self.d.alphas_cumprod, t)
        x0_hat = torch.tanh(x_t * abar.sqrt() / (1 - abar) + math.log(3) / 2)
        eps = (x_t - abar.sqrt() * x0_hat) / (1 - abar).sqrt()
        return self.d.target(x0_hat, t, eps)


@pytest.mark.parametrize("diffusion", [LINEAR, COSINE])
@pytest.mark.parametrize("sampler", [*cd.SAMPLERS, "Algorithm 2"])
def test_in_a_world_of_two_pictures_every_sampler_finds_both(sampler, diffusion):
    source = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(1, 1, 100, 200, generator=source).double()

    if sampler == "Algorithm 2":
        chain = list(cd.ddpm_sample(TwoPictures(diffusion), diffusion, noise(), noise))
        assert [t for t, _, _ in chain] == cd.noise_levels(diffusion, 1000)
    else:
        levels, how = cd.noise_levels(diffusion, 50), cd.SAMPLERS[sampler]
        chain = list(cd.sample_at(levels, TwoPictures(diffusion), diffusion, how, noise(), noise))
    x0 = chain[-1][2]
    assert (x0.abs() > 0.98).double().mean() > 0.99
    assert 0.735 < (x0 > 0).double().mean() < 0.78


def test_the_best_possible_loss_is_as_the_text_says():
    text = re.split(r"best[\s#]+possible", Path(cd.__file__).read_text())[1][:120]
    told = re.findall(r"([\d.]+)[\s#]+at[\s#]+t = (\d+)", text)
    torch.manual_seed(0)
    x0 = torch.where(torch.rand(1, 1, 1000, 1000) < 0.75, 1.0, -1.0).double()
    for loss, t in told:
        got = LINEAR.loss(TwoPictures(LINEAR), x0, torch.tensor([int(t)]), torch.randn_like(x0))
        assert got.item() == pytest.approx(float(loss), abs=0.006)
    assert len(told) == 3


# ---- Schedule and formulas ---------------------------------------------------------------------
# Constants of the published linear schedule, computed elsewhere in float64; for the cosine, its one
# formula. Numbers that the text of the program gives are read from there.


def pixels(*values):
    return (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in values)


def levels(*values):
    return (torch.tensor([value]) for value in values)


def test_the_schedules_have_the_published_values_and_those_of_the_text():
    published = {0: 0.9999, 499: 0.07858724288177824, 999: 4.035829765375676e-05}
    got = {t: LINEAR.alphas_cumprod[t].item() for t in published}
    assert got == pytest.approx(published, rel=1e-12)
    for t in (0, 100, 499, 900):  # Nichol & Dhariwal 2021, Eq. 17
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t + 1, 0)]
        assert COSINE.alphas_cumprod[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    text = Path(cd.__file__).read_text()
    ts = [int(t) for t in re.search(r"#     t +([\d ]+)\n", text)[1].split()]
    for name in ("signal_rate", "noise_rate"):
        row = re.search(rf"#     {name} \S+ +([\d. ]+)\n", text)[1]
        assert vars(LINEAR)[name][ts].tolist() == pytest.approx(
            list(map(float, row.split())), abs=5e-4
        )


def test_one_pixel_noised_recovered_and_taken_a_step_back_as_in_the_text():
    (x0, eps), (t, t_next) = pixels(0.8, -1.2), levels(500, 499)
    x_t = LINEAR.q_sample(x0, t, eps)
    mean, variance = LINEAR.q_posterior(x0, x_t, t, t_next)
    got = [value.item() for value in (x_t, LINEAR.to_x0(eps, x_t, t), mean, variance.sqrt())]
    told = "-0.9292", "0.8", "-0.9213", "0.1003"
    assert got == pytest.approx(list(map(float, told)), abs=5e-5)
    assert all(number in Path(cd.__file__).read_text() for number in told)


def test_a_perfect_prediction_gives_back_the_picture_and_v_is_a_velocity():
    x0, eps = torch.rand(5, 3, 4, 4).double() * 2 - 1, torch.randn(5, 3, 4, 4).double()
    for d, t in ((LINEAR, [0, 1, 500, 990, 998]), (COSINE, [0, 1, 500, 990, 999])):
        t = torch.tensor(t)
        back = d.to_x0(d.target(x0, t, eps), d.q_sample(x0, t, eps), t)
        torch.testing.assert_close(back, x0, rtol=0, atol=1e-8)
    angles = torch.atan2(COSINE.noise_rate, COSINE.signal_rate)
    (x0, eps), t = pixels(0.3, -0.8), torch.tensor([400, 401])
    velocity = COSINE.q_sample(x0, t, eps).flatten().diff() / angles[t].diff()
    assert velocity.item() == pytest.approx(COSINE.target(x0, t, eps).mean().item(), rel=1e-5)


@pytest.mark.parametrize("t, t_next", [(1, 0), (500, 499), (999, 998), (999, 400), (60, 20)])
def test_q_posterior_is_bayes_rule(t, t_next):
    """Multiply the two Gaussians that Bayes' rule names, on a grid of two million points."""
    x0, x_t = 0.4, 0.7
    abar, abar_next = LINEAR.alphas_cumprod[[t, t_next]].tolist()
    keep = abar / abar_next  # of the variance, from t_next to t
    grid = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_p = -((x_t - keep**0.5 * grid) ** 2) / (2 * (1 - keep))  # q(x_t given x at t_next)
    log_p += -((grid - abar_next**0.5 * x0) ** 2) / (2 * (1 - abar_next))  # times q(that given x0)
    p = (log_p - log_p.max()).exp()
    mean = (p * grid).sum() / p.sum()
    variance = (p * (grid - mean) ** 2).sum() / p.sum()
    got = [v.item() for v in LINEAR.q_posterior(*pixels(x0, x_t), *levels(t, t_next))]
    assert got == pytest.approx([mean.item(), variance.item()], rel=1e-6)


def test_the_papers_coefficients():
    one, zero = pixels(1, 0)
    published = {1: (0.5452914995102903, 0.4547084989905303)}
    published[999] = 0.00012835148717224682, 0.9899486782675173
    for t, coefficients in published.items():
        pairs = (one, zero), (zero, one)
        means = [LINEAR.q_posterior(*pair, *levels(t, t - 1))[0].item() for pair in pairs]
        assert means == pytest.approx(coefficients, rel=1e-9)
    variance = LINEAR.q_posterior(one, one, *levels(1, 0))[1]
    assert variance.item() == pytest.approx(5.4531876613021935e-05, rel=1e-9)


# ---- One training step, and Muon -----------------------------------------------------------------
# The oracle is Algorithm 1 written out once more in plain PyTorch: the schedule from its
# definition, torch's mse_loss, torch's clipping, torch's optimizers. Only the network is shared.


def test_a_training_step_is_algorithm_1(monkeypatch):
    monkeypatch.setattr(cd, "uses_bf16", lambda device: False)
    ours, theirs, t = small_unet(), small_unet(), torch.tensor([0, 9, 500, 999])
    x0, eps = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(4, 1, 1, 1)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    loss = F.mse_loss(theirs(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps)
    loss.backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    adam.step()
    diffusion, optimizer = (
        cd.Diffusion(cd.linear_schedule()).to(CPU),
        cd.build_optimizer("adam", ours, CPU),
    )
    told, _ = step(ours, diffusion, optimizer, 1e-3, x0, t, eps)
    assert told == pytest.approx(loss.item(), rel=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


def test_muon_is_torchs_own_for_matrices_and_convolutions_and_adam_for_the_rest():
    torch.manual_seed(0)
    model, lr = nn.Module(), 0.01
    model.layers = nn.ModuleList([nn.Linear(40, 16), nn.Linear(16, 40), nn.Conv2d(6, 8, 3)])
    model.conv_out, model.frozen = nn.Conv2d(8, 3, 3), nn.Linear(9, 9)
    model.frozen.requires_grad_(False)
    ours = [p for p in model.parameters() if p.requires_grad]
    theirs = [nn.Parameter((p.flatten(1) if p.dim() > 1 else p).detach().clone()) for p in ours]
    matrices = [p for p in theirs[:6] if p.dim() > 1]  # not of the last layer
    muon = torch.optim.Muon(matrices, lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs if not any(p is q for q in matrices)]
    adam = torch.optim.Adam(rest, lr, betas=(0.95, 0.999))
    optimizer = cd.Muon(model, lr=torch.tensor(lr), fused=True)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.view(q.shape).clone()
        for each in (optimizer, muon, adam):
            each.step()
    for p, q in zip(ours, theirs):  # torch's works in bf16 throughout, of steps of about 0.01
        torch.testing.assert_close(p.view(q.shape), q, rtol=0, atol=1.5e-3)


def test_a_step_is_no_longer_than_1_and_left_out_if_not_finite():
    model, diffusion = small_unet(), cd.Diffusion(cd.linear_schedule()).to(CPU)
    big, t = torch.full((2, 3, 16, 16), 1e4), torch.tensor([1, 500])
    sgd = torch.optim.SGD(model.parameters())
    assert step(model, diffusion, sgd, 1.0, big, t, big)[1].norm().item() == pytest.approx(
        1, rel=1e-2
    )
    for name in cd.OPTIMIZERS:
        optimizer = cd.build_optimizer(name, model, CPU)
        for factor, holds in ((1, True), (math.nan, False), (math.inf, False), (1, True)):
            _, change = step(model, diffusion, optimizer, 1e-3, big * factor, t, big)
            assert change.isfinite().all() and (change != 0).any() == holds
            assert (optimizer.param_groups[0]["lr"] > 0) == holds  # how the loop learns of it


@pytest.mark.parametrize("name, uniform", [("middle", 0.25), ("uniform", 1.0)])
def test_the_levels_have_the_chances_promised(name, uniform):
    t, edges = cd.LEVELS[name](torch.arange(1e5) / 1e5, 1000), torch.linspace(0, 1, 11)
    upto = uniform * edges + (1 - uniform) * (1 - torch.cos(math.pi * edges)) / 2  # ∫ π/2·sin πx dx
    shares = t.div(100, rounding_mode="floor").bincount(minlength=10) / len(t)
    torch.testing.assert_close(shares, upto.diff(), rtol=0, atol=1e-4)
    assert t.min() >= 0 and cd.LEVELS[name](torch.tensor([1 - 2**-24]), 1000).item() == 999


def test_the_average_warms_up_and_the_rate_rises_and_falls():
    model, expected = nn.Linear(1, 1, bias=False), 0.0
    nn.init.zeros_(model.weight)
    ema = cd.EMA(model, decay=0.9)
    for n in range(200):
        nn.init.constant_(model.weight, n)
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (20 + n))
        expected = decay * expected + (1 - decay) * n
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    rates = [cd.learning_rate(step, 1000, 0.5) for step in (0, 99, 199, 799, 900, 999)]
    assert rates == pytest.approx([0.0025, 0.25, 0.5, 0.5, 0.25, 0.0025])


def test_a_batch_is_a_function_of_seed_and_step_and_twenty_cats_are_learned_by_heart():
    pictures = drawn(20)
    diffusion = cd.VDiffusion(cd.cosine_schedule()).to(CPU)

    def batch(step, n, seed=0):
        return cd.get_batch(pictures, step, n, seed, cd.uniform_levels, CPU)

    x0, t, eps = batch(5, 64)
    assert all(torch.equal(u, v) for u, v in zip((x0, t, eps), batch(5, 64)))
    assert not torch.equal(x0, batch(6, 64)[0]) and not torch.equal(eps, batch(5, 64, seed=1)[2])
    assert (t * 4 // 1000).bincount().tolist() == [16] * 4  # spread evenly
    back = ((x0 + 1) * 127.5).round().to(torch.uint8)
    other = [p for p in back if not any(torch.equal(p, q) for q in pictures)]
    assert 10 < len(other) < 54  # some are as they were, and the others mirrored
    assert all(any(torch.equal(p, q) for q in pictures.flip(3)) for p in other)
    model = small_unet()
    optimizer = cd.build_optimizer("muon", model, CPU)
    losses = [step(model, diffusion, optimizer, 1e-2, *batch(k, 8))[0] for k in range(160)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


# ---- Samplers ----------------------------------------------------------------------------------
# If all data is N(0, 0.25²), the path without noise is known: x_t stays as many sigmas from 0.


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
    d = cd.VDiffusion(cd.cosine_schedule()).to(CPU)
    chain = list(cd.sample(Ideal(d), d, 1, sampler, steps))
    (first, x_T, _), (last, _, x0) = chain[0], chain[-1]
    abar = d.alphas_cumprod[[first, last]]
    sigma = (abar * 0.25**2 + 1 - abar).sqrt()  # of x_t, at both ends
    exact = x_T / sigma[0] * abar[1].sqrt() * 0.25**2 / sigma[1]
    return (x0 / exact - 1).abs().median().item()


def test_ddim_is_of_first_order_and_extrapolating_of_second():
    assert 0.4 < error("ddim", 40) / error("ddim", 20) < 0.6  # twice the calls, half the error
    assert error("dpm", 40) < 0.3 * error("dpm", 20)  # twice the calls, a quarter of the error


@pytest.mark.parametrize("sampler, steps", [("dpm-sde", 15), ("ddim", 2), ("ddpm", 1000)])
def test_samplers_make_the_calls_asked_for_and_picture_i_is_always_the_same(sampler, steps):
    d = cd.VDiffusion(cd.cosine_schedule()).to(CPU)
    ideal, model, calls = Ideal(d), small_unet().eval(), min(steps, 6)
    seen = list(cd.sample(ideal, d, 2, sampler, steps))
    assert [[t, t] for t, _, _ in seen] == ideal.asked and len(seen) == steps and seen[0][0] == 999
    assert all(x_t.shape == x0.shape == (2, 3, 4, 4) for _, x_t, x0 in seen)
    assert all(x0.abs().max() <= 1 for _, _, x0 in cd.sample(model, d, 4, sampler, calls))
    parts = [list(cd.sample(model, d, n, sampler, calls, 3, i))[-1][2] for n, i in ((1, 0), (3, 1))]
    whole, other = (list(cd.sample(model, d, 4, sampler, calls, seed))[-1][2] for seed in (3, 4))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=2e-2)
    assert (other - whole).abs().mean() > 0.03 < (whole[0] - whole[1]).abs().mean()


# ---- The network -------------------------------------------------------------------------------
# Its size is the published one; small layers are worked by hand.


@pytest.mark.parametrize("size, side", [(32, 16), (64, 16), (96, 12), (128, 16)])
def test_shapes(size, side):
    args = cd.settings(size=size, channels=8)
    (model, _), x = cd.build(args, CPU), torch.randn(2, 3, size, size)
    assert args.attention == [side] and 4 <= size >> len(args.mults) - 1 <= 15
    y = model(x, torch.tensor([0, 999]))
    assert y.shape == x.shape and y.dtype == torch.float32


def test_size_and_start_are_the_papers_and_every_weight_is_used():
    model = cd.UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    fresh, model = cd.UNet(16, 8, (1, 2), 1, (8,)), small_unet()
    x0, eps, t = torch.rand(64, 3, 16, 16), torch.randn(64, 3, 16, 16), torch.randint(1000, (64,))
    diffusion = cd.Diffusion(cd.linear_schedule()).to(CPU)
    assert diffusion.loss(fresh, x0, t, eps).item() == pytest.approx(1.0, abs=0.03)
    assert (fresh(x0, t) == 0).all() and (model(x0, t) - model(x0, t * 0)).abs().max() > 1e-3
    model(x0, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_small_layers_by_hand():
    e = cd.time_embedding(torch.tensor([0, 1, 500]), 8)  # sine, then cosine
    assert e.shape == (3, 8) and e[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert e[2, 0].item() == pytest.approx(math.sin(500), abs=1e-4)
    assert e[1, 3].item() == pytest.approx(math.sin(1e-4), abs=1e-7)  # slowest: exponent half-1
    down, up = cd.Downsample(1, 1, 3, stride=2), cd.Upsample(1, 1, 1)
    for layer in (down, up):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert down(torch.ones(1, 1, 4, 4), None).flatten().tolist() == [9, 6, 6, 4]
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert up(torch.arange(4.0).view(1, 1, 2, 2), None)[0, 0].tolist() == rows
    layer, x = cd.Attention(16), torch.randn(2, 16, 4, 4)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    y = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(layer.q(y), layer.k(y), layer.v(y))
    expected = x + layer.out(mixed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


# ==== THE PROGRAM ===============================================================================

# ---- Pictures ----------------------------------------------------------------------------------
# Files are written here by Pillow in colours that we choose: what must come out is known.

RED, BLUE, WHITE = (250, 0, 0), (0, 0, 250), (255, 255, 255)
KINDS = [(f"a.{suffix}", "RGB", RED, RED) for suffix in "jpg JPEG png webp bmp gif".split()]
KINDS += [("g.jpg", "L", 100, (100, 100, 100)), ("c.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0))]
KINDS += [("t.png", "RGBA", (0, 0, 0, 0), WHITE), ("u.png", "LA", (0, 0), WHITE)]


def read(path, size=16):
    raw = bytearray(cd.read_picture(Path(path), size))
    return torch.frombuffer(raw, dtype=torch.uint8).view(3, size, size).permute(1, 2, 0)


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


@pytest.mark.parametrize("width, height", [(1023, 768), (333, 777), (7, 9)])
def test_a_picture_is_cropped_to_its_middle_square_and_never_squashed(width, height):
    side, image = min(width, height), Image.new("RGB", (width, height))
    image.paste(halves(side), ((width - side) // 2, (height - side) // 2))
    for name in ("a.jpg", "a.png"):
        image.save(name, quality=95)
        assert near(read(name, 32)[16, 2], RED, 40) and near(read(name, 32)[16, -3], BLUE, 40)


def test_a_jpeg_keeps_its_grain_when_it_is_shrunk():
    grain = Image.frombytes("RGB", (20, 20), random.Random(0).randbytes(3 * 20 * 20))
    grain.resize((125, 125)).save("grain.jpg", quality=95)
    whole = ImageOps.fit(Image.open("grain.jpg"), (16, 16), Image.LANCZOS)  # decoded in full size
    wanted = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    difference = (read("grain.jpg") / 255 - wanted / 255).std() / (wanted / 255).std()
    assert difference < 0.2  # 0.5 if the JPEG's decoder does all the shrinking


def test_exif_rotation_is_undone_and_a_cat_file_crops_to_the_face():
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me 90 degrees clockwise to see me upright"
    halves(40).save("turned.jpg", exif=exif, quality=95)
    assert near(read("turned.jpg")[2, 8], RED) and near(read("turned.jpg")[13, 8], BLUE)
    image = Image.new("RGB", (200, 100))
    image.paste((0, 250, 0), (90, 15, 150, 90))
    image.save("face.png")
    points = "110 60 130 60 120 75 100 50 100 25 105 45 135 45 140 25 140 50"
    Path("face.png.cat").write_text(f"9 {points} ")
    assert all(near(read("face.png")[y, x], (0, 250, 0)) for y in (1, 14) for x in (1, 14))


def test_bad_pictures_are_skipped_and_every_file_is_taken_once(capsys, monkeypatch):
    deep = Path("data", "deep", "folder.jpg")
    deep.mkdir(parents=True)
    for i in range(5):
        cd.draw_cat(random.Random(i), 64).save(deep / f"{i}.JPG")
    bad = {"half.jpg": (deep / "0.JPG").read_bytes()[:500], "empty.png": b"", "text.gif": b"no gif"}
    bad |= {"3.JPG.cat": b"9 1", "4.JPG.cat": b"9" + b" 5" * 18}
    bad |= {"._0.JPG": b"macOS leaves these", "notes.txt": b"stray"}  # not even counted
    for name, content in bad.items():
        (deep / name).write_bytes(content)
    (deep / "loop").symlink_to(Path("data").absolute())
    Path("data/again.jpg").symlink_to((deep / "0.JPG").absolute())
    Path("data/run").mkdir()
    for name in ("checkpoint.pt", "preview.png"):  # our own
        Path("data/run", name).touch()
    assert cd.load_pictures(["data", deep], 16, "run").shape == (3, 3, 16, 16)
    told = capsys.readouterr().out
    assert "5 of 8 pictures skipped" in told and "half.jpg" in told and "4.JPG.cat" in told
    with monkeypatch.context() as patch:  # decoded once, and anew when something changes
        patch.setattr(cd, "decode_pictures", lambda *_: [b"x" * 3 * 16 * 16])
        assert len(cd.load_pictures(["data"], 16, "run")) == 3
        os.utime(deep / "0.JPG", (1, 1))
        assert len(cd.load_pictures(["data"], 16, "run")) == 1
    Path("alone").mkdir()
    Path("alone/bad.png").touch()
    for folder in ("nowhere", "alone"):
        assert run("train", "--data", folder) == 2 and capsys.readouterr().err.count("\n") == 1


# ---- Nothing is lost ---------------------------------------------------------------------------
# One small network is trained once and shared. Then: the same run in two parts against the run in
# one, bit for bit; signals; a full disk; files that are cut or mixed up.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a run of seven steps on drawn cats."""
    folder = tmp_path_factory.mktemp("trained")
    assert run("train", *SMALL, "--dropout", 0.2, "--steps", 7, "--run", folder) == 0
    return folder / "checkpoint.pt"


def test_resumed_is_bit_for_bit_the_run_that_was_not_and_follows_one_rule(trained, capsys):
    assert run("train", *SMALL, "--dropout", 0.2, "--steps", 3, "--run", "r") == 0
    assert run("train", "--run", "r", "--steps", 7) == 0  # the rest is as the run has it
    whole, parts = (torch.load(p, weights_only=True) for p in (trained, "r/checkpoint.pt"))
    for name in ("model", "ema"):
        assert all(torch.equal(whole[name][key], v) for key, v in parts[name].items())
    for a, b in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"] == 7
    model, _, step = cd.load_checkpoint(trained)  # the average, not the last weights
    assert all(torch.equal(mean, whole["ema"][key]) for key, mean in model.state_dict().items())
    assert not torch.equal(whole["ema"]["conv_in.weight"], whole["model"]["conv_in.weight"])
    capsys.readouterr()
    assert run("train", "--run", "r", "--steps", 8, "--batch", 8, "--optimizer", "adam") == 0
    told = capsys.readouterr().out
    assert "--batch=8, was 4" in told and "--optimizer=adam, was muon" in told
    words = "--channels", 16, "--mults", 1, "--prediction", "eps", "--batch", 4
    assert run("train", "--run", "r", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--run" in error
    for old in ("--channels=8", "--mults 1 2", "--prediction=v"):
        assert old in error
    state = torch.load("r/checkpoint.pt", weights_only=True)  # as an older version wrote it
    del state["settings"]["levels"]
    torch.save({**state, "settings": state["settings"] | {"uniform": 0.25}}, "r/checkpoint.pt")
    assert run("train", "--run", "r", "--steps", 9) == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_finishes_the_step_and_saves_but_a_second_ctrl_c_ends_at_once(name, monkeypatch):
    calls, train_step, number = [], cd.train_step, getattr(signal, name)

    def press(*rest):
        calls.append(1)
        for _ in range(
            {3: 1, 5: 2}.get(len(calls), 0)
        ):  # once in the third step, twice in the fifth
            os.kill(os.getpid(), number)
        return train_step(*rest)

    monkeypatch.setattr(cd, "train_step", press)
    before = signal.signal(number, signal.default_int_handler)  # it may have been ignored
    assert run("train", *SMALL, "--steps", 6, "--run", "r") == 130
    assert torch.load("r/checkpoint.pt", weights_only=True)["step"] == 3
    assert run("train", "--run", "r") == 130
    assert signal.signal(number, before) is signal.default_int_handler
    step = torch.load("r/checkpoint.pt", weights_only=True)["step"]
    assert step == (3 if name == "SIGINT" else 5)
    for _ in range(2):  # to its end, and then there is nothing left to do
        assert run("train", "--run", "r") == 0
    assert len(calls) == 5 + 6 - step


def test_a_full_disk_or_a_loss_that_is_not_finite_keeps_the_old_checkpoint(monkeypatch, capsys):
    assert run("train", *SMALL, "--steps", 2, "--run", "r") == 0
    old = Path("r/checkpoint.pt").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device", "r/checkpoint.pt")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run("train", "--run", "r", "--steps", 3) == 2
    assert "No space left" in capsys.readouterr().err
    broken = lambda self, model, x0, t, eps: model(x0, t).sum() * math.nan  # noqa: E731
    monkeypatch.setattr(cd.Diffusion, "loss", broken)
    assert run("train", "--run", "r", "--steps", 3000) == 2
    assert "smaller --lr" in capsys.readouterr().err
    assert Path("r/checkpoint.pt").read_bytes() == old


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


def test_the_two_commands_end_to_end(capsys):
    assert run("train", *SMALL, "--steps", 3, "--every", 0) == 0
    records = [json.loads(line) for line in Path("run-drawn/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3] and records[0]["loss"] > 0
    assert 0 < records[-1]["sample_std"] < 1 and abs(records[-1]["data_mean"]) < 1
    assert Image.open("run-drawn/previews/000003.png").size == (4 * 18 + 2, 4 * 18 + 2)
    assert Image.open("run-drawn/loss.png").size == (640, 400)
    assert "pictures/s" in capsys.readouterr().out
    assert run("sample", "-n", 3, "--steps", 4, "--batch", 2, "--gif") == 0
    names = {f"cat-0{x}" for x in ("-0000.png", "-0001.png", "-0002.png", "-grid.png", ".gif")}
    assert set(os.listdir("samples")) == names and Image.open("samples/cat-0.gif").n_frames == 4
    told = capsys.readouterr().out
    assert "run-drawn/checkpoint.pt" in told and all(name in told for name in names)
    words = "--steps", 2, "--out", "my plots/", "--sampler", "ddim"
    assert run("sample", "--n", 1, *words) == 0 and Path("my plots/cat-0-0000.png").exists()
    assert '"my plots/cat-0-0000.png"' in capsys.readouterr().out


def test_from_python_without_a_command_line():
    pictures = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    args = cd.settings(size=16, channels=8, mults=(1, 2), attention=[], steps=2, run="r")
    assert cd.train(args, pictures=pictures).step == 2 and args.attention == []
    model, diffusion, step = cd.load_checkpoint("r/checkpoint.pt")
    *_, (_, _, x0_hat) = cd.sample(model, diffusion, n=2, steps=4)
    assert x0_hat.shape == (2, 3, 16, 16) and step == 2
    for wrong in (
        {"size": 60},
        {"lr": -1},
        {"schedule": "square"},
        {"epochs": 3},
        {"ema": math.nan},
    ):
        with pytest.raises(cd.Failure):
            cd.settings(**wrong)


def test_a_picture_is_made_again_from_its_text_found_by_its_nearest_and_never_overwritten(trained):
    words = "--checkpoint", trained, "--steps", 4, "--seed", 5
    assert run("sample", *words, "-n", 3, "--out", "x/p") == 0
    assert run("sample", *words, "-n", 1, "--first", 2, "--out", "y/p") == 0
    made = json.loads(Image.open("x/p-5-0002.png").text["catdiffusion"])
    model, diffusion, step = cd.load_checkpoint(made["checkpoint"])
    how = (made[name] for name in ("sampler", "steps", "seed", "number"))
    again = cd.to_images(list(cd.sample(model, diffusion, 1, *how))[-1][2])[0].tobytes()
    for name in ("x/p-5-0002.png", "y/p-5-0002.png"):
        assert max(abs(a - b) for a, b in zip(again, Image.open(name).tobytes())) <= 1
    cats = cd.as_floats(drawn(20))
    for i, image in enumerate(cd.to_images(cats)):
        image.save(f"y/{i:02}.png")
    sheet = cd.beside_nearest(cats[[3]].flip(3) + 0.01, sorted(Path("y").glob("??.png")))
    nearest = ImageOps.mirror(sheet.crop((18, 2, 34, 18)))  # found in the mirror, too
    assert nearest.tobytes() == Image.open("y/03.png").tobytes()
    for colour in ("red", "red", "blue", "blue", "red"):
        cd.save_new(Image.new("RGB", (4, 4), colour), "z/cat.png", {})
    assert sorted(os.listdir("z")) == ["cat-2.png", "cat.png"] and made["step"] == step == 7


def test_best_of_keeps_what_the_judge_likes(trained, monkeypatch):
    """The judge here likes bright pictures; seven in eight are thrown away, in several batches."""
    judge = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000, bias=False))
    nn.init.ones_(judge.requires_grad_(False)[2].weight)
    monkeypatch.setattr(cd, "make_judge", lambda: judge)
    words = "--checkpoint", trained, "--steps", 3, "--batch", 5
    assert run("sample", *words, "-n", 16, "--out", "all/p") == 0
    assert run("sample", *words, "-n", 2, "--best-of", 8, "--out", "best/p") == 0
    light = {f.name: sum(Image.open(f).tobytes()) for f in Path("all").glob("p-0-0*.png")}
    best = sorted((f.name for f in Path("best").glob("p-0-0*.png")), key=light.get)
    assert best == sorted(light, key=light.get)[-2:]


def test_what_comes_with_the_program():
    """It imports what it may; the weights are there; README's commands and lines can be followed."""
    text, readme = (HERE / "catdiffusion.py").read_text(), (HERE / "README.md").read_text()
    names = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert names == {"torch", "torchvision", "PIL", "torch_xla"}
    state = torch.load(HERE / "samples" / "catdiffusion.pt", weights_only=True)
    assert "AFHQ" in state["about"] and "CC BY-NC 4.0" in state["about"] and state["step"] > 1000
    commands = re.findall(r"python catdiffusion\.py ([^`#&;\n]+)", readme)
    assert len(commands) > 4 and {words.split()[0] for words in commands} == {"train", "sample"}
    for words in commands:
        cd.parser().parse_args(words.split())
    lines = re.search(r"(    from catdiffusion .*\n(?:    .*\n)+)", readme)[1]
    code = "import catdiffusion, os, sys; assert not os.listdir()\n"
    code += "assert not {'torch_xla', 'torchvision'} & set(sys.modules)\n"
    code += lines.replace("    ", "").replace('"samples/', f'"{HERE}/samples/')
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    assert subprocess.check_output([sys.executable, "-B", "-c", code], env=environment) == b""
    assert os.listdir() == ["cat.png"] and Image.open("cat.png").size == (64, 64)


ODD = """train --size 7|train --size -1|train --size 60|train --size x|train --batch 0
train --lr nan|train --channels 33|train --mults 0|train --attention 17|train --dropout 1
train --steps -5|train --schedule square|train --device nonsense|train --every nan
train --epochs 3|train --ema 2|train --accum 5|paint|sample -n 0|sample --steps 1001|train --siz 64
sample --sampler magic|sample --seed 1.5|sample --checkpoint nowhere.pt|sample --device cuda:99"""


def test_odd_command_lines_get_one_line_and_write_nothing(capsys):
    for words in ODD.replace("\n", "|").split("|"):
        assert run(*words.split()) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("catdiffusion") and len(error) < 500
        assert not os.listdir()


# ---- The paper's own networks ------------------------------------------------------------------
# What diffusers' UNet2DModel calls its weights, today and in old files, and what they are here, for
# one block a floor; then a whole folder, written by hand.

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
FOREIGN += [{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}]


def test_a_folder_in_the_layout_of_diffusers_is_read(tmp_path, capsys):
    for pair in NAMES.replace("\n", "|").split("|"):
        theirs, ours = pair.split()
        assert cd.our_name(theirs, blocks=1) == ours
    model, folder = cd.UNet(8, 128, (1, 2), 1, (4,)), tmp_path / "cat"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    loaded, diffusion, _ = cd.load_checkpoint(folder)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert type(diffusion) is cd.Diffusion and diffusion.alphas_cumprod[0].item() > 0.99989
    assert run("sample", "--checkpoint", folder, "-n", 1, "--steps", 2) == 0
    for change in FOREIGN:
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
def cut(batch):
    spec = sys.modules["torch_xla"]._XLAC._get_xla_sharding_spec
    shares = [spec(tensor).split("]")[0] for tensor in over_cores(batch)]
    assert shares == ["{devices=[2,1,1,1", "{devices=[2", "{devices=[2,1,1,1"], shares
    return batch
cd.end_of_step, cd.over_cores, cd.preview = watch, cut, lambda *a: {}
cd.Meter.report = lambda *rest: None  # it looks at the loss, by the clock
assert cd.main(words.split()) == 0
assert seen[-1] == seen[2] and seen[-1][0] <= 3, seen  # nothing compiled or fetched any more
aten = {n for n in met.counter_names() if n.startswith("aten::")}  # what left the device
assert aten <= {"aten::_local_scalar_dense"}, aten  # Adam looks at lr once, before all steps"""


@pytest.fixture(scope="module", autouse=True)
def tpu(request, tmp_path_factory):
    """A host with two cores trains while the other tests run: it waits for its compiler."""
    if not find_spec("torch_xla") or not any("tpu" in item.name for item in request.session.items):
        yield None
        return
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    environment |= {"PYTHONPATH": str(HERE), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    how = {"env": environment, "cwd": tmp_path_factory.mktemp("tpu"), "stderr": subprocess.STDOUT}
    with subprocess.Popen([sys.executable, "-c", TPU], stdout=subprocess.PIPE, **how) as process:
        yield how["cwd"], process
        process.kill()


def test_the_tpu_path_compiles_once_and_uses_all_cores(tpu):
    """And what was saved there makes pictures on the CPU."""
    if tpu is None:
        pytest.skip("no torch_xla")
    told, _ = tpu[1].communicate(timeout=400)
    assert tpu[1].returncode == 0, told[-4000:].decode()
    checkpoint = tpu[0] / "run-drawn" / "checkpoint.pt"
    assert run("sample", "-n", 1, "--steps", 2, "--checkpoint", checkpoint) == 0


TEAM = """import sys, torch, catdiffusion as cd
cd.uses_bf16, step, report = lambda device: False, cd.train_step, print
def train_step(*rest):
    loss = step(*rest)
    total = loss.clone()
    if cd.WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)
    if cd.RANK == 0:
        print("loss", total.item() / cd.WORLD_SIZE, flush=True)
    return loss
cd.train_step = train_step
sys.exit(cd.main())"""


def test_many_processes_do_what_one_does():
    """By a free port of the loopback interface, as a host's name may lead nowhere."""
    Path("team.py").write_text(TEAM)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()]
    launch += ["--local-addr=127.0.0.1", "--"]
    words, losses = ["team.py", "train", *SMALL, "--lr", "0.5", "--accum", "2", "--steps", "20"], []
    for name, how in (("a", [sys.executable]), ("b", launch)):
        command = [*how, *words, "--run", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
        losses.append([float(loss) for loss in re.findall(r"^loss (\S+)$", done.stdout, re.M)])
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert max(losses[0]) > 1.05 * min(losses[0])
