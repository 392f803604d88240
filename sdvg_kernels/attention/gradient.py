"""What autograd keeps of `block_causal_attention`, and what it does with it on the way back."""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx

from sdvg_kernels import _ops
from sdvg_kernels._check import message
from sdvg_kernels.attention import reference


def save(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keep the tensors and the options of `block_causal_attention_forward`."""
    query, k_cache, v_cache, cache_seqlens, *ctx.options = inputs
    ctx.save_for_backward(query, k_cache, v_cache, cache_seqlens, *output)


def gradients(
    ctx: FunctionCtx, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Return a gradient for each argument of `block_causal_attention_forward`, or None."""
    *mask, _, implementation = ctx.options
    need_query, *need_caches = ctx.needs_input_grad[:3]
    needed = (need_query, any(need_caches))
    found = torch.ops.sdvg_kernels.block_causal_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, *mask, *needed, implementation
    )
    wanted = zip(found, (need_query, *need_caches), strict=True)
    nothing = (None,) * (len(ctx.options) + 1)
    return (*(gradient if need else None for gradient, need in wanted), *nothing)


def run(
    implementation: str,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_size: int | None,
    sink: int,
    window: int | None,
    softmax_scale: float,
    bias: float | None,
    bias_start: int,
    bias_stop: int | None,
    need_query: bool,
    need_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, k_cache and v_cache ([0] where not needed)."""
    if implementation == "reference":
        backward = reference.block_causal_attention_backward
    else:
        from sdvg_kernels.attention.backward import block_causal_attention_backward as backward
    return backward(
        grad_out,
        grad_lse,
        query,
        k_cache,
        v_cache,
        cache_seqlens,
        out,
        lse,
        block_size=block_size,
        sink=sink,
        window=window,
        softmax_scale=softmax_scale,
        bias=bias,
        bias_start=bias_start,
        bias_stop=bias_stop,
        need_query=need_query,
        need_cache=need_cache,
    )


def _keep_nothing(ctx: FunctionCtx, inputs: tuple[object, ...], output: object) -> None:
    """Keep nothing: there is no second derivative."""


def _refuse(ctx: FunctionCtx, *_: torch.Tensor) -> tuple[None, ...]:
    """Raise: gradients of gradients would be lost, and nobody would know."""
    rule, got = "not be differentiated again", "a backward through it"
    remedy = "F.scaled_dot_product_attention has second derivatives"
    raise RuntimeError(message("block_causal_attention", "its gradient", rule, got, remedy))


_ops.differentiate("block_causal_attention_forward", save, gradients)
_ops.differentiate("block_causal_attention_backward", _keep_nothing, _refuse)
