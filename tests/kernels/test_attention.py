"""block_causal_attention in every lane, against plain attention over logical tokens in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from sdvg_kernels import block_causal_attention, dense_attention
from sdvg_kernels.attention import KeyBias, api, config
from sdvg_kernels.testing import (
    Lane,
    RingCache,
    assert_within_budget,
    logical_attention,
    ring_cache,
)

KREA = KeyBias(math.log(0.3), 2)


@dataclass(frozen=True)
class Case:
    """One call: lengths of the sequences, rows of the query, and the options of the op."""

    lengths: tuple[int, ...]
    rows: int
    slots: int
    sink: int = 0
    window: int | None = None
    block_size: int | None = None
    heads: int = 2
    heads_cached: int = 2
    dim: int = 64
    key_bias: KeyBias | None = None
    softmax_scale: float | None = None

    @property
    def options(self) -> dict[str, object]:
        names = ("sink", "window", "block_size", "key_bias", "softmax_scale")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Inputs:
    """A query [B, T, H, D], the logical tokens of each sequence, and the ring that holds them."""

    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cache: RingCache


CASES = {
    "one token": Case((1,), 1, 5),
    "one block": Case((7, 7), 7, 7),
    "odd sizes": Case((53,), 13, 61, heads=3, heads_cached=1),
    "lengths differ": Case((40, 3, 19), 3, 45),
    "ring is full": Case((40,), 6, 40, sink=3),
    "ring wrapped": Case((103,), 6, 40),
    "ring wrapped at a tile": Case((65,), 4, 48, sink=16),
    "sink and wrapped ring": Case((103, 64), 6, 40, sink=5),
    "sink wider than a tile": Case((120,), 5, 70, sink=35),
    "shorter than the sink": Case((9, 4), 4, 40, sink=20),
    "window": Case((60,), 6, 64, window=20),
    "window within the block": Case((33,), 12, 40, window=5),
    "window larger than all": Case((33,), 12, 40, sink=2, window=1000),
    "sink, window, wrapped": Case((200, 151), 9, 60, sink=4, window=31),
    "several blocks": Case((50, 41), 12, 60, block_size=4),
    "last block partial": Case((50,), 14, 64, sink=3, window=22, block_size=4),
    "blocks across tiles": Case((90,), 40, 96, sink=5, window=33, block_size=12),
    "blocks, wrapped": Case((150, 97), 24, 70, sink=6, window=40, block_size=8),
    "block larger than query": Case((30,), 5, 40, block_size=50),
    "query longer than the ring": Case((61, 47), 40, 13, sink=3, block_size=7),
    "grouped queries": Case((45,), 6, 48, heads=6, heads_cached=2),
    "grouped blocks": Case((50, 2), 7, 60, 4, 31, 3, 6, 2, key_bias=KREA),
    "too many rows to group": Case((40,), 22, 48, heads=6, heads_cached=2),
    "head dim 128": Case((70,), 18, 64, sink=3, window=40, dim=128),
    "bias before the block": Case((66,), 6, 80, key_bias=KREA),
    "bias before each block": Case((66,), 14, 60, sink=4, block_size=6, key_bias=KREA),
    "bias on a range": Case((66,), 6, 80, window=50, key_bias=KeyBias(1.5, 10, 37)),
    "scale": Case((33,), 5, 40, softmax_scale=0.5),
    "before the start": Case((3, 0, 20), 8, 24),
    "before the start, blocks": Case((3, 0, 20), 8, 24, sink=2, window=6, block_size=3),
}


def make(
    case: Case,
    random: torch.Generator,
    lane: Lane | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs, rounded to `dtype`."""
    device = lane.device if lane else "cpu"

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    query = tokens(len(case.lengths), case.rows, case.heads, case.dim)
    keys, values = (
        [tokens(length, case.heads_cached, case.dim) for length in case.lengths] for _ in range(2)
    )
    return Inputs(query, keys, values, ring_cache(keys, values, case.slots, case.sink))


def truth(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of plain attention over logical tokens, in `dtype`."""
    return logical_attention(
        inputs.query.to(dtype),
        [key.to(dtype) for key in inputs.keys],
        [value.to(dtype) for value in inputs.values],
        slots=case.slots,
        **case.options,
    )


def check(case: Case, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Assert that out, and lse where given, are within their budgets."""
    plain, plain_lse = truth(case, inputs, out.dtype)
    exact, exact_lse = truth(case, inputs, torch.float64)
    assert_within_budget(out, plain, exact)
    if lse is not None:
        # lse is float32 in every dtype
        assert_within_budget(lse, plain_lse.float(), exact_lse, "lse")


@pytest.mark.parametrize("name", CASES)
def test_equals_attention_over_logical_tokens(
    name: str, lane: Lane, random: torch.Generator
) -> None:
    case = CASES[name]
    inputs = make(case, random, lane)
    out, lse = block_causal_attention(
        inputs.query,
        *inputs.cache,
        **case.options,
        return_lse=True,
        implementation=lane.implementation,
    )
    check(case, inputs, out, lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["one token", "sink, window, wrapped", "bias before each block"])
def test_half_precision_is_within_twice_plain_pytorch(
    name: str, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = CASES[name]
    inputs = make(case, random, lane, dtype)
    out, lse = block_causal_attention(
        inputs.query,
        *inputs.cache,
        **case.options,
        return_lse=True,
        implementation=lane.implementation,
    )
    check(case, inputs, out, lse)


@pytest.mark.parametrize("name", CASES)
def test_without_lse_the_output_is_the_same(name: str, random: torch.Generator) -> None:
    # the reference takes a shorter way where nothing is masked
    case = CASES[name]
    inputs = make(case, random, dtype=torch.float64)
    out = block_causal_attention(inputs.query, *inputs.cache, **case.options)
    torch.testing.assert_close(out, truth(case, inputs, torch.float64)[0], rtol=0, atol=1e-12)


def test_a_batch_equals_its_sequences_one_by_one(random: torch.Generator) -> None:
    case = Case((150, 97, 12, 4), 12, 70, sink=6, window=40, block_size=8)
    inputs = make(case, random, dtype=torch.float64)
    out = block_causal_attention(inputs.query, *inputs.cache, **case.options)
    for b in range(4):
        alone = (tensor[b : b + 1] for tensor in (inputs.query, *inputs.cache))
        one = block_causal_attention(*alone, **case.options)
        torch.testing.assert_close(out[b : b + 1], one, rtol=0, atol=1e-10)


def test_a_query_of_several_blocks_equals_the_blocks_in_turn(random: torch.Generator) -> None:
    case = Case((141, 61), 24, 60, sink=4, window=24, block_size=8, key_bias=KREA)
    inputs = make(case, random, dtype=torch.float64)
    out = block_causal_attention(inputs.query, *inputs.cache, **case.options)
    for first in range(0, 24, 8):
        until = [length - 24 + first + 8 for length in case.lengths]
        cache = ring_cache(
            [key[:end] for key, end in zip(inputs.keys, until, strict=True)],
            [value[:end] for value, end in zip(inputs.values, until, strict=True)],
            case.slots,
            case.sink,
        )
        one = block_causal_attention(inputs.query[:, first : first + 8], *cache, **case.options)
        torch.testing.assert_close(out[:, first : first + 8], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_the_number_of_splits_changes_only_rounding(
    splits: int, lane: Lane, random: torch.Generator
) -> None:
    case = Case((200, 2), 9, 60, sink=4, window=31, block_size=4, key_bias=KREA)
    inputs = make(case, random, lane)
    out, lse = block_causal_attention(
        inputs.query,
        *inputs.cache,
        **case.options,
        num_splits=splits,
        return_lse=True,
        implementation=lane.implementation,
    )
    check(case, inputs, out, lse)


def test_lengths_and_rows_of_the_cache_may_be_strided(lane: Lane, random: torch.Generator) -> None:
    case = Case((23, 9), 3, 24)
    inputs = make(case, random, lane)
    k_cache, v_cache, lengths = inputs.cache
    options = {"implementation": lane.implementation}
    whole = block_causal_attention(inputs.query, k_cache, v_cache, lengths, **options)
    # columns of a table, as a scheduler keeps them
    table = torch.stack((lengths.flip(0), lengths.new_tensor([1, 0])), 1)
    out = block_causal_attention(
        inputs.query.flip(0), k_cache, v_cache, table[:, 0], cache_batch_idx=table[:, 1], **options
    )
    torch.testing.assert_close(out.flip(0), whole, rtol=0, atol=1e-6)


def test_keys_that_no_row_sees_are_never_read(lane: Lane, random: torch.Generator) -> None:
    # the ring still holds them, but they are out of the window
    case = Case((60,), 6, 64, sink=3, window=20)
    inputs = make(case, random, lane)
    for cache in inputs.cache[:2]:
        cache[:, 3:40] = torch.nan
    out = block_causal_attention(
        inputs.query, *inputs.cache, **case.options, implementation=lane.implementation
    )
    check(case, inputs, out)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_nan_that_is_seen_is_not_hidden(splits: int, lane: Lane, random: torch.Generator) -> None:
    case = Case((60,), 6, 64)
    inputs = make(case, random, lane)
    inputs.cache.k_cache[0, 30, 1] = torch.nan
    out = block_causal_attention(
        inputs.query, *inputs.cache, num_splits=splits, implementation=lane.implementation
    )
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


def test_cache_batch_idx_chooses_the_row(lane: Lane, random: torch.Generator) -> None:
    case = Case((53, 31, 44), 6, 40, sink=3)
    inputs = make(case, random, lane)
    order = torch.tensor([2, 0], dtype=torch.int32, device=lane.device)
    k_cache, v_cache, lengths = inputs.cache
    out = block_causal_attention(
        inputs.query[order],
        k_cache,
        v_cache,
        lengths[order],
        sink=3,
        cache_batch_idx=order,
        implementation=lane.implementation,
    )
    chosen = Inputs(
        inputs.query[order],
        [inputs.keys[i] for i in (2, 0)],
        [inputs.values[i] for i in (2, 0)],
        inputs.cache,
    )
    check(case, chosen, out)


def test_the_order_of_slots_does_not_matter(lane: Lane, random: torch.Generator) -> None:
    case = Case((40,), 6, 40)
    inputs = make(case, random, lane)
    order = torch.randperm(40, generator=random).to(lane.device)
    k_cache, v_cache, lengths = inputs.cache
    out = block_causal_attention(
        inputs.query,
        k_cache[:, order],
        v_cache[:, order],
        lengths,
        implementation=lane.implementation,
    )
    check(case, inputs, out)


def test_strided_tensors_and_a_layer_of_a_cache_are_read_in_place(
    lane: Lane, random: torch.Generator
) -> None:
    case = CASES["sink, window, wrapped"]
    inputs = make(case, random, lane)
    batch, rows, heads, dim = inputs.query.shape
    # [B, H, T, D] and [S, layers, B, 2, H, D] in memory, NaN around what is read
    query = inputs.query.new_full((batch, heads, rows + 1, dim), torch.nan)
    query = query.transpose(1, 2)[:, :rows].copy_(inputs.query)
    layers = inputs.query.new_full((case.slots, 3, batch, 2, heads, dim), torch.nan)
    layers = layers.permute(3, 1, 2, 0, 4, 5)
    layers[0, 1], layers[1, 1] = inputs.cache[:2]
    out = block_causal_attention(
        query,
        layers[0, 1],
        layers[1, 1],
        inputs.cache.cache_seqlens,
        **case.options,
        implementation=lane.implementation,
    )
    assert out.is_contiguous()
    check(case, inputs, out)


@pytest.mark.parametrize("splits", [1, 3])
def test_out_is_written_in_place_and_nothing_around_it(
    splits: int, lane: Lane, random: torch.Generator
) -> None:
    case = CASES["last block partial"]
    inputs = make(case, random, lane)
    around = torch.full((1, 16, 2, 70), 7.0, device=lane.device)
    out = around[:, 1:15, :, 3:67]
    result, lse = block_causal_attention(
        inputs.query,
        *inputs.cache,
        **case.options,
        num_splits=splits,
        out=out,
        return_lse=True,
        implementation=lane.implementation,
    )
    assert result is out
    check(case, inputs, out, lse)
    out.fill_(7.0)
    assert (around == 7.0).all()


@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)])
def test_empty_queries_give_empty_outputs(shape: tuple[int, ...], lane: Lane) -> None:
    batch, _, heads, dim = shape
    cache = torch.full((batch, 8, heads or 1, dim), torch.nan, device=lane.device)
    lengths = torch.full((batch,), 4, dtype=torch.int32, device=lane.device)
    query = torch.empty(shape, device=lane.device)
    out, lse = block_causal_attention(
        query, cache, cache, lengths, return_lse=True, implementation=lane.implementation
    )
    assert out.shape == shape
    assert lse.shape == (batch, heads, shape[1])


def test_rows_that_see_no_key_give_zero(lane: Lane) -> None:
    query = torch.ones(2, 3, 1, 64, device=lane.device)
    cache = torch.full((2, 8, 1, 64), torch.nan, device=lane.device)
    cache[1, :2] = 1
    lengths = torch.tensor([0, 2], dtype=torch.int32, device=lane.device)
    out, lse = block_causal_attention(
        query, cache, cache, lengths, return_lse=True, implementation=lane.implementation
    )
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    # the first row is token -1
    assert out[1, :, 0, 0].tolist() == pytest.approx([0, 1, 1])
    assert lse[1, 0].isfinite().tolist() == [False, True, True]


def test_runs_repeat_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    case = CASES["blocks, wrapped"]
    inputs = make(case, random, lane)

    def run() -> torch.Tensor:
        return block_causal_attention(
            inputs.query,
            *inputs.cache,
            **case.options,
            num_splits=3,
            implementation=lane.implementation,
        )

    first = run()
    assert all(torch.equal(first, run()) for _ in range(2))


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse: bool, random: torch.Generator) -> None:
    case = CASES["sink, window, wrapped"]
    inputs = make(case, random)
    arguments = (inputs.query, *inputs.cache, None, 4, 4, 31, 0.125, -1.0, 2, None, None)
    ops = torch.ops.sdvg_kernels
    torch.library.opcheck(ops.block_causal_attention, (*arguments, return_lse, "reference"))
    torch.library.opcheck(
        ops.block_causal_attention_out,
        (*arguments, return_lse, "reference"),
        {"out": torch.empty_like(inputs.query)},
    )


def test_a_fake_tensor_has_the_shapes_of_the_real_one(random: torch.Generator) -> None:
    case = CASES["grouped queries"]
    inputs = make(case, random, dtype=torch.bfloat16)
    real = block_causal_attention(inputs.query, *inputs.cache, return_lse=True)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = (mode.from_tensor(tensor) for tensor in (inputs.query, *inputs.cache))
        out, lse = block_causal_attention(*fake, return_lse=True)
    for made, expected in zip((out, lse), real, strict=True):
        assert (made.shape, made.stride(), made.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )


# --- dense attention ---

# B, T, S, H, Hk, D
DENSE = {
    "as many": (2, 23, 23, 2, 2, 64),
    "more queries than keys": (1, 45, 7, 2, 1, 64),
    "many more": (1, 130, 3, 3, 3, 64),
    "one key": (2, 17, 1, 2, 2, 64),
    "more keys than queries": (2, 5, 77, 4, 2, 64),
    "grouped, wide": (1, 21, 19, 6, 2, 128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_dense_attention_sees_every_key(
    name: str, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    batch, rows, keys, heads, heads_cached, dim = DENSE[name]
    query = torch.randn(batch, rows, heads, dim, generator=random).to(lane.device, dtype)
    key, value = (
        torch.randn(batch, keys, heads_cached, dim, generator=random).to(lane.device, dtype)
        for _ in range(2)
    )
    out, lse = dense_attention(
        query, key, value, return_lse=True, implementation=lane.implementation
    )

    def plain(wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (tensor.to(wide).transpose(1, 2) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(heads // heads_cached, 1) for tensor in (k, v))
        logits = q * dim**-0.5 @ k.transpose(2, 3)
        return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1)

    same, exact = plain(dtype), plain(torch.float64)
    assert_within_budget(out, same[0], exact[0])
    assert_within_budget(lse, same[1].float(), exact[1], "lse")


@pytest.mark.parametrize("splits", [1, 3])
def test_dense_attention_in_parts(splits: int, lane: Lane, random: torch.Generator) -> None:
    query = torch.randn(1, 5, 2, 64, generator=random).to(lane.device)
    key, value = torch.randn(2, 1, 3, 2, 64, generator=random).to(lane.device)
    lengths = torch.full((1,), 6, dtype=torch.int32, device=lane.device)
    out = block_causal_attention(
        query, key, value, lengths, num_splits=splits, implementation=lane.implementation
    )
    whole = dense_attention(query, key, value, implementation=lane.implementation)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)


def test_dense_attention_writes_out_and_scales(lane: Lane, random: torch.Generator) -> None:
    query, key = (torch.randn(1, n, 2, 64, generator=random).to(lane.device) for n in (20, 9))
    out = torch.full_like(query, torch.nan)
    how = lane.implementation
    assert dense_attention(query, key, key, softmax_scale=0.5, out=out, implementation=how) is out
    same = dense_attention(query * 4, key, key, softmax_scale=0.125, implementation=how)
    torch.testing.assert_close(out, same, rtol=0, atol=1e-5)


def test_dense_attention_of_nothing_and_over_nothing() -> None:
    key = torch.zeros(1, 3, 2, 64)
    assert dense_attention(key[:, :0], key, key).shape == (1, 0, 2, 64)
    with pytest.raises(ValueError, match="k_cache must have at least one slot"):
        dense_attention(key, key[:, :0], key[:, :0])


def test_a_compiled_call_has_no_graph_break(lane: Lane, random: torch.Generator) -> None:
    case = CASES["sink, window, wrapped"]
    inputs = make(case, random, lane)

    def attend(query: torch.Tensor, *cache: torch.Tensor) -> torch.Tensor:
        options = {**case.options, "implementation": lane.implementation}
        return block_causal_attention(query, *cache, **options) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    out = compiled(inputs.query, *inputs.cache)
    assert torch.equal(out, attend(inputs.query, *inputs.cache))
    # what was asked for is judged when it runs
    nowhere = torch.compile(
        lambda query, key: dense_attention(query, key, key, implementation="hopper_fp8"),
        backend="eager",
    )
    with pytest.raises(NotImplementedError, match="got 'hopper_fp8'"):
        nowhere(inputs.query, inputs.query)


# --- error texts ---

_QUERY = torch.zeros(2, 3, 4, 64)
_CACHE = torch.zeros(2, 8, 2, 64)
_LENGTHS = torch.zeros(2, dtype=torch.int32)
_GOOD = {"query": _QUERY, "k_cache": _CACHE, "v_cache": _CACHE, "cache_seqlens": _LENGTHS}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": _QUERY[0]}, ValueError, "query must be [B, T, H, D], got [3, 4, 64]"),
        (
            {"k_cache": _CACHE[..., :32]},
            ValueError,
            "k_cache must be [Bc, S, Hk, D] with query's D, got [2, 8, 2, 32]",
        ),
        (
            {"v_cache": _CACHE[:, :4]},
            ValueError,
            "v_cache must have the shape of k_cache, got [2, 4, 2, 64]",
        ),
        (
            {"k_cache": _CACHE[:, :0], "v_cache": _CACHE[:, :0]},
            ValueError,
            "k_cache must have at least one slot, got [2, 0, 2, 64]",
        ),
        (
            {"query": _QUERY[:, :, :3]},
            ValueError,
            "k_cache must have a number of heads that divides query's, got [2, 8, 2, 64]",
        ),
        ({"cache_seqlens": _LENGTHS[:1]}, ValueError, "cache_seqlens must be [B], got [1]"),
        (
            {"query": _QUERY.int()},
            TypeError,
            "query must be bfloat16, float16, float32 or float64, got torch.int32",
        ),
        (
            {"v_cache": _CACHE.half()},
            TypeError,
            "v_cache must have query's dtype, got torch.float16",
        ),
        (
            {"cache_seqlens": _LENGTHS.long()},
            TypeError,
            "cache_seqlens must be int32, got torch.int64",
        ),
        (
            {"query": _QUERY.repeat_interleave(2, -1)[..., ::2]},
            ValueError,
            "query, k_cache and v_cache must be contiguous in the last dim, got another stride; "
            "call .contiguous()",
        ),
        ({"sink": 8}, ValueError, "sink must be in [0, S), S the slots, got 8"),
        ({"window": 0}, ValueError, "window must be at least 1 or None, got 0"),
        (
            {"window": 2, "block_size": 16},
            ValueError,
            "window must cover a block of 3 tokens, got 2",
        ),
        ({"block_size": 0}, ValueError, "block_size must be at least 1 or None, got 0"),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1 or None, got 0"),
        (
            {"query": _QUERY[:1], "cache_seqlens": _LENGTHS[:1]},
            ValueError,
            "k_cache must have query's B, got [2, 8, 2, 64]; or pass cache_batch_idx",
        ),
        (
            {"cache_batch_idx": _LENGTHS.long()},
            TypeError,
            "cache_batch_idx must be int32, got torch.int64",
        ),
        ({"key_bias": 0.3}, TypeError, "key_bias must be a KeyBias or None, got float"),
        ({"key_bias": KeyBias(-math.inf)}, ValueError, "key_bias.bias must be finite, got -inf"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite, got nan"),
        ({"out": _QUERY[:, :2]}, ValueError, "out must have query's shape, got [2, 2, 4, 64]"),
        ({"out": _QUERY.half()}, TypeError, "out must have query's dtype, got torch.float16"),
        (
            {"implementation": "cudnn"},
            ValueError,
            "implementation must be one of 'reference', 'triton', 'hopper', 'hopper_fp8', got "
            "'cudnn'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        block_causal_attention(**{**_GOOD, **change})
    assert str(caught.value) == f"block_causal_attention: {text}"


def test_an_implementation_asked_for_never_falls_back() -> None:
    query, cache = torch.zeros(2, 3, 4, 32), torch.zeros(2, 8, 2, 32)
    with pytest.raises(NotImplementedError, match=r"head dim 64 and 128|TRITON_INTERPRET"):
        block_causal_attention(query, cache, cache, _LENGTHS, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"float64|TRITON_INTERPRET"):
        block_causal_attention(
            _QUERY.double(), _CACHE.double(), _CACHE.double(), _LENGTHS, implementation="triton"
        )


def test_a_slot_stride_that_overflows_a_tile_is_refused(random: torch.Generator) -> None:
    if api.triton_reason("cpu"):
        pytest.skip(api.triton_reason("cpu"))
    query, lengths = torch.zeros(1, 1, 1, 64), torch.ones(1, dtype=torch.int32)
    cache = torch.zeros(64).as_strided((1, 1, 1, 64), (2**27, 2**27, 64, 1))
    text = "k_cache must have a slot stride below 134217728 for Triton, got 134217728"
    with pytest.raises(NotImplementedError, match=text):
        block_causal_attention(query, cache, cache, lengths, implementation="triton")


def test_every_head_dim_and_dtype_is_served() -> None:
    for device in ("cpu", "cuda"):
        for dim in (1, 24, 64, 128, 256):
            for dtype in (*api.DTYPES, torch.float64):
                assert "" in api._available(device, dim, dtype).values()


# --- configurations ---


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 4680])
def test_every_gpu_dtype_and_size_has_a_launch(capability: tuple[int, int], rows: int) -> None:
    for dim in api.HEAD_DIMS:
        for dtype in api.DTYPES:
            for biased in (False, True):
                launch = config.choose(capability, dim, dtype, rows, biased)
                assert launch.reason


def test_splits_fill_the_machine_only_where_tiles_do_not() -> None:
    launch = config.choose((9, 0), 128, torch.bfloat16, 1, False)
    assert config.splits(launch, tiles=444, key_tiles=256, processors=132) == 1
    assert config.splits(launch, tiles=12, key_tiles=256, processors=132) == 22
    assert config.splits(launch, tiles=40, key_tiles=256, processors=132) == 6
    # 21 parts of 3 tiles, as 22 would have: no longer share, fewer parts
    assert config.splits(launch, tiles=12, key_tiles=88, processors=132) == 22
    assert config.splits(launch, tiles=12, key_tiles=61 * 4, processors=132) == 21
    assert config.splits(launch, tiles=12, key_tiles=8, processors=132) == 2
    assert config.splits(launch, tiles=1, key_tiles=1, processors=132) == 1


# --- GPU only ---

GPU = Lane("triton", "cuda", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
@pytest.mark.parametrize("dim", api.HEAD_DIMS)
@pytest.mark.parametrize("rows", [5, 48, 300])
def test_shipped_configurations_are_exact_on_the_gpu(
    rows: int, dim: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    case = Case((700, 301), rows, 520, sink=20, window=333, block_size=100, dim=dim)
    for biased in (case, replace(case, key_bias=KREA)):
        inputs = make(biased, random, GPU, dtype)
        for splits in (None, 1, 5):
            out, lse = block_causal_attention(
                inputs.query,
                *inputs.cache,
                **biased.options,
                num_splits=splits,
                return_lse=True,
                implementation="triton",
            )
            check(biased, inputs, out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [7, 4680])
def test_cross_attention_to_a_text_is_exact_on_the_gpu_and_in_a_graph(
    rows: int, random: torch.Generator
) -> None:
    query, key, value = (
        torch.randn(1, tokens, 12, 128, generator=random).to("cuda", torch.bfloat16)
        for tokens in (rows, 512, 512)
    )
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = dense_attention(query, key, value, implementation="triton")
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = dense_attention(query, key, value, implementation="triton")
    graph.replay()
    assert torch.equal(out, eager)
    exact = dense_attention(query.double(), key.double(), value.double())
    plain = torch.einsum("bths,bshd->bthd", _weights(query, key).bfloat16(), value)
    assert_within_budget(out, plain, exact)


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("bthd,bshd->bths", query, key).float()
    return (logits * query.shape[3] ** -0.5).softmax(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["batch", "slot"])
def test_offsets_past_2_to_the_31_are_read_right(far: str, random: torch.Generator) -> None:
    slots = 300 if far == "slot" else 140
    case = Case((slots,), 16, slots)
    inputs = make(case, random, GPU, torch.bfloat16)
    # K and V share 5 GB: the second sequence, or the last slots, are 2^31 elements on
    token = 2 * 64
    slot = 2**23 if far == "slot" else 2 * token
    start = 2**31 if far == "batch" else 0
    memory = torch.empty(start + slots * slot, dtype=torch.bfloat16, device="cuda")
    caches = [
        memory.as_strided((2, slots, 2, 64), (start, slot, 64, 1), offset) for offset in (0, token)
    ]
    for cache, small in zip(caches, inputs.cache[:2], strict=True):
        cache[1].copy_(small[0])
    order = torch.tensor([1], dtype=torch.int32, device="cuda")
    out = block_causal_attention(
        inputs.query,
        *caches,
        inputs.cache.cache_seqlens,
        cache_batch_idx=order,
        implementation="triton",
    )
    check(case, inputs, out)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 4])
def test_a_graph_replays_on_new_lengths(splits: int | None, random: torch.Generator) -> None:
    long, short = Case((150,), 16, 70, sink=6, window=40), Case((61,), 16, 70, sink=6, window=40)
    inputs = make(long, random, GPU)
    fixed = [tensor.clone() for tensor in (inputs.query, *inputs.cache)]

    def run() -> torch.Tensor:
        return block_causal_attention(
            *fixed, **long.options, num_splits=splits, implementation="triton"
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for case in (short, long):
        inputs = make(case, random, GPU)
        for tensor, new in zip(fixed, (inputs.query, *inputs.cache), strict=True):
            tensor.copy_(new)
        graph.replay()
        check(case, inputs, out)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_is_read_back_from_the_gpu(implementation: str, random: torch.Generator) -> None:
    case = CASES["blocks, wrapped"]
    inputs = make(case, random, GPU)

    def run() -> None:
        block_causal_attention(
            inputs.query, *inputs.cache, **case.options, implementation=implementation
        )

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_only_an_unasked_reference_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = {"triton": "no Triton here", "reference": ""}
    monkeypatch.setattr(api, "_available", lambda *_: served)
    api._warn_once.cache_clear()
    block_causal_attention(_QUERY, _CACHE, _CACHE, _LENGTHS, implementation="reference")
    assert not caplog.messages
    for _ in range(2):
        block_causal_attention(_QUERY, _CACHE, _CACHE, _LENGTHS)
    (said,) = caplog.messages
    assert said.endswith("the reference serves cpu tensors here: no Triton here")


def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, sdvg_kernels as s;"
        "c = torch.zeros(1, 4, 1, 8); l = torch.ones(1, dtype=torch.int32);"
        "print(s.block_causal_attention(c, c, c, l).shape, s.implementations()['attention'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 4, 1, 8]" in done.stdout
