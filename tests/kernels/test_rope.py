"""norm_rope and norm_rope_stage_ in every lane, against complex numbers in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from sdvg_kernels import norm_rope, norm_rope_stage_, rope_table
from sdvg_kernels.rope import api, config
from sdvg_kernels.testing import Lane, assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
INT = torch.int32


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `lengths` are those of all cached sequences."""

    heads: int = 4
    heads_key: int = 4
    dim: int = 64
    grid: api.Grid = (2, 2, 2)
    lengths: tuple[int, ...] = (0, 16)
    slots: int = 40
    sink: int = 0
    rows: tuple[int, ...] | None = None
    start_frame: int | tuple[int, ...] | None = None
    norm: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def named(self) -> tuple[int, ...]:
        """The cached sequences of the call."""
        return tuple(range(len(self.lengths))) if self.rows is None else self.rows

    @property
    def tokens(self) -> int:
        """Tokens of each sequence in the call."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def frames(self) -> tuple[int, ...]:
        """Return each sequence's first frame."""
        frame_tokens = self.grid[1] * self.grid[2]
        if self.start_frame is None:
            return tuple(self.lengths[b] // frame_tokens for b in self.named)
        if isinstance(self.start_frame, int):
            return (self.start_frame,) * len(self.named)
        return self.start_frame


@dataclass
class Inputs:
    """The tensors of a call; caches full of NaN, so that what is not written shows."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    options: dict[str, object]


def make(case: Case, random: torch.Generator, device: str) -> Inputs:
    """Return inputs whose query, key and value are views of one padded projection."""
    batch, heads = len(case.named), case.heads + 2 * case.heads_key
    around = torch.full((batch, case.tokens + 1, heads + 1, case.dim), torch.nan, dtype=case.dtype)
    fused = around[:, 1:, :heads]
    fused.copy_(torch.randn(fused.shape, generator=random, dtype=torch.float64))
    query, key, value = around.to(device)[:, 1:, :heads].split(
        (case.heads, case.heads_key, case.heads_key), 2
    )
    shape = (len(case.lengths), case.slots, case.heads_key, case.dim)
    caches = [torch.full(shape, torch.nan, dtype=case.dtype, device=device) for _ in range(2)]
    options: dict[str, object] = {"start_frame": case.start_frame}
    if isinstance(case.start_frame, tuple):
        options["start_frame"] = torch.tensor(case.start_frame, dtype=INT, device=device)
    if case.norm:
        for name, count in (("query_weight", case.heads), ("key_weight", case.heads_key)):
            weight = torch.randn(count * case.dim, generator=random, dtype=torch.float64)
            options[name] = weight.to(device, case.dtype)
    lengths = torch.tensor(case.lengths, dtype=INT, device=device)
    table = rope_table(64, case.dim, device=device)
    return Inputs(query, key, value, *caches, lengths, table, options)


def stage_options(case: Case, device: str) -> dict[str, object]:
    """Return what only the op with a cache takes."""
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=INT, device=device)
    return {"sink": case.sink, "cache_batch_idx": rows}


def stage(case: Case, inputs: Inputs, lane: Lane, **more: object) -> torch.Tensor:
    """Call norm_rope_stage_ on the inputs."""
    return norm_rope_stage_(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.k_cache,
        inputs.v_cache,
        inputs.lengths,
        inputs.table,
        case.grid,
        **inputs.options,
        **stage_options(case, lane.device),
        **more,
        implementation=lane.implementation,
    )


def complex_rope(
    case: Case, x: torch.Tensor, weight: object, dtype: torch.dtype, rounded: torch.dtype | None
) -> torch.Tensor:
    """Return x [B, T, H, D] normed and rotated as Wan does: complex numbers, a loop over tokens.

    Arithmetic is `dtype`; with `rounded`, the norm's output is rounded to it, as a chain of
    PyTorch ops does.
    """
    wide = x.to("cpu", dtype)
    if weight is not None:
        flat = wide.flatten(2)
        flat = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-6)
        wide = (flat * weight.to("cpu", dtype)).view(wide.shape)
    if rounded is not None:
        wide = wide.to(rounded).to(dtype)
    pairs = case.dim // 2
    space = pairs // 3
    counts = (pairs - 2 * space, space, space)
    out = torch.empty_like(wide)
    _, height, width = case.grid
    for b, first in enumerate(case.frames()):
        places = itertools.product(range(case.grid[0]), range(height), range(width))
        for i, (frame, row, column) in enumerate(places):
            angles = torch.cat(
                [
                    place * 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
                    for place, count in zip((first + frame, row, column), counts, strict=True)
                ]
            )
            turn = torch.polar(torch.ones_like(angles), angles)
            turn = turn.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
            pair = torch.view_as_complex(wide[b, i].unflatten(-1, (-1, 2)).contiguous())
            out[b, i] = torch.view_as_real(pair * turn).flatten(-2)
    return out.to(x.device)


def check(case: Case, inputs: Inputs, query: torch.Tensor, key: torch.Tensor) -> None:
    """Assert that both are within the error budget."""
    for name, got, given in (("query", query, inputs.query), ("key", key, inputs.key)):
        weight = inputs.options.get(f"{name}_weight")
        exact = complex_rope(case, given, weight, torch.float64, None)
        plain = complex_rope(case, given, weight, torch.float32, case.dtype).to(case.dtype)
        assert_within_budget(got, plain, exact, name)


def slots_of(case: Case, b: int) -> list[int]:
    """Return the slots of the call's tokens of the cached sequence b."""
    tokens = range(case.lengths[b], case.lengths[b] + case.tokens)
    ring = case.slots - case.sink
    return [t if t < case.sink else case.sink + (t - case.sink) % ring for t in tokens]


def check_caches(case: Case, inputs: Inputs, key: torch.Tensor) -> None:
    """Assert that the caches hold key and value, bit for bit, and NaN everywhere else."""
    expected_k, expected_v = (torch.full_like(inputs.k_cache, torch.nan) for _ in range(2))
    for i, b in enumerate(case.named):
        expected_k[b, slots_of(case, b)] = key[i]
        expected_v[b, slots_of(case, b)] = inputs.value[i]
    for got, want in ((inputs.k_cache, expected_k), (inputs.v_cache, expected_v)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


CASES = {
    "from the start": Case(lengths=(0, 0)),
    "goes on at its length": Case(lengths=(8, 20)),
    "ring wraps": Case(lengths=(33, 106), sink=3, slots=40),
    "within and past the sink": Case(lengths=(2, 9), sink=6, slots=14, grid=(2, 2, 2)),
    "the sink is longer than the ring": Case(lengths=(1, 8), sink=10, slots=16, grid=(1, 2, 3)),
    "the ring is the block": Case(lengths=(5, 27), sink=2, slots=10),
    "several blocks": Case(grid=(6, 2, 3), lengths=(12,), slots=37),
    "rows named": Case(lengths=(4, 9, 0), rows=(2, 0)),
    "one frame given": Case(start_frame=7),
    "frames per sequence": Case(start_frame=(31, 4)),
    "wan head dim": Case(heads=3, heads_key=3, dim=128, lengths=(6,), grid=(1, 3, 2)),
    "odd heads, grouped": Case(heads=6, heads_key=3, lengths=(5, 0), grid=(3, 1, 2)),
    "one key head": Case(heads=5, heads_key=1, dim=128, lengths=(3,), grid=(1, 1, 5)),
    "one head": Case(heads=1, heads_key=1, lengths=(3,), grid=(1, 1, 1)),
    "no norm": Case(norm=False),
    "1.3B": Case(heads=12, heads_key=12, dim=128, lengths=(4,), grid=(1, 2, 2)),
    "5B": Case(heads=24, heads_key=24, dim=128, lengths=(2,), grid=(1, 1, 2)),
    "14B": Case(heads=40, heads_key=40, dim=128, lengths=(2,), grid=(1, 1, 2)),
    "widest": Case(heads=64, heads_key=8, dim=128, lengths=(2,), grid=(1, 1, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_query_is_rotated_and_key_and_value_lie_in_their_slots(
    name: str, lane: Lane, random: torch.Generator
) -> None:
    case = CASES[name]
    inputs = make(case, random, lane.device)
    query = stage(case, inputs, lane)
    key = torch.stack([inputs.k_cache[b, slots_of(case, b)] for b in case.named])
    check(case, inputs, query, key)
    check_caches(case, inputs, key)
    assert query.is_contiguous()
    assert inputs.lengths.tolist() == list(case.lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_without_a_cache_the_key_is_returned(
    norm: bool, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = Case(heads=6, heads_key=2, dtype=dtype, norm=norm, start_frame=(0, 50), grid=(3, 1, 2))
    inputs = make(case, random, lane.device)
    run = {"grid": case.grid, **inputs.options, "implementation": lane.implementation}
    query, key = norm_rope(inputs.query, inputs.key, inputs.table, **run)
    check(case, inputs, query, key)
    assert key.is_contiguous()
    again = norm_rope(inputs.query, inputs.key, inputs.table, **run)
    assert torch.equal(query, again[0])
    assert torch.equal(key, again[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_gets_what_is_returned_without_one(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = Case(dtype=dtype, start_frame=3)
    inputs = make(case, random, lane.device)
    query = stage(case, inputs, lane)
    run = {**inputs.options, "implementation": lane.implementation}
    plain, key = norm_rope(inputs.query, inputs.key, inputs.table, case.grid, **run)
    assert torch.equal(query, plain)
    check_caches(case, inputs, key)


def test_tensors_of_any_strides_are_served(lane: Lane, random: torch.Generator) -> None:
    case = Case(lengths=(0, 29), heads=4, heads_key=2)
    inputs = make(case, random, lane.device)
    expected = stage(case, inputs, lane)
    key = torch.stack([inputs.k_cache[b, slots_of(case, b)] for b in case.named])
    # [B, H, T, D] in memory, and a layer of a cache that interleaves K and V
    for name in ("query", "key", "value"):
        tensor = getattr(inputs, name)
        setattr(inputs, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    both = torch.full((2, 2, case.slots, 2, 2, 64), torch.nan, device=lane.device).to(case.dtype)
    inputs.k_cache, inputs.v_cache = both[:, 1].unbind(3)
    assert torch.equal(stage(case, inputs, lane), expected)
    check_caches(case, inputs, key)
    assert both[:, 0].isnan().all()


def test_a_weight_of_another_dtype_is_read(lane: Lane, random: torch.Generator) -> None:
    case = Case()
    inputs = make(case, random, lane.device)
    expected = stage(case, inputs, lane)
    for name in ("query_weight", "key_weight"):
        inputs.options[name] = inputs.options[name].float()
    assert torch.equal(stage(case, inputs, lane), expected)


@pytest.mark.parametrize("cached", [False, True])
def test_positions_that_only_the_device_knows_give_nan(
    cached: bool, lane: Lane, random: torch.Generator
) -> None:
    # the table has 64 positions: the first sequence leaves it with its second frame, the third
    # begins before it
    case = Case(lengths=(0, 16, 4), start_frame=(63, 62, -1))
    inputs = make(case, random, lane.device)
    if cached:
        query = stage(case, inputs, lane)
        key = torch.stack([inputs.k_cache[b, slots_of(case, b)] for b in case.named])
    else:
        run = {**inputs.options, "implementation": lane.implementation}
        query, key = norm_rope(inputs.query, inputs.key, inputs.table, case.grid, **run)
    pairs = api.reference.axis_pairs(case.dim)[0]
    for rotated in (query, key):
        lost = rotated.isnan().all(2)
        expected = torch.zeros_like(lost)
        expected[0, 4:, : 2 * pairs] = expected[2, :4, : 2 * pairs] = True
        assert torch.equal(lost, expected)
        assert torch.equal(rotated.isnan().any(2), expected)


def test_a_sequence_that_the_cache_does_not_have_is_not_written(
    lane: Lane, random: torch.Generator
) -> None:
    if lane.implementation == "reference":
        pytest.skip("the reference's values are checked, or preconditions")
    case = Case(lengths=(0, 16, -1), rows=(7, 1, 2))
    inputs = make(replace(case, rows=(0, 1, 2), lengths=(0, 16, 0)), random, lane.device)
    inputs.lengths.copy_(torch.tensor(case.lengths, dtype=INT))
    query = stage(case, inputs, lane)
    assert query[[0, 2]].isnan().all()
    assert not query[1].isnan().any()
    for cache in (inputs.k_cache, inputs.v_cache):
        assert cache[[0, 2]].isnan().all()
        assert not cache[1, slots_of(case, 1)].isnan().any()


@pytest.mark.parametrize("shape", [(0, (2, 2, 2)), (2, (0, 2, 2))], ids=["no batch", "no frames"])
def test_nothing_in_gives_nothing_out(shape: tuple[int, api.Grid], lane: Lane) -> None:
    batch, grid = shape
    rows = grid[0] * grid[1] * grid[2]
    query = torch.empty(batch, rows, 2, 64, device=lane.device)
    cache = torch.ones(batch, 9, 2, 64, device=lane.device)
    lengths = torch.zeros(batch, dtype=INT, device=lane.device)
    table = rope_table(8, 64, device=lane.device)
    run = {"implementation": lane.implementation}
    out = norm_rope_stage_(query, query, query, cache, cache, lengths, table, grid, **run)
    assert out.shape == query.shape
    assert (cache == 1).all()
    out, key = norm_rope(query, query, table, grid, **run)
    assert out.shape == key.shape == query.shape


def test_float64_is_served_by_the_reference(random: torch.Generator) -> None:
    lane = Lane("reference", "cpu", "reference")
    case = Case(dtype=torch.float64, start_frame=9, dim=10, grid=(2, 1, 2))
    inputs = replace(make(case, random, "cpu"), table=rope_table(64, 10, dtype=torch.float64))
    query = stage(case, inputs, lane)
    exact = complex_rope(case, inputs.query, inputs.options["query_weight"], torch.float64, None)
    torch.testing.assert_close(query, exact, rtol=0, atol=1e-13)


# --- e4m3 caches ---


def make_e4m3(inputs: Inputs, transposed: bool = False) -> dict[str, torch.Tensor]:
    """Put e4m3 caches of NaN into the inputs; return their scales, NaN too.

    `transposed`: V lies as [Bc, Hk, D, S], in rows of slots that are padded.
    """
    shape = inputs.k_cache.shape
    inputs.k_cache, inputs.v_cache = (
        torch.full(shape, 0x7F, dtype=torch.uint8, device=inputs.query.device).view(E4M3)
        for _ in range(2)
    )
    if transposed:
        batch, slots, heads, dim = shape
        sizes = (batch, heads, dim, slots + 7)
        padded = inputs.v_cache.view(torch.uint8).new_full(sizes, 0x7F)
        inputs.v_cache = padded.view(E4M3)[..., :slots].permute(0, 3, 1, 2)
    scales = [torch.full(shape[:3], torch.nan, device=inputs.query.device) for _ in range(2)]
    return dict(zip(("k_scale", "v_scale"), scales, strict=True))


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes and scale of float32 rows, as the contract words it."""
    largest = rows.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 448.0) / largest
    zero = largest < 2.0**-100
    rows = rows * torch.where(zero, 1.0, inverse)
    scale = torch.where(zero, 1.0, largest * (1 / 448))
    return rows.clamp(-448, 448).to(E4M3), scale[..., 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_e4m3_rows_are_rounded_once_and_their_scale_lies_beside(
    dtype: torch.dtype, transposed: bool, lane: Lane, random: torch.Generator
) -> None:
    case = Case(lengths=(33, 106), sink=3, dtype=dtype, heads=4, heads_key=2)
    inputs = make(case, random, lane.device)
    # a row of zeros, one with a channel far above the rest, tiny ones, ties, and the largest
    inputs.key[0, 0, 0] = inputs.value[0, 0, 0] = 0
    inputs.key[0, 1, 0, 5] = inputs.value[0, 1, 0, 5] = 50
    inputs.value[0, 2] *= 1e-6
    inputs.value[0, 3] = torch.arange(64) / 8
    inputs.value[0, 4] = torch.finfo(dtype).max
    # a tie, if 448 / amax is rounded once
    inputs.value[0, 7] = 0.51953125
    inputs.value[0, 7, :, 0] = 3.0625
    # down to where e4m3 is subnormal, and on to zero
    inputs.value[0, 6] = torch.exp2(-torch.arange(64) / 3)
    if dtype != torch.float16:
        inputs.value[0, 5] = 1e-35
    scales = make_e4m3(inputs, transposed)
    query = stage(case, inputs, lane, **scales)
    check(case, inputs, query, complex_rope(case, inputs.key, inputs.options["key_weight"],
          torch.float64, None).to(case.dtype))  # fmt: skip

    plain = inputs.options["key_weight"]
    key = complex_rope(case, inputs.key, plain, torch.float64, None)
    expected_v = quantised(inputs.value.float())
    written = torch.zeros(inputs.k_cache.shape[:2], dtype=torch.bool, device=lane.device)
    for i, b in enumerate(case.named):
        slots = slots_of(case, b)
        written[b, slots] = True
        assert torch.equal(inputs.v_cache[b, slots].float(), expected_v[0][i].float())
        assert torch.equal(scales["v_scale"][b, slots], expected_v[1][i])
        held = inputs.k_cache[b, slots].float() * scales["k_scale"][b, slots][..., None]
        direct, scale = quantised(key[i].to(dtype).float())
        assert_within_budget(held, direct.float() * scale[..., None], key[i], "dequantised key")
        largest = key[i].abs().amax(-1)
        scale = torch.where(largest > 0, largest / 448, 1.0)
        torch.testing.assert_close(scales["k_scale"][b, slots], scale.float(), rtol=1e-5, atol=0)
    for cache, scale in zip((inputs.k_cache, inputs.v_cache), scales.values(), strict=True):
        assert (cache.view(torch.uint8)[~written] == 0x7F).all()
        assert scale[~written].isnan().all()


# --- the table ---


def test_the_table_splits_a_head_as_wan_does() -> None:
    table = rope_table(5, 128)
    assert table.shape == (5, 128)
    assert table.dtype == torch.float32
    rates = torch.cat([10000.0 ** -(torch.arange(n).double() / n) for n in (22, 21, 21)])
    angles = torch.arange(5).double()[:, None] * rates
    assert torch.equal(table, torch.cat([angles.cos(), angles.sin()], 1).float())


def test_far_positions_are_rounded_once() -> None:
    # float32 angles would be off by 3e-5 there
    table = rope_table(1024, 64).double()
    cos, sin = table[:, :32], table[:, 32:]
    assert (cos.square() + sin.square() - 1).abs().max() < 2.0**-23
    exact = rope_table(1024, 64, dtype=torch.float64)
    assert (table - exact).abs().max() <= 2.0**-25


# --- what every op must be ---


def opcheck_arguments(e4m3: bool) -> tuple[object, ...]:
    """Return arguments of the schema norm_rope_stage_."""
    query, key, value = torch.randn(2, 4, 4, 64), torch.randn(2, 4, 2, 64), torch.randn(2, 4, 2, 64)
    caches = [torch.zeros(2, 9, 2, 64) for _ in range(2)]
    scales: list[torch.Tensor | None] = [None, None]
    if e4m3:
        caches = [cache.to(E4M3) for cache in caches]
        scales = [torch.zeros(2, 9, 2) for _ in range(2)]
    lengths = torch.tensor([3, 17], dtype=INT)
    weights = (torch.ones(256), torch.ones(128))
    table = rope_table(8, 64)
    sizes = (1e-6, 2, 2, 0, None, 1, None, "reference")
    return (query, key, value, *caches, lengths, table, *weights, *scales, *sizes)


@pytest.mark.parametrize("e4m3", [False, True])
def test_opcheck(e4m3: bool) -> None:
    arguments = opcheck_arguments(e4m3)
    # opcheck's own comparison of mutated arguments has no float8 arithmetic
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.sdvg_kernels.norm_rope_stage_,
        arguments,
        test_utils=tests[1:] if e4m3 else (*tests, "test_aot_dispatch_dynamic"),
    )
    query, key, table, *weights = (arguments[i] for i in (0, 1, 6, 7, 8))
    op = torch.ops.sdvg_kernels.norm_rope
    torch.library.opcheck(op, (query, key, table, *weights, 1e-6, 2, 2, 3, None, "reference"))
    offsets = torch.tensor([1, 2], dtype=INT)
    none = (None, None)
    torch.library.opcheck(op, (query, key, table, *none, 1e-6, 2, 2, 0, offsets, "reference"))


_QUERY, _KEY = torch.zeros(2, 4, 4, 64), torch.zeros(2, 4, 2, 64)
_GOOD = {
    "query": _QUERY,
    "key": _KEY,
    "value": _KEY,
    "k_cache": torch.zeros(2, 8, 2, 64),
    "v_cache": torch.zeros(2, 8, 2, 64),
    "lengths": torch.zeros(2, dtype=INT),
    "table": rope_table(8, 64),
    "grid": (1, 2, 2),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"query": _QUERY[0]},
            ValueError,
            "query must be [B, T, H, D] with heads and an even D, got [4, 4, 64]",
        ),
        (
            {"query": _QUERY.long()},
            TypeError,
            "query must be bfloat16, float16, float32 or float64, got torch.int64",
        ),
        (
            {"key": _KEY.half()},
            TypeError,
            "key must have query's dtype torch.float32, got torch.float16",
        ),
        (
            {"key": torch.zeros(2, 4, 3, 64)},
            ValueError,
            "key must be [B, T, Hk, D] = [2, 4, Hk, 64] with Hk a divisor of H = 4, got [2, "
            "4, 3, 64]",
        ),
        (
            {"value": _KEY.repeat_interleave(2, -1)[..., ::2]},
            ValueError,
            "value, k_cache and v_cache must be contiguous in the last dim, got another stride; "
            "call .contiguous()",
        ),
        (
            {"value": _QUERY},
            ValueError,
            "value must have key's shape [2, 4, 2, 64], got [2, 4, 4, 64]",
        ),
        (
            {"table": rope_table(8, 32)},
            ValueError,
            "table must be [P, D = 64], contiguous, as of rope_table, got [8, 32]",
        ),
        (
            {"table": rope_table(8, 64).double()},
            TypeError,
            "table must be torch.float32, got torch.float64",
        ),
        (
            {"grid": (2, 2, 2)},
            ValueError,
            "grid must be (frames, height, width) of T = 4 tokens, got (2, 2, 2)",
        ),
        (
            {"table": rope_table(1, 64)},
            ValueError,
            "grid must stay within the table's 1 positions, got (1, 2, 2); make a longer "
            "rope_table",
        ),
        (
            {"start_frame": 8},
            ValueError,
            "start_frame must lie in [0, 7], so that the table holds 1 frames from it, got "
            "8; make a longer rope_table",
        ),
        (
            {"start_frame": torch.zeros(2)},
            TypeError,
            "start_frame must be int32, got torch.float32",
        ),
        (
            {"start_frame": torch.zeros(3, dtype=INT)},
            ValueError,
            "start_frame must be [B], contiguous, with B = 2, got [3]",
        ),
        (
            {"query_weight": torch.ones(256)},
            ValueError,
            "query_weight and key_weight must be given both or neither, got only query_weight",
        ),
        (
            {"query_weight": torch.ones(256), "key_weight": torch.ones(256)},
            ValueError,
            "key_weight must be [128], contiguous, got [256]",
        ),
        (
            {"query_weight": torch.ones(256), "key_weight": torch.ones(128).half()},
            TypeError,
            "key_weight must have query_weight's dtype, got torch.float16",
        ),
        (
            {"k_cache": torch.zeros(2, 8, 4, 64)},
            ValueError,
            "k_cache must be [Bc, S, Hk, D] with key's Hk, D = [2, 64] and at least one "
            "slot, got [2, 8, 4, 64]",
        ),
        (
            {
                "k_cache": torch.zeros(3, 8, 2, 64),
                "v_cache": torch.zeros(3, 8, 2, 64),
                "lengths": torch.zeros(3, dtype=INT),
            },
            ValueError,
            "k_cache must have query's B = 2, got [3, 8, 2, 64]; or pass cache_batch_idx",
        ),
        (
            {"v_cache": torch.zeros(2, 9, 2, 64)},
            ValueError,
            "v_cache must have k_cache's shape [2, 8, 2, 64], got [2, 9, 2, 64]",
        ),
        (
            {"k_cache": torch.zeros(2, 8, 2, 64).half()},
            TypeError,
            "k_cache must have query's dtype or be float8_e4m3fn, got torch.float16",
        ),
        ({"sink": 8}, ValueError, "sink must be at least 0 and less than S = 8, got 8"),
        ({"sink": 5}, ValueError, "query must have at most S - sink = 3 tokens, got 4"),
        ({"lengths": torch.zeros(2)}, TypeError, "lengths must be int32, got torch.float32"),
        (
            {"lengths": torch.tensor([0, -1], dtype=INT)},
            ValueError,
            "lengths must be at least 0, got -1",
        ),
        (
            {"cache_batch_idx": torch.tensor([0, 2], dtype=INT)},
            ValueError,
            "cache_batch_idx must name distinct sequences of the cache, below Bc = 2, got [0, 2]",
        ),
        (
            {"k_scale": torch.zeros(2, 8, 2)},
            ValueError,
            "k_scale must be given with float8_e4m3fn caches and only with them, got one for "
            "torch.float32",
        ),
        (
            {
                "k_cache": torch.zeros(2, 8, 2, 64).to(E4M3),
                "v_cache": torch.zeros(2, 8, 2, 64).to(E4M3),
                "k_scale": torch.zeros(2, 8, 2),
            },
            ValueError,
            "v_scale must be given with float8_e4m3fn caches and only with them, got none "
            "for torch.float8_e4m3fn",
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
        norm_rope_stage_(**{**_GOOD, **change})
    assert str(caught.value) == f"norm_rope_stage_: {text}"


def test_bad_sizes_of_a_table_get_one_sentence() -> None:
    with pytest.raises(ValueError, match="rope_table: head_dim must be even and at least 2, got 7"):
        rope_table(4, 7)
    with pytest.raises(ValueError, match="rope_table: max_positions must be at least 1, got 0"):
        rope_table(0, 8)


def test_an_implementation_asked_for_never_falls_back() -> None:
    query = torch.zeros(1, 1, 1, 32)
    with pytest.raises(NotImplementedError, match=r"head dim 64 and 128|TRITON_INTERPRET"):
        norm_rope(query, query, rope_table(1, 32), (1, 1, 1), implementation="triton")


def test_a_head_stride_that_overflows_a_tile_is_refused() -> None:
    if api.triton_reason("cpu"):
        pytest.skip(api.triton_reason("cpu"))
    query = torch.zeros(64).as_strided((1, 1, 1, 64), (64, 64, 2**31, 1))
    text = "norm_rope: query must have a head stride below 2147483648 for Triton, got 2147483648"
    with pytest.raises(NotImplementedError, match=text):
        norm_rope(query, query, rope_table(1, 64), (1, 1, 1), implementation="triton")


@pytest.mark.parametrize("heads", range(1, 65))
def test_every_width_has_a_launch(heads: int) -> None:
    for dim in api.HEAD_DIMS:
        assert config.choose(1 << (heads - 1).bit_length(), dim).reason


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_compilation_must_access_memory_16_bytes_at_a_time(arch: int) -> None:
    kernel = pytest.importorskip("sdvg_kernels.rope.kernel", reason="needs Triton")
    cases = list(kernel.compilations(arch))
    # 12 heads in bf16: 3 KB each of query, key, value and 2 weights read, and of 3 written
    (first,) = (case for case in cases if case.config == "H12 D128 bf16 cache")
    assert first.budget.wide * 16 * 32 * first.num_warps == 8 * 12 * 128 * 2
    assert all(case.budget.wide > 0 for case in cases)
    assert any("e4m3" in case.config for case in cases) == (arch > 80)


# --- GPU only ---

GPU = Lane("triton", "cuda", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 5, 12, 24, 40, 64])
def test_shipped_widths_are_exact_on_the_gpu(
    heads: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    for dim in api.HEAD_DIMS:
        case = Case(heads, heads, dim, (3, 3, 5), (150, 33), 100, 15, dtype=dtype)
        inputs = make(case, random, "cuda")
        query = stage(case, inputs, GPU)
        key = torch.stack([inputs.k_cache[b, slots_of(case, b)] for b in case.named])
        check(case, inputs, query, key)
        check_caches(case, inputs, key)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["query", "slot", "batch"])
def test_offsets_past_2_to_31_elements(far: str, random: torch.Generator) -> None:
    case = Case(heads=2, heads_key=2, lengths=(0, 137), slots=140, rows=(1,), grid=(2, 2, 2))
    inputs = make(case, random, "cuda")
    expected = stage(case, inputs, GPU)
    key = torch.stack([inputs.k_cache[b, slots_of(case, b)] for b in case.named])
    row = 2 * 64
    if far == "query":
        memory = torch.empty(8 * 2**29, dtype=case.dtype, device="cuda")
        apart = memory.as_strided(inputs.query.shape, (1, 2**29, 64, 1))
        inputs.query = apart.copy_(inputs.query)
    else:
        # K and V share the memory
        slot = 2**24 if far == "slot" else 2 * row
        start = 2**31 if far == "batch" else 0
        memory = torch.full((start + 140 * slot,), torch.nan, dtype=case.dtype, device="cuda")
        inputs.k_cache, inputs.v_cache = (
            memory.as_strided((2, 140, 2, 64), (start, slot, 64, 1), offset) for offset in (0, row)
        )
    assert torch.equal(stage(case, inputs, GPU), expected)
    for i, b in enumerate(case.named):
        assert torch.equal(inputs.k_cache[b, slots_of(case, b)], key[i])
        assert torch.equal(inputs.v_cache[b, slots_of(case, b)], inputs.value[i])


@pytest.mark.gpu
@pytest.mark.parametrize("e4m3", [False, True])
def test_a_graph_replays_at_new_lengths_and_frames(e4m3: bool, random: torch.Generator) -> None:
    if e4m3 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    first = Case(lengths=(0, 16), start_frame=(0, 2), sink=3, grid=(3, 2, 2))
    inputs = make(first, random, "cuda")
    scales = make_e4m3(inputs) if e4m3 else {}
    stage(first, inputs, GPU, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query = stage(first, inputs, GPU, **scales)
    for lengths, frames in (((36, 5), (9, 1)), ((12, 110), (3, 40))):
        inputs.lengths.copy_(torch.tensor(lengths, dtype=INT))
        inputs.options["start_frame"].copy_(torch.tensor(frames, dtype=INT))
        eager = replace(inputs, k_cache=inputs.k_cache.clone(), v_cache=inputs.v_cache.clone())
        eager_scales = {name: scale.clone() for name, scale in scales.items()}
        graph.replay()
        assert torch.equal(query, stage(first, eager, GPU, **eager_scales))
        pairs = [(inputs.k_cache, eager.k_cache), (inputs.v_cache, eager.v_cache)]
        pairs += list(zip(scales.values(), eager_scales.values(), strict=True))
        for got, want in pairs:
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
