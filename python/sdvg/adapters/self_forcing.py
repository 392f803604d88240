"""Self-Forcing's cache protocol on the ring ops: the same output, no clone, no roll, no wait.

The original repository (arXiv 2506.08009) gives each layer a dict `k`, `v` `[B, S, H, D]` with
`global_end_index` and `local_end_index`, and calls self-attention with the first token's position
`current_start`. A full cache is shifted left by clone and copy, and the indices are read back from
the device in every layer. Here a token's slot follows from its position alone: nothing is shifted
and nothing is read back. The attended keys are the same, in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sdvg_kernels import block_causal_attention, norm_rope_stage_

_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim", "local_attn_size")
_INPUTS = ("x", "grid_sizes", "freqs", "kv_cache", "current_start")


def patch(pipeline: object) -> int:
    """Run the cached self-attention of `pipeline` on the ring ops; return how many layers.

    Found are the modules, at any depth, that are shaped like Self-Forcing's
    `CausalWanSelfAttention`: `forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache,
    current_start, cache_start)`. Their caches stay the pipeline's own dicts; indices may be ints or
    tensors. A call without `kv_cache` (training) goes to the original. Patching again changes
    nothing.

    Args:
        pipeline: an `nn.Module`, or an object with modules among its attributes.

    Raises:
        ValueError: nothing in `pipeline` has that shape.
    """
    layers = list(_layers(pipeline))
    if not layers:
        raise ValueError(
            "patch: pipeline must hold self-attention of Self-Forcing's shape "
            f"(forward with {', '.join(_INPUTS)}), got {type(pipeline).__name__} with none"
        )
    shared = _Shared()
    for layer in layers:
        if not _patched(layer):
            layer.forward = partial(_forward, layer, shared, layer.forward)
    return len(layers)


def unpatch(pipeline: object) -> int:
    """Give `pipeline` its own self-attention back; return how many layers had been patched.

    A cache that was filled while patched is a ring: begin a new video, with a new cache.
    """
    layers = [layer for layer in _layers(pipeline) if _patched(layer)]
    for layer in layers:
        del layer.forward
    return len(layers)


def _layers(pipeline: object) -> Iterator[nn.Module]:
    if isinstance(pipeline, nn.Module):
        roots = [pipeline]
    else:
        values = vars(pipeline).values() if hasattr(pipeline, "__dict__") else ()
        roots = [value for value in values if isinstance(value, nn.Module)]
    seen: set[int] = set()
    for root in roots:
        for module in root.modules():
            if id(module) not in seen and all(hasattr(module, part) for part in _PARTS):
                seen.add(id(module))
                inputs = inspect.signature(type(module).forward).parameters
                if all(name in inputs for name in _INPUTS):
                    yield module


def _patched(layer: nn.Module) -> bool:
    own = vars(layer).get("forward")
    return isinstance(own, partial) and own.func is _forward


class _Shared:
    """What the layers of one forward have in common, found once: they all get the same objects."""

    def __init__(self) -> None:
        self._grid: tuple[Tensor, tuple[int, int, int]] | None = None
        self._freqs: tuple[Tensor, tuple[object, ...], Tensor] | None = None
        self._lengths: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def grid(self, sizes: Tensor) -> tuple[int, int, int]:
        """Return (frames, height, width); the pipeline makes `grid_sizes [B, 3]` on the host."""
        if self._grid is None or self._grid[0] is not sizes:
            rows = sizes.tolist()
            if any(row != rows[0] for row in rows):
                raise ValueError(f"patch: grid_sizes must be the same in a batch, got {rows}")
            self._grid = sizes, tuple(rows[0])
        return self._grid[1]

    def table(self, freqs: Tensor, like: Tensor) -> Tensor:
        """Return `freqs [P, D / 2]`, complex, as the table `[P, D]` of cosines, then sines."""
        wide = torch.promote_types(like.dtype, torch.float32)
        known = self._freqs
        if known is None or known[0] is not freqs or known[1] != (like.device, wide):
            table = torch.cat((freqs.real, freqs.imag), dim=1).to(like.device, wide)
            self._freqs = known = freqs, (like.device, wide), table.contiguous()
        return known[2]

    def lengths(self, start: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return int32 `[B]` tokens before this pass, and with it."""
        key = (start, tokens, len(like), like.device)
        if self._lengths is None or self._lengths[0] != key:
            before = torch.full((len(like),), start, dtype=torch.int32, device=like.device)
            self._lengths = key, before, before + tokens
        return self._lengths[1:]


def _forward(
    layer: nn.Module,
    shared: _Shared,
    original: object,
    x: Tensor,
    seq_lens: Tensor,
    grid_sizes: Tensor,
    freqs: Tensor,
    block_mask: object,
    kv_cache: dict[str, object] | None = None,
    current_start: int = 0,
    cache_start: int | None = None,
) -> Tensor:
    """What `CausalWanSelfAttention.forward` gives for a pass over the newest tokens."""
    if kv_cache is None:
        return original(
            x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start
        )
    k_cache, v_cache = kv_cache["k"], kv_cache["v"]
    grid = shared.grid(grid_sizes)
    frame = grid[1] * grid[2]
    start, tokens, slots = int(current_start), x.shape[1], k_cache.shape[1]
    sink = getattr(layer, "sink_size", 0) * frame
    if layer.local_attn_size == -1 and start + tokens > slots:
        raise ValueError(
            f"patch: a video without local attention must end within its cache of {slots} tokens, "
            f"got {start + tokens}; give the model a local_attn_size"
        )
    # all that the cache holds is seen, but no more than the model may attend to
    seen = min(slots, getattr(layer, "max_attention_size", slots))
    if seen < slots and sink:
        raise ValueError(
            f"patch: a cache with a sink must hold no more than is seen, {seen} tokens, got {slots}"
        )
    heads = (layer.num_heads, layer.head_dim)
    query, key, value = (
        project(x).unflatten(2, heads).to(k_cache.dtype) for project in (layer.q, layer.k, layer.v)
    )
    before, seqlens = shared.lengths(start, tokens, x)
    weights = {
        "query_weight": getattr(layer.norm_q, "weight", None),
        "key_weight": getattr(layer.norm_k, "weight", None),
        "eps": getattr(layer.norm_q, "eps", 1e-6),
    }
    query = norm_rope_stage_(
        query, key, value, k_cache, v_cache, before, shared.table(freqs, query), grid,
        start_frame=start // frame, sink=sink, **weights,
    )  # fmt: skip
    out = block_causal_attention(query, k_cache, v_cache, seqlens, sink=sink, window=seen - sink)
    for name, end in (
        ("global_end_index", start + tokens),
        ("local_end_index", min(start + tokens, slots)),
    ):
        if isinstance(kv_cache[name], Tensor):
            kv_cache[name].fill_(end)
        else:
            kv_cache[name] = end
    return layer.o(out.flatten(2).to(x.dtype))
