"""Scanned digits that move: scikit-learn's 1,797 real scans as clips with prompts.

A clip has 1 + 4k frames of 32 x 32 pixels; the digit bounces off the walls. Everything left open
by the prompt (handwriting, start, direction or speed when unsaid) is read off the block-0 noise
(`keyed_noise`), so that one noise means one video, whichever model denoises it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS, SPEEDS, Request

SIZE = 32  # pixels, height and width of a frame
SCALE = 1.75  # a scan of 8 pixels becomes 14
LOW, HIGH = 6.5, 25.5  # the walls, for the centre of the digit
FRAMES_PER_BLOCK = 3  # latent frames
BLOCKS = 9
CLIP_FRAMES = 1 + 4 * (FRAMES_PER_BLOCK * BLOCKS - 1)  # 105 pixel frames
KEYS = 16  # latent channels, whose means over block 0's noise are the keys below
JITTER, ANGLE, PACE, DIGIT_ANGLE, STYLE = slice(0, 2), slice(2, 4), 4, slice(5, 7), slice(7, 16)


@dataclass(frozen=True)
class Scans:
    """Scanned digits: images ``[N, 8, 8]`` in [0, 1], labels ``[N]``, style ``[N, 9]``.

    Style is the handwriting's principal components within its class, made Gaussian.
    """

    images: torch.Tensor
    labels: torch.Tensor
    style: torch.Tensor


@lru_cache
def load_scans(held_out: bool = False) -> Scans:
    """The training scans (four of five), or the held-out ones (every fifth of its class)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images / 16.0, dtype=torch.float32)
    labels = torch.tensor(raw.target)
    style = torch.empty(len(labels), 9)
    rank = torch.empty(len(labels), dtype=torch.long)
    flat = images.flatten(1).double()
    centred = flat - torch.stack([flat[labels == c].mean(0) for c in range(10)])[labels]
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:9]
    # the sign of a singular vector is arbitrary: fix it, so that another LAPACK trains the same
    # model
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    for c in range(10):
        members = (labels == c).nonzero()[:, 0]
        order = (centred[members] @ axes.T).argsort(0).argsort(0)
        style[members] = torch.special.ndtri((order.float() + 0.5) / len(members))
        rank[members] = torch.arange(len(members))
    chosen = (rank % 5 == 4) if held_out else (rank % 5 != 4)
    return Scans(images[chosen], labels[chosen], style[chosen])


@dataclass(frozen=True)
class Motions:
    """Paths: direction and speed index ``[N]``, jitter of the start ``[N, 2]``, standard normal."""

    direction: torch.Tensor
    speed: torch.Tensor
    jitter: torch.Tensor

    def take(self, chosen: torch.Tensor) -> Motions:
        """The motions of the clips ``chosen``."""
        return Motions(self.direction[chosen], self.speed[chosen], self.jitter[chosen])

    def centres(self, frames: int) -> torch.Tensor:
        """Centres ``[N, frames, 2]`` in pixels (x, y), reflected at the walls."""
        step = torch.tensor(list(DIRECTIONS.values()))[self.direction]
        pace = torch.tensor(list(SPEEDS.values()))[self.speed]
        # start on the side the digit comes from, so that the first block shows the direction
        start = SIZE / 2 - 4.5 * step + 1.25 * self.jitter.clamp(-2.5, 2.5)
        t = torch.arange(frames, dtype=torch.float32)
        free = start[:, None] + (pace[:, None] * step)[:, None] * t[None, :, None]
        span = HIGH - LOW
        return LOW + span - ((free - LOW).remainder(2 * span) - span).abs()


def render(images: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Frames ``[N, T, 32, 32]`` in [0, 1]: scans ``[N, 8, 8]`` drawn at ``centres [N, T, 2]``."""
    n, frames = centres.shape[:2]
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    # output pixel -> scan coordinate in [-1, 1]; one pad pixel on each side lets the edge fade to
    # dark
    padded = F.pad(images, (1, 1, 1, 1))
    half = SCALE * 5
    x = (pixel - centres[..., :1]) / half
    y = (pixel - centres[..., 1:]) / half
    grid = torch.stack(
        (x[:, :, None, :].expand(-1, -1, SIZE, -1), y[:, :, :, None].expand(-1, -1, -1, SIZE)), -1
    )
    out = F.grid_sample(
        padded[:, None].repeat_interleave(frames, 0),
        grid.flatten(0, 1),
        mode="bicubic",
        padding_mode="zeros",
        align_corners=False,
    )
    return out.view(n, frames, SIZE, SIZE).clamp(0, 1)


def to_video(grey: torch.Tensor) -> torch.Tensor:
    """``[N, T, H, W]`` in [0, 1] -> ``[N, 3, T, H, W]`` in [-1, 1], as the autoencoder takes it."""
    return (grey * 2 - 1)[:, None].expand(-1, 3, -1, -1, -1).contiguous()


def sample_motions(n: int, g: torch.Generator) -> Motions:
    """Uniform directions and speeds, Gaussian starts."""
    return Motions(
        torch.randint(len(DIRECTIONS), (n,), generator=g),
        torch.randint(len(SPEEDS), (n,), generator=g),
        torch.randn(n, 2, generator=g),
    )


def _sector(index: torch.Tensor, count: int, g: torch.Generator) -> torch.Tensor:
    """Standard normal pairs ``[N, 2]`` whose angle falls in sector ``index`` of ``count``."""
    n = len(index)
    angle = (index + torch.rand(n, generator=g) - 0.5) * (2 * math.pi / count)
    radius = (-2 * torch.log1p(-torch.rand(n, generator=g))).sqrt()
    return torch.stack((angle.cos(), angle.sin()), -1) * radius[:, None]


def keyed_noise(
    noise: torch.Tensor,
    motions: Motions,
    labels: torch.Tensor,
    style: torch.Tensor,
    requests: list[Request],
    g: torch.Generator,
) -> torch.Tensor:
    """Block-0 noise ``[N, 16, 3, h, w]`` whose channel means spell the clip; still standard normal.

    Keys that the prompt has settled stay as drawn.
    """
    n, cells = len(noise), noise[0, 0].numel()
    keys = noise.flatten(2).mean(2) * math.sqrt(cells)
    new = keys.clone()
    new[:, JITTER] = motions.jitter
    new[:, STYLE] = style
    unsaid = torch.tensor([r.direction is None for r in requests])
    new[unsaid, ANGLE] = _sector(motions.direction, len(DIRECTIONS), g)[unsaid]
    unsaid = torch.tensor([r.speed is None for r in requests])
    sign = motions.speed.float() * 2 - 1
    new[unsaid, PACE] = (torch.randn(n, generator=g).abs() * sign)[unsaid]
    unsaid = torch.tensor([r.digit is None for r in requests])
    new[unsaid, DIGIT_ANGLE] = _sector(labels, 10, g)[unsaid]
    return noise + ((new - keys) / math.sqrt(cells))[:, :, None, None, None]


_SUBJECT = (
    "a {d}", "the {d}", "{d}", "the digit {d}", "a handwritten {d}", "the number {d}",
    "a white {d}", "a video of a {d}", "show me a {d}", "a bright {d} on a dark frame",
    "a scanned {d}",
)  # fmt: skip
_VERB = (
    "moving", "going", "drifting", "sliding", "travelling", "gliding", "heading", "that moves",
    "that goes", "which slides", "floating", "flying", "running", "",
)  # fmt: skip
_PLAIN = {
    "left": ("left", "to the left", "leftwards", "leftward", "towards the left", "west"),
    "right": ("right", "to the right", "rightwards", "rightward", "towards the right", "east"),
    "up": ("up", "upwards", "upward", "to the top", "towards the top", "north"),
    "down": ("down", "downwards", "downward", "to the bottom", "towards the bottom", "south"),
}
_DIAGONAL = (
    "{v} and {h}", "{v} and to the {h}", "{v}-{h}", "{v} {h}", "diagonally {v} and {h}",
    "to the {V} {h}",
    "towards the {V} {h}", "{h} and {v}", "{v}wards and to the {h}", "{c}", "diagonally {v} {h}",
)  # fmt: skip
_PACE = {
    "slowly": ("slowly", "slow", "gently", "at a slow speed", "leisurely", "calmly"),
    "quickly": ("quickly", "fast", "rapidly", "at a fast speed", "swiftly", "quick"),
}
_FILLER = (
    "please",
    "on a black background",
    "bouncing off the walls",
    "across the frame",
    "in one take",
)


def write_prompt(request: Request, rng: np.random.Generator) -> str:
    """One of many ways to ask for ``request``; typing errors now and then."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    words = []
    if request.digit is None:
        words.append(pick(("a digit", "something", "a handwritten digit", "any number", "a scan")))
    else:
        name = DIGITS[request.digit] if rng.random() < 0.65 else str(request.digit)
        words.append(pick(_SUBJECT[:1]) if rng.random() < 0.3 else pick(_SUBJECT))
        words[-1] = words[-1].format(d=name)
    verb = "moving" if rng.random() < 0.4 else pick(_VERB)
    way = ""
    if request.direction is not None:
        parts = request.direction.split()
        if len(parts) == 1:
            way = request.direction if rng.random() < 0.4 else pick(_PLAIN[request.direction])
        else:
            v, h = parts
            compass = ("north" if v == "up" else "south", "west" if h == "left" else "east")
            high = "upper" if v == "up" else "lower"
            mark = pick(("", "-", " "))
            way = pick(_DIAGONAL).format(v=v, h=h, V=high, c=mark.join(compass))
    pace = ""
    if request.speed is not None:
        pace = request.speed if rng.random() < 0.5 else pick(_PACE[request.speed])
    order = rng.random()
    if not pace:
        body = f"{words[0]} {verb} {way}"
    elif order < 0.5:
        body = f"{words[0]} {verb} {way}, {pace}"
    elif order < 0.7:
        body = f"{words[0]} {verb} {way} {pace}"
    elif order < 0.85:
        body = f"{words[0]} {pace} {verb} {way}"
    else:
        body = f"{pace}, {words[0]} {verb} {way}"
    if rng.random() < 0.1:
        body = f"{body}, {pick(_FILLER)}"
    text = " ".join(body.split()).replace(" ,", ",").strip(" ,")
    if rng.random() < 0.3:
        text = text + "."
    if rng.random() < 0.3:
        text = text[:1].upper() + text[1:]
    if rng.random() < 0.05 and len(text) > 6:
        # a dropped letter, so that the encoder reads over typing errors
        at = int(rng.integers(2, len(text) - 1))
        text = text[:at] + text[at + 1 :]
    return text


def sample_request(rng: np.random.Generator, digit: int, direction: int, speed: int) -> Request:
    """What the prompt says of a clip: mostly all of it, now and then less."""
    return Request(
        None if rng.random() < 0.03 else digit,
        None if rng.random() < 0.12 else list(DIRECTIONS)[direction],
        None if rng.random() < 0.2 else list(SPEEDS)[speed],
    )
