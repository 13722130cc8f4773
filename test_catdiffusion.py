"""The tests of catdiffusion, to be read after it: each promise, held against something else."""

import copy
import functools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

import catdiffusion as cd

HERE, TEXT, CPU = Path(cd.__file__).parent, Path(cd.__file__).read_text(), torch.device("cpu")
SMALL = "--size 16 --channels 8 --mults 1 2 --attention 8 --batch 4 --every 1000".split()
LINEAR, COSINE = cd.Diffusion(cd.linear_schedule()), cd.VDiffusion(cd.cosine_schedule())  # float64
EPS, V = copy.deepcopy(LINEAR).float(), copy.deepcopy(COSINE).float()  # for networks
load = partial(torch.load, weights_only=True)
load_pictures = cd.load_pictures
drawn = functools.cache(partial(load_pictures, None))  # 2,000 cats take a second to draw


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    monkeypatch.setattr(cd, "load_pictures", lambda *a: load_pictures(*a) if a[0] else drawn(a[1]))


def run(*words):
    try:
        return cd.main([str(word) for word in words])
    except SystemExit as e:  # argparse's
        return e.code


def small_unet():
    model = cd.UNet(16, 8, (1, 2), 1, (8,))
    for p in model.parameters():  # at the start the prediction is zero: give it something to say
        nn.init.normal_(p, std=0.1)
    return model


def vector(weights):
    return nn.utils.parameters_to_vector(weights.values())


# ---- Formulas -----------------------------------------------------------------------------------
def test_the_formulas_give_the_published_numbers_and_those_of_the_text():
    ts = [int(t) for t in re.search(r"#     t +([\d ]+)\n", TEXT)[1].split()]
    for name in ("signal_rate", "noise_rate"):
        row = re.search(rf"#     {name} \S+ +([\d. ]+)\n", TEXT)[1]
        told = [float(number) for number in row.split()]
        assert getattr(LINEAR, name)[ts].tolist() == pytest.approx(told, abs=5e-4)
    x_t = LINEAR.q_sample(0.8, 500, -1.2)
    mean, variance = LINEAR.q_posterior(0.8, x_t, 500, 499)
    got = x_t, LINEAR.to_x0(-1.2, x_t, 500), mean, variance.sqrt()
    for value, told in zip(got, ("-0.9292", "0.8", "-0.9213", "0.1003")):
        assert value.item() == pytest.approx(float(told), abs=5e-5) and told in TEXT
    published = [0.9999, 0.07858724288177824, 4.035829765375676e-05]
    assert LINEAR.alphas_cumprod[[0, 499, 999]].tolist() == pytest.approx(published, rel=1e-12)
    for t in (0, 499, 900):  # Nichol & Dhariwal 2021, Eq. 17
        f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t + 1, 0)]
        assert COSINE.alphas_cumprod[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    weight_x0, variance = LINEAR.q_posterior(1, 0, 1, 0)
    weight_x_t, _ = LINEAR.q_posterior(0, 1, 1, 0)
    got = [value.item() for value in (weight_x0, weight_x_t, variance)]
    published = [0.5452914995102903, 0.4547084989905303, 5.4531876613021935e-05]
    assert got == pytest.approx(published, rel=1e-9)


def test_v_is_the_velocity_of_x_t_as_the_angle_grows():
    angle = COSINE.sigma.atan()
    x_400, x_402 = COSINE.q_sample(0.8, torch.tensor([400, 402]), -1.2).flatten()
    velocity = (x_402 - x_400) / (angle[402] - angle[400])
    v = COSINE.target(0.8, 401, -1.2)
    assert v.item() == pytest.approx(velocity.item(), rel=1e-4)
    assert COSINE.to_x0(v, COSINE.q_sample(0.8, 401, -1.2), 401).item() == pytest.approx(0.8)


def test_q_posterior_is_bayes_rule():
    x0, x_t = 0.4, 0.7
    grid = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    for t, t_next in ((1, 0), (999, 998), (999, 400), (60, 20)):
        abar, abar_next = LINEAR.alphas_cumprod[[t, t_next]].tolist()
        keep = abar / abar_next  # of the variance, from t_next to t
        log_p = -((x_t - keep**0.5 * grid) ** 2) / (2 * (1 - keep))  # q(x_t given x at t_next)
        log_p -= (grid - abar_next**0.5 * x0) ** 2 / (2 * (1 - abar_next))  # times q(that given x0)
        p = log_p.softmax(0)
        mean, variance = LINEAR.q_posterior(x0, x_t, t, t_next)
        assert mean.item() == pytest.approx((p * grid).sum().item(), rel=1e-6)
        spread = (p * (grid - mean.item()) ** 2).sum()
        assert variance.item() == pytest.approx(spread.item(), rel=1e-6)


# ---- Worlds in which the best network is known --------------------------------------------------
def best_network(best_x0_hat, diffusion, x_t, t):
    abar = cd.at(diffusion.alphas_cumprod, t)
    x0_hat = best_x0_hat(x_t, abar)
    return diffusion.target(x0_hat, t, (x_t - abar.sqrt() * x0_hat) / (1 - abar).sqrt())


def two_pictures(x_t, abar):  # of one pixel: +1 with chance 3/4, -1 with chance 1/4
    return torch.tanh(x_t * abar.sqrt() / (1 - abar) + math.log(3) / 2)


def all_calls(sampler, calls, best_x0_hat, diffusion):
    """20,000 samples side by side: a list of (t, x_t, x0_hat)."""
    noise = partial(torch.randn, 1, 1, 100, 200, dtype=torch.float64)
    model, levels = partial(best_network, best_x0_hat, diffusion), cd.noise_levels(diffusion, calls)
    if sampler == "Algorithm 2":
        return list(cd.ddpm_sample(model, diffusion, noise(), noise))
    return list(cd.sample_at(levels, model, diffusion, cd.SAMPLERS[sampler], noise(), noise))


@pytest.mark.parametrize("diffusion", [LINEAR, COSINE])
@pytest.mark.parametrize("sampler", [*cd.SAMPLERS, "Algorithm 2"])
def test_in_a_world_of_two_pictures_every_sampler_finds_both(sampler, diffusion):
    *_, (_, _, x0) = all_calls(sampler, 50, two_pictures, diffusion)
    assert (x0.abs() > 0.98).double().mean() > 0.99
    assert 0.735 < (x0 > 0).double().mean() < 0.78  # twice the noise would give 0.60, none 1.0


def test_ddpm_with_all_levels_is_algorithm_2():
    ends = []
    for sampler in ("ddpm", "Algorithm 2"):
        torch.manual_seed(1)
        ends.append(all_calls(sampler, 1000, two_pictures, COSINE)[-1])
    assert ends[0][0] == ends[1][0] == 0
    torch.testing.assert_close(ends[0][2], ends[1][2])


def test_the_best_possible_loss_is_as_the_text_says():
    text = TEXT.split("best possible loss on")[1][:200]
    told = re.findall(r"([\d.]+)[\s#]+at[\s#]+t = (\d+)", text)
    x0 = torch.where(torch.rand(1, 1, 1000, 1000) < 0.75, 1.0, -1.0).double()
    model = partial(best_network, two_pictures, LINEAR)
    got = [LINEAR.loss(model, x0, int(t), torch.randn_like(x0)).item() for _, t in told]
    assert got == pytest.approx([float(loss) for loss, _ in told], abs=0.006) and len(told) == 3


def sixteenth(x_t, abar):  # all pixels are N(0, 1/16)
    return x_t * abar.sqrt() / (16 - 15 * abar)


def test_ddim_is_of_first_order_and_extrapolating_of_second():
    def error(sampler, calls):
        chain = all_calls(sampler, calls, sixteenth, COSINE)
        (first, x_T, _), *_, (last, _, x0) = chain
        abar = COSINE.alphas_cumprod[[first, last]]
        spread = (1 - abar * 15 / 16).sqrt()  # of all x_t; on the exact path x_t / spread stays
        exact = x_T / spread[0] * abar[1].sqrt() / 16 / spread[1]  # the best x0_hat at its end
        return (x0 / exact - 1).abs().median().item()

    assert 0.4 < error("ddim", 40) / error("ddim", 20) < 0.6  # twice the calls, half the error
    assert error("dpm", 40) < 0.3 * error("dpm", 20)  # twice the calls, a quarter of the error


def test_extrapolating_gives_back_the_spread_that_large_steps_leave_out(monkeypatch):
    text = TEXT.split("25 calls end with")[1][:300]
    told = [float(number) for number in re.findall(r"(?:0|1)\.\d\d", text)]
    got = []
    for extrapolate in (0.0, 1.0, 0.8):
        monkeypatch.setitem(cd.SAMPLERS, "x", cd.Sampler(cd.ddpm_step, extrapolate, 25))
        *_, (_, _, x0) = all_calls("x", 25, sixteenth, COSINE)
        got.append(x0.std().item() * 4)
    assert got == pytest.approx(told, abs=0.015), got


@pytest.mark.parametrize("sampler, calls", [("dpm-sde", 15), ("ddim", 2), ("ddpm", 6)])
def test_samplers_make_the_calls_asked_for_and_picture_i_is_always_the_same(sampler, calls):
    def made(n, seed, first=0):
        seen = list(cd.sample(model, V, n, sampler, calls, seed, first))
        assert len(seen) == calls and seen[0][0] == 999
        return seen[-1][2]

    model = small_unet().eval()
    whole = made(4, seed=3)
    assert whole.shape == (4, 3, 16, 16) and whole.abs().max() <= 1
    torch.testing.assert_close(made(3, seed=3, first=1), whole[1:], rtol=0, atol=3e-2)
    level, x_t, _ = next(cd.sample(model, V, 1, start=(300, whole[:1])))
    assert level == 300 and torch.equal(x_t, whole[:1])
    for other in (made(4, seed=4), whole.roll(1, 0)):  # another seed, another number
        assert (other - whole).abs().mean() > 0.03


def test_guidance_leads_away_from_the_early_network_where_the_face_is_decided():
    model, early = small_unet().eval(), small_unet().eval()
    guided = cd.Guided(model, early, V, 3.0)
    x_t = torch.randn(4, 3, 16, 16)
    t = torch.stack([(V.sigma - sigma).abs().argmin() for sigma in (6.0, 4.0, 0.6, 0.4)])
    assert (guided.w[cd.noise_levels(V, 25)] != 1).sum() == 6  # as the text says
    now, before, got = (V.to_x0(network(x_t, t), x_t, t) for network in (model, early, guided))
    torch.testing.assert_close(got[1:3], before[1:3] + 3 * (now - before)[1:3])
    torch.testing.assert_close(got[::3], now[::3])
    guided.early = None  # not called where it does not count
    torch.testing.assert_close(guided(x_t[::3], t[::3]), model(x_t[::3], t[::3]))
    assert guided.to("meta").w.is_meta  # all of it moves to another device


# ---- Training: Algorithm 1 in plain PyTorch, and torch's own optimizers -------------------------
def test_a_training_step_is_algorithm_1_with_gradients_of_at_most_1(monkeypatch):
    monkeypatch.setattr(cd, "uses_bf16", lambda device: False)
    ours, t = small_unet(), torch.tensor([0, 9, 500, 999])
    theirs, (x0, eps) = copy.deepcopy(ours), torch.randn(2, 4, 3, 16, 16) * 50
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[t].view(4, 1, 1, 1)
    expected = F.mse_loss(theirs(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t), eps)
    expected.backward()
    assert nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) > 2
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    loss = cd.train_step(ours, EPS, optimizer, (x0, t, eps), accum=2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q - q.grad, rtol=0, atol=1e-4)
        assert p.grad is None


def test_muon_is_torchs_own_for_matrices_and_convolutions_and_adam_for_the_rest():
    layers = nn.Linear(16, 40), nn.Linear(16, 40), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 3, 3)
    model, lr = nn.ModuleDict(zip(["a", "b", "c", "conv_out"], layers)), 0.01
    ours = list(model.parameters())  # weight, bias, weight, bias, ...
    theirs = [nn.Parameter((p.flatten(1) if p.dim() > 1 else p).detach().clone()) for p in ours]
    muon = torch.optim.Muon(theirs[0:6:2], lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(theirs[1:6:2] + theirs[6:], lr, betas=(0.95, 0.999))
    optimizer = cd.Muon(model, lr=torch.tensor(lr), fused=True)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.view(q.shape).clone()
        for each in (optimizer, muon, adam):
            each.step()
    s = torch.logspace(math.log10(0.0015), -0.01, 200)
    pairs = torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], 1))  # of norm 1
    s = cd.orthogonal(pairs).diagonal(dim1=1, dim2=2)
    assert 0.66 < s.min() < 0.7 and 1.18 < s.max() < 1.22  # as the text says
    for p, q in zip(ours, theirs):  # torch's works in bf16 throughout, of steps of about 0.01
        torch.testing.assert_close(p.view(q.shape), q, rtol=0, atol=1.5e-3)


def test_levels_average_and_rate_are_as_promised():
    edges = torch.linspace(0, 1, 11)
    for name, uniform in (("middle", 0.25), ("uniform", 1.0)):
        t = cd.LEVELS[name](torch.arange(1e5) / 1e5, 1000)
        upto = uniform * edges + (1 - uniform) * (1 - torch.cos(math.pi * edges)) / 2
        torch.testing.assert_close((t // 100).bincount() / 1e5, upto.diff(), rtol=0, atol=1e-4)
    model = nn.Linear(1, 1)
    ema, mean = cd.EMA(model, decay=0.9), model.bias.item()
    for n in range(200):
        nn.init.constant_(model.bias, n)
        ema.update(model, n)
        mean += (1 - min(0.9, (1 + n) / (20 + n))) * (n - mean)
        assert ema.model.bias.item() == pytest.approx(mean, rel=1e-4)
    for step, steps, rate in RATES:
        assert cd.learning_rate(step, steps, 0.5) == pytest.approx(rate), (step, steps)


# (step, steps): up in 200 steps, or in less; the peak; falling as 1/√step; the last fifth.
RATES = [(0, 1000, 0.0025), (99, 1000, 0.25), (7, 40, 0.25), (199, 1000, 0.5), (799, 1000, 0.5)]
RATES += [(3999, 50_000, 0.25), (900, 1000, 0.25), (999, 1000, 0.0025)]


def test_the_text_tells_how_often_the_middle_is_learned():
    u = torch.arange(1e5) / 1e5
    for diffusion, levels, told in ((V, "middle", 56), (V, "uniform", 41), (EPS, "middle", 28)):
        sigma = diffusion.sigma[cd.LEVELS[levels](u)]
        share = ((sigma > 0.5) & (sigma < 2)).double().mean().item()
        assert 100 * share == pytest.approx(told, abs=0.5) and f"{told} %" in TEXT


def test_a_batch_is_a_function_of_seed_and_step_and_half_of_it_is_mirrored():
    def batch(step, seed):
        args = cd.settings(batch=64, levels="uniform", seed=seed)
        return cd.get_batch(pictures, step, args, CPU)

    pictures = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    x0, t, eps = batch(5, 0)
    torch.testing.assert_close(batch(5, 0), [x0, t, eps], rtol=0, atol=0)
    for other in (batch(6, 0), batch(5, 1)):
        assert not torch.equal(x0, other[0]) and not torch.equal(eps, other[2])
    assert (t * 4 // 1000).bincount().tolist() == [16] * 4  # spread evenly
    cats = ((x0 + 1) * 127.5).round().to(torch.uint8)
    mirrored = [cat for cat in cats if not (cat == pictures).flatten(1).all(1).any()]
    assert 10 < len(mirrored) < 54
    assert all((cat.flip(2) == pictures).flatten(1).all(1).any() for cat in mirrored)


def test_all_of_part_1_together_is_a_program_that_runs():
    code = TEXT.split("All of part 1 together:\n#\n")[1].split("\n\n")[0].replace("#     ", "")
    short = {"64, 32, (1, 2, 4, 4), 1": "16, 8, (1, 2), 1", "800_000": "2", "64, 64": "16, 16"}
    short |= {"linear_schedule()": "linear_schedule(20)", "randint(1000": "randint(20"}
    for long in short:
        assert long in code
        code = code.replace(long, short[long])
    names = vars(cd) | {"x0": torch.randn(4, 3, 16, 16)}
    exec(code, names)
    assert names["level"] == 0 and names["x0_hat"].shape == (8, 3, 16, 16)


# ---- The network --------------------------------------------------------------------------------
def test_the_network_is_the_papers_every_weight_is_used_and_small_layers_are_right():
    for size, side in ((32, 16), (96, 12), (128, 16)):
        args = cd.settings(size=size, channels=8)
        x, (model, _) = torch.randn(2, 3, size, size), cd.build(args, CPU)
        assert args.attention == [side] and model(x, torch.tensor([0, 999])).shape == x.shape
    model = cd.UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    assert [cd.norm(c).num_groups for c in (4, 12, 48, 96, 512)] == [1, 3, 12, 24, 32]
    (x0, eps), t = torch.randn(2, 64, 3, 16, 16), torch.randint(1000, (64,))
    fresh, model = cd.UNet(16, 8, (1, 2), 1, (8,)), small_unet()
    assert EPS.loss(fresh, x0, t, eps).item() == pytest.approx(1.0, abs=0.03)
    model(x0, t).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    e = cd.time_embedding(torch.tensor([0, 1]), 8)  # sine, then cosine
    assert e[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert e[1, 3].item() == pytest.approx(math.sin(1e-4), abs=1e-7)  # the slowest wave
    down, up = cd.Downsample(1, 1, 3, stride=2, bias=False), cd.Upsample(1, 1, 1, bias=False)
    for layer in (down, up):
        nn.init.ones_(layer.weight)
    assert down(torch.ones(1, 1, 4, 4), None).flatten().tolist() == [9, 6, 6, 4]
    twice = up(torch.eye(2)[None, None], None)[0, 0].tolist()
    assert twice == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    layer, x = small_unet().middle[0].attention, torch.randn(2, 16, 4, 4)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.5)
    y = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(layer.q(y), layer.k(y), layer.v(y))
    expected = x + layer.out(mixed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)
    block, x, emb = cd.ResBlock(16, 32, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    nn.init.normal_(block.conv2.weight, std=0.1)  # it starts at zero
    h = F.conv2d(F.silu(F.group_norm(x, 4, eps=1e-6)), block.conv1.weight, padding=1)
    h = h + (F.silu(emb) @ block.time.weight.T)[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 8, eps=1e-6)), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x, emb), F.conv2d(x, block.shortcut.weight) + h)


# ---- Pictures: written here by Pillow, so what must come out is known ---------------------------
RED, BLUE, WHITE, GREY = (250, 0, 0), (0, 0, 250), (255, 255, 255), (99, 99, 99)
KINDS = [(f"a.{end}", "RGB", RED, RED) for end in "jpg JPEG jpe png webp bmp tif avif".split()]
KINDS += [("g.jpg", "L", 99, GREY), ("c.jpg", "CMYK", (0, 255, 255, 0), RED)]
KINDS += [("t.png", "RGBA", (0, 0, 0, 0), WHITE), ("u.png", "LA", (0, 0), WHITE)]


def read(path):
    return cd.read_picture(Path(path), 32).permute(1, 2, 0).float()


def near(pixel, colour):
    return (pixel - torch.tensor(colour)).abs().max() <= 40


def test_pictures_of_every_kind_are_read_with_their_grain():
    for name, mode, fill, colour in KINDS:
        Image.new(mode, (40, 30), fill).save(name)
        assert near(read(name)[16, 16], colour), name
    os.rename("a.webp", "wrong.jpg")
    assert near(read("wrong.jpg")[16, 16], RED)
    grain = Image.frombytes("RGB", (40, 40), random.Random(0).randbytes(3 * 40 * 40))
    grain.resize((250, 250)).save("grain.jpg", quality=95)
    Image.open("grain.jpg").save("grain.png")  # decoded in full size
    wanted = read("grain.png")
    assert (read("grain.jpg") - wanted).std() < 0.2 * wanted.std()  # 0.5 if the decoder shrinks all


def test_a_picture_gives_its_middle_square_or_its_face_upright_and_never_squashed():
    for width, height in ((1023, 768), (333, 777), (7, 9)):
        side, image = min(width, height), Image.new("RGB", (width, height))
        square = Image.new("RGB", (side, side), RED)
        square.paste(BLUE, (side // 2, 0, side, side))  # on the right
        image.paste(square, ((width - side) // 2, (height - side) // 2))
        image.save("a.jpg", quality=95)
        image.save("a.png")
        for pixels in (read("a.jpg"), read("a.png")):
            assert near(pixels[16, 2], RED) and near(pixels[16, -3], BLUE)
    face = Image.new("RGB", (200, 100))
    face.paste(BLUE, (90, 15, 150, 90))
    face.save("a.png")
    Path("a.png.cat").write_text("9 110 60 130 60 120 75 100 50 100 25 105 45 135 45 140 25 140 50")
    assert all(near(read("a.png")[y, x], BLUE) for y in (2, 29) for x in (2, 29))


def test_photos_stand_upright_whatever_else_their_exif_says():
    image = cd.draw_cat(random.Random(0), 64)
    for turn in range(10):
        clean = Image.Exif()
        clean[0x0112] = turn
        image.save("clean.png", exif=clean)
        ImageOps.exif_transpose(Image.open("clean.png")).save("upright.png")
        tags = struct.pack("<HHHIHHHHIHxxI", 2, 0x0112, 3, 1, turn, 0, 0x0128, 2, 2, 50, 0)
        odd = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags  # a unit of resolution that is a word
        for name, exif in (("o.jpg", odd), ("o.png", odd), ("o.webp", odd), ("c.tif", clean)):
            image.save(name, exif=exif)
            assert (read(name) - read("upright.png")).abs().mean() < 8, (turn, name)


def test_each_real_file_is_found_once_and_what_is_bad_or_ours_is_passed_over(capsys):
    files = "cats/deep/2.JPG cats/._5.jpg cats/6.heic cats/1.jpg.cat other/7.webp .blobs/b1".split()
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    cats = [cd.draw_cat(random.Random(i), 64) for i in range(3)]
    cats[0].save("cats/1.jpg")
    links = "cats/loop=.. link=cats cats/again.jpg=1.jpg cats/knot=knot other/8.png=../.blobs/b1"
    for link in links.split():  # the name of the link counts
        Path(link.split("=")[0]).symlink_to(link.split("=")[1])
    for folders, count in (("other", 2), ("link/../other", 2), ("cats", 2), ("cats link", 2)):
        assert len(cd.find_pictures(folders.split())) == count, folders
    told = capsys.readouterr().out
    assert "'.heic': 1" in told and "'links': 2" in told
    Path("cats/1.jpg.cat").unlink()
    cats[1].save("cats/3.png")
    cats[2].save("cats/4.jpg")
    Path("cats/half.jpg").write_bytes(Path("cats/4.jpg").read_bytes()[:500])
    Path("cats/4.jpg.cat").write_text("9" + " 5" * 18)
    cd.write_image("cats/ours.png", cats[0], {})
    assert len(cd.load_pictures(["cats"], 16)) == 2  # 1.jpg and 3.png, but not the empty 2.JPG
    told = capsys.readouterr().out
    assert "4 of 6 pictures skipped" in told and "ours.png" in told and "marks no face" in told
    with pytest.raises(cd.Failure, match="none of 2"):
        cd.load_pictures(["other"], 16)


# ---- Nothing is lost ----------------------------------------------------------------------------
def stop_in_step(monkeypatch, step, number):
    """The signal comes in that training step of the next run."""
    steps, train_step = [], cd.train_step

    def press(*rest):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return train_step(*rest)

    monkeypatch.setattr(cd, "train_step", press)


@pytest.mark.parametrize("optimizer", cd.OPTIMIZERS)
def test_stopped_and_resumed_is_bit_for_bit_the_run_that_was_not(optimizer, monkeypatch, capsys):
    words = "train", *SMALL, "--dropout", 0.2, "--steps", 7, "--optimizer", optimizer
    words = *words, "--device", "cpu", "--run"
    number = {"muon": signal.SIGINT, "adam": signal.SIGTERM}[optimizer]
    assert run(*words, "whole") == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3, number)
        assert run(*words, "r") == 130 and load("r/checkpoint.pt")["step"] == 3
    assert signal.getsignal(number) is before and "stopping" in capsys.readouterr().out
    assert run(*words, "r") == 0
    whole, parts = load("whole/checkpoint.pt"), load("r/checkpoint.pt")
    assert whole["step"] == parts["step"] == 7
    whole["state"], parts["state"] = whole["optimizer"]["state"], parts["optimizer"]["state"]
    for name in ("model", "ema", "early", "state"):
        torch.testing.assert_close(whole[name], parts[name], rtol=0, atol=0)
    averaged = cd.load_checkpoint("r")[0].conv_in.weight
    assert not torch.equal(averaged, whole["model"]["conv_in.weight"])


def test_the_same_command_resumes_and_what_differs_is_told(capsys, monkeypatch):
    monkeypatch.setattr(cd, "preview", lambda *_: None)  # it takes time
    assert run("train", *SMALL, "--steps", 2, "--run", "r") == 0
    other = "--steps", 4, "--batch", 8, "--optimizer", "adam"
    assert run("train", *SMALL, *other, "--run", "r") == 0
    told = capsys.readouterr().out
    assert "--steps 2 --batch 4 --optimizer muon --lr 0.002" in told
    saved = load("r/checkpoint.pt")
    assert saved["step"] == 4 and saved["settings"]["lr"] == 2e-4
    others = "--size 8", "--mults 1 3", "--blocks 2", "--schedule linear", "--prediction eps"
    for start, other in zip(["--run", "--init", "--run", "--init", "--run"], others):
        assert run("train", *SMALL, "--attention", 8, *other.split(), start, "r") == 2
        name = other.split()[0]
        was = {"--size": "16", "--mults": "1 2", "--blocks": "1", "--schedule": "cosine"}
        assert f" has learned with {name} {was.get(name, 'v')}: " in capsys.readouterr().err
    words = "train", *SMALL, "--init", "r", "--run", "new", "--lr", 1e-4
    saved["early"] = {name: 2 * value for name, value in saved["early"].items()}
    torch.save(saved, "r/checkpoint.pt")
    assert run(*words, "--steps", 2) == 0
    new, old = load("new/checkpoint.pt"), vector(saved["ema"])
    assert 0 < (vector(new["model"]) - old).norm() < 0.01 * old.norm()
    # The average does not soon forget where it began, and the early weights stay.
    moved = (vector(new["model"]) - old).norm()
    assert (vector(new["ema"]) - old).norm() < 0.1 * moved
    torch.testing.assert_close(new["early"], saved["early"], rtol=0, atol=0)
    assert run("train", *SMALL, "--run", "new", "--steps", 3) == 0  # a run begins only once
    photos = load("new/checkpoint.pt")
    photos["settings"]["data"] = ["cats"]
    torch.save(photos, "r/checkpoint.pt")  # a run on photos does not go on with drawn cats
    assert run("train", *SMALL, "--run", "r") == 2
    assert "has learned from cats: add --data" in capsys.readouterr().err
    assert load("new/checkpoint.pt")["settings"]["init"] == "r"


def test_early_weights_are_the_average_after_1000_steps_and_an_eighth(monkeypatch):
    monkeypatch.setattr(cd, "preview", lambda *_: None)
    small = {"size": 16, "channels": 8, "mults": [1], "attention": [], "run": "r"}
    state = cd.State(cd.settings(**small), CPU)
    state.step = 999
    state.save(cd.settings(**small))
    for steps, same in ((1000, True), (1001, False), (8 * 1002, True)):
        if steps == 8 * 1002:
            stop_in_step(monkeypatch, 1, signal.SIGINT)  # step 1,002 is an eighth of 8,016
        state = cd.train(cd.settings(**small, steps=steps))
        average, early = (part.conv_out.weight for part in (state.ema.model, state.early))
        assert torch.equal(average, early) == same


def test_damage_a_full_disk_and_losses_that_are_not_finite_harm_no_checkpoint(monkeypatch, capsys):
    def full(number):
        raise OSError(28, "No space left on device")

    def nan(x, y):
        return x.sum() * math.nan

    words = "train", *SMALL, "--run", "r", "--steps"
    assert run(*words, 2) == 0
    good, state = Path("r/checkpoint.pt").read_bytes(), load("r/checkpoint.pt")
    spoilt = [{**state, "code": os.getcwd}, {"weights": state["ema"]}, [1, 2]]
    for bad in [b"", b"hello", good[:-30], good[: len(good) // 2], *spoilt]:
        Path("bad.pt").write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, "bad.pt")
        assert run("sample", "--checkpoint", "bad.pt") == 2
        error = capsys.readouterr().err
        assert "bad.pt: damaged" in error and error.count("\n") == 1
    for name, value in (("os.fsync", full), ("torch.nn.functional.mse_loss", nan)):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert run(*words, 3) == 2
    told = capsys.readouterr().err
    assert "No space left" in told and "before is safe" in told  # then: what to do, in one line
    assert "r/checkpoint.pt" in told and "--lr" in told and told.count("\n") == 2
    assert Path("r/checkpoint.pt").read_bytes() == good and not list(Path("r").glob("*.part"))
    monkeypatch.setattr(cd, "sample", lambda *_: 1 / 0)  # a preview that fails
    assert run(*words, 3) == 0 and "no preview" in capsys.readouterr().out
    monkeypatch.setattr(cd, "train_step", lambda *_: bytearray(1 << 60))
    assert run(*words, 4) == 2 and "--accum" in capsys.readouterr().err
    monkeypatch.setattr(cd, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug shows its traceback
        run(*words, 4)


# ---- The two commands ---------------------------------------------------------------------------
def test_the_two_commands_end_to_end(capsys):
    assert run("train", *SMALL, "--steps", 3, "--every", 0) == 0
    records = [json.loads(line) for line in Path("run-drawn/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert Path("run-drawn/previews/000003.png").exists()
    assert {"loss.png", "reconstruction.png"} < set(os.listdir("run-drawn"))
    os.mkdir("cats")
    cd.draw_cat(random.Random(0), 16).save("cats/1.png")
    words = "sample", "-n", 3, "--steps", 4, "--batch", 2, "--gif", "--nearest", "cats"
    words = *words, "--out", "my plots/"
    assert run(*words) == 0
    files = sorted(Path("my plots").iterdir())
    ends = "-0-0000.png -0-0001.png -0-0002.png -0-grid.png -0-nearest.png -0.gif".split()
    assert [file.name for file in files] == [f"cat-3{end}" for end in ends]  # of step 3, seed 0
    assert Image.open(files[-1]).n_frames == 4  # of the first batch
    before = [file.read_bytes() for file in files]
    assert run(*words) == 0
    assert before == [file.read_bytes() for file in files]  # the same files again
    assert "run-drawn/checkpoint.pt" in capsys.readouterr().out
    for ours in (files[0], files[3], Path("run-drawn/previews/000003.png"), "run-drawn/loss.png"):
        with pytest.raises(cd.Failure, match="made by this program"):
            read(ours)


def test_from_python_in_a_thread_and_a_picture_knows_how_it_was_made():
    assert cd.settings(data="cats").data == cd.settings(data=[Path("cats")]).data == ["cats"]
    args = cd.settings(size=16, channels=8, mults=(1, 2), attention=[], steps=2, run=Path("run"))
    for wrong in ({"step": 3}, {"size": 60}, {"lr": math.nan}):
        with pytest.raises(cd.Failure, match=[*wrong][0]):
            cd.settings(**wrong)
    with pytest.raises(cd.Failure, match="size=32"):
        cd.train(args, pictures=torch.zeros(20, 3, 32, 32).byte())
    photos = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8)
    thread = threading.Thread(target=cd.train, args=(args, photos))
    thread.start()
    thread.join()
    saved = load("run/checkpoint.pt")  # early weights that are very different
    saved["early"] = {name: 3 * value for name, value in saved["early"].items()}
    torch.save(saved, "run/checkpoint.pt")
    words = "sample", "--steps", 5, "--batch", 5, "--guidance", 1.5, "--checkpoint", "run"
    assert run(*words, "-n", 16, "--first", 2, "--out", "all/p") == 0
    files = sorted(Path("all").glob("p-2-0-0*.png"))
    assert [file.name for file in files][::15] == ["p-2-0-0002.png", "p-2-0-0017.png"]
    original = Image.open(files[6])
    made = json.loads(original.text["catdiffusion"])
    model, diffusion, step = cd.load_checkpoint(made["checkpoint"], guidance=made["guidance"])
    torch.testing.assert_close(model.early.conv_in.weight, 3 * model.model.conv_in.weight)
    how = (made[name] for name in ("sampler", "steps", "seed", "number"))
    *_, (_, _, x0_hat) = cd.sample(model, diffusion, 1, *how)
    pairs = zip(cd.to_images(x0_hat)[0].tobytes(), original.tobytes())
    assert max(abs(a - b) for a, b in pairs) <= 1 and made["trained_steps"] == step == 2
    pictures = torch.stack([cd.TF.pil_to_tensor(Image.open(file)) for file in files])
    sheet = cd.beside_nearest(torch.cat([x0_hat, x0_hat.flip(3)]), pictures)
    found = [sheet.crop((x, 2, x + 16, 18)).tobytes() for x in (18, 52)]  # right halves
    assert found == [original.tobytes(), ImageOps.mirror(original).tobytes()]


def test_what_comes_with_the_program():
    readme = (HERE / "README.md").read_text()
    names = set(re.findall(r"^ *(?:from|import) (\w+)", TEXT, re.M)) - set(sys.stdlib_module_names)
    assert names == {"torch", "torchvision", "PIL", "torch_xla"}
    state = load(HERE / "samples" / "catdiffusion.pt")
    assert "AFHQ" in state["about"] and "CC BY-NC 4.0" in state["about"]
    assert f"{state['step']:,}" in readme and "early" in state
    commands = re.findall(r"python catdiffusion\.py ([^`#&;\n]+)", readme)
    back = re.findall(r"paper: `([^`]+)`", TEXT.replace("\n#", ""))
    assert len(commands) > 4 and len(back) == 6
    for words in commands + back:
        cd.complete(cd.parser().parse_args(words.split()))
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./-]+)\)", readme))
    assert run("sample", "-n", 1) == 0  # the weights that come along, as nothing was trained here
    sheet = Image.open(HERE / "samples" / "cats.png").convert("RGB")
    first = sheet.crop((4, 4, 100, 100)).resize((64, 64))  # sample 0 of seed 0; it is enlarged
    made = Image.open(f"samples/cat-{state['step']}-0-0000.png")
    pairs = list(zip(first.tobytes(), made.tobytes()))
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 6
    lines = re.search(r"(    from catdiffusion .*\n(?:    .*\n)+)", readme)[1]
    code = lines.replace("    ", "").replace('"samples/', f'"{HERE}/samples/').replace("n=4", "n=1")
    code += "import sys; assert 'torch_xla' not in sys.modules"
    leftover = {"WORLD_SIZE": "4", "RANK": "2"}  # without a torchrun that says so
    code += "; import catdiffusion; assert (catdiffusion.WORLD_SIZE, catdiffusion.RANK) == (1, 0)"
    subprocess.run([sys.executable, "-B", "-c", code], env=ENVIRONMENT | leftover, check=True)
    assert Image.open("cat.png").size == (64, 64)


ODD = """train --size 60|train --size x|train --batch 0|train --lr 0|train --dropout 2
train --lr nan|train --attention 17|train --schedule square|train --siz 64|train --ema 2
train --channels 33|train --device nonsense|train --epochs 3|train --accum 5|paint
train --data nowhere|train --data
train --data HERE/README.md|train --data HERE/.ci|sample -n 0|sample --steps 1001
sample --nearest nowhere --checkpoint HERE/samples|sample --checkpoint no.pt"""


def test_odd_command_lines_say_what_is_wrong_and_write_nothing(capsys):
    for words in ODD.replace("\n", "|").split("|"):
        assert run(*words.replace("HERE", f"{HERE}").split()) == 2, words
        *usage, error = capsys.readouterr().err.splitlines()
        assert len(usage) == ("error:" in error) and error.startswith("catdiffusion"), words
        assert not os.listdir()


# ---- Devices: PJRT_DEVICE=CPU walks the whole TPU path, and torchrun's processes meet on this host

TPU = """import sys, catdiffusion as cd, torch_xla.debug.metrics as met
words = "train --device tpu --size 16 --channels 8 --mults 1 --attention --batch 4 --steps 4"
seen, end_of_step, share_out = [], cd.end_of_step, cd.share_out
def watch(device):
    end_of_step(device)
    seen.append((met.metric_data("CompileTime")[0], met.counter_value("aten::_local_scalar_dense")))
def cut(batch):
    spec = sys.modules["torch_xla"]._XLAC._get_xla_sharding_spec
    shares = [spec(tensor).split("]")[0] for tensor in share_out(batch)]
    assert shares == ["{devices=[2,1,1,1", "{devices=[2", "{devices=[2,1,1,1"], shares
    return batch
cd.end_of_step, cd.share_out, cd.preview = watch, cut, lambda *a: {}
assert cd.main(words.split()) == 0
assert seen[-1] == seen[2] and seen[-1][0] <= 3, seen  # nothing compiled or fetched any more
left = {name for name in met.counter_names() if name.startswith("aten::")}  # what left the device
assert left <= {"aten::_local_scalar_dense"}, left  # Adam looks at its rate once"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


def test_the_tpu_path_compiles_once_and_uses_all_cores_and_the_cpu_reads_what_it_saved():
    pytest.importorskip("torch_xla")
    environment = ENVIRONMENT | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run([sys.executable, "-c", TPU], env=environment, check=True, timeout=400)
    assert run("sample", "-n", 1, "--steps", 2) == 0


def test_two_processes_learn_what_one_does():
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=2 --local-addr=127.0.0.1 --"
    words = "train", *SMALL, "--lr", "0.003", "--accum", "2", "--steps", "10", "--run"
    assert run(*words, "one") == 0
    command = [sys.executable, *torchrun.split(), HERE / "catdiffusion.py", *words, "two"]
    subprocess.run(command, env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}, check=True)
    one, two = (vector(load(f"{folder}/checkpoint.pt")["model"]) for folder in ("one", "two"))
    assert (one - two).norm() < 0.05  # 0.44, if both processes take the same half
