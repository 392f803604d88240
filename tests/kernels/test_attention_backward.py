"""Gradients of block_causal_attention in every lane, against autograd over logical tokens."""

from __future__ import annotations

import pytest
import torch

from sdvg_kernels import block_causal_attention
from sdvg_kernels.attention import KeyBias
from sdvg_kernels.testing import Lane, assert_within_budget, logical_attention
from tests.kernels.test_attention import CASES, KREA, Case, Inputs, make

NAMES = ("query", "k_cache", "v_cache")
MORE = {
    "a context, the newest block apart": Case((72, 60), 24, 96, block_size=12, window=36),
    "teacher forcing": Case((48, 48), 48, 48, block_size=12, sink=12, window=24),
    "a block sees itself alone": Case((48,), 48, 48, block_size=12, window=12),
    "head dim 128, grouped, wrapped": Case((97,), 22, 60, 5, 30, 6, 4, 2, 128, KREA),
}
ALL = CASES | MORE


def tokens(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers, rounded to the dtype of `like`, on its device."""
    return torch.randn(like.shape, generator=random).to(like)


def slots_of(case: Case, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots that hold a token, and which."""
    token = torch.arange(length)
    ring = case.slots - case.sink
    held = (token < case.sink) | (token >= length - ring)
    slot = torch.where(token < case.sink, token, case.sink + (token - case.sink) % ring)
    return slot[held], token[held]


def in_slots(
    case: Case, inputs: Inputs, gradients: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Gradients of query and caches from those of query, keys and values; unused slots get 0."""
    batch = len(case.lengths)
    caches = []
    for part in (gradients[1 : 1 + batch], gradients[1 + batch :]):
        cache = torch.zeros_like(inputs.cache.k_cache, dtype=dtype)
        for b, (gradient, length) in enumerate(zip(part, case.lengths, strict=True)):
            slot, token = slots_of(case, length)
            cache[b, slot] = gradient[token]
        caches.append(cache)
    return [gradients[0], *caches]


def truth(
    case: Case, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Gradients of query and caches by autograd over logical tokens, in `dtype`."""
    wide = [x.detach().to(dtype) for x in (inputs.query, *inputs.keys, *inputs.values)]
    wide = [x.requires_grad_() for x in wide]
    batch = len(inputs.keys)
    with torch.enable_grad():
        out, lse = logical_attention(
            wide[0], wide[1 : 1 + batch], wide[1 + batch :], slots=case.slots, **case.options
        )
    outside = (grad_out.to(dtype), grad_lse.to(dtype))
    found = torch.autograd.grad((out, lse), wide, outside, materialize_grads=True)
    return in_slots(case, inputs, list(found), dtype)


def by_hand(
    case: Case, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> list[torch.Tensor]:
    """The same in the inputs' dtype by FlashAttention-2's formula, as PyTorch's fused kernels do.

    It subtracts rowsum(dout out) where autograd has the row sum of p (dout V^T) itself: where the
    two cancel, as over a single key, this errs by a rounding of both and autograd does not.
    """
    bias = case.key_bias or KeyBias(0.0)
    scale = case.dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    found = [torch.zeros_like(x) for x in (inputs.query, *inputs.keys, *inputs.values)]
    batch, group = len(case.lengths), case.heads // case.heads_cached
    for b, length in enumerate(case.lengths):
        token = torch.arange(length)
        row = length - case.rows + torch.arange(case.rows)[:, None]
        size = case.block_size or case.rows
        begin = length - case.rows + torch.arange(case.rows)[:, None] // size * size
        end = (begin + size).clamp(max=length)
        kept = token >= torch.clamp(
            end - (case.window or 10**6), min=length - case.slots + case.sink
        )
        sees = (row >= 0) & (token < end) & (kept | (token < case.sink))
        biased = (token >= bias.start) & (token < (begin if bias.stop is None else bias.stop))
        sees, biased = sees.to(inputs.query.device), biased.to(inputs.query.device)
        for h in range(case.heads):
            query, grad = inputs.query[b, :, h], grad_out[b, :, h]
            key, value = inputs.keys[b][:, h // group], inputs.values[b][:, h // group]
            logits = torch.where(biased, query @ key.T * scale + bias.bias, query @ key.T * scale)
            weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
            weights = weights.masked_fill(~sees.any(1, keepdim=True), 0)
            delta = (grad * (weights @ value)).sum(1) - grad_lse[b, h].to(grad)
            grad_logits = weights * (grad @ value.T - delta[:, None])
            found[0][b, :, h] = grad_logits @ key * scale
            found[1 + b][:, h // group] += grad_logits.T @ query * scale
            found[1 + batch + b][:, h // group] += weights.T @ grad
    return in_slots(case, inputs, found, inputs.query.dtype)


def gradients(
    inputs: Inputs,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    lane: Lane,
    **options: object,
) -> tuple[torch.Tensor, ...]:
    """The op's gradients of query and caches."""
    given = [x.detach().requires_grad_() for x in (inputs.query, *inputs.cache[:2])]
    out, lse = block_causal_attention(
        *given,
        inputs.cache.cache_seqlens,
        **options,
        return_lse=True,
        implementation=lane.implementation,
    )
    return torch.autograd.grad((out, lse), given, (grad_out, grad_lse))


def check(case: Case, inputs: Inputs, lane: Lane, random: torch.Generator) -> None:
    """Assert that the op's gradients are within their budgets."""
    grad_out = tokens(inputs.query, random)
    batch, rows, heads, _ = inputs.query.shape
    grad_lse = torch.randn(batch, heads, rows, generator=random).to(lane.device)
    actual = gradients(inputs, grad_out, grad_lse, lane, **case.options)
    exact = truth(case, inputs, grad_out, grad_lse, torch.float64)
    plain = (
        truth(case, inputs, grad_out, grad_lse, inputs.query.dtype),
        by_hand(case, inputs, grad_out, grad_lse),
    )
    for i, name in enumerate(NAMES):
        # PyTorch's own two ways: what the worse one errs
        errors = [
            (way[i] - exact[i]).abs().max().item() if exact[i].numel() else 0 for way in plain
        ]
        worse = plain[errors.index(max(errors))][i]
        assert_within_budget(actual[i], worse, exact[i], f"gradient of {name}")


@pytest.mark.parametrize("name", ALL)
def test_equals_autograd_over_logical_tokens(
    name: str, lane: Lane, random: torch.Generator
) -> None:
    # slots that hold no token are NaN: their gradient is 0
    case = ALL[name]
    check(case, make(case, random, lane), lane, random)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sink, window, wrapped", "head dim 128, grouped, wrapped"])
def test_half_precision_is_within_twice_plain_pytorch(
    name: str, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = ALL[name]
    check(case, make(case, random, lane, dtype), lane, random)
