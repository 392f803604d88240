"""Verification skipping (VVS, arXiv 2511.13587): trees that are not verified, what they leave.

A skipped step commits a random path of the tree, as far as the tree's paths are long on average;
the target sees these tokens together with the next tree. All of it stays on the device.

    selector    a = min(length of the path, floor(mean length of all paths))   `select_path`
    uniform     every `interval` steps, from step 1 on
    dynamic     where the paths agree: `path_similarity` >= threshold
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.tokens.checks import whole

# features of so many tokens must be there before the first skip
WARM = 5


@dataclass(frozen=True)
class Uniform:
    """Skip every `interval` steps: 2 is every other one.

    Args:
        interval: steps, at least 2.
        likely: commit the path of the drafter's first choices, not one at random.
    """

    interval: int
    likely: bool = False

    def __post_init__(self) -> None:
        if whole("skipping", "interval", self.interval) < 2:
            raise ValueError(
                f"skipping: interval must be at least 2, got {self.interval}; "
                "of two steps in a row one must be verified"
            )


@dataclass(frozen=True)
class Dynamic:
    """Skip where the tree's paths look alike, but never twice in a row.

    Args:
        threshold: of the similarity, in [-1, 1]; the paper's is 0.65, its code's 0.7.
        decay: the weight of a level, of that of the level above.
        stride: every so many paths are compared.
        likely: commit the path of the drafter's first choices, not one at random.
    """

    threshold: float = 0.65
    decay: float = 0.9
    stride: int = 2
    likely: bool = False

    def __post_init__(self) -> None:
        for name in ("threshold", "decay"):
            if not isinstance(value := getattr(self, name), Real):
                raise TypeError(f"skipping: {name} must be a number, got {value!r}")
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"skipping: threshold must lie in [-1, 1], got {self.threshold}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"skipping: decay must lie in (0, 1], got {self.decay}")
        whole("skipping", "stride", self.stride, 1)


def wants(
    schedule: Uniform | Dynamic,
    steps: Tensor,
    skipped: Tensor,
    alike: Callable[[float, int], Tensor],
) -> Tensor:
    """Return which sequences [B] skip this step.

    Args:
        steps: [B], of each sequence so far.
        skipped: [B] bool, whether the step before was.
        alike: gives `sdvg_kernels.path_similarity` of a decay and a stride.
    """
    if isinstance(schedule, Uniform):
        return steps % schedule.interval == 1
    return ~skipped & (alike(schedule.decay, schedule.stride) >= schedule.threshold)


def unit(codebook: Tensor) -> Tensor:
    """Return `codebook [codes, E]` with rows of length one, float32."""
    return F.normalize(codebook.float(), dim=1)


def neighbours(codebook: Tensor, count: int) -> Tensor:
    """Return the nearest other codes of each code [codes, count] int32, by distance."""
    if not 1 <= whole("neighbours", "count", count) < len(codebook):
        raise ValueError(
            f"neighbours: count must lie in [1, {len(codebook)}), got {count}; the codebook has "
            f"{len(codebook)} codes"
        )
    near = torch.empty(len(codebook), count, dtype=torch.int32, device=codebook.device)
    # some rows at a time: all distances of 16384 codes are a gigabyte
    for first in range(0, len(codebook), 1024):
        some = codebook[first : first + 1024].float()
        far = torch.cdist(some, codebook.float())
        own = torch.arange(first, first + len(some), device=codebook.device)
        far.scatter_(1, own[:, None], torch.inf)
        near[first : first + len(some)] = far.topk(count, largest=False).indices.int()
    return near
