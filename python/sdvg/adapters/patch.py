"""`patch` and `unpatch`: find the attention of other people's pipelines, prove ours, swap it in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from sdvg.adapters.self_forcing import (
    Shared,
    applies_nothing,
    cross_attention,
    inputs,
    self_attention,
)

_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim")
_SELF = ("x", "grid_sizes", "freqs", "kv_cache", "current_start")
_CROSS = ("x", "context", "context_lens", "crossattn_cache")
# LongLive's models write their caches after all layers
_APPLY = "_apply_cache_updates"
# says that ours was put there, whatever else was put over it
_MARK = "_sdvg_patched"
# relative, of what other rounding explains (bfloat16: 0.01) and another layer does not (0.3)
_CLOSE = 0.05
_LOG = logging.getLogger("sdvg")


def patch(pipeline: object) -> int:
    """Run the cached attention of `pipeline` on the ring ops; return how many layers.

    Found are the modules, at any depth, that are shaped like the self-attention of Self-Forcing's,
    LongLive's and Krea's `CausalWanModel`: `forward(x, seq_lens, grid_sizes, freqs, block_mask,
    kv_cache, current_start, cache_start)`, with `q`, `k`, `v`, `o`, `norm_q`, `norm_k`. Their
    caches stay the pipeline's own dicts `k`, `v`, `global_end_index`, `local_end_index`; indices
    may be ints or tensors. Cross-attention `forward(x, context, context_lens, crossattn_cache)`
    beside them runs on our attention too, with the same dict of `k`, `v` and `is_init`. A forward
    with `kv_cache_attention_bias` has it as a key bias. Our ops serve a GPU by what it can do: that
    the originals look for "h100" in its name, which "NVIDIA H200" lacks, matters no longer.

    Before anything is swapped, one layer of each kind runs on a few random tokens, the original and
    ours: other outputs or other cached keys (a model that caches them before RoPE) are refused.

    A call without `kv_cache` (training) goes to the original, and so does Krea's recompute, which
    comes with a block mask. Refused, each in a sentence, are: a cached pass with gradients; an
    argument of an original's forward beyond these that has not its default (a prompt switch that
    asks LongLive's layers to rewrite the sink); a pass longer than the cache without its sink; a
    sink larger than a block where cache writes are deferred, since LongLive then attends to slots
    that nobody has written. Under `torch.compile` the patched attention stays outside the graphs.

    Patching again changes nothing. A model that two pipelines share is patched for both. Copies and
    pickles of a patched model are patched; `state_dict` is untouched. Patch before hooks that
    replace a layer's `forward` (accelerate's offloading), and remove those before `unpatch`.

    Args:
        pipeline: an `nn.Module`, or an object with modules among its attributes.

    Raises:
        ValueError: nothing in `pipeline` has that shape, or it is another attention.
        RuntimeError: something else has replaced a layer's `forward`.
    """
    roots = _roots(pipeline)
    layers = list(_find(roots, _SELF))
    odd = [seen for root in roots for seen in _unknown(root)]
    if not layers or odd:
        raise ValueError(
            "patch: pipeline must hold self-attention of Self-Forcing's shape "
            f"(forward with {', '.join(_SELF)}), got {type(pipeline).__name__} with "
            f"{'; '.join(dict.fromkeys(odd)) or 'none'}; pass the model, or what has it as an "
            "attribute"
        )
    crossing = [layer for layer in _find(roots, _CROSS) if not hasattr(layer, "k_img")]
    owners = {
        id(layer): owner
        for root in roots
        for owner in root.modules()
        if callable(getattr(owner, _APPLY, None))
        for layer in owner.modules()
    }
    fresh = [layer for layer in (*layers, *crossing) if not _patched(layer)]
    for layer in fresh:
        if "forward" in vars(layer):
            raise RuntimeError(
                f"patch: forward of {type(layer).__name__} must be its class's, got one that "
                "something else has put there; patch before offloading hooks are added"
            )
    ours = set(layers)
    kinds: dict[tuple[object, ...], bool] = {}
    swaps: list[tuple[nn.Module, partial[object]]] = []
    shared = Shared()
    for layer in fresh:
        defers, is_self = id(layer) in owners, layer in ours
        kind = (type(layer), layer.num_heads, layer.head_dim, defers)
        if kind not in kinds:
            kinds[kind] = _prove_self(layer, defers) if is_self else _prove_cross(layer)
        if is_self:
            swaps.append((layer, partial(self_attention, layer, shared, defers)))
        elif kinds[kind]:
            swaps.append((layer, partial(cross_attention, layer)))
    for layer, forward in swaps:
        layer.forward = forward
        vars(layer)[_MARK] = True
    for layer in layers:
        if owner := owners.get(id(layer)):
            setattr(owner, _APPLY, applies_nothing)
    return len(layers)


def unpatch(pipeline: object) -> int:
    """Give `pipeline` its own attention back; return how many layers of self-attention were ours.

    A cache that was filled while patched is a ring: begin a new video, with a new cache.

    Raises:
        RuntimeError: something else was put over our `forward`.
    """
    roots = _roots(pipeline)
    ours = [module for root in roots for module in root.modules() if vars(module).get(_MARK, False)]
    owners = [
        module
        for root in roots
        for module in root.modules()
        if vars(module).get(_APPLY) is applies_nothing
    ]
    for layer in ours:
        if not _patched(layer):
            raise RuntimeError(
                f"unpatch: forward of {type(layer).__name__} must be ours, got one that something "
                "else has put over it; remove offloading hooks first"
            )
        if _defers(layer) and not owners:
            raise RuntimeError(
                f"unpatch: pipeline must hold the model that has {_APPLY}, got a part of it"
            )
    count = 0
    for layer in dict.fromkeys(ours):
        count += layer.forward.func is self_attention
        del layer.forward
        del vars(layer)[_MARK]
    for owner in dict.fromkeys(owners):
        delattr(owner, _APPLY)
    return count


def _roots(pipeline: object) -> list[nn.Module]:
    if isinstance(pipeline, nn.Module):
        return [pipeline]
    values = vars(pipeline).values() if hasattr(pipeline, "__dict__") else ()
    return [value for value in values if isinstance(value, nn.Module)]


def _find(roots: list[nn.Module], names: tuple[str, ...]) -> Iterator[nn.Module]:
    """Yield each module with an attention's parts whose forward takes `names`, once."""
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    for module in modules:
        if all(hasattr(module, part) for part in _PARTS):
            if all(name in inputs(type(module)) for name in names):
                yield module


def _unknown(root: nn.Module) -> Iterator[str]:
    """Yield what takes a `kv_cache` and projects queries, but is not of the shape."""
    for module in root.modules():
        if not any(hasattr(module, name) for name in ("q", "to_q", "to_qkv")):
            continue
        takes = inputs(type(module))
        if "kv_cache" not in takes:
            continue
        missing = [part for part in (*_PARTS, "local_attn_size") if not hasattr(module, part)]
        missing += [name for name in _SELF if name not in takes]
        if missing:
            name = type(module).__name__
            yield f"{name}.forward({', '.join(takes)}), which lacks {', '.join(missing)}"
        elif not _absolute(module):
            name = f"{type(module).__module__}.{type(module).__name__}"
            yield f"{name}, which caches keys before RoPE"


def _absolute(layer: nn.Module) -> bool:
    """Return whether keys are cached after RoPE at their absolute positions, by what names say."""
    policy = getattr(layer, "rope_cache_policy", "absolute")
    return policy == "absolute" and "infinity" not in type(layer).__module__.rpartition(".")[2]


def _patched(layer: nn.Module) -> bool:
    own = vars(layer).get("forward")
    return isinstance(own, partial) and own.func in (self_attention, cross_attention)


def _defers(layer: nn.Module) -> bool:
    return layer.forward.func is self_attention and layer.forward.args[2]


def _prove_self(layer: nn.Module, defers: bool) -> bool:
    """Raise unless ours gives what the layer gives on a small grid, and caches the same keys."""
    like = _weight(layer)
    if like is None:
        return True
    sink = getattr(layer, "sink_size", 0)
    height, width, frames = 2, 2, max(2, sink)
    tokens, dim = frames * height * width, layer.num_heads * layer.head_dim
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, dim, generator=random).to(like)
    angles = torch.outer(
        torch.arange(64, dtype=torch.float64), torch.linspace(1, 0.1, layer.head_dim // 2)
    )
    freqs = torch.polar(torch.ones_like(angles), angles).to(like.device)
    given = {
        "x": x,
        "seq_lens": torch.tensor([tokens]),
        "grid_sizes": torch.tensor([[frames, height, width]]),
        "freqs": freqs,
        "block_mask": None,
        "current_start": 0,
        "cache_start": None,
    }
    given = {name: value for name, value in given.items() if name in inputs(type(layer))}
    # a pass fits the ring beside the sink
    slots = tokens + sink * height * width
    with torch.no_grad():
        # Krea's indices are ints, the others' tensors
        for index in (0, torch.zeros(1, dtype=torch.long, device=like.device)):
            caches = [_small_cache(layer, slots, like, index) for _ in range(2)]
            try:
                theirs = type(layer).forward(layer, **given, kv_cache=caches[0])
                break
            # foreign code fails in any way
            except Exception as error:
                why = f"it does not run alone: {type(error).__name__}: {error}"
        else:
            _unproven(layer, why)
            return True
        if isinstance(theirs, tuple) is not defers:
            got = "a tuple" if isinstance(theirs, tuple) else "a tensor"
            rule = f"return a tuple where its model has {_APPLY}, a tensor elsewhere"
            raise ValueError(
                f"patch: {type(layer).__name__} must {rule}, got {got}; patch the whole model"
            )
        ours = self_attention(layer, Shared(), defers, **given, kv_cache=caches[1])
    pairs = {"output": (theirs[0], ours[0]) if defers else (theirs, ours)}
    if not defers:
        pairs |= {name: (caches[0][name], caches[1][name]) for name in ("k", "v")}
    names = {"output": "output", "k": "cached keys (RoPE before the cache?)", "v": "cached values"}
    for name, (want, got) in pairs.items():
        if far := _far(want, got):
            raise ValueError(
                f"patch: {type(layer).__name__} must be Self-Forcing's attention, got other "
                f"{names[name]} on a small grid, off by {far:.2g} of their size"
            )
    return True


def _prove_cross(layer: nn.Module) -> bool:
    """Return whether ours gives what the layer gives; where not, it is to keep its own."""
    like = _weight(layer)
    if like is None:
        return True
    random = torch.Generator().manual_seed(0)
    dim = layer.num_heads * layer.head_dim
    x, text = (torch.randn(1, tokens, dim, generator=random).to(like) for tokens in (8, 5))
    with torch.no_grad():
        outs = []
        for forward in (type(layer).forward, cross_attention):
            try:
                outs.append(forward(layer, x, text, None, crossattn_cache={"is_init": False}))
            # foreign code fails in any way; ours must not
            except Exception as error:
                if outs:
                    raise
                _unproven(layer, f"it does not run alone: {type(error).__name__}: {error}")
                return True
    if far := _far(*outs):
        name = type(layer).__name__
        _LOG.warning("patch: %s keeps its own attention: ours is off by %.2g", name, far)
        return False
    return True


def _weight(layer: nn.Module) -> Tensor | None:
    """Return an empty tensor of the layer's device and dtype, or None where it cannot run now."""
    like = None
    for weight in layer.parameters():
        # a sharded weight is a part, on a mesh of devices
        if weight.is_meta or weight.numel() == 0 or hasattr(weight, "device_mesh"):
            _unproven(layer, "its weights are not here as whole tensors")
            return None
        if like is None and weight.dtype.is_floating_point and weight.itemsize > 1:
            like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return like


def _small_cache(
    layer: nn.Module, slots: int, like: Tensor, index: int | Tensor
) -> dict[str, int | Tensor]:
    shape = (1, slots, layer.num_heads, layer.head_dim)
    cache = {name: like.new_zeros(shape) for name in ("k", "v")}
    # each its own: they are written in place
    return cache | {
        name: index.clone() if isinstance(index, Tensor) else index
        for name in ("global_end_index", "local_end_index")
    }


def _unproven(layer: nn.Module, why: str) -> None:
    _LOG.warning("patch: %s is patched unproven: %s", type(layer).__name__, why)


def _far(want: Tensor, got: Tensor) -> float:
    """Return 0.0 where `got` is close to `want`, else the relative distance."""
    if want.shape != got.shape:
        return float("inf")
    want, got = want.float(), got.float()
    far = ((got - want).norm() / want.norm().clamp(min=1e-20)).item()
    return 0.0 if far <= _CLOSE else far
