"""Public cache ops: write, decide and repair KV caches in place, with every decision read on the device.

A cache is a ring after a sink: logical token t lives in slot `t if t < sink else sink + (t - sink) % (S - sink)`.

    slot    0 1 | 2 3 4 5 6        S = 7, sink = 2
    token   0 1 | 7 8 4 5 6        lengths = 9: the next token, 9, goes to slot 4

All functions take the K and V caches as one tensor `[layers, B, S, H, D]` each, or as one tensor `[B, S, H, D]` per
layer (a list, or a `PointerTable` built once from it). The last two dimensions are contiguous; the others may
have any strides. `lengths` is `[B]` int32 on the caches' device and counts committed tokens. A call for some sequences
only names them in `batch_idx` `[b]` (int32 or int64, distinct); row i of the other arguments then belongs to sequence
batch_idx[i]. Any dtype is moved, bit for bit.

Every function can be captured in a CUDA graph, reads no device memory on the host, is deterministic, and takes
`implementation`: None (the best one here), "cuda", or "reference". An implementation asked for by name never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import message, require, require_dtype, shape_of
from sdvg_kernels.cache import reference


class PointerTable:
    """A cache that somebody else allocated: one tensor per layer, all alike, checked once.

    Arguments:
        tensors: per layer a tensor `[B, S, H, D]`; all with the same shape, strides, dtype and device.

    Raises: ValueError or TypeError for layers that differ.

    The pointers travel in the parameters of a launch: nothing is uploaded, and a captured graph replays on the same
    layers. A table is as valid as the tensors' storage; it holds on to them.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        op = "PointerTable"
        require(len(tensors) > 0, op, "tensors", "hold at least one layer", "none")
        first = tensors[0]
        require(first.dim() == 4, op, "tensors[0]", "be [B, S, H, D]", shape_of(first))
        for i, tensor in enumerate(tensors[1:], 1):
            require(
                tensor.shape == first.shape and tensor.stride() == first.stride(),
                op,
                f"tensors[{i}]",
                "have the shape and strides of tensors[0]",
                f"{shape_of(tensor)} and {list(tensor.stride())}",
            )
            require_dtype(
                tensor.dtype == first.dtype,
                op,
                f"tensors[{i}]",
                f"be {first.dtype} as tensors[0]",
                tensor.dtype,
            )
            require(
                tensor.device == first.device,
                op,
                f"tensors[{i}]",
                f"be on {first.device} as tensors[0]",
                tensor.device,
            )
        self.tensors = list(tensors)


Layers: TypeAlias = torch.Tensor | PointerTable | Sequence[torch.Tensor]


def stage_(
    k_cache: Layers,
    v_cache: Layers,
    key: Layers,
    value: Layers,
    lengths: torch.Tensor,
    *,
    sink: int = 0,
    batch_idx: torch.Tensor | None = None,
    undo: tuple[Layers, Layers] | None = None,
    implementation: str | None = None,
) -> None:
    """Write a block's keys and values to the slots after `lengths`, in all layers, without committing it.

    Equals, for each layer and each sequence i of the call, with b = batch_idx[i] (default i):

        slot = slots_of(lengths[b] + arange(T))
        undo_k[i], undo_v[i] = k_cache[b, slot], v_cache[b, slot]        # with undo
        k_cache[b, slot], v_cache[b, slot] = key[i], value[i]

    Arguments:
        k_cache, v_cache: the caches, `S` slots each.
        key, value: `[layers, b, T, H, D]` or one `[b, T, H, D]` per layer, of the caches' dtype; T <= S - sink.
        lengths: `[B]` int32, committed tokens per sequence; unchanged.
        sink: how many first tokens are never evicted; less than S.
        batch_idx: `[b]`, the sequences that are written; all in order by default.
        undo: (undo_k, undo_v), shaped as key and value: receives the rows that are overwritten.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (`implementation` cannot run here).
    Mutates: k_cache, v_cache, undo.
    Cost: reads 2 and writes 2 bytes of rows per cached byte of the block (K and V); twice that with undo.
    """
    op = "stage_"
    k, v = _caches(op, k_cache, v_cache, lengths, sink, batch_idx)
    b = len(lengths) if batch_idx is None else len(batch_idx)
    new_k, new_v = _tensors(op, "key", key), _tensors(op, "value", value)
    _check_rows(op, "key", new_k, k, b, sink)
    _check_rows(op, "value", new_v, k, b, sink, new_k[0].shape[-3])
    undo_k: list[torch.Tensor] = []
    undo_v: list[torch.Tensor] = []
    if undo is not None:
        undo_k, undo_v = _tensors(op, "undo[0]", undo[0]), _tensors(op, "undo[1]", undo[1])
        _check_rows(op, "undo[0]", undo_k, k, b, sink, new_k[0].shape[-3])
        _check_rows(op, "undo[1]", undo_v, k, b, sink, new_k[0].shape[-3])
    run = _choose(op, k[0], implementation)
    run(k, v, new_k, new_v, lengths, batch_idx, undo_k, undo_v, sink)


def commit_(
    lengths: torch.Tensor,
    accept: torch.Tensor,
    count: int,
    *,
    batch_idx: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Count the staged tokens of the accepted sequences as committed; no row moves.

    Equals `lengths[b] += count` for each i with accept[i], b = batch_idx[i] (default i).

    Arguments:
        lengths: `[B]` int32.        accept: `[b]` bool.        count: tokens of the block, at least 0.
        batch_idx: `[b]`, the sequences that `accept` is about; all in order by default.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (`implementation` cannot run here).
    Mutates: lengths.
    """
    op = "commit_"
    _check_lengths(op, lengths, batch_idx)
    _check_accept(op, accept, lengths, batch_idx)
    require(count >= 0, op, "count", "be at least 0", count)
    _choose(op, lengths, implementation)(lengths, accept, batch_idx, count)


def rollback_(
    k_cache: Layers,
    v_cache: Layers,
    lengths: torch.Tensor,
    accept: torch.Tensor,
    undo: tuple[Layers, Layers],
    *,
    sink: int = 0,
    batch_idx: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Restore, bit for bit, the rows that `stage_` overwrote in the sequences that were not accepted.

    Equals `k_cache[b, slots_of(lengths[b] + arange(T))] = undo_k[i]` (and V) for each i with not accept[i]. Call it
    before or after `commit_`: that changes only the lengths of accepted sequences.

    Arguments:
        k_cache, v_cache, lengths, sink, batch_idx: as for the `stage_` that filled `undo`.
        accept: `[b]` bool.        undo: (undo_k, undo_v), each `[layers, b, T, H, D]` or one `[b, T, H, D]` per layer.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (`implementation` cannot run here).
    Mutates: k_cache, v_cache.
    Cost: reads and writes the rows of the rejected sequences once; nothing for the accepted ones.
    """
    op = "rollback_"
    k, v = _caches(op, k_cache, v_cache, lengths, sink, batch_idx)
    b = len(lengths) if batch_idx is None else len(batch_idx)
    _check_accept(op, accept, lengths, batch_idx)
    undo_k, undo_v = _tensors(op, "undo[0]", undo[0]), _tensors(op, "undo[1]", undo[1])
    _check_rows(op, "undo[0]", undo_k, k, b, sink)
    _check_rows(op, "undo[1]", undo_v, k, b, sink, undo_k[0].shape[-3])
    run = _choose(op, k[0], implementation)
    run(k, v, lengths, accept, undo_k, undo_v, batch_idx, sink)


def compact_(
    k_cache: Layers,
    v_cache: Layers,
    lengths: torch.Tensor,
    path: torch.Tensor,
    *,
    sink: int = 0,
    batch_idx: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Keep the accepted path of a staged token tree: move its rows together, after `lengths`, and commit them.

    Equals, for each sequence i with b = batch_idx[i] (default i) and n = (path[i] >= 0).sum():

        rows = k_cache[b, slots_of(lengths[b] + path[i, :n])]            # all read before any is written
        k_cache[b, slots_of(lengths[b] + arange(n))] = rows              # and V
        lengths[b] += n

    Arguments:
        k_cache, v_cache, sink, batch_idx: as for `stage_`.
        lengths: `[B]` int32.
        path: `[b, P]` int32, offsets from lengths[b] in any order, padded at the end with -1; offsets < S - sink,
            and P <= S - sink.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (`implementation` cannot run here).
    Mutates: k_cache, v_cache, lengths.
    Cost: reads and writes the moved rows once.
    """
    op = "compact_"
    k, v = _caches(op, k_cache, v_cache, lengths, sink, batch_idx)
    b = len(lengths) if batch_idx is None else len(batch_idx)
    require(
        path.dim() == 2 and path.shape[0] == b,
        op,
        "path",
        f"be [b, P] with b = {b}",
        shape_of(path),
    )
    require_dtype(path.dtype == torch.int32, op, "path", "be int32", path.dtype)
    require(path.device == lengths.device, op, "path", f"be on {lengths.device}", path.device)
    ring = k[0].shape[-3] - sink
    require(
        path.shape[1] <= ring, op, "path", f"have at most S - sink = {ring} columns", path.shape[1]
    )
    _choose(op, k[0], implementation)(k, v, lengths, path, batch_idx, sink)


def select_(
    accept: torch.Tensor,
    draft: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    *,
    implementation: str | None = None,
) -> None:
    """Keep the draft's rows where it was accepted and take the other's where not, in one launch for all tensors.

    Equals `draft[n][i] = draft[n][i] if accept[i] else other[n][i]` for each tensor n and sequence i: decoder feature
    caches, latents, or caches as a list of `[B, S, H, D]`.

    Arguments:
        accept: `[B]` bool.
        draft: tensors `[B, ...]` of any shapes and dtypes, each row contiguous.
        other: as many tensors, alike in shape and dtype.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (`implementation` cannot run here).
    Mutates: draft.
    Cost: reads and writes the rows of the rejected sequences once; nothing for the accepted ones.
    """
    op = "select_"
    require_dtype(accept.dtype == torch.bool, op, "accept", "be bool", accept.dtype)
    require(accept.dim() == 1, op, "accept", "be [B]", shape_of(accept))
    require(
        len(draft) == len(other), op, "other", f"hold {len(draft)} tensors as draft", len(other)
    )
    for n, (kept, replacement) in enumerate(zip(draft, other, strict=True)):
        require(
            kept.dim() > 0 and kept.shape[0] == len(accept),
            op,
            f"draft[{n}]",
            f"be [B, ...] with B = {len(accept)}",
            shape_of(kept),
        )
        require(
            replacement.shape == kept.shape,
            op,
            f"other[{n}]",
            f"have the shape of draft[{n}], {shape_of(kept)}",
            shape_of(replacement),
        )
        require_dtype(
            replacement.dtype == kept.dtype,
            op,
            f"other[{n}]",
            f"be {kept.dtype} as draft[{n}]",
            replacement.dtype,
        )
        for name, tensor in (("draft", kept), ("other", replacement)):
            require(
                tensor.device == accept.device,
                op,
                f"{name}[{n}]",
                f"be on {accept.device} as accept",
                tensor.device,
            )
            require(
                len(accept) == 0 or tensor[0].is_contiguous(),
                op,
                f"{name}[{n}]",
                "have contiguous rows",
                f"strides {list(tensor.stride())}",
                "call .contiguous() where it is made",
            )
    if draft:
        _choose(op, accept, implementation)(accept, list(draft), list(other))


def implementations() -> dict[str, str]:
    """Return the implementations, best first: name -> "" or why it cannot run on this machine."""
    reason = ""
    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
    elif _ops.load_extension()[0] is None:
        reason = f"sdvg_kernels._C is not built ({_ops.load_extension()[1]})"
    return {"cuda": reason, "reference": ""}


def _choose(op: str, tensor: torch.Tensor, implementation: str | None) -> Callable[..., None]:
    """Return what runs `op` on the tensor's device; an explicit request that cannot run is an error."""
    if implementation is None and tensor.is_cuda:
        return getattr(torch.ops.sdvg_kernels, op)
    if implementation == "reference" or implementation is None:
        return getattr(reference, op)
    require(
        implementation in ("cuda", "host"),
        op,
        "implementation",
        "be None, 'cuda' or 'reference'",
        repr(implementation),
    )
    device = "cpu" if implementation == "host" else "cuda"
    if tensor.device.type != device:
        remedy = f"move the tensors to {device}, or use 'reference'"
        raise NotImplementedError(
            message(op, "implementation", f"run on {tensor.device}", repr(implementation), remedy)
        )
    extension, reason = _ops.load_extension()
    if extension is None:
        rule = "have sdvg_kernels._C"
        raise NotImplementedError(message(op, "implementation", rule, repr(implementation), reason))
    namespace = _ops.HOST_NAMESPACE if implementation == "host" else _ops.NAMESPACE
    return getattr(getattr(torch.ops, namespace), op)


def _tensors(op: str, name: str, layers: Layers) -> list[torch.Tensor]:
    """Return the tensors that hold the layers: one of 5 dimensions for all, or one of 4 each."""
    if isinstance(layers, torch.Tensor):
        # one layer's [B, S, H, D] would pass for a table of one: the caller meant layers
        require(layers.dim() == 5, op, name, "be [layers, B, S, H, D]", shape_of(layers))
        return [layers]
    return layers.tensors if isinstance(layers, PointerTable) else PointerTable(layers).tensors


def _caches(
    op: str,
    k_cache: Layers,
    v_cache: Layers,
    lengths: torch.Tensor,
    sink: int,
    batch_idx: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Check the caches with what describes them, and return them as lists."""
    k, v = _tensors(op, "k_cache", k_cache), _tensors(op, "v_cache", v_cache)
    for name, caches in (("k_cache", k), ("v_cache", v)):
        first = caches[0]
        require(
            _dense(first), op, name, "have contiguous [H, D]", f"strides {list(first.stride())}"
        )
    shape = k[0].shape
    require(
        v[0].shape == shape and len(v) == len(k),
        op,
        "v_cache",
        f"have the shape of k_cache, {shape_of(k[0])}",
        shape_of(v[0]),
    )
    require_dtype(
        v[0].dtype == k[0].dtype, op, "v_cache", f"be {k[0].dtype} as k_cache", v[0].dtype
    )
    require(v[0].device == k[0].device, op, "v_cache", f"be on {k[0].device}", v[0].device)
    _check_lengths(op, lengths, batch_idx)
    require(
        len(lengths) == shape[-4], op, "lengths", f"be [B] with B = {shape[-4]}", shape_of(lengths)
    )
    require(lengths.device == k[0].device, op, "lengths", f"be on {k[0].device}", lengths.device)
    require(0 <= sink < shape[-3], op, "sink", f"be at least 0 and less than S = {shape[-3]}", sink)
    return k, v


def _check_rows(
    op: str,
    name: str,
    rows: list[torch.Tensor],
    cache: list[torch.Tensor],
    b: int,
    sink: int,
    count: int | None = None,
) -> None:
    """Check tensors of new or saved rows against the caches."""
    first, like = rows[0], cache[0]
    shape, cached = first.shape, like.shape
    layers = len(cache) if len(cached) == 4 else cached[0]
    good = len(shape) in (4, 5) and (len(rows) if len(shape) == 4 else shape[0]) == layers
    good = good and shape[-4] == b and shape[-2:] == cached[-2:]
    if not (good and (count is None or shape[-3] == count)):
        rule = (
            f"be [layers, b, T, H, D] = [{layers}, {b}, {count or 'T'}, {cached[-2]}, {cached[-1]}]"
        )
        raise ValueError(message(op, name, rule, shape_of(first)))
    if shape[-3] > cached[-3] - sink:
        rule = f"have at most S - sink = {cached[-3] - sink} tokens"
        raise ValueError(message(op, name, rule, shape[-3]))
    require_dtype(first.dtype == like.dtype, op, name, f"be {like.dtype} as the cache", first.dtype)
    require(first.device == like.device, op, name, f"be on {like.device}", first.device)
    require(_dense(first), op, name, "have contiguous [H, D]", f"strides {list(first.stride())}")


def _check_lengths(op: str, lengths: torch.Tensor, batch_idx: torch.Tensor | None) -> None:
    require_dtype(lengths.dtype == torch.int32, op, "lengths", "be int32", lengths.dtype)
    require(lengths.dim() == 1, op, "lengths", "be [B]", shape_of(lengths))
    if batch_idx is not None:
        good = batch_idx.dtype in (torch.int32, torch.int64)
        require_dtype(good, op, "batch_idx", "be int32 or int64", batch_idx.dtype)
        require(batch_idx.dim() == 1, op, "batch_idx", "be [b]", shape_of(batch_idx))
        same = batch_idx.device == lengths.device
        require(same, op, "batch_idx", f"be on {lengths.device}", batch_idx.device)


def _check_accept(
    op: str, accept: torch.Tensor, lengths: torch.Tensor, batch_idx: torch.Tensor | None
) -> None:
    b = len(lengths) if batch_idx is None else len(batch_idx)
    require_dtype(accept.dtype == torch.bool, op, "accept", "be bool", accept.dtype)
    require(accept.shape == (b,), op, "accept", f"be [b] with b = {b}", shape_of(accept))
    require(accept.device == lengths.device, op, "accept", f"be on {lengths.device}", accept.device)


def _dense(tensor: torch.Tensor) -> bool:
    """Return whether the last two dimensions are contiguous."""
    heads, width = tensor.shape[-2:]
    stride = tensor.stride()
    return (width == 1 or stride[-1] == 1) and (heads == 1 or stride[-2] == width)


for _name in ("stage_", "commit_", "rollback_", "compact_", "select_"):
    _function = getattr(reference, _name)
    # with the extension, CUDA tensors are its own
    _cuda = _function if _ops.load_extension()[0] is None else None
    _ops.implement(_name, cpu=_function, cuda=_cuda)
