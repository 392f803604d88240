"""The Hopper kernel in the Gluon lane, over block_causal_attention's contract; on sm_90 too."""

# a kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from sdvg_kernels import block_causal_attention
from sdvg_kernels.attention import KeyBias, api
from sdvg_kernels.testing import GluonLane, Lane, fails_alone
from tests.kernels.test_attention import CASES, KREA, Case, Inputs, check, make

pytest.importorskip("triton.experimental.gluon")

from triton.experimental import gluon

from sdvg_kernels.attention import config, descriptor, hopper
from sdvg_kernels.attention.stream import PLAN, STATE, plan

# several tiles of several units, edges of every kind
TILES = {
    "one run": Case((700,), 150, 800, heads=1, heads_cached=1),
    "blocks, wrapped": Case((700, 301), 300, 520, sink=20, window=333, block_size=100),
    "blocks, wrapped, bias": Case(
        (700,), 300, 520, sink=20, window=333, block_size=100, key_bias=KREA
    ),
    "sink of several units": Case((1900,), 130, 900, sink=260, heads=1, heads_cached=1),
    "window, bias on a range": Case(
        (1300,), 140, 700, sink=130, window=500, block_size=65, key_bias=KeyBias(-1.0, 10, 1100)
    ),
    "lengths differ": Case((5, 640), 130, 700, sink=10, heads=2, heads_cached=1),
    "head dim 128": Case((500,), 130, 500, heads=2, heads_cached=1, dim=128),
    "ring smaller than the query": Case((50,), 40, 13, sink=5, block_size=4),
}


def attend(
    case: Case,
    inputs: Inputs,
    programs: int = 2,
    seed: int = 0,
    resident: int | None = None,
    **more: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the Hopper kernel in the lane."""
    bias = case.key_bias or KeyBias(0.0)
    scale = case.dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    options = {
        "block_size": case.block_size,
        "sink": case.sink,
        "window": case.window,
        "cache_batch_idx": None,
        "softmax_scale": scale,
        "bias": None if case.key_bias is None else bias.bias,
        "bias_start": bias.start,
        "bias_stop": bias.stop,
        "return_lse": True,
        "out": None,
    }
    with GluonLane(seed, resident).patched(hopper):
        return hopper.block_causal_attention(
            inputs.query, *inputs.cache, **(options | more), programs=programs
        )


@pytest.mark.parametrize("name", CASES)
def test_equals_attention_over_logical_tokens(name: str, random: torch.Generator) -> None:
    case = CASES[name]
    inputs = make(case, random, dtype=torch.bfloat16)
    check(case, inputs, *attend(case, inputs, seed=len(name)))


@pytest.mark.parametrize("name", ["one token", "sink, window, wrapped", "bias before each block"])
def test_float16_is_within_twice_plain_pytorch(name: str, random: torch.Generator) -> None:
    case = CASES[name]
    inputs = make(case, random, dtype=torch.float16)
    check(case, inputs, *attend(case, inputs))


@pytest.mark.parametrize("programs", [1, 2, 3, 5])
@pytest.mark.parametrize("name", TILES)
def test_tiles_are_shared_right(name: str, programs: int, random: torch.Generator) -> None:
    case = TILES[name]
    inputs = make(case, random, dtype=torch.bfloat16)
    check(case, inputs, *attend(case, inputs, programs, seed=programs))


@pytest.mark.parametrize("resident", [None, 1])
def test_every_order_of_arrival_gives_the_same_bits(
    resident: int | None, random: torch.Generator
) -> None:
    # two tiles of 3 units on 4 programs: each tile has parts of two or three
    case = Case((300,), 140, 400, heads=1, heads_cached=1)
    inputs = make(case, random, dtype=torch.bfloat16)
    first = attend(case, inputs, 4)
    check(case, inputs, *first)
    for seed in range(1, 7):
        for one, other in zip(first, attend(case, inputs, 4, seed, resident), strict=True):
            assert torch.equal(one, other)


def test_keys_that_no_row_sees_are_never_used(random: torch.Generator) -> None:
    # the ring still holds them, but they are out of the window
    case = Case((460,), 6, 500, sink=3, window=150)
    inputs = make(case, random, dtype=torch.bfloat16)
    for cache in inputs.cache[:2]:
        cache[:, 3:310] = torch.nan
    check(case, inputs, attend(case, inputs)[0])


def test_a_nan_that_is_seen_is_not_hidden(random: torch.Generator) -> None:
    case = Case((260,), 6, 300)
    inputs = make(case, random, dtype=torch.bfloat16)
    inputs.cache.k_cache[0, 30, 1] = torch.nan
    out, _ = attend(case, inputs)
    assert out[:, :, 1].isnan().all()
    assert out[:, :, 0].isfinite().all()


def test_cache_batch_idx_chooses_the_row(random: torch.Generator) -> None:
    case = Case((53, 31, 44), 6, 40, sink=3)
    inputs = make(case, random, dtype=torch.bfloat16)
    order = torch.tensor([2, 0], dtype=torch.int32)
    chosen = Inputs(
        inputs.query[order],
        [inputs.keys[i] for i in (2, 0)],
        [inputs.values[i] for i in (2, 0)],
        inputs.cache._replace(cache_seqlens=inputs.cache.cache_seqlens[order]),
    )
    check(case, chosen, *attend(case, chosen, cache_batch_idx=order))


def test_strided_tensors_and_a_layer_of_a_cache_are_read_in_place(random: torch.Generator) -> None:
    case = CASES["sink, window, wrapped"]
    inputs = make(case, random, dtype=torch.bfloat16)
    batch, rows, heads, dim = inputs.query.shape
    # [B, H, T, D] and [S, layers, B, 2, H, D] in memory, NaN around what is read
    query = inputs.query.new_full((batch, heads, rows + 1, dim), torch.nan)
    query = query.transpose(1, 2)[:, :rows].copy_(inputs.query)
    layers = inputs.query.new_full((case.slots, 3, batch, 2, heads, dim), torch.nan)
    layers = layers.permute(3, 1, 2, 0, 4, 5)
    layers[0, 1], layers[1, 1] = inputs.cache[:2]
    strided = inputs.cache._replace(k_cache=layers[0, 1], v_cache=layers[1, 1])
    out, lse = attend(case, replace(inputs, query=query, cache=strided))
    assert out.is_contiguous()
    check(case, inputs, out, lse)


@pytest.mark.parametrize("shift", [8, 3], ids=["aligned", "not aligned"])
def test_out_is_written_in_place_and_nothing_around_it(shift: int, random: torch.Generator) -> None:
    case = CASES["last block partial"]
    inputs = make(case, random, dtype=torch.bfloat16)
    around = torch.full((1, 16, 2, 80), 7.0, dtype=torch.bfloat16)
    out = around[:, 1:15, :, shift : shift + 64]
    assert descriptor.can_copy(out) == (shift == 8)
    result, lse = attend(case, inputs, out=out)
    assert result is out
    check(case, inputs, out, lse)
    out.fill_(7.0)
    assert (around == 7.0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_may_be_negative_or_zero(scale: float, random: torch.Generator) -> None:
    case = Case((33,), 5, 40, softmax_scale=scale)
    inputs = make(case, random, dtype=torch.bfloat16)
    check(case, inputs, *attend(case, inputs))


@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)])
def test_empty_queries_give_empty_outputs(shape: tuple[int, ...]) -> None:
    case = Case((4,) * shape[0], shape[1], 8)
    cache = torch.full((shape[0], 8, shape[2] or 1, 64), torch.nan, dtype=torch.bfloat16)
    query = torch.empty(shape, dtype=torch.bfloat16)
    lengths = torch.full(shape[:1], 4, dtype=torch.int32)
    out, lse = attend(case, Inputs(query, [], [], (cache, cache, lengths)))
    assert out.shape == shape
    assert lse.shape == (shape[0], shape[2], shape[1])


def test_rows_that_see_no_key_give_zero() -> None:
    query = torch.ones(2, 3, 1, 64, dtype=torch.bfloat16)
    cache = torch.full((2, 8, 1, 64), torch.nan, dtype=torch.bfloat16)
    cache[1, :2] = 1
    lengths = torch.tensor([0, 2], dtype=torch.int32)
    out, lse = attend(Case((0, 2), 3, 8), Inputs(query, [], [], (cache, cache, lengths)))
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    # the first row is token -1
    assert out[1, :, 0, 0].tolist() == [0, 1, 1]
    assert lse[1, 0].isfinite().tolist() == [False, True, True]


# --- the plan ---


@gluon.jit
def plan_kernel(
    n_tile, cache_seqlens, state, T, ring, H, block_size, sink, window,
    BN: gluon.language.constexpr, LANES: gluon.language.constexpr,
):  # fmt: skip
    """Write each program's plan."""
    shape = (T, ring, H, block_size, sink, window)
    plan(n_tile, cache_seqlens, state, shape, BN, LANES)


def planned(
    units: list[int], case: Case, programs: int
) -> tuple[list[list[tuple[int, int, int]]], list[list[int]]]:
    """Each program's segments (tile, first unit, stop), and its plan as it stands in the state."""
    state = torch.zeros(programs, STATE.value, dtype=torch.int32)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    ring = case.slots - case.sink
    shape = (case.rows, ring, case.heads, case.block_size or case.rows, case.sink)
    GluonLane(resident=1).launch(
        plan_kernel,
        (programs,),
        len(units),
        lengths,
        state,
        *shape,
        case.window or 2**30,
        BN=128,
        LANES=256,
        num_warps=4,
    )
    plans = state[:, PLAN.value :].tolist()
    walks = []
    for c, (segments, whole, tile, first, stop, *_) in enumerate(plans):
        walk = [(c + s * programs, 0, units[c + s * programs]) for s in range(whole)]
        for s in range(whole, segments):
            here = tile + s - whole
            last = stop if s == segments - 1 else units[here]
            walk.append((here, first if s == whole else 0, last))
        walks.append(walk)
    return walks, plans


@pytest.mark.parametrize(
    ("case", "units", "programs", "most"),
    [
        # 3.36 waves, not 4: as 12 heads on 132 processors
        (Case((32760,), 4680, 32760, heads=3), [256] * 111, 33, 862),
        (Case((9360,), 1560, 9360, heads=3), [74] * 39, 33, 88),
        # whole waves need no sharing
        (Case((600,), 512, 600, heads=5), [5] * 20, 10, 10),
        # sequences of different lengths: a wave is shared to balance them
        (Case((600, 3000), 384, 3000, heads=7), [5] * 21 + [24] * 21, 10, 61),
        # fewer units than programs
        (Case((300,), 20, 300, heads=1), [3], 5, 1),
        (Case((1,), 1, 8, heads=3), [1] * 3, 1, 3),
    ],
)
def test_every_unit_is_done_once_and_programs_are_balanced(
    case: Case, units: list[int], programs: int, most: int
) -> None:
    walks, plans = planned(units, case, programs)
    done = [[0] * n for n in units]
    for tile, first, stop in itertools.chain(*walks):
        for u in range(first, stop):
            done[tile][u] += 1
    assert all(count == 1 for tile in done for count in tile)
    loads = [sum(stop - first for _, first, stop in walk) for walk in walks]
    assert max(loads) <= most
    # who shares a tile knows with whom
    for tile, n in enumerate(units):
        parts = {c: s for c, walk in enumerate(walks) for s in walk if s[0] == tile}
        if len(parts) > 1:
            assert sorted(parts) == list(range(min(parts), max(parts) + 1))
            for c, (_, first, stop) in parts.items():
                assert first == 0 or plans[c][5] == min(parts)
                assert stop == n or plans[c][6] == max(parts)


# --- who can run it ---


def test_asked_for_without_a_hopper_gpu_it_is_an_error() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("this is a Hopper GPU")
    query = torch.zeros(1, 3, 2, 64, dtype=torch.bfloat16)
    lengths = torch.full((1,), 3, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"'hopper'; it needs a Hopper GPU"):
        block_causal_attention(query, query, query, lengths, implementation="hopper")
    assert api.implementations()["hopper"]
    assert list(api._available("cuda", 64, torch.bfloat16))[:2] == ["triton", "hopper"]


def test_what_tma_cannot_copy_is_named() -> None:
    good = torch.zeros(2, 5, 3, 64, dtype=torch.bfloat16)
    odd = torch.zeros(2, 5, 3, 68, dtype=torch.bfloat16)[..., :64]
    text = "v_cache begins at, or has a stride of, no multiple of 16 bytes"
    assert descriptor.missing(good, good, good) == ""
    assert descriptor.missing(good, good, odd) == text
    assert descriptor.missing(odd, good, good) == text.replace("v_cache", "query")
    assert not descriptor.can_copy(good[:, :1].expand(2, 5, 3, 64))
    # a stride that is never used may be anything
    assert descriptor.can_copy(
        torch.zeros(64, dtype=torch.bfloat16).as_strided((1, 1, 1, 64), (3, 3, 3, 1))
    )


def test_a_descriptor_is_made_once_and_keeps_no_memory() -> None:
    base = descriptor._Address(4096, torch.bfloat16)
    shape, strides = torch.Size((1, 5, 3, 64)), (7, 192, 64, 1)
    made = descriptor._kept_descriptor(base, shape, strides, (1, 64, 1, 64))
    assert descriptor._kept_descriptor(base, shape, strides, (1, 64, 1, 64)) is made
    assert made.strides == [960, 192, 64, 1]
    assert not isinstance(made.base, torch.Tensor)


def test_the_registers_of_the_roles_add_up() -> None:
    for launch in config.HOPPER.values():
        asked = 2 * launch.consumer_registers + launch.producer_registers
        assert asked == 3 * config.HOPPER_MAXNREG
        assert launch.consumer_registers % 8 == launch.producer_registers % 8 == 0
        assert launch.reason


# --- on a Hopper GPU ---

GPU = Lane("hopper", "cuda", "hopper")


@pytest.fixture
def gpu() -> Lane:
    """The Hopper kernel where it runs."""
    if reason := api._available("cuda", 64, torch.bfloat16)["hopper"]:
        pytest.skip(reason)
    # a kernel that waits for ever would take all tests behind it along
    if reason := fails_alone("hopper"):
        pytest.fail(reason)
    return GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", api.HEAD_DIMS)
@pytest.mark.parametrize("name", [*CASES, *TILES])
def test_on_the_gpu_it_equals_attention_over_logical_tokens(
    name: str, dim: int, dtype: torch.dtype, gpu: Lane, random: torch.Generator
) -> None:
    case = replace((CASES | TILES)[name], dim=dim)
    inputs = make(case, random, gpu, dtype)
    options = {"return_lse": True, "implementation": "hopper"}
    out, lse = block_causal_attention(inputs.query, *inputs.cache, **case.options, **options)
    check(case, inputs, out, lse)
    again, _ = block_causal_attention(inputs.query, *inputs.cache, **case.options, **options)
    assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300, 1560])
def test_on_the_gpu_long_sequences_are_exact(rows: int, gpu: Lane, random: torch.Generator) -> None:
    for key_bias in (None, KREA):
        case = Case((5000, 3111), rows, 4096, sink=300, window=3000, dim=128, key_bias=key_bias)
        case = replace(case, heads=6, heads_cached=3, block_size=700)
        inputs = make(case, random, gpu, torch.bfloat16)
        out, lse = block_causal_attention(
            inputs.query,
            *inputs.cache,
            **case.options,
            return_lse=True,
            implementation="hopper",
        )
        check(case, inputs, out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["batch", "slot"])
def test_offsets_past_2_to_the_31_are_read_right(
    far: str, gpu: Lane, random: torch.Generator
) -> None:
    case = Case((140,), 16, 140)
    inputs = make(case, random, gpu, torch.bfloat16)
    # K and V share 5 GB: the second sequence, or the last slots, are 2^31 elements on
    token = 2 * 64
    slot = 2**24 if far == "slot" else 2 * token
    start = 2**31 if far == "batch" else 0
    memory = torch.empty(start + 140 * slot, dtype=torch.bfloat16, device="cuda")
    strides = (start or 140 * slot, slot, 64, 1)
    sequences = 2 if start else 1
    caches = [memory.as_strided((sequences, 140, 2, 64), strides, offset) for offset in (0, token)]
    for cache, small in zip(caches, inputs.cache[:2], strict=True):
        cache[-1].copy_(small[0])
    order = torch.tensor([sequences - 1], dtype=torch.int32, device="cuda")
    out = block_causal_attention(
        inputs.query,
        *caches,
        inputs.cache.cache_seqlens,
        cache_batch_idx=order,
        implementation="hopper",
    )
    check(case, inputs, out)


@pytest.mark.gpu
def test_a_graph_replays_on_new_lengths(gpu: Lane, random: torch.Generator) -> None:
    long = Case((1500,), 300, 700, sink=60, window=400, block_size=100)
    short = replace(long, lengths=(610,))
    inputs = make(long, random, gpu, torch.bfloat16)
    fixed = [tensor.clone() for tensor in (inputs.query, *inputs.cache)]

    def run() -> torch.Tensor:
        return block_causal_attention(*fixed, **long.options, implementation="hopper")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for case in (short, long, short):
        inputs = make(case, random, gpu, torch.bfloat16)
        for tensor, new in zip(fixed, (inputs.query, *inputs.cache), strict=True):
            tensor.copy_(new)
        graph.replay()
        check(case, inputs, out)


@pytest.mark.gpu
def test_two_streams_do_not_disturb_each_other(gpu: Lane, random: torch.Generator) -> None:
    case = TILES["blocks, wrapped"]
    inputs = make(case, random, gpu, torch.bfloat16)

    def run() -> torch.Tensor:
        return block_causal_attention(
            inputs.query, *inputs.cache, **case.options, implementation="hopper"
        )

    expected = run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    for _ in range(20):
        for one in streams:
            with torch.cuda.stream(one):
                outs.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_is_read_back_from_the_gpu(gpu: Lane, random: torch.Generator) -> None:
    case = CASES["blocks, wrapped"]
    inputs = make(case, random, gpu, torch.bfloat16)

    def run() -> None:
        block_causal_attention(inputs.query, *inputs.cache, **case.options, implementation="hopper")

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_opcheck(gpu: Lane, random: torch.Generator) -> None:
    case = CASES["sink, window, wrapped"]
    inputs = make(case, random, gpu, torch.bfloat16)
    arguments = (inputs.query, *inputs.cache, None, 4, 4, 31, 0.125, -1.0, 2, None, None)
    ops = torch.ops.sdvg_kernels
    torch.library.opcheck(ops.block_causal_attention, (*arguments, True, "hopper"))
    torch.library.opcheck(
        ops.block_causal_attention_out,
        (*arguments, True, "hopper"),
        {"out": torch.empty_like(inputs.query)},
    )
