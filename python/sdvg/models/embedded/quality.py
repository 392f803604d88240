"""How good a video of moving digits is, by a judge that nothing else was trained against."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvg.models.embedded.classifier import DigitClassifier, centroids
from sdvg.models.embedded.prompts import DIRECTIONS, SPEEDS, Request, parse_prompt

# where a digit's centre turns back, in pixels of a 32-pixel frame
WALLS = (6.5, 25.5)
_WEIGHTS = Path(__file__).parent / "weights" / "judge"


class Quality(NamedTuple):
    """Each in [0, 1]; ``value = legibility * (1 + motion) / 2``."""

    value: float
    # mean over frames of the judge's probability of the digit that was asked for
    legibility: float
    # mean over frames of how near the digit is to the path that was asked for
    motion: float


class Judge(DigitClassifier):
    """The classifier that grades: trained on the held-out scans only."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"width": self.width}, indent=2) + "\n")
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path = _WEIGHTS) -> Judge:
        """Read what `save_pretrained` wrote, as float32."""
        folder = Path(folder)
        judge = cls(**json.loads((folder / "config.json").read_text()))
        weights = load_file(folder / "model.safetensors")
        judge.load_state_dict({name: value.float() for name, value in weights.items()})
        return judge.eval().requires_grad_(False)


def quality(
    frames: Tensor,
    prompt: str,
    judge: Judge | None = None,
    *,
    stride: int = 1,
    segment: bool = False,
) -> Quality:
    """Does the video show the digit that was asked for, legible in every frame, moving as asked?

    - legibility: mean over frames of the judge's probability of the asked class (of any class, if
    none was named).
    - motion: the asked path starts at the centre of brightness of frame 0, goes at the asked
    velocity and turns
      back at the walls. A frame counts 1 up to 2 pixels from it, 0 from 8 pixels on, linear
      between. Of what the prompt leaves open (direction, speed) the best choice counts.

    Args:
        frames: ``[N, 3, 32, 32]`` in [0, 1].
        prompt: what was asked for.
        judge: the classifier; the shipped one by default.
        stride: how many frames of the asked speed lie from one frame to the next.
        segment: the frames are a part of a longer video. The path goes on from the part's own first
            frame; as walls may have turned it by then, each component of the asked velocity may
            have either sign, and the best choice counts. Marks of parts are to be compared with
            each other, the first part's included, not with those of whole videos.

    Raises:
        ValueError: frames of another shape.
    """
    if frames.ndim != 4 or frames.shape[1:] != (3, 32, 32) or not len(frames):
        raise ValueError(f"quality: frames must be [N, 3, 32, 32], got {tuple(frames.shape)}")
    judge = judge or _shipped()
    request = parse_prompt(prompt)
    grey = frames.detach().cpu().float().mean(1)
    # NaN frames are illegible, not an error: a broken model must get a bad mark
    grey = grey.nan_to_num(0.0).clamp(0, 1)
    with torch.no_grad():
        probability = judge(grey).softmax(-1)[:, :10]
    if request.digit is None:
        legibility = float(probability.amax(-1).mean())
    else:
        legibility = float(probability[:, request.digit].mean())
    motion = _motion(centroids(grey), request, stride, segment)
    return Quality(legibility * (1 + motion) / 2, legibility, motion)


def _motion(measured: Tensor, request: Request, stride: int, segment: bool) -> float:
    ways = [DIRECTIONS[request.direction]] if request.direction else list(DIRECTIONS.values())
    if segment:
        turned = product(ways, (1, -1), (1, -1))
        ways = list(dict.fromkeys((x * across, y * along) for (x, y), across, along in turned))
    paces = [request.speed] if request.speed else list(SPEEDS)
    t = stride * torch.arange(len(measured), dtype=torch.float32)[:, None]
    low, span = WALLS[0], WALLS[1] - WALLS[0]
    best = 0.0
    for way in ways:
        for pace in paces:
            free = measured[0] + t * SPEEDS[pace] * torch.tensor(way)
            path = low + span - ((free - low).remainder(2 * span) - span).abs()
            miss = (measured - path).norm(dim=1)
            best = max(best, float((1 - (miss - 2) / 6).clamp(0, 1).mean()))
    return best


@lru_cache(1)
def _shipped() -> Judge:
    return Judge.from_pretrained()
