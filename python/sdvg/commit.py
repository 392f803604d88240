"""When finished blocks enter a model's KV cache."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvg import noise
from sdvg.clock import Clock
from sdvg.schedule import Schedule
from sdvg.types import CausalModel


@dataclass(frozen=True)
class Recompute:
    """Krea's policy: keep nothing, write the last `frames` clean latents anew before each block."""

    frames: int = 3

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"commit: frames must be at least 1, got {self.frames}")


# who may use a model's cache: the generation that started it last
_HOLDERS: weakref.WeakKeyDictionary[CausalModel, weakref.ref[CachedModel]] = (
    weakref.WeakKeyDictionary()
)


class CachedModel:
    """A model, and how much of each sequence its cache holds."""

    def __init__(
        self,
        model: CausalModel,
        schedule: Schedule,
        prompts: Sequence[str],
        policy: str | Recompute = "lazy",
        stage: str = "commit",
    ) -> None:
        self.model, self.schedule, self.policy = model, schedule, policy
        # the stage that its clean passes are timed as
        self.stage = stage
        # blocks in the cache, for each sequence
        self.written = [0] * len(prompts)
        model.start(prompts)
        _HOLDERS[model] = weakref.ref(self)

    def restart(self, prompts: Sequence[str]) -> None:
        """Empty the cache and follow `prompts`: what is still seen will be written anew."""
        self._require_held()
        self.written = [0] * len(prompts)
        self.model.start(prompts)

    def catch_up(
        self,
        index: int,
        rows: Tensor | None,
        blocks: Sequence[Tensor] | Mapping[int, Tensor],
        clock: Clock,
    ) -> int:
        """Bring the cache of `rows` up to block `index`; return the frame where that block sits.

        All pending blocks of a sequence go through the model in one multi-block clean pass. Those
        that can no longer change what `index` sees, through any number of layers, are left out.
        """
        self._require_held()
        size, _, _, _ = self.model.block_shape
        if isinstance(self.policy, Recompute):
            first = max(0, index - math.ceil(self.policy.frames / size))
            if first == index:
                return 0
            context = self._join(blocks, first, index)[:, -self.policy.frames :]
            self._write(context, 0, rows, 1, clock)
            return context.shape[1]
        members = range(len(self.written)) if rows is None else rows.tolist()
        for written in sorted({self.written[row] for row in members}):
            group = [row for row in members if self.written[row] == written]
            for first, last in self._pending(written, index):
                clean = self._join(blocks, first, last)
                self._write(clean, first * size, self._index(group), last - first, clock)
            for row in group:
                self.written[row] = max(written, index)
        return index * size

    def denoise(
        self,
        index: int,
        rows: Tensor | None,
        start_frame: int,
        seed: int,
        sequences: tuple[int, ...],
    ) -> Tensor:
        """Return clean latents `[b, F, C, h, w]` of block `index`, from the noise keyed by it."""
        self._require_held()
        model, shape = self.model, self.model.block_shape
        wide = torch.promote_types(model.dtype, torch.float32)
        ids = sequences if rows is None else tuple(sequences[row] for row in rows.tolist())
        rows = None if rows is None else rows.to(model.device)

        def draw(step: int) -> Tensor:
            drawn = noise.normal(shape, seed=seed, sequences=ids, block=index, step=step)
            if model.device.type == "cuda":
                # from pageable memory the host would wait for all that the stream has to do yet
                drawn = drawn.pin_memory()
            return drawn.to(model.device, wide, non_blocking=True)

        latents = draw(0)
        for step, timestep in enumerate(self.schedule.steps(index)):
            if step:
                sigma = timestep / 1000
                latents = (1 - sigma) * latents + sigma * draw(step)
            latents = model.denoise(latents, timestep, start_frame=start_frame, rows=rows)
        if not self.schedule.clean_pass and not isinstance(self.policy, Recompute):
            # the next block attends to the K/V of the last noisy step
            model.keep(start_frame=start_frame, rows=rows)
            for row in range(len(self.written)) if rows is None else rows.tolist():
                self.written[row] = index + 1
        return latents

    def forget(self, index: int, rows: Sequence[int]) -> None:
        """Let block `index` of the sequences `rows` count as unwritten."""
        for row in rows:
            self.written[row] = min(self.written[row], index)

    def _require_held(self) -> None:
        if _HOLDERS[self.model]() is not self:
            raise RuntimeError(
                "sdvg: the model's cache belongs to a generation that was started later; "
                "finish one before the next, or load a second pair of models"
            )

    def _pending(self, written: int, index: int) -> list[tuple[int, int]]:
        """Return the ranges of blocks in [written, index) that must be written, oldest first."""
        size, _, _, _ = self.model.block_shape
        sink = math.ceil(self.model.sink_frames / size)
        horizon = 0
        if self.model.receptive_frames is not None:
            horizon = index - math.ceil(self.model.receptive_frames / size)
        if horizon <= max(written, sink):
            ranges = [(written, index)]
        else:
            ranges = [(written, min(sink, index)), (horizon, index)]
        return [(first, last) for first, last in ranges if first < last]

    def _write(
        self, clean: Tensor, start_frame: int, rows: Tensor | None, blocks: int, clock: Clock
    ) -> None:
        batch = len(self.written) if rows is None else len(rows)
        model = self.model
        rows = None if rows is None else rows.to(model.device)
        clean = (clean if rows is None else clean[rows.to(clean.device)]).to(model.device)
        # as part of another stage they are no units of it
        units = batch * blocks if self.stage == "commit" else 0
        with clock.stage(self.stage, units, model.device):
            model.write(clean, start_frame=start_frame, rows=rows)

    def _index(self, group: list[int]) -> Tensor | None:
        return None if len(group) == len(self.written) else torch.tensor(group)

    def _join(
        self, blocks: Sequence[Tensor] | Mapping[int, Tensor], first: int, last: int
    ) -> Tensor:
        # given latents and drafts may lie on two devices
        device = self.model.device
        return torch.cat([blocks[block].to(device) for block in range(first, last)], dim=1)
