"""Stages ``scorer`` and ``judge``: the reward that routes, and the classifier that grades.

They share nothing: the scorer learns on the training scans how spoilt a frame is, the judge learns
on the held-out scans which digit a frame shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.models.embedded.quality import Judge
from sdvg.scorers.digits import DigitsReward
from sdvg.train.autoencoder import decode, encode, statistics
from sdvg.train.data import load_scans, render, sample_motions, to_video
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

POOL = 768  # clips of 9 frames decoded from spoilt latents, made once


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g)


def _blur(frames: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, ``sigma [N]`` in pixels, along both axes."""
    x = torch.arange(-5.0, 6.0)
    kernel = torch.exp(-0.5 * (x / sigma[:, None].clamp(0.05)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    n = len(frames)
    out = F.conv2d(frames[None], kernel[:, None, :, None], padding=(5, 0), groups=n)
    return F.conv2d(out, kernel[:, None, None, :], padding=(0, 5), groups=n)[0]


def _single(images: Tensor, g: torch.Generator) -> Tensor:
    """One frame ``[N, 32, 32]`` of each scan, anywhere within the walls."""
    centres = 6.5 + 19 * torch.rand(len(images), 1, 2, generator=g)
    return render(images, centres)[:, 0]


def spoil(frames: Tensor, others: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spoilt frames ``[N, 32, 32]`` and what is left of each digit, ``[N]`` in [0, 1].

    One of seven ways each: noise, blur, a ghost of itself, a blend with another digit (``others``),
    a missing part, fading, nothing.
    """
    n = len(frames)
    kind = torch.randint(7, (n,), generator=g)
    amount = torch.rand(n, generator=g)
    a = amount[:, None, None]
    shift = int(torch.randint(2, 6, (1,), generator=g)) * (
        1 if torch.rand((), generator=g) < 0.5 else -1
    )
    ghost = torch.roll(frames, shift, 1 + int(torch.randint(2, (1,), generator=g)))
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    light = frames.sum((1, 2)).clamp(1e-3)
    cx, cy = (frames * x).sum((1, 2)) / light, (frames * y).sum((1, 2)) / light
    angle = _uniform(n, 0, 6.2832, g)
    side = (x - cx[:, None, None]) * angle.cos()[:, None, None] + (
        y - cy[:, None, None]
    ) * angle.sin()[:, None, None]
    spoilt = torch.stack(
        (
            frames + 0.9 * a * torch.randn(frames.shape, generator=g),
            _blur(frames, 4 * amount),
            torch.maximum(frames * (1 - 0.4 * a), a * ghost),
            (1 - a) * frames + a * others,
            frames * (side < 7 - 9 * a),
            frames * (1 - a),
            frames,
        )
    )[kind, torch.arange(n)].clamp(0, 1)
    left = torch.where(kind == 6, torch.ones(n), (1 - 1.25 * amount).clamp(0, 1))
    # a little grain on all, so that grain alone says nothing
    grain = 0.04 * torch.rand(n, 1, 1, generator=g) * torch.randn(frames.shape, generator=g)
    return (spoilt + grain).clamp(0, 1), left


@torch.no_grad()
def _decoded(vae: AutoencoderKLWan, images: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames ``[N, 32, 32]`` decoded from noised, shrunk or blended latents; and what is left."""
    mean, std = statistics(vae)
    frames, left = [], []
    for part in torch.arange(len(images)).split(32):
        video = to_video(render(images[part], sample_motions(len(part), g).centres(9)))
        z = (encode(vae, video)[0] - mean) / std
        amount = torch.rand(len(part), generator=g) ** 1.5
        a = amount[:, None, None, None, None]
        way = torch.randint(3, (len(part),), generator=g)
        z = torch.stack(
            (
                z + 1.2 * a * torch.randn(z.shape, generator=g),
                z * (1 - a),
                (1 - a) * z + a * z.roll(1, 0),
            )
        )[way, torch.arange(len(part))]
        out = decode(vae, z * std + mean).add(1).div(2).clamp(0, 1).mean(1)
        frames.append(out[:, ::4].flatten(0, 1))
        left.append((1 - 1.25 * amount).clamp(0, 1).repeat_interleave(out[:, ::4].shape[1]))
    return torch.cat(frames), torch.cat(left)


def train_scorer(
    vae: AutoencoderKLWan, runs: Path, *, steps: int, resume: bool, seed: int = 6
) -> DigitsReward:
    """The trained reward; `calibrate` sets its mean and deviation."""
    torch.manual_seed(seed)
    scans = load_scans()
    reward = DigitsReward()
    g = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(scans.images), (POOL,), generator=g)
    pool, pool_left = _decoded(vae, scans.images[picked], g)
    pool_labels = scans.labels[picked].repeat_interleave(len(pool) // POOL)

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(scans.images), (96,), generator=g)
        other = torch.randint(len(scans.images), (96,), generator=g)
        centre = 6.5 + 19 * torch.rand(96, 1, 2, generator=g)
        clean = render(scans.images[chosen], centre)[:, 0]
        # the other digit lies where the first does: a blend that could be either
        frames, left = spoil(clean, render(scans.images[other], centre)[:, 0], g)
        drawn = torch.randint(len(pool), (48,), generator=g)
        frames = torch.cat((frames, pool[drawn]))
        left = torch.cat((left, pool_left[drawn]))
        labels = torch.cat((scans.labels[chosen], pool_labels[drawn]))
        wanted = F.one_hot(labels, 10) * left[:, None]
        value = F.binary_cross_entropy_with_logits(reward.net(frames), wanted, reduction="none")
        return {"loss": value.sum(1).mean()}

    return fit("scorer", reward, loss, steps=steps, lr=2e-3, runs=runs, resume=resume, seed=seed)


@torch.no_grad()
def calibrate(reward: DigitsReward, frames: Tensor, prompts: list[str]) -> None:
    """Make these frames ``[B, N, 3, H, W]``, a drafter's, score mean 0 and deviation 1."""
    reward.mean, reward.std = 0.0, 1.0
    values = reward(frames, prompts)
    reward.mean, reward.std = round(float(values.mean()), 4), round(float(values.std()), 4)


def train_judge(runs: Path, *, steps: int, resume: bool, seed: int = 7) -> Judge:
    """The judge, trained on warped and slightly spoilt held-out scans; blends are "no digit"."""
    torch.manual_seed(seed)
    scans = load_scans(held_out=True)
    judge = Judge()

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        n = 96
        chosen = torch.randint(len(scans.images), (n,), generator=g)
        other = torch.randint(len(scans.images), (n,), generator=g)
        frames = _single(_warp(scans.images[chosen], g), g)
        labels = scans.labels[chosen]
        frames = _blur(frames, _uniform(n, 0.05, 0.9, g)) * _uniform(n, 0.75, 1.1, g)[:, None, None]
        frames = frames + 0.08 * torch.rand(n, 1, 1, generator=g) * torch.randn(
            frames.shape, generator=g
        )
        bad = torch.rand(n, generator=g) < 0.15
        way = torch.randint(3, (n,), generator=g)[:, None, None]
        blend = 0.5 * (frames + _single(scans.images[other], g))
        blob = _blur(frames, _uniform(n, 3.0, 5.0, g))
        noise = 0.5 * torch.rand(frames.shape, generator=g)
        junk = torch.where(way == 0, blend, torch.where(way == 1, blob, noise))
        frames = torch.where(bad[:, None, None], junk, frames).clamp(0, 1)
        labels = torch.where(bad, torch.full_like(labels, 10), labels)
        logits = judge(frames)
        hits = (logits.argmax(-1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.01), "accuracy": hits}

    return fit("judge", judge, loss, steps=steps, lr=1.5e-3, runs=runs, resume=resume, seed=seed)


def _warp(images: Tensor, g: torch.Generator) -> Tensor:
    """Scans ``[N, 8, 8]`` turned by up to 12 degrees, sheared and scaled by up to 12 %."""
    n = len(images)
    turn, shear = _uniform(n, -0.2, 0.2, g), _uniform(n, -0.15, 0.15, g)
    sx, sy = _uniform(n, 0.88, 1.12, g), _uniform(n, 0.88, 1.12, g)
    zero = torch.zeros(n)
    theta = torch.stack(
        (
            torch.stack((turn.cos() * sx, -turn.sin() + shear, zero), -1),
            torch.stack((turn.sin(), turn.cos() * sy, zero), -1),
        ),
        1,
    )
    grid = F.affine_grid(theta, (n, 1, 8, 8), align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)[:, 0].clamp(
        0, 1
    )
