"""What the diagonal loop keeps on the device, and one pass of it: a CUDA graph for each width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sdvg.host import move
from sdvg_kernels import TokenGrid, diagonal_schedule, sample_tokens

if TYPE_CHECKING:
    from sdvg.tokens.diagonal import DiagonalDecoder


class TokenModel(Protocol):
    """A model that feeds tokens to any slots of a cache (`sdvg.models.tokens.TokenLlama`)."""

    device: torch.device
    vocabulary: int

    def parameters(self) -> Iterator[Tensor]:
        """Yield the weights: passes are captured anew where they have moved."""
        ...

    def new_cache(self, batch: int, slots: int) -> object:
        """Return an empty cache; ValueError where the model has no such positions."""
        ...

    def clear(self, cache: object) -> None:
        """Write zeros over all K/V, as in a new cache."""
        ...

    def prefill(self, ids: Tensor, cache: object) -> object:
        """Write the K/V of `ids [B, L]` to slots 0 to L - 1, each token seeing those before it."""
        ...

    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        steps: Tensor,
        grid: TokenGrid,
        cache: object,
        *,
        published: bool = False,
        length: int | None = None,
    ) -> Tensor:
        """Feed `ids [B, T]` to `slots [B, T]` (-1: padding) and return logits [B, T, ids].

        Logits are of all ids, or of those up to the last that a frame's tokens may have. `steps`
        and `grid` say what each sees (`sdvg_kernels.diagonal_mask`): with `published`, all slots up
        to its own. No slot from `length` on is seen.
        """
        ...


class Window:
    """The passes of some frames behind a prefix, and the buffers that they read and write.

    Attributes:
        plan: the `DiagonalSchedule`.
    """

    def __init__(
        self, decoder: DiagonalDecoder, cache: object, batch: int, prefix: int, frames: int
    ) -> None:
        self._decoder, self._cache = decoder, cache
        layout, device = decoder.layout, decoder.model.device
        grid = decoder.grid(prefix)
        self.plan = plan = diagonal_schedule(
            frames, layout.height, layout.width, decoder.k, grid.mode, decoder.row_start,
            prefix=prefix, extra=layout.extra, device=device,
        )  # fmt: skip
        place = (plan.frames * layout.height + plan.rows) * layout.width + plan.columns
        # a row more, of padding alone, for sequences that have not begun or are done
        self._tables = tuple(
            torch.cat((table, torch.full_like(table[:1], idle)))
            for table, idle in (
                (plan.slots, -1), (plan.steps, 0), (plan.sources, 0), (plan.outputs, -1), (place, 0)
            )
        )  # fmt: skip
        # no slot from here on is seen, by pass
        self._reach = (plan.slots.amax(1) + 1).tolist()

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # less `first`: the sampler writes codes from 0
        self._ids = integers(batch, plan.size)
        self._uncond = integers(batch, prefix) if decoder.sampling.guidance != 1 else None
        self._at, self._seeds, self._sequences = integers(batch), integers(batch), integers(batch)
        self._offset = integers(1)
        self._row = torch.arange(batch, device=device)[:, None] * plan.size
        self._graphs: dict[int, Callable[[], None]] = {}

    def begin(
        self,
        prefix: Tensor,
        uncond: Tensor | None,
        first_frame: int,
        seed: int,
        sequences: Sequence[int],
        delays: Sequence[int],
    ) -> None:
        """Write the prefix [B, P] and its K/V; the next pass is the first."""
        layout, model = self._decoder.layout, self._decoder.model
        self._ids.zero_()
        if layout.eol is not None:
            grid = self.plan.grid
            rows = [
                grid.slot(frame, row, grid.width)
                for frame in range(len(self.plan.frame_ends))
                for row in range(grid.height)
            ]
            rows = [slot for slot in rows if slot < self.plan.size]
            self._ids[:, rows] = layout.eol - layout.first
        self._ids[:, : prefix.shape[1]] = prefix - layout.first
        fed = prefix
        if uncond is not None:
            self._uncond.copy_(uncond - layout.first)
            fed = torch.cat((prefix, uncond))
        # what is seen before it is decoded (published) must not be an older video's, nor what a
        # mask leaves out be NaN
        model.clear(self._cache)
        # the last one is fed by pass 0
        model.prefill(fed[:, :-1], self._cache)
        self._seeds.fill_(seed)
        self._sequences.copy_(torch.tensor(sequences, dtype=torch.int64))
        self._at.copy_(torch.tensor([-delay for delay in delays], dtype=torch.int64))
        self._offset.fill_(first_frame * layout.height * layout.width)

    def run(self, passes: Sequence[int]) -> None:
        """Run the pass that each live sequence is at: `passes`, as the host knows them."""
        width = max(self.plan.buckets[place] for place in passes)
        if not self._decoder.graphs:
            self._pass(width, max(self._reach[place] for place in passes))
            return
        if width not in self._graphs:
            self._graphs[width] = self._capture(width)
        self._graphs[width]()

    def write_extra(self, frame: int, rows: Sequence[int], ids: Tensor) -> None:
        """Write the extra tokens [rows, extra] that lie before `frame` of the window."""
        layout = self._decoder.layout
        end = self.plan.grid.slot(frame, 0, 0)
        device = self._ids.device
        where = move(torch.tensor(rows), device)[:, None]
        slots = torch.arange(end - layout.extra, end, device=device)
        self._ids[where, slots] = move(ids, device) - layout.first

    def frame(self, frame: int, rows: Sequence[int]) -> Tensor:
        """Return the codes [rows, height, width] of a frame of the window; -1: none was drawn."""
        grid = self.plan.grid
        start = grid.slot(frame, 0, 0)
        whole = self._ids[list(rows), start : start + grid.height * grid.row_stride]
        return whole.unflatten(1, (grid.height, grid.row_stride))[:, :, : grid.width]

    def _pass(self, width: int, length: int | None = None) -> None:
        """Feed, attend, sample and write; nothing is read back."""
        decoder, plan = self._decoder, self.plan
        layout, sampling = decoder.layout, decoder.sampling
        total = len(plan.widths)
        at = torch.where((self._at < 0) | (self._at >= total), total, self._at)
        slots, steps, sources, outputs, place = (table[at, :width] for table in self._tables)
        fed = self._ids.gather(1, sources.long())
        if self._uncond is not None:
            own = self._uncond.gather(1, sources.long().clamp(max=self._uncond.shape[1] - 1))
            fed = torch.cat((fed, torch.where(sources < plan.grid.prefix, own, fed)))
            slots, steps = slots.repeat(2, 1), steps.repeat(2, 1)
        # what has no distribution is found when the frame is whole
        fed = (fed + layout.first).clamp(min=0)
        logits = decoder.model.forward(
            fed, slots, steps, plan.grid, self._cache, published=decoder.published, length=length
        )
        logits = logits[..., layout.first : layout.first + layout.codes].flatten(0, 1)
        rows = outputs.numel()

        def each(values: Tensor) -> Tensor:
            return values[:, None].expand(-1, width).reshape(-1)

        sample_tokens(
            logits[:rows],
            uncond=None if self._uncond is None else logits[rows:],
            seeds=each(self._seeds),
            sequences=each(self._sequences),
            positions=(place + self._offset).flatten(),
            guidance=sampling.guidance,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            out=self._ids,
            index=torch.where(outputs < 0, -1, outputs + self._row).flatten(),
        )
        self._at += 1

    def _capture(self, width: int) -> Callable[[], None]:
        """Capture the pass of a width and return its replay; sequences stay where they are."""
        decoder, at = self._decoder, self._at.clone()

        def again() -> None:
            # a pass done twice writes the same: only the count must be put back
            self._at.copy_(at)
            self._pass(width)

        decoder.recorder.warm_up(again, decoder.model.device)
        self._at.copy_(at)
        try:
            return decoder.recorder.record(partial(self._pass, width), decoder.model.device)[1]
        except BaseException:
            # the pool of a broken capture, or of one that Ctrl-C ended, takes no new one
            decoder.recorder.drop()
            raise
