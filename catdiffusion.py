"""catdiffusion: learn to draw cats by learning to remove noise. One file, to read and to use.

Take a photo of a cat and add a little Gaussian noise. Add a little more, a thousand times over,
and nothing of the cat is left: the end is pure noise, whatever the photo was. Each of these small
steps could be undone if we knew which noise is in the picture. We do not, but a network can learn
to guess it. To draw a new cat we start from pure noise and undo the thousand steps one after the
other (or, as we do, in 25 larger ones). That is all of it: Ho, Jain, Abbeel 2020, "Denoising
Diffusion Probabilistic Models" (arXiv:2006.11239), called "the paper" from here on. There is
nothing too scary below.

    python catdiffusion.py train                    # no pictures? it draws cats and learns those
    python catdiffusion.py train --data ./cats      # yours; Ctrl-C, and the same line goes on
    python catdiffusion.py sample -n 8              # eight new cats in samples/

Notation, the paper's own (the paper counts t from 1 to T; the code, as code does, from 0 to T-1):

    x0      x₀        a clean picture, (B, 3, H, W), values in [-1, 1]
    t       t         how noisy: 0 is almost clean (not x0 yet), T-1 is pure noise; (B,), integers
    eps     ε         Gaussian noise, mean 0, variance 1, shaped like x0
    x_t     x_t       the picture after t+1 steps of noising
    beta    β_t       variance of the noise that step t adds
    abar    ᾱ_t       alphas_cumprod: the share of the picture's variance that survives up to t

Where the program departs from the paper, a NOTE says why. `--prediction eps --schedule linear
--min-snr 0` and `sample --sampler ddpm` are the paper's own ways.

What it reaches: on two cores of an AMD EPYC (torch 2.9.1, bf16), 4,553 cat faces at 64 px give
unmistakable cats after 20 minutes, at 31 pictures a second. Some choices below are argued by a
"Frechet distance", or FD, and by an "SWD": two measures of how far 256 samples or more are from the
data, lower is better. (The README says which, what real pictures reach, and what ours do.)
"""

import argparse
import atexit
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import nn

# ------------------------------------------------------------------------------------------------
# Settings
#
# Everything that can be turned, with its default, its unit and the values it may have. The command
# line is made from these two tables, and `--help` lists them. A checkpoint stores the first one,
# and that is how `sample` knows which network to build. Words that say nothing to you yet (ema, v,
# cosine, eta) are explained where they are used.
# ------------------------------------------------------------------------------------------------


DEVICES = "auto", "tpu", "cuda", "mps", "xpu", "cpu"
SAMPLERS = "dpm", "ddim", "ddpm", "ddpm-large"


def opt(default, help, *allowed, free=False):
    """A field that is also a flag. allowed: least and most, or the words it may be; free: it may
    differ when a stopped run is started again."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "free": free})


@dataclass
class Settings:
    """train a network on pictures (the defaults suit 64 px and a machine without a GPU)"""

    # the run
    data: tuple = opt((), "folders of pictures, searched recursively; none: drawn cats")
    run: str = opt("run", "folder for the checkpoint, previews and log", free=True)
    steps: int = opt(0, "optimiser steps; 0: 50000, drawn cats 2000", 0, 10**8, free=True)
    every: float = opt(5.0, "minutes between checkpoints with preview", 0.0, 1e6, free=True)
    device: str = opt("auto", "auto, tpu, cuda, mps, xpu or cpu", *DEVICES, free=True)
    compile: bool = opt(False, "torch.compile: minutes of waiting, then faster on a GPU", free=True)
    seed: int = opt(0, "start of all randomness: same seed, same run", 0, 2**63)
    # the network, see UNet
    size: int = opt(0, "side of the pictures, px; 0: 64, drawn cats 32", 0, 1024)
    channels: int = opt(32, "feature maps at full resolution, a multiple of 4", 8, 1024)
    mults: tuple = opt((), "multiples of it, one per resolution; none: 1 2 4 4 for 64 px", 1, 64)
    blocks: int = opt(1, "residual blocks at each resolution", 1, 16)
    attention: tuple = opt((), "sides of maps with attention; none: the largest up to 16", 1, 64)
    dropout: float = opt(0.0, "share of features dropped, 0.1 for few pictures", 0.0, 0.9)
    # the recipe
    batch: int = opt(16, "pictures per step; 64 and more on a GPU", 1, 10**5)
    accum: int = opt(1, "parts to cut a batch into, to save memory", 1, 10**5, free=True)
    lr: float = opt(1e-3, "learning rate; 2e-4 for a large network", 0.0, 1.0, free=True)
    ema: float = opt(0.9999, "decay of the average of the weights, per step", 0.0, 1.0)
    schedule: str = opt("cosine", "noise schedule, linear or cosine", "linear", "cosine")
    prediction: str = opt("v", "what the network guesses, eps or v", "eps", "v")
    min_snr: float = opt(5.0, "limit of the loss weight; 0: none, as in the paper", 0.0, 1e6)
    warmup: int = opt(200, "steps until the learning rate has its full height", 1, 10**6)
    timesteps: int = opt(1000, "", 2, 10**5)  # T; no flag, as the schedules are made for 1000


@dataclass
class Drawing:
    """draw with what was learned"""

    checkpoint: str = opt("", "what train has learned; none: run/checkpoint.pt, else our own cats")
    n: int = opt(8, "pictures", 1, 10**6)
    seed: int = opt(0, "another seed, other cats", 0, 2**63)
    first: int = opt(0, "number of the first picture of that seed", 0, 10**9)
    out: str = opt("samples/cat", "start of the files' names, or a folder")
    gif: bool = opt(False, "also animate the denoising of the first batch")
    device: str = opt("auto", "auto, tpu, cuda, mps, xpu or cpu", *DEVICES)
    batch: int = opt(16, "pictures at once", 1, 10**4)
    sampler: str = opt("dpm", "dpm; ddim; ddpm, the paper's; ddpm-large, noisier", *SAMPLERS)
    steps: int = opt(0, "network calls per picture; 0: dpm 25, ddim 50, else all", 0, 10**4)
    eta: float = opt(0.0, "share of fresh noise, 0 to 1, for ddim alone", 0.0, 1.0)
    best_of: int = opt(1, "draw so many times as many, keep those a classifier likes best", 1, 1000)
    classes: tuple = opt((281, 282, 283, 284, 285), "ImageNet's cats, for --best-of", 0, 999)
    nearest: str = opt("", "folder of training pictures: show the nearest beside each sample")


class Failure(Exception):
    """Something the user can mend: main() prints it as one line, without a traceback."""


def brief(error):
    """What an exception says, as one line of at most 80 characters."""
    return " ".join(f"{error or type(error).__name__}".split())[:80]


def show(text, last=True):
    """A status line: in a terminal the next is written over it, unless it is the last one."""
    live = sys.stdout.isatty()
    with contextlib.suppress(OSError):  # the reader of a pipe may be gone: the work goes on
        end = "" if live and not last else "\n"
        print(f"\r{text}\x1b[K" if live else text, end=end, flush=True)


@contextlib.contextmanager
def whole_file(path):
    """Open a file to write. It takes the place of `path` only when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def flag(f):
    """How a field is written on the command line."""
    return f"-{f.name}" if len(f.name) == 1 else f"--{f.name.replace('_', '-')}"


def check(table):
    """Raise Failure if a value of a Settings or Drawing is not among those allowed."""
    for f in fields(table):
        value, allowed = getattr(table, f.name), f.metadata["allowed"]
        if isinstance(value, list):  # argparse and checkpoints have lists
            setattr(table, f.name, value := tuple(value))
        values = value if isinstance(value, tuple) else (value,)
        odd = allowed and any(type(v) is not type(allowed[0]) for v in values)
        if odd or type(value) is not type(f.default):
            raise Failure(f"{flag(f)}: wrong type")  # in a damaged checkpoint, or lr=1 in Python
        for v in values if allowed else ():
            if isinstance(v, str) and v not in allowed:
                raise Failure(f"{flag(f)} {v}: must be one of {', '.join(allowed)}")
            if not isinstance(v, str) and not allowed[0] <= v <= allowed[1]:  # NaN is not, either
                raise Failure(f"{flag(f)} {v}: must be from {allowed[0]} to {allowed[1]}")


def complete(s):
    """Settings with what was left to us filled in. Raises Failure if they do not fit together."""
    check(s)
    s.size = s.size or (64 if s.data else 32)
    s.steps = s.steps or (50_000 if s.data else 2_000)
    s.data = tuple(map(os.path.normpath, s.data))  # ./cats and cats are the same
    # One more floor for each doubling of the size: the lowest maps have 8 to 15 px (4 at 32 px).
    s.mults = s.mults or (1,) * max(0, s.size.bit_length() - 7) + (1, 2, 4, 4)
    # Attention at the largest map of at most 16 px: 16 for 32, 64, 128 and 256 px, 12 for 96 px.
    sides = [s.size >> floor for floor in range(len(s.mults))]
    s.attention = s.attention or tuple(side for side in sides if side <= 16)[:1]
    if s.size % 2 ** (len(s.mults) - 1) or sides[-1] < 2:
        raise Failure(f"--size {s.size}: cannot be halved {len(s.mults) - 1} times (see --mults)")
    for a in set(s.attention) - set(sides):
        raise Failure(f"--attention {a}: no map has that side, only {', '.join(map(str, sides))}")
    if s.channels % 4:
        raise Failure(f"--channels {s.channels}: must be a multiple of 4")
    return s


# ------------------------------------------------------------------------------------------------
# Where to compute
#
# A TPU if there is one, else a GPU, else the processor. Only this part asks which one it is. If you
# are here for the diffusion, skip it and go on with "Data".
# ------------------------------------------------------------------------------------------------


def pick_device(name="auto"):
    """Turn `--device` into a torch.device. Raises Failure if the machine has no such thing."""
    # torch_xla is imported only where a TPU is likely: merely having it installed changes nothing.
    # PJRT_DEVICE=CPU with --device tpu walks the whole TPU path without one; that is how we test.
    pjrt = os.environ.get("PJRT_DEVICE")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    likely = pjrt == "TPU" or (chips and not pjrt and importlib.util.find_spec("torch_xla"))
    try:
        if name == "tpu" or (name == "auto" and likely):
            import torch_xla.runtime

            torch_xla.runtime.use_spmd()  # all cores of the host as one device: see spread
            if pjrt or torch_xla.runtime.device_type() == "TPU":
                return torch_xla.device()
            if name == "tpu":
                raise RuntimeError("torch_xla finds no TPU")
        if name in ("auto", "cuda") and WORLD > 1 and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        if name == "auto":
            name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.zeros(1, device=name).device
    except (ImportError, OSError, RuntimeError, AssertionError) as e:
        raise Failure(f"--device {name}: not on this machine ({brief(e)}); try auto") from None


# Many processes: `torchrun --nproc-per-node=4 catdiffusion.py train ...` starts this file four
# times and gives each its number, RANK. Each has the whole network and does its part of every
# batch, and DistributedDataParallel averages their gradients, so that all take the same step.
# Number 0 alone decodes, saves and prints. In a single process none of this does anything.
# (Put `--` before catdiffusion.py if you also give --run: torchrun takes it for a flag of its own.)
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many
RANK = int(os.environ.get("RANK", 0)) % WORLD  # which of them this is


def join_team(device):
    """Connect the processes: by NCCL between GPUs, else by gloo."""
    if WORLD > 1:
        how = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        patience = timedelta(days=1)  # for number 0, which may have a million files to decode
        torch.distributed.init_process_group(how, timeout=patience)
        atexit.register(torch.distributed.destroy_process_group)


def add_up(tensor):
    """The sum of a tensor over all processes, in place; they wait for each other here."""
    if WORLD > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def spread(*batch):
    """The tensors of a batch; on a TPU, cut into one part for each core of the host.

    torch_xla's compiler does the rest: every core has the network and works on its part of the
    batch, and gradients are summed over the cores. A batch that does not divide is not cut.
    """
    if batch[0].device.type == "xla":
        from torch_xla.distributed import spmd

        cores = sys.modules["torch_xla"].runtime.global_runtime_device_count()
        for part in batch if len(batch[0]) % cores == 0 else ():
            names = "batch", *[None] * (part.dim() - 1)
            spmd.mark_sharding(part, spmd.Mesh(range(cores), (cores,), ("batch",)), names)
    return batch


def in_team(model):
    """The network whose backward pass averages the gradients over all processes."""
    return nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model


def gather(items):
    """One dict of the dicts of all processes."""
    parts = [items] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(parts, items)
    return {key: value for part in parts for key, value in part.items()}


def autocast(device):
    """Matrix products in bf16 where the chip has them (about twice as fast), fp32 elsewhere.

    bf16 is a float of 16 bits; torch's autocast converts to it and back where that is safe. It has
    the range of fp32, so nothing overflows; fp16 has not, which is where the black pictures in many
    issue trackers come from. Weights, loss, Adam and average stay in fp32.
    """
    fast = device.type in ("xla", "xpu")
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def to_device(model, device):
    """Move a network, its channels last in memory: fastest, except on XLA, which chooses itself."""
    layout = {} if device.type == "xla" else {"memory_format": torch.channels_last}
    return model.to(device, **layout)


def make_adam(parameters, lr, device):
    """Adam (the paper, appendix B), its update as one kernel where torch has one.

    On a TPU the learning rate and the step counter must be tensors: a number would be compiled
    into the program, and every change of it would compile the program anew.
    """
    how = {"capturable": True} if device.type == "xla" else {"fused": True}
    return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), **how)


def set_seed(device, *parts):
    """Make all randomness from here on a function of `parts`, say (seed, step)."""
    number = random.Random(repr(parts)).getrandbits(32)
    torch.manual_seed(number)
    if device.type == "xla":
        sys.modules["torch_xla"].manual_seed(number)


def end_of_step(device):
    """A TPU only notes operations down; this is where it runs them, as one compiled program."""
    if device.type == "xla":
        sys.modules["torch_xla"].sync()


def upsample(x):
    """Twice the side by repeating each pixel, (B, C, H, W) -> (B, C, 2H, 2W)."""
    if x.device.type != "xla":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    b, c, h, w = x.shape  # in torch_xla, interpolate's gradient may fall back to the CPU
    return x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018): each group of channels to mean 0, variance 1.

    torch's own, except on the CPU, where its gradient is slow for channels-last memory: with ours a
    training step of the default network at 64 px is 1.3 times as fast.
    """

    def forward(self, x):
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return CPUGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class CPUGroupNorm(torch.autograd.Function):
    """With x̂ = (x − mean)·rstd, n numbers in a group and Σ over them, y = w·x̂ + b has gradients

        ∂x = rstd·(w·∂y − Σ(w·∂y)/n − x̂·Σ(w·∂y·x̂)/n),    ∂w = Σ ∂y·x̂,    ∂b = Σ ∂y

    so ∂x is c₁·∂y + c₂·x + c₃ with three numbers per channel: few passes over memory, all in order.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        b, c, h, w = x.shape
        ordered = x if h * w >= 1024 else x.contiguous()  # on small maps torch is slow here, too
        y, mean, rstd = torch.native_group_norm(ordered, weight, bias, b, c, h * w, groups, eps)
        mean, rstd = (v.float().view(b, groups, 1) for v in (mean, rstd))
        ctx.save_for_backward(x, weight.view(groups, -1), mean, rstd)
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        n, shape = x[0].numel() / len(weight), (len(x), *weight.shape)  # B, groups, C / groups
        # The sums over pixels: along each row in x's own type, then over the rows in fp32.
        columns = (v.permute(0, 2, 3, 1).sum(2) for v in (dy, dy * x))
        db, dw = (v.sum(1, dtype=torch.float32).view(shape) for v in columns)
        dw = (dw - mean * db) * rstd
        c1 = rstd * weight
        c2 = -rstd * rstd * (weight * dw).sum(2, keepdim=True) / n
        c3 = -rstd * (weight * db).sum(2, keepdim=True) / n - c2 * mean
        c1, c2, c3 = (v.expand(shape).reshape(*x.shape[:2], 1, 1).to(x.dtype) for v in (c1, c2, c3))
        dx = torch.addcmul(c3, x, c2).addcmul_(dy, c1)
        return dx, dw.sum(0).flatten(), db.sum(0).flatten(), None, None


# ------------------------------------------------------------------------------------------------
# Data
#
# Pictures come in all shapes and states. We find them, cut out a square (never squash one: a
# squashed cat teaches squashed cats), shrink it, and write all of them to one file of plain bytes
# in the run's folder: at 64 px, 12 KB a picture, 120 MB for 10,000. Decoding happens once, in
# threads. From then on that file is mapped into memory, where the system keeps what is in use: a
# million pictures need no more memory than a thousand. A batch is one indexing operation, and no
# worker process is ever needed.
# ------------------------------------------------------------------------------------------------

SUFFIXES = ".jpg .jpeg .png .webp .bmp .gif".split()
PREPARED = 1  # raise it when pictures are prepared in another way: old caches are then made anew


def find_pictures(folders):
    """All picture files below `folders`, once each, without hidden ones (macOS' ._cat.jpg)."""
    found = {}
    for folder in (Path(os.path.abspath(folder)) for folder in folders):
        if not folder.is_dir():
            raise Failure(f"{folder}: there is no such folder")
        files = (f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        shown = (f for f in files if not any(p[0] == "." for p in f.relative_to(folder).parts))
        found |= dict.fromkeys(sorted(shown))
    if not found:
        raise Failure(f"{', '.join(folders)}: no {' '.join(SUFFIXES)} file there or below")
    return list(found)


def face_box(path, width, height):
    """The square around a cat's face by the `.cat` file beside a picture; None if there is none.

    The CAT dataset (Zhang, Sun, Tang 2008) marks nine points, the eyes, the mouth and three on
    each ear, as "9 x1 y1 ... x9 y9". Points may lie outside the picture; the square is moved, and
    if need be shrunk, to lie inside. Raises ValueError if the file makes no sense.
    """
    if not os.path.lexists(f"{path}.cat"):
        return None
    if not os.path.isfile(f"{path}.cat"):  # a named pipe would hang us
        raise ValueError("not a regular file")
    with open(f"{path}.cat", "rb") as file:
        nine, *points = [int(word) for word in file.read(1000).split()]
    xs, ys = points[0::2], points[1::2]
    w, h = max(xs) - min(xs), max(ys) - min(ys)
    x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    inside = 0 <= x <= width and 0 <= y <= height
    if nine != 9 or len(points) != 18 or min(w, h) < 8 or not inside:
        raise ValueError("not '9 x1 y1 ... x9 y9', or no face in this picture")
    side = min(1.25 * max(w, h), width, height)
    y += 0.1 * h  # the mouth is the lowest of the points: make room for a chin
    left, top = (min(max(c - side / 2, 0), whole - side) for c, whole in ((x, width), (y, height)))
    return left, top, left + side, top + side


def read_picture(path, size):
    """One file -> the bytes of (size, size, 3), and what is wrong with its `.cat` file or "".

    Grey, palette, CMYK and 16 bit become RGB, transparent becomes white, EXIF rotation is undone.
    Raises whatever Pillow raises on a file that it cannot decode.
    """
    if not path.is_file():  # a named pipe would hang us
        raise OSError("not a regular file")
    with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF")) as image:
        (width, height), box, complaint = image.size, None, ""
        whole = image.format != "JPEG" or "progressive" in image.info  # cannot be decoded small
        if whole and width * height > 50_000_000:
            raise ValueError("more than 50 million pixels")
        try:
            box = face_box(path, width, height)
        except (ValueError, OverflowError, OSError) as e:
            complaint = f".cat file ignored: {e}"
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, for a fraction of the time.
        shrink = size / (box[2] - box[0] if box else min(width, height))
        image.draft(None, (math.ceil(width * shrink), math.ceil(height * shrink)))
        if box:
            across, down = image.width / width, image.height / height
            image = image.crop([edge * by for edge, by in zip(box, (across, down) * 2)])
        with contextlib.suppress(Exception):  # damaged EXIF data, whole picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bit
            image = image.convert("I").point(lambda v: v / 257).convert("L")
            image.info.pop("transparency", None)  # it is in 16 bit, too
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS)
        return image.tobytes(), complaint


def decode_pictures(paths, size):
    """Yield the bytes of each picture, none for one that cannot be decoded; tell of those."""

    def attempt(path):
        try:
            return read_picture(path, size)
        except Exception as e:  # a damaged file can make a decoder raise anything
            return b"", f"skipped: {e or type(e).__name__}"

    bad, skipped = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), 500):  # not all at once: they may be a million
            part = paths[first : first + 500]
            for path, (picture, complaint) in zip(part, pool.map(attempt, part)):
                skipped += not picture
                if complaint:  # !a: no file name can play tricks on the terminal
                    bad.append(f"  {str(path)!a} {complaint[:100]!a}")
                yield picture
            done = first + len(part)
            show(f"decoding pictures, {done} of {len(paths)}", last=done == len(paths))
    if bad:
        told = f"{skipped} of {len(paths)} pictures skipped, {len(bad)} complaints, such as:"
        show("\n".join([told, *bad[:8]]))


def cache_pictures(folders, size, run):
    """Every picture below `folders`, or drawn cats if there are none, prepared for training.

    Returns the path of a file with the bytes of (N, size, size, 3). Its name is made from what it
    was made from (names, lengths and times of all files): what changes is decoded anew.
    """
    paths = find_pictures(folders) if folders else []
    paths = [path for path in paths if Path(os.path.abspath(run)) not in path.parents]  # not ours
    sources = hashlib.sha256(f"{PREPARED} {size}".encode())
    for file in filter(os.path.exists, (f"{path}{end}" for path in paths for end in ("", ".cat"))):
        state = os.stat(file)
        sources.update(f"{file!a} {state.st_size} {state.st_mtime_ns}\n".encode())
    cache = Path(run, f"pictures-{sources.hexdigest()[:16]}.u8")
    found = cache.stat().st_size if cache.is_file() else 0
    if not found or found % (3 * size * size):
        drawn = (draw_cat(random.Random(i), size).tobytes() for i in range(2000))
        with whole_file(cache) as file:
            file.writelines(decode_pictures(paths, size) if folders else drawn)
            if not file.tell():
                raise Failure(f"--data {', '.join(folders)}: none of the pictures can be decoded")
        for old in set(cache.parent.glob("pictures-*.u8")) - {cache}:
            old.unlink()
    return cache


def as_floats(pictures):
    """Bytes of pictures, uint8 (N, H, W, 3), as the network sees them: (N, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def map_pictures(cache, size):
    """The file of cache_pictures as uint8 (N, size, size, 3); only what is looked at is loaded."""
    # True: shared. For a private mapping the system would set aside memory for the whole file.
    try:
        flat = torch.from_file(str(cache), True, cache.stat().st_size, dtype=torch.uint8)
    except RuntimeError as e:
        raise OSError(brief(e)) from None
    return flat.view(-1, size, size, 3)


def draw_cat(rng, size):
    """A cat of our own, for those who have no pictures: random.Random -> PIL image, size x size."""

    def blob(cx, cy, rx, ry):
        return [(cx + rx * math.cos(k / 4), cy + ry * math.sin(k / 4)) for k in range(26)]

    furs = (235, 150, 70), (90, 90, 100), (240, 225, 205), (60, 45, 40), (160, 120, 85)
    fur = [v + rng.randint(-15, 15) for v in rng.choice(furs)]
    dark, light = [int(v * 0.6) for v in fur], [int(v / 2 + 125) for v in fur]
    eyes = rng.choice([(120, 190, 70), (230, 180, 50), (90, 160, 220), (60, 170, 140)])
    tip, wide, pink = rng.uniform(1.2, 1.5), rng.uniform(0.15, 0.26), (225, 140, 150)
    parts = (  # back to front; (0, 0) is the middle of the head, 1 its radius
        (fur, blob(0, 1.9, 1.1, 1.3)),  # body
        (fur, [(0.95, -0.1), (0.85, -tip), (0.2, -0.8)]),  # ear
        (pink, [(0.82, -0.4), (0.78, 0.25 - tip), (0.4, -0.75)]),
        (fur, blob(0, 0, 1.1, 0.95)),  # head
        (rng.choice([fur, light]), blob(0.12, 0.55, 0.35, 0.36)),  # muzzle
        (dark, blob(0.45, -0.1, 0.27, wide + 0.03)),  # eye
        (eyes, blob(0.45, -0.1, 0.24, wide)),
        ((15, 15, 15), blob(0.45, -0.1, 0.09, wide * 0.9)),
        ((255, 255, 255), blob(0.49, -0.18, 0.05, 0.05)),
        (pink, [(0, 0.3), (0.13, 0.3), (0, 0.45)]),  # nose
        (dark, [(0, 0.45), (0.03, 0.55), (0.22, 0.62), (0.2, 0.66), (0, 0.58)]),  # mouth
    )
    image = Image.new("RGB", (128, 128), tuple(rng.randint(60, 230) for _ in range(3)))
    x, y, r = 64 + rng.uniform(-8, 8), 68 + rng.uniform(-6, 6), rng.uniform(34, 42)
    for colour, points in parts:
        for side in (-1, 1):  # both sides alike
            at_side = [(x + side * px * r, y + py * r) for px, py in points]
            ImageDraw.Draw(image).polygon(at_side, tuple(colour))
    return image.resize((size, size), Image.LANCZOS)  # drawn large, then shrunk: smooth edges


def draw_batch(pictures, settings, step, device):
    """Everything random in one training step, as a function of (seed, step) and nothing else.

    So a run that was stopped and started again gives the same result as one that never was.
    Returns x0 (B, 3, H, W) in [-1, 1], t (B,), and eps shaped like x0.
    """
    set_seed(device, settings.seed, step)
    b, timesteps = settings.batch, settings.timesteps
    index, flip = torch.randint(len(pictures), (b,)), torch.rand(b) < 0.5
    # NOTE the paper draws each t by itself. We draw one and spread the batch evenly over all t from
    # there: each t is as likely as before, but no batch is all noise or all picture (Kingma et al.
    # 2021, arXiv:2107.00630, appendix I).
    t = ((torch.rand(1) + torch.arange(b)) / b * timesteps).long() % timesteps  # one per b-th part
    eps = torch.randn(b, 3, *pictures.shape[1:3], device=device)
    index, flip, t, eps = (part[RANK::WORLD] for part in (index, flip, t, eps))  # our share
    x0 = pictures[index].to(device)  # (B, H, W, 3), uint8
    x0 = torch.where(flip.to(device)[:, None, None, None], x0.flip(2), x0)
    set_seed(device, settings.seed, step, RANK)  # from here on, what dropout draws
    return spread(as_floats(x0), t.to(device), eps)


# ------------------------------------------------------------------------------------------------
# Diffusion
#
# The heart of it, and it is only arithmetic: tables with one number per t, and five formulas.
#
# The way in, called q, has nothing to learn. One step is x_t = √(1−β_t)·x_{t−1} + √β_t·ε: the
# picture shrinks a little, so that with the noise its variance does not grow beyond 1. Sums of
# Gaussians are Gaussian, so many steps are one jump, with ᾱ_t, the product of all (1−β) so far, in
# place of 1−β:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε  (Eq. 4, q_sample).
#
# The way back is Bayes' rule: if x₀ were known, what x_{t−1} was, given x_t, would be a Gaussian
# that can be written down (q_posterior; "posterior" is what one believes after having seen). We do
# not know x₀, so a network guesses. Given x_t, guessing the noise or the picture is the same, as
# Eq. 4 gives one from the other; the paper found that a network asked for the noise draws better.
# It is trained on squared error, so its guess is the mean of all that x_t could have come from (no
# other answer is as near to all of them): sharp when there is little noise, a blur when there is
# much. That is why one guess is not enough, and we go in steps.
# ------------------------------------------------------------------------------------------------


def at(table, t):
    """table[t], shaped to multiply pictures: (T,), (B,) -> (B, 1, 1, 1)."""
    return table[t].view(-1, 1, 1, 1)


class Diffusion:
    """The noise schedule and the formulas of the paper.

    timesteps: T. schedule: "linear" (the paper) or "cosine" (Nichol & Dhariwal 2021). prediction:
    what the network's output means, "eps" (the paper) or "v" (see `target`). min_snr: limit of the
    loss weight, 0 for none. The defaults here are the paper's; `make_diffusion` passes those of
    Settings. The tables are made in float64 on the CPU; `to(device)` brings them to the device in
    float32. In the formulas t is (B,), pictures are (B, 3, H, W).
    """

    def __init__(self, timesteps=1000, schedule="linear", prediction="eps", min_snr=0.0):
        self.timesteps, self.prediction = timesteps, prediction
        if schedule == "linear":  # Section 4: from almost no noise a step to 2 % a step
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:
            # NOTE the paper's line leaves ᾱ = 0.003 at t = 750: a small picture is gone by then,
            # and the last quarter teaches nothing. Here ᾱ follows cos², and β is read off it
            # (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17).
            u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        self.betas = betas
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, 0)  # ᾱ_t = Π (1 − β_s)
        self.signal, self.noise = abar.sqrt(), (1 - abar).sqrt()  # x_t = signal·x₀ + noise·ε
        self.log_noise = (self.noise / self.signal).log()  # the noise in units of the picture
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])  # ᾱ_{t−1}; before step 0: no noise

        # Eq. 7: q(x_{t−1} | x_t, x₀) has mean coef1·x₀ + coef2·x_t and this variance, β̃_t.
        self.posterior_mean_coef1 = betas * abar_prev.sqrt() / (1 - abar)
        self.posterior_mean_coef2 = (1 - abar_prev) * (1 - betas).sqrt() / (1 - abar)
        self.posterior_variance = betas * (1 - abar_prev) / (1 - abar)
        # β̃_0 is 0, whose logarithm is −∞: repeat the next one, as Ho's code does.
        clipped = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]])
        self.posterior_log_variance_clipped = clipped.log()

        # One weight per t; 1 everywhere is the paper's plain squared error (Eq. 14).
        # NOTE min-SNR (Hang et al. 2023, arXiv:2303.09556): the squared error of x₀ gets as weight
        # the signal-to-noise ratio ᾱ/(1−ᾱ), but at most min_snr, so that the network is not busy
        # with the faintest noise, which hardly matters to the eye. What we have is the error of the
        # guess, by Eq. 4 per_x0 times as large as that of x₀: so the weight is divided by per_x0.
        snr = abar / (1 - abar)
        per_x0 = snr if prediction == "eps" else snr + 1
        self.loss_weight = snr.clamp(max=min_snr) / per_x0 if min_snr else torch.ones_like(snr)

    def to(self, device):
        """All tables as float32 on `device`. Returns self."""
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.float().to(device))
        return self

    def q_sample(self, x0, t, eps):
        """Jump straight to noise level t:  x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε   (Eq. 4)"""
        return at(self.signal, t) * x0 + at(self.noise, t) * eps

    def predict_x0(self, x_t, t, eps):
        """Eq. 4 solved for the picture:  x̂₀, a guess of x₀, is (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t"""
        return (x_t - at(self.noise, t) * eps) / at(self.signal, t)

    def q_posterior(self, x0, x_t, t):
        """One step back if x₀ is known (Eq. 6 and 7) -> mean, variance, clipped log variance.

        What the paper's sampler does with the guessed x₀; ours, step_back, contains it.
        """
        mean = at(self.posterior_mean_coef1, t) * x0 + at(self.posterior_mean_coef2, t) * x_t
        variance = at(self.posterior_variance, t)
        return mean, variance, at(self.posterior_log_variance_clipped, t)

    # NOTE the paper's network guesses ε. Near pure noise that is too easy, as the answer is the
    # input, and the picture is then got by dividing by √ᾱ_t, almost 0, which magnifies every error.
    # Ours guesses a mixture of noise and picture (Salimans & Ho 2022, arXiv:2202.00512, appendix
    # D):
    #
    #     v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀        and back:  x₀ = √ᾱ_t·x_t − √(1−ᾱ_t)·v
    #
    # The squares of √ᾱ_t and √(1−ᾱ_t) sum to 1: they are cosine and sine of an angle, and (x_t, v)
    # is (x₀, ε) turned by it. Turning back divides by nothing. On the cats at 64 px, 18 minutes on
    # one core each (16,000 pictures, 256 samples, 30 calls) eps on the linear schedule reached a
    # Frechet distance of 515 and a mean SWD of 61, v with cosine and min-SNR 71 and 54.

    def target(self, x0, t, eps):
        """What the network should answer: eps, or v."""
        if self.prediction == "eps":
            return eps
        return at(self.signal, t) * eps - at(self.noise, t) * x0

    def x0_from(self, output, x_t, t):
        """The picture that the network's answer implies."""
        if self.prediction == "eps":
            return self.predict_x0(x_t, t, output)
        return at(self.signal, t) * x_t - at(self.noise, t) * output

    def losses(self, model, x0, t, eps):
        """The weighted squared error of each picture, (B,)."""
        output = model(self.q_sample(x0, t, eps), t)
        error = (output - self.target(x0, t, eps)).square().mean((1, 2, 3))
        return self.loss_weight[t] * error

    def loss(self, model, x0, t, eps):
        """Their mean. For "eps" without weights it is Eq. 14: the mean of (ε − ε_θ(x_t, t))²"""
        return self.losses(model, x0, t, eps).mean()


# ------------------------------------------------------------------------------------------------
# Network
#
# The paper's U-Net. A picture goes down a staircase of resolutions, each half the one before, and
# up again; on the way up every floor also sees what it looked like on the way down. So the bottom
# decides where the cat is, and the top still knows each hair. The noise level t is told to
# every block. Ours has fewer channels than the paper's; built with the paper's numbers and given
# the weights of a published network, it computes what that one computes. (GroupNorm and upsample
# are torch's own, made fast: see "Where to compute".)
# ------------------------------------------------------------------------------------------------


def time_embedding(t, channels):
    """Numbers 0..T-1 as waves of different lengths (Vaswani et al. 2017): (B,) -> (B, channels).

    A network reads one number in the thousands badly, and many numbers in [-1, 1] well.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps)  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], 1)


def norm(channels):
    """The paper's 32 groups, from its 128 channels up.

    NOTE below that, groups keep 4 channels, as the paper's smallest do. 32 groups of 32 channels
    would be one channel each: normalising would erase each map's mean, and so the brightness.
    """
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut around them; t comes in between; attention if asked."""

    def __init__(self, c_in, c_out, c_time, dropout=0.0, attention=False):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, c_out)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, time):  # (B, c_in, H, W), (B, c_time) -> (B, c_out, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.shortcut(x) + h)


class Attention(nn.Module):
    """Lets every pixel look at every other: how the left eye learns the colour of the right one.

    Single-head self-attention. Only for small maps, as its cost grows with the fourth power of
    the side.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): pixels as a list
        q, k, v = self.q(y), self.k(y), self.v(y)
        weights = (q * c**-0.5 @ k.transpose(1, 2)).softmax(-1)  # (B, HW, HW): who looks at whom
        y = self.out(weights.to(v.dtype) @ v)
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Conv2d):
    """Half the side. Pads right and bottom only, as the paper's code does. (It ignores time: all
    layers are called alike.)"""

    def forward(self, x, time):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the side: repeat, then smooth. (Transposed convolutions leave checkerboards.)"""

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
        # that each block begins by doing nothing, and the whole network by guessing zero.
        for name, m in self.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                ends = name.endswith(("conv2", "out"))
                nn.init.xavier_uniform_(m.weight, gain=float(not ends))
                nn.init.zeros_(m.bias)

    def forward(self, x, t):
        time = self.time(time_embedding(t, self.channels))
        x = self.conv_in(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                x = torch.cat([x, skips.pop()], 1)
            x = layer(x, time)
        return self.conv_out(F.silu(self.norm_out(x))).float()


# ------------------------------------------------------------------------------------------------
# Averaging
#
# The weights of the last step still jitter from batch to batch. Their running average draws much
# better pictures, and costs one multiply-add a step. The paper's decay of 0.9999 remembers some
# 10,000 steps, though, and early on that would be mostly the random start: sampling from such an
# average gives noise, and a good many people have taken that for a bug in their sampler. So the
# memory grows with the run: after n steps it is about n/9 steps long.
# ------------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a network's parameters; `.model` is the averaged network."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model, n):
        """average ← d·average + (1−d)·weights, with d = min(decay, (1+n)/(10+n)); n = 0, 1, ..."""
        share = 1 - min(self.decay, (1 + n) / (10 + n))
        share = torch.tensor(share).to(next(model.parameters()).device)  # why: see make_adam
        for mean, new in zip(self.model.parameters(), model.parameters()):
            mean.lerp_(new.detach(), share)


# ------------------------------------------------------------------------------------------------
# Sampling
#
# Now backwards, from noise to cat. At each step the network looks at x_t and says which clean
# picture it sees in there; early on that is a grey blur, the mean of all cats. We do not jump
# there. We go to the next lower noise level on the way, look again, and see a little more.
#
# The paper's way (Algorithm 2, called ancestral sampling) takes each of the 1000 steps and adds a
# little fresh noise after each: only for small steps is the way back nearly Gaussian. DDIM (Song et
# al. 2021, arXiv:2010.02502) adds none. Then each picture follows a smooth curve, and a smooth
# curve can be followed in large steps: 50 do. Both are one formula, with η for the share of the
# paper's fresh noise: η = 1 is the paper's way, η = 0 is DDIM.
#
# Fewer still do if we look ahead. DDIM holds the guessed x₀ fixed until the next look, although it
# is on the move. DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, the multistep method of order two)
# takes the last two guesses, draws a line through them, and uses what the line says for the middle
# of the step: it leans forward. That is two lines of code, and our default: 25 calls.
# ------------------------------------------------------------------------------------------------


def ladder(diffusion, steps):
    """The noise levels t that `steps` network calls visit: T-1 first, then ever lower.

    NOTE most programs take every T/steps-th t. Ours are T-1 and then even steps of log_noise, from
    noise 80 times as strong as the picture to a hundredth of it (Karras et al. 2022,
    arXiv:2206.00364, go over the like): it falls by the same factor each time. Of 50 even in t, the
    cosine schedule has two where the mean colour of a picture is decided (t above 970) and only one
    below 30; of ours, seven and ten. Each large step of DDIM errs towards grey: with a perfect
    network, pictures of Gaussian noise lose 16 % of the contrast of their mean colour on levels
    even in t, and 6 % on these (the tests work it out). On our cats, 256 samples of one checkpoint:
    Frechet distance 27.6 and 26.8.
    """
    noise = diffusion.log_noise.cpu().double()  # (T,), rising
    wanted = torch.linspace(math.log(80), math.log(0.01), steps, dtype=torch.float64)
    rungs = [diffusion.timesteps - 1]
    for k, t in enumerate((noise - wanted[:, None]).abs().argmin(1).tolist()[1:], 1):
        rungs.append(max(min(t, rungs[-1] - 1), steps - 1 - k))  # never the same t twice
    return rungs


# NOTE DPM-Solver++ leans forward (looks along that line) at every step. At the end, where the
# picture stands and only its grain is left to decide, that magnifies the network's errors: after 20
# minutes of training, 15 calls, FD 63 with leaning to the end, 24 when it stops here, 43 for DDIM
# in 50.
LEAN_ABOVE = 0.2  # noise in units of the picture


@torch.no_grad()
def sample(model, diffusion, n=8, sampler="dpm", steps=25, eta=0.0, seed=0, first=0, start=None):
    """Draw pictures first .. first+n-1 of `seed`; yields (t, x_t, x0) once per network call.

    t: int, T-1 at first. x_t and x0: (n, 3, size, size), the noisy picture and the network's guess
    of the clean one; the last x0 is the result.
    sampler: "dpm"; "ddim"; "ddpm", which is eta = 1; "ddpm-large", its other variance.
    start: (t, x_t) to begin from instead of pure noise.
    """
    device, rungs = next(model.parameters()).device, ladder(diffusion, steps)
    if start:
        rungs = [start[0], *(t for t in rungs if t < start[0])]
    level = diffusion.log_noise.cpu().double()[rungs]
    # Each picture has its own source of noise, and on the CPU: so it is the same picture, up to
    # rounding, on another device and in another batch.
    seeds = (random.Random(repr((seed, i))).getrandbits(32) for i in range(first, first + n))
    sources = [torch.Generator().manual_seed(number) for number in seeds]

    def fresh_noise():
        shape = 3, model.size, model.size
        return torch.stack([torch.randn(shape, generator=g) for g in sources]).to(device)

    x_t, before = start[1] if start else fresh_noise(), None
    for k, t in enumerate(rungs):
        now = torch.full((n,), t).to(device)  # made there, a TPU would compile each t anew
        with autocast(device):
            output = model(x_t, now)
        # No picture has values outside [-1, 1], so clipping can only make the guess better.
        x0 = diffusion.x0_from(output, x_t, now).clamp(-1, 1)
        yield t, x_t, x0
        if k + 1 < len(rungs):  # the last guess is not made noisy again: it is the picture
            then, guess = torch.full((n,), rungs[k + 1]).to(device), x0
            if sampler == "dpm" and before is not None and level[k + 1].exp() > LEAN_ABOVE:
                lean = (level[k + 1] - level[k]) / (level[k] - level[k - 1]) / 2  # half a step
                guess = x0 + (x0 - before) * lean.float().to(device)
            x_t = step_back(diffusion, x_t, guess, now, then, sampler, eta, fresh_noise)
            before = x0
        end_of_step(device)


def step_back(diffusion, x_t, x0, t, t_next, sampler, eta, fresh_noise):
    """From noise level t down to t_next, given a guess of x0 (Song et al. 2021, Eq. 12 and 16).

    ᾱ' is ᾱ at t_next; ε is what x_t holds beside the guessed x₀:

        σ² = η² · (1−ᾱ')/(1−ᾱ) · (1−ᾱ/ᾱ')
        x' = √ᾱ'·x₀ + √(1−ᾱ'−σ²)·ε + σ·z,    z fresh noise

    For η = 1 and t_next = t − 1, σ² is β̃_t, and the first two terms are the mean of Eq. 7 written
    differently: test_catdiffusion.py shows it. "ddpm-large" takes noise of variance β_t = 1−ᾱ/ᾱ'
    instead, the paper's other choice, which is right only if no step is left out.
    """
    abar, abar_next = at(diffusion.alphas_cumprod, t), at(diffusion.alphas_cumprod, t_next)
    eta = {"dpm": 0.0, "ddim": eta}.get(sampler, 1.0)
    beta = 1 - abar / abar_next
    sigma2 = eta**2 * (1 - abar_next) / (1 - abar) * beta
    eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    x = abar_next.sqrt() * x0 + (1 - abar_next - sigma2).clamp(min=0).sqrt() * eps
    noise = beta if sampler == "ddpm-large" else sigma2
    return x + noise.sqrt() * fresh_noise() if eta else x


# ------------------------------------------------------------------------------------------------
# Pictures
#
# From tensors to something to look at: single pictures, a sheet of them, an animation, the curve of
# the loss. All of it is Pillow.
# ------------------------------------------------------------------------------------------------


def to_images(x):
    """Pictures (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    x = ((x.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    size = x.shape[2], x.shape[1]
    return [Image.frombytes("RGB", size, bytes(picture.flatten().tolist())) for picture in x]


def make_grid(images, columns=None, gap=2):
    """Equally large PIL images -> one image of them all, row by row, about square."""
    columns = columns or math.ceil(len(images) ** 0.5)
    w, h = images[0].width + gap, images[0].height + gap
    sheet = Image.new("RGB", (columns * w + gap, -(-len(images) // columns) * h + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * w, gap + i // columns * h))
    return sheet


def film(frames, milliseconds=80):
    """What to give Image.save, beside the first frame, for a GIF that stays on the last."""
    times = [milliseconds] * (len(frames) - 1) + [3000]
    return {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}


def save_new(image, path, **how):
    """Write an image, never over a different one: then its name gets a number. Returns the path."""
    buffer, taken, n = io.BytesIO(), path, 1
    image.save(buffer, path.suffix[1:], **how)
    while path.exists() and path.read_bytes() != buffer.getvalue():
        n, path = n + 1, taken.with_stem(f"{taken.stem}-{n + 1}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


def draw_curve(records, path):
    """The loss over the steps on a logarithmic scale, as a PNG; thin lines by quarter of t."""
    if not records:
        return
    width, height = 640, 360
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    lines = [*zip(*(r["loss_by_quarter"] for r in records)), [r["loss"] for r in records]]
    low, high = (pick(v or 1 for line in lines for v in line) for pick in (min, max))
    text = f"loss {low:.2g} to {high:.2g}, steps {records[0]['step']} to {records[-1]['step']}"
    pen.text((width - 300, 4), text, "black")
    for k, (line, colour) in enumerate(zip(lines, ("blue", "green", "orange", "red", "black"))):
        # a loss of 0, of a quarter that had no pictures, has no logarithm
        heights = (math.log(high / (v or 1)) / math.log(1.01 * high / low) * height for v in line)
        points = [(i / len(line) * width, 20 + 0.9 * y) for i, y in enumerate(heights)]
        pen.line(points, colour, 3 if k == 4 else 1)
        name = "all t" if k == 4 else f"quarter {k + 1} of t"
        pen.text((width - 90, 20 + 14 * k), name, colour)
    image.save(path)


# ------------------------------------------------------------------------------------------------
# Checkpoint
#
# One file holds all there is to a run. It is written beside the old one, forced to the disk, and
# only then given the old one's name, which either happens or does not: whatever stops us on the
# way, a whole checkpoint is there. Loading allows tensors and plain values only, so a checkpoint
# from a stranger cannot run code.
# ------------------------------------------------------------------------------------------------

FORMAT = "catdiffusion 1"


def each_tensor(value, change):
    """The same nest of dicts and lists (and tuples, as lists), with every tensor in it changed."""
    if isinstance(value, dict):
        return {k: each_tensor(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [each_tensor(v, change) for v in value]
    return change(value) if torch.is_tensor(value) else value


def sound(tensor):
    """A tensor from a file, if it is plain: finite floats, as many as the file has bytes for."""
    plain = tensor.layout == torch.strided and tensor.is_floating_point() and tensor.is_cpu
    whole = plain and tensor.nbytes <= tensor.untyped_storage().nbytes()
    if not (whole and tensor.isfinite().all()):
        raise ValueError("odd numbers")
    return tensor


def save_checkpoint(path, state):
    """Write state (settings, step, seconds, log, model, ema, optimizer) to path, all or nothing."""
    buffer = io.BytesIO()  # torch, writing to a full disk itself, may end the whole process
    torch.save({"format": FORMAT, **each_tensor(state, lambda t: t.detach().cpu())}, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def load_tensors(path):
    """torch.load without code, for a file whose checksums are right and that is not compressed, for
    a small one could unpack to fill the memory."""
    with zipfile.ZipFile(path) as parts:
        if any(part.compress_type for part in parts.infolist()) or parts.testzip():
            raise ValueError("compressed or damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path):
    """What save_checkpoint wrote, tensors on the CPU, "settings" as Settings.

    Raises Failure if there is no such file, or it is damaged or something else.
    """
    path = Path(path)
    if not (path.is_file() or path.is_dir()):
        raise Failure(f"{path}: no such checkpoint; make one: python catdiffusion.py train")
    try:
        state = each_tensor(read_folder(path) if path.is_dir() else load_tensors(path), sound)
        if state["format"] != FORMAT:
            raise ValueError("made by another program or version")
        state["settings"] = complete(Settings(**state["settings"]))
        state["step"], state["seconds"] = int(state["step"]), float(state["seconds"])
        if not (state["step"] >= 0 and 0 <= state["seconds"] < 1e10):
            raise ValueError("odd step or time")
        state["log"] = [dict(record) for record in state.get("log", [])]
        return state
    except Exception as e:  # a damaged file can raise anything
        raise Failure(f"{path}: not a whole checkpoint ({brief(e)})") from None


def load_parts(parts, state, path, **how):
    """state[name] into each part (a network, an optimiser). Raises Failure if one does not fit."""
    try:
        for name, part in parts.items():
            if name == "optimizer":  # its averages are the run's, its kind is the device's
                state[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state[name], **how)
            for p, average in part.state.items() if name == "optimizer" else ():
                if not average["exp_avg"].shape == average["exp_avg_sq"].shape == p.shape:
                    raise ValueError("wrong shape")  # torch does not look
    except Exception as e:
        raise Failure(f"{path}: its weights do not fit its settings ({brief(e)})") from None


def make_unet(s):
    """The network that the settings `s` describe."""
    return UNet(s.size, s.channels, s.mults, s.blocks, s.attention, s.dropout)


def make_diffusion(s):
    """The diffusion that the settings `s` describe."""
    return Diffusion(s.timesteps, s.schedule, s.prediction, s.min_snr)


def load_checkpoint(path, device="cpu"):
    """A trained network, ready for sample(): model with the averaged weights, diffusion, step.

    path: a file that train wrote, or a folder in the layout of diffusers.
    """
    state = read_checkpoint(path)
    with torch.device("meta"):  # a network without memory, until weights that fit bring theirs
        model = make_unet(state["settings"])
    load_parts({"ema": model}, state, path, assign=True)
    diffusion, device = make_diffusion(state["settings"]), torch.device(device)
    model = to_device(model.float(), device).eval().requires_grad_(False)
    return model, diffusion.to(device), state["step"]


# The rest of this part, which you may skip, is for the paper's own networks. They live on in
# another layout: a folder with config.json and the weights, under the names of Hugging Face's
# diffusers library (google/ddpm-ema-cat-256 and its family). Only the names differ from ours.
THEIR_WORDS = {
    "time_embedding.linear_1": "time.0", "time_embedding.linear_2": "time.2",
    "conv_norm_out": "norm_out", "time_emb_proj": "time", "conv_shortcut": "shortcut",
    "group_norm": "norm", "to_out.0": "out", "to_q": "q", "to_k": "k", "to_v": "v",
    "query": "q", "key": "k", "value": "v", "proj_attn": "out",  # in old files
}  # fmt: skip


THEIR_CONFIG = {  # what makes a UNet2DModel the paper's network
    "_class_name": "UNet2DModel", "act_fn": "silu", "flip_sin_to_cos": False, "freq_shift": 1,
    "norm_eps": 1e-6, "downsample_padding": 0, "attention_head_dim": None, "norm_num_groups": 32,
}  # fmt: skip


def our_name(name, blocks):
    """A weight's name in diffusers -> its name in our UNet with that many blocks a floor."""
    for theirs, ours in THEIR_WORDS.items():
        name = name.replace(theirs, ours)
    if not (found := re.fullmatch(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.*)", name)):
        return name
    way, floor, kind, i, rest = found.groups()
    rest = {"attentions": f"attention.{rest}"}.get(kind, rest.removeprefix("conv."))
    per_floor = {"down": blocks + 1, "mid": 0, "up": blocks + 2}[way]
    i = per_floor - 1 if kind.endswith("samplers") else int(i)
    return f"{way.replace('mid', 'middle')}.{int(floor or 0) * per_floor + i}.{rest}"


def read_safetensors(path):
    """The tensors in a .safetensors file: the length of a JSON header, the header, raw numbers."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.half, "BF16": torch.bfloat16}
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
    if start > 10**7:
        raise ValueError("header too long")
    tensors = json.loads(bytes(data[8:start].tolist()))
    tensors.pop("__metadata__", None)
    if sum(abs(a["data_offsets"][1] - a["data_offsets"][0]) for a in tensors.values()) > len(data):
        raise ValueError("tensors overlap")
    for name, about in tensors.items():
        first, last = (start + offset for offset in about["data_offsets"])
        tensors[name] = data[first:last].clone().view(kinds[about["dtype"]]).view(about["shape"])
    return tensors


def read_folder(folder):
    """What load_tensors gives, from a folder in the layout of diffusers' UNet2DModel."""
    if not (folder / "config.json").is_file():  # a named pipe would hang us
        raise ValueError("no config.json")
    c = json.loads((folder / "config.json").read_text())
    widths, size, blocks = c["block_out_channels"], c["sample_size"], c["layers_per_block"]
    kinds = [kind.replace("DownBlock2D", "") for kind in c["down_block_types"]]
    odd = [key for key, value in THEIR_CONFIG.items() if c[key] != value]
    if odd or min(widths) < 128 or {*kinds} - {"", "Attn"}:
        raise ValueError(f"not the paper's kind of network: {', '.join(odd) or 'blocks'}")
    settings = {"schedule": "linear", "prediction": "eps", "size": size, "blocks": blocks}
    settings |= {"channels": widths[0], "mults": [width // widths[0] for width in widths]}
    settings["attention"] = [size >> floor for floor, kind in enumerate(kinds) if kind]
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = read_safetensors(path) if path.exists() else load_tensors(path.with_suffix(".bin"))
    weights = {our_name(name, blocks): value for name, value in weights.items()}
    return {"format": FORMAT, "settings": settings, "ema": weights, "step": 0, "seconds": 0.0}


# ------------------------------------------------------------------------------------------------
# Train
#
# Algorithm 1 of the paper, and the loop is as short as it looks there: draw pictures, noise levels
# and noise; let the network guess; step against the gradient of the squared error. What stands
# around it keeps the work safe and reports progress.
# ------------------------------------------------------------------------------------------------

REPORT = 50  # steps between two status lines


@contextlib.contextmanager
def note_signals():
    """Inside, Ctrl-C, SIGTERM and a closed terminal do not kill: their number goes into a list."""
    noted, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # unless nohup has it ignored
    old = [signal.signal(number, lambda number, _: noted.append(number)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, old):
            signal.signal(number, handler)


def train_step(model, diffusion, optimizer, lr, batch, accum, tally):
    """One round of Algorithm 1: the gradient of the loss on `batch` (x0, t, eps), and Adam's step.

    tally (3, 4) collects on the device, so that nobody waits for it: losses by quarter of t,
    pictures by quarter of t, and steps skipped: in a row, in all (two cells are not used).
    """
    for x0, t, eps in zip(*(part.chunk(accum) for part in batch), strict=True):
        with autocast(x0.device):
            losses = diffusion.losses(model, x0, t, eps)  # (B / accum,)
        known = 1 + 0 * losses.detach()  # 1; NaN for NaN and ∞, whose gradient then is NaN, too
        ((losses * known).sum() / len(batch[0])).backward()
        quarter = F.one_hot(t * 4 // diffusion.timesteps, 4).float()  # (B / accum, 4)
        tally[:2] += torch.stack([losses.detach(), known]).nan_to_num(0, 0, 0) @ quarter

    # One bad batch must not throw the network off its path: the gradient is cut to length 1, and if
    # it is not even a number, gradient and learning rate are set to 0, and the weights stay.
    good = nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    for parameter in model.parameters():
        parameter.grad.nan_to_num_(0, 0, 0)
    optimizer.param_groups[0]["lr"] = torch.tensor(lr).to(good.device) * good
    optimizer.step()
    optimizer.zero_grad()
    bad = 1 - good.float()
    tally[2, :2] = torch.stack([(tally[2, 0] + 1) * bad, tally[2, 1] + bad])


def reconstruct(model, diffusion, x0):
    """What the network makes of a picture x0 (1, 3, H, W), the more of it is drowned in noise.

    A sheet of three rows, each with x0 in front: x_t at 1, 3, 5, 7 and 9 tenths of T; the network's
    guess x̂₀ at one look; and the picture at the end of the whole way back from there.
    """
    t = [diffusion.timesteps * k // 10 for k in (1, 3, 5, 7, 9)]
    eps = torch.randn(len(t), *x0.shape[1:], generator=torch.Generator().manual_seed(0))
    x_t = diffusion.q_sample(x0, torch.tensor(t).to(x0.device), eps.to(x0.device))
    ways = [list(sample(model, diffusion, 1, start=pair)) for pair in zip(t, x_t.split(1))]
    rows = x_t, *(torch.cat([way[look][2] for way in ways]) for look in (0, -1))
    return make_grid(to_images(torch.cat([part for row in rows for part in (x0, row)])), len(t) + 1)


def preview(model, diffusion, pictures, run, step):
    """Draw the same 16 pictures each time, and save what shows how far the network has come:

    previews/STEP.png, all of those as a film, progress.gif, and reconstruction.png. Returns what to
    compare with the data; tinted or grey samples show there before the eye sees them.
    """
    for _, _, x0 in sample(model, diffusion, 16):
        pass  # only the last x0 is wanted
    folder = run / "previews"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{step:06}.png") as file:
        make_grid(to_images(x0)).save(file, "PNG")
    sheets = sorted(folder.glob("*.png"), key=lambda sheet: (len(sheet.name), sheet.name))
    frames = [Image.open(sheet) for sheet in sheets[-1 :: -(len(sheets) // 100 + 1)]][::-1]
    frames[0].save(run / "progress.gif", **film(frames, 200))
    data = as_floats(pictures[:: len(pictures) // 500 + 1])
    reconstruct(model, diffusion, data[:1].to(x0.device)).save(run / "reconstruction.png")
    (mean, std), (data_mean, data_std) = ((x.mean().item(), x.std().item()) for x in (x0, data))
    numbers = {"sample_mean": mean, "data_mean": data_mean, "sample_std": std, "data_std": data_std}
    numbers["apart"] = abs(mean - data_mean) + abs(std - data_std)
    return {name: round(number, 3) for name, number in numbers.items()}


def look_back(log, run, step, numbers):
    """Add what preview() measured to the log, draw the loss so far; tell if the samples drift."""
    before = [record["apart"] for record in log if "apart" in record]
    log.append({"step": step, **numbers})
    if before and numbers["apart"] > max(0.2, 1.1 * before[-1]):
        show(f"note: brightness and contrast drift from the data's: {log[-1]}")
    draw_curve([record for record in log if "loss" in record], run / "loss.png")


def report(s, step, tally, speed, seconds):
    """Fetch the tally from the device, show a status line. Returns what goes into the log.

    Raises Failure if all goes wrong.
    """
    losses, counts, (in_a_row, skipped, *_) = tally.tolist()
    if in_a_row >= REPORT:
        text = f"the loss was not a number {REPORT} times in a row; what was saved before is in"
        raise Failure(f"{text} {Path(s.run, 'checkpoint.pt')}; go on with a smaller --lr")
    loss = sum(losses) / max(1, sum(counts))
    quarters = [a / max(1, b) for a, b in zip(losses, counts)]
    text = f"{step / s.steps:4.0%}  step {step}  loss {loss:.4f}"
    text += f"  {skipped:.0f} skipped" * (skipped > 0)
    left = (s.steps - step) * s.batch / speed / 60
    show(f"{text}  {speed:.0f} pictures/s  {left:.0f} min left", last=step == s.steps)
    record = {"step": step, "minutes": round(seconds / 60, 2), "loss": loss}
    record |= {"loss_by_quarter": quarters, "pictures_per_second": round(speed, 1)}
    return record | {"skipped": int(skipped)}


def differences(old, new):
    """The settings in which a run that goes on would not be the same run."""
    names = [f.name for f in fields(Settings) if not f.metadata.get("free")]
    pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return "; ".join(f"--{name} {a}, not {b}" for name, a, b in pairs if a != b)


def train(settings):
    """Train as `settings` say, from their checkpoint if there is one. Returns the exit code."""
    s, device, run = complete(settings), pick_device(settings.device), Path(settings.run)
    if s.batch % (s.accum * WORLD):
        raise Failure(f"--accum {s.accum} times {WORLD} processes: must divide --batch {s.batch}")
    path, saved = run / "checkpoint.pt", {"step": 0, "seconds": 0.0, "log": []}
    if path.exists():
        saved = read_checkpoint(path)
        if other := differences(saved["settings"], s):
            raise Failure(f"{path} was made with {other}; use that, or --run OTHER to begin anew")
    step = saved["step"]
    if step >= s.steps:
        show(f"{path} has all its {step} steps; to go on, give --steps a larger number")
        return 0
    cache = cache_pictures(s.data, s.size, run) if RANK == 0 else None
    join_team(device)  # the others wait here
    cache = cache or cache_pictures(s.data, s.size, run)
    if saved.get("pictures", cache.name) != cache.name:
        show(f"note: the pictures are not those that {path} was made with; it goes on with these")
    pictures = map_pictures(cache, s.size)
    different = pictures[:2000].flatten(1).sum(1).unique().numel()  # by their sums: a guess
    if different < 900:
        show(f"note: {different} pictures are few; below 1,000 or so a network repeats them")

    set_seed(device, s.seed)
    model, diffusion = to_device(make_unet(s), device), make_diffusion(s).to(device)
    ema, optimizer = EMA(model, s.ema), make_adam(model.parameters(), s.lr, device)
    if s.compile:
        model.compile()
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer}
    if step:
        load_parts(parts, saved, path)
    team = in_team(model)
    million = sum(p.numel() for p in model.parameters()) / 1e6
    text = f"{len(pictures)} pictures of {s.size} px, {million:.1f} M parameters, on {device}"
    show(f"{text}, step {step} of {s.steps}; checkpoint, previews and log go to {run}")
    log, begun = saved["log"], time.perf_counter() - saved["seconds"]

    def seconds():  # of training, in all runs together
        return time.perf_counter() - begun

    def save(and_preview, last=False):
        if RANK:
            return  # number 0 does it
        try:
            if and_preview:
                look_back(log, run, step, preview(ema.model, diffusion, pictures, run, step))
            (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        except Exception as e:  # no room on the disk or in memory, say: the checkpoint matters more
            show(f"no preview or log: {brief(e)}")
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"settings": asdict(s), "step": step, "seconds": seconds(), "log": log}
        try:
            save_checkpoint(path, state | {"pictures": cache.name})
        except (OSError, RuntimeError, MemoryError) as e:  # a full disk: someone may make room
            if last:
                raise Failure(f"NOT SAVED: {brief(e)}; {path} is as it was before") from None
            show(f"NOT SAVED: {brief(e)}; the run goes on, and tries again later")

    tally, since = torch.zeros(3, 4, device=device), (step, seconds())
    due = seconds() + 60 * min(1, s.every)  # often at first: after 1, 2, 4, ... minutes
    with note_signals() as signals:  # so that a step is always finished
        while step < s.steps and not add_up(torch.tensor(len(signals))):
            batch = draw_batch(pictures, s, step, device)
            # NOTE the paper keeps its rate. Ours is small while Adam's averages are young, and in
            # the last fifth of the steps it falls to 0, so that the network settles. Our cats were
            # at FD 31 after 13,400 steps at 1e-3, at 24 after 1,250 more at 2e-4, at 11 after 6,400
            # more, the last half of them at 6e-5.
            lr = s.lr * min(1, (step + 1) / s.warmup, (s.steps - step) / s.steps * 5)
            train_step(team, diffusion, optimizer, lr, batch, s.accum, tally)
            ema.update(model, step)
            step += 1
            end_of_step(device)
            if step % REPORT == 0 or step == s.steps:
                add_up(tally[:2])
                speed = (step - since[0]) * s.batch / (seconds() - since[1])
                log.append(report(s, step, tally, speed, seconds()))
                tally[:2], since = 0, (step, seconds())
                with contextlib.suppress(OSError, RuntimeError):  # if it is gone, keep what we have
                    pictures = map_pictures(cache, s.size)  # anew: frees what was loaded so far
            if seconds() >= due and step < s.steps:
                save(and_preview=True)
                due, since = seconds() + min(60 * s.every, max(60, seconds())), (step, seconds())
        save(and_preview=step == s.steps, last=True)
    if step < s.steps:
        show(f"stopped and saved at step {step}; the same command goes on from there")
        return 128 + (signals or [signal.SIGTERM])[0]  # 130 for Ctrl-C, 143 for SIGTERM
    again = "" if s.run == Settings.run else f" --checkpoint {path}"
    show(f"done in {seconds() / 60:.1f} minutes; now: python catdiffusion.py sample -n 8{again}")
    return 0


# ------------------------------------------------------------------------------------------------
# Sample
#
# The other command. The checkpoint knows its network, so nothing has to be said twice.
# ------------------------------------------------------------------------------------------------


def make_judge(classes):
    """A function: pictures (B, 3, H, W) in [-1, 1] -> how surely each shows one of `classes`, (B,).

    The judge is torchvision's MobileNetV3 (Howard et al. 2019, arXiv:1905.02244), trained on the
    photos of ImageNet, 1000 classes. Its weights are downloaded (22 MB) if they never were: the one
    thing here that needs a network. Raises Failure if there is none.
    """
    from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large

    weights, network = MobileNet_V3_Large_Weights.IMAGENET1K_V2, mobilenet_v3_large()
    if not Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).exists():
        show(f"--best-of needs a classifier: downloading {weights.url}, this once")
    try:
        how = {"progress": False, "check_hash": True, "weights_only": True}
        network.load_state_dict(weights.get_state_dict(**how))
    except Exception as e:  # no network, half a file, another file
        raise Failure(f"--best-of: no classifier from {weights.url} ({brief(e)})") from None
    network.eval().requires_grad_(False)
    prepare = weights.transforms()  # to the size and the colours that it was trained with
    return lambda x: network(prepare(x.cpu() / 2 + 0.5)).softmax(1)[:, list(classes)].sum(1)


def nearest(ours, pictures):
    """The two nearest of `pictures` (N, H, W, 3) to each of `ours` (M, H, W, 3), all uint8.

    Returns distances and indices, (M, 2) each. The distance is Euclid's, over all pixels, and a
    picture counts as near as its mirror image if that is nearer, for training shows both.
    """

    def far(part):
        return torch.cdist(as_floats(ours).flatten(1), as_floats(part).flatten(1))

    columns = [torch.minimum(far(part), far(part.flip(2))) for part in pictures.split(500)]
    return torch.cat(columns, 1).topk(min(2, len(pictures)), largest=False)


def show_nearest(images, paths):
    """A sheet of pairs: each image, and the nearest of the training pictures in `paths`.

    Has the network learned cats, or learned these cats by heart? Says also what share of the images
    are nearer to a training picture than those usually are (the median of 500) to each other.
    """
    size = images[0].width
    as_bytes = bytearray().join(decode_pictures(paths, size))
    if not as_bytes:
        raise Failure("--nearest: none of the pictures can be decoded")
    pictures = torch.frombuffer(as_bytes, dtype=torch.uint8).view(-1, size, size, 3)
    ours = bytearray().join(image.tobytes() for image in images)
    ours = torch.frombuffer(ours, dtype=torch.uint8).view(-1, size, size, 3)
    far, which = nearest(ours, pictures)
    usual = nearest(pictures[:: len(pictures) // 500 + 1], pictures)[0][:, -1].median()
    share = (far[:, 0] < usual).float().mean()
    show(f"{share:.0%} are nearer to a training picture than half of those are to each other")
    theirs = to_images(as_floats(pictures[which[:, 0]]))
    return make_grid([image for pair in zip(images, theirs) for image in pair], columns=8)


def draw_samples(d):
    """Draw pictures as `d` (a Drawing) says. Returns the exit code.

    Each file says in its own text, as JSON, how it was made, so that it can be made again.
    """
    check(d)
    device = pick_device(d.device)
    usual = [Path(Settings.run, "checkpoint.pt"), Path(__file__).parent / "samples/catdiffusion.pt"]
    path = Path(d.checkpoint or next(filter(os.path.exists, usual), usual[0]))
    model, diffusion, learned = load_checkpoint(path, device)
    whole = diffusion.timesteps
    steps = d.steps or {"dpm": 25, "ddim": 50}.get(d.sampler, whole)
    if steps > whole or (d.sampler == "ddpm-large" and steps < whole):
        raise Failure(f"--steps {steps}: at most {whole} here, and for ddpm-large no fewer")
    show(f"drawing with {path}, step {learned}")
    weights = max([path, *path.glob("*")], key=lambda file: file.stat().st_size)  # of a folder
    made = {"seed": d.seed, "sampler": d.sampler, "calls": steps, "eta": d.eta, "step": learned}
    made["checkpoint"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    stem = Path(d.out, "cat") if d.out.endswith("/") or Path(d.out).is_dir() else Path(d.out)
    stem = f"{stem}-{d.seed}"
    paths = find_pictures([d.nearest]) if d.nearest else []
    judge, most = (make_judge(d.classes), d.n) if d.best_of > 1 else (None, 400)  # 400: on a sheet

    def write(i, image, score):
        text = PngInfo()
        text.add_text("catdiffusion", json.dumps({**made, "index": i, "score": judge and score}))
        return save_new(image, Path(f"{stem}-{i:04}.png"), pnginfo=text)

    def best(drawn):
        return dict(sorted(drawn.items(), key=lambda pair: -pair[1][1])[:most])

    kept, frames, begun = {}, [], time.perf_counter()  # kept: number -> picture, score
    join_team(device)
    end = d.first + d.n * d.best_of
    for first in range(d.first + d.batch * RANK, end, d.batch * WORLD):
        count = min(d.batch, end - first)
        chain = sample(model, diffusion, count, d.sampler, steps, d.eta, d.seed, first)
        for k, (_, x_t, x0) in enumerate(chain, 1):
            if sys.stdout.isatty() or k == steps:
                span = f"{first - d.first + 1} to {first - d.first + count} of {end - d.first}"
                show(f"pictures {span}, call {k} of {steps}", last=False)
            if d.gif and first == d.first and (k % -(-steps // 50) == 0 or k == steps):
                pair = make_grid(to_images(x_t)), make_grid(to_images(x0))  # noisy, and the guess
                frames.append(make_grid(pair, columns=2, gap=6))
        # Without a judge the first are the best, and all are written at once.
        scores = judge(x0).tolist() if judge else range(-first, -first - count, -1)
        drawn = dict(enumerate(zip(to_images(x0), scores), first))
        if not judge:
            for i, pair in drawn.items():
                write(i, *pair)
        kept = best(kept | drawn)
    kept = best(gather(kept))
    if RANK:
        return 0
    if judge:
        for i, pair in kept.items():
            show(f"{write(i, *pair)}  score {pair[1]:.3f}")
    images = [image for image, _ in kept.values()][:400]
    names = [save_new(make_grid(images), Path(f"{stem}-grid.png"))]
    if paths:
        names.append(save_new(show_nearest(images, paths), Path(f"{stem}-nearest.png")))
    if d.gif:
        names.append(save_new(frames[0], Path(f"{stem}.gif"), **film(frames)))
    text = f"{d.n} pictures in {time.perf_counter() - begun:.1f} s"
    show(f"{text}: {stem}-*.png, {', '.join(map(str, names))}")
    return 0


# ------------------------------------------------------------------------------------------------
# Command line
#
# Two commands, made from the two tables of settings at the top. What is wrong with what was typed
# is told in one line on standard error, with exit code 2; a bug of ours shows its traceback.
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but its errors are ours: one line, not the whole usage."""

    def error(self, message):
        raise Failure(f"{message}; see {self.prog} --help")


def parser():
    """The command line: a subcommand for each table, a flag for each field with a help text."""
    top = Parser(prog="catdiffusion.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    for name, table in (("train", Settings), ("sample", Drawing)):
        about = table.__doc__
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        for f in (f for f in fields(table) if f.metadata["help"]):
            allowed, many = f.metadata["allowed"], isinstance(f.default, tuple)
            told = " ".join(map(str, f.default)) if many else f.default
            how = {"type": type(allowed[0]) if allowed else str, "nargs": "*" if many else None}
            how = {"action": "store_true"} if f.default is False else {**how, "metavar": "X"}
            help = f"{f.metadata['help']} (default: {told})"
            command.add_argument(flag(f), default=f.default, help=help, **how)
    return top


def main(argv=None):
    """Run the command line `argv` (without the program's name). Returns the exit code."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # number 0 speaks for all
    warnings.simplefilter("ignore")  # PIL's and torch's: we tell of what matters ourselves
    try:
        given = vars(parser().parse_args(argv))
        if given.pop("command") == "sample":
            return draw_samples(Drawing(**given))
        return train(Settings(**given))
    except (Failure, OSError) as e:  # OSError: the disk is full, the folder may not be written, ...
        message, code = e, 2
    except (RuntimeError, MemoryError) as e:
        short = re.search("(out of|not enough|can't allocate) memory|ALLOC_FAILED", str(e), re.I)
        if not short and not isinstance(e, MemoryError):
            raise
        message, code = "out of memory: take a smaller --batch, or for train a larger --accum", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)[:1000])
    print(f"catdiffusion: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # started without one
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not text
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that tidies up
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no second Ctrl-C while Python shuts down
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads any more, say `| head`: nor will what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)
