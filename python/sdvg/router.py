"""Routers: which drafts are kept. Any callable `Draft -> accept [B]` is one too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvg import noise
from sdvg.types import Draft
from sdvg_kernels import route_blocks


@dataclass(frozen=True)
class Reward:
    """Keep a draft whose worst frame (or mean frame) scores at least `tau` (SDVG, section 3)."""

    tau: float = -0.7
    aggregate: str = "min"
    needs_score = True

    def __post_init__(self) -> None:
        if not isinstance(self.tau, int | float):
            raise TypeError(f"router: tau must be a number, got {self.tau!r}")
        if math.isnan(self.tau):
            raise ValueError("router: tau must be a number, got nan")
        if self.aggregate not in ("min", "mean"):
            raise ValueError(f"router: aggregate must be 'min' or 'mean', got {self.aggregate!r}")

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]` on the rewards' device."""
        return route_blocks(draft.rewards, self.tau, False, self.aggregate)


@dataclass(frozen=True)
class Stride:
    """Let the target make every `period`-th block, block 0 included; keep the drafts between."""

    period: int = 3
    needs_score = False

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"router: period must be at least 1, got {self.period}")

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`."""
        return torch.full((len(draft.sequences),), draft.block % self.period != 0)


@dataclass(frozen=True)
class Random:
    """Keep a draft with probability `accept`, drawn from (seed, sequence, block)."""

    accept: float = 0.7
    needs_score = False

    def __post_init__(self) -> None:
        if not 0 <= self.accept <= 1:
            raise ValueError(f"router: accept must lie in [0, 1], got {self.accept}")

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`."""
        drawn = noise.uniform(seed=draft.seed, sequences=draft.sequences, block=draft.block)
        return drawn < self.accept


@dataclass(frozen=True)
class Always:
    """Keep every draft."""

    needs_score = False

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`, all True."""
        return torch.ones(len(draft.sequences), dtype=torch.bool)


@dataclass(frozen=True)
class Never:
    """Keep no draft: the output is target-only generation's, bit for bit."""

    needs_score = False

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`, all False."""
        return torch.zeros(len(draft.sequences), dtype=torch.bool)
