"""When finished blocks enter a model's KV cache."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvg import noise
from sdvg.clock import Clock
from sdvg.host import Rows, move
from sdvg.schedule import Schedule, noise_level
from sdvg.types import CausalModel


@dataclass(frozen=True)
class Recompute:
    """Krea's policy: keep nothing, write the last `frames` clean latents anew before each block."""

    frames: int = 3

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"commit: frames must be at least 1, got {self.frames}")

    def __str__(self) -> str:
        """Return the name that `policy` reads."""
        return f"recompute:{self.frames}"


def policy(commit: str | Recompute) -> str | Recompute:
    """Return the policy that a name stands for: "lazy", "eager" or "recompute:FRAMES".

    Raises ValueError for anything else.
    """
    name, _, frames = commit.partition(":") if isinstance(commit, str) else (commit, "", "")
    if name == "recompute" and frames.isdecimal():
        return Recompute(int(frames))
    if not isinstance(commit, Recompute) and commit not in ("lazy", "eager"):
        raise ValueError(f"commit: must be lazy, eager or recompute:FRAMES, got {commit!r}")
    return commit


# who may use a model's cache: the generation that started it last
_HOLDERS: weakref.WeakKeyDictionary[CausalModel, weakref.ref[CachedModel]] = (
    weakref.WeakKeyDictionary()
)


class CachedModel:
    """A model, and how much of each sequence its cache holds.

    Blocks have places in the cache. A block's place is its index, until `restart` leaves out the
    oldest ones but the sink: what follows moves up. `seed` and `sequences` key the noise.
    """

    def __init__(
        self,
        model: CausalModel,
        schedule: Schedule,
        prompts: Sequence[str],
        policy: str | Recompute = "lazy",
        stage: str = "commit",
        *,
        seed: int | Sequence[int] = 0,
        sequences: Sequence[int] | None = None,
    ) -> None:
        self.model, self.schedule, self.policy = model, schedule, policy
        self._seed = seed
        self._sequences = range(len(prompts)) if sequences is None else sequences
        # the stage that its clean passes are timed as
        self.stage = stage
        # places in the cache that are filled, for each sequence
        self.written = [0] * len(prompts)
        # the blocks that have no place: after the sink, before what was seen at the last restart
        self._left_out = range(0)
        model.start(prompts)
        _HOLDERS[model] = weakref.ref(self)

    def restart(self, prompts: Sequence[str], made: int | None = None) -> None:
        """Empty the cache and follow `prompts`: what is still seen will be written anew.

        Of the first `made` blocks the sink and those in the next block's window keep a place; None:
        all do.
        """
        self._require_held()
        size, _, _, _ = self.model.block_shape
        sink, window = math.ceil(self.model.sink_frames / size), self.model.window_frames
        self._left_out = range(0)
        if made is not None and window is not None:
            self._left_out = range(sink, max(sink, made - math.ceil((window - size) / size)))
        self.written = [0] * len(prompts)
        self.model.start(prompts)

    def catch_up(
        self,
        index: int,
        rows: Rows | None,
        blocks: Sequence[Tensor] | Mapping[int, Tensor],
        clock: Clock,
    ) -> int:
        """Bring the cache of `rows` up to block `index`; return the frame where that block sits.

        All pending blocks of a sequence go through the model in one multi-block pass: a clean one,
        or one at the schedule's `context`. Those that can no longer change what `index` sees,
        through any number of layers, are left out.
        """
        self._require_held()
        size, _, _, _ = self.model.block_shape
        if isinstance(self.policy, Recompute):
            order = range(max(0, index - math.ceil(self.policy.frames / size)), index)
            self._write(blocks, order, 0, rows, clock, index)
            return len(order) * size
        order = [block for block in range(index) if block not in self._left_out]
        place = len(order)
        members = range(len(self.written)) if rows is None else rows.members
        for written in sorted({self.written[row] for row in members}):
            group = [row for row in members if self.written[row] == written]
            some = None if len(group) == len(self.written) else Rows(group)
            for first, last in self._pending(written, place):
                self._write(blocks, order[first:last], first * size, some, clock, index)
            for row in group:
                self.written[row] = max(written, place)
        return place * size

    def passes(self, index: int) -> int:
        """Return how many passes of block `index` belong to `denoise`."""
        return len(self.schedule.steps(index))

    def denoise(self, index: int, rows: Rows | None, start_frame: int) -> Tensor:
        """Return clean latents `[b, F, C, h, w]` of block `index`, from the noise keyed by it."""
        self._require_held()
        model, on = self.model, None if rows is None else rows.on(self.model.device)
        latents = self._noise(index, 0, rows)
        for step, timestep in enumerate(self.schedule.steps(index)):
            if step:
                latents = self._noised(latents, index, step, rows)
            # models know the level of every timestep but 0
            level = {} if timestep else {"sigma": noise_level(timestep)}
            latents = model.denoise(latents, timestep, start_frame=start_frame, rows=on, **level)
        if not self.schedule.clean_pass and not isinstance(self.policy, Recompute):
            # the next block attends to the K/V of the last noisy step
            model.keep(start_frame=start_frame, rows=on)
            self._fill(rows, start_frame)
        return latents

    def forget(self, index: int, rows: Sequence[int]) -> None:
        """Let block `index` of the sequences `rows` count as unwritten."""
        place = self._place(index)
        for row in rows:
            self.written[row] = min(self.written[row], place)

    def _place(self, index: int) -> int:
        return index - len([block for block in self._left_out if block < index])

    def _fill(self, rows: Rows | None, start_frame: int) -> None:
        """Count the block at `start_frame` as written."""
        for row in range(len(self.written)) if rows is None else rows.members:
            self.written[row] = start_frame // self.model.block_shape[0] + 1

    def _noise(self, index: int, step: int, rows: Rows | None) -> Tensor:
        """Return the noise of one step of block `index`, `[b, F, C, h, w]`."""
        model, sequences = self.model, self._sequences
        members = range(len(sequences)) if rows is None else rows.members
        ids = tuple(sequences[row] for row in members)
        seed = self._seed
        seeds = seed if isinstance(seed, int) else tuple(seed[row] for row in members)
        drawn = noise.normal(model.block_shape, seed=seeds, sequences=ids, block=index, step=step)
        return move(drawn.to(torch.promote_types(model.dtype, torch.float32)), model.device)

    def _noised(self, clean: Tensor, index: int, step: int, rows: Rows | None) -> Tensor:
        """Return the input of a step of block `index` from what was predicted before it."""
        sigma = noise_level(self.schedule.steps(index)[step])
        return (1 - sigma) * clean + sigma * self._noise(index, step, rows)

    def _require_held(self) -> None:
        if _HOLDERS[self.model]() is not self:
            raise RuntimeError(
                "sdvg: the model's cache belongs to a generation that was started later; "
                "finish one before the next, or load a second pair of models"
            )

    def _pending(self, written: int, place: int) -> list[tuple[int, int]]:
        """Return the ranges of places in [written, place) that must be written, oldest first."""
        size, _, _, _ = self.model.block_shape
        sink = math.ceil(self.model.sink_frames / size)
        horizon = 0
        if self.model.receptive_frames is not None:
            horizon = place - math.ceil(self.model.receptive_frames / size)
        if horizon <= max(written, sink):
            ranges = [(written, place)]
        else:
            ranges = [(written, min(sink, place)), (horizon, place)]
        return [(first, last) for first, last in ranges if first < last]

    def _write(
        self,
        blocks: Sequence[Tensor] | Mapping[int, Tensor],
        order: Sequence[int],
        start_frame: int,
        rows: Rows | None,
        clock: Clock,
        index: int,
    ) -> None:
        """Write the finished blocks `order` of `rows` at `start_frame`: a pass a noise level."""
        model, on = self.model, None if rows is None else rows.on(self.model.device)
        for timestep, group in itertools.groupby(order, self.schedule.context):
            parts = [self._context(blocks[block], block, rows) for block in group]
            # as part of another stage they are no units of it
            units = len(parts) * len(parts[0]) if self.stage == "commit" else 0
            # only models that run schedules without a clean pass need the argument
            level = {} if self.schedule.clean_pass else {"timestep": timestep}
            with clock.stage(self.stage, units, model.device, index):
                model.write(torch.cat(parts, dim=1), start_frame=start_frame, rows=on, **level)
            start_frame += len(parts) * model.block_shape[0]

    def _context(self, clean: Tensor, index: int, rows: Rows | None) -> Tensor:
        """Return what the K/V of block `index` are made of, `[b, F, C, h, w]`."""
        # given latents and drafts may lie on two devices
        clean = move(clean, self.model.device)
        clean = clean if rows is None else clean[rows.on(self.model.device)]
        if self.schedule.context(index) == 0:
            return clean
        return self._noised(clean, index, len(self.schedule.steps(index)) - 1, rows)
