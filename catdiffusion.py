"""catdiffusion: learn to draw cats by learning to remove noise. One file, to read and to use.

Take a photo of a cat and add a little Gaussian noise. Add a little more, a thousand times over,
and nothing of the cat is left: the end is pure noise, whatever the photo was. Each of these small
steps could be undone if we knew which noise is in the picture. We do not, but a network can learn
to guess it. To draw a new cat we start from pure noise and undo the thousand steps one after the
other (or, as we do, in 25 larger ones). That is all of it: Ho, Jain, Abbeel 2020, "Denoising
Diffusion Probabilistic Models" (arXiv:2006.11239), called "the paper" from here on.

    python catdiffusion.py train                    # no pictures? it draws cats and learns those
    python catdiffusion.py train --data ./cats      # yours; Ctrl-C, and the same line goes on
    python catdiffusion.py sample -n 8              # eight new cats in samples/

A map of the file. The lesson is all there is to learn; you may stop reading where it ends.

    The lesson         Noise: the formulas. Learning: one training step. Drawing: from noise to
                       cat. Network: what does the guessing. Averaging: the weights that draw.
    The program        Pictures to learn from. Train. Sample. Command line.
    The machine room   Where to compute: TPU, GPU, CPU, many at once. Files: checkpoints, the
                       paper's own networks. Sheets. A faster group norm.

Notation, the paper's but for σ (and the paper counts t from 1 to T, the code from 0 to T-1):

    x0      x₀        a clean picture, (B, 3, H, W), values in [-1, 1]
    t       t         how noisy: 0 is almost clean (not x0 yet), T-1 = 999 is noise; (B,), integers
    eps     ε         Gaussian noise, mean 0, variance 1, shaped like x0
    x_t     x_t       the picture after t+1 steps of noising; x̂₀ (x0 in Drawing): the guess of x₀
    beta    β_t       variance of the noise that step t adds
    abar    ᾱ_t       alphas_cumprod: the share of the picture's variance that survives up to t
    sigma   σ_t       √(1−ᾱ_t)/√ᾱ_t: the noise in x_t, in units of the picture in it

A NOTE marks where we depart from the paper, and why (README.md: "See for yourself"). The paper's
loss and sampler: `train --prediction eps --schedule linear --uniform 1`, `sample --sampler ddpm`.

What it reaches: cats beyond doubt at 64 px after 20 minutes on two CPU cores with bf16 (README).
"""

import argparse
import contextlib
import copy
import glob
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn

# ==== THE LESSON ================================================================================

# ---- Noise -------------------------------------------------------------------------------------
# The way in, from picture to noise, is called q, and has nothing to learn. One step of it is
# x_t = √(1−β_t)·x_{t−1} + √β_t·ε: the picture shrinks a little, so that with the noise its variance
# does not grow beyond 1. Sums of Gaussians are Gaussian, so many steps are one jump (Eq. 4):
# x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, where ᾱ_t is the product of all (1−β) so far. At t = 0 that is the
# photo with a trace of noise; at t = 500, on our schedule, 0.7 of the photo and 0.7 of noise
# (0.7² + 0.7² ≈ 1); at t = 999 it is noise alone.
#
# The way back: we know x_t given x_{t−1} and want x_{t−1} given x_t. Bayes' rule swaps the two, but
# needs to know which pictures there are; for one known x₀ it can be worked out (`q_posterior`). We
# do not know x₀, so a network guesses. It is trained on squared error, so its guess is the mean of
# all that x_t could have come from (no other answer is as near to all of them): sharp when there is
# little noise, a blur when there is much. That is why one guess is not enough, and we go in steps.


def at(table, t):
    """table[t], shaped to multiply pictures: (T,), (B,) -> (B, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """The noise schedule and the formulas. t is (B,), pictures are (B, 3, H, W).

    timesteps: T. schedule: "linear" or "cosine". prediction: what the network is asked for, "eps"
    or "v", see `target`. The defaults are the paper's. The tables are float64 and on the CPU;
    `to(device)` moves them there, as float32.
    """

    def __init__(self, timesteps=1000, schedule="linear", prediction="eps"):
        self.timesteps, self.prediction = timesteps, prediction
        if schedule == "linear":  # Section 4: from almost no noise a step to 2 % a step
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:
            # NOTE the paper's line leaves ᾱ = 0.003 at t = 750: all but the brightness of a small
            # picture is gone, and the last quarter teaches little. Here ᾱ follows cos², and β is
            # read off it (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17).
            u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            cos2 = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - cos2[1:] / cos2[:-1]).clamp(max=0.999)  # the last is 1
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, 0)  # ᾱ_t = Π (1 − β_s)
        self.signal_rate, self.noise_rate = abar.sqrt(), (1 - abar).sqrt()
        self.sigmas = self.noise_rate / self.signal_rate  # the noise in units of the picture

    def to(self, device):
        """All tables as float32 on `device`. Returns self."""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.float().to(device))
        return self

    def q_sample(self, x0, t, eps):
        """Jump straight to noise level t:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε   (Eq. 4)"""
        return at(self.signal_rate, t) * x0 + at(self.noise_rate, t) * eps

    def predict_x0(self, x_t, t, eps):
        """Eq. 4 solved for the picture:  x̂₀ = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t   (Eq. 15)"""
        return (x_t - at(self.noise_rate, t) * eps) / at(self.signal_rate, t)

    def q_posterior(self, x0, x_t, t, t_next):
        """The way back if x₀ is known: what x_t was at t_next < t is Gaussian (Eq. 6 and 7).

        With ᾱ' for ᾱ at t_next, and β = 1 − ᾱ/ᾱ', the noise that was added in between:

            mean = √ᾱ'·β/(1−ᾱ)·x₀ + √(1−β)·(1−ᾱ')/(1−ᾱ)·x_t,    variance = β·(1−ᾱ')/(1−ᾱ)

        The paper has t_next = t − 1, where β is β_t. Returns mean, variance, β.
        """
        abar, abar_next = at(self.alphas_cumprod, t), at(self.alphas_cumprod, t_next)
        beta = 1 - abar / abar_next
        of_x0 = abar_next.sqrt() * beta / (1 - abar)
        of_x_t = (1 - beta).sqrt() * (1 - abar_next) / (1 - abar)
        return of_x0 * x0 + of_x_t * x_t, beta * (1 - abar_next) / (1 - abar), beta

    # What is the network asked for? The paper asks for the noise. One could as well ask for the
    # picture, for Eq. 4 gives one from the other: if the picture is wrong by d, so is the noise, by
    # d·√ᾱ_t/√(1−ᾱ_t). The squared errors then differ only by a factor for each t, ᾱ/(1−ᾱ), the
    # signal-to-noise ratio. So the choice is one of weights in the loss, and of numerics.
    #
    # NOTE ours is asked for a mixture (Salimans & Ho 2022, arXiv:2202.00512, appendix D):
    #
    #     v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀        and back:  x₀ = √ᾱ_t·x_t − √(1−ᾱ_t)·v
    #
    # Near pure noise ε is too easy a question, as the answer is the input; and Eq. 15 then divides
    # by √ᾱ_t, almost 0, which magnifies every error. Turning v back divides by nothing.
    #
    # The squares of √ᾱ_t and √(1−ᾱ_t) sum to 1: they are cosine and sine of an angle. As the angle
    # grows with t, x_t moves along a quarter of a circle from x₀ to ε, and v is its velocity. Newer
    # papers move along the straight line instead, whose velocity is ε − x₀, and call the network a
    # flow (Lipman et al. 2023, arXiv:2210.02747): the same guess, weighed differently.

    def target(self, x0, t, eps):
        """What the network should answer: ε, or v."""
        if self.prediction == "eps":
            return eps
        return at(self.signal_rate, t) * eps - at(self.noise_rate, t) * x0

    def x0_from(self, output, x_t, t):
        """The picture that the network's answer implies."""
        if self.prediction == "eps":
            return self.predict_x0(x_t, t, output)
        return at(self.signal_rate, t) * x_t - at(self.noise_rate, t) * output

    def loss(self, model, x0, t, eps):
        """Mean squared error of the answer; if asked for ε, that is (ε − ε_θ(x_t, t))²  (Eq. 14)"""
        output = model(self.q_sample(x0, t, eps), t)  # (B, 3, H, W)
        return F.mse_loss(output, self.target(x0, t, eps))


# ---- Learning ----------------------------------------------------------------------------------
# Algorithm 1 of the paper. Again and again: take pictures x₀ from the data, a noise level t for
# each, and noise ε; make x_t; let the network guess; and take a step down the gradient of the
# squared error. `draw_batch` (in the program) takes x₀, t and ε. `model` maps x_t and t to a guess
# shaped like x_t; ours comes after the next part, and until then it does not matter what is inside.
# (`autocast`, here and below, is about speed: see the machine room.)


def choose_t(u, timesteps, uniform):
    """Random numbers u in [0, 1) -> noise levels t, both (B,). uniform: share drawn uniformly.

    NOTE the paper draws all of them uniformly. But a trace of noise is soon told from a cat, and
    where all is noise there is little to see. So the rest of ours come with chances like sin(πt/T),
    mostly where, on our schedule, there is as much noise as picture (Esser et al. 2024,
    arXiv:2403.03206, by another curve). Shapes gain; grain and colours need the uniform share.
    """
    rest = torch.acos(1 - 2 * (u - uniform) / (1 - uniform)) / math.pi  # inverts sin's integral
    return (torch.where(u < uniform, u / uniform, rest) * timesteps).long().clamp(max=timesteps - 1)


def train_step(model, diffusion, optimizer, lr, batch, accum=1):
    """One round of Algorithm 1 on `batch`, which is x0 (B, 3, H, W), t (B,) and eps like x0.

    accum: into how many parts the batch is cut, to save memory. lr and the returned loss (NaN: step
    skipped) are scalars that stay on the device: to look at them would mean to wait.
    """
    total = 0.0
    for x0, t, eps in zip(*(tensor.chunk(accum) for tensor in batch)):
        with autocast(x0.device):
            loss = diffusion.loss(model, x0, t, eps) / accum
        loss.backward()  # adds to the gradient of the parts before
        total = total + loss.detach()  # a number to report, without its history

    # One bad batch must not throw the network off its path: a gradient longer than 1 is scaled down
    # to 1; and if it is not even a number, gradient and rate become 0, and the weights stay.
    length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    finite = (total + length).isfinite()  # True or False, on the device
    for parameter in model.parameters():
        parameter.grad.nan_to_num_(0, 0, 0)
    optimizer.param_groups[0]["lr"] = lr * finite
    optimizer.step()
    optimizer.zero_grad()
    return torch.where(finite, total, math.nan)


class Muon(torch.optim.Adam):
    """Adam, but with steps equally long in all directions of a layer (Jordan et al. 2024, "Muon").

    NOTE the paper's Adam gives each weight a step of its own size. But a layer is a matrix, and so
    is its gradient, here the mean over some twenty steps: with a few large singular values, for
    what all pictures have in common, one may think, and many small ones, for what tells them apart.
    Ours brings all near 1, and both are learned at once. Biases, norms and the last layer, of three
    maps, stay Adam's; a convolution counts as a matrix, which torch's own Muon does not take.
    """

    @torch.no_grad()
    def step(self):
        layers = [p for p in self.param_groups[0]["params"] if p.dim() > 1 and len(p) > 3]
        before = [p.clone() for p in layers]
        super().step()
        for p, old in zip(layers, before):
            with autocast(p.device):  # Adam's mean of the last gradients, this one counted more
                step = orthogonal(p.grad.lerp(self.state[p]["exp_avg"], 0.95).flatten(1))
            lr = self.param_groups[0]["lr"] * 0.2 * max(step.shape) ** 0.5  # about as far as Adam
            p.copy_(old - lr * step.view_as(p))  # in place of Adam's step


def orthogonal(m):
    """The matrix m with all singular values s made about 1 (0.7 to 1.2; the tiniest less).

    Each round turns s into 3.4445·s − 4.775·s³ + 2.0315·s⁵, which lifts small ones and keeps large
    ones near 1. No s need be known for it: m·mᵀ·m has the values s³, m·mᵀ·m·mᵀ·m has s⁵.
    """
    m = m / (m.norm() + 1e-7)  # now no s is above 1
    one = torch.eye(len(m), device=m.device)
    for _ in range(5):
        square = m @ m.T
        m = (3.4445 * one - 4.775 * square + 2.0315 * square @ square) @ m
    return m


# ---- Drawing -----------------------------------------------------------------------------------
# Now backwards, from noise to cat. At each step the network looks at x_t and says which clean
# picture x̂₀ it sees in there; early on that is a grey blur, the mean of all cats. We do not jump
# there. We go to the next lower noise level on the way and look again: what noise is left favours
# some cats over others, and the guess grows sharper.
#
# There are three ways to take such a step, each a few lines long; `sample` repeats the one that it
# is asked for. The guess is clipped to [-1, 1] first: no picture has values outside, so it can only
# get better by it. (Leaning, below, may take it out again.)


def ddpm_step(diffusion, x0, x_t, t, t_next, fresh_noise, large=False):
    """The paper's way (Algorithm 2): take the guess for the truth, and pick from Eq. 6 at random.

    The guess is only a mean, but Eq. 6 is linear in x₀, so its mean comes out right; and over a
    small step the way back is nearly a Gaussian, which is a mean and a variance. That mean has less
    noise than a picture at t_next; the rest is added, fresh.

    The paper found two variances to serve equally well: that of Eq. 7, exact if all data were one
    picture, and β (`large`), exact if the data were noise itself. They differ by β²·ᾱ'/(1−ᾱ).
    Where β is small, as in a thousand steps, that is next to nothing. In one of 50 steps it is not:
    then `large` leaves more noise than the next step expects, and the network takes it for fur.
    """
    mean, variance, beta = diffusion.q_posterior(x0, x_t, t, t_next)
    return mean + (beta if large else variance).sqrt() * fresh_noise


def ddim_step(diffusion, x0, x_t, t, t_next):
    """Without fresh noise (DDIM, Song et al. 2021, arXiv:2010.02502): keep what noise there is.

    x_t is the guessed picture and some ε. Mix the same two again, by Eq. 4, as at t_next. Nothing
    random happens, so each picture follows one path from noise to cat; and as the guess changes
    little from level to level, the path bends little, and can be taken in large steps: 50 do. (Song
    et al. have a dial, η, for the share of fresh noise: 0 is this, 1 is `ddpm_step`, not `large`.)
    """
    # ε is worked out anew, as x0 may have been changed since: the two must add up to x_t.
    eps = (x_t - at(diffusion.signal_rate, t) * x0) / at(diffusion.noise_rate, t)
    return diffusion.q_sample(x0, t_next, eps)


def look_ahead(diffusion, x0, x0_prev, t_prev, t, t_next):
    """Lean the guess forward (DPM-Solver++ 2M, Lu et al. 2022, arXiv:2211.01095).

    Drawn against the logarithm of sigma, the guess moves on nearly a straight line. DDIM takes its
    value at the start of a step for all of it; we extend the line through the last two guesses to
    the middle of the step, which stands better for the whole: 25 steps do.
    """
    sigma_prev, sigma, sigma_next = (at(diffusion.sigmas, each) for each in (t_prev, t, t_next))
    step, step_prev = (sigma_next / sigma).log(), (sigma / sigma_prev).log()  # both negative
    return x0 + (x0 - x0_prev) * step / step_prev / 2


def noise_levels(diffusion, steps):
    """The t that a drawing of `steps` network calls visits: T-1 first, then ever lower.

    NOTE most programs take every T/steps-th t. Ours are even in the logarithm of sigma, which falls
    by the same factor each time (cf. Karras et al. 2022, arXiv:2206.00364): from 200, for which T-1
    stands in, where not even the brightness of a picture, a mean of thousands of values, is to be
    seen, to 0.01. Steps even in t spend few calls at the ends, and lose contrast there.
    """
    log_sigmas = diffusion.sigmas.cpu().double().log()  # (T,), rising
    levels = [diffusion.timesteps - 1]  # pure noise
    for k in range(1, steps):
        wanted = math.log(200) + k / (steps - 1) * math.log(0.01 / 200)  # down to 0.01
        t = (log_sigmas - wanted).abs().argmin().item()
        levels.append(max(min(t, levels[-1] - 1), steps - 1 - k))  # all different, with room below
    return levels


@torch.no_grad()
def sample(model, diffusion, n=8, sampler="dpm", steps=25, seed=0, first=0, start=None):
    """Draw pictures first .. first+n-1 of `seed`; yields (t, x_t, x0) once per network call.

    t: int, T-1 at first. x_t and x0: (n, 3, size, size), the noisy picture and the network's guess
    of the clean one; the last x0 is the result. sampler: "ddpm", the paper's, if steps are 1000;
    "ddpm-large", its other variance; "ddim"; "dpm", which looks ahead. start: the first (t, x_t).
    """
    device, size = next(model.parameters()).device, model.size
    # Each picture has its own source of noise, and on the CPU: so it is the same picture, up to
    # rounding, on another device and in another batch.
    sources = [torch.Generator().manual_seed(seed_from(seed, i)) for i in range(first, first + n)]

    def fresh_noise():
        return torch.stack([torch.randn(3, size, size, generator=g) for g in sources]).to(device)

    levels, x_t, x0_prev, t_prev = noise_levels(diffusion, steps), fresh_noise(), None, None
    if start:
        levels, x_t = [start[0], *(t for t in levels if t < start[0])], start[1]
    for k, level in enumerate(levels):
        t = torch.full((n,), level).to(device)  # built on a TPU, it would be compiled in
        with autocast(device):
            output = model(x_t, t)  # ε or v
        x0 = diffusion.x0_from(output, x_t, t).clamp(-1, 1)
        yield level, x_t, x0
        if k == len(levels) - 1:
            break  # below is no noise: ᾱ' = 1, so the mean of Eq. 6 is x̂₀ and the variance is 0
        t_next = torch.full((n,), levels[k + 1]).to(device)
        if sampler.startswith("ddpm"):
            x_t = ddpm_step(diffusion, x0, x_t, t, t_next, fresh_noise(), sampler == "ddpm-large")
        elif sampler == "dpm" and k > 0:
            ahead = look_ahead(diffusion, x0, x0_prev, t_prev, t, t_next)
            x_t = ddim_step(diffusion, ahead, x_t, t, t_next)
        else:
            x_t = ddim_step(diffusion, x0, x_t, t, t_next)
        x0_prev, t_prev = x0, t
        end_of_step(device)  # for TPUs, see the machine room


# ---- Network -----------------------------------------------------------------------------------
# The paper's U-Net. A picture goes down a staircase of resolutions, each half the one before, and
# up again; on the way up every floor also sees what it looked like on the way down. So the bottom
# decides where the cat is, and the top still knows each hair. Every block is told the noise level
# t, for the same weights serve all of them, and whether a speck is fur or noise depends on how much
# noise there must be. Ours has fewer channels than the paper's; built with the paper's numbers and
# given the weights of a published network, it computes what that one computes. (`GroupNorm` and
# `upsample` do what torch's own do; the machine room has them.)


def time_embedding(t, channels):
    """Numbers 0..T-1 as waves of different lengths (Vaswani et al. 2017): (B,) -> (B, channels).

    A network reads one number in the hundreds badly, and many numbers in [-1, 1] well.
    """
    exponents = torch.linspace(0, 1, channels // 2, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (B, channels / 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def norm(channels):
    """Group normalisation: each group of channels to mean 0 and variance 1 (Wu & He 2018).

    NOTE the paper has 32 groups, of 4 channels at its 128; on narrower maps ours are of 4, too.
    One channel a group would erase the mean of each map, and with it the brightness.
    """
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut around them; t comes in between; attention if asked."""

    def __init__(self, c_in, c_out, c_time, dropout=0.0, attention=False):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)  # one number to add to each map
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)  # drops features: less is learned by heart
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, time):  # (B, c_in, H, W), (B, c_time) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = h + self.time(F.silu(time))[:, :, None, None]  # the same at every pixel
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Attention(nn.Module):
    """Lets every pixel look at every other: how the left eye learns the colour of the right one.

    Single-head self-attention; for small maps, as its cost grows with the side's fourth power.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)  # then questions, keys, values, and the way out
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): pixels as a list
        q, k, v = self.q(y), self.k(y), self.v(y)  # each pixel's question, key and value
        weights = (q * x.shape[1] ** -0.5 @ k.transpose(1, 2)).softmax(-1)  # who looks at whom
        y = self.out(weights.to(v.dtype) @ v)  # each gets a mixture of all values
        return x + y.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Conv2d):
    """Half the side. Pads right and bottom only, as the paper's code does. No use for time here."""

    def forward(self, x, time):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: repeat, then convolve. (Transposed convolutions leave checkerboards.)"""

    def forward(self, x, time):
        return super().forward(upsample(x))


class UNet(nn.Module):
    """forward(x, t): noisy pictures (B, 3, size, size), t (B,) -> the guess, shaped like x, fp32.

    size: side of the pictures. channels: feature maps at full size; mults: multiples of that at
    size, size/2, size/4, ...; blocks: residual blocks a floor (one more on the way up);
    attention: sides of the maps that get it; the middle always does.
    The paper's for 32 px: UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1), 35,746,307 parameters.
    """

    def __init__(self, size, channels, mults, blocks, attention, dropout=0.0):
        super().__init__()
        self.size, self.channels = size, channels
        c_time = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = channels, [channels]  # skips: channels of what the way down leaves behind
        for floor, mult in enumerate(mults):
            here = size >> floor in attention
            for _ in range(blocks):
                self.down.append(ResBlock(c, channels * mult, c_time, dropout, here))
                c = channels * mult
                skips.append(c)
            if floor < len(mults) - 1:
                self.down.append(Downsample(c, c, 3, stride=2))
                skips.append(c)
        self.middle = nn.ModuleList(ResBlock(c, c, c_time, dropout, a) for a in (True, False))
        for floor, mult in reversed(list(enumerate(mults))):
            here = size >> floor in attention
            for _ in range(blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), channels * mult, c_time, dropout, here))
                c = channels * mult
            if floor > 0:
                self.up.append(Upsample(c, c, 3, padding=1))
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3, padding=1)

        # Ho's initialisation: Glorot's, which torch calls xavier, but zero where a branch ends, so
        # that each block begins as its shortcut, and the whole network by guessing zero.
        for name, m in self.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                zero = name.endswith(("conv2", "out"))
                nn.init.xavier_uniform_(m.weight, gain=0.0 if zero else 1.0)
                nn.init.zeros_(m.bias)

    def forward(self, x, t):
        time = self.time(time_embedding(t, self.channels))  # (B, 4·channels)
        x = self.conv_in(x)  # (B, channels, size, size)
        skips = [x]  # what the way up will see again
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                x = torch.cat([x, skips.pop()], 1)  # in reverse order
            x = layer(x, time)
        return self.conv_out(F.silu(self.norm_out(x))).float()


# ---- Averaging ---------------------------------------------------------------------------------
# While the learning rate is high, the weights jitter from batch to batch, and with them the colours
# of all cats. Their running average draws much better pictures, and costs one multiply-add a weight
# (where the rate has fallen to 0, the last weights are nearly as good). The paper's decay of 0.9999
# remembers some 10,000 steps, though, and early on that would be mostly the random start: sampling
# from such an average gives noise, and many have taken that for a bug in their sampler. NOTE so the
# memory of ours grows with the run: after n steps it is n/19 steps long, and at most 10,000.


class EMA:
    """Exponential moving average of a network's parameters; `.model` is the averaged network."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model, n):
        """average ← d·average + (1−d)·weights, with d = min(decay, (1+n)/(20+n)); n = 0, 1, ..."""
        share = 1 - min(self.decay, (1 + n) / (20 + n))
        share = torch.tensor(share).to(next(model.parameters()).device)  # (for TPUs, as in sample)
        for mean, new in zip(self.model.parameters(), model.parameters()):
            mean.lerp_(new.detach(), share)


# ==== THE PROGRAM ===============================================================================

# ---- Pictures to learn from --------------------------------------------------------------------
# Pictures come in all shapes and states. We find them, cut out a square (never squash one: a
# squashed cat teaches squashed cats), shrink it, and write all to one file of plain bytes in the
# run's folder: at 64 px, 12 KB a picture. Decoding happens once, in threads. From then on that file
# is mapped into memory, where the system keeps what is in use: a million pictures need no more than
# a thousand. A batch is one indexing operation, and no worker process is ever needed.

SUFFIXES = ".jpg .jpeg .png .webp .bmp .gif".split()


def draw_batch(s, pictures, timesteps, step, device):
    """Everything random in one training step, from (s.seed, step) alone on one kind of device.

    So a run that was stopped and started again gives the same result as one that never was.
    pictures: uint8 (N, H, W, 3). Returns x0 (B, 3, H, W) in [-1, 1], t (B,), and eps like x0.
    """
    set_seed(device, s.seed, step)
    index, flip = torch.randint(len(pictures), (s.batch,)), torch.rand(s.batch) < 0.5  # mirrored?
    # NOTE the paper draws each t by itself. We spread a batch evenly from one random number: each t
    # is as likely as before, but no batch is all noise (Kingma et al. 2021, arXiv:2107.00630).
    t = choose_t((torch.rand(1) + torch.arange(s.batch)) / s.batch % 1, timesteps, s.uniform)
    eps = torch.randn(s.batch, 3, *pictures.shape[1:3], device=device)  # drawn where it is used
    index, flip, t, eps = (tensor[RANK::WORLD_SIZE] for tensor in (index, flip, t, eps))
    x0 = pictures[index].to(device)  # (B, H, W, 3), uint8
    x0 = torch.where(flip.to(device)[:, None, None, None], x0.flip(2), x0)
    set_seed(device, s.seed, step, RANK)  # from here on, what dropout draws
    return over_cores(as_floats(x0), t.to(device), eps)


def as_floats(pictures):
    """Bytes of pictures, uint8 (N, H, W, 3), as the network sees them: (N, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_pictures(folders, size, run):
    """Every picture below `folders`, or drawn cats if there are none: uint8 (N, size, size, 3).

    They are in a file in the folder `run`, whose name is made from names, lengths and times of all
    pictures: what changes is decoded anew.
    """
    paths = [path for path in find_pictures(folders) if Path(run).absolute() not in path.parents]
    files = [Path(f"{path}{end}") for path in paths for end in ("", ".cat")]
    state = [(f"{f}", f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    cache = Path(run, f"pictures-{seed_from(size, state):08x}.u8")
    if RANK == 0 and not cache.exists():  # one process decodes for all,
        drawn = (draw_cat(random.Random(i), size).tobytes() for i in range(2000))
        with whole_file(cache) as file:
            file.writelines(decode_pictures(paths, size) if folders else drawn)
    while not cache.exists():  # and the others wait
        time.sleep(1)
    # True: shared. For a private mapping the system would set aside memory for the whole file.
    flat = torch.from_file(str(cache), True, cache.stat().st_size, dtype=torch.uint8)
    return flat.view(-1, size, size, 3)


def find_pictures(folders):
    """All picture files below `folders`, once each, without hidden ones (macOS' ._cat.jpg)."""
    found = set()
    for folder in map(Path, folders):
        names = map(Path, glob.glob("**", root_dir=folder, recursive=True))  # glob passes over them
        files = {folder.absolute() / name for name in names if name.suffix.lower() in SUFFIXES}
        require(files, f"{folder}: no such folder, or no {' '.join(SUFFIXES)} file in it")
        found |= {file for file in files if file.is_file()}  # no folder named cat.jpg
    return sorted(found)


def decode_pictures(paths, size):
    """Yield the bytes of each picture. What cannot be decoded is skipped, counted and named."""
    skipped = []  # what to tell of them

    def attempt(path):
        try:
            return read_picture(path, size)
        except Exception as e:  # a damaged file can make a decoder raise anything
            skipped.append(f"{path}: {e or type(e).__name__}")
            return b""  # no bytes, no picture

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), 500):  # not all at once: they may be a million
            show(f"decoding pictures, {first} of {len(paths)}", passing=True)
            yield from pool.map(attempt, paths[first : first + 500])
    if skipped:
        show("\n  ".join([f"{len(skipped)} of {len(paths)} pictures skipped:", *skipped[:8]]))
    require(len(skipped) < len(paths), f"none of {len(paths)} pictures could be decoded")


def read_picture(path, size):
    """One file -> bytes of (size, size, 3), upright, white behind it. Raises as Pillow does."""
    with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF")) as image:
        require(image.mode[0] != "I", "grey of 16 bit, which would come out white")
        if os.path.exists(f"{path}.cat"):
            image = image.crop(face_box(path, *image.size))
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time; but
        # below three times what we need, its fur would come out blurred, or with a false grain.
        image.draft(None, [math.ceil(3 * side * size / min(image.size)) for side in image.size])
        image = ImageOps.exif_transpose(image).convert("RGBA")  # upright
        image = ImageOps.fit(image, (size, size), Image.LANCZOS)  # cuts, shrinks
        white = Image.new("RGBA", (size, size), "white")  # shows where the picture is transparent
        return Image.alpha_composite(white, image).convert("RGB").tobytes()


def face_box(path, width, height):
    """The square around a cat's face, by landmarks: (left, top, right, bottom) inside the picture.

    Beside each picture the CAT dataset (Zhang, Sun, Tang 2008) has a file that marks the eyes, the
    mouth and three points on each ear, as "9 x1 y1 ... x9 y9".
    """
    nine, *points = map(int, Path(f"{path}.cat").read_text().split())
    xs, ys = points[0::2], points[1::2]  # in pixels of the picture
    w, h = max(xs) - min(xs), max(ys) - min(ys)  # of the face
    require(nine == 9 and len(points) == 18 and min(w, h) > 8, f"{path.name}.cat marks no face")
    side = min(1.25 * max(w, h), width, height)  # a little more than the points, but inside
    left = min(max((min(xs) + max(xs) - side) / 2, 0), width - side)
    top = min(max((min(ys) + max(ys) - side) / 2 + 0.1 * h, 0), height - side)  # room for a chin
    return left, top, left + side, top + side


def draw_cat(rng, size):
    """A cat of our own, for those who have no pictures: random.Random -> PIL image, size x size."""
    furs = (235, 150, 70), (90, 90, 100), (240, 225, 205), (60, 45, 40), (160, 120, 85)
    irises = (120, 190, 70), (230, 180, 50), (90, 160, 220), (60, 170, 140)
    fur, iris = tuple(v + rng.randint(-15, 15) for v in rng.choice(furs)), rng.choice(irises)
    image = Image.new("RGB", (128, 128), tuple(rng.randint(60, 230) for _ in range(3)))  # a wall
    pen, x, y = ImageDraw.Draw(image), rng.randint(56, 72), rng.randint(62, 74)
    tall, wide = rng.randint(44, 58), rng.randint(6, 10)
    pen.ellipse((x - 42, y + 22, x + 42, y + 120), fur)  # body
    for ear in (-1, 1):
        pen.polygon([(x + 37 * ear, y), (x + 33 * ear, y - tall), (x + 6 * ear, y - 30)], fur)
    pen.ellipse((x - 42, y - 36, x + 42, y + 36), fur)  # head
    for eye in (x - 17, x + 17):
        pen.ellipse((eye - 9, y - 4 - wide, eye + 9, y - 4 + wide), iris)
        pen.ellipse((eye - 3, y - 4 - wide, eye + 3, y - 4 + wide), (15, 15, 15))
    pen.polygon([(x - 5, y + 11), (x + 5, y + 11), (x, y + 17)], (225, 140, 150))  # nose
    return image.resize((size, size), Image.LANCZOS)  # drawn large, then shrunk: smooth edges


# ---- Train -------------------------------------------------------------------------------------
# The loop is what Algorithm 1 says: `draw_batch`, `train_step`, and the average on top. As a batch
# follows from its number, all there is to a run are the network, the average, the optimiser and the
# number of steps made. One file holds them, and a run that was stopped goes on as if it never was.

REPORT = 50  # steps between two status lines


def train(s):
    """Train as the settings `s` say (train's options, by name). Returns the exit code."""
    device = pick_device(s.device)
    run = prepare(s, device)  # what changes in a run
    pictures = load_pictures(s.data, s.size, s.run)
    few = ", few: below 1,000 or so a network repeats them" if len(pictures) < 1000 else ""
    show(f"{len(pictures)} pictures of {s.size} px{few}; on {device}; previews go to {s.run}")
    parallel = nn.parallel.DistributedDataParallel(run.model) if WORLD_SIZE > 1 else run.model
    losses, since = [], time.perf_counter()  # since the last status line
    due = since + 60 * min(1, s.every)  # the first preview, after a minute
    with note_signals() as signals:  # so that a step is always finished
        while run.step < s.steps and not sum_over_processes(torch.tensor(len(signals))):
            batch = draw_batch(s, pictures, run.diffusion.timesteps, run.step, device)
            lr = torch.tensor(learning_rate(s, run.step)).to(device)  # a tensor, see prepare
            losses.append(train_step(parallel, run.diffusion, run.optimizer, lr, batch, s.accum))
            run.ema.update(run.model, run.step)
            end_of_step(device)
            run.step += 1
            if len(losses) == REPORT or run.step == s.steps:
                report(s, run, losses, time.perf_counter() - since)
                if RANK == 0 and (run.step == s.steps or time.perf_counter() >= due):
                    save_checkpoint(s, run)  # first: a preview may go wrong
                    preview(s, run, pictures)
                    due = time.perf_counter() + 60 * s.every
                losses, since = [], time.perf_counter()
        if RANK == 0:
            save_checkpoint(s, run)
        sum_over_processes(torch.zeros(1))  # nobody leaves before it is saved
    if run.step >= s.steps:
        show(f"all {run.step} steps done (a larger --steps takes the run further); now draw with")
        show(f"python catdiffusion.py sample -n 8 --checkpoint {s.run}/checkpoint.pt")
        return 0
    show(f"stopped and saved at step {run.step}; the same command goes on from there")
    return 128 + (signals or [signal.SIGTERM])[0]  # 130 for Ctrl-C, 143 for SIGTERM


def prepare(s, device):
    """All that changes in a run: as it begins, or as it was saved in s.run."""
    require(s.batch % (s.accum * WORLD_SIZE) == 0, "--accum times processes must divide --batch")
    set_seed(device, s.seed)  # the same network each time
    model, diffusion = build(s, device)
    run = argparse.Namespace(model=model, diffusion=diffusion, step=0, seconds=0.0, log=[])
    run.ema = EMA(model, s.ema)  # starts as a copy
    # Adam's update is one kernel where torch has one (fused). On a TPU the step counter must be a
    # tensor, too (capturable): a number would be compiled into the program.
    lr, xla = torch.tensor(0.0, device=device), device.type == "xla"
    run.optimizer = Muon(model.parameters(), lr, betas=(0.95, 0.999), capturable=xla, fused=not xla)
    path = Path(s.run, "checkpoint.pt")
    if path.exists():
        with open_checkpoint(path) as saved:
            # A run may go on elsewhere and faster or slower, but otherwise as it began.
            for name in sorted(set(vars(s)) - {"run", "steps", "every", "device", "accum", "lr"}):
                old = saved["settings"].get(name)
                told = f"{path} was made with --{name} {old}; give that, too, or another --run"
                require(old == vars(s)[name], told)
            run.model.load_state_dict(saved["model"])
            run.ema.model.load_state_dict(saved["ema"])
            # Adam's averages are those of the run; whether it is fused depends on this device.
            saved["optimizer"]["param_groups"] = run.optimizer.state_dict()["param_groups"]
            run.optimizer.load_state_dict(saved["optimizer"])
            run.step, run.seconds, run.log = saved["step"], saved["seconds"], saved["log"]
    return run


def learning_rate(s, step):
    """Up in the first 200 steps, while Adam's averages are young; then s.lr.

    NOTE the paper keeps its rate. Ours falls to 0 in the last fifth of the run, so that the network
    settles; that is worth much without the average, and little with it. (A finished run that is
    given more --steps goes on with a higher rate again, and is worse before it is better.)
    """
    return s.lr * min(1, (step + 1) / 200, (s.steps - step) / s.steps * 5)


def report(s, run, losses, seconds):
    """A status line, and a record in the log, about the last `losses`, which took `seconds`.

    Only here the losses are fetched from the device. Raises Failure if none of them is a number.
    """
    values = sum_over_processes(torch.stack(losses)).cpu() / WORLD_SIZE  # mean over all
    loss, speed = values.nanmean().item(), len(losses) / seconds  # NaN: a skipped step
    require(math.isfinite(loss), f"no loss is a number; go on with {s.run} and a smaller --lr")
    run.seconds += seconds  # of training, in all runs together
    record = {"step": run.step, "minutes": run.seconds / 60, "loss": loss}
    run.log.append(record | {"skipped": values.isnan().sum().item()})
    text = f"{run.step / s.steps:4.0%}  step {run.step}  loss {loss:.4f}  {speed * s.batch:.0f}"
    show(f"{text} pictures/s  {(s.steps - run.step) / speed / 60:.0f} min left")


def preview(s, run, pictures):
    """Draw the same 16 pictures each time, and save what shows how far the network has come:

    previews/STEP.png, their film progress.gif, and reconstruction.png. Mean and spread of samples
    and data go to the log: dark or pale ones show there before the eye sees them.
    """
    x0 = [x0 for _, _, x0 in sample(run.ema.model, run.diffusion, 16)][-1]  # the last guesses
    with whole_file(Path(s.run, "previews", f"{run.step:06}.png")) as file:
        make_grid(x0).save(file, "PNG")
    frames = [Image.open(file) for file in sorted(Path(s.run).glob("previews/*.png"))[-100:]]
    save_film(frames, f"{s.run}/progress.gif", 200)
    data = as_floats(pictures[:: len(pictures) // 500 + 1]).to(x0.device)  # up to 500
    reconstruct(run.ema.model, run.diffusion, data[:1]).save(f"{s.run}/reconstruction.png")
    for name, x in (("sample", x0), ("data", data)):
        run.log[-1] |= {f"{name}_mean": x.mean().item(), f"{name}_std": x.std().item()}


def reconstruct(model, diffusion, x0):
    """What the network makes of a picture x0 (1, 3, H, W), the more of it is drowned in noise.

    A sheet of three rows, each with x0 in front: x_t at 1, 3, 5, 7 and 9 tenths of T; the network's
    guess x̂₀ at one look; and the picture at the end of the whole way back from there.
    """
    noisy, guesses, ends = [x0], [x0], [x0]  # the three rows
    for t in (diffusion.timesteps * tenths // 10 for tenths in (1, 3, 5, 7, 9)):
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t)).to(x0.device)
        noisy.append(diffusion.q_sample(x0, torch.tensor([t]).to(x0.device), eps))
        way = [guess for _, _, guess in sample(model, diffusion, 1, start=(t, noisy[-1]))]
        guesses.append(way[0])  # one look
        ends.append(way[-1])  # all looks
    return make_grid(torch.cat(noisy + guesses + ends), columns=6)


# ---- Sample ------------------------------------------------------------------------------------
# The other command. The checkpoint knows its network, so nothing has to be said twice. Each PNG
# says in its text how it was made.


def draw_samples(s):
    """Draw pictures as the settings `s` say (sample's options, by name). Returns the exit code."""
    usual = "run/checkpoint.pt", f"{Path(__file__).parent}/samples/catdiffusion.pt"  # in this order
    s.checkpoint = s.checkpoint or next(filter(os.path.exists, usual), usual[0])
    model, diffusion, step = load_checkpoint(s.checkpoint, pick_device(s.device))
    calls = s.steps or {"dpm": 25, "ddim": 50}.get(s.sampler, 1000)
    judge = make_judge() if s.best_of > 1 else None  # first: it may not be there
    training = find_pictures([s.nearest]) if s.nearest else None
    show(f"drawing with {s.checkpoint}, step {step}")
    is_folder = s.out.endswith("/") or Path(s.out).is_dir()
    stem = f"{s.out}/cat-{s.seed}" if is_folder else f"{s.out}-{s.seed}"

    def write(x, numbers):
        for image, number in zip(to_images(x), numbers):
            about = vars(s) | {"step": step, "calls": calls, "number": number}
            save_new(image, Path(f"{stem}-{number:04}.png"), about)

    drawn, frames, begun = [], [], time.perf_counter()  # frames: of the GIF
    numbers = range(s.first, s.first + s.n * s.best_of)  # of all pictures to draw
    for some in (numbers[i : i + s.batch] for i in range(0, len(numbers), s.batch)):
        chain = sample(model, diffusion, len(some), s.sampler, calls, s.seed, some[0])
        for k, (_, x_t, x0) in enumerate(chain, 1):
            show(f"pictures {some[0]} to {some[-1]}, call {k} of {calls}", passing=True)
            if s.gif and some[0] == s.first and (k % math.ceil(calls / 50) == 0 or k == calls):
                frames.append(make_grid(torch.cat([x_t, x0], 3)))  # noisy, and the guess
        drawn.append(x0.cpu())
        if not judge:  # nobody chooses: write them at once
            write(x0, some)
    drawn = torch.cat(drawn)
    if judge:
        chances = torch.cat([judge(part / 2 + 0.5) for part in drawn.split(64)])
        best = chances[:, 281:286].sum(1).topk(s.n).indices  # ImageNet's cats
        drawn = drawn[best]
        write(drawn, [numbers[i] for i in best])
    save_new(make_grid(drawn[:400]), Path(f"{stem}-grid.png"), vars(s))  # a sheet of up to 400
    if training:
        save_new(beside_nearest(drawn[:400], training), Path(f"{stem}-nearest.png"), vars(s))
    if frames:
        save_film(frames, f"{stem}.gif")
    show(f"{s.n} pictures in {time.perf_counter() - begun:.1f} s; the latest {stem}*")
    return 0


def make_judge():
    """A function: pictures (B, 3, H, W) in [0, 1] -> what they show, chances of 1000 classes.

    The judge is torchvision's MobileNetV3 (Howard et al. 2019, arXiv:1905.02244), trained on
    ImageNet. Its weights (22 MB) are downloaded once. Raises Failure if they cannot be.
    """
    from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large

    weights = MobileNet_V3_Large_Weights.IMAGENET1K_V2
    try:
        network = mobilenet_v3_large(weights=weights)
    except Exception as e:  # no network, half a file, another file
        raise Failure(f"--best-of: no classifier from {weights.url} ({e})") from None
    judge = nn.Sequential(weights.transforms(), network, nn.Softmax(1))
    return judge.eval().requires_grad_(False)


def beside_nearest(x, paths):
    """A sheet of pairs: each picture of x (M, 3, H, W), and the nearest of those in the files.

    Has the network learned cats, or these by heart? The distance is Euclid's, over all pixels, from
    x or from its mirror image, for training shows both.
    """
    size, both = x.shape[-1], torch.cat([x, x.flip(3)]).flatten(1)  # (2M, 3·H·W)
    raw = bytearray().join(decode_pictures(paths, size))
    pictures = torch.frombuffer(raw, dtype=torch.uint8).view(-1, size, size, 3)
    far = [torch.cdist(both, as_floats(part).flatten(1)) for part in pictures.split(500)]
    nearest = torch.cat(far, 1).view(2, len(x), -1).amin(0).argmin(1)  # (M,)
    return make_grid(torch.cat([x, as_floats(pictures[nearest])], 3))


# ---- Command line ------------------------------------------------------------------------------
# Two commands, one line an option. A checkpoint stores train's options; so `sample` knows which
# network to build. Bad input gets one line and exit code 2; a bug of ours shows its traceback.


class Failure(argparse.ArgumentTypeError):
    """Something the user can mend: argparse or main() prints it in one line."""


def require(holds, message):
    """Raise Failure if something does not hold."""
    if not holds:
        raise Failure(message)


def within(least, most=math.inf):
    """A type for argparse: a number like `least`, int or float, from there to `most`."""

    def number(text):
        value = type(least)(text)  # a ValueError is told by argparse
        require(least <= value <= most, f"{text} is not from {least} to {most}")
        return value

    return number


def parser():
    """The command line, as argparse wants it."""
    # Without its usage, an error is one line.
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "usage": argparse.SUPPRESS}
    top = argparse.ArgumentParser("catdiffusion.py", description=__doc__.split("\n")[0], **how)
    commands = top.add_subparsers(dest="command", required=True, prog="catdiffusion.py")

    add = commands.add_parser("train", help="learn from pictures", **how).add_argument
    # the run
    add("--data", nargs="*", help="folders of pictures, searched recursively; None: drawn cats")
    add("--run", default="run", help="folder for the checkpoint, previews and log")
    add("--steps", type=within(0), default=0, help="of training; 0: 50000, drawn cats 2000")
    add("--every", type=within(0.0), default=5.0, help="minutes from preview to preview")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--seed", type=within(0), default=0, help="start of all randomness: same seed, same run")
    # the network, see UNet
    add("--size", type=within(0), default=0, help="side of the pictures; 0: 64, drawn cats 32")
    add("--channels", type=within(8), default=32, help="maps at full size, a multiple of 4")
    add("--mults", type=within(1), nargs="*", help="of channels; None: 1 2 4 4 for 64 px")
    add("--blocks", type=within(1), default=1, help="residual blocks at each resolution")
    add("--attention", type=within(1), nargs="*", help="sides of maps that get it; None: 16")
    add("--dropout", type=within(0.0, 0.9), default=0.0, help="0.1 when pictures are few")
    # the recipe
    add("--batch", type=within(1), default=16, help="pictures a step; 64 and more on a GPU")
    add("--accum", type=within(1), default=1, help="cut a batch in parts, to save memory")
    add("--lr", type=within(0.0), default=2e-3, help="learning rate; less if channels are many")
    add("--ema", type=within(0.0, 1.0), default=0.9999, help="decay of the average of the weights")
    add("--schedule", choices=("linear", "cosine"), default="cosine", help="of the noise")
    add("--prediction", choices=("eps", "v"), default="v", help="what the network is asked for")
    add("--uniform", type=within(0.0, 1.0), default=0.25, help="share of t drawn uniformly")

    add = commands.add_parser("sample", help="draw with what was learned", **how).add_argument
    add("--checkpoint", default="", help="empty: run/checkpoint.pt, or the cats that come along")
    add("-n", type=within(1), default=8, help="how many pictures")
    add("--seed", type=within(0), default=0, help="another seed, other cats")
    add("--first", type=within(0), default=0, help="number of the first picture of that seed")
    add("--out", default="samples/cat", help="start of the files' names, or a folder")
    add("--gif", action="store_true", help="animate the denoising of the first batch")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--batch", type=within(1), default=16, help="pictures at once")
    # how they are drawn
    add("--sampler", choices=("dpm", "ddim", "ddpm", "ddpm-large"), default="dpm", help="the way")
    add("--steps", type=within(0, 1000), default=0, help="calls; 0: dpm 25, ddim 50, else 1000")
    add("--best-of", type=within(1), default=1, help="draw more, keep what a classifier likes")
    add("--nearest", default="", help="training pictures: show the nearest beside each sample")
    return top


def complete(s):
    """train's settings with what was left to us filled in. Raises Failure if they do not fit."""
    s.data = [os.path.normpath(folder) for folder in s.data or []]  # ./cats and cats are the same
    s.size = s.size or (64 if s.data else 32)  # px
    s.steps = s.steps or (50_000 if s.data else 2_000)  # many hours; some minutes
    # One more floor for each doubling of the size: the lowest maps have 8 to 15 px (4 at 32).
    s.mults = s.mults or [1] * max(0, s.size.bit_length() - 7) + [1, 2, 4, 4]
    # Attention at the largest map of at most 16 px: 16 for 32, 64, 128 and 256 px, 12 for 96 px.
    sides = [s.size >> floor for floor in range(len(s.mults))]  # 64, 32, 16, 8
    s.attention = s.attention or [side for side in sides if side <= 16][:1]
    require(s.size % 2 ** (len(sides) - 1) == 0, f"--size {s.size}: cannot be halved that often")
    require(set(s.attention) <= set(sides), f"--attention: the maps have only the sides {sides}")
    require(s.channels % 4 == 0, f"--channels {s.channels}: must be a multiple of 4")
    return s


def main(argv=None):
    """Run the command line `argv` (without the program's name). Returns the exit code."""
    try:
        s = parser().parse_args(argv)
        command = vars(s).pop("command")  # the rest are settings
        return train(complete(s)) if command == "train" else draw_samples(s)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (Failure, OSError) as e:  # OSError: the disk is full, the folder may not be written, ...
        message, code = e, 2
    except RuntimeError as e:
        if not re.search("out of memory|not enough memory|can't allocate memory", str(e)):  # a bug
            raise
        message, code = "out of memory: train with more --accum, sample with less --batch", 2
    print("catdiffusion:", " ".join(f"{message}".split())[:300], file=sys.stderr)
    return code


def show(text, passing=False):
    """A line for the user; a passing one only in a terminal, where the next is written over it."""
    if RANK == 0 and (sys.stdout.isatty() or not passing):  # one process speaks for all
        with contextlib.suppress(OSError, ValueError):  # no terminal, odd names: the work goes on
            print(f"{text:79}", end="\r" if passing else "\n", flush=True)


# ==== THE MACHINE ROOM ==========================================================================

# ---- Where to compute --------------------------------------------------------------------------
# A TPU if there is one, else a GPU, else the processor. To bring in another accelerator, look at
# `pick_device`, `autocast`, and the kind of Adam in `prepare`; if it compiles, as TPUs do, also at
# what else asks for "xla".
#
# Many processes: `torchrun --nproc-per-node=4 -- catdiffusion.py train ...` starts this file four
# times and gives each its number, RANK. Each has the whole network and does its part of every
# batch, and DistributedDataParallel averages their gradients, so that all take the same step.
# Number 0 alone decodes, saves and prints.

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes
RANK = int(os.environ.get("RANK", 0))  # which of them this is


def pick_device(name="auto"):
    """Turn `--device` into a torch.device. Raises Failure if the machine has no such thing."""
    # torch_xla is imported only where a TPU is likely: merely having it installed changes nothing.
    # PJRT_DEVICE=CPU with --device tpu walks the whole TPU path without one; that is how we test.
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    pjrt = os.environ.get("PJRT_DEVICE", "TPU" if chips else "none")
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group()  # NCCL between GPUs, else gloo
    try:
        if name == "tpu" or (name == "auto" and pjrt == "TPU"):
            with contextlib.suppress(ImportError):
                import torch_xla.runtime

                torch_xla.runtime.use_spmd()  # all cores of the host as one device: see over_cores
                if torch_xla.runtime.device_type() == pjrt:
                    return torch_xla.device()
        if name == "auto":
            name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        if str(name) == "cuda":
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return torch.zeros(1, device=name).device
    except (OSError, RuntimeError, AssertionError) as e:
        raise Failure(f"--device {name}: not on this machine ({e}); try another") from None


def autocast(device):
    """Matrix products in bf16 where the chip has them (about twice as fast), fp32 elsewhere.

    bf16, a float of 16 bits, has the range of fp32, so nothing overflows; fp16 has not, which is
    where the black pictures in many issue trackers come from. Weights and formulas stay in fp32.
    """
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    fast = {"cpu": cpu, "cuda": cuda, "xpu": True, "xla": True}.get(device.type, False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def end_of_step(device):
    """A TPU only notes operations down; this is where it runs them, as one compiled program."""
    if device.type == "xla":
        sys.modules["torch_xla"].sync()


def over_cores(*batch):
    """The tensors of a batch; on a TPU, cut into one part for each core of the host.

    torch_xla's compiler does the rest: every core works on its part, and gradients are summed.
    """
    if batch[0].device.type == "xla":
        from torch_xla.distributed import spmd

        for tensor in batch:
            axes = "batch", *[None] * (tensor.dim() - 1)
            spmd.mark_sharding(tensor, spmd.get_1d_mesh("batch"), axes)
    return batch


def upsample(x):
    """Twice the side by repeating each pixel, (B, C, H, W) -> (B, C, 2H, 2W)."""
    if x.device.type != "xla":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    b, c, h, w = x.shape  # in torch_xla, interpolate's gradient may fall back to the CPU
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


def seed_from(*parts):
    """A seed that is a function of `parts`, say (seed, step)."""
    return random.Random(repr(parts)).getrandbits(32)


def set_seed(device, *parts):
    """Make all randomness from here on a function of `parts`."""
    torch.manual_seed(seed_from(*parts))
    if device.type == "xla":
        sys.modules["torch_xla"].manual_seed(seed_from(*parts))


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place; they wait for each other here."""
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(tensor)  # blocks until all are here
    return tensor


@contextlib.contextmanager
def note_signals():
    """Inside, Ctrl-C, SIGTERM and a closed terminal do not kill: their number goes into a list."""
    noted = []  # empty: nobody has asked to stop
    with contextlib.ExitStack() as afterwards:
        for number in {1, 2, 15} & signal.valid_signals():  # SIGHUP, SIGINT, SIGTERM
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                old = signal.signal(number, lambda number, _: noted.append(number))
                afterwards.callback(signal.signal, number, old)
        yield noted  # and afterwards all is as it was


# ---- Files -------------------------------------------------------------------------------------
# A file that matters is written beside the old one, forced to the disk, and only then given its
# name: whatever stops us on the way, a whole one is there. Loading allows tensors and plain values
# only (weights_only), so a checkpoint from a stranger cannot run code.


@contextlib.contextmanager
def whole_file(path):
    """Open a file to write. It takes the place of `path` only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # beside it
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # on the disk, not only in the system's memory
    os.replace(part, path)  # all or nothing


def save_new(image, path, about, k=1):
    """Write a PNG, with `about` as JSON in its text; beside another picture of that name."""
    name = path if k == 1 else path.with_stem(f"{path.stem}-{k}")
    if name.exists() and Image.open(name).tobytes() != image.tobytes():
        return save_new(image, path, about, k + 1)
    text = PngImagePlugin.PngInfo()  # PNG's own place for words
    text.add_text("catdiffusion", json.dumps(about))
    with whole_file(name) as file:
        image.save(file, "PNG", pnginfo=text)


def build(s, device):
    """The network and the diffusion that the settings `s` describe, on `device`."""
    model = UNet(s.size, s.channels, s.mults, s.blocks, s.attention, s.dropout)
    diffusion = Diffusion(schedule=s.schedule, prediction=s.prediction)
    # Channels last in memory: convolutions are fastest so.
    return model.to(device, memory_format=torch.channels_last), diffusion.to(device)


def save_checkpoint(s, run):
    """Write all there is to a run to its checkpoint.pt, all or nothing, and its log beside it."""
    state = {"settings": vars(s), "step": run.step, "seconds": run.seconds, "log": run.log}
    parts = {"model": run.model, "ema": run.ema.model, "optimizer": run.optimizer}
    buffer = io.BytesIO()  # torch, writing to a full disk itself, may end the whole process
    torch.save(state | {name: part.state_dict() for name, part in parts.items()}, buffer)
    with whole_file(Path(s.run, "checkpoint.pt")) as file:
        file.write(buffer.getbuffer())
    Path(s.run, "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.log))


@contextlib.contextmanager
def open_checkpoint(path):
    """What save_checkpoint wrote, on the CPU. Failure if it, or what is done with it, fails."""
    require(path.exists(), f"{path}: no such checkpoint; make one: python catdiffusion.py train")
    try:
        yield read_folder(path) if path.is_dir() else torch.load(path, "cpu", weights_only=True)
    except Failure:
        raise
    except Exception as e:  # a damaged file can raise anything
        raise Failure(f"{path}: damaged, or not a checkpoint of this program ({e!r})") from None


def load_checkpoint(path, device="cpu"):
    """A trained network, ready for sample(): model with the averaged weights, diffusion, step.

    path: a file that train wrote, or a folder in the layout of diffusers.
    """
    with open_checkpoint(Path(path)) as saved:
        model, diffusion = build(argparse.Namespace(**saved["settings"]), "cpu")
        model.load_state_dict(saved["ema"])
    return model.to(device).eval().requires_grad_(False), diffusion.to(device), saved["step"]


# The paper's own networks (google/ddpm-ema-cat-256 and its family) live on in another layout: a
# folder with config.json and the weights, under the names of Hugging Face's diffusers.
THEIR_WORDS = {
    "time_embedding.linear_1": "time.0", "time_embedding.linear_2": "time.2", "to_out.0": "out",
    "conv_norm_out": "norm_out", "time_emb_proj": "time", "conv_shortcut": "shortcut", "to_q": "q",
    "group_norm": "norm", "to_k": "k", "to_v": "v", "query": "q", "key": "k", "value": "v",
    "proj_attn": "out", "samplers.0.conv": "samplers.0", "mid_block": "middle_blocks.0",
}  # fmt: skip
THEIR_CONFIG = {  # what makes a UNet2DModel the paper's network
    "_class_name": "UNet2DModel", "act_fn": "silu", "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None, "norm_num_groups": 32,
}  # fmt: skip


def our_name(name, blocks):
    """A weight's name in diffusers -> its name in our UNet with that many blocks a floor."""

    def ours(found):
        way, floor, kind, i = found.groups()
        layers = {"down": blocks + 1, "middle": 0, "up": blocks + 2}[way]  # of ours, on each floor
        place = int(floor) * layers + (layers - 1 if kind.endswith("samplers") else int(i))
        return f"{way}.{place}" + ".attention" * (kind == "attentions")

    for theirs, word in THEIR_WORDS.items():
        name = name.replace(theirs, word)
    return re.sub(r"(down|middle|up)_blocks\.(\d+)\.(\w+)\.(\d+)", ours, name)


def read_safetensors(path):
    """The tensors in a .safetensors file: the length of a JSON header, the header, raw numbers."""
    raw, tensors = bytearray(path.read_bytes()), {}  # all of the file
    start = 8 + int.from_bytes(raw[:8], "little")  # where the numbers begin
    for name, about in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in about["data_offsets"])
            flat = torch.frombuffer(raw[first:last], dtype=torch.float32)
            tensors[name] = flat.view(about["shape"])
    return tensors


def read_folder(folder):
    """What save_checkpoint writes, from a folder in the layout of diffusers' UNet2DModel."""
    c = json.loads((folder / "config.json").read_text())  # sizes and kinds of layers
    widths, kinds, blocks = c["block_out_channels"], c["down_block_types"], c["layers_per_block"]
    foreign = {key for key, value in THEIR_CONFIG.items() if c[key] != value}
    foreign |= set(kinds) - {"DownBlock2D", "AttnDownBlock2D"}  # blocks that we do not have
    require(not foreign and min(widths) > 127, f"{folder}: not the paper's network, {foreign}")
    s = {"size": c["sample_size"], "channels": widths[0], "blocks": blocks, "dropout": 0.0}
    s |= {"mults": [width // widths[0] for width in widths], "schedule": "linear"}
    s |= {"attention": [s["size"] >> i for i, kind in enumerate(kinds) if kind[0] == "A"]}
    file = folder / "diffusion_pytorch_model.safetensors"  # or, in old folders, .bin
    old = file.with_suffix(".bin")
    weights = read_safetensors(file) if file.exists() else torch.load(old, "cpu", weights_only=True)
    weights = {our_name(name, blocks): value for name, value in weights.items()}
    return {"settings": s | {"prediction": "eps"}, "ema": weights, "step": 0}


# ---- Sheets ------------------------------------------------------------------------------------
# From tensors to something to look at. All of it is Pillow.


def to_images(x):
    """Pictures (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    x = ((x.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.frombytes("RGB", x.shape[2:0:-1], bytes(p.flatten().tolist())) for p in x]


def make_grid(x, columns=None, gap=2):
    """Pictures (B, 3, H, W) in [-1, 1] -> one PIL image of them all, row by row, about square."""
    columns, (h, w) = columns or math.ceil(len(x) ** 0.5), (side + gap for side in x.shape[2:])
    rows = math.ceil(len(x) / columns)  # the last may be short
    sheet = Image.new("RGB", (columns * w + gap, rows * h + gap), "white")  # the gaps shine through
    for i, image in enumerate(to_images(x)):
        sheet.paste(image, (gap + i % columns * w, gap + i // columns * h))
    return sheet


def save_film(frames, path, milliseconds=80):
    """PIL images -> a GIF that rests on the last."""
    times = [milliseconds] * (len(frames) - 1) + [3000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


# ---- A faster group norm -----------------------------------------------------------------------
# torch's gradient of group normalisation is slow on the CPU for channels-last memory. With ours a
# training step of the default network at 64 px is 1.3 times as fast. It is here for that alone.


class GroupNorm(nn.GroupNorm):
    """torch's own, except on the CPU."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        return CPUGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class CPUGroupNorm(torch.autograd.Function):
    """With x̂ = (x − mean)·rstd, n numbers in a group, y = w·x̂ + b has gradients

        ∂x = rstd·(w·∂y − Σ(w·∂y)/n − x̂·Σ(w·∂y·x̂)/n),    ∂w = Σ ∂y·x̂,    ∂b = Σ ∂y

    with Σ over the group, for ∂w and ∂b over the map. So ∂x is c₁·∂y + c₂·x + c₃: few passes.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        b, c, h, w = x.shape  # in channels-last memory
        ordered = x if h * w >= 1024 else x.contiguous()  # on small maps torch is slow here, too
        y, mean, rstd = torch.native_group_norm(ordered, weight, bias, b, c, h * w, groups, eps)
        mean, rstd = (v.float().view(b, groups, 1) for v in (mean, rstd))
        ctx.save_for_backward(x, weight.view(groups, -1), mean, rstd)
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        n, shape = x[0].numel() / len(weight), (len(x), *weight.shape)  # B, groups, C / groups
        # The sums over pixels: along each row in x's own type, then over the rows in fp32.
        columns = (v.permute(0, 2, 3, 1).sum(2) for v in (dy, dy * x))
        db, dw = (v.sum(1, dtype=torch.float32).view(shape) for v in columns)  # Σ ∂y, Σ ∂y·x
        dw = (dw - mean * db) * rstd  # Σ ∂y·x̂
        c1 = rstd * weight  # c₁, c₂, c₃: (B, groups, C / groups)
        c2 = -rstd * rstd * (weight * dw).sum(2, keepdim=True) / n
        c3 = -rstd * (weight * db).sum(2, keepdim=True) / n - c2 * mean
        c1, c2, c3 = (v.expand(shape).reshape(*x.shape[:2], 1, 1).to(x.dtype) for v in (c1, c2, c3))
        dx = torch.addcmul(c3, x, c2).addcmul_(dy, c1)  # c₁·∂y + c₂·x + c₃
        return dx, dw.sum(0).flatten(), db.sum(0).flatten(), None, None


if __name__ == "__main__":
    sys.exit(main())
