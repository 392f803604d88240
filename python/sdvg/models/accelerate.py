"""The fused ops in diffusers' Wan blocks: the same numbers to rounding, in fewer passes.

`sdvg.accelerate` is `accelerate` here; what it does to one model is `fuse`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sdvg_kernels import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    norm_rope_stage_,
    rope_table,
)

if TYPE_CHECKING:
    from sdvg.models.wan import CausalWan

_Model = TypeVar("_Model")


def accelerate(model: _Model) -> _Model:
    """Run a `CausalWan`, a pair of them, or an `SDVGPipeline` on the fused ops; return it.

    The output is the same to rounding. Raises TypeError for anything else.
    """
    if hasattr(model, "accelerate"):
        model.accelerate()
    elif hasattr(model, "drafter") and hasattr(model, "target"):
        model.drafter.accelerate()
        model.target.accelerate()
    else:
        raise TypeError(
            "accelerate: model must be a CausalWan, a pair or an SDVGPipeline, "
            f"got {type(model).__name__}"
        )
    return model


def fuse(model: CausalWan) -> None:
    """Run `model`'s blocks on the fused ops; its weights, names and interface stay.

    - Query, key and value are one product, whose weight the three projections become views of.
    - QK-norm, RoPE and the write into the ring are one kernel (`norm_rope_stage_`).
    - Modulation, gates, residuals and norms are one pass each, across the border of two blocks too.

    Calling it again changes nothing.
    """
    transformer = model.transformer
    if isinstance(transformer.rope, _NoRope):
        return
    blocks = list(transformer.blocks)
    for block in blocks:
        _fuse(block.attn1)
    table = _Table(model)
    processors = dict(transformer.attn_processors)
    for layer in range(len(blocks)):
        processors[f"blocks.{layer}.attn1.processor"] = _FusedSelfAttention(model, layer, table)
    transformer.set_attn_processor(processors)
    transformer.rope = _NoRope()
    stream = _Stream()
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.forward = partial(_forward, block, following, stream)


def _fuse(attn: nn.Module) -> None:
    """Fuse the projections of self-attention without a second copy of their weights."""
    attn.fuse_projections()
    weights, biases = attn.to_qkv.weight.data.chunk(3), attn.to_qkv.bias.data.chunk(3)
    for linear, weight, bias in zip(
        (attn.to_q, attn.to_k, attn.to_v), weights, biases, strict=True
    ):
        linear.weight.data, linear.bias.data = weight, bias


class _NoRope(nn.Module):
    """Stands where the rotary embedding was: the fused op has a table of its own."""

    def forward(self, hidden_states: Tensor) -> None:
        return None


class _Table:
    """The cosines and sines of all positions so far, made longer when a video outgrows them."""

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self.rows: Tensor | None = None

    def get(self, device: torch.device, dtype: torch.dtype, grid: tuple[int, int, int]) -> Tensor:
        """Return the table `[P, D]` with every position of the pass that is running."""
        needed = max(self.model.running.start_frame + grid[0], *grid)
        wide = torch.promote_types(dtype, torch.float32)
        rows = self.rows
        if rows is None or len(rows) < needed or rows.device != device or rows.dtype != wide:
            head_dim = self.model.transformer.config.attention_head_dim
            positions = max(1024, 1 << (needed - 1).bit_length())
            self.rows = rows = rope_table(positions, head_dim, dtype=wide, device=device)
        return rows


class _FusedSelfAttention:
    """One layer's self-attention: one product, one kernel up to the cache, one attention."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, model: CausalWan, layer: int, table: _Table) -> None:
        self.model, self.layer, self.table = model, layer, table

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        cache, running = self.model.cache, self.model.running
        heads = (attn.heads, -1)
        query, key, value = (
            part.unflatten(2, heads) for part in attn.to_qkv(hidden_states).chunk(3, dim=-1)
        )
        grid = self.model.grid(hidden_states.shape[1])
        query = norm_rope_stage_(
            query, key, value, cache.k[self.layer], cache.v[self.layer], cache.lengths,
            self.table.get(query.device, query.dtype, grid), grid,
            query_weight=attn.norm_q.weight, key_weight=attn.norm_k.weight, eps=attn.norm_q.eps,
            sink=cache.sink, cache_batch_idx=running.rows,
        )  # fmt: skip
        out = cache.attend(self.layer, query, running.seqlens, running.rows)
        return attn.to_out[0](out.flatten(2))


class _Stream:
    """The residual stream at the border of two blocks, and the next block's norm of it."""

    hidden: Tensor | None = None
    normed: Tensor | None = None

    def take(self, hidden: Tensor) -> Tensor | None:
        """Return the norm of `hidden` if the block before has made it, and let go of both."""
        normed = self.normed if self.hidden is hidden else None
        self.hidden = self.normed = None
        return normed


def _forward(
    block: nn.Module,
    following: nn.Module | None,
    stream: _Stream,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: None,
) -> Tensor:
    """What `WanTransformerBlock.forward` does, each elementwise chain in one pass."""
    # [B, F, 6, C]
    rows = temb if temb.dim() == 4 else temb[:, None]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _modulation(block, rows)
    normed = stream.take(hidden_states)
    if normed is None:
        normed = modulated_layer_norm(hidden_states, shift, scale, eps=block.norm1.eps)
    branch = block.attn1(normed, None, None, rotary_emb)
    if isinstance(block.norm2, nn.Identity):
        hidden = normed = gated_residual(hidden_states, branch, gate)
    else:
        weight, bias, eps = block.norm2.weight, block.norm2.bias, block.norm2.eps
        hidden, normed = gated_residual_layer_norm(
            hidden_states, branch, gate, weight=weight, bias=bias, eps=eps
        )
    branch = block.attn2(normed, encoder_hidden_states, None, None)
    hidden, normed = gated_residual_layer_norm(
        hidden, branch, None, ffn_shift, ffn_scale, eps=block.norm3.eps
    )
    branch = block.ffn(normed)
    if following is None:
        return gated_residual(hidden, branch, ffn_gate)
    shift, scale, *_ = _modulation(following, rows)
    stream.hidden, stream.normed = gated_residual_layer_norm(
        hidden, branch, ffn_gate, shift, scale, eps=following.norm1.eps
    )
    return stream.hidden


def _modulation(block: nn.Module, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the six modulations of a block as (rows `[B, F, C]`, table `[C]`), never added."""
    return list(zip(rows.unbind(2), block.scale_shift_table[0], strict=True))
