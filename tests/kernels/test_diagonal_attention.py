"""diagonal_attention: batches, splits, padding, strides, what it refuses; and its GPU lane."""

from __future__ import annotations

import functools
import importlib
import itertools

import pytest
import torch

from sdvg_kernels import TokenGrid, _few_rows, diagonal_attention, diagonal_mask
from sdvg_kernels import diagonal_schedule as schedule
from sdvg_kernels.diagonal import api, config
from sdvg_kernels.testing import Lane
from tests.kernels.test_diagonal import MODES, check, inputs, token_passes

MADE = schedule(2, 5, 7, 2, "spatial", "newest", prefix=19, extra=3)
# two sequences: in frame 0 with a fill, and where frame 1 starts
AT = [MADE.fills.any(1).nonzero()[0].item(), MADE.frame_starts[1]]


def run(
    lane: Lane, slots: torch.Tensor, steps: torch.Tensor, grid: TokenGrid
) -> functools.partial[torch.Tensor]:
    """Return the op, still without query and caches."""

    def op(
        query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object
    ) -> torch.Tensor:
        tables = (table.to(lane.device) for table in (slots, steps))
        options = {"implementation": lane.implementation, **options}
        return diagonal_attention(query, k, v, *tables, grid, **options)

    return functools.partial(op)


@pytest.mark.parametrize("mode", MODES)
def test_the_edge_begins_at_the_first_token_that_is_not_decoded(mode: str, lane: Lane) -> None:
    if lane.implementation != "triton":
        pytest.skip("the reference has no edge")
    probe = importlib.import_module("tests.kernels.diagonal_probe")
    for height, width, eol, extra in ((1, 3, 0, 0), (3, 4, 0, 2), (2, 3, 1, 1)):
        for k in range(1, width + 1):
            row_start = "eol" if eol else "newest"
            made = schedule(4, height, width, k, mode, row_start, prefix=5, extra=extra)
            passes = token_passes(made)
            # of the first two frames: what comes after them is not in this schedule
            last = made.frame_ends[1] + 1
            first = [min(slot for slot in passes if passes[slot] >= step) for step in range(last)]
            numbers = api._numbers(made.grid)
            assert probe.first_slots(last, made.size, numbers, lane.device) == first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_twice_plain_pytorch(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    *made, sees = inputs(slots, steps, MADE.grid, MADE.size, (4, 2), 64, random, lane, dtype)
    check(run(lane, slots, steps, MADE.grid)(*made), *made, sees)


@pytest.mark.parametrize("combined", ["last program", "second launch"])
@pytest.mark.parametrize(("splits", "dim"), [(1, 64), (2, 64), (5, 100)])
def test_the_number_of_splits_changes_only_rounding(
    splits: int,
    dim: int,
    combined: str,
    lane: Lane,
    random: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if combined == "second launch" and lane.implementation == "triton":
        combine = importlib.import_module("sdvg_kernels._combine")
        monkeypatch.setattr(combine, "choose", lambda *_: combine.COMBINE)
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    *made, sees = inputs(slots, steps, MADE.grid, MADE.size, (6, 2), dim, random, lane)
    op = run(lane, slots, steps, MADE.grid)
    out = op(*made, num_splits=splits)
    check(out, *made, sees)
    assert torch.equal(op(*made, num_splits=splits), out)


def test_programs_may_finish_in_any_order(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.name != "interpreter":
        pytest.skip("the order of a GPU's programs is its own")
    interpreter = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    tickets = importlib.import_module("sdvg_kernels._tickets")
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    *made, _ = inputs(slots, steps, MADE.grid, MADE.size, (1, 1), 64, random, lane)
    op, set_grid_idx = run(lane, slots, steps, MADE.grid), interpreter.set_grid_idx
    first = op(*made, num_splits=3)
    # sequences x splits
    order = [5, 1, 3, 0, 4, 2]
    monkeypatch.setattr(interpreter, "set_grid_idx", lambda x, y, z: set_grid_idx(order[x], y, z))
    assert torch.equal(op(*made, num_splits=3), first)
    assert not tickets._POOLS[made[0].device].take(0, 8).any()


def test_a_batch_equals_its_sequences_one_by_one(lane: Lane, random: torch.Generator) -> None:
    at = [3, *AT, len(MADE.slots) - 1]
    slots, steps = MADE.slots[at], MADE.steps[at]
    *made, _ = inputs(slots, steps, MADE.grid, MADE.size, (2, 1), 64, random, lane)
    out = run(lane, slots, steps, MADE.grid)(*made, num_splits=2)
    for b in range(4):
        alone = run(lane, slots[b : b + 1], steps[b : b + 1], MADE.grid)
        one = alone(*(tensor[b : b + 1] for tensor in made), num_splits=2)
        torch.testing.assert_close(out[b : b + 1], one, rtol=0, atol=1e-6)


def test_padded_prompts_and_other_cache_rows_are_read_in_place(
    lane: Lane, random: torch.Generator
) -> None:
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    pad = torch.tensor([17, 5], dtype=torch.int32)
    *made, sees = inputs(slots, steps, MADE.grid, MADE.size, (2, 2), 64, random, lane, pad=pad)
    query, *caches = made
    # of a cache of 3 rows and twice the slots: rows 2 and 0, every other slot
    index = torch.tensor([2, 0], dtype=torch.int32, device=lane.device)
    wide = [
        cache.new_full((3, 2 * cache.shape[1], *cache.shape[2:]), torch.nan) for cache in caches
    ]
    for large, cache in zip(wide, caches, strict=True):
        large[[2, 0], ::2] = cache
    around = query.new_full((2, query.shape[1], 3, 128), torch.nan)
    strided = around[:, :, 1:, 32:96].copy_(query)
    out = run(lane, slots, steps, MADE.grid)(
        strided,
        *(large[:, ::2] for large in wide),
        cache_batch_idx=index,
        cache_leftpad=pad.to(lane.device),
    )
    check(out, *made, sees)


def test_rows_that_see_nothing_give_zero(lane: Lane, random: torch.Generator) -> None:
    # padding, and an entry within the padding of its prompt
    slots = torch.tensor([[4, -1, 30, -1, -1]], dtype=torch.int32)
    steps = torch.tensor([[0, 0, 7, 0, 0]], dtype=torch.int32)
    pad = torch.tensor([9], dtype=torch.int32)
    *made, sees = inputs(slots, steps, MADE.grid, 40, (2, 2), 64, random, lane, pad=pad)
    out = run(lane, slots, steps, MADE.grid)(*made, cache_leftpad=pad.to(lane.device))
    check(out, *made, sees)
    assert not out[:, [0, 1, 3, 4]].any()
    assert out[:, 2].all()


def test_a_nan_that_is_seen_is_not_hidden(lane: Lane, random: torch.Generator) -> None:
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    query, *caches, _ = inputs(slots, steps, MADE.grid, MADE.size, (2, 2), 64, random, lane)
    caches[1][0, 0] = torch.nan
    caches[0][1, int(slots[1].max())] = torch.nan
    out = run(lane, slots, steps, MADE.grid)(query, *caches)
    assert out[0, slots[0] >= 0].isnan().all()
    # the newest entry alone sees itself
    newest = int(slots[1].argmax())
    assert out[1].isnan().any(-1).any(-1).nonzero()[:, 0].tolist() == [newest]


def test_slots_beyond_the_cache_are_not_read(lane: Lane, random: torch.Generator) -> None:
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    *made, sees = inputs(slots, steps, MADE.grid, 50, (2, 2), 64, random, lane)
    around = [made[0]]
    for cache in made[1:]:
        around.append(torch.full_like(cache, torch.nan).repeat(1, 2, 1, 1)[:, :50].copy_(cache))
    check(run(lane, slots, steps, MADE.grid)(*around), *made, sees)


def test_more_rows_than_a_tile_and_entries_of_several_passes(
    lane: Lane, random: torch.Generator
) -> None:
    # a whole frame at once, each entry with its own pass, as a model in training sees it
    made = schedule(1, 5, 9, 3, "spatial", "eol", prefix=4)
    order = made.slots[made.outputs >= 0].argsort()
    slots, steps = (table[made.outputs >= 0][order][None] for table in (made.slots, made.steps))
    assert slots.shape == (1, 45)
    query, *caches, sees = inputs(slots, steps, made.grid, made.size, (2, 1), 64, random, lane)
    caches = [cache.nan_to_num(0.5) for cache in caches]
    check(run(lane, slots, steps, made.grid)(query, *caches), query, *caches, sees)


def test_width_as_k_is_causal_attention(lane: Lane, random: torch.Generator) -> None:
    made = schedule(2, 3, 4, 4, extra=1, prefix=2)
    slots, steps = made.slots[::5, :1], made.steps[::5, :1]
    *tensors, _ = inputs(slots, steps, made.grid, made.size, (2, 2), 64, random, lane)
    out = run(lane, slots, steps, made.grid)(*tensors)
    causal = torch.arange(made.size) <= slots[..., None]
    check(out, *tensors, causal.to(lane.device))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_entries_give_nothing(shape: tuple[int, int], lane: Lane) -> None:
    slots = torch.zeros(shape, dtype=torch.int32)
    query = torch.zeros(*shape, 2, 64, device=lane.device)
    cache = torch.zeros(shape[0], 9, 2, 64, device=lane.device)
    assert run(lane, slots, slots, MADE.grid)(query, cache, cache).shape == query.shape
    tables = slots.to(lane.device)
    mask = diagonal_mask(tables, tables, MADE.grid, 9, implementation=lane.implementation)
    assert mask.shape == (*shape, 9)


def test_opcheck() -> None:
    slots, steps = MADE.slots[AT], MADE.steps[AT]
    numbers = api._numbers(MADE.grid)
    query = torch.randn(2, slots.shape[1], 4, 64)
    caches = (torch.randn(2, 40, 2, 64), torch.randn(2, 40, 2, 64))
    pad = torch.tensor([1, 0], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.sdvg_kernels.diagonal_attention,
        (query, *caches, slots, steps, numbers, False, None, pad, 0.1, None, "reference"),
    )
    for dtype, packed in ((torch.bool, True), (torch.bool, False), (torch.float16, False)):
        torch.library.opcheck(
            torch.ops.sdvg_kernels.diagonal_mask,
            (slots, steps, 43, numbers, pad, dtype, packed, "reference"),
        )


GOOD = {
    "query": torch.zeros(2, 3, 4, 64),
    "k_cache": torch.zeros(2, 9, 2, 64),
    "v_cache": torch.zeros(2, 9, 2, 64),
    "slots": torch.zeros(2, 3, dtype=torch.int32),
    "steps": torch.zeros(2, 3, dtype=torch.int32),
    "grid": MADE.grid,
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"query": torch.zeros(2, 3, 64)},
            ValueError,
            "query must be [B, T, H, D], got [2, 3, 64]",
        ),
        (
            {"k_cache": torch.zeros(2, 9, 2, 32)},
            ValueError,
            "k_cache must be [Bc, S, Hk, D] with query's D and a slot at least, got [2, 9, 2, 32]",
        ),
        (
            {"v_cache": torch.zeros(2, 8, 2, 64)},
            ValueError,
            "v_cache must have the shape of k_cache, got [2, 8, 2, 64]",
        ),
        (
            {"query": torch.zeros(2, 3, 3, 64)},
            ValueError,
            "k_cache must have a number of heads that divides query's, got [2, 9, 2, 64]",
        ),
        (
            {"k_cache": torch.zeros(2, 9, 2, 64).half()},
            TypeError,
            "k_cache must have query's dtype, got torch.float16",
        ),
        (
            {"query": GOOD["query"].int()},
            TypeError,
            "query must be bfloat16, float16, float32 or float64, got torch.int32",
        ),
        (
            {"k_cache": torch.zeros(3, 9, 2, 64), "v_cache": torch.zeros(3, 9, 2, 64)},
            ValueError,
            "k_cache must have query's B, got [3, 9, 2, 64]; or pass cache_batch_idx",
        ),
        (
            {"cache_batch_idx": torch.zeros(2)},
            TypeError,
            "cache_batch_idx must be int32, got torch.float32",
        ),
        (
            {"cache_leftpad": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "cache_leftpad must be [B], got [3]",
        ),
        ({"slots": torch.zeros(2, 3)}, TypeError, "slots must be int32, got torch.float32"),
        (
            {"slots": torch.zeros(2, 4, dtype=torch.int32)},
            ValueError,
            "steps must have the shape of slots, got [2, 3]",
        ),
        (
            {name: torch.zeros(2, 4, dtype=torch.int32) for name in ("slots", "steps")},
            ValueError,
            "slots must be [B, T] of query, got [2, 4]",
        ),
        ({"grid": None}, TypeError, "grid must be a TokenGrid, got NoneType"),
        ({"mode": "raster"}, ValueError, "mode must be 'exact' or 'published', got 'raster'"),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1 or None, got 0"),
        (
            {"softmax_scale": float("nan")},
            ValueError,
            "softmax_scale must be finite, got nan",
        ),
        (
            {"query": torch.zeros(2, 3, 64, 4).mT},
            ValueError,
            "query, k_cache and v_cache must be contiguous in the last dim, got another stride; "
            "call .contiguous()",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'cuda'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        diagonal_attention(**{**GOOD, **change})
    assert str(caught.value) == f"diagonal_attention: {text}"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        (
            {"dtype": torch.int32},
            TypeError,
            "dtype must be bool, bfloat16, float16, float32 or float64, got torch.int32",
        ),
        (
            {"dtype": torch.float32, "packed": True},
            ValueError,
            "dtype must be bool for a packed mask, got torch.float32",
        ),
        ({"slots": torch.zeros(3)}, ValueError, "slots must be [B, T], got [3]"),
    ],
)
def test_a_mask_that_cannot_be_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    good = {name: GOOD[name] for name in ("slots", "steps", "grid")} | {"size": 9}
    with pytest.raises(error) as caught:
        diagonal_mask(**{**good, **change})
    assert str(caught.value) == f"diagonal_mask: {text}"


def test_triton_says_what_it_cannot_run(random: torch.Generator) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine the interpreter is off")
    query, cache = torch.zeros(1, 2, 1, 96), torch.zeros(1, 5, 1, 96)
    tables = torch.zeros(1, 2, dtype=torch.int32)
    call = functools.partial(diagonal_attention, slots=tables, steps=tables, grid=MADE.grid)
    with pytest.raises(NotImplementedError, match="the Triton kernel has head dim 64, 100 and 128"):
        call(query, cache, cache, implementation="triton")
    # rows of 100 that no 8 bytes align
    odd = torch.zeros(1, 5, 1, 101)[..., :100]
    with pytest.raises(NotImplementedError, match="strides that are multiples of 4"):
        call(torch.zeros(1, 2, 1, 100), odd, odd, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"no torch\.float64"):
        call(*(torch.zeros(1, n, 1, 64).double() for n in (2, 5, 5)), implementation="triton")


def test_launches_exist_for_every_head_dim_and_fill_the_machine() -> None:
    for capability, dim, dtype, rows in itertools.product(
        ((8, 0), (9, 0), (10, 0), (12, 0), None),
        _few_rows.HEAD_DIMS,
        _few_rows.DTYPES,
        (1, 17, 300),
    ):
        assert config.choose(capability, dim, dtype, rows).BT >= 16
    # MineWorld on an H200: 4 heads of keys, 12 entries of 4 heads
    launch = config.choose((9, 0), 64, torch.bfloat16, 48)
    assert config.splits(launch, 4 * 3, -(-5552 // launch.BS), 132) == 11


def _on_gpu(
    frames: int, height: int, width: int, k: int, mode: str, heads: tuple[int, int], dim: int,
    random: torch.Generator, extra: int = 0,
) -> tuple[object, list[torch.Tensor]]:  # fmt: skip
    """Return a schedule on the GPU, and query and caches [2, ...] in bfloat16."""
    made = schedule(
        frames, height, width, k, mode, "newest", prefix=300, extra=extra, device="cuda"
    )
    rows = made.slots.shape[1]
    return made, [
        torch.randn(2, length, count, dim, generator=random).to("cuda", torch.bfloat16)
        for length, count in ((rows, heads[0]), (made.size, heads[1]), (made.size, heads[1]))
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("grid", "heads", "dim", "extra"),
    [
        ((15, 14, 24, 2, "spatial"), (16, 4), 64, 11),
        ((15, 14, 24, 1, "spatiotemporal"), (16, 4), 64, 11),
        ((3, 40, 64, 1, "spatiotemporal"), (32, 8), 128, 0),
        ((3, 40, 64, 2, "spatial"), (32, 8), 128, 0),
        ((1, 24, 24, 1, "zipar"), (32, 32), 100, 0),
    ],
)
def test_real_shapes_on_the_gpu_equal_a_dense_mask(
    grid: tuple[int, int, int, int, str],
    heads: tuple[int, int],
    dim: int,
    extra: int,
    random: torch.Generator,
) -> None:
    made, tensors = _on_gpu(*grid, heads, dim, random, extra)
    for at in ([0, 3], [len(made.slots) // 2, len(made.slots) - 9]):
        slots, steps = made.slots[at], made.steps[at]
        sees = diagonal_mask(slots, steps, made.grid, made.size)
        for cache in tensors[1:]:
            cache[~sees.any(1)] = torch.nan
        out = diagonal_attention(*tensors, slots, steps, made.grid, implementation="triton")
        assert not out[slots < 0].any()
        check(out, *tensors, sees)
        again = diagonal_attention(*tensors, slots, steps, made.grid, implementation="triton")
        assert torch.equal(again, out)
        for cache in tensors[1:]:
            cache.nan_to_num_(0.25)


@pytest.mark.gpu
def test_a_graph_replays_another_pass(random: torch.Generator) -> None:
    made, tensors = _on_gpu(3, 14, 24, 2, "spatial", (16, 4), 64, random)
    slots, steps = made.slots[[0, 0]].clone(), made.steps[[0, 0]].clone()
    diagonal_attention(*tensors, slots, steps, made.grid)
    diagonal_mask(slots, steps, made.grid, made.size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = diagonal_attention(*tensors, slots, steps, made.grid)
        sees = diagonal_mask(slots, steps, made.grid, made.size)
    for at in ([5, 40], [90, 17]):
        slots.copy_(made.slots[at])
        steps.copy_(made.steps[at])
        graph.replay()
        expected = diagonal_mask(slots, steps, made.grid, made.size, implementation="reference")
        assert torch.equal(sees, expected)
        check(out, *tensors, expected)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_are_read(random: torch.Generator) -> None:
    made = schedule(1, 8, 8, 2, prefix=5, device="cuda")
    at = [len(made.slots) - 3]
    slots, steps = made.slots[at], made.steps[at]
    query = torch.randn(1, slots.shape[1], 2, 64, generator=random).to("cuda", torch.bfloat16)
    # the last row of a cache of 4.3 GB
    cache = torch.zeros(1 << 14, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
    cache[-1] = torch.randn(1024, 2, 64, generator=random).to("cuda", torch.bfloat16)
    index = torch.tensor([len(cache) - 1], dtype=torch.int32, device="cuda")
    out = diagonal_attention(query, cache, cache, slots, steps, made.grid, cache_batch_idx=index)
    sees = diagonal_mask(slots, steps, made.grid, 1024)
    check(out, query, cache[-1:], cache[-1:], sees)


@pytest.mark.gpu
def test_the_gpu_serves_with_triton() -> None:
    assert not _few_rows.available("cuda")["triton"]
    assert next(iter(_few_rows.available("cuda"))) == "triton"
