"""diagonal_schedule against a simulation that knows only when a row may start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sdvg_kernels import DiagonalSchedule, TokenGrid, diagonal_schedule

GRIDS = ((1, 1), (1, 4), (3, 1), (2, 3), (3, 4), (4, 3))
MODES = ("spatial", "spatiotemporal", "zipar")
STARTS = ("above", "newest", "prompt", "eol")
# frames, height, width, k
SIZES = [
    (frames, height, width, k)
    for frames, (height, width) in itertools.product((1, 3), GRIDS)
    for k in range(1, width + 1)
]


def simulated(frames: int, height: int, width: int, k: int, mode: str) -> dict[tuple, int]:
    """Return the pass of each token: every pass extends each row that has started by one token."""
    count = {(frame, row): 0 for frame in range(frames) for row in range(height)}
    order, passes = list(count), {}
    for step in itertools.count():
        if all(tokens == width for tokens in count.values()):
            return passes
        growing = []
        for place, (frame, row) in enumerate(order):
            above = count[order[place - 1]] if place else width
            needed = k if row or mode == "spatiotemporal" else width
            if mode == "zipar" and row == 1:
                needed = width
            if above >= needed and count[frame, row] < width:
                growing.append((frame, row))
        for frame, row in growing:
            passes[frame, row, count[frame, row]] = step
            count[frame, row] += 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "height", "width", "k"), SIZES)
def test_each_token_comes_in_the_pass_of_the_simulation(
    frames: int, height: int, width: int, k: int, mode: str
) -> None:
    passes = simulated(frames, height, width, k, mode)
    for row_start, extra in itertools.product(("newest", "eol"), (0, 2)):
        made = diagonal_schedule(frames, height, width, k, mode, row_start, prefix=3, extra=extra)
        assert len(made.slots) == max(passes.values()) + 1 == made.grid.passes(frames)
        got = {}
        for step, columns in enumerate(
            zip(made.outputs, made.frames, made.rows, made.columns, strict=True)
        ):
            for output, *place in zip(*(table.tolist() for table in columns), strict=True):
                if output >= 0:
                    assert tuple(place) not in got
                    assert output == made.grid.slot(*place)
                    got[tuple(place)] = step
        assert got == passes
        for frame in range(frames):
            assert made.frame_starts[frame] == passes[frame, 0, 0]
            assert made.frame_ends[frame] == passes[frame, height - 1, width - 1]


@pytest.mark.parametrize(
    ("grid", "k", "spatial", "spatiotemporal", "widest"),
    [
        ((15, 14, 24), 1, 555, 233, (14, 24)),
        ((15, 14, 24), 2, 750, 442, (12, 12)),
        ((15, 14, 24), 4, 1140, 860, (6, 6)),
        ((15, 14, 24), 24, 5040, 5040, (1, 1)),
        ((3, 40, 64), 1, 309, 183, (40, 64)),
        ((3, 40, 64), 2, 426, 302, (32, 32)),
        ((3, 40, 64), 4, 660, 540, (16, 16)),
        ((1, 32, 32), 1, 63, 63, (32, 32)),
        ((1, 24, 24), 2, 70, 70, (12, 12)),
    ],
)
def test_published_grids_take_the_published_passes(
    grid: tuple[int, int, int], k: int, spatial: int, spatiotemporal: int, widest: tuple[int, int]
) -> None:
    modes = zip(("spatial", "spatiotemporal"), (spatial, spatiotemporal), widest, strict=True)
    for mode, passes, most in modes:
        made = diagonal_schedule(*grid, k, mode)
        assert len(made.slots) == len(made.widths) == passes
        assert (made.outputs >= 0).sum(1).max() == most
        # a fill rides along, at most one a pass
        assert max(made.widths) <= most + 1
        assert made.fills.sum(1).max() <= 1
        final = diagonal_schedule(*grid, k, mode, final_fill=True)
        assert len(final.slots) == passes + 1


def test_zipar_takes_the_passes_of_its_released_loop() -> None:
    made = diagonal_schedule(1, 24, 24, 8, "zipar")
    assert len(made.slots) == 224 == 2 * 24 + 22 * 8
    # row 1 starts from the true token, row 3 from the newest token of row 1
    starts = {
        row: source
        for row, column, source in zip(
            made.rows.flatten().tolist(),
            made.columns.flatten().tolist(),
            made.sources.flatten().tolist(),
            strict=True,
        )
        if column == 0
    }
    grid = made.grid
    assert starts[1] == grid.slot(0, 0, 23)
    assert starts[2] == grid.slot(0, 0, 23)
    assert starts[3] == grid.slot(0, 1, 15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "height", "width", "k"), SIZES)
def test_the_cache_ends_with_every_token_in_its_slot(
    frames: int, height: int, width: int, k: int, mode: str
) -> None:
    for row_start, extra in itertools.product(STARTS, (0, 2)):
        check_slots(frames, height, width, k, mode, row_start, extra)


def check_slots(
    frames: int, height: int, width: int, k: int, mode: str, row_start: str, extra: int
) -> None:
    """Assert that what is fed was decoded or given before, and lies in its own slot at the end."""
    grid = TokenGrid(height, width, k, mode, 1, extra, row_start == "eol")
    prefix = 1 + grid.frame_stride
    made = diagonal_schedule(
        frames, height, width, k, mode, row_start, prefix=prefix, extra=extra, final_fill=True
    )
    # what the caller gives, and the slot that each token in the cache belongs to
    known = set(range(prefix))
    held = {slot: slot for slot in range(prefix - 1)}
    if row_start == "eol":
        places = itertools.product(range(frames), range(height))
        known |= {made.grid.slot(frame, row, width) for frame, row in places}
    for step, (slots, sources, outputs, fills) in enumerate(
        zip(made.slots, made.sources, made.outputs, made.fills, strict=True)
    ):
        if step in made.frame_starts:
            first = made.grid.slot(made.frame_starts.index(step), 0, 0)
            known |= set(range(first - extra, first))
        count = made.widths[step]
        assert (slots[count:] == -1).all()
        assert (outputs[count:] == -1).all()
        assert (sources[count:] == 0).all()
        assert not fills[count:].any()
        fed = slots[:count].tolist()
        assert fed == sorted(set(fed))
        for slot, source, fill in zip(
            fed, sources[:count].tolist(), fills[:count].tolist(), strict=True
        ):
            assert source in known, f"pass {step} feeds slot {source}, which nothing decoded"
            # a slot is written once, or by a stand-in and then by its own token as a fill
            assert held.get(slot, -1) != slot
            assert (slot not in held) or fill
            held[slot] = source
        known |= {output for output in outputs[:count].tolist() if output >= 0}
    assert held == {slot: slot for slot in range(made.size)}


def test_raster_decoding_feeds_one_token_a_pass_and_no_stand_in() -> None:
    for mode in MODES:
        made = diagonal_schedule(2, 3, 4, 4, mode)
        assert set(made.widths) == {1}
        assert torch.equal(made.sources, made.slots)
        assert torch.equal(made.outputs[:, 0], torch.arange(1, 25, dtype=torch.int32))
        assert not made.fills.any()


def test_a_frame_starts_with_all_that_leads_to_it() -> None:
    made = diagonal_schedule(2, 2, 3, 1, "spatial", "eol", prefix=5, extra=2)
    at = made.frame_starts[1]
    first = made.grid.slot(1, 0, 0)
    # the last token, its end of line, two tokens of the caller
    assert made.slots[at, :4].tolist() == [first - 4, first - 3, first - 2, first - 1]
    assert made.outputs[at, :4].tolist() == [-1, -1, -1, first]
    assert made.fills[at, :4].tolist() == [True, False, False, False]
    assert made.widths[at] == 4


def test_stand_ins_are_the_tokens_that_row_start_names() -> None:
    def sources(row_start: str) -> list[int]:
        made = diagonal_schedule(2, 3, 4, 1, "spatiotemporal", row_start, prefix=13)
        starts = (made.columns == 0) & (made.slots >= 0)
        return (made.sources[starts] - 13).tolist()

    # rows start at -1 (the prefix), 3, 7, then frame 1 at 11, 15, 19
    assert sources("newest") == [-1, 0, 4, 8, 12, 16]
    assert sources("above") == [-1, 0, 1, 5, 12, 13]
    assert sources("prompt") == [-1, -9, -5, -1, -9, -5]


def test_passes_are_padded_to_buckets() -> None:
    made = diagonal_schedule(1, 6, 9, 1)
    assert max(made.widths) == 6
    assert set(made.buckets) == {1, 2, 4, 6}
    assert all(bucket >= width for bucket, width in zip(made.buckets, made.widths, strict=True))
    wide = diagonal_schedule(1, 6, 9, 1, buckets=(3, 16))
    assert set(wide.buckets) == {3, 16}
    assert wide.slots.shape == (14, 16)
    assert isinstance(wide, DiagonalSchedule)


def test_tables_are_int32_and_positions_can_be_looked_up() -> None:
    made = diagonal_schedule(2, 3, 4, 2, extra=1)
    for name in ("slots", "positions", "sources", "outputs", "frames", "rows", "columns", "steps"):
        table = getattr(made, name)
        assert table.dtype == torch.int32
        assert table.shape == made.slots.shape
    assert made.fills.dtype == torch.bool
    assert torch.equal(made.positions, made.slots.clamp(min=0))
    assert made.size == 1 + 2 * 12 + 1
    assert math.prod(made.slots.shape) > (made.slots >= 0).sum() > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": -2}, "width must be at least 1, got -2"),
        (
            {"k": 0},
            "k must be in [1, width 4], got 0; k = width is raster decoding",
        ),
        (
            {"k": 5},
            "k must be in [1, width 4], got 5; k = width is raster decoding",
        ),
        (
            {"mode": "raster"},
            "mode must be one of ('spatial', 'spatiotemporal', 'zipar'), got 'raster'",
        ),
        (
            {"row_start": "last"},
            "row_start must be one of ('above', 'newest', 'prompt', 'eol'), got 'last'",
        ),
        (
            {"prefix": 0},
            "prefix must be at least 1, got 0; the token before frame 0 starts it",
        ),
        ({"extra": -1}, "extra must be at least 0, got -1"),
        (
            {"row_start": "prompt", "prefix": 12, "extra": 1},
            "prefix must end with a whole frame and what follows it (13 tokens) for "
            "row_start='prompt', got 12; or use row_start='newest'",
        ),
        (
            {"buckets": (1, 2)},
            "buckets must be at least 1 and reach the widest pass, 3, got [1, 2]",
        ),
        (
            {"buckets": ()},
            "buckets must be at least 1 and reach the widest pass, 3, got []",
        ),
    ],
)
def test_bad_input_gets_one_sentence(change: dict[str, object], text: str) -> None:
    good = {"frames": 1, "height": 3, "width": 4, "k": 2}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        diagonal_schedule(**{**good, **change})
    assert str(caught.value) == f"diagonal_schedule: {text}"
