"""The fused ops in diffusers' Wan blocks: the same numbers to rounding, in fewer passes.

`sdvg.accelerate` is `accelerate` here; what it does to one model is `fuse`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sdvg.models.linear import fuse_projections, fused_here, projected
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


def accelerate(model: _Model, *, graphs: bool = False, fp8: bool = False) -> _Model:
    """Run a `CausalWan`, a pair of them, or an `SDVGPipeline` on the fused ops; return it.

    The output is the same to rounding.

    Args:
        model: what to accelerate, in place.
        graphs: replay one CUDA graph for each kind of pass (sequences and blocks in it) instead of
            launching a forward's kernels one by one. Where that cannot be, a warning says why.
        fp8: compute the blocks' linear layers in e4m3, with a scale for each row of the input and
            of the weight: lossy, and half the weights' memory. Of a pair or a pipeline only the
            target's: a drafter's products are small, and its drafts are judged. It stays.

    Raises:
        TypeError: it is anything else.
        NotImplementedError: `fp8` on a GPU without e4m3 products (before compute capability 8.9).
        ValueError: weights that are offloaded layer by layer.
    """
    if hasattr(model, "accelerate"):
        model.accelerate(graphs=graphs, fp8=fp8)
    elif hasattr(model, "drafter") and hasattr(model, "target"):
        model.drafter.accelerate(graphs=graphs)
        model.target.accelerate(graphs=graphs, fp8=fp8)
        decoder = getattr(model, "decoder", None)
        if hasattr(decoder, "accelerate"):
            decoder.accelerate(graphs=graphs)
    else:
        raise TypeError(
            "accelerate: model must be a CausalWan, a pair or an SDVGPipeline, "
            f"got {type(model).__name__}"
        )
    return model


def fuse(model: CausalWan) -> None:
    """Run `model`'s blocks on the fused ops; its weights, names and interface stay.

    - Query, key and value are one product; so are key and value of the prompt.
    - QK-norm, RoPE and the write into the ring are one kernel (`norm_rope_stage_`).
    - Modulation, gates, residuals and norms are one pass each, across the border of two blocks too.

    Calling it again changes nothing.
    """
    transformer = model.transformer
    if isinstance(transformer.rope, _NoRope):
        return
    blocks = list(transformer.blocks)
    for block in blocks:
        for attn in (block.attn1, block.attn2):
            fuse_projections(attn)
    model.rope_table = RopeTable(model)
    processors = dict(transformer.attn_processors)
    for layer in range(len(blocks)):
        processors[f"blocks.{layer}.attn1.processor"] = _FusedSelfAttention(model, layer)
    transformer.set_attn_processor(processors)
    transformer.rope = _NoRope()
    stream = _Stream()
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.forward = partial(_forward, block, following, stream)


def unfuse_blocks(transformer: nn.Module) -> None:
    """Give the blocks of `transformer` their stock forwards; fused projections serve these too."""
    for block in transformer.blocks:
        forward = block.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _forward:
            del block.forward


def unfuse_projections(transformer: nn.Module) -> None:
    """Give each projection its own weights again; what is in e4m3 stays so."""
    for block in transformer.blocks:
        for attn in (block.attn1, block.attn2):
            fused = getattr(attn, "to_kv" if attn.is_cross_attention else "to_qkv", None)
            if fused_here(attn) and isinstance(fused, nn.Linear):
                attn.unfuse_projections()


class _NoRope(nn.Module):
    """Stands where the rotary embedding was: the fused op has a table of its own."""

    def forward(self, hidden_states: Tensor) -> None:
        return None


class RopeTable:
    """The cosines and sines of all positions so far, made longer when a video outgrows them."""

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self.rows: Tensor | None = None

    def reserve(self, positions: int) -> Tensor:
        """Return the table `[P, D]` with at least the first `positions`, 1024 of them or more."""
        device, dtype = self.model.device, torch.promote_types(self.model.dtype, torch.float32)
        rows = self.rows
        if rows is None or len(rows) < positions or rows.device != device or rows.dtype != dtype:
            head_dim = self.model.transformer.config.attention_head_dim
            count = max(1024, 1 << (positions - 1).bit_length())
            self.rows = rows = rope_table(count, head_dim, dtype=dtype, device=device)
        return rows


class _FusedSelfAttention:
    """One layer's self-attention: one product, one kernel up to the cache, one attention."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, model: CausalWan, layer: int) -> None:
        self.model, self.layer = model, layer

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        cache, running = self.model.cache, self.model.running
        query, key, value = (
            part.unflatten(2, (attn.heads, -1)) for part in projected(attn, hidden_states)
        )
        grid = self.model.grid(hidden_states.shape[1])
        table = self.model.rope_table.reserve(max(running.start_frame + grid[0], *grid))
        query = norm_rope_stage_(
            query, key, value, cache.k[self.layer], cache.v[self.layer], cache.lengths,
            table, grid,
            query_weight=attn.norm_q.weight, key_weight=attn.norm_k.weight, eps=attn.norm_q.eps,
            sink=cache.sink, cache_batch_idx=running.rows,
        )  # fmt: skip
        out = cache.attend(self.layer, query, running.seqlens, running.rows, self.model.key_bias)
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
