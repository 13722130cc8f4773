"""catdiffusion: learn to draw cats by learning to remove noise. One file, to read and to use.

Take a photo of a cat and add a little Gaussian noise. Add a little more, a thousand times over,
and nothing of the cat is left: the end is pure noise, whatever the photo was. Each of these small
steps could be undone if we knew which noise is in the picture. We do not, but a network can learn
to predict it. To make a new cat we start from pure noise and undo the thousand steps one after the
other. That is all of it: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models"
(arXiv:2006.11239), called "the paper" from here on. (The idea is older: Sohl-Dickstein et al. 2015,
arXiv:1503.03585; Song & Ermon 2019, arXiv:1907.05600.)

    python catdiffusion.py train                    # no photos? it draws simple cats, learns those
    python catdiffusion.py train --data ./cats      # your photos; Ctrl-C stops, rerun to resume
    python catdiffusion.py sample -n 8              # eight new cats in samples/

The file has four parts. Parts 1 and 2 are the lesson; you may stop reading where they end.

    1  The paper           Noise, learning, sampling, network, averaging: a whole diffusion model.
    2  Since the paper     Six main departures: what was wrong with the paper's choice, what we
                           do instead, what it brought, and the option that goes back.
    3  The program         Pictures. Train. Sample. Command line.
    4  The machine room    TPU, GPU, CPU, many at once. Files. Lines and sheets.

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
import atexit
import contextlib
import copy
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import nn
from torchvision import utils
from torchvision.transforms import functional as TF

COLOURS = "RGB"  # of all pictures, in Pillow's words; "L" is grey
TIMESTEPS = 1000  # T, how many noise levels there are

# ==== PART 1: THE PAPER =========================================================================

# ---- Noise -------------------------------------------------------------------------------------
# Going from picture to noise needs no learning. One step of it is
# x_t = √(1−β_t)·x_{t−1} + √β_t·ε_t  (Eq. 2; before t = 0 comes x₀): the picture shrinks a little,
# and a little noise is added. The shrinking keeps a variance of 1 at 1: (1−β)·1 + β = 1. Sums of
# Gaussians are Gaussian, so many steps are one jump:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε  (Eq. 4), where ε
# is all noise so far. How β_t grows with t is called the schedule. With the paper's (ours comes in
# part 2) the two factors, whose squares sum to 1, are at five levels:
#
#     t                       0       250     500     750     999
#     signal_rate √ᾱ_t        1.000   0.722   0.279   0.057   0.006
#     noise_rate √(1−ᾱ_t)     0.010   0.692   0.960   0.998   1.000
#
# Pictures have values from -1 to 1: centred at 0, as the noise is, and of similar size.
#
# We know how x_t follows from x_{t−1}. We want the reverse. From x_t alone, Bayes' rule gives it
# only if we know how likely each picture is. If we also know x₀, there is a formula, `q_posterior`
# below (q is the paper's letter for noising). We do not know x₀, but the network predicts the
# noise, and that gives an estimate of the picture, by Eq. 4.
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
    """β_t for each level, (T,): each step is small, and yet the last x_t is noise (Section 4).

    1e-4 and 0.02 belong to T = 1000. With 100 levels they would leave √ᾱ = 0.60 of the picture.
    """
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
        in the paper t_next is t − 1, and this is β_t. Why these weights? x₀ alone puts the picture
        at √ᾱ'·x₀, with variance 1−ᾱ'. x_t alone puts it at x_t/√(1−β), with variance β/(1−β). The
        mean averages both, weighted by 1/variance.
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
# Then take a step down the gradient of the squared error. The loss is a mean over pictures, levels
# and noise, so one random t for each picture does: over many batches all levels have their turn.
# The optimizer is Adam, with torch's usual settings and a learning rate of 2e-4.
#
# Why is the noise the target, when we want the picture? By Eq. 4, either one gives the other. If
# the picture is wrong by d, then the noise is wrong by d·√ᾱ_t/√(1−ᾱ_t). So the squared error of the
# noise is that of the picture times ᾱ_t/(1−ᾱ_t), which is 9999 at t = 0 and 0.084 at t = 500.
# Compared with a loss on x₀, the loss on ε gives more weight to low noise. (Theory asks for more
# still, Eq. 12.) It gave the paper its best pictures.


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
    into that many equal chunks, run one after the other, to save memory. The gradient is the same.
    """
    total = 0.0
    chunks = [tensor.chunk(accum) for tensor in batch]  # of x0, of t, of eps
    for chunk in zip(*chunks):  # x0, t, eps of a smaller batch
        loss = diffusion.loss(model, *chunk) / accum
        loss.backward()  # adds to the gradient of the chunks before
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
# and the best possible loss on ε, the mean error of x̂₀ times ᾱ/(1−ᾱ), is 0.04 at t = 100, 0.38 at
# t = 250, 0.06 at t = 500. At low noise the picture gives the noise away. At high noise x_t is
# nearly the noise. In between it is hard.


# ---- Sampling ----------------------------------------------------------------------------------
# Now backwards, from noise to cat. At each step the network looks at x_t and says which clean
# picture x̂₀ it sees in there; at first, if it is good, that is a grey blur, the mean of all cats.
# We do not jump there. We go to the next lower noise level and look again: this x_t favours some
# cats over others, and the estimate grows sharper.
#
# The step treats x̂₀ as the truth and picks at random from the Gaussian of Eq. 6 and 7. Is that
# allowed, if x̂₀ is only a mean? Each possible x₀ has its own Gaussian. Its centre (the mean of
# Eq. 7) is a number times x₀, plus a part without x₀. So the centres have a mean, and that is the
# centre for x̂₀. In a small step all centres nearly coincide, and one Gaussian is enough: hence a
# thousand steps. The centre alone has too little noise for the next level: without fresh noise,
# this step would make pictures that are too smooth.
#
# The paper writes the same step with the predicted ε. Put Eq. 15 into Eq. 7, and you get the
# update in its Algorithm 2. We go through x̂₀ because it can be clipped: at t = 999 an error of
# 0.01 in ε becomes 1.6 in the picture, and unclipped errors pile up to glaring colours.
#
# The paper tried two variances: that of Eq. 7, and β_t, which is a little larger. In a thousand
# steps it makes no difference. In few steps β leaves too much noise, so we use Eq. 7. (A network
# can learn one in between, Nichol & Dhariwal 2021; our few steps do without.)
#
# You can check all this without a network: put the formula for the two pictures in its place. Then
# every sampler in this file ends at +1 for about three quarters of all seeds (the tests do it). A
# perfect network for a folder of photos would return just these photos. New cats exist because ours
# cannot learn them by heart and generalises.


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
# is told t, which the paper calls the time.


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

    At most 32 groups, as in the paper, and of at least 4 channels: in a group of one channel, the
    mean of its map would be lost, and with it the brightness.
    """
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Attention(nn.Module):
    """Every pixel sees every other: how the left eye learns the colour of the right one.

    Single-head self-attention; for small sides, as its cost grows with the side's fourth power. At
    8 px it would be cheap, but there the paper has it in the middle only.
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
    """Twice the side: repeat each pixel, then convolve."""

    def forward(self, x, emb):
        # A transposed convolution would leave a grid: its kernels overlap unevenly. (F.interpolate
        # would be one call, but a TPU hands its gradient to the CPU.)
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
# of the weights makes much better samples. It is only used to sample; training goes on with the
# weights themselves. The paper's decay of 0.9999 remembers some 10,000 steps. In a short run that
# is mostly the random start: sampling from such an average gives noise, which looks like a bug in
# the sampler. So the memory of ours grows with the run (Karras et al. 2024, arXiv:2312.02696, do
# the same): after n steps it is n/19 steps long, and reaches the paper's 10,000 at step 190,000.


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

# Six departures; each ends with the option that goes back. The two that act while sampling are
# judged by eye. For the other four we train for 500 steps on drawn cats (fp32, seed 0): with all
# four, then without one of them. The table has the squared error of x̂₀, times 1000, on 256 other
# drawn cats, at equal σ, as the same t means different noise in each schedule. Plain grey has 214.
# Seeds 0, 1 and 2 of the first row differ by 4 % at σ = 0.1, 2 % at 1, 9 % at 10.
#
#                                    σ = 0.1    σ = 1    σ = 10
#     with all four                    1.26      11.4      126
#     with the linear schedule         2.48      19.8      116
#     with ε predicted                 0.89      11.0      292
#     with uniform t                   1.06      14.3      119
#     with Adam, at the same rate      1.71      16.1      128
#
# Read it with care. A schedule, the choice of levels and the prediction all set one thing, how much
# each σ weighs in the loss (Kingma & Gao 2023, arXiv:2303.00848). Of our levels 56 % have σ from
# 0.5 to 2; uniform t draws 41 %, the linear schedule with our levels 28 %. So σ = 1 is where our
# recipe trains most, and it pays for that at 0.1. (At 10 only ε stands out from the seeds.)

# ---- A gentler schedule ------------------------------------------------------------------------
# The paper's schedule leaves ᾱ = 0.003 at t = 750. In a small picture only the overall brightness
# is still visible then, and the last quarter of the levels teaches little. In the cosine schedule
# ᾱ falls like cos²: at t = 500 there is as much picture as noise, 0.7 of each. Back to the paper:
# `train --schedule linear`.


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
# The squared error of v is that of ε plus that of x₀: neither end is forgotten. Recovering x₀ from
# v needs no division. (√ᾱ_t and √(1−ᾱ_t) are the cosine and the sine of an angle; as it grows, v is
# the velocity of x_t.) At σ = 10 predicting ε is worse than plain grey, at σ = 0.1 it is better
# than v. Back to the paper: `train --prediction eps`.


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
# decided (the idea is that of Esser et al. 2024, arXiv:2403.03206, with another curve). Back to the
# paper: `train --levels uniform`.


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
# begin at T-1, where all is noise. The rest are evenly spaced in log σ, down to 0.01, so that σ
# falls by nearly the same factor each time (Lu et al. 2022, arXiv:2206.00927).
#
# The other two choices are switches. Their four settings are four samplers; `dpm-sde` is our
# default:
#
#                           the latest estimate    extrapolated from the last two
#     no fresh noise        ddim                   dpm      (DPM-Solver++ 2M)
#     fresh noise           ddpm                   dpm-sde  (0.8 of SDE-DPM-Solver++ 2M)
#
# *Fresh noise or none.* DDIM (arXiv:2010.02502) adds none: it works out which noise is in x_t, and
# mixes as much of it with x̂₀ as the lower level has. So only the start is random. Each picture
# follows one smooth path from noise to cat (DDIM is Euler's method for the flow of Song et al.
# 2021, arXiv:2011.13456), and large steps can follow a smooth path. But nothing corrects an early
# mistake of the network. Fresh noise covers it, and later steps decide anew.
#
# *The latest estimate or an extrapolated one.* Without fresh noise, each pixel of x̂₀, plotted
# against log σ, moves on nearly a straight line (successive changes have a correlation of 0.85 to
# 0.92). A step that uses only its value at the start lags behind. So `dpm` extends the line through
# the last two estimates to the middle of the step, where x̂₀ has about its average value.
#
# With fresh noise x̂₀ moves at random (correlation 0.15 to 0.23), and that line predicts nothing:
# staying put is the better guess. But a large step leaves out spread, as it takes the mean for the
# truth, and repeating a part of the last random change gives some of it back. For pixels of
# variance 1/16 and the best possible network, 25 calls end with 0.82 of the contrast (the spread of
# the pixels) without it, 1.02 with all of it, which is the published sampler, and 0.97 with 0.8 of
# it. 0.8 is our choice, by eye.
#
# Two judges graded the same 128 pictures of each row, on mixed sheets, not knowing the row: has it
# a fault that a child would see, or is it believable as a photo? Many are neither. A cell has the
# percent of either judge; its standard error is 1 to 4. All rows use samples/catdiffusion.pt, not
# guided, and start from the same noise. Contrast is relative to the data.
#
#                                 a fault    believable    contrast
#     ddim, 25 calls               8, 9       27, 27        0.82
#     ddpm, 25 calls               2, 3       52, 49        0.73
#     dpm, 25 calls               15, 17      20, 19        0.95
#     dpm-sde, 25 calls            5, 5       46, 39        0.90
#     the same, 1.0 of the way     8, 10      37, 35        0.96
#     ddpm, 1,000 calls           11, 15      36, 35        0.93
#
# In 25 calls, fresh noise means fewer faults. `ddpm` is judged best there, although its cats are
# soft and pale: smooth pictures show fewer faults. Extrapolation, or a thousand calls, bring detail
# and contrast, and with the detail the network's mistakes. By faults alone our default, which is
# guided (the next section), is no better than `ddpm` unguided; contrast decides. Back to the paper:
# `sample --sampler ddpm --guidance 1`.


def ddpm_step(diffusion, x0_hat, x_t, t, t_next, fresh_noise):
    """The paper's step, over any distance: take x0_hat for the truth, pick from Eq. 6 at random."""
    mean, variance = diffusion.q_posterior(x0_hat, x_t, t, t_next)
    return mean + variance.sqrt() * fresh_noise()


def ddim_step(diffusion, x0_hat, x_t, t, t_next, fresh_noise):
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

    x0_hat_prev, t_prev = None, None
    for level, level_next in zip(levels, [*levels[1:], None]):
        t = torch.full((len(x_t),), level).to(x_t.device)
        x0_hat = diffusion.denoise(model, x_t, t, *cond)
        yield level, x_t, x0_hat
        if level_next is None:
            break  # the last x0_hat is the result
        t_next = torch.full((len(x_t),), level_next).to(x_t.device)
        ahead = x0_hat
        if x0_hat_prev is not None:
            move = look_ahead(diffusion, x0_hat, x0_hat_prev, t_prev, t, t_next)
            ahead = x0_hat + sampler.extrapolate * move
        x_t = sampler.step(diffusion, ahead, x_t, t, t_next, fresh_noise)
        x0_hat_prev, t_prev = x0_hat, t


# ---- Guidance ----------------------------------------------------------------------------------
# Many samples still do not convince. x̂₀ is a mean over all pictures that the network thinks
# possible, and where it has learned too little, broken cats are among them. Early in training there
# were more broken ones. So the way from the early prediction to the present one leads to better
# cats, and we go more than twice as far:
#
#     prediction = early + w·(present − early),    w = 2.3
#
# (x̂₀ is mixed alike: to_x0 is affine, and w and 1 − w sum to 1.) This is autoguidance
# (Karras et al. 2024, arXiv:2406.02507; with a network without the label in place of the early one,
# it is classifier-free guidance). The early network must make the same mistakes, but larger ones.
# `train` keeps the averaged weights of training step 1,000, or of an eighth of the run if that is
# later. Earlier ones differ in the colours, too: with those of step 126, drawn cats came out
# glaring. (Those in samples/catdiffusion.pt are older than this rule: of step 700.)
#
# We guide only for σ from 5 to 0.5 (compare Kynkäänniemi et al. 2024, arXiv:2404.07724). Above 5
# guidance exaggerates the colours; below 0.5 it adds a little contrast and costs ten calls. So six
# of the 25 calls need both networks, which makes 31.
#
# 480 pictures of each row, judged as before (`dpm-sde`; three seeds, one is the last table's):
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
# Back to the paper: `train --optimizer adam` (at 2e-4, but falling: see `learning_rate`).


class Muon(torch.optim.Adam):
    """Adam, except for matrices: those take steps that are equally long in all directions.

    Matrices: weights of linear layers and of convolutions (a row for each output channel), except
    model.conv_out, the last layer.
    """

    def __init__(self, model, **how):
        super().__init__(model.parameters(), betas=(0.95, 0.999), **how)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        layers.remove(model.conv_out)
        self.stacks = {}  # shape -> matrices; a stack is worked on at once: fewer calls
        for p in [m.weight for m in layers if m.weight.requires_grad]:
            # As Adam has it; exp_avg is a running mean of the gradients.
            self.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p)}
            self.stacks.setdefault(p.flatten(1).shape, []).append(p)

    @torch.no_grad()
    def step(self):
        for shape, stack in self.stacks.items():
            for p in stack:
                self.state[p]["exp_avg"].lerp_(p.grad, 0.05)  # of the last 20 or so
            # Nesterov's momentum: a little more of the latest gradient.
            means = [p.grad.lerp(self.state[p]["exp_avg"], 0.95).flatten(1) for p in stack]
            scale = (
                0.2 * max(shape) ** 0.5
            )  # a step as long as Adam's (Liu et al., arXiv:2502.16982)
            rate = self.param_groups[0]["lr"] * scale
            for p, direction in zip(stack, orthogonal(torch.stack(means))):
                p.sub_(rate * direction.view_as(p))
                p.grad = None  # so Adam passes it over
        super().step()


def orthogonal(m):
    """Matrices, (N, rows, columns), with their singular values s made about 1.

    Each round turns s into 3.4445·s − 4.775·s³ + 2.0315·s⁵ (Jordan's numbers): it lifts small ones
    fast and keeps large ones near 1. In the end those above 0.0015 are from 0.68 to 1.20. No s need
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

# Whatever depends on the machine is in part 4; here it is one call whose name says what it does.

# ---- Pictures ----------------------------------------------------------------------------------
# Photos come in all shapes and states. We take the middle square (never squash: a squashed cat
# teaches squashed cats), shrink it, and keep all pictures in memory as bytes, 12 KB each at 64 px.
# A batch is then one indexing operation, and no worker process is needed. We decode at each start,
# in threads. A file of decoded pictures would save a minute, but it can be out of date or half
# written, and the code against that bloats the program.

FORMATS = "JPEG PNG WEBP BMP TIFF AVIF".split()  # in Pillow's words
SUFFIXES = [end for end, kind in Image.registered_extensions().items() if kind in FORMATS]
Image.MAX_IMAGE_PIXELS = 300_000_000  # more than any phone takes; twice as many are an error


def load_pictures(folders, size):
    """All pictures below `folders`, or drawn cats without any: uint8 (N, 3, size, size)."""
    if not folders:
        cats = [draw_cat(random.Random(i), size) for i in range(2000)]
        return torch.stack([TF.pil_to_tensor(cat) for cat in cats])
    paths = find_pictures(folders)

    def attempt(path):
        try:
            return read_picture(path, size)
        except Exception as e:  # a damaged file can make a decoder raise anything
            return f"{path}: {e!r}"

    show(f"decoding {len(paths)} pictures", passing=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(attempt, paths))
    skipped = [result for result in results if isinstance(result, str)]
    require(len(skipped) < len(paths), f"none of {len(paths)} could be read, as {skipped[:1]}")
    if skipped:
        show("\n".join([f"{len(skipped)} of {len(paths)} pictures skipped:", *skipped[:10]]))
    return torch.stack([result for result in results if not isinstance(result, str)])


def find_pictures(folders):
    """The picture files below `folders`, each real file once. Counts what it passes over."""
    found = {}  # real path -> path
    others = Counter()
    for folder in folders:
        require(Path(folder).is_dir(), f"{folder}: no such folder; name the one with the pictures")
        for path in sorted(Path(folder).rglob("[!.]*")):  # macOS leaves ._cat.jpg beside cat.jpg
            suffix = path.suffix.lower()
            if suffix in SUFFIXES and path.is_file():
                found.setdefault(os.path.realpath(path), path)
            elif path.is_symlink():  # to a folder, say: rglob does not follow it, so no circles
                others["links"] += 1
            elif path.is_file() and suffix != ".cat":
                others[suffix or "without suffix"] += 1
    if others:
        show(f"passed over (convert pictures among them to JPEG): {dict(others)}")
    require(found, f"{' '.join(map(str, folders))}: no {' '.join(SUFFIXES)} file in there")
    return list(found.values())


def read_picture(path, size):
    """One file -> uint8 (3, size, size), upright, white behind it. Raises what is wrong with it."""
    with Image.open(path, formats=FORMATS) as image:  # whatever the suffix says
        # Every PNG that we write says so: no preview or sample is ever learned from.
        require("catdiffusion" not in image.info, "made by this program")
        if os.path.exists(f"{path}.cat"):
            image = image.crop(face_box(f"{path}.cat", *image.size))
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time; but
        # below three times what we need, its fur would come out blurred, or with a false grain.
        image.draft(None, [math.ceil(3 * length * size / min(image.size)) for length in image.size])
        with contextlib.suppress(Exception):  # odd EXIF data: raised only after the turn
            ImageOps.exif_transpose(image, in_place=True)
        image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.LANCZOS)  # middle square
        white = Image.new("RGBA", (size, size), "white")  # shows where the picture is transparent
        return TF.pil_to_tensor(Image.alpha_composite(white, image).convert(COLOURS))


def face_box(path, width, height):
    """The square around a face: (left, top, right, bottom), inside width x height.

    path: a file of the CAT dataset (Zhang, Sun, Tang 2008): "9 x1 y1 ... x9 y9", in pixels, are the
    eyes, the mouth and three points on each ear.
    """
    nine, *points = map(int, Path(path).read_text().split())
    xs = points[0::2]
    ys = points[1::2]
    face = max(xs) - min(xs), max(ys) - min(ys)
    require(nine == 9 and len(points) == 18 and min(face) > 8, f"{path} marks no face")
    side = min(1.25 * max(face), width, height)  # a little more than the points, but inside
    left = min(max((min(xs) + max(xs) - side) / 2, 0), width - side)
    top = (min(ys) + max(ys) - side) / 2 + 0.1 * face[1]  # room for a chin
    top = min(max(top, 0), height - side)
    return left, top, left + side, top + side


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
    # Drawn large, then shrunk: smooth edges.
    return image.resize((size, size), Image.LANCZOS).convert(COLOURS)


# ---- Train -------------------------------------------------------------------------------------
# The loop of part 1, for a run of many hours. A batch follows from the number of the training step,
# so little must be kept: the `State`. One file holds it, and a stopped run resumes as if it had
# never stopped.


def get_batch(pictures, step, args, device):
    """A batch x0, t, eps for `train_step`, all of it from (args.seed, step) alone.

    pictures: uint8 (N, 3, H, W). args: settings.
    """
    set_seed(device, args.seed, step)
    index = torch.randint(len(pictures), (args.batch,))
    mirrored = torch.rand(args.batch) < 0.5
    # The t of a batch are spread evenly, from one random number: each t is as likely as before, but
    # no batch is all noise (Kingma et al. 2021, arXiv:2107.00630).
    t = LEVELS[args.levels]((torch.rand(1) + torch.arange(args.batch)) / args.batch)
    eps = torch.randn(args.batch, *pictures.shape[1:], device=device)  # made where it is used
    x0 = as_floats(pictures[index].to(device))
    x0 = torch.where(mirrored.to(device)[:, None, None, None], x0.flip(3), x0)
    return share_out([x0, t.to(device), eps])


def as_floats(pictures):
    """uint8 pictures (N, 3, H, W) as the network sees them: in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def learning_rate(step, steps, peak):
    """The rate at a training step: `peak`, times three factors of at most 1.

    1. It rises during the first 200 steps (fewer in a short run): the optimizer's means are young.
    2. From step 1,000 on it falls as 1/√step (Karras et al. 2024, arXiv:2312.02696). The paper
       keeps its rate. Muon at a constant 2e-3 spoiled a network on photos: its loss rose from 0.085
       at step 1,300 to 0.096 at 9,000.
    3. In the last fifth it falls to almost 0, and the network settles.
    """
    warm_up = (step + 1) / min(200, 0.4 * steps)
    slower = (1000 / (step + 1)) ** 0.5
    last_fifth = (steps - step) / (steps / 5)
    return peak * min(1, warm_up) * min(1, slower) * min(1, last_fifth)


class State:
    """All that changes in a run: what a checkpoint holds, beside the settings. Raises Failure.

    model learns, ema.model is its average, early an early copy of that (see Guidance). step:
    training steps made, in so many `seconds`. log: a dict for each record.
    """

    def __init__(self, args, device):
        set_seed(device, args.seed)  # the same network each time
        self.path = Path(args.run, "checkpoint.pt")
        self.model, self.diffusion = build(args, device)
        self.ema = EMA(self.model, args.ema)
        self.early = copy.deepcopy(self.ema.model)
        self.optimizer = build_optimizer(args.optimizer, self.model, device)
        self.parts = {"model": self.model, "ema": self.ema.model, "early": self.early}
        self.parts["optimizer"] = self.optimizer
        self.step = 0
        self.seconds = 0.0
        self.log = []
        if self.path.exists():
            self.resume(args)
        elif args.init:
            saved = read_checkpoint(args.init)
            compare(args, saved["settings"], args.init)
            self.model.load_state_dict(saved["ema"])
            self.ema.model.load_state_dict(saved["ema"])
            self.early.load_state_dict(saved.get("early", saved["ema"]))

    def save(self, args):
        """Write the checkpoint, all or nothing. Raises Failure."""
        finite = nn.utils.parameters_to_vector(self.model.parameters()).isfinite().all()
        way_on = f"{self.path} is as it was; rerun with a smaller --lr than {args.lr:g}"
        require(finite, f"weights are no longer finite. {way_on}")
        data = {"settings": vars(args), "step": self.step, "seconds": self.seconds, "log": self.log}
        data |= {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()  # torch, writing to a full disk itself, may end the whole process
        torch.save(data, buffer)
        write_whole(self.path, buffer.getbuffer())

    def resume(self, args):
        """Read it back. Settings that differ from what they were are shown, if `compare` allows."""
        saved = read_checkpoint(self.path)
        was = saved["settings"]
        folders = " ".join(was["data"] or [])
        require(args.data or not folders, f"{self.path} has learned from {folders}: add --data")
        args.init = was["init"]  # a run begins only once
        if changes := compare(args, was, self.path):
            show(f"unlike the run so far, which had {changes}")
        if args.optimizer != was["optimizer"]:
            saved["optimizer"] = self.optimizer.state_dict()  # the new one starts afresh
        # The optimizer's means come from the file, its options (fused, ...) from this device.
        saved["optimizer"]["param_groups"] = self.optimizer.state_dict()["param_groups"]
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.log = saved["log"]


def train(args, pictures=None):
    """Train; resume if the run has a checkpoint. Returns the State. Raises Failure, OSError.

    args: from settings(). pictures: uint8 (N, 3, size, size), instead of args.data; then say size,
    lr and steps, too, as the defaults without data are for drawn cats.
    """
    device = pick_device(args.device)
    state = State(args, device)
    if pictures is None:
        pictures = load_pictures(args.data, args.size)
    side = pictures.shape[-1]
    require(side == args.size, f"pictures of {side} px: say settings(size={side})")
    Path(args.run, "previews").mkdir(parents=True, exist_ok=True)
    few = " (few: see --init in README.md)" if len(pictures) < 1000 and not args.init else ""
    show(f"{len(pictures)} pictures of {args.size} px{few}; on {device}; previews go to {args.run}")
    age = 1000 if args.init else 0  # of the average: it does not soon forget good weights
    model = over_processes(state.model)
    losses = []  # since the last record; they stay on the device until we show them
    since = time.perf_counter()  # when this record began
    next_preview = since + 60 * min(1, args.every)  # the first after a minute
    with stop_requests() as stop_requested:  # Ctrl-C lets the training step finish
        while state.step < args.steps and not stop_requested():
            batch = get_batch(pictures, state.step, args, device)
            rate = learning_rate(state.step, args.steps, args.lr)
            state.optimizer.param_groups[0]["lr"] = torch.tensor(rate).to(device)
            losses.append(train_step(model, state.diffusion, state.optimizer, batch, args.accum))
            state.ema.update(state.model, state.step + age)
            state.step += 1
            if (state.step <= 1000 or state.step == args.steps // 8) and not args.init:
                # The last copy stays (see Guidance). Up to step 1,000 nothing is guided. With
                # --init it is the other run's: guidance then leads towards the new photos, too.
                state.early.load_state_dict(state.ema.model.state_dict())
            end_of_step(device)

            now = time.perf_counter()
            preview_due = state.step == args.steps or now >= next_preview
            if preview_due or now >= since + 10:  # a record; not each step, as it has to wait
                losses = [float(loss) for loss in losses]  # for the device
                mean_loss = sum(losses) / len(losses)
                if not math.isfinite(mean_loss):
                    break  # `save` says what to do
                speed = len(losses) / (now - since)  # in steps a second
                left = (args.steps - state.step) / speed / 60
                text = f"step {state.step} of {args.steps}, loss {mean_loss:.4f}"
                text += f", {speed * args.batch:.0f} pictures/s, {left:.0f} min left"
                show(text, passing=sys.stdout.isatty())
                state.seconds += now - since
                record = {"step": state.step, "minutes": state.seconds / 60, "loss": mean_loss}
                state.log.append(record)
                losses = []
                since = now
            if preview_due:
                state.save(args)
                preview(state, args, pictures)
                since = time.perf_counter()  # a preview is no training
                next_preview = since + 60 * args.every
        state.save(args)
    show(f"saved at step {state.step} of {args.steps}; rerun to go on. Now sample:")
    show(f'python catdiffusion.py sample -n 8 --checkpoint "{args.run}"')
    return state


def preview(state, args, pictures):
    """Show how far the network has come: samples, from the same noise each time; reconstruction;
    loss curve; the log, a line for each record. Nothing that goes wrong here ends the run.
    """
    run = Path(args.run)
    try:
        guided = Guided(state.ema.model, state.early, state.diffusion)
        *_, (_, _, x0_hat) = sample(guided, state.diffusion, 16)
        x0 = as_floats(pictures[:1]).to(x0_hat.device)
        rebuilt = reconstruction(state.ema.model, state.diffusion, x0)
        write_image(run / "previews" / f"{state.step:06}.png", make_sheet(x0_hat), vars(args))
        write_image(run / "reconstruction.png", rebuilt, vars(args))
        write_image(run / "loss.png", loss_curve(state.log), vars(args))
        write_whole(run / "log.jsonl", "\n".join(map(json.dumps, state.log)).encode())
    except Exception as e:
        show(f"no preview at step {state.step}: {e!r}")


def reconstruction(model, diffusion, x0):
    """What the network makes of a photo (1, 3, H, W) in more and more noise.

    Left the photo; then 1, 3, 5, 7 and 9 tenths of T. Row by row: x_t; x0_hat after one call; the
    picture at the end of the whole way back.
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
# The checkpoint knows its network, so nothing has to be said twice. A picture's name says which
# weights made it: training step, seed, number. The text inside the file says the rest.


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
    """The command `sample`: make pictures as `args` say, and write them."""
    device = pick_device(args.device)
    model, diffusion, trained = load_checkpoint(args.checkpoint, device, args.guidance)
    pictures = load_pictures([args.nearest], model.size) if args.nearest else None
    if not isinstance(model, Guided):
        args.guidance = 1.0  # without early weights there is none
    show(f"sampling with {args.checkpoint} of step {trained}, guidance {args.guidance:g}")
    about = vars(args) | {"trained_steps": trained}
    folder = args.out.endswith(("/", os.sep)) or Path(args.out).is_dir()
    stem = f"{Path(args.out, 'cat') if folder else args.out}-{trained}-{args.seed}"
    done = []  # all pictures so far, (3, size, size)
    frames = []
    while len(done) < args.n:
        first = args.first + len(done)
        n = min(args.batch, args.n - len(done))
        chain = sample(model, diffusion, n, args.sampler, args.steps, args.seed, first)
        for call, (_, x_t, x0_hat) in enumerate(chain, 1):
            show(f"pictures {first} to {first + n - 1}, call {call} of {args.steps}", passing=True)
            filmed = call % math.ceil(args.steps / 50) == 0 or call == args.steps
            if args.gif and not done and filmed:
                frames.append(make_sheet(torch.cat([x_t, x0_hat], 3)))  # side by side
        for number, image in enumerate(to_images(x0_hat), first):
            write_image(f"{stem}-{number:04}.png", image, about | {"number": number})
        done.extend(x0_hat.cpu())
    x0 = torch.stack(done[:400])  # enough for a sheet
    write_image(f"{stem}-grid.png", make_sheet(x0), about)
    if args.nearest:
        write_image(f"{stem}-nearest.png", beside_nearest(x0, pictures), about)
    if frames:
        times = [80] * (len(frames) - 1) + [3000]  # milliseconds: it rests on the last
        film = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        write_image(f"{stem}.gif", frames[0], about, **film)
    show(f"{args.n} pictures and their sheet: {stem}-*")


def beside_nearest(x, pictures):
    """A sheet of pairs: each picture of x (M, 3, H, W), and the nearest of `pictures`."""
    pictures = torch.cat([pictures, pictures.flip(3)])  # as in training, either way round
    parts = [torch.cdist(x.flatten(1), as_floats(p).flatten(1)) for p in pictures.split(500)]
    nearest = torch.cat(parts, 1).argmin(1)  # (M,)
    return make_sheet(torch.cat([x, as_floats(pictures[nearest])], 3))


# ---- Command line ------------------------------------------------------------------------------
# Two commands, one line an option. argparse tells what is wrong with one option, `complete` what is
# wrong with several. Bad input gets a line and exit code 2; a bug of ours shows its traceback.


class Failure(Exception):
    """Something the user can mend: main() prints it in one line."""


def require(holds, message):
    """Raise Failure if something does not hold."""
    if not holds:
        raise Failure(message)


def parser():
    """The command line, as argparse wants it."""
    how = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    how["usage"] = "python %(prog)s [options]; --help lists them"
    top = argparse.ArgumentParser("catdiffusion.py", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="train|sample")

    add = commands.add_parser("train", help="learn from pictures", **how).add_argument
    # the run
    add("--data", nargs="+", action="extend", help="folders with pictures; None: drawn cats")
    add("--run", help="folder for checkpoint and previews; None: run, or run-drawn without --data")
    add("--init", help="checkpoint to start from; None: from random weights")
    add("--steps", type=int, help="of training; None: 50000 (hours), drawn cats 2000 (minutes)")
    add("--every", type=float, default=5.0, help="minutes between two previews, and saves")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--seed", type=int, default=0, help="start of all randomness: same seed, same run")
    # the network, see UNet
    add("--size", type=int, help="side of the pictures; None: 64, drawn cats 32")
    add("--channels", type=int, default=32, help="maps at full size, a multiple of 4")
    add("--mults", type=int, nargs="+", help="of channels; None: 1 2 4 4 for 64 px")
    add("--blocks", type=int, default=1, help="residual blocks at each resolution")
    add("--attention", type=int, nargs="*", help="sides with it; None: the largest up to 16")
    add("--dropout", type=float, default=0.0, help="0.1 when pictures are few")
    # the recipe, see part 2
    add("--batch", type=int, default=16, help="pictures a step; 64 and more on a GPU")
    add("--accum", type=int, default=1, help="cut a batch in parts, to save memory")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="adam is the paper's")
    add("--lr", type=float, help="rate; None: 1e-3, drawn cats 2e-3, adam 2e-4")
    add("--ema", type=float, default=0.9999, help="decay of the average of the weights")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the noise")
    add("--prediction", choices=PREDICTIONS, default="v", help="what the network predicts")
    add("--levels", choices=LEVELS, default="middle", help="the t that are learned most")

    add = commands.add_parser("sample", help="make new pictures", **how).add_argument
    add("--checkpoint", help="None: the newer of run and run-drawn, or the cats that come along")
    add("-n", "--n", type=int, default=8, help="how many pictures")
    add("--seed", type=int, default=0, help="another seed, other cats")
    add("--first", type=int, default=0, help="number of the first picture of that seed")
    add("--out", default="samples/cat", help="start of the files' names, or a folder/")
    add("--gif", action="store_true", help="animate the denoising of the first batch")
    add("--device", default="auto", help="tpu, cuda, mps, xpu or cpu; auto takes the best there is")
    add("--batch", type=int, default=16, help="pictures at once")
    add("--sampler", choices=SAMPLERS, default="dpm-sde", help="see part 2")
    add("--steps", type=int, help="network calls; None: 25, ddim 50, ddpm 1000")
    add("--guidance", type=float, default=2.3, help="by early weights; 1: none")
    add("--nearest", help="folder of training pictures; a sheet shows the nearest to each sample")
    return top


def settings(**given):
    """The settings of `train`: the defaults, with `given` laid over them. Raises Failure."""
    args = parser().parse_args(["train"])
    unknown = given.keys() - vars(args).keys()
    require(not unknown, f"no such setting: {unknown}")
    # Paths become words and tuples lists: a checkpoint may hold plain values only (see Files).
    vars(args).update(json.loads(json.dumps(given, default=str)))
    args.data = [args.data] if isinstance(args.data, str) else args.data
    complete(args)
    return args


# What each number may be. (NaN lies in no range.)
RANGES = dict.fromkeys("steps size channels blocks batch accum n".split(), (1, math.inf))
RANGES |= {"lr": (1e-9, 1), "ema": (0, 1), "dropout": (0, 1)}


def complete(args):
    """Choose what is still None, and check the numbers, for either command. Raises Failure."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        good = value is None or least <= value <= most
        require(good, f"--{name} {value}: must be from {least} to {most}")
    if args.command == "sample":
        runs = filter(os.path.exists, ("run/checkpoint.pt", "run-drawn/checkpoint.pt"))
        shipped = Path(__file__).parent / "samples" / "catdiffusion.pt"
        args.checkpoint = args.checkpoint or str(max(runs, key=os.path.getmtime, default=shipped))
        args.steps = args.steps or SAMPLERS[args.sampler].calls
        require(args.steps <= TIMESTEPS, f"--steps {args.steps}: there are {TIMESTEPS} levels")
        return
    args.run = args.run or ("run" if args.data else "run-drawn")
    args.size = args.size or (64 if args.data else 32)
    args.steps = args.steps or (50_000 if args.data else 2_000)
    rates = {"adam": 2e-4, "muon": 1e-3 if args.data else 2e-3}
    args.lr = args.lr or rates[args.optimizer]
    # One more floor for each doubling of the size: the lowest maps have 8 to 15 px (4 at 32).
    doublings = max(0, int(math.log2(args.size / 64)))
    args.mults = args.mults or [1] * doublings + [1, 2, 4, 4]
    sides = [args.size >> floor for floor in range(len(args.mults))]  # 64, 32, 16, 8
    if args.attention is None:  # only the largest map of at most 16 px
        args.attention = [side for side in sides if side <= 16][:1]
    halvings = len(sides) - 1
    require(args.size % 2**halvings == 0, f"--size {args.size}: cannot be halved {halvings} times")
    require(set(args.attention) <= set(sides), f"--attention: the maps have only the sides {sides}")
    require(args.channels % 4 == 0, f"--channels {args.channels}: must be a multiple of 4")
    parts = args.accum * WORLD_SIZE
    require(args.batch % parts == 0, f"--batch {args.batch}: must be a multiple of {parts}")


def compare(args, was, path):
    """The settings of a checkpoint that differ from `args`, as they are typed.

    Raises Failure if its weights have learned with another network, schedule or prediction.
    """
    words = {}
    for name, value in was.items():
        if json.dumps(value) != json.dumps(vars(args).get(name)):  # tuples are lists there
            several = value if isinstance(value, (list, tuple)) else [value]
            words[name] = " ".join([f"--{name}", *map(str, several)])
    fixed = "size", "channels", "mults", "blocks", "attention", "schedule", "prediction"
    learned = " ".join(words[name] for name in fixed if name in words)
    require(not learned, f"{path} has learned with {learned}: add that, or name another --run")
    return " ".join(words.values())


def main(argv):
    """Run the command line `argv` (without the program's name). Returns the exit code."""
    args = parser().parse_args(argv)
    try:
        complete(args)
        if args.command == "sample":
            write_samples(args)
            return 0
        state = train(args)
        return 0 if state.step >= args.steps else 130  # as after Ctrl-C
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError) as e:  # OSError: a file that cannot be read, ...
        message = str(e)
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise  # a bug
        message = "out of memory: train with more --accum, sample with less --batch"
    print(f"catdiffusion: {message:65}", file=sys.stderr)  # over a passing line
    return 2


# ==== PART 4: THE MACHINE ROOM ==================================================================

# ---- Where to compute --------------------------------------------------------------------------
# A TPU if there is one, else a GPU, else the processor. All that knows about accelerators:
# `pick_device`, `uses_bf16`, `build_optimizer`, `end_of_step`, `share_out`, `set_seed`,
# `out_of_memory`. To a TPU's compiler a Python number is part of the program: another number, and
# it compiles anew. So what changes from step to step is a tensor, made on the CPU and sent there.
#
# Many processes: `torchrun --nproc-per-node=4 -- catdiffusion.py train ...` starts this file four
# times and gives each its number, RANK. Each has the whole network and does its part of every
# batch, and DistributedDataParallel averages their gradients, so that all take the same step.
# Number 0 alone writes files and lines.

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

                torch_xla.runtime.use_spmd()  # all cores of the host as one device: see share_out
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
    diffusion = PREDICTIONS[args.prediction](SCHEDULES[args.schedule]())
    return model.to(device), diffusion.float().to(device)


def build_optimizer(name, model, device):
    """The optimizer of that name, for parameters on `device`; train() sets its rate."""
    # Fused: Adam's update is one kernel (torch has none for a TPU). There the step counter must be
    # a tensor (capturable), as the rate is: a number would be compiled into the program.
    xla = device.type == "xla"
    lr = torch.tensor(0.0, device=device)  # train() sets it
    return OPTIMIZERS[name](model, lr=lr, fused=not xla, capturable=xla)


def end_of_step(device):
    """A TPU only notes operations down; this is where it runs them, as one compiled program."""
    if device.type == "xla":
        sys.modules["torch_xla"].sync()


def share_out(batch):
    """This process's part of a batch; on a TPU, marked to be cut into one part for each core."""
    batch = [tensor[RANK::WORLD_SIZE] for tensor in batch]
    if batch[0].device.type == "xla":
        from torch_xla.distributed import spmd

        for tensor in batch:
            axes = "batch", *[None] * (tensor.dim() - 1)  # only the first is cut
            spmd.mark_sharding(tensor, spmd.get_1d_mesh("batch"), axes)
    return batch


def over_processes(model):
    """The model; with several processes, one that averages their gradients in `backward`."""
    if WORLD_SIZE == 1:
        return model
    torch.distributed.init_process_group()  # NCCL between GPUs, else gloo
    atexit.register(torch.distributed.destroy_process_group)  # else its threads may abort
    return nn.parallel.DistributedDataParallel(model)


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
    told = "out of memory", "not enough memory", "allocate memory", "alloc_failed"
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in told)


@contextlib.contextmanager
def stop_requests():
    """Inside, Ctrl-C and SIGTERM do not kill: they set a flag.

    Yields a function that says whether one of them came, in any process; each call waits for all.
    """
    requests = []

    def handler(number, frame):
        requests.append(number)
        show("stopping after this training step")

    def stop_requested():
        count = torch.tensor(len(requests))
        if WORLD_SIZE > 1:
            torch.distributed.all_reduce(count)  # the sum
        return count > 0

    with contextlib.ExitStack() as at_the_end:
        with contextlib.suppress(ValueError):  # only the main thread may do this
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, handler)
                at_the_end.callback(signal.signal, number, before)
        yield stop_requested


# ---- Files -------------------------------------------------------------------------------------
# A file that matters is written beside the old one, forced to the disk, and only then given its
# name: whatever stops us on the way, a whole one is there. Loading allows tensors and plain values
# only (weights_only), so a checkpoint from a stranger cannot run code.


def write_whole(path, data):
    """Write bytes to a file; it takes its name only when it is whole and on the disk."""
    if RANK > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.part")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only in the system's memory
        os.replace(new, path)  # all or nothing
    except OSError as e:
        raise Failure(f"{path} not written: {e}; what was saved before is safe") from None
    finally:
        new.unlink(missing_ok=True)


def write_image(path, image, about, **how):
    """Write a PIL image as PNG, with `about` as JSON in its text, or as GIF."""
    path = Path(path)
    text = PngImagePlugin.PngInfo()
    text.add_text("catdiffusion", json.dumps(about))  # see read_picture
    buffer = io.BytesIO()
    image.save(buffer, path.suffix[1:], pnginfo=text, **how)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path):
    """What State.save wrote, on the CPU. path: a file, or the folder of a run. Raises Failure."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    require(file.exists(), f"{path}: no checkpoint; make one: python catdiffusion.py train")
    try:
        saved = torch.load(file, "cpu", weights_only=True)
        whole = saved.keys() >= {"settings", "step", "ema"}
    except Exception:  # a damaged file can raise anything
        whole = False
    require(whole, f"{file}: damaged, or not a checkpoint of this program")
    return saved


def load_checkpoint(path, device="cpu", guidance=1.0):
    """A checkpoint -> averaged network, diffusion, training step.

    guidance: if it is not 1 and the file has early weights, the network is a Guided one.
    """
    saved = read_checkpoint(path)
    model, diffusion = build(argparse.Namespace(**saved["settings"]), torch.device(device))
    model.load_state_dict(saved["ema"])
    if guidance != 1 and "early" in saved:
        early = copy.deepcopy(model)
        early.load_state_dict(saved["early"])
        model = Guided(model, early, diffusion, guidance)
    return model.eval().requires_grad_(False), diffusion, saved["step"]


# ---- Lines and sheets --------------------------------------------------------------------------


def show(text, passing=False):
    """A line for the user; a passing one only in a terminal, where the next is written over it."""
    if RANK == 0 and (sys.stdout.isatty() or not passing):
        # No terminal, odd names, a signal in the middle of a line: the work goes on.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(f"{text:79}", end="\r" if passing else "\n", flush=True)


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
