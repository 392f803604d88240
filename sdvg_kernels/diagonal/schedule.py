"""`diagonal_schedule`: what each pass of diagonal decoding feeds, and where its outputs go.

A grid of tokens is decoded along diagonals: a row starts when the row above it has `k` tokens, so
that token (frame, row, column) is the output of pass

    spatial         f S + r k + c                      S = (h - 1) k + w passes a frame
    spatiotemporal  (f h + r) k + c                    (F h - 1) k + w passes in all
    zipar           f S + c, then f S + w + (r - 1) k + c    S = 2 w + (h - 2) k

and k = width is raster decoding. h = 3, w = 4, k = 2, the passes of one frame:

    row 0   0 1 2 3
    row 1       2 3 4 5
    row 2           4 5 6 7

What an entry of a pass sees is one line: a key slot `s` is seen from slot `q` in pass `p` if
`s <= q` and (`s == q`, or `s` holds no token of a grid, or the token of `s` came before pass `p`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from sdvg_kernels._check import require

Mode = Literal["spatial", "spatiotemporal", "zipar"]
RowStart = Literal["above", "newest", "prompt", "eol"]
MODES = ("spatial", "spatiotemporal", "zipar")
ROW_STARTS = ("above", "newest", "prompt", "eol")
_value = functools.partial(require, "diagonal_schedule")


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a video lie in a sequence, and in which pass each one is decoded.

        [prefix] [frame 0: rows of width tokens, each with its eol] [extra] [frame 1] [extra] ...

    Args:
        height, width: tokens of a frame.
        k: tokens that the row above is ahead, in [1, width].
        mode: "spatial" (frame after frame), "spatiotemporal" (a frame's first row starts when the
            last row of the frame before has `k` tokens), or "zipar" (spatial, but the first row of
            a frame is decoded alone).
        prefix: slot of the first token of frame 0, at least 1: the token before it starts frame 0.
        extra: tokens between two frames, fed by the caller: 11 are MineWorld's action.
        eol: whether each row ends with an end-of-line token, which has a slot but is not decoded.

    Raises: ValueError.
    """

    height: int
    width: int
    k: int
    mode: Mode = "spatial"
    prefix: int = 1
    extra: int = 0
    eol: bool = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        _value(self.height >= 1, "height", "be at least 1", self.height)
        _value(self.width >= 1, "width", "be at least 1", self.width)
        rule = f"be in [1, width {self.width}]"
        _value(1 <= self.k <= self.width, "k", rule, self.k, "k = width is raster decoding")
        _value(self.mode in MODES, "mode", f"be one of {MODES}", repr(self.mode))
        remedy = "the token before frame 0 starts it"
        _value(self.prefix >= 1, "prefix", "be at least 1", self.prefix, remedy)
        _value(self.extra >= 0, "extra", "be at least 0", self.extra)

    @property
    def row_stride(self) -> int:
        """Slots from a row to the next."""
        return self.width + self.eol

    @property
    def frame_stride(self) -> int:
        """Slots from a frame to the next."""
        return self.height * self.row_stride + self.extra

    @property
    def lead(self) -> int:
        """Passes by which the rows after a frame's first start later than `k` apart."""
        return self.width - self.k if self.mode == "zipar" else 0

    @property
    def frame_passes(self) -> int:
        """Passes from the start of a frame to the start of the next."""
        if self.mode == "spatiotemporal":
            return self.height * self.k
        return self.start(0, self.height - 1) + self.width

    def slot(self, frame: int, row: int, column: int) -> int:
        """Return where a token lies in the sequence."""
        return self.prefix + frame * self.frame_stride + row * self.row_stride + column

    def start(self, frame: int, row: int) -> int:
        """Return the pass that gives the row's first token; column `c` is `c` passes later."""
        first = frame * self.frame_passes if frame else 0
        return first + row * self.k + (self.lead if row else 0)

    def passes(self, frames: int) -> int:
        """Return how many passes `frames` frames take."""
        return self.start(frames - 1, self.height - 1) + self.width if frames else 0

    def slots(self, frames: int) -> int:
        """Return the slots of prefix and `frames` frames, without the extra tokens behind them."""
        return self.prefix + frames * self.frame_stride - (self.extra if frames else 0)


@dataclass(frozen=True)
class DiagonalSchedule:
    """The entries of every pass, as tables `[passes, width]` on the device, padded at the right.

    An entry is one token that is fed: its K/V go to its slot, and the logits at it may give one
    token. The entries of a pass ascend by slot. Of a pass, take `table[p, : buckets[p]]`; for
    sequences at passes `p [B]` (int64 on the device), `table[p, : width]` is `[B, width]`, with
    `width` the largest of their buckets.

    Tables, int32 except `fills`:
        slots: cache slot of the entry; -1 is padding.
        positions: position id: the slot; 0 for padding, so that a table of angles can be read.
        sources: slot of the token that is fed, for a buffer of token ids by slot `[B, slots]`. It
            is the own slot but for a stand-in, which is fed in place of a row's last token when the
            next row starts before that is decoded. 0 for padding.
        outputs: slot of the token that the logits give, always `slots + 1`; -1: none is sampled.
        frames, rows, columns: the place of that token. Where there is none: a fill has its own row
            and `columns = width`; tokens that lead to a row have the place that they lead to.
            -1 for padding.
        steps: the pass itself, in every entry; what came in an earlier one is seen. 0 for padding.
        fills: bool; the entry feeds a row's true last token in the pass after it was decoded,
            and gives no output: its K/V replace a stand-in's, or are written for the first time.

    On the host:
        grid: the layout, which `diagonal_mask` and `diagonal_attention` take.
        row_start: how rows start.
        widths, buckets: entries of each pass, and the width that they are padded to.
        frame_starts, frame_ends: for each frame, the pass that feeds what leads to it (its extra
            tokens must lie in the buffer of ids by then), and the pass that gives its last token.
        size: slots that a cache needs. One more, at the end, can take the K/V of padding, as
            `cache[:, slots] = k` then writes them there.
    """

    grid: TokenGrid
    row_start: RowStart
    slots: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor
    outputs: torch.Tensor
    frames: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    steps: torch.Tensor
    fills: torch.Tensor
    widths: tuple[int, ...]
    buckets: tuple[int, ...]
    frame_starts: tuple[int, ...]
    frame_ends: tuple[int, ...]
    size: int


class _Entry(NamedTuple):
    slot: int
    source: int
    output: int
    frame: int
    row: int
    column: int
    fill: bool = False


def diagonal_schedule(
    frames: int,
    height: int,
    width: int,
    k: int,
    mode: Mode = "spatial",
    row_start: RowStart = "above",
    *,
    prefix: int = 1,
    extra: int = 0,
    final_fill: bool = False,
    buckets: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> DiagonalSchedule:
    """Return the passes that decode `frames` frames of `height` x `width` tokens along diagonals.

    Pass 0 feeds the last token of the prefix (slot `prefix - 1`) and gives token (0, 0, 0): prefill
    the `prefix - 1` tokens before it, or the whole prefix, sample from its last logits, and go on
    with pass 1. A frame's first pass feeds what leads to it, in one go: the true last token of the
    frame before, its end of line, and the `extra` tokens. Fills ride along in passes that there are
    anyway, but for the one of the very last token.

    Row r >= 1 starts from slot (r - 1, width - 1), whose token is not there yet if `k < width`.
    `row_start` says what stands in for it, in that slot and seen by no other entry, until the true
    token is fed one pass after it was decoded:

        newest  (r - 1, k - 1), the newest token of the row above (MineWorld's demo)
        above   the newest token of row r - 2, at best the one right above the slot; row 1 has no
                such row and takes the newest (ZipAR for LlamaGen)
        prompt  the token at the same place of the frame that the prefix ends with (MineWorld)
        eol     none does: rows end with an end-of-line token, known beforehand, which starts the
                next row (Emu3, Lumina-mGPT). The buffer of ids must hold it in its slots.

    A spatio-temporal frame without extra tokens starts from a stand-in in the same way.

    Args:
        frames: how many, at least 1; 1 is an image.
        height, width, k, mode, prefix, extra: as `TokenGrid` says.
        row_start: "above", "newest", "prompt" or "eol".
        final_fill: one pass more, without output, that writes the K/V of the last token (and of its
            end of line), so that the sequence can go on from the cache. Raster decoding needs the
            same pass for the same.
        buckets: widths that passes are padded to, the largest at least the widest pass. None:
            powers of two, and the widest.
        device: where the tables are.

    Returns: DiagonalSchedule, of `grid.passes(frames)` passes, and one with `final_fill`.

    Raises: ValueError.

    Source: Diagonal Decoding (arXiv 2503.14070), ZipAR (arXiv 2412.04062); the released loops of
    both, run pass by pass. Cost: some microseconds a token, on the host, once.
    """
    _value(frames >= 1, "frames", "be at least 1", frames)
    _value(row_start in ROW_STARTS, "row_start", f"be one of {ROW_STARTS}", repr(row_start))
    grid = TokenGrid(height, width, k, mode, prefix, extra, row_start == "eol")
    if row_start == "prompt":
        remedy = "or use row_start='newest'"
        rule = f"end with a whole frame and what follows it ({grid.frame_stride} tokens)"
        _value(
            prefix >= grid.frame_stride, "prefix", f"{rule} for row_start='prompt'", prefix, remedy
        )
    passes: list[list[_Entry]] = [[] for _ in range(grid.passes(frames) + final_fill)]
    for frame in range(frames):
        for row in range(height):
            _fill_row(passes, grid, row_start, frames, frame, row)

    widths = tuple(map(len, passes))
    fit = _buckets(widths, buckets)
    padding = _Entry(-1, 0, -1, -1, -1, -1)
    table = torch.tensor(
        [[*sorted(entries), *[padding] * (max(fit) - len(entries))] for entries in passes],
        dtype=torch.int32,
    )
    table = table.permute(2, 0, 1).contiguous().to(device)
    slots, sources, outputs, places_f, places_r, places_c, fills = table.unbind()
    steps = torch.arange(len(passes), dtype=torch.int32, device=device)[:, None]
    ends = tuple(grid.start(frame, height - 1) + width - 1 for frame in range(frames))
    return DiagonalSchedule(
        grid=grid,
        row_start=row_start,
        slots=slots,
        positions=slots.clamp(min=0),
        sources=sources,
        outputs=outputs,
        frames=places_f,
        rows=places_r,
        columns=places_c,
        steps=torch.where(slots < 0, 0, steps),
        fills=fills.bool(),
        widths=widths,
        buckets=fit,
        frame_starts=tuple(grid.start(frame, 0) for frame in range(frames)),
        frame_ends=ends,
        size=grid.slots(frames),
    )


def _fill_row(
    passes: list[list[_Entry]],
    grid: TokenGrid,
    row_start: RowStart,
    frames: int,
    frame: int,
    row: int,
) -> None:
    """Add what decodes a row: what leads to it, its own tokens, and its last one as a fill."""
    start, first = grid.start(frame, row), grid.slot(frame, row, 0)
    leading = grid.extra if frame and not row else 0
    # end of line and extra tokens, or the token before the row, or what stands in for it
    lead = first - leading - (grid.eol and (row > 0 or frame > 0))
    if lead == first:
        lead -= 1
    for slot in range(lead, first):
        output = first if slot == first - 1 else -1
        source = slot
        if slot == first - 1 and not leading:
            source = _source(grid, row_start, frame, row)
        passes[start].append(_Entry(slot, source, output, frame, row, 0))
    for column in range(1, grid.width):
        slot = first + column
        passes[start + column].append(_Entry(slot - 1, slot - 1, slot, frame, row, column))

    # the row's last token: fed by the row that it leads to, if that starts right then
    end, last = start + grid.width, first + grid.width - 1
    below, onto = (row + 1, frame) if row + 1 < grid.height else (0, frame + 1)
    leads = not grid.eol and (below or not grid.extra) and grid.start(onto, below) == end
    if end < len(passes) and not (leads and onto < frames):
        passes[end].append(_Entry(last, last, -1, frame, row, grid.width, True))
        if onto == frames and grid.eol:
            passes[end].append(_Entry(last + 1, last + 1, -1, frame, row, grid.width))


def _source(grid: TokenGrid, row_start: RowStart, frame: int, row: int) -> int:
    """Return the slot of the token that starts a row, fed in the slot before the row's first."""
    own = grid.slot(frame, row, 0) - 1
    if grid.eol or (not frame and not row):
        return own
    # the row whose last token is wanted
    above, of = (row - 1, frame) if row else (grid.height - 1, frame - 1)
    there = grid.start(frame, row) - grid.start(of, above)
    if there >= grid.width:
        return own
    if row_start == "prompt":
        return grid.slot(-1, above, grid.width - 1)
    if row_start == "above" and above:
        there = grid.start(frame, row) - grid.start(of, above - 1)
        return grid.slot(of, above - 1, min(there, grid.width) - 1)
    return grid.slot(of, above, there - 1)


def _buckets(widths: tuple[int, ...], buckets: Sequence[int] | None) -> tuple[int, ...]:
    """Return the bucket of each width."""
    widest = max(widths)
    if buckets is None:
        buckets = [*(1 << i for i in range((widest - 1).bit_length())), widest]
    fits = len(buckets) > 0 and min(buckets) >= 1 and max(buckets) >= widest
    rule = f"be at least 1 and reach the widest pass, {widest}"
    _value(fits, "buckets", rule, list(buckets))
    ascending = sorted(set(buckets))
    return tuple(next(b for b in ascending if b >= width) for width in widths)
