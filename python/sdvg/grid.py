"""The (block, step) grid: blocks of one model side by side, each at a step of its own.

Rows are blocks, columns forwards; a `c` is a clean pass. Two in flight:

    4, 3, 2, 2 steps and no clean pass     4 steps and a clean pass

    1 2 3 4                                1 2 3 4 c
          1 2 3                                    1 2 3 4 c
              1 2                                          1 2 3 4
                1 2

A block's first step runs in the last forward of the block before, under the block-causal mask. That
forward makes the very keys that the block before leaves in the cache, so the video is that of one
block after the other, to rounding, in fewer and larger forwards: one a block where blocks have two
steps, a clean pass for nothing where there are some. Without a clean pass the first frames come a
little later: the forward that ends their block has two blocks in it. With three in flight or more,
first steps attend to blocks that are not done: that video is another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdvg.clock import Clock
from sdvg.commit import CachedModel
from sdvg.host import Rows
from sdvg.schedule import Schedule, noise_level
from sdvg.types import CausalModel


class Flight(NamedTuple):
    """A block on its way."""

    block: int
    # how many of its forwards are made, and the clean latents that the last one predicts
    made: int = 0
    latents: Tensor | None = None


class Grid(CachedModel):
    """A model of which up to `in_flight` blocks are made side by side, for all sequences.

    A block begins as soon as the one `in_flight - 1` before it is in its last forward, and so that
    it ends at least a forward after the one before it; none begins that the video of `num_blocks`
    does not have. `options` are `CachedModel`'s. The model needs `denoise_blocks`.
    """

    def __init__(
        self,
        model: CausalModel,
        schedule: Schedule,
        prompts: Sequence[str],
        *,
        in_flight: int,
        num_blocks: int,
        **options: object,
    ) -> None:
        super().__init__(model, schedule, prompts, **options)
        self.in_flight, self._num_blocks = in_flight, num_blocks
        self._flights: list[Flight] = []
        # what is finished and may be asked for again
        self._ready: dict[int, Tensor] = {}

    def restart(self, prompts: Sequence[str], made: int | None = None) -> None:
        """Empty the cache and follow `prompts`; blocks on their way begin again."""
        self._flights, self._ready = [], {}
        super().restart(prompts, made)

    def catch_up(
        self,
        index: int,
        rows: Rows | None,
        blocks: Sequence[Tensor] | Mapping[int, Tensor],
        clock: Clock,
    ) -> int:
        """Return the frame where `index` sits; what is in flight leaves its own keys."""
        if self._flights:
            return self._place(index) * self.model.block_shape[0]
        return super().catch_up(index, rows, blocks, clock)

    def passes(self, index: int) -> int:
        """Return how many passes a block takes: its clean one is among them, but for the last."""
        return len(self.schedule.steps(index)) + (
            self.schedule.clean_pass and index < self._num_blocks - 1
        )

    def denoise(self, index: int, rows: Rows | None, start_frame: int) -> Tensor:
        """Return clean latents of block `index`: as many forwards as it still needs."""
        self._require_held()
        self._ready = {block: made for block, made in self._ready.items() if block >= index}
        while index not in self._ready:
            flights = self._boarded(index)
            before = index - flights[0].block
            self._advance(flights, start_frame - before * self.model.block_shape[0])
        return self._ready[index]

    def _boarded(self, index: int) -> list[Flight]:
        """Return what takes part in the next forward."""
        flights = self._flights or [Flight(index)]
        while (block := flights[-1].block + 1) < self._num_blocks:
            waits = len(flights) == self.in_flight - 1 and self._left(flights[0]) > 1
            if waits or len(flights) >= self.in_flight:
                break
            # one block ends after the other
            if self._left(Flight(block)) <= self._left(flights[-1]):
                break
            flights = [*flights, Flight(block)]
        return flights

    def _advance(self, flights: list[Flight], start_frame: int) -> None:
        """Run one forward; done again after an interrupt, it does the same."""
        size = self.model.block_shape[0]
        given = torch.cat([self._input(flight) for flight in flights], dim=1)
        levels = [self._level(flight) for flight in flights]
        made = self.model.denoise_blocks(given, levels, start_frame=start_frame)
        moved, ready = [], {}
        for flight, latents in zip(flights, made.split(size, dim=1), strict=True):
            moved.append(Flight(flight.block, flight.made + 1, latents))
            if moved[-1].made == len(self.schedule.steps(flight.block)):
                ready[flight.block] = latents
        if not self._left(moved[0]):
            self.model.keep(start_frame=start_frame)
            self._fill(None, start_frame)
            del moved[0]
        # a block that counts as ready has its keys in the cache, or is still in flight
        self._ready |= ready
        self._flights = moved

    def _left(self, flight: Flight) -> int:
        """Return how many forwards a block still needs."""
        return self.passes(flight.block) - flight.made

    def _input(self, flight: Flight) -> Tensor:
        if not flight.made:
            return self._noise(flight.block, 0, None)
        if flight.made == len(self.schedule.steps(flight.block)):
            return flight.latents
        return self._noised(flight.latents, flight.block, flight.made, None)

    def _level(self, flight: Flight) -> tuple[float, float]:
        """Return the timestep of a block's next forward, and the noise level of its input."""
        steps = self.schedule.steps(flight.block)
        if flight.made == len(steps):
            return 0.0, 0.0
        return steps[flight.made], noise_level(steps[flight.made])
