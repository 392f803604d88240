"""Attention over an e4m3 cache: what is rounded, and that 25 dB are left on every kind of input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from sdvg_kernels.attention import KeyBias, e4m3
from sdvg_kernels.testing import (
    GluonLane,
    LaneFault,
    assert_within_budget,
    logical_attention,
    ring_cache,
)
from tests.kernels.test_attention import KREA, Case, Inputs, make, truth
from tests.kernels.test_gluon_lane import planted

DIM, HEADS = 128, 6
# the channel that is large
CHANNEL = 7


def sqnr(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantisation noise, in dB."""
    noise = (out.double() - exact).square().sum()
    return 10 * math.log10(exact.square().sum() / noise)


class Tokens(NamedTuple):
    """Query [1, T, H, D], key and value [1, S, H, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def tokens(random: torch.Generator, rows: int, slots: int) -> Tokens:
    """Gaussian tokens in bfloat16."""
    shapes = (rows, slots, slots)
    return Tokens(*(torch.randn(1, n, HEADS, DIM, generator=random).bfloat16() for n in shapes))


def grow(tensor: torch.Tensor, by: float = 50.0) -> torch.Tensor:
    """One channel is `by` times the rest."""
    tensor = tensor.clone()
    tensor[..., CHANNEL] *= by
    return tensor


def shift(tensor: torch.Tensor) -> torch.Tensor:
    """One channel has a large mean."""
    tensor = tensor.clone()
    tensor[..., CHANNEL] += 50
    return tensor


INPUTS: dict[str, Callable[[Tokens], Tokens]] = {
    "Gaussian": lambda x: x,
    "K": lambda x: x._replace(key=grow(x.key)),
    "Q": lambda x: x._replace(query=grow(x.query)),
    "V": lambda x: x._replace(value=grow(x.value)),
    "K and V": lambda x: x._replace(key=grow(x.key), value=grow(x.value)),
    "K and Q": lambda x: x._replace(key=grow(x.key), query=grow(x.query)),
    "mean of K": lambda x: x._replace(key=shift(x.key)),
}


def over_e4m3(x: Tokens, factors: torch.Tensor | None, **options: object) -> torch.Tensor:
    """Attention over the tokens rounded to e4m3, balanced by `factors`."""
    query, key = x.query.float(), x.key.float()
    if factors is not None:
        query, key = query / factors, key * factors
    lengths = torch.tensor([key.shape[1]], dtype=torch.int32)
    cache = e4m3.quantised_cache(key, x.value.float())
    return e4m3.block_causal_attention(query, cache, lengths, **options)[0]


def exactly(x: Tokens, **options: object) -> torch.Tensor:
    """The truth in float64."""
    key, value = x.key[0].double(), x.value[0].double()
    return logical_attention(x.query.double(), [key], [value], slots=len(key), **options)[0]


@pytest.mark.parametrize("slots", [1024, 4096])
@pytest.mark.parametrize("kind", INPUTS)
def test_25_db_are_left(kind: str, slots: int, random: torch.Generator) -> None:
    # the factors come from other tokens of the same kind, as from a first block
    factors = e4m3.balance(*INPUTS[kind](tokens(random, 64, 512))[:2])
    x = INPUTS[kind](tokens(random, 64, slots))
    assert sqnr(over_e4m3(x, factors), exactly(x)) >= 25


def test_a_large_channel_of_the_query_needs_the_balance() -> None:
    # over 4 draws: unbalanced, its worst depends on the draw
    worst = {}
    for balanced in (False, True):
        found = []
        for seed in range(4):
            x = INPUTS["Q"](tokens(torch.Generator().manual_seed(seed), 64, 1024))
            factors = e4m3.balance(x.query, x.key) if balanced else None
            found.append(sqnr(over_e4m3(x, factors), exactly(x)))
        worst[balanced] = min(found)
    assert worst[False] < 25 < 26 < worst[True]


def test_balance_leaves_the_logits_and_pairs_alone(random: torch.Generator) -> None:
    x = tokens(random, 10, 20)
    query, key = grow(x.query).double(), x.key[:, :, :2].double()
    factors = e4m3.balance(query, key)
    assert factors.shape == (2, DIM)
    assert torch.equal(factors[:, 0::2], factors[:, 1::2])
    apart = factors[:, None].double()
    grouped = query.unflatten(2, (2, -1))
    before = torch.einsum("bthgd,bshd->bhgts", grouped, key)
    after = torch.einsum("bthgd,bshd->bhgts", grouped / apart, key * apart[:, 0])
    torch.testing.assert_close(before, after)
    zero = e4m3.balance(torch.zeros_like(query), key)
    assert torch.equal(zero, torch.ones(2, DIM))


def test_a_row_keeps_its_largest_value(random: torch.Generator) -> None:
    rows = torch.randn(50, DIM, generator=random) * torch.logspace(-20, 20, 50)[:, None]
    rounded, scale = e4m3.quantised(rows)
    back = rounded.float() * scale[:, None]
    largest = rows.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(back.gather(1, largest), rows.gather(1, largest))
    # 4 significant bits, down to 2^-6 of 448
    normal = rows.abs() > scale[:, None] * 2.0**-6
    assert ((back - rows).abs() <= rows.abs() * 2**-4 * 1.001)[normal].all()
    rounded, scale = e4m3.quantised(torch.zeros(3, DIM))
    assert torch.equal(scale, torch.ones(3))
    assert not rounded.float().any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 8},
        {"sink": 4, "window": 40, "block_size": 12},
        {"bias": math.log(0.3), "bias_start": 2, "block_size": 8},
        {"bias": 0.7, "bias_start": 10, "bias_stop": 50},
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(90, 61), (203, 150), (5, 0)])
def test_the_contract_is_that_of_attention(
    lengths: tuple[int, ...], options: dict[str, object], random: torch.Generator
) -> None:
    # integers below 9 are exact in e4m3 with these factors: only the weights are rounded
    slots, rows, sink = 96, 24, int(options.get("sink", 0))

    def whole(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-7, 7, shape, generator=random).float()
        drawn[..., 0] = 7.0
        return drawn * (448 / 7)

    keys, values = ([whole(length, 2, DIM) / 448 for length in lengths] for _ in range(2))
    query = whole(len(lengths), rows, 4, DIM) / 448
    k_cache, v_cache, cache_seqlens = ring_cache(keys, values, slots, sink)
    cache = e4m3.quantised_cache(k_cache, v_cache)
    out, lse = e4m3.block_causal_attention(query, cache, cache_seqlens, **options)

    bias = options.get("bias")
    told = {name: options[name] for name in ("block_size", "sink", "window") if name in options}
    if bias is not None:
        told["key_bias"] = KeyBias(bias, options["bias_start"], options.get("bias_stop"))
    wide = [[x.double() for x in many] for many in (keys, values)]
    exact, exact_lse = logical_attention(query.double(), *wide, slots=slots, **told)
    plain = logical_attention(query, keys, values, slots=slots, **told)[1]
    assert_within_budget(lse, plain, exact_lse, "lse")
    assert (out.double() - exact).abs().max() <= 2**-4 * exact.abs().max()
    blind = exact_lse == -torch.inf
    assert not out.transpose(1, 2)[blind].any()


def test_what_nobody_sees_may_be_nan(random: torch.Generator) -> None:
    x = tokens(random, 4, 40)
    lengths = torch.tensor([30], dtype=torch.int32)
    clean = e4m3.quantised_cache(x.key, x.value)
    key, value = x.key.clone(), x.value.clone()
    key[:, 30:] = value[:, 30:] = torch.nan
    poisoned = e4m3.quantised_cache(key, value)
    assert poisoned.k_scale[:, 30:].isnan().all()
    outs = [e4m3.block_causal_attention(x.query, cache, lengths)[0] for cache in (clean, poisoned)]
    assert torch.equal(*outs)


# --- the Hopper kernel, in the Gluon lane ---

hopper_fp8 = pytest.importorskip("sdvg_kernels.attention.hopper_fp8")

CONTRACT = {
    "tail": Case((730,), 140, 768, dim=128, heads=2, heads_cached=1),
    "blocks, wrapped": Case((1000, 901), 140, 992, sink=9, window=900, block_size=60),
    "bias": Case((500,), 130, 528, key_bias=KREA, dim=128, block_size=65),
    "bias on a range": Case((500,), 40, 528, key_bias=KeyBias(0.7, 100, 300), window=300),
    "before the start": Case((3, 0, 200), 140, 208, sink=2, window=100),
    "one token": Case((1,), 1, 16),
}


def in_the_lane(case: Case, inputs: Inputs, seed: int, programs: int) -> tuple[torch.Tensor, ...]:
    """(out, lse) of the kernel, and of the emulation."""
    cache = e4m3.quantised_cache(*inputs.cache[:2])
    bias = case.key_bias or KeyBias(0.0)
    options = {"block_size": case.block_size, "sink": case.sink, "window": case.window}
    options |= {
        "bias": bias.bias if case.key_bias else None,
        "bias_start": bias.start,
        "bias_stop": bias.stop,
    }
    arguments = inputs.query, cache, inputs.cache.cache_seqlens
    with GluonLane(seed).patched(hopper_fp8):
        ours = hopper_fp8.block_causal_attention(
            *arguments, **options, return_lse=True, programs=programs
        )
    return (*ours, *e4m3.block_causal_attention(*arguments, **options))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", CONTRACT)
def test_the_kernel_rounds_as_the_emulation(
    name: str, programs: int, random: torch.Generator
) -> None:
    case = CONTRACT[name]
    inputs = make(case, random, dtype=torch.bfloat16)
    out, lse, emulated, emulated_lse = in_the_lane(case, inputs, programs, programs)
    # logits are rounded alike: only weights are, at a running maximum, otherwise
    torch.testing.assert_close(lse, emulated_lse, rtol=0, atol=4e-6)
    exact = truth(case, inputs, torch.float64)[0]
    assert sqnr(out, exact) >= min(25, sqnr(emulated, exact) - 0.5)
    assert sqnr(out, emulated.double()) >= 28
    assert not out.transpose(1, 2)[emulated_lse == -torch.inf].any()


@pytest.mark.parametrize("kind", INPUTS)
def test_the_kernel_leaves_25_db(kind: str, random: torch.Generator) -> None:
    factors = e4m3.balance(*INPUTS[kind](tokens(random, 64, 512))[:2])
    x = INPUTS[kind](tokens(random, 64, 1024))
    # a power of two: bfloat16 of the balanced query keeps its bits
    factors = factors.log2().round().exp2()
    query, key = (x.query.float() / factors).bfloat16(), x.key.float() * factors
    cache = e4m3.quantised_cache(key, x.value.float())
    lengths = torch.tensor([1024], dtype=torch.int32)
    with GluonLane().patched(hopper_fp8):
        out, _ = hopper_fp8.block_causal_attention(query, cache, lengths, programs=2)
    assert sqnr(out, exactly(x)) >= 25


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_programs_changes_no_bit(seed: int, random: torch.Generator) -> None:
    case = CONTRACT["tail"]
    inputs = make(case, random, dtype=torch.bfloat16)
    first, other = (in_the_lane(case, inputs, s, 3)[:2] for s in (0, seed + 1))
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one, two)


FACTORS = "        mbarrier.init(k_full.index(i), count=2)\n"
ROUNDED = "    factors.store(gl.where(m_f, b_f * (1.0 / _MAX), 1.0))\n"
V_FACTORS = "scale_s.index(2 * stage + 1).store"
CLEAN = "_clean(v_s.index(stage).reshape([D, BN]), run_stop - slot, BN, D)"

# (old, new, what the lane says); None: the output is wrong
PLANTED: dict[str, tuple[str, str, str | None]] = {
    "factors not awaited": (FACTORS, FACTORS.replace("2", "1"), "more came|waits for|never"),
    "rounded Q not fenced": (ROUNDED + "    fence_async_shared()\n", ROUNDED, "no fence"),
    "factors of V in those of K": (V_FACTORS, V_FACTORS.replace(" + 1", ""), "never written"),
    "O does not follow r": ("_rows(b_o, b_a * b_c)", "_rows(b_o, b_a)", None),
    "weights not undone": ("(b_r * (1.0 / _WEIGHT))", "b_r", None),
    "tail of V not cleaned": (CLEAN, "pass", None),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, random: torch.Generator) -> None:
    old, new, says = PLANTED[fault]
    module = planted(hopper_fp8, old, new)
    case = Case((1900,), 20, 1920, heads=1, heads_cached=1)
    inputs = make(case, random, dtype=torch.bfloat16)
    # what grows along the keys
    inputs.cache.v_cache.mul_(torch.linspace(0.1, 2, case.slots)[None, :, None, None])
    cache = e4m3.quantised_cache(*inputs.cache[:2])
    arguments = inputs.query, cache, inputs.cache.cache_seqlens
    emulated = e4m3.block_causal_attention(*arguments)[0]

    def attend(seed: int) -> None:
        with GluonLane(seed).patched(module):
            out, _ = module.block_causal_attention(*arguments, programs=1)
        assert sqnr(out, emulated.double()) >= 28, "wrong"

    for seed in (0, 1):
        with pytest.raises(LaneFault if says else AssertionError, match=says or "wrong"):
            attend(seed)
