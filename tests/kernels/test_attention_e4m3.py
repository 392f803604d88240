"""Attention over an e4m3 cache: what is rounded, and that 25 dB are left on every kind of input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from sdvg_kernels.attention import KeyBias, e4m3
from sdvg_kernels.testing import assert_within_budget, logical_attention, ring_cache

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
