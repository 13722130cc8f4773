"""catdiffusion: learn to draw cats by learning to remove noise. One file, to read and to use.

Take a photo of a cat and add a little Gaussian noise. Add a little more, a thousand times over,
and nothing of the cat is left: the end is pure noise, whatever the photo was. Each of these small
steps could be undone if we knew which noise is in the picture. We do not, but a network can learn
to predict it. To make a new cat we start from pure noise and undo the thousand steps one after the
other. That is all of it: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models"
(arXiv:2006.11239), called "the paper" from here on.

    python catdiffusion.py train                    # no photos? it draws simple cats, learns those
    python catdiffusion.py train --data ./cats      # your photos; Ctrl-C stops, rerun to resume
    python catdiffusion.py sample -n 8              # eight new cats in samples/

The file has four parts. Parts 1 and 2 are the lesson; you may stop reading where they end.

    1  The paper           Noise, learning, sampling, network, averaging: a whole diffusion model.
    2  Since the paper     Six main departures: what was wrong with the paper's choice, what we
                           do instead, what it brought, and the option that goes back.
    3  The program         Pictures. Train. Sample. Command line.
    4  The machine room    TPU, GPU, CPU, many at once. Files. The paper's own networks. Sheets.

The notation is the paper's, with two changes: our t starts at 0 and not at 1, and our σ_t is
noise/signal (the paper's is the spread of one reverse step).

    x0           x₀          a clean picture, (B, 3, H, W), values in [-1, 1]; x_t at t = 0 has a
                             little noise already, x0 has none
    x0_hat       x̂₀          an estimate of it
    eps          ε           Gaussian noise, mean 0, variance 1, shaped like x0
    t            t           the noise level, (B,), integers: 0 is almost clean, T-1 = 999 is noise
    x_t          x_t         the noisy picture at level t
    betas        β_t         the variance of the noise that one step adds
    abar         ᾱ_t         alphas_cumprod, the product of all (1 − β) up to t
    signal_rate  √ᾱ_t        how much of x0 is in x_t
    noise_rate   √(1−ᾱ_t)    how much of eps is in x_t
    sigma        σ_t         noise_rate / signal_rate
"""

import argparse
import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision import utils
from torchvision.transforms import functional as TF

COLOURS = "RGB"  # of all pictures, in Pillow's words; "L" is grey
TIMESTEPS = 1000  # T, how many noise levels there are

# ==== PART 1: THE PAPER =========================================================================

# ---- Noise -------------------------------------------------------------------------------------
# Going from picture to noise needs no learning. One step of it is
# x_t = √(1−β_t)·x_{t−1} + √β_t·ε_t  (Eq. 2; before t = 0 comes x₀): the picture shrinks a little,
# and a little noise is added. The shrinking keeps the variance from growing beyond 1. Sums of
# Gaussians are Gaussian, so many steps are one jump:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε  (Eq. 4), where ε
# is all noise so far. How β_t grows with t is called the schedule. With the paper's, the two
# factors (their squares sum to 1) are, at five levels:
#
#     t                       0       250     500     750     999
#     signal_rate √ᾱ_t        1.000   0.722   0.279   0.057   0.006
#     noise_rate √(1−ᾱ_t)     0.010   0.692   0.960   0.998   1.000
#
# Pictures have values from -1 to 1: centred at 0, as the noise is, and of similar size. With values
# from 0 to 1 the contrast would be half as large, and each level would hide more than intended.
#
# We know how x_t follows from x_{t−1}. We want the reverse. From x_t alone, Bayes' rule needs the
# distribution of all pictures. If we also know x₀, there is a formula, `q_posterior` below (q is
# the paper's letter for noising). We do not know x₀, but the network predicts the noise, and that
# gives an estimate of the picture, by Eq. 4.
#
# One pixel in numbers, at t = 500:  x₀ = 0.8 and ε = -1.2 give
# x_t = 0.2789·0.8 + 0.9603·(-1.2) = -0.9292. If we know ε, we can recover x₀:
# (-0.9292 + 0.9603·1.2) / 0.2789 = 0.8. If we know x₀, we can take one step back, to t = 499: there
# the formula gives mean 0.00306·0.8 + 0.99410·(-0.92924) = -0.9213, standard deviation 0.1003.
#
# The network is trained on squared error, and the best answer to that is a mean. So its estimate
# x̂₀ is the mean of all pictures that x_t could have come from, the likelier ones counting more:
# sharp when there is little noise, a blur when there is much. That is why one guess is not enough,
# and we go in many steps.


def linear_schedule(timesteps=TIMESTEPS):
    """β_t for each level, (T,): from almost no noise a step to 2 % a step (Section 4)."""
    return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)


def at(table, t):
    """table[t], shaped to multiply pictures: (T,), (B,) -> (B, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


class Noise(nn.Module):
    """The noise levels, and all formulas that need no network. t is (B,), pictures (B, 3, H, W).

    betas: (T,), float64, from a schedule; the tables are float64, too. This is a module without
    weights, so that `.float().to(device)` converts and moves the tables.
    """

    def __init__(self, betas):
        super().__init__()
        self.timesteps = len(betas)
        self.alphas_cumprod = nn.Buffer(torch.cumprod(1 - betas, 0))  # ᾱ_t = Π (1 − β_s)
        self.signal_rate = nn.Buffer(self.alphas_cumprod.sqrt())
        self.noise_rate = nn.Buffer((1 - self.alphas_cumprod).sqrt())
        self.sigma = nn.Buffer(self.noise_rate / self.signal_rate)

    def q_sample(self, x0, t, eps):
        """Jump straight to noise level t:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε   (Eq. 4)"""
        return at(self.signal_rate, t) * x0 + at(self.noise_rate, t) * eps

    def q_posterior(self, x0, x_t, t, t_next):
        """Given x₀ and x_t, the picture at a lower level t_next is Gaussian (Eq. 6 and 7), with

            mean = √ᾱ'·β/(1−ᾱ)·x₀ + √(1−β)·(1−ᾱ')/(1−ᾱ)·x_t,    variance = β·(1−ᾱ')/(1−ᾱ)

        ᾱ' is ᾱ at t_next. β = 1 − ᾱ/ᾱ' is the variance of the noise added between the two levels:
        in the paper t_next is t − 1, and this is β_t. Except near t = 0, the mean is then mostly
        x_t. Why these weights? x₀ alone puts the picture at √ᾱ'·x₀, with variance 1−ᾱ'. x_t alone
        puts it at x_t/√(1−β), with variance β/(1−β). The mean averages both, weighted by
        1/variance.
        """
        abar = at(self.alphas_cumprod, t)
        abar_next = at(self.alphas_cumprod, t_next)
        beta = 1 - abar / abar_next
        weight_x0 = abar_next.sqrt() * beta / (1 - abar)
        weight_x_t = (1 - beta).sqrt() * (1 - abar_next) / (1 - abar)
        variance = beta * (1 - abar_next) / (1 - abar)
        return weight_x0 * x0 + weight_x_t * x_t, variance


# ---- Learning ----------------------------------------------------------------------------------
# Algorithm 1 of the paper. Again and again: take pictures x₀ from the data, a noise level t for
# each (all are equally likely), and noise ε. Make x_t. Let the network predict ε from x_t and t.
# Then take a step down the gradient of the squared error. The optimizer is Adam, with torch's usual
# settings and a learning rate of 2e-4.
#
# Why is the noise the target, when we want the picture? By Eq. 4, either one gives the other. If
# the picture is wrong by d, then the noise is wrong by d·√ᾱ_t/√(1−ᾱ_t). So the squared error of the
# noise is that of the picture times ᾱ_t/(1−ᾱ_t), which is 9999 at t = 0 and 0.084 at t = 500.
# The loss on ε gives more weight to low noise than a loss on x₀, and less than the loss that theory
# asks for (Eq. 12). It gave the paper its best pictures.


class Diffusion(Noise):
    """The formulas that have a network in them: model(x_t, t, *cond) -> prediction, like x_t.

    cond: what else the network should know, say a label; ours needs nothing.
    """

    def target(self, x0, t, eps):
        """What the network should predict: the noise."""
        return eps

    def to_x0(self, prediction, x_t, t):
        """Eq. 4 solved for the picture:  x̂₀ = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t   (Eq. 15)"""
        return (x_t - at(self.noise_rate, t) * prediction) / at(self.signal_rate, t)

    def loss(self, model, x0, t, eps, *cond):
        """Mean squared error, here (ε − ε_θ(x_t, t))², where ε_θ is the network (Eq. 14)"""
        prediction = model(self.q_sample(x0, t, eps), t, *cond)
        return F.mse_loss(prediction, self.target(x0, t, eps))

    def denoise(self, model, x_t, t, *cond):
        """One call of the network: x_t -> x0_hat, clipped to [-1, 1], where all pictures are."""
        return self.to_x0(model(x_t, t, *cond), x_t, t).clamp(-1, 1)


def train_step(model, diffusion, optimizer, batch, accum=1):
    """One training step, a round of Algorithm 1. Returns the loss; it stays on the device.

    batch: x0 (B, 3, H, W), t (B,), eps like x0, and what else `model` takes. accum: cut the batch
    into that many equal parts, run one after the other, to save memory. The gradient is the same.
    """
    total = 0.0
    chunks = [tensor.chunk(accum) for tensor in batch]  # of x0, of t, of eps
    for part in zip(*chunks):  # x0, t, eps of a smaller batch
        loss = diffusion.loss(model, *part) / accum
        loss.backward()  # adds to the gradient of the parts before
        total = total + loss.detach()  # the number alone, without its history
    # A gradient longer than 1 is scaled down to 1, so that one odd batch cannot do much harm.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


# The loss falls quickly at first, and then it looks flat for hours while the pictures get better.
# Even a perfect network keeps a loss, as one x_t can come from several pictures. The smallest
# example needs no network: two pictures of one pixel, +1 with chance 3/4 and -1 with chance 1/4.
# Given x_t, each counts by its chance times the density of x_t, which by Eq. 4 is
# exp(−(x_t ∓ √ᾱ)²/(2(1−ᾱ))), up to a factor. Multiply the square out: the parts x_t² and ᾱ are the
# same for both and cancel. There remain 3e^a and e^−a, with a = x_t·√ᾱ/(1−ᾱ). So the mean is
#
#     x̂₀ = (3e^a − e^−a) / (3e^a + e^−a) = tanh(a + ½·ln 3)
#
# and the best possible loss on ε, the mean over many x_t, is 0.04 at t = 100, 0.38 at t = 250, 0.06
# at t = 500. At low noise the picture gives the noise away. At high noise x_t is nearly the noise.
# In between it is hard.


# ---- Sampling ----------------------------------------------------------------------------------
# Now backwards, from noise to cat. At each step the network looks at x_t and says which clean
# picture x̂₀ it sees in there; at first that is a grey blur, the mean of all cats. We do not jump
# there. We go to the next lower noise level and look again: this x_t favours some cats over others,
# and the estimate grows sharper.
#
# The step treats x̂₀ as the truth and picks at random from the Gaussian of Eq. 6 and 7. Is that
# allowed, if x̂₀ is only a mean? Each possible x₀ has its own Gaussian. Its centre (the mean of
# Eq. 7) is a number times x₀, plus a part without x₀. So the mean of the centres is the centre for
# x̂₀. In a small step the centres nearly coincide, and one Gaussian is enough: hence a thousand
# steps. The centre alone has too little noise for the next level. Without fresh noise, this step
# would make pictures that are too smooth.
#
# The paper writes the same step with the predicted ε. Put Eq. 15 into Eq. 7, and you get the
# update in its Algorithm 2. We go through x̂₀ because it can be clipped: at t = 999 an error of
# 0.01 in ε becomes 1.6 in the picture, and unclipped errors pile up to glaring colours.
#
# The paper tried two variances: that of Eq. 7, and β_t, which is a little larger. In a thousand
# steps it makes no difference. In few steps β leaves too much noise, so we use Eq. 7.
#
# You can check all this without a network: put the formula for the two pictures in its place. Then
# every sampler in this file ends at +1 for three quarters of all seeds (test_catdiffusion.py).


@torch.no_grad()
def ddpm_sample(model, diffusion, x_t, fresh_noise, *cond):
    """Algorithm 2. Yields (level, x_t, x0_hat) after each network call.

    x_t: pure noise, (B, 3, H, W). fresh_noise(): Gaussian noise of that shape. level: t as a plain
    number: T-1, T-2, ..., 0. The last x0_hat is the result.
    """
    for level in reversed(range(diffusion.timesteps)):
        t = torch.full((len(x_t),), level).to(x_t.device)
        x0_hat = diffusion.denoise(model, x_t, t, *cond)
        yield level, x_t, x0_hat
        if level == 0:
            break  # below is no noise: ᾱ' = 1, so the mean of Eq. 7 is x̂₀ and the variance is 0
        mean, variance = diffusion.q_posterior(x0_hat, x_t, t, t - 1)
        x_t = mean + variance.sqrt() * fresh_noise()


# ---- Network -----------------------------------------------------------------------------------
# The paper's U-Net. A picture goes down a staircase of resolutions, each half the one before, and
# up again. On the way up, every floor also gets what it made on the way down: the skips. So the
# bottom decides where the cat is, and the top still knows each hair. Inside, a picture has many
# channels, each called a map. With the default numbers for 64 px (channels x height x width):
#
#     noisy picture  3 x 64 x 64                                  prediction  3 x 64 x 64
#           ↓                                                          ↑
#      32 x 64 x 64   ------------------- skips ------------------>  32 x 64 x 64
#      64 x 32 x 32   ------------------- skips ------------------>  64 x 32 x 32
#     128 x 16 x 16   --------- skips, attention on both --------->  128 x 16 x 16
#     128 x  8 x  8   ------------------- skips ------------------>  128 x  8 x  8
#           ↓                                                          ↑
#           '----->  middle: block, attention, block  ----------------'
#
# One network serves all noise levels. Whether a speck is fur or noise depends on how much noise
# there must be, so every block (two convolutions, and a shortcut that adds the input to the result)
# is told t, which the paper calls the time. Ours has fewer channels than the paper's. Built with
# the paper's numbers and given its weights, it computes what the paper's network computes.


def time_embedding(t, channels):
    """Levels as waves of different lengths (Vaswani et al. 2017): (B,) -> (B, channels).

    A network reads one number up to 999 badly. It reads many numbers in [-1, 1] well: slow waves
    tell distant levels apart, fast waves neighbours.
    """
    exponents = torch.linspace(0, 1, channels // 2, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # slower and slower
    return torch.cat([angles.sin(), angles.cos()], 1)


def init(layer, gain=1.0):
    """The paper's initialisation, which torch calls xavier. gain: 0 for the last layer of a branch
    and of the network: at first a block returns its shortcut, and the network 0. Returns the layer.
    """
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)
    return layer


def norm(channels):
    """Group normalisation: each group of channels to mean 0 and variance 1 (Wu & He 2018).

    At most 32 groups, as in the paper, and of at least 4 channels: a group of one would lose the
    mean of its map, and with it the brightness.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Every pixel sees every other: how the left eye learns the colour of the right one.

    Single-head self-attention; for small sides, as its cost grows with the side's fourth power.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q = init(nn.Linear(channels, channels))  # what a pixel asks for
        self.k = init(nn.Linear(channels, channels))  # what it has
        self.v = init(nn.Linear(channels, channels))  # what it passes on
        self.out = init(nn.Linear(channels, channels), gain=0.0)

    def forward(self, x):  # (B, C, H, W) -> the same
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): pixels as a list
        scores = self.q(y) @ self.k(y).transpose(1, 2)  # who looks at whom
        scores = scores / x.shape[1] ** 0.5  # else they would grow with the number of channels
        y = self.out(scores.softmax(-1) @ self.v(y))  # each pixel gets a mixture of all values
        return x + y.transpose(1, 2).reshape(x.shape)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut around them; t comes in between; attention if asked."""

    def __init__(self, c_in, c_out, c_time, dropout=0.0, attention=False):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = init(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.time = init(nn.Linear(c_time, c_out))  # one number to add to each map
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)  # drops features: less is learned by heart
        self.conv2 = init(nn.Conv2d(c_out, c_out, 3, padding=1), gain=0.0)
        self.shortcut = nn.Identity() if c_in == c_out else init(nn.Conv2d(c_in, c_out, 1))
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):  # (B, c_in, H, W), (B, c_time) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]  # the same at every pixel
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Downsample(nn.Conv2d):
    """Half the side. Pads right and bottom only, as the paper's code does. No use for t here."""

    def forward(self, x, emb):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: repeat each pixel, then convolve. (Transposed convolutions leave a grid.)"""

    def forward(self, x, emb):
        # (F.interpolate would be one call, but a TPU hands its gradient to the CPU.)
        return super().forward(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class UNet(nn.Module):
    """forward(x, t): noisy pictures (B, 3, size, size), t (B,) -> prediction, like x, in fp32.

    size: side of the pictures. channels: feature maps at full size; mults: multiples of that at
    size, size/2, size/4, ...; blocks: residual blocks a floor (one more on the way up);
    attention: at which sides; the middle always has it.
    The paper's for 32 px: UNet(32, 128, (1, 2, 2, 2), 2, (16,), 0.1), 35,746,307 parameters.
    """

    def __init__(self, size, channels, mults, blocks, attention, dropout=0.0):
        super().__init__()
        self.size = size
        self.channels = channels
        c_time = 4 * channels
        self.time = nn.Sequential(
            init(nn.Linear(channels, c_time)), nn.SiLU(), init(nn.Linear(c_time, c_time))
        )
        self.conv_in = init(nn.Conv2d(len(COLOURS), channels, 3, padding=1))
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        c = channels
        c_skips = [c]  # the channels of each skip
        for floor, mult in enumerate(mults):
            attend = (size // 2**floor) in attention
            for _ in range(blocks):
                self.down.append(ResBlock(c, channels * mult, c_time, dropout, attend))
                c = channels * mult
                c_skips.append(c)
            if floor < len(mults) - 1:
                self.down.append(init(Downsample(c, c, 3, stride=2)))
                c_skips.append(c)
        first = ResBlock(c, c, c_time, dropout, attention=True)
        self.middle = nn.ModuleList([first, ResBlock(c, c, c_time, dropout)])
        for floor, mult in reversed(list(enumerate(mults))):
            attend = (size // 2**floor) in attention
            for _ in range(blocks + 1):  # as many skips were left on this floor
                c_in = c + c_skips.pop()  # what comes from below, and the skip beside it
                self.up.append(ResBlock(c_in, channels * mult, c_time, dropout, attend))
                c = channels * mult
            if floor > 0:
                self.up.append(init(Upsample(c, c, 3, padding=1)))
        self.norm_out = norm(c)
        self.conv_out = init(nn.Conv2d(c, len(COLOURS), 3, padding=1), gain=0.0)

    def forward(self, x, t):
        with autocast(x.device):  # products in 16 bits where the chip has them: see part 4
            emb = self.time(time_embedding(t, self.channels))  # (B, 4·channels)
            x = self.conv_in(x)  # (B, channels, size, size)
            skips = [x]  # what the way up will see again
            for layer in self.down:
                x = layer(x, emb)
                skips.append(x)
            for layer in self.middle:
                x = layer(x, emb)
            for layer in self.up:
                if isinstance(layer, ResBlock):
                    x = torch.cat([x, skips.pop()], 1)  # in reverse order
                x = layer(x, emb)
            return self.conv_out(F.silu(self.norm_out(x))).float()


# ---- Averaging ---------------------------------------------------------------------------------
# The weights jitter from batch to batch, and with them the colours of all cats. A running average
# of the weights makes much better samples. It is only used to sample: the run that makes it never
# trains it. The paper's decay of 0.9999 remembers some 10,000 steps. In a short run that is mostly
# the random start: sampling from such an average gives noise, which looks like a bug in the
# sampler. So the memory of ours grows with the run: after n steps it is n/19 steps long, and
# reaches the paper's 10,000 at step 190,000.


class EMA:
    """Exponential moving average of a network's parameters; `.model` is the averaged network."""

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model, n):
        """average ← d·average + (1−d)·weights, with d = min(decay, (1+n)/(20+n)); n = 0, 1, ..."""
        decay = min(self.decay, (1 + n) / (20 + n))
        share = torch.tensor(1 - decay).to(next(model.parameters()).device)  # see part 4
        for mean, new in zip(self.model.parameters(), model.parameters()):
            mean.lerp_(new.detach(), share)


# All of part 1 together:
#
#     diffusion = Diffusion(linear_schedule()).float()
#     model = UNet(64, 32, (1, 2, 4, 4), 1, (16,))
#     ema = EMA(model, 0.9999)
#     optimizer = torch.optim.Adam(model.parameters(), 2e-4)
#     for n in range(800_000):
#         batch = x0, torch.randint(1000, (len(x0),)), torch.randn_like(x0)  # x0: some pictures
#         train_step(model, diffusion, optimizer, batch)
#         ema.update(model, n)
#     noise = lambda: torch.randn(8, 3, 64, 64)
#     for level, x_t, x0_hat in ddpm_sample(ema.model, diffusion, noise(), noise):
#         pass  # the last x0_hat is eight new cats


# ==== PART 2: SINCE THE PAPER ===================================================================

# Six main departures; each ends with a measurement and the option that goes back. (Smaller ones are
# in `EMA`, `get_batch` and `learning_rate`.) The two that act while sampling are judged by eye. For
# the other four we train twice for 500 steps on drawn cats: with all four departures, then without
# this one. The measurement is the squared error of x̂₀ on other drawn cats (one seed; a plain grey
# picture scores 0.217). We compare at equal σ, as the same t means different noise in each
# schedule.

# ---- A gentler schedule ------------------------------------------------------------------------
# The paper's schedule leaves ᾱ = 0.003 at t = 750. In a small picture only the overall brightness
# is still visible then, and the last quarter of the levels teaches little. In the cosine schedule
# ᾱ falls like cos²: at t = 500 there is as much picture as noise, 0.7 of each. Error at σ = 1:
# 0.0111, with the linear schedule 0.0202. Back to the paper: `train --schedule linear`.


def cosine_schedule(timesteps=TIMESTEPS):
    """β_t for each level, (T,): ᾱ is a cos² (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    cos2 = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # ᾱ, up to a factor
    betas = 1 - cos2[1:] / cos2[:-1]
    return betas.clamp(max=0.999)  # the last would be 1, and ᾱ 0


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


# ---- A better prediction -----------------------------------------------------------------------
# Near pure noise, ε is too easy to predict, as it is nearly the input. And Eq. 15 then divides by
# √ᾱ_t, which is almost 0, so a small error in ε becomes a large one in the picture. Predicting x₀
# is too easy at the other end, where x₀ is nearly the input. So our network predicts a mixture of
# both, v (Salimans & Ho 2022, arXiv:2202.00512, appendix D):
#
#     v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀        and back:  x₀ = √ᾱ_t·x_t − √(1−ᾱ_t)·v
#
# With little noise v is nearly ε, with much it is nearly −x₀: always what the input does not show.
# Recovering x₀ from v needs no division. Why the name? The squares of √ᾱ_t and √(1−ᾱ_t) sum to 1,
# so they are the cosine and the sine of an angle. As this angle grows with t, x_t moves on a
# quarter of a circle from x₀ to ε, and v is its velocity. Error at σ = 10, where there is little to
# see: 0.13, with ε 0.30, worse than plain grey. Back to the paper: `train --prediction eps`.


class VDiffusion(Diffusion):
    """Diffusion with a network that predicts v. The formulas stand above."""

    def target(self, x0, t, eps):
        return at(self.signal_rate, t) * eps - at(self.noise_rate, t) * x0

    def to_x0(self, prediction, x_t, t):
        return at(self.signal_rate, t) * x_t - at(self.noise_rate, t) * prediction


PREDICTIONS = {"v": VDiffusion, "eps": Diffusion}


# ---- Which noise levels to learn ---------------------------------------------------------------
# The paper learns all levels equally often. But low noise hides only the grain, and high noise
# leaves only the colours. So we take only a quarter of the t uniformly, for both ends, and the rest
# with probability proportional to sin(πt/T): mostly from the middle, where the shape of the cat is
# decided (the idea is that of Esser et al. 2024, arXiv:2403.03206, with another curve). Error at
# σ = 1: 0.0111, with uniform t 0.0138. At σ = 0.1 it costs: 0.0013, with uniform t 0.0011. Back to
# the paper: `train --levels uniform`.


def uniform_levels(u, timesteps=TIMESTEPS):
    """Random u in [0, 1] (made by get_batch) -> levels t, both (B,). All t are equally likely."""
    return (u * timesteps).long().clamp(max=timesteps - 1)


def middle_levels(u, timesteps=TIMESTEPS, uniform=0.25):
    """The same, but mostly from the middle. uniform: this share of them stays uniform."""
    rest = ((u - uniform) / (1 - uniform)).clamp(min=0)  # from 0 to 1, as u goes to 1
    middle = torch.acos(1 - 2 * rest) / math.pi  # inverts the integral of sin
    fraction = torch.where(u < uniform, u / uniform, middle)  # of T
    return (fraction * timesteps).long().clamp(max=timesteps - 1)


LEVELS = {"middle": middle_levels, "uniform": uniform_levels}


# ---- Fewer steps -------------------------------------------------------------------------------
# The paper's sampler takes a thousand steps, with a network call in each. We make do with 25 calls,
# and choose three things. First, the levels of these calls. Most programs take every 40th t. Ours
# begin at T-1, where all is noise. The rest are evenly spaced in log σ, from about 130 to 0.01: σ
# falls by the same factor each time (compare Karras et al. 2022, arXiv:2206.00364).
#
# The other two choices are switches. Their four settings are four samplers; `dpm-sde` is our
# default:
#
#                           the latest estimate    extrapolated from the last two
#     no fresh noise        ddim                   dpm      (DPM-Solver++ 2M)
#     fresh noise           ddpm                   dpm-sde  (SDE-DPM-Solver++ 2M)
#
# *Fresh noise or none.* DDIM (arXiv:2010.02502) adds none: it works out which noise is in x_t, and
# mixes as much of it with x̂₀ as the lower level has. So only the start is random. Each picture
# follows one smooth path from noise to cat, and large steps can follow a smooth path. But nothing
# corrects an early mistake of the network. Fresh noise covers it, and later steps decide anew.
#
# *The latest estimate or an extrapolated one.* x̂₀ changes during a step. A step that uses only
# its value at the start lags behind. Plotted against log σ, each pixel of x̂₀ moves on nearly a
# straight line. We extend the line through the last two estimates to the middle of the step, where
# x̂₀ has about its average value. `dpm-sde` goes only 0.8 of that way.
#
# We judged 128 pictures of each row in two rounds, not knowing the row: has it a fault that a child
# would see, or is it believable as a photo? Many are neither. A cell has the percent of round 1 and
# of round 2; chance moves them by 2 to 4. (The weights that come along, samples/catdiffusion.pt,
# not guided; each row starts from the same noise. Contrast: the spread of the pixels in a picture,
# divided by that in the data.)
#
#                                 a fault    believable    contrast
#     ddim, 25 calls               8, 9       27, 27        0.82
#     ddpm, 25 calls               2, 3       52, 49        0.73
#     dpm, 25 calls               15, 17      20, 19        0.95
#     dpm-sde, 25 calls            5, 5       46, 39        0.90
#     the same, 1.0 of the way     8, 10      37, 35        0.96
#     ddpm, 1,000 calls           11, 15      36, 35        0.93
#
# In 25 calls, fresh noise means fewer faults. `ddpm` is judged best there. But its large steps take
# the mean x̂₀ for the truth, so its cats are soft and pale, even with guidance (the next section).
# Extrapolation, or a thousand calls, bring detail and contrast, and with the detail the network's
# mistakes. We go 0.8 of the way; guidance brings the contrast that is missing then. Back to the
# paper: `sample --sampler ddpm --guidance 1`.


# All steps take the same arguments. x0_hat may be extrapolated. `denoise(x_t, t)` is for steps that
# call the network again, such as Heun's (an exercise in README.md).


def ddpm_step(diffusion, x0_hat, x_t, t, t_next, fresh_noise, denoise):
    """The paper's step, over any distance: take x0_hat for the truth, pick from Eq. 6 at random."""
    mean, variance = diffusion.q_posterior(x0_hat, x_t, t, t_next)
    return mean + variance.sqrt() * fresh_noise()


def ddim_step(diffusion, x0_hat, x_t, t, t_next, fresh_noise, denoise):
    """x_t is x0_hat and some ε, mixed by Eq. 4. Mix them anew (Song et al. 2021, DDIM, Eq. 12)."""
    # Not the ε of the network: x0_hat was clipped or extrapolated, and both must add up to x_t.
    eps = (x_t - at(diffusion.signal_rate, t) * x0_hat) / at(diffusion.noise_rate, t)
    return diffusion.q_sample(x0_hat, t_next, eps)


def look_ahead(diffusion, x0_hat, x0_hat_prev, t_prev, t, t_next):
    """How far x0_hat moves to the middle of the coming step (Lu et al. 2022, arXiv:2211.01095)."""
    log_sigma = diffusion.sigma.log()
    width_prev = at(log_sigma, t) - at(log_sigma, t_prev)  # of the step before; negative: σ falls
    width = at(log_sigma, t_next) - at(log_sigma, t)  # of the coming one
    slope = (x0_hat - x0_hat_prev) / width_prev
    return slope * width / 2


# The two switches, and the default number of calls. extrapolate: how much of look_ahead to add.
Sampler = namedtuple("Sampler", "step extrapolate calls")
SAMPLERS = {
    "dpm-sde": Sampler(ddpm_step, 0.8, 25),
    "dpm": Sampler(ddim_step, 1.0, 25),
    "ddim": Sampler(ddim_step, 0.0, 50),
    "ddpm": Sampler(ddpm_step, 0.0, TIMESTEPS),
}


def noise_levels(diffusion, calls):
    """The levels of `calls` network calls: T-1, then evenly spaced in log σ, all different."""
    log_sigma = diffusion.sigma.log().cpu()
    levels = [diffusion.timesteps - 1]
    wanted = torch.linspace(math.log(200), math.log(0.01), calls)  # the first is T-1 instead
    for k in range(1, calls):
        t = (log_sigma - wanted[k]).abs().argmin().item()
        t = min(t, levels[-1] - 1)  # below the one before,
        t = max(t, calls - 1 - k)  # with room for those to come
        levels.append(t)
    return levels


@torch.no_grad()
def sample_at(levels, model, diffusion, sampler, x_t, fresh_noise, *cond):
    """As `ddpm_sample`, but at these levels, with the steps of that Sampler.

    With all T levels and `ddpm` it is the same.
    """

    def denoise(x_t, t):
        return diffusion.denoise(model, x_t, t, *cond)

    x0_hat_prev, t_prev = None, None
    for level, level_next in zip(levels, [*levels[1:], None]):
        t = torch.full((len(x_t),), level).to(x_t.device)
        x0_hat = denoise(x_t, t)
        yield level, x_t, x0_hat
        if level_next is None:
            break  # the last x0_hat is the result
        t_next = torch.full((len(x_t),), level_next).to(x_t.device)
        ahead = x0_hat
        if x0_hat_prev is not None:
            move = look_ahead(diffusion, x0_hat, x0_hat_prev, t_prev, t, t_next)
            ahead = x0_hat + sampler.extrapolate * move
        x_t = sampler.step(diffusion, ahead, x_t, t, t_next, fresh_noise, denoise)
        x0_hat_prev, t_prev = x0_hat, t


# ---- Guidance ----------------------------------------------------------------------------------
# Many samples still do not convince. x̂₀ is a mean over all pictures that the network thinks
# possible, and where it has learned too little, broken cats are among them. Early in training there
# were more. So the way from the early prediction to the present one leads to better cats, and we go
# more than twice as far:
#
#     prediction = early + w·(present − early),    w = 2.3
#
# (x̂₀ is mixed in the same way, as to_x0 is linear.) This is autoguidance (Karras et al. 2024,
# arXiv:2406.02507). The early network must make the same mistakes, but larger ones. `train` keeps
# the averaged weights of training step 1,000, or of an eighth of the run if that is later. Earlier
# ones differ in the colours, too: with those of step 126, drawn cats came out glaring. (Those in
# samples/catdiffusion.pt, judged below, are older than this rule: of step 700 of 8,542.)
#
# We guide only for σ from 5 to 0.5 (compare Kynkäänniemi et al. 2024, arXiv:2404.07724). Above 5
# guidance exaggerates the colours; below 0.5 we saw no difference. So six of the 25 calls need both
# networks, which makes 31.
#
# We judged 480 pictures of each row as before (`dpm-sde`; three seeds, one is the last table's):
#
#                   a fault    believable    contrast
#     not guided     8, 8       40, 39        0.89
#     guided         4, 4       52, 50        1.00
#
# Half the faults, and the contrast of photos. Back to the paper: `sample --guidance 1`.


class Guided(nn.Module):
    """A network, led away from what it was early in training. Called like a UNet.

    Its prediction is early + w·(present − early), made of the predictions of both (Karras et al.
    2024, section 4). w is `guidance` for σ from 0.5 to 5. Elsewhere it is 1: no call of `early`.
    """

    def __init__(self, model, early, diffusion, guidance=2.3):
        super().__init__()
        self.model = model
        self.early = early
        self.size = model.size
        where = (diffusion.sigma > 0.5) & (diffusion.sigma < 5)
        self.w = nn.Buffer(torch.where(where, guidance, 1.0))  # for each level, (T,)

    def forward(self, x, t, *cond):
        present = self.model(x, t, *cond)
        w = at(self.w, t)
        if (w == 1).all():
            return present
        early = self.early(x, t, *cond)
        return early + w * (present - early)


# ---- An optimizer for matrices -----------------------------------------------------------------
# Adam gives each weight a step of its own size. But a layer is a matrix, and so is its gradient.
# Any matrix is a rotation (or a reflection), then a stretch along each axis, then another rotation;
# the stretches are its singular values. In a gradient, and in Adam's step, a few are large: Adam
# learns mostly in a few directions. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)
# keeps the rotations and makes every stretch about 1: all directions are learned at the same speed.
# The last layer, biases and norms stay with Adam (Jordan leaves the first layer to Adam, too).
# Error at σ = 1: 0.0111; with Adam 0.0160 at the same rate of 2e-3, 0.0295 at the paper's 2e-4.
# Back to the paper: `train --optimizer adam` (also 2e-4, but falling: see `learning_rate`).


class Muon(torch.optim.Adam):
    """Adam, except for matrices: those take steps that are equally long in all directions.

    Matrices: weights of linear layers and of convolutions (a row for each output channel), except
    model.conv_out, the last layer. Of Adam they need only the running mean of each gradient.
    """

    def __init__(self, model, **how):
        super().__init__(model.parameters(), betas=(0.95, 0.999), **how)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        layers.remove(model.conv_out)
        self.stacks = {}  # shape -> matrices; a stack is worked on at once: fewer calls
        for p in [m.weight for m in layers if m.weight.requires_grad]:
            self.stacks.setdefault(p.flatten(1).shape, []).append(p)

    @torch.no_grad()
    def step(self):
        before = {p: p.clone() for stack in self.stacks.values() for p in stack}
        super().step()  # moves the matrices, too: we put them back, and take our own step
        for shape, stack in self.stacks.items():
            # Adam's mean of the last 20 gradients or so, with a little more of the latest.
            means = [p.grad.lerp(self.state[p]["exp_avg"], 0.95).flatten(1) for p in stack]
            scale = 0.2 * max(shape) ** 0.5  # makes a step about as long as Adam's
            rate = self.param_groups[0]["lr"] * scale
            for p, direction in zip(stack, orthogonal(torch.stack(means))):
                p.copy_(before[p] - rate * direction.view_as(p))


def orthogonal(m):
    """Matrices, (N, rows, columns), with their singular values s made about 1.

    Each round turns s into 3.4445·s − 4.775·s³ + 2.0315·s⁵ (Jordan's numbers): it lifts small ones
    fast and keeps large ones near 1. In the end all but the tiniest are from 0.7 to 1.2. No s need
    be known: m·mᵀ·m has the values s³.
    """
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)  # √Σs²: now no s is above 1
    one = torch.eye(m.shape[1], device=m.device)
    with autocast(m.device):
        for _ in range(5):
            square = m @ m.mT
            m = (3.4445 * one - 4.775 * square + 2.0315 * square @ square) @ m
    return m


def adam(model, **how):
    """The paper's."""
    return torch.optim.Adam(model.parameters(), **how)


OPTIMIZERS = {"muon": Muon, "adam": adam}


# ==== PART 3: THE PROGRAM =======================================================================

# ---- Pictures ----------------------------------------------------------------------------------
# Pictures come in all shapes and states. We find them, cut out a square (never squash one: a
# squashed cat teaches squashed cats), shrink it, and write all to one file of plain bytes in the
# run's folder: at 64 px, 12 KB a picture. Decoding happens once, in threads. From then on that file
# is mapped into memory, where the system keeps what is in use: a million pictures need no more than
# a thousand. A batch is one indexing operation, and no worker process is ever needed. (Helpers such
# as show stand at the end of part 3; RANK, hash_of, write_whole and others in part 4.)

FORMATS = "JPEG PNG WEBP BMP GIF TIFF AVIF".split()
SUFFIXES = [end for end, kind in Image.registered_extensions().items() if kind in FORMATS]
Image.MAX_IMAGE_PIXELS = 300_000_000  # more than any phone takes; twice as many are an error


def load_pictures(folders, size, run):
    """Every picture below `folders`, or drawn cats: uint8 (N, 3, size, size)."""
    if not folders:
        cats = (draw_cat(random.Random(i), size) for i in range(2000))
        return torch.stack([TF.pil_to_tensor(cat) for cat in cats])
    paths = find_pictures(folders)
    files = [Path(f"{path}{end}") for path in paths for end in ("", ".cat")]
    stats = [(f"{f}", f.stat().st_size, f.stat().st_mtime_ns) for f in files if os.path.exists(f)]
    # The cache's name changes with the files, the size and the code that reads a file.
    code = inspect.getsource(read_picture), inspect.getsource(as_seen)
    cache = Path(run, f"pictures-{hash_of(stats, size, COLOURS, code):08x}.u8")
    if RANK == 0 and not cache.exists():  # one process decodes for all,
        listing = Path(run, "skipped.txt")
        for old in [listing, *Path(run).glob("pictures-*.u8*")]:
            old.unlink(missing_ok=True)
        decoded = decode_pictures(paths, size, listing)
        write_whole(cache, (picture.contiguous().numpy() for picture in decoded))
    while not cache.exists():  # and the others wait
        time.sleep(1)
    size_in_bytes = cache.stat().st_size
    flat = torch.from_file(f"{cache}", shared=True, size=size_in_bytes, dtype=torch.uint8)
    return flat.view(-1, len(COLOURS), size, size)


def find_pictures(folders):
    """All picture files below `folders`, each real file once. Other files are counted."""
    seen = set()
    files = [path for folder in folders for path in walk(Path(folder), seen)]
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    kinds = Counter(path.suffix.lower() or "nameless" for path in files)
    others = [f"{n} {kind}" for kind, n in kinds.items() if kind not in [*SUFFIXES, ".cat"]]
    if others:
        show(f"passed over: {', '.join(others)} files (convert pictures among them to JPEG)")
    require(found, f"{' '.join(map(str, folders))}: no {' '.join(SUFFIXES)} file in there")
    return found


def walk(path, seen):
    """Yield the files at and below `path`, but no hidden ones, and none twice: `seen` grows."""
    real = os.path.realpath(path)  # Path.resolve raises where a link points to itself
    if real in seen or os.path.exists(f"{path}/checkpoint.pt"):
        return  # a link led back here; or it is a run, and previews are nothing to learn from
    seen.add(real)
    if path.is_file():
        yield path
    for inside in sorted(path.glob("[!.]*")):  # macOS leaves ._cat.jpg beside cat.jpg
        yield from walk(inside, seen)


def decode_pictures(paths, size, listing):
    """Yield each picture, uint8 (3, size, size). Damaged files are skipped and listed."""
    skipped = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), 100):  # not all at once: they may be a million
            show(f"decoding pictures, {first} of {len(paths)}", passing=True)
            some = paths[first : first + 100]
            jobs = [pool.submit(read_picture, path, size) for path in some]
            for path, job in zip(some, jobs):
                error = job.exception()  # a damaged file can make a decoder raise anything
                if getattr(error, "errno", None) not in (None, 22):  # 22: a bad offset in the file
                    raise Failure(f"{path}: {error}")  # the drive's fault, not the picture's
                if error:
                    skipped.append(f"{path}: {error!r}")
                else:
                    yield job.result()
    require(len(skipped) < len(paths), f"none of {len(paths)} could be read, as {skipped[:1]}")
    if skipped:
        listing.write_text("\n".join(skipped), errors="replace")
        examples = "\n  ".join(skipped[:3])
        show(f"{len(skipped)} of {len(paths)} pictures skipped, listed in {listing}:\n  {examples}")


def read_picture(path, size):
    """One file -> uint8 (3, size, size), upright, white behind it. Raises what is wrong with it.

    Beside each picture the CAT dataset (Zhang, Sun, Tang 2008) has a file that marks the eyes, the
    mouth and three points on each ear, as "9 x1 y1 ... x9 y9": then we take the face alone.
    """
    with Image.open(path, formats=FORMATS) as image:  # whatever the suffix says
        comment = f"{image.info.get('comment')}"  # a GIF's
        ours = "catdiffusion" in image.info or "catdiffusion" in comment
        require(not ours, "made by this program")
        if image.mode[0] == "I":  # grey of 16 bits
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        if os.path.exists(f"{path}.cat"):
            nine, *points = map(int, Path(f"{path}.cat").read_text().split())
            xs, ys = points[0::2], points[1::2]  # in pixels of the picture
            w, h = max(xs) - min(xs), max(ys) - min(ys)  # of the face
            require(nine == 9 and len(points) == 18 and min(w, h) > 8, f"{path}.cat marks no face")
            side = min(1.25 * max(w, h), *image.size)  # a little more than the points, but inside
            left = min(max((min(xs) + max(xs) - side) / 2, 0), image.width - side)
            top = (min(ys) + max(ys) - side) / 2 + 0.1 * h  # room for a chin
            top = min(max(top, 0), image.height - side)
            image = image.crop((left, top, left + side, top + side))
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time; but
        # below three times what we need, its fur would come out blurred, or with a false grain.
        image.draft(None, [math.ceil(3 * length * size / min(image.size)) for length in image.size])
        image = as_seen(image).convert("RGBA")
        image = ImageOps.fit(image, (size, size), Image.LANCZOS)  # the middle square, shrunk
        white = Image.new("RGBA", (size, size), "white")  # shows where the picture is transparent
        return TF.pil_to_tensor(Image.alpha_composite(white, image).convert(COLOURS))


def as_seen(image):
    """The PIL image as viewers show it, upright and in sRGB. What they cannot read is ignored."""
    with contextlib.suppress(Exception):  # a broken EXIF: raised only after the turn
        ImageOps.exif_transpose(image, in_place=True)
    with contextlib.suppress(Exception):  # no colour profile, or a broken one
        profile = io.BytesIO(image.info["icc_profile"])
        srgb = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        image = ImageCms.profileToProfile(image, profile, srgb, outputMode=mode)
    return image


def draw_cat(rng, size):
    """A cat of our own, for those who have no pictures: random.Random -> PIL image, size x size."""
    furs = (235, 150, 70), (90, 90, 100), (240, 225, 205), (60, 45, 40), (160, 120, 85)
    fur = tuple(value + rng.randint(-15, 15) for value in rng.choice(furs))
    iris = rng.choice(("#78be46", "#e6b432", "#5aa0dc", "#3caa8c"))
    wall = tuple(rng.randint(60, 230) for _ in range(3))
    image = Image.new("RGB", (128, 128), wall)
    pen = ImageDraw.Draw(image)
    x, y = rng.randint(56, 72), rng.randint(62, 74)
    tip, lid = rng.randint(44, 58), rng.randint(6, 10)  # of the ears, of the eyes
    pen.ellipse((x - 42, y + 22, x + 42, y + 120), fur)  # body
    for ear in (-1, 1):
        pen.polygon([(x + 37 * ear, y), (x + 33 * ear, y - tip), (x + 6 * ear, y - 30)], fur)
    pen.ellipse((x - 42, y - 36, x + 42, y + 36), fur)  # head
    for eye in (x - 17, x + 17):
        pen.ellipse((eye - 9, y - 4 - lid, eye + 9, y - 4 + lid), iris)
        pen.ellipse((eye - 3, y - 4 - lid, eye + 3, y - 4 + lid), (15, 15, 15))
    pen.polygon([(x - 5, y + 11), (x + 5, y + 11), (x, y + 17)], (225, 140, 150))  # nose
    image = image.resize((size, size), Image.LANCZOS)  # drawn large, then shrunk: smooth edges
    return image.convert(COLOURS)


# ---- Train -------------------------------------------------------------------------------------
# The loop is what Algorithm 1 says: a batch, a training step, and the average on top. A batch
# follows from the step's number, so the `State` is all that must be kept. One file holds it, and a
# stopped run resumes as if it had never stopped.


def get_batch(pictures, step, n, seed, choose_t, device):
    """A batch x0, t, eps for `train_step`, all of it from (seed, step) alone.

    So a run that was stopped and resumed sees the same as one that never stopped. pictures: uint8
    (N, 3, H, W). n: how many to take. choose_t: a function from LEVELS.
    """
    set_seed(device, seed, step)
    index = torch.randint(len(pictures), (n,))
    mirrored = torch.rand(n) < 0.5
    # The t of a batch are spread evenly, from one random number: each t is as likely as before, but
    # no batch is all noise (Kingma et al. 2021, arXiv:2107.00630).
    t = choose_t((torch.rand(1) + torch.arange(n)) / n)
    eps = torch.randn(n, *pictures.shape[1:], device=device)  # made where it is used
    mine = slice(RANK, None, WORLD_SIZE)  # of several processes, each takes its share
    x0 = as_floats(pictures[index[mine]].to(device))
    x0 = torch.where(mirrored[mine].to(device)[:, None, None, None], x0.flip(3), x0)
    set_seed(device, seed, step, RANK)  # from here on, for dropout
    return over_cores([x0, t[mine].to(device), eps[mine]])


def as_floats(pictures):
    """uint8 pictures (N, 3, H, W) as the network sees them: in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def train(args, pictures=None):
    """Train; resume if the run has a checkpoint. Returns the State. Raises Failure, OSError.

    args: from settings(). pictures: uint8 (N, 3, size, size), instead of args.data. Give them a
    `run` of their own, and resume it only from Python: the command line would go on with drawn
    cats. (`settings`, without data, chooses size, lr and steps for drawn cats: for photos say
    size=64, lr=1e-3, steps=50_000.)
    """
    device = pick_device(args.device)
    if pictures is not None:
        shape = len(COLOURS), args.size, args.size
        good = pictures.dtype == torch.uint8 and pictures.shape[1:] == shape
        require(good, f"pictures must be uint8, (N, {shape}): say settings(size=...)")
    else:
        pictures = load_pictures(args.data, args.size, args.run)
    Path(args.run, "previews").mkdir(parents=True, exist_ok=True)
    set_seed(device, args.seed)  # the same network each time
    state = State(args, device)
    few = " (few: see --init in README.md)" if len(pictures) < 1000 and not args.init else ""
    show(f"{len(pictures)} pictures of {args.size} px{few}; on {device}; previews go to {args.run}")
    age = 1000 if args.init else 0  # of the average: it does not soon forget good weights
    model = over_processes(state.model, args.accum)
    next_preview = state.since + 60 * min(1, args.every)  # the first after a minute
    choose_t = LEVELS[args.levels]
    with stop_requests() as asked:  # a training step is always finished
        while state.step < args.steps and not asked():
            batch = get_batch(pictures, state.step, args.batch, args.seed, choose_t, device)
            rate = learning_rate(state.step, args.steps, args.lr)
            state.optimizer.param_groups[0]["lr"] = torch.tensor(rate).to(device)
            loss = train_step(model, state.diffusion, state.optimizer, batch, args.accum)
            state.ema.update(state.model, state.step + age)
            state.step += 1
            if (state.step <= 1000 or state.step == args.steps // 8) and not args.init:
                # The last copy stays (see Guidance). Up to step 1,000 nothing is guided. With
                # --init it is the other run's: guidance then leads towards the new photos, too.
                state.early.load_state_dict(state.ema.model.state_dict())
            end_of_step(device)
            due = state.step == args.steps or time.perf_counter() >= next_preview
            state.report(args, loss, due)
            if due:
                if RANK == 0:
                    try:
                        state.save(args)
                    except OSError as e:  # a full disk, say; it may have room by the next time
                        show(f"step {state.step}: {e}")
                    preview(state, args, pictures)
                state.since = time.perf_counter()  # previews do not count
                next_preview = state.since + 60 * args.every
        if RANK == 0:
            state.save(args)  # after a stop; and now a full disk is an error
    if WORLD_SIZE > 1:
        del model  # the wrapper first: as the last to hold the group, it would wait for ever
        torch.distributed.destroy_process_group()  # else its threads may abort as we leave
    way_on = "rerun to resume" if state.step < args.steps else "more: --steps; anew: --run"
    show(f"saved at step {state.step} of {args.steps} ({way_on}). Now sample:")
    show(f'python catdiffusion.py sample -n 8 --checkpoint "{state.path}"')
    return state


def learning_rate(step, steps, peak):
    """Up in 200 steps, then `peak`; from step 1,000 on it falls as 1/√step, and in the last fifth
    to almost 0."""
    # NOTE the paper keeps its rate after a warm-up. Muon at a constant 2e-3 spoiled a network on
    # photos: its loss rose from 0.085 at step 1,300 to 0.096 at 9,000. In the last fifth the
    # network settles. Not exactly 0: a rate of 0 marks a skipped step.
    warm_up = (step + 1) / min(200, 0.4 * steps)  # a short run warms up in less
    slower = (1000 / (step + 1)) ** 0.5
    last_fifth = (steps - step) / (steps / 5)
    return peak * min(1, warm_up, slower) * min(1, last_fifth)


class State:
    """All that changes in a run, read from its folder if it is there; and the status line.

    The line knows only the clock and the losses of this process: others need not be asked.
    """

    def __init__(self, args, device):
        self.path = Path(args.run, "checkpoint.pt")
        resumed = self.path.exists()
        self.model, self.diffusion = build(args, device)
        self.early = copy.deepcopy(self.model).eval().requires_grad_(False)
        if args.init and not resumed:
            with open_checkpoint(args.init) as saved:
                self.model.load_state_dict(saved["ema"])
                self.early.load_state_dict(saved.get("early", saved["ema"]))
        self.ema = EMA(self.model, args.ema)
        self.guided = Guided(self.ema.model, self.early, self.diffusion)  # what is sampled with
        self.optimizer = build_optimizer(args.optimizer, self.model, device)
        self.parts = {"model": self.model, "ema": self.ema.model, "early": self.early}
        self.parts["optimizer"] = self.optimizer
        self.step = 0  # training steps made
        self.seconds = 0.0  # of training
        self.log = []  # a dict for each record
        self.losses = []  # since the last record; NaN if the step was skipped
        self.end = b""  # the checkpoint's last bytes: they tell whether it is still ours
        self.since = self.next_line = time.perf_counter()  # when this record began
        self.next_record = self.since + 10
        if resumed:
            self.load()

    def save(self, args):
        """Write it to one file, with the settings; all or nothing. Raises Failure, OSError."""
        data = {"settings": vars(args), "step": self.step, "seconds": self.seconds, "log": self.log}
        data |= {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()  # torch, writing to a full disk itself, may end the whole process
        torch.save(data, buffer)
        ours = end_of(self.path) in (self.end, b"")  # b"": no file. Else another was here
        path = self.path if ours else self.path.with_name(f"checkpoint-{os.getpid()}.pt")
        write_whole(path, [buffer.getbuffer()])
        require(ours, f"another training writes to {args.run}; this one is saved in {path}")
        self.end = end_of(path)

    def load(self):
        """Read it back. Raises Failure if the file is damaged."""
        self.end = end_of(self.path)
        with open_checkpoint(self.path) as saved:
            # Adam's averages come from the file, its options (fused, ...) from this device.
            saved["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.step = saved["step"]
            self.seconds = saved["seconds"]
            self.log = saved["log"]

    def report(self, args, loss, due):
        """Note the loss of a step. When it is time, show the line; every 30 s, or if due, log."""
        good = self.optimizer.param_groups[0]["lr"] > 0  # 0: see skip_broken_step
        self.losses.append(torch.where(good, loss, math.nan))  # stays on the device
        now = time.perf_counter()
        if now < self.next_line and not due:
            return
        self.next_line = now + 1  # at most once a second, as this waits for the device
        self.losses = [float(loss) for loss in self.losses]
        count = len(self.losses)
        skipped = sum(map(math.isnan, self.losses))
        stuck = count >= 50 and skipped == count
        require(not stuck, f"{count} steps in a row not finite: take a smaller --lr")
        mean_loss = torch.tensor(self.losses).nanmean().item()
        speed = count / (now - self.since)
        left = (args.steps - self.step) / speed / 60
        recorded = skipped < count and (due or now >= self.next_record)
        text = f"step {self.step} of {args.steps}, loss {mean_loss:.4f}"
        text += f", {speed * args.batch:.0f} pictures/s, {left:.0f} min left"
        show(text, passing=sys.stdout.isatty() or not recorded)  # without a terminal: the records
        if recorded:
            self.seconds += now - self.since
            record = {"step": self.step, "minutes": self.seconds / 60}
            self.log.append(record | {"loss": mean_loss, "skipped": skipped})
            self.losses = []
            self.since = now
            self.next_record = now + 30


def preview(state, args, pictures):
    """Show how far the network has come. Nothing that goes wrong here ends the run.

    previews/STEP.png: 16 samples, from the same noise each time. reconstruction.png, loss.png: see
    their functions (the first is not guided). log.jsonl: the log, a line for each record.
    """
    folder = Path(args.run)
    try:
        *_, (_, _, x0_hat) = sample(state.guided, state.diffusion, 16)
        make_sheet(x0_hat).save(folder / "previews" / f"{state.step:06}.png")
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, state.log)))
        x0 = as_floats(pictures[:1]).to(x0_hat.device)
        reconstruction(state.ema.model, state.diffusion, x0).save(folder / "reconstruction.png")
        loss_curve(state.log).save(folder / "loss.png")
    except Exception as e:
        show(f"no preview at step {state.step}: {e!r}")


def reconstruction(model, diffusion, x0):
    """What the network makes of a photo (1, 3, H, W) in more and more noise.

    Left the photo; then a column each for 1, 3, 5, 7 and 9 tenths of T. Row by row: x_t; x0_hat
    after one call; and the picture at the end of the whole way back from there.
    """
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
    columns = [torch.cat([x0, x0, x0])]
    for t in range(diffusion.timesteps // 10, diffusion.timesteps, diffusion.timesteps // 5):
        x_t = diffusion.q_sample(x0, torch.tensor([t]).to(x0.device), eps)
        way = [x0_hat for _, _, x0_hat in sample(model, diffusion, 1, start=(t, x_t))]
        columns.append(torch.cat([x_t, way[0], way[-1]]))
    return make_sheet(torch.stack(columns, 1).flatten(0, 1), len(columns))


def loss_curve(log):
    """The loss over the steps, on a logarithmic axis from 1 (top) to 0.01 (bottom)."""
    xs = [20 + 600 * record["step"] / log[-1]["step"] for record in log]
    ys = [20 - 180 * math.log10(record["loss"]) for record in log]
    image = Image.new("RGB", (640, 400), "white")
    pen = ImageDraw.Draw(image)
    for loss in (1, 0.3, 0.1, 0.03, 0.01):
        pen.text((2, 14 - 180 * math.log10(loss)), f"{loss}", "black")
    pen.text((540, 380), f"step {log[-1]['step']}", "black")  # at the right edge
    pen.line(list(zip(xs, ys)), "black", 2)
    return image


# ---- Sample ------------------------------------------------------------------------------------
# The other command. The checkpoint knows its network, so nothing has to be said twice. Each file
# that it writes says in its text how it was made.


def sample(
    model, diffusion, n=8, sampler="dpm-sde", steps=None, seed=0, first=0, start=None, cond=()
):
    """Make pictures first .. first+n-1 of `seed`; yields (level, x_t, x0_hat) once per call.

    x_t and x0_hat: (n, 3, size, size); the last x0_hat is the result. model: as a UNet, with a
    `size`. steps: calls of the network; None: the usual number. start: a (t, x_t) to begin with,
    not pure noise. cond: what else the model takes, on its device.
    """
    device = next(model.parameters()).device
    # Each picture has its own source of noise, and on the CPU: so it is the same picture, up to
    # rounding, on another device and in another batch.
    sources = [torch.Generator().manual_seed(hash_of(seed, i)) for i in range(first, first + n)]
    shape = len(COLOURS), model.size, model.size

    def fresh_noise():
        return torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)

    levels = noise_levels(diffusion, steps or SAMPLERS[sampler].calls)
    x_t = fresh_noise()
    if start:
        levels = [start[0], *(t for t in levels if t < start[0])]
        x_t = start[1]
    chain = sample_at(levels, model, diffusion, SAMPLERS[sampler], x_t, fresh_noise, *cond)
    for level, x_t, x0_hat in chain:
        end_of_step(device)  # for TPUs, see part 4
        yield level, x_t, x0_hat


def write_samples(args):
    """Make pictures as `args` say (sample's options), and their files. Each file stores `args`."""
    runs = filter(os.path.exists, ("run/checkpoint.pt", "run-drawn/checkpoint.pt"))
    shipped = Path(__file__).parent / "samples" / "catdiffusion.pt"
    args.checkpoint = args.checkpoint or str(max(runs, key=os.path.getmtime, default=shipped))
    args.steps = args.steps or SAMPLERS[args.sampler].calls
    device = pick_device(args.device)
    model, diffusion, args.trained_steps = load_checkpoint(args.checkpoint, device, args.guidance)
    training = find_pictures([args.nearest]) if args.nearest else None
    if not isinstance(model, Guided):
        args.guidance = 1.0  # without early weights there is none
    trained = f"trained for {args.trained_steps} steps"
    show(f"sampling with {args.checkpoint}, {trained}, guidance {args.guidance:g}")
    if args.out.endswith(("/", os.sep)) or Path(args.out).is_dir():
        args.out = str(Path(args.out, "cat"))
    stem = f"{args.out}-{args.seed}"
    begun = time.perf_counter()
    numbers = range(args.first, args.first + args.n)
    files, shown, frames = [], [], []
    for before in range(0, args.n, args.batch):
        some = numbers[before : before + args.batch]
        chain = sample(model, diffusion, len(some), args.sampler, args.steps, args.seed, some[0])
        for k, (_, x_t, x0_hat) in enumerate(chain, 1):
            done = (before + len(some) * k / args.steps) / args.n
            left = (time.perf_counter() - begun) * (1 - done) / done
            show(f"pictures {some[0]} to {some[-1]}, call {k}, {left:.0f} s left", passing=True)
            filmed = k % math.ceil(args.steps / 50) == 0 or k == args.steps
            if args.gif and before == 0 and filmed:
                frames.append(make_sheet(torch.cat([x_t, x0_hat], 3)))  # side by side
        for number, image in zip(some, to_images(x0_hat)):  # each batch as soon as it is made
            about = vars(args) | {"number": number}
            files.append(save_new(image, f"{stem}-{number:04}.png", about))
        shown = [*shown, *x0_hat.cpu()][:400]  # enough for the sheets
    x0 = torch.stack(shown)
    sheets = [save_new(make_sheet(x0), f"{stem}-grid.png", vars(args))]
    if training:
        sheet = beside_nearest(x0, training, Path(f"{stem}-skipped.txt"))
        sheets.append(save_new(sheet, f"{stem}-nearest.png", vars(args)))
    if frames:
        times = [80] * (len(frames) - 1) + [3000]  # milliseconds: it rests on the last
        how = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        sheets.append(save_new(frames[0], f"{stem}.gif", vars(args), **how))
    for path in sheets + files:
        show(f'"{path}"')


def beside_nearest(x, paths, listing):
    """A sheet of pairs: each picture of x (M, 3, H, W), and the nearest of those in the files.

    The distance is Euclid's, over all pixels. listing: for damaged files.
    """
    pictures = torch.stack(list(decode_pictures(paths, x.shape[-1], listing)))
    pictures = torch.cat([pictures, pictures.flip(3)])  # as in training, either way round
    parts = [torch.cdist(x.flatten(1), as_floats(p).flatten(1)) for p in pictures.split(500)]
    nearest = torch.cat(parts, 1).argmin(1)  # (M,)
    return make_sheet(torch.cat([x, as_floats(pictures[nearest])], 3))


# ---- Command line ------------------------------------------------------------------------------
# Two commands, one line an option. A checkpoint stores train's settings; so `sample` knows which
# network to build. Bad input gets one line and exit code 2; a bug of ours shows its traceback.

# What stays as it is in a run: the weights were learned with it.
FIXED = "size", "channels", "mults", "blocks", "attention", "schedule", "prediction"


class Failure(argparse.ArgumentTypeError):
    """Something the user can mend: main() prints it in one line. (argparse passes on its text.)"""


def require(holds, message):
    """Raise Failure if something does not hold."""
    if not holds:
        raise Failure(message)


class Parser(argparse.ArgumentParser):
    """argparse's, but an error is a Failure."""

    def error(self, message):
        raise Failure(message)


def within(least, most=math.inf):
    """A type for argparse: a number from `least` to `most`, int or float as `least` is."""

    def number(text):
        value = type(least)(text)  # a ValueError is told by argparse
        require(least <= value <= most, f"{text} is not from {least} to {most}")
        return value

    return number


def a_folder(text):
    """A type for argparse: a folder that exists."""
    path = Path(text).expanduser()
    require(text and path.is_dir(), f'no folder "{text}"; name the one with the pictures')
    return str(path)  # as typed: photos and run may move together


def parser(**earlier):
    """The command line, as argparse wants it. earlier: other defaults for `train`."""
    how = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    top = Parser("catdiffusion.py", description=__doc__.split("\n")[0], **how)
    commands = top.add_subparsers(dest="command", required=True, metavar="train|sample")

    train = commands.add_parser("train", help="learn from pictures", **how)
    add = train.add_argument
    # the run
    add("--data", type=a_folder, nargs="+", action="extend", help="folders; None: drawn cats")
    add("--run", help="folder for checkpoint and previews; None: run, or run-drawn without --data")
    add("--init", help="checkpoint to start from; None: from random weights")
    add("--steps", type=within(1), help="of training; None: 50000, drawn cats 2000")
    add("--every", type=within(0.0), default=5.0, help="minutes between two previews, and saves")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--seed", type=within(0), default=0, help="start of all randomness: same seed, same run")
    # the network, see UNet
    add("--size", type=within(1), help="side of the pictures; None: 64, drawn cats 32")
    add("--channels", type=within(8), default=32, help="maps at full size, a multiple of 4")
    add("--mults", type=within(1), nargs="+", help="of channels; None: 1 2 4 4 for 64 px")
    add("--blocks", type=within(1), default=1, help="residual blocks at each resolution")
    add("--attention", type=within(1), nargs="*", help="sides with it; None: the largest up to 16")
    add("--dropout", type=within(0.0, 0.9), default=0.0, help="0.1 when pictures are few")
    # the recipe, see part 2
    add("--batch", type=within(1), default=16, help="pictures a step; 64 and more on a GPU")
    add("--accum", type=within(1), default=1, help="cut a batch in parts, to save memory")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="adam is the paper's")
    add("--lr", type=within(1e-9, 1.0), help="rate; None: 1e-3, drawn cats 2e-3, adam 2e-4")
    add("--ema", type=within(0.0, 1.0), default=0.9999, help="decay of the average of the weights")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the noise")
    add("--prediction", choices=PREDICTIONS, default="v", help="what the network predicts")
    add("--levels", choices=LEVELS, default="middle", help="the t that are learned most")
    train.set_defaults(**earlier)

    add = commands.add_parser("sample", help="make new pictures", **how).add_argument
    add("--checkpoint", help="None: the newer of run and run-drawn, or the cats that come along")
    add("-n", "--n", type=within(1), default=8, help="how many pictures")
    add("--seed", type=within(0), default=0, help="another seed, other cats")
    add("--first", type=within(0), default=0, help="number of the first picture of that seed")
    add("--out", default="samples/cat", help="start of the files' names, or a folder/")
    add("--gif", action="store_true", help="animate the denoising of the first batch")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--batch", type=within(1), default=16, help="pictures at once")
    add("--sampler", choices=SAMPLERS, default="dpm-sde", help="see part 2")
    add("--steps", type=within(1, TIMESTEPS), help="network calls; None: 25, ddim 50, ddpm 1000")
    add("--guidance", type=within(0.0, 100.0), default=2.3, help="by early weights; 1: none")
    add("--nearest", type=a_folder, help="training pictures; the sheet has the nearest to each")
    return top


def as_words(values):
    """Settings as one would type them: a dict -> a list of words."""
    words = []
    for name, value in values.items():
        if value is not None:  # None means: choose for me
            several = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *map(str, several)]
    return words


def settings(*words, **given):
    """All settings of `train`, completed and checked: from a command line's words, or by name.

    The rule of resuming: what is given wins, then what the run in its folder has, then the default.
    But what the weights have learned with stays. Raises Failure.
    """
    words = [*words, *as_words(given)]
    typed = parser().parse_args(["train", *words])  # run, data, init, lr: None if not typed
    run = typed.run or ("run" if typed.data else "run-drawn")
    resumed = Path(run, "checkpoint.pt").exists()
    start = run if resumed else typed.init
    # Folder and device are chosen each time. From --init a new run takes the network alone.
    names = set(vars(typed)) - {"run", "device"} if resumed else FIXED
    saved = {}
    if start:
        with open_checkpoint(start) as checkpoint:
            saved = {k: value for k, value in checkpoint["settings"].items() if k in names}
    earlier = {**saved, "data": None} if typed.data else saved  # or folders would add up
    args = parser(**earlier).parse_args(["train", *words, "--run", run])
    changed = {name: was for name, was in saved.items() if vars(args)[name] != was}
    fixed = {name: was for name, was in changed.items() if name in (*FIXED, "init")}
    kept = " ".join(as_words(fixed)) or "no --init"  # as_words drops None, which only init can be
    way_out = "; to begin anew, name another --run" if resumed else ""
    require(not fixed, f"{start} has learned with {kept}, and that stays{way_out}")
    for name, was in changed.items():
        show(f"--{name} {vars(args)[name]}, was {was}")
    if "optimizer" in changed:
        args.lr = typed.lr  # the rate goes with the optimizer
    del args.command
    complete(args)
    return args


def complete(args):
    """Choose what is still None, and check what depends on each other. Raises Failure."""
    args.size = args.size or (64 if args.data else 32)
    args.steps = args.steps or (50_000 if args.data else 2_000)  # many hours; some minutes
    rates = {"adam": 2e-4, "muon": 1e-3 if args.data else 2e-3}
    args.lr = args.lr or rates[args.optimizer]
    # One more floor for each doubling of the size: the lowest maps have 8 to 15 px (4 at 32).
    doublings = max(0, int(math.log2(args.size / 64)))
    args.mults = args.mults or [1] * doublings + [1, 2, 4, 4]
    sides = [args.size >> floor for floor in range(len(args.mults))]  # 64, 32, 16, 8
    if args.attention is None:  # only the largest map of at most 16 px
        args.attention = [side for side in sides if side <= 16][:1]
    folders = [Path(folder).resolve() for folder in args.data or []]
    require(Path(args.run).resolve() not in folders, f"--run {args.run}: is a folder of --data")
    halvings = len(sides) - 1
    require(args.size % 2**halvings == 0, f"--size {args.size}: cannot be halved {halvings} times")
    require(set(args.attention) <= set(sides), f"--attention: the maps have only the sides {sides}")
    require(args.channels % 4 == 0, f"--channels {args.channels}: must be a multiple of 4")
    parts = args.accum * WORLD_SIZE
    require(args.batch % parts == 0, f"--batch {args.batch}: must be a multiple of {parts}")


def main(argv):
    """Run the command line `argv` (without the program's name). Returns the exit code."""
    try:
        args = parser().parse_args(argv)
        if args.command == "sample":
            if RANK == 0:
                write_samples(args)
            return 0
        args = settings(*argv[1:])
        state = train(args)
        return 0 if state.step >= args.steps else 130  # as after Ctrl-C
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as e:
        message, code = f"{e}", 2
        if out_of_memory(e):
            message = "out of memory: train with more --accum, sample with less --batch"
        elif not isinstance(e, (Failure, OSError)):  # OSError: the disk is full, ...
            raise  # a bug
    message = " ".join(message.split())[:400]
    print(f"catdiffusion: {message:65}", file=sys.stderr)  # over a passing line
    return code


def show(text, passing=False):
    """A line for the user; a passing one only in a terminal, where the next is written over it."""
    if RANK == 0 and (sys.stdout.isatty() or not passing):  # one process speaks for all
        # No terminal, odd names, a Ctrl-C in the middle of a line: the work goes on.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(f"{text:79}", end="\r" if passing else "\n", flush=True)


# ==== PART 4: THE MACHINE ROOM ==================================================================

# ---- Where to compute --------------------------------------------------------------------------
# A TPU if there is one, else a GPU, else the processor. To bring in another accelerator, look at
# `pick_device`, `uses_bf16`, `build_optimizer`, and at what else asks for "xla". To a TPU's
# compiler a Python number is part of the program: another number, and it compiles anew. So what
# changes from step to step is a tensor, made on the CPU and sent there.
#
# Many processes: `torchrun --nproc-per-node=4 -- catdiffusion.py train ...` starts this file four
# times and gives each its number, RANK. Each has the whole network and does its part of every
# batch, and DistributedDataParallel averages their gradients, so that all take the same step.
# Number 0 alone decodes, saves and prints.

PLACE = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # set by torchrun
WORLD_SIZE = int(PLACE.get("WORLD_SIZE", 1))  # how many processes
RANK = int(PLACE.get("RANK", 0))  # which of them this is


def pick_device(name="auto"):
    """Turn `--device` into a torch.device. Raises Failure if the machine has no such thing."""
    # torch_xla is imported only where a TPU is likely: merely having it installed changes nothing.
    # PJRT_DEVICE=CPU with --device tpu walks the whole TPU path without one; that is how we test.
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    pjrt = os.environ.get("PJRT_DEVICE", "TPU" if chips else "none")
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
            name = f"cuda:{PLACE.get('LOCAL_RANK', 0)}"
        return torch.zeros(1, device=name).device  # fails if there is none
    except (OSError, RuntimeError, AssertionError, ImportError) as e:
        raise Failure(f"--device {name}: not on this machine ({e}); try another") from None


def uses_bf16(device):
    """Whether the chip computes matrix products in bf16 (about twice as fast)."""
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"cpu": cpu, "cuda": cuda, "xpu": True, "xla": True}.get(device.type, False)


def autocast(device):
    """Matrix products in bf16 where the chip has it, fp32 elsewhere.

    bf16, a float of 16 bits, has the range of fp32, so nothing overflows; fp16 has not, which is
    where the black pictures in many issue trackers come from. Weights and formulas stay in fp32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device))


def build(args, device):
    """The network and the diffusion that the settings describe, on `device`."""
    model = UNet(args.size, args.channels, args.mults, args.blocks, args.attention, args.dropout)
    # In bf16 a GPU's convolutions want the channels last in memory (torch's tutorial on memory
    # formats; not measured here). A CPU's group norm is slower that way.
    last = uses_bf16(device) and device.type != "cpu"
    layout = torch.channels_last if last else torch.contiguous_format
    diffusion = PREDICTIONS[args.prediction](SCHEDULES[args.schedule]())
    return model.to(device, memory_format=layout), diffusion.float().to(device)


def build_optimizer(name, model, device):
    """The optimizer of that name, for parameters on `device`; a broken step moves no weight."""

    def skip_broken_step(optimizer, args, kwargs):
        # If a gradient is not finite, clipping has made each of them 0 or NaN. They all become 0,
        # and so does the rate: no weight moves. State.report sees the rate; nobody waits for it.
        group = optimizer.param_groups[0]  # there is one
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        finite = nn.utils.get_total_norm(gradients).isfinite()  # True or False, on the device
        for gradient in gradients:
            gradient.nan_to_num_(0, 0, 0)
        group["lr"] = group["lr"] * finite

    # Fused: Adam's update is one kernel (torch has none for a TPU). There the step counter must be
    # a tensor (capturable), as the rate is: a number would be compiled into the program.
    xla = device.type == "xla"
    lr = torch.tensor(0.0, device=device)  # train() sets it
    optimizer = OPTIMIZERS[name](model, lr=lr, fused=not xla, capturable=xla)
    optimizer.register_step_pre_hook(skip_broken_step)
    return optimizer


def end_of_step(device):
    """A TPU only notes operations down; this is where it runs them, as one compiled program."""
    if device.type == "xla":
        sys.modules["torch_xla"].sync()


def over_cores(batch):
    """The tensors of a batch; on a TPU, cut into one part for each core of the host."""
    if batch[0].device.type == "xla":
        from torch_xla.distributed import spmd

        for tensor in batch:
            axes = "batch", *[None] * (tensor.dim() - 1)
            spmd.mark_sharding(tensor, spmd.get_1d_mesh("batch"), axes)
    return batch


def over_processes(model, accum):
    """The model; with several processes, one that averages gradients after `accum` parts."""
    if WORLD_SIZE == 1:
        return model
    torch.distributed.init_process_group()  # NCCL between GPUs, else gloo
    model = nn.parallel.DistributedDataParallel(model)
    calls = itertools.count(1)

    def before_forward(model, inputs):  # train_step calls the model `accum` times
        model.require_backward_grad_sync = next(calls) % accum == 0

    model.register_forward_pre_hook(before_forward)
    return model


def hash_of(*parts):
    """A number of 32 bits that is a function of `parts`, say (seed, step)."""
    return random.Random(repr(parts)).getrandbits(32)


def set_seed(device, *parts):
    """Make all randomness from here on a function of `parts`."""
    torch.manual_seed(hash_of(*parts))
    if device.type == "xla":
        sys.modules["torch_xla"].manual_seed(hash_of(*parts))


def out_of_memory(error):
    """Whether an exception says that the memory is used up; torch has several ways to say so."""
    told = "out of memory|not enough memory|can't allocate memory|alloc_failed"
    return isinstance(error, MemoryError) or re.search(told, f"{error}", re.IGNORECASE)


@contextlib.contextmanager
def stop_requests():
    """Inside, Ctrl-C, SIGTERM and a closed terminal do not kill. A second Ctrl-C does.

    Yields asked(): whether one of them came, in any process. Each call of it waits for all.
    """
    received = []

    def note(number, frame):
        if number == signal.SIGINT and number in received and WORLD_SIZE == 1:
            raise KeyboardInterrupt  # (torchrun sends even the first one twice)
        received.append(number)
        show("stopping after this step; a second Ctrl-C would not wait")

    def asked():
        answer = torch.tensor(float(len(received)))
        if WORLD_SIZE > 1:
            torch.distributed.all_reduce(answer)  # the sum
        return answer > 0

    with contextlib.ExitStack() as at_the_end:
        for number in {1, 2, 15} & signal.valid_signals():  # SIGHUP, SIGINT, SIGTERM; Windows: two
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
                with contextlib.suppress(ValueError):  # only the main thread may do this
                    before = signal.signal(number, note)
                    at_the_end.callback(signal.signal, number, before)
        yield asked


# ---- Files -------------------------------------------------------------------------------------
# A file that matters is written beside the old one, forced to the disk, and only then given its
# name: whatever stops us on the way, a whole one is there. Loading allows tensors and plain values
# only (weights_only), so a checkpoint from a stranger cannot run code.


def end_of(path):
    """The last bytes of a file (in a checkpoint, its checksums); b"" if there is no file."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(-min(4000, path.stat().st_size), os.SEEK_END)
        return file.read()


def write_whole(path, parts):
    """Write bytes to a file; it takes its name only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.part")  # beside it
    try:
        with open(new, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only in the system's memory
        for _ in range(20):
            with contextlib.suppress(PermissionError):  # Windows, while a program has it open
                return os.replace(new, path)  # all or nothing
            time.sleep(0.2)
        os.replace(new, path)
    except OSError as e:
        raise OSError(f"{path} not written: {e}; what was saved before is safe") from None
    finally:
        new.unlink(missing_ok=True)


def save_new(image, path, about, **how):
    """Write a PNG or GIF with `about` as JSON in it, never over another. Returns its path."""
    words = json.dumps(about)
    text = PngImagePlugin.PngInfo()  # PNG's place for words; a GIF has a comment
    text.add_text("catdiffusion", words)
    comment = f"catdiffusion {words}".encode()
    path, buffer = Path(path), io.BytesIO()
    image.save(buffer, path.suffix[1:], pnginfo=text, comment=comment, **how)
    while path.exists() and path.read_bytes() != buffer.getvalue() and not alike(path, image):
        path = path.with_stem(f"{path.stem}-new")
    write_whole(path, [buffer.getbuffer()])
    return path


def alike(path, image):
    """Whether the picture in a file is this PIL image, up to rounding."""
    old, new = (TF.pil_to_tensor(i.convert("RGB")).int() for i in (Image.open(path), image))
    return old.shape == new.shape and (old - new).abs().max() < 3


@contextlib.contextmanager
def open_checkpoint(path):
    """Yield what State.save wrote, on the CPU. Damage found in the `with` block is a Failure."""
    files = Path(path, "checkpoint.pt"), Path(path, "config.json"), Path(path)
    file = next((file for file in files if file.is_file()), None)
    require(file, f"{path}: no checkpoint; make one: python catdiffusion.py train")
    theirs = file.name == "config.json"
    try:
        yield read_folder(file.parent) if theirs else torch.load(file, "cpu", weights_only=True)
    except Exception as e:  # a damaged file can raise anything
        if isinstance(e, (Failure, OSError)) or out_of_memory(e):
            raise
        raise Failure(f"{path}: damaged, or not of this program and its network ({e!r})") from None


def load_checkpoint(path, device="cpu", guidance=1.0):
    """A file of train's, or a folder of diffusers -> averaged network, diffusion, step.

    guidance: if it is not 1 and the file has early weights, the network is a Guided one.
    """
    with open_checkpoint(path) as saved:
        defaults = vars(parser().parse_args(["train"]))  # for options that are newer than the file
        args = argparse.Namespace(**defaults | saved["settings"])
        model, diffusion = build(args, torch.device(device))
        model.load_state_dict(saved["ema"])
        if guidance != 1 and "early" in saved:
            early = copy.deepcopy(model)
            early.load_state_dict(saved["early"])
            model = Guided(model, early, diffusion, guidance)
    return model.eval().requires_grad_(False), diffusion, saved["step"]


# ---- The paper's networks ----------------------------------------------------------------------
# Ho's own networks (google/ddpm-ema-cat-256 and its family) live on in another layout: a folder
# with config.json and the weights, under the names of Hugging Face's diffusers.

# Words in their names of weights, and ours.
THEIR_WORDS = """time_embedding.linear_1=time.0 time_embedding.linear_2=time.2 time_emb_proj=time
    conv_norm_out=norm_out conv_shortcut=shortcut group_norm=norm mid_block=middle_blocks.0
    samplers.0.conv=samplers.0 to_q=q to_k=k to_v=v to_out.0=out
    query=q key=k value=v proj_attn=out"""
# What makes their UNet2DModel the paper's network, and their scheduler its schedule.
THE_PAPERS = {"act_fn": "silu", "attention_head_dim": None, "flip_sin_to_cos": False}
THE_PAPERS |= {"freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6, "norm_num_groups": 32}
THE_PAPERS |= {"center_input_sample": False, "mid_block_scale_factor": 1}
THE_PAPERS |= {"time_embedding_type": "positional", "resnet_time_scale_shift": "default"}
THE_PAPERS |= {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
THE_PAPERS |= {"trained_betas": None, "num_train_timesteps": 1000, "prediction_type": "epsilon"}


def our_name(name, blocks):
    """A weight's name in diffusers -> its name in our UNet with that many blocks a floor."""

    def ours(found):
        way, floor, kind, i = found.groups()
        layers = {"down": blocks + 1, "middle": 0, "up": blocks + 2}[way]  # of ours, on each floor
        place = layers - 1 if kind.endswith("samplers") else int(i)
        end = ".attention" if kind == "attentions" else ""
        return f"{way}.{int(floor) * layers + place}{end}"

    for pair in THEIR_WORDS.split():
        name = name.replace(*pair.split("="))
    return re.sub(r"(down|middle|up)_blocks\.(\d+)\.(\w+)\.(\d+)", ours, name)


def read_folder(folder):
    """What State.save writes, as far as sampling needs it, from a folder of diffusers."""
    config = json.loads((folder / "config.json").read_text())
    if (path := folder / "scheduler_config.json").exists():
        config |= json.loads(path.read_text())
    config = {name: value for name, value in config.items() if value is not None}
    # (An entry that is missing counts as the paper's.)
    foreign = [name for name, value in THE_PAPERS.items() if config.get(name, value) != value]
    kinds, widths = config["down_block_types"], config["block_out_channels"]
    size, blocks = config["sample_size"], config["layers_per_block"]
    foreign += set(kinds) - {"DownBlock2D", "AttnDownBlock2D"}  # blocks that we do not have
    foreign += [f"width {width}" for width in widths if width < 128]  # other groups in `norm`
    require(not foreign, f"{folder}: not the paper's network, {foreign}")
    described = {"size": size, "blocks": blocks, "schedule": "linear", "prediction": "eps"}
    described["channels"] = widths[0]
    described["mults"] = [width // widths[0] for width in widths]
    described["attention"] = [size >> i for i, kind in enumerate(kinds) if "Attn" in kind]
    # Beside it there may be a .safetensors, which is another format.
    weights = torch.load(folder / "diffusion_pytorch_model.bin", "cpu", weights_only=True)
    weights = {our_name(name, blocks): value for name, value in weights.items()}
    return {"settings": described, "ema": weights, "step": 0}


# ---- Sheets ------------------------------------------------------------------------------------
# From tensors to something to look at.


def to_images(x):
    """Pictures (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    x = ((x.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [TF.to_pil_image(picture) for picture in x]


def make_sheet(x, columns=None):
    """Pictures (B, 3, H, W) in [-1, 1] -> one PIL image of them all, row by row, about square."""
    columns = columns or math.ceil(len(x) ** 0.5)
    return to_images(utils.make_grid(x, columns, pad_value=1.0)[None])[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
