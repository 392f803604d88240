"""Attention over an e4m3 cache: what is rounded, and that 25 dB are left on every kind of input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from sdvg_kernels import block_causal_attention, implementations
from sdvg_kernels.attention import KeyBias, api, e4m3
from sdvg_kernels.testing import (
    GluonLane,
    Lane,
    LaneFault,
    assert_within_budget,
    fails_alone,
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


# --- the op ---


def dequantised(cache: e4m3.E4m3Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [Bc, S, Hk, D] in float64."""
    key, value = cache.k.double(), cache.v.double().permute(0, 3, 1, 2).contiguous()
    return key * cache.k_scale[..., None], value * cache.v_scale[..., None]


OPTIONS = {
    "plain": {},
    "wrapped": {"sink": 4, "window": 40, "block_size": 12},
    "bias": {"key_bias": KREA, "block_size": 8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("turned", [True, False])
def test_the_reference_is_attention_over_dequantised_rows(
    name: str, turned: bool, dtype: torch.dtype, random: torch.Generator
) -> None:
    case = Case((90, 203), 24, 92, heads=4, heads_cached=2, **OPTIONS[name])
    inputs = make(case, random)
    query, lengths = inputs.query.to(dtype), inputs.cache.cache_seqlens
    cache = e4m3.quantised_cache(*inputs.cache[:2])
    given = cache.arguments()
    if not turned:
        given["v_cache"] = given["v_cache"].float().contiguous().to(torch.float8_e4m3fn)
    # without lse it takes another way
    order = torch.tensor([1, 0], dtype=torch.int32)
    for b in (None, order):
        index = slice(None) if b is None else b.long()
        options = {**case.options, "cache_batch_idx": b, "return_lse": True}
        arguments = query, lengths[index]
        out, lse = block_causal_attention(
            arguments[0], cache_seqlens=arguments[1], **given, **options
        )
        key, value = dequantised(cache)
        exact, exact_lse = block_causal_attention(
            query.double(), key, value, arguments[1], **options
        )
        plain = block_causal_attention(
            query, key.to(dtype), value.to(dtype), arguments[1], **options
        )
        assert out.dtype is dtype
        assert_within_budget(out, plain[0], exact)
        assert_within_budget(lse, plain[1], exact_lse, "lse")
    alone = block_causal_attention(
        query[:1], cache_seqlens=lengths[1:], **{n: x[1:] for n, x in given.items()}
    )
    key, value = (x[1:] for x in dequantised(cache))
    exact = block_causal_attention(query[:1].double(), key, value, lengths[1:])
    plain = block_causal_attention(query[:1], key.to(dtype), value.to(dtype), lengths[1:])
    assert_within_budget(alone, plain, exact)


@pytest.mark.parametrize("kind", INPUTS)
def test_the_emulation_is_the_reference_to_25_db(kind: str, random: torch.Generator) -> None:
    # it rounds the query and the weights too, which the reference does not
    x = INPUTS[kind](tokens(random, 64, 1024))
    factors = e4m3.balance(x.query, x.key)
    query, key = x.query.float() / factors, x.key.float() * factors
    cache = e4m3.quantised_cache(key, x.value.float())
    lengths = torch.tensor([1024], dtype=torch.int32)
    emulated, _ = e4m3.block_causal_attention(query, cache, lengths)
    served = block_causal_attention(query.double(), cache_seqlens=lengths, **cache.arguments())
    assert sqnr(emulated, served) >= 25
    assert sqnr(served, exactly(x)) >= 27


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse: bool, random: torch.Generator) -> None:
    x = tokens(random, 8, 40)
    cache = e4m3.quantised_cache(x.key, x.value)
    given = cache.arguments()
    lengths = torch.tensor([40], dtype=torch.int32)
    arguments = (x.query, given["k_cache"], given["v_cache"], lengths, None, 4, 4, 31, 0.125)
    arguments += (-1.0, 2, None, None, return_lse, "reference", cache.k_scale, cache.v_scale)
    ops = torch.ops.sdvg_kernels
    # opcheck's own comparison of arguments has no float8 arithmetic
    tests = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.block_causal_attention, arguments, test_utils=tests)
    out = {"out": torch.empty_like(x.query)}
    torch.library.opcheck(ops.block_causal_attention_out, arguments, out, test_utils=tests)


_E4M3 = torch.float8_e4m3fn
_QUERY, _ROWS = torch.zeros(2, 3, 4, 64), torch.zeros(2, 16, 2, 64).to(_E4M3)
_SCALE = torch.ones(2, 16, 2)
_GOOD = {
    "query": _QUERY,
    "k_cache": _ROWS,
    "v_cache": _ROWS,
    "cache_seqlens": torch.full((2,), 5, dtype=torch.int32),
    "k_scale": _SCALE,
    "v_scale": _SCALE,
}
_ONLY = "be given with float8_e4m3fn caches and only with them, got"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k_scale": None}, ValueError, f"k_scale must {_ONLY} none for torch.float8_e4m3fn"),
        ({"v_scale": None}, ValueError, f"v_scale must {_ONLY} none for torch.float8_e4m3fn"),
        (
            {"k_cache": _ROWS.float(), "v_cache": _ROWS.float()},
            ValueError,
            f"k_scale must {_ONLY} one for torch.float32",
        ),
        (
            {"v_cache": _ROWS.float()},
            TypeError,
            "v_cache must be float8_e4m3fn, as k_cache is, got torch.float32",
        ),
        (
            {"k_cache": _ROWS.half()},
            TypeError,
            "k_cache must have query's dtype or be float8_e4m3fn, got torch.float16",
        ),
        (
            {"k_scale": _SCALE[:, :3]},
            ValueError,
            "k_scale must be [Bc, S, Hk] of k_cache, contiguous, got [2, 3, 2]",
        ),
        (
            {"v_scale": torch.ones(2, 2, 16).transpose(1, 2)},
            ValueError,
            "v_scale must be [Bc, S, Hk] of k_cache, contiguous, got [2, 16, 2]",
        ),
        ({"v_scale": _SCALE.half()}, TypeError, "v_scale must be float32, got torch.float16"),
        (
            {"query": _QUERY.repeat_interleave(2, -1)[..., ::2]},
            ValueError,
            "query must be contiguous in the last dim, got another stride; call .contiguous()",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        block_causal_attention(**{**_GOOD, **change})
    assert str(caught.value) == f"block_causal_attention: {text}"


def test_the_kernel_takes_only_a_transposed_v() -> None:
    query = _QUERY.bfloat16()
    turned = torch.zeros(2, 2, 64, 16).to(_E4M3).permute(0, 3, 1, 2)
    api._check_hopper("hopper_fp8", query, _ROWS, turned, None)
    text = (
        r"v_cache must be v\.permute\(0, 3, 1, 2\) of a v \[Bc, Hk, D, S\], so that slots are "
        r"contiguous, for hopper_fp8, got strides \(2048, 128, 64, 1\)"
    )
    with pytest.raises(ValueError, match=text):
        api._check_hopper("hopper_fp8", query, _ROWS, _ROWS, None)
    with pytest.raises(ValueError, match="k_cache must be contiguous in the last dim"):
        api._check_hopper("hopper_fp8", query, turned, turned, None)
    with pytest.raises(ValueError, match="num_splits must be None for hopper_fp8"):
        api._check_hopper("hopper_fp8", query, _ROWS, turned, 2)
    odd = torch.zeros(2, 2, 64, 17).to(_E4M3).permute(0, 3, 1, 2)[:, :16]
    with pytest.raises(NotImplementedError, match="v_cache begins at, or has a stride of, no mult"):
        api._check_hopper("hopper_fp8", query, _ROWS, odd, None)


def test_slots_of_any_number_are_padded_for_tma(random: torch.Generator) -> None:
    cache = e4m3.quantised_cache(*torch.randn(2, 1, 21, 2, 64, generator=random))
    assert cache.v.shape == (1, 2, 64, 21)
    assert cache.v.stride() == (2 * 64 * 32, 64 * 32, 32, 1)


def test_eight_bits_are_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hopper_fp8" in implementations()["attention"]
    for device in ("cpu", "cuda"):
        for dtype in (*api.DTYPES, torch.float64):
            for is_e4m3 in (False, True):
                served = api._available(device, 64, dtype, is_e4m3)
                assert list(served).index("hopper_fp8") == list(served).index("hopper") + 1
                assert served["reference"] == ""
                assert served["triton"] or not is_e4m3
                assert served["hopper" if is_e4m3 else "hopper_fp8"]
    # no fake of the device is needed: what is asked of it comes first
    with torch._subclasses.FakeTensorMode():
        fake = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in _GOOD.items()
        }
        text = r"implementation must be 'hopper_fp8' or 'reference' for e4m3 caches on a GPU, got N"
        with pytest.raises(ValueError, match=text):
            block_causal_attention(**fake)
        out = block_causal_attention(**fake, implementation="reference")
        assert out.shape == _QUERY.shape


@pytest.mark.parametrize("implementation", ["triton", "hopper", "hopper_fp8"])
def test_what_cannot_run_says_why(implementation: str) -> None:
    why = {
        "triton": "the Triton kernel has no e4m3 caches: use the reference|TRITON_INTERPRET",
        "hopper": "it needs a Hopper GPU|TRITON_INTERPRET",
        "hopper_fp8": "it needs a Hopper GPU|TRITON_INTERPRET",
    }
    with pytest.raises(NotImplementedError, match=why[implementation]):
        block_causal_attention(**_GOOD, implementation=implementation)


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
    "O does not follow r": ("scale_rows(b_o, b_a * b_c)", "scale_rows(b_o, b_a)", None),
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


def test_out_is_written_and_rows_of_the_cache_are_chosen(random: torch.Generator) -> None:
    # the op's own way to the kernel, with slots that are padded, on a layer of a cache
    case = Case((50, 230), 70, 250, sink=3, window=160, block_size=35, heads=4, key_bias=KREA)
    inputs = make(case, random, dtype=torch.bfloat16)
    given = e4m3.quantised_cache(*inputs.cache[:2]).arguments()
    order = torch.tensor([1, 0], dtype=torch.int32)
    k_cache = torch.zeros(2, 3, *given["k_cache"].shape[1:]).to(torch.float8_e4m3fn)
    k_cache.view(torch.uint8)[:, 1] = given["k_cache"].view(torch.uint8)
    lengths = inputs.cache.cache_seqlens[order]
    # an out that TMA can write, and one that it cannot
    for scale, beside in ((-0.1, 0), (0.0, 3), (0.2, 3)):
        around = torch.full((2, 72, 4, 64 + beside), 7.0, dtype=torch.bfloat16)
        out = around[:, 1:71, :, beside:]
        settings = (order, case.block_size, case.sink, case.window, scale, *KREA, None, True)
        arguments = (k_cache[:, 1], given["v_cache"], lengths, *settings, "hopper_fp8")
        with GluonLane().patched(hopper_fp8):
            result, lse = api._run(
                inputs.query[order], *arguments, given["k_scale"], given["v_scale"], out
            )
        assert result is out
        exact, exact_lse = block_causal_attention(
            inputs.query[order].double(),
            cache_seqlens=lengths,
            **given,
            **{**case.options, "softmax_scale": scale},
            cache_batch_idx=order,
            return_lse=True,
        )
        assert sqnr(out, exact) >= 25
        torch.testing.assert_close(lse, exact_lse.float(), rtol=0, atol=0.2)
        out.fill_(7.0)
        assert (around == 7.0).all()


# --- GPU only ---


@pytest.fixture
def gpu() -> Lane:
    """The kernel where it runs."""
    if reason := api._available("cuda", 64, torch.bfloat16, True)["hopper_fp8"]:
        pytest.skip(reason)
    # a kernel that waits for ever would take all tests behind it along
    if reason := fails_alone("hopper_fp8"):
        pytest.fail(reason)
    return Lane("hopper_fp8", "cuda", "hopper_fp8")


def on_gpu(
    inputs: Inputs, case: Case
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The op's tensors, and (out, lse) of the emulation."""
    cache = e4m3.quantised_cache(*inputs.cache[:2])
    bias = case.key_bias or KeyBias(0.0)
    emulated = e4m3.block_causal_attention(
        inputs.query,
        cache,
        inputs.cache.cache_seqlens,
        block_size=case.block_size,
        sink=case.sink,
        window=case.window,
        bias=bias.bias if case.key_bias else None,
        bias_start=bias.start,
        bias_stop=bias.stop,
    )
    given = {"query": inputs.query, "cache_seqlens": inputs.cache.cache_seqlens}
    return given | cache.arguments(), *emulated


@pytest.mark.gpu
@pytest.mark.parametrize("dim", api.HEAD_DIMS)
@pytest.mark.parametrize("name", CONTRACT)
def test_on_the_gpu_it_rounds_as_the_emulation(
    name: str, dim: int, gpu: Lane, random: torch.Generator
) -> None:
    case = replace(CONTRACT[name], dim=dim)
    inputs = make(case, random, gpu, torch.bfloat16)
    given, emulated, emulated_lse = on_gpu(inputs, case)
    options = {**case.options, "return_lse": True, "implementation": "hopper_fp8"}
    out, lse = block_causal_attention(**given, **options)
    # its accumulators keep fewer bits than float32
    torch.testing.assert_close(lse, emulated_lse, rtol=0, atol=1e-2)
    exact = truth(case, inputs, torch.float64)[0]
    assert sqnr(out, exact) >= min(25, sqnr(emulated, exact) - 0.5)
    assert not out.transpose(1, 2)[emulated_lse == -torch.inf].any()
    again, _ = block_causal_attention(**given, **options)
    assert torch.equal(out, again)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1024, 8200])
@pytest.mark.parametrize("kind", INPUTS)
def test_on_the_gpu_25_db_are_left(
    kind: str, slots: int, gpu: Lane, random: torch.Generator
) -> None:
    factors = e4m3.balance(*INPUTS[kind](tokens(random, 64, 512))[:2])
    x = INPUTS[kind](tokens(random, 200, slots))
    # a power of two: bfloat16 of the balanced query keeps its bits
    factors = factors.log2().round().exp2()
    query, key = (x.query.float() / factors).bfloat16(), x.key.float() * factors
    cache = e4m3.quantised_cache(key.cuda(), x.value.cuda())
    lengths = torch.tensor([slots], dtype=torch.int32, device="cuda")
    out = block_causal_attention(
        query.cuda(), cache_seqlens=lengths, **cache.arguments(), implementation="hopper_fp8"
    )
    assert sqnr(out.cpu(), exactly(x)) >= 25


@pytest.mark.gpu
def test_a_graph_replays_on_new_lengths(gpu: Lane, random: torch.Generator) -> None:
    long = Case((1500,), 300, 704, sink=60, window=400, block_size=100)
    short = replace(long, lengths=(610,))
    fixed, *_ = on_gpu(make(long, random, gpu, torch.bfloat16), long)

    def run() -> torch.Tensor:
        return block_causal_attention(**fixed, **long.options, implementation="hopper_fp8")

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
        given, _, emulated_lse = on_gpu(inputs, case)
        for name, tensor in given.items():
            fixed[name].copy_(tensor)
        graph.replay()
        exact = truth(case, inputs, torch.float64)[0]
        assert sqnr(out, exact) >= 25
        assert not out.transpose(1, 2)[emulated_lse == -torch.inf].any()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_is_read_back_from_the_gpu(gpu: Lane, random: torch.Generator) -> None:
    case = CONTRACT["blocks, wrapped"]
    given, *_ = on_gpu(make(case, random, gpu, torch.bfloat16), case)
    block_causal_attention(**given, **case.options, implementation="hopper_fp8")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for implementation in ("hopper_fp8", "reference"):
            block_causal_attention(**given, **case.options, implementation=implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
