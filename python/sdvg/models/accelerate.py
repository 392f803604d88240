"""The fused ops in diffusers' Wan blocks: the same numbers to rounding, in fewer passes.

`sdvg.accelerate` is `accelerate` here; what it does to one model is `fuse`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
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
_LOG = logging.getLogger("sdvg")
# the largest finite float8_e4m3fn
_E4M3_MAX = 448.0


def accelerate(model: _Model, *, graphs: bool = False, fp8: bool = False) -> _Model:
    """Run a `CausalWan`, a pair of them, or an `SDVGPipeline` on the fused ops; return it.

    The output is the same to rounding.

    Args:
        model: what to accelerate, in place.
        graphs: replay one CUDA graph for each kind of pass (sequences and blocks in it) instead of
            launching a forward's kernels one by one. Where that cannot be, a warning says why.
        fp8: compute the blocks' linear layers in e4m3, with a scale for each row of the input and
            of the weight (for the target: lossy, and half the weights' memory).

    Raises TypeError for anything else.
    """
    if hasattr(model, "accelerate"):
        model.accelerate(graphs=graphs, fp8=fp8)
    elif hasattr(model, "drafter") and hasattr(model, "target"):
        model.drafter.accelerate(graphs=graphs, fp8=fp8)
        model.target.accelerate(graphs=graphs, fp8=fp8)
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
    model.rope_table = RopeTable(model)
    processors = dict(transformer.attn_processors)
    for layer in range(len(blocks)):
        processors[f"blocks.{layer}.attn1.processor"] = _FusedSelfAttention(model, layer)
    transformer.set_attn_processor(processors)
    transformer.rope = _NoRope()
    stream = _Stream()
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.forward = partial(_forward, block, following, stream)


def _fuse(attn: nn.Module) -> None:
    """Fuse the projections of self-attention without a second copy of their weights."""
    if getattr(attn, "fused_projections", False):
        return
    attn.fuse_projections()
    weights, biases = attn.to_qkv.weight.data.chunk(3), attn.to_qkv.bias.data.chunk(3)
    for linear, weight, bias in zip(
        (attn.to_q, attn.to_k, attn.to_v), weights, biases, strict=True
    ):
        linear.weight.data, linear.bias.data = weight, bias
    # files keep the names that the stock model reads
    attn.register_state_dict_post_hook(_separate)
    attn.register_load_state_dict_pre_hook(_join)


def _separate(attn: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    if hasattr(attn, "to_q"):
        for part in ("weight", "bias"):
            state.pop(f"{prefix}to_qkv.{part}", None)


def _join(attn: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for part in ("weight", "bias"):
        separate = [state.get(f"{prefix}to_{name}.{part}") for name in "qkv"]
        if all(value is not None for value in separate):
            state.setdefault(f"{prefix}to_qkv.{part}", torch.cat(separate))


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
        heads = (attn.heads, -1)
        query, key, value = (
            part.unflatten(2, heads) for part in attn.to_qkv(hidden_states).chunk(3, dim=-1)
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


class Graphs:
    """Replays `CausalWan.forward` from CUDA graphs, one for each shape of a pass.

    What changes between passes of one shape lies in buffers that stay: the latents, the timestep's
    embedding, the sequences' indices, and in the model itself the cache with its lengths and the
    prompt's keys. Positions are read from the lengths on the device.
    """

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self._graphs: dict[tuple[object, ...], tuple[list[Tensor], Callable[[], Tensor]]] = {}
        # the cache and the table that they were captured with
        self._stamp: tuple[Tensor, ...] = ()
        # of the weights and of the prompt's keys
        self._addresses: tuple[int, ...] = ()
        self._pool: object = None
        # one for all captures: freed memory of a pool serves only the stream that it came from
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> None:
        """Begin a video: drop what was captured if weights or the prompt's keys lie elsewhere."""
        transformer = self.model.transformer
        tensors = [*transformer.parameters(), *transformer.buffers()]
        for block in transformer.blocks:
            tensors += [block.attn2.processor.key, block.attn2.processor.value]
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if self._addresses != addresses:
            self._drop()
            self._addresses = addresses

    def _drop(self) -> None:
        # a pool whose graphs are gone takes no new ones
        self._graphs, self._stamp, self._pool = {}, (), None

    def __call__(
        self,
        start_frame: int,
        hidden: Tensor,
        embedded: tuple[Tensor, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """Return what `model.forward` does; the next call overwrites it."""
        reason = self._reason(hidden)
        if reason:
            _warn_once(reason)
            return self.model.forward(start_frame, hidden, embedded, rows)
        table = self.model.rope_table.reserve(start_frame + hidden.shape[2])
        stamp = (self.model.cache.k, table)
        if len(self._stamp) != 2 or any(
            a is not b for a, b in zip(self._stamp, stamp, strict=True)
        ):
            # the graphs hold the addresses of tensors that are gone
            self._drop()
            self._stamp = stamp
        inputs = [hidden, *embedded] + ([] if rows is None else [rows])
        key = (tuple(hidden.shape), len(inputs))
        if key not in self._graphs:
            buffers = [tensor.clone() for tensor in inputs]

            def forward() -> Tensor:
                latents, embedding, modulation, *index = buffers
                index = index[0] if index else None
                return self.model.forward(start_frame, latents, (embedding, modulation), index)

            self._graphs[key] = buffers, self._capture(forward)
        buffers, replay = self._graphs[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        return replay()

    def _reason(self, hidden: Tensor) -> str:
        """Return why a pass cannot be captured, or ""."""
        if hidden.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the model is on {hidden.device.type}"
        if hasattr(self.model.transformer, "_hf_hook"):
            return "CUDA graphs need weights that stay on the GPU, and accelerate offloads them"
        return ""

    def _capture(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Run `forward` until nothing is made for the first time, capture it, return the replay."""
        device = self.model.device
        self._stream = stream = self._stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            out = forward()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("accelerate: passes are launched one by one: %s", reason)


class Fp8Linear(nn.Module):
    """`nn.Linear` in e4m3: `x` and the weight are scaled row by row to the format's range.

    Args:
        linear: the layer that it stands for; its bias stays as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = _rowwise(linear.weight.data)
        self.register_buffer("weight", weight)
        # [1, out]
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [..., in] @ weight.T + bias` in x's dtype."""
        rows, scale = _rowwise(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16
        )
        out = out.to(x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.unflatten(0, x.shape[:-1])


def _rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x [N, K]` in e4m3 and its scales `[N, 1]` float32."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(2.0**-100) / _E4M3_MAX
    return (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantise(transformer: nn.Module) -> int:
    """Put the blocks' linear layers, fused already, into e4m3; return how many.

    The first and the last layers, the embeddings and the modulation stay as they are, and so do
    widths that the product cannot take (multiples of 16 it can).
    """
    count = 0
    for block in transformer.blocks:
        if not hasattr(block.attn1, "to_q"):
            continue
        for part in ("to_q", "to_k", "to_v"):
            # views of the fused weight, which would keep it alive
            delattr(block.attn1, part)
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Linear):
                    continue
                if child.in_features % 16 == 0 and child.out_features % 16 == 0:
                    setattr(module, name, Fp8Linear(child))
                    count += 1
    return count
