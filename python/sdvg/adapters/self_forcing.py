"""Self-Forcing's cache protocol on the ring ops: the same output, no clone, no roll, no wait.

The original repository (arXiv 2506.08009) gives each layer a dict `k`, `v` `[B, S, H, D]` with
`global_end_index` and `local_end_index`, and calls self-attention with the first token's position
`current_start`. A full cache is shifted left by clone and copy, and the indices are read back from
the device in every layer. Here a token's slot follows from its position alone: nothing is shifted
and nothing is read back. The attended keys are the same, in another order.

LongLive defers the cache writes to the end of a forward; here they are made in place, and there is
nothing left to apply. Krea's pass that rebuilds the cache comes with a block mask and fills slots
in their order, as a ring that has not wrapped has them: it stays the original's.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
from torch import Tensor, nn

from sdvg_kernels import KeyBias, block_causal_attention, dense_attention, norm_rope_stage_

# what is understood; other arguments must have their defaults
_KNOWN = frozenset(
    "x seq_lens grid_sizes freqs block_mask kv_cache current_start cache_start "
    "kv_cache_attention_bias".split()
)
_KNOWN_CROSS = frozenset(("x", "context", "context_lens", "crossattn_cache"))


class Shared:
    """What the layers of one forward have in common, found once: they all get the same objects."""

    def __init__(self) -> None:
        self._grid: tuple[Tensor, tuple[int, int, int]] | None = None
        self._freqs: tuple[Tensor, tuple[object, ...], Tensor] | None = None
        self._lengths: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        # a copy finds its own
        return Shared, ()

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


@torch.compiler.disable
def self_attention(
    layer: nn.Module, shared: Shared, defers: bool, *args: object, **kwargs: object
) -> object:
    """Return what the cached `layer.forward` gives for a pass over the newest tokens.

    `defers`: the original returns its cache writes beside the output, and so does this: an update
    that says where the cache ends, for nobody to apply. Without `kv_cache` it is the original.
    """
    call = _call(layer, args, kwargs, _KNOWN)
    if call is None:
        raise ValueError(
            f"patch: {type(layer).__name__} must be called with {', '.join(sorted(_KNOWN))} alone, "
            f"got {', '.join(_others(layer, args, kwargs, _KNOWN))} too; unpatch for such calls"
        )
    kv_cache = call["kv_cache"]
    if kv_cache is None:
        return type(layer).forward(layer, *args, **kwargs)
    x, k_cache, v_cache = call["x"], kv_cache["k"], kv_cache["v"]
    grid = shared.grid(call["grid_sizes"])
    frame = grid[1] * grid[2]
    start, tokens, slots = int(call["current_start"]), x.shape[1], k_cache.shape[1]
    end, sink = start + tokens, getattr(layer, "sink_size", 0) * frame
    if call.get("block_mask") is not None and not defers:
        _require_order("a pass with a block_mask", end, slots)
        return type(layer).forward(layer, *args, **kwargs)
    if layer.local_attn_size == -1 and end > slots:
        raise ValueError(
            f"patch: a video without local attention must end within its cache of {slots} tokens, "
            f"got {end}; give the model a local_attn_size"
        )
    # all that the cache holds is seen, but no more than the model may attend to
    seen = min(slots, getattr(layer, "max_attention_size", slots))
    if seen < slots and sink:
        raise ValueError(
            f"patch: a cache with a sink must hold no more than is seen, {seen} tokens, got {slots}"
        )
    if defers and start == 0 and tokens < sink:
        # the original attends to sink slots that nobody has written yet
        raise ValueError(
            f"patch: a block must cover the sink of {sink} tokens where cache writes are deferred, "
            f"got {tokens}"
        )
    if _learns(layer, x):
        raise RuntimeError(
            "patch: a pass with kv_cache must run without gradients, got weights or x that require "
            "them; use torch.no_grad(), or unpatch to train"
        )
    weights = [getattr(norm, "weight", None) for norm in (layer.norm_q, layer.norm_k)]
    query, key, value = (project(x) for project in (layer.q, layer.k, layer.v))
    if not all(isinstance(weight, Tensor) and weight.device == x.device for weight in weights):
        # no weight, or one that an offloading hook brings when the norm is called
        query, key, weights = layer.norm_q(query), layer.norm_k(key), [None, None]
    heads = (layer.num_heads, layer.head_dim)
    query, key, value = (part.unflatten(2, heads).to(k_cache.dtype) for part in (query, key, value))
    before, seqlens = shared.lengths(start, tokens, x)
    query = norm_rope_stage_(
        query, key, value, k_cache, v_cache, before, shared.table(call["freqs"], query), grid,
        query_weight=weights[0], key_weight=weights[1], eps=getattr(layer.norm_q, "eps", 1e-6),
        start_frame=start // frame, sink=sink,
    )  # fmt: skip
    out = block_causal_attention(
        query, k_cache, v_cache, seqlens, sink=sink, window=seen - sink,
        key_bias=_key_bias(call.get("kv_cache_attention_bias", 1.0), frame, end, slots),
    )  # fmt: skip
    for name, index in (("global_end_index", end), ("local_end_index", min(end, slots))):
        if isinstance(kv_cache[name], Tensor):
            kv_cache[name].fill_(index)
        else:
            kv_cache[name] = index
    out = layer.o(out.flatten(2).to(x.dtype))
    return (out, (end, min(end, slots))) if defers else out


@torch.compiler.disable
def cross_attention(layer: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """Return what the `layer.forward` gives with a `crossattn_cache`: K and V are computed once.

    Calls with text lengths, without a cache, or with gradients go to the original.
    """
    call = _call(layer, args, kwargs, _KNOWN_CROSS)
    cache = call and call["crossattn_cache"]
    x = call and call["x"]
    if cache is None or call["context_lens"] is not None or _learns(layer, x):
        return type(layer).forward(layer, *args, **kwargs)
    heads = (layer.num_heads, layer.head_dim)
    if not cache["is_init"]:
        text = call["context"]
        cache["k"] = layer.norm_k(layer.k(text)).unflatten(2, heads)
        cache["v"] = layer.v(text).unflatten(2, heads)
        cache["is_init"] = True
    value = cache["v"]
    query = layer.norm_q(layer.q(x)).unflatten(2, heads).to(value.dtype)
    out = dense_attention(query, cache["k"].to(value.dtype), value)
    return layer.o(out.flatten(2).to(x.dtype))


def _learns(layer: nn.Module, x: Tensor) -> bool:
    """Return whether gradients are to flow through the layer."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(weight.requires_grad for weight in layer.parameters())


def applies_nothing(*_: object, **__: object) -> None:
    """Stand in for a model's `_apply_cache_updates`: every layer has written its cache itself."""


@functools.cache
def inputs(kind: type[nn.Module]) -> dict[str, object]:
    """Return the arguments of the class's `forward` with their defaults."""
    named = inspect.signature(kind.forward).parameters
    return {name: one.default for name, one in list(named.items())[1:]}


def _named(layer: nn.Module, args: tuple, kwargs: dict[str, object]) -> dict[str, object]:
    return dict(zip(inputs(type(layer)), args, strict=False)) | kwargs


def _others(
    layer: nn.Module, args: tuple, kwargs: dict[str, object], known: frozenset[str]
) -> list[str]:
    """Return the arguments that are not known and do not have their defaults, as `name=value`."""
    defaults = inputs(type(layer))
    plain = (bool, int, float, str)
    return [
        f"{name}={value if isinstance(value, plain) else type(value).__name__}"
        for name, value in _named(layer, args, kwargs).items()
        if name not in known
        and value is not defaults.get(name)
        and not (isinstance(value, plain) and value == defaults.get(name))
    ]


def _call(
    layer: nn.Module, args: tuple, kwargs: dict[str, object], known: frozenset[str]
) -> dict[str, object] | None:
    """Return the arguments of a call by name, or None where some are not known."""
    given = _named(layer, args, kwargs)
    if given.keys() - known and _others(layer, args, kwargs, known):
        return None
    return inputs(type(layer)) | given


def _require_order(what: str, end: int, slots: int) -> None:
    """Raise unless slots are still tokens: where the ring has wrapped, the original has shifted."""
    if end > slots:
        raise ValueError(f"patch: {what} must end within its cache of {slots} tokens, got {end}")


def _key_bias(weight: float, frame: int, end: int, slots: int) -> KeyBias | None:
    """Return the bias that weighs the keys between the first frame and the block by `weight`."""
    if weight == 1.0:
        return None
    if weight <= 0:
        raise ValueError(f"patch: kv_cache_attention_bias must be positive, got {weight}")
    # the original exempts the oldest frame that is held, which is the first until the cache rolls
    _require_order("a pass with kv_cache_attention_bias", end, slots)
    return KeyBias(math.log(weight), frame)
