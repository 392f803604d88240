"""What the loop passes around, and the protocols of what it drives.

Latents are `[B, F, C, h, w]` (batch, latent frames, channels, height, width), frames are `[B, N,
3, H, W]` in [0, 1]. A block is the `F` latent frames of one autoregressive step; its `N` decoded
frames may differ between the first block and the others (Wan: 9 and 12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What the router said of one sequence's draft."""

    accepted: bool
    # the aggregated score, None where the router did not ask for one
    score: float | None
    # "first": forced; "router": the router's own decision; "target-only" and "draft-only":
    # there was no choice; "given": the latents came from outside
    reason: str


class Block(NamedTuple):
    """One finished block of every sequence in the batch."""

    index: int
    # [B, N, 3, H, W] in [0, 1]
    frames: Tensor
    # [B, F, C, h, w]
    latents: Tensor
    verdicts: tuple[Verdict, ...]
    # stage -> seconds that this block spent in it: draft (with the drafter's own clean pass),
    # decode, score, target, commit (the target's clean passes); a forward that several blocks
    # share counts to the first of them
    seconds: dict[str, float]


class Stats(NamedTuple):
    """What `Generation.summary` returns; times in seconds."""

    blocks: int
    sequences: int
    frames: int
    # accepted / decided by the router, forced first blocks left out as in the paper's
    # tables; None: none decided
    acceptance: float | None
    total: float
    stages: dict[str, float]
    # pixel frames per second of wall clock, all sequences together
    fps: float
    # how many times faster than target-only; None where there is nothing to compare with
    speedup: float | None
    # "measured": against a given target-only time; "predicted": from this run's own time per
    # step of the target; "none"
    speedup_source: str
    # from `generate` (prompts encoded, caches made) to the first block's decoded frames, without
    # what the caller did between; None: there is none yet
    first_frames: float | None = None

    def __str__(self) -> str:
        """Return a sentence, and a line with the seconds of each stage."""
        batch = f" of {self.sequences} videos" if self.sequences > 1 else ""
        parts = [f"{self.frames} frames{batch} in {self.total:.2f} s ({self.fps:.1f} frames/s)"]
        if self.first_frames is not None:
            parts.append(f"first frames after {self.first_frames:.2f} s")
        if self.acceptance is not None:
            parts.append(f"{self.acceptance:.0%} of the drafts kept")
        if self.speedup is not None:
            ratio = f"{self.speedup:.2f}x the speed of target-only"
            parts.append(f"{ratio} ({self.speedup_source})")
        spent = (f"{stage} {seconds:.3g} s" for stage, seconds in self.stages.items())
        return f"{', '.join(parts)}\nstages: {', '.join(spent) or 'none'}"


class CausalModel(Protocol):
    """A block-autoregressive denoiser with a KV cache: the drafter and the target are both one.

    One method more is needed for several blocks in flight (`SDVG(in_flight=2)`), and only for them:

        denoise_blocks(latents, levels, *, start_frame) -> Tensor

    is `denoise` of consecutive blocks `[B, n F, C, h, w]` in one pass under the block-causal mask,
    each at its own (timestep, sigma) of `levels`. It stages the K/V of all of them behind what is
    committed, and `keep` commits those of the first.
    """

    device: torch.device
    dtype: torch.dtype
    # F, C, h, w of one block of latents
    block_shape: tuple[int, int, int, int]
    # how many latent frames a block sees beside the sink, its own included; None: all before it
    window_frames: int | None
    # how many latent frames before a block can change its output, through all layers; None:
    # all of them
    receptive_frames: int | None
    # the first latent frames, which every block sees
    sink_frames: int

    def start(self, prompts: Sequence[str]) -> None:
        """Forget everything and begin one sequence for each prompt."""

    def denoise(
        self,
        latents: Tensor,
        timestep: float,
        *,
        start_frame: int,
        rows: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Predict clean latents `[b, F, C, h, w]` of the block at `start_frame` from noisy ones.

        Stages the block's K/V; what is before `start_frame` must have been committed. `rows`
        (int64 `[b]`) names the sequences that take part, None means all. `sigma` is the noise level
        where it is not `timestep / 1000`: it is given with timestep 0 alone, so only models that
        are to run such a schedule need the argument. Calling it again for the same block gives the
        same result.
        """

    def write(
        self,
        latents: Tensor,
        *,
        start_frame: int,
        rows: Tensor | None = None,
        timestep: float = 0.0,
    ) -> None:
        """The clean pass: commit K/V of consecutive blocks of clean latents `[b, n F, C, h, w]`.

        At another `timestep` the latents are as noisy as it says: it is given where the schedule
        has no clean pass, so only models that are to run such a schedule need the argument.
        """

    def keep(self, *, start_frame: int, rows: Tensor | None = None) -> None:
        """Commit the K/V that the last `denoise` at `start_frame` staged, without a clean pass."""


class Decoder(Protocol):
    """Latents to frames, block by block; its state is a value that decoding never changes."""

    def start(self, batch: int) -> object:
        """Return the state before the first block."""

    def decode(self, latents: Tensor, state: object) -> tuple[Tensor, object]:
        """Return the frames `[b, N, 3, H, W]` in [0, 1] of `latents` and the state after them."""

    def take(self, state: object, rows: Tensor) -> object:
        """Return the state of the sequences `rows` (int64 `[b]`) alone."""

    def select(self, draft: object, other: object, rows: Tensor) -> object:
        """Return `draft` with sequences `rows` (int64 `[b]`) from `other`, which has only them."""


class Scorer(Protocol):
    """Any callable that scores frames against their prompts."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return rewards `[B, N]` float32, one a frame, for `[B, N, 3, H, W]` in [0, 1]."""


class Draft(NamedTuple):
    """What a router may look at; tensors have one row a sequence."""

    block: int
    # of the noise: one for all, or one for each row
    seed: int | tuple[int, ...]
    # int64 ids of the sequences, one for each row
    sequences: tuple[int, ...]
    # [B, N] float32 rewards; None unless the router `needs_score`
    rewards: Tensor | None


class Router(Protocol):
    """Decides for each sequence whether a draft is kept.

    A router whose `needs_score` is False decides before the draft is decoded, so that no rejected
    draft is.
    """

    needs_score: bool

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`, bool, on any device."""
