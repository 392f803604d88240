"""Stages ``scorer`` and ``judge``: the reward that routes, and the classifier that grades.

Both are digit classifiers but share no data: the scorer learns from the training scans, the judge
from the held-out ones. Blends of two digits, blobs and noise are "no digit" to both.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.models.embedded.quality import Judge
from sdvg.scorers.digits import DigitsReward
from sdvg.train.data import Scans, load_scans, render
from sdvg.train.loop import fit


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


def train_scorer(runs: Path, *, steps: int, resume: bool, seed: int = 6) -> DigitsReward:
    """The trained reward; `calibrate` sets its mean and deviation."""
    torch.manual_seed(seed)
    scans = load_scans()
    reward = DigitsReward()

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        frames, labels = _examples(scans, 96, g)
        logits = reward.net(frames)
        hits = (logits.argmax(-1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.01), "accuracy": hits}

    return fit("scorer", reward, loss, steps=steps, lr=1.5e-3, runs=runs, resume=resume, seed=seed)


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
        frames, labels = _examples(scans, 96, g)
        logits = judge(frames)
        hits = (logits.argmax(-1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.01), "accuracy": hits}

    return fit("judge", judge, loss, steps=steps, lr=1.5e-3, runs=runs, resume=resume, seed=seed)


def _examples(scans: Scans, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Frames ``[n, 32, 32]`` of warped, slightly spoilt digits, classes ``[n]``; 10: junk."""
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
    return frames, labels


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
