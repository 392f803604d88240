"""Public cache ops: write, decide and repair KV caches in place; decisions stay on the device.

A cache is a ring after a sink: logical token t lives in slot t if t < sink, else in slot
sink + (t - sink) % (S - sink).

    slot    0 1 | 2 3 4 5 6        S = 7, sink = 2
    token   0 1 | 7 8 4 5 6        lengths = 9: the next token, 9, goes to slot 4

All functions take the K and V caches as one tensor `[layers, B, S, H, D]` each, or as one tensor
`[B, S, H, D]` per layer (a list, or a `PointerTable` built once from it). The last two dimensions
are contiguous; the others may have any strides. `lengths` is `[B]` int32 on the caches' device and
counts committed tokens. A call for some sequences only names them in `batch_idx` `[b]` (int32 or
int64, distinct); row i of the other arguments then belongs to sequence batch_idx[i]. Any dtype is
moved, bit for bit.

Values are preconditions: batch_idx distinct and in range, lengths at least 0, a path's offsets
within the ring and its -1 at the end only. Broken, they are a ValueError on the CPU, undefined in
the reference on CUDA, an error of the host lane (which does not see a repeated sequence), and a
device trap of the kernels.

Every function can be captured in a CUDA graph, reads no device memory on the host, is
deterministic, and takes `implementation`: None (the best one here), "cuda", or "reference". An
implementation asked for by name never falls back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import message, shape_of
from sdvg_kernels.cache import reference


class PointerTable:
    """A cache that somebody else allocated: one tensor per layer, all alike, checked once.

    Arguments:
        tensors: one `[B, S, H, D]` per layer, with the same shape, strides, dtype and device.

    Raises: ValueError or TypeError for layers that differ.

    The pointers travel in the parameters of a launch: nothing is uploaded, and a captured graph
    replays on the same layers. A table is as valid as the tensors' storage; it holds on to them.
    """

    __slots__ = ("shape", "tensors")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            raise _value("PointerTable", "tensors", "hold at least one layer", "none")
        first = tensors[0]
        if first.dim() != 4:
            raise _value("PointerTable", "tensors[0]", "be [B, S, H, D]", shape_of(first))
        for i, tensor in enumerate(tensors):
            if tensor.shape != first.shape or tensor.stride() != first.stride():
                rule = f"have shape {shape_of(first)} and strides {list(first.stride())}"
                got = f"{shape_of(tensor)} and {list(tensor.stride())}"
                raise _value("PointerTable", f"tensors[{i}]", rule, got)
            if tensor.dtype != first.dtype:
                raise _type("PointerTable", f"tensors[{i}]", f"be {first.dtype}", tensor.dtype)
            if tensor.device != first.device:
                raise _value(
                    "PointerTable", f"tensors[{i}]", f"be on {first.device}", tensor.device
                )
        self.tensors = list(tensors)
        self.shape = first.shape


# rows of a path that every GPU's shared memory (99 KB) holds at once, 16 bytes of each
# (csrc/cache.cu)
_COMPACT_ROWS = 6336

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
    """Write a block's keys and values to the slots after `lengths`, in all layers; commit nothing.

    Equals, for each layer and each sequence i of the call, with b = batch_idx[i] (default i):

        slot = slots_of(lengths[b] + arange(T))
        undo_k[i], undo_v[i] = k_cache[b, slot], v_cache[b, slot]        # with undo
        k_cache[b, slot], v_cache[b, slot] = key[i], value[i]

    Arguments:
        k_cache, v_cache: the caches, `S` slots each.
        key, value: `[layers, b, T, H, D]` or one `[b, T, H, D]` per layer, of the caches' dtype;
            T <= S - sink.
        lengths: `[B]` int32, committed tokens per sequence; unchanged.
        sink: how many first tokens are never evicted; less than S.
        batch_idx: `[b]`, the sequences that are written; all in order by default.
        undo: (undo_k, undo_v), shaped as key and value: receives the rows that are overwritten.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (hardware).
    Mutates: k_cache, v_cache, undo.
    Cost: reads and writes the block's rows of K and V once; twice with undo.
    """
    op = "stage_"
    k, v, sizes = _caches(op, k_cache, v_cache, sink)
    b = _check_lengths(op, lengths, batch_idx, k[0], sizes[1])
    new_k, tokens = _rows(op, "key", key, k[0], sizes, b, sink)
    new_v, _ = _rows(op, "value", value, k[0], sizes, b, sink, tokens)
    undo_k: list[torch.Tensor] = []
    undo_v: list[torch.Tensor] = []
    if undo is not None:
        _check_pair(op, undo)
        undo_k, _ = _rows(op, "undo[0]", undo[0], k[0], sizes, b, sink, tokens)
        undo_v, _ = _rows(op, "undo[1]", undo[1], k[0], sizes, b, sink, tokens)
    check = functools.partial(_check_layers, k_cache, v_cache, key, value, *(undo or ()))
    given = (k, v, new_k, new_v, lengths, batch_idx, undo_k, undo_v, sink)
    _run(op, k[0], implementation, check, *given)


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
        lengths: `[B]` int32.        accept: `[b]` bool.        count: the block's tokens, >= 0.
        batch_idx: `[b]`, the sequences that `accept` is about; all in order by default.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (hardware).
    Mutates: lengths.
    """
    op = "commit_"
    if lengths.dim() != 1:
        raise _value(op, "lengths", "be [B]", shape_of(lengths))
    b = _check_lengths(op, lengths, batch_idx, lengths, len(lengths))
    _check_accept(op, accept, b, lengths)
    if count < 0:
        raise _value(op, "count", "be at least 0", count)
    _choose(op, lengths, implementation)(lengths, accept, batch_idx, count)


def rollback_(
    k_cache: Layers,
    v_cache: Layers,
    lengths: torch.Tensor,
    accept: torch.Tensor,
    undo: tuple[Layers, Layers] | None,
    *,
    sink: int = 0,
    batch_idx: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Restore, bit for bit, what `stage_` overwrote in the sequences that were not accepted.

    Equals `k_cache[b, slots_of(lengths[b] + arange(T))] = undo_k[i]` (and V) for each i with not
    accept[i]. Call it before or after `commit_`: that changes only the lengths of accepted
    sequences.

    Arguments:
        k_cache, v_cache, lengths, sink, batch_idx: as for the `stage_` that filled `undo`.
        accept: `[b]` bool.
        undo: (undo_k, undo_v), each `[layers, b, T, H, D]` or one `[b, T, H, D]` per layer. None:
            `stage_` kept none, and nothing is restored: what is not committed is never read.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (hardware).
    Mutates: k_cache, v_cache.
    Cost: reads and writes the rows of the rejected sequences once; nothing for the accepted ones.
        Without undo nothing is launched.
    """
    op = "rollback_"
    k, v, sizes = _caches(op, k_cache, v_cache, sink)
    b = _check_lengths(op, lengths, batch_idx, k[0], sizes[1])
    _check_accept(op, accept, b, lengths)
    if undo is None:
        _choose(op, k[0], implementation)
        return
    _check_pair(op, undo)
    undo_k, tokens = _rows(op, "undo[0]", undo[0], k[0], sizes, b, sink)
    undo_v, _ = _rows(op, "undo[1]", undo[1], k[0], sizes, b, sink, tokens)
    check = functools.partial(_check_layers, k_cache, v_cache, *undo)
    given = (k, v, lengths, accept, undo_k, undo_v, batch_idx, sink)
    _run(op, k[0], implementation, check, *given)


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
    """Keep the accepted path of a staged token tree: move its rows together and commit them.

    Equals, for each sequence i with b = batch_idx[i] (default i) and n = (path[i] >= 0).sum():

        rows = k_cache[b, slots_of(lengths[b] + path[i, :n])]  # all read before any is written
        k_cache[b, slots_of(lengths[b] + arange(n))] = rows    # and V
        lengths[b] += n

    Arguments:
        k_cache, v_cache, sink, batch_idx: as for `stage_`.
        lengths: `[B]` int32.
        path: `[b, P]` int32, offsets from lengths[b] in any order, padded at the end with -1;
            offsets < S - sink, and P <= S - sink.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (hardware).
    Mutates: k_cache, v_cache, lengths.
    Cost: reads and writes the moved rows once.
    """
    op = "compact_"
    k, v, sizes = _caches(op, k_cache, v_cache, sink)
    b = _check_lengths(op, lengths, batch_idx, k[0], sizes[1])
    if path.dtype is not torch.int32:
        raise _type(op, "path", "be int32", path.dtype)
    if path.dim() != 2 or path.shape[0] != b or not path.is_contiguous():
        raise _value(op, "path", f"be [b, P], contiguous, with b = {b}", shape_of(path))
    most = min(sizes[2] - sink, _COMPACT_ROWS)
    if path.shape[1] > most:
        rule = f"have at most S - sink = {most} columns"
        if most == _COMPACT_ROWS:
            rule = f"have at most {most} columns, what shared memory holds"
        raise _value(op, "path", rule, path.shape[1])
    if path.device != lengths.device:
        raise _value(op, "path", f"be on {lengths.device}", path.device)
    check = functools.partial(_check_layers, k_cache, v_cache)
    given = (k, v, lengths, path, batch_idx, sink)
    _run(op, k[0], implementation, check, *given)


def select_(
    accept: torch.Tensor,
    draft: Sequence[torch.Tensor],
    other: Sequence[torch.Tensor],
    *,
    implementation: str | None = None,
) -> None:
    """Keep the draft's rows where it was accepted, else take the other's; one launch for all.

    Equals `draft[n][i] = draft[n][i] if accept[i] else other[n][i]` for each tensor n and sequence
    i: decoder feature caches, latents, or caches as a list of `[B, S, H, D]`.

    Arguments:
        accept: `[B]` bool.
        draft: tensors `[B, ...]` of any shapes and dtypes, each row contiguous, none overlapping.
        other: as many tensors, alike in shape and dtype.

    Raises: ValueError (shape, value), TypeError (dtype), NotImplementedError (hardware).
    Mutates: draft.
    Cost: reads and writes the rows of the rejected sequences once; nothing for the accepted ones.
    """
    op = "select_"
    if accept.dim() != 1:
        raise _value(op, "accept", "be [B]", shape_of(accept))
    _check_accept(op, accept, len(accept), accept)
    if len(draft) != len(other):
        raise _value(op, "other", f"hold {len(draft)} tensors as draft", len(other))
    if draft:
        check = functools.partial(_check_select, accept, draft, other)
        _run(op, accept, implementation, check, accept, list(draft), list(other))


def implementations() -> dict[str, str]:
    """Return the implementations, best first: name -> "" or why it cannot run on this machine."""
    reason = ""
    if not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
    elif _ops.load_extension()[0] is None:
        reason = f"sdvg_kernels._C is not built ({_ops.load_extension()[1]})"
    return {"cuda": reason, "reference": ""}


def _choose(op: str, tensor: torch.Tensor, implementation: str | None) -> Callable[..., None]:
    """Return what runs `op` on the tensor's device; what cannot run is an error that says why."""
    if implementation is None and tensor.is_cuda:
        return getattr(torch.ops.sdvg_kernels, op)
    if implementation == "reference" or implementation is None:
        return getattr(reference, op)
    if implementation not in ("cuda", "host"):
        rule = "be None, 'cuda' or 'reference'"
        raise _value(op, "implementation", rule, repr(implementation))
    device = "cpu" if implementation == "host" else "cuda"
    if tensor.device.type != device:
        rule, remedy = f"run on {tensor.device}", f"move the tensors to {device} or use 'reference'"
        raise NotImplementedError(message(op, "implementation", rule, repr(implementation), remedy))
    extension, reason = _ops.load_extension()
    if extension is None:
        rule = "have the compiled sdvg_kernels._C"
        raise NotImplementedError(message(op, "implementation", rule, repr(implementation), reason))
    namespace = _ops.HOST_NAMESPACE if implementation == "host" else _ops.NAMESPACE
    return getattr(getattr(torch.ops, namespace), op)


def _run(
    op: str,
    tensor: torch.Tensor,
    implementation: str | None,
    check: Callable[[], None],
    *arguments: object,
) -> None:
    """Run `op`; `check` is of the tensors of lists, and the extension has it done in less time."""
    run = _choose(op, tensor, implementation)
    if run is getattr(reference, op) or _ops.load_extension()[0] is None:
        check()
        run(*arguments)
        return
    try:
        run(*arguments)
    except RuntimeError:
        # its sentence does not say which tensor differs, nor how
        check()
        raise


def _check_layers(*lists: Layers) -> None:
    """Raise unless the layers of each list are alike."""
    for layers in lists:
        if not isinstance(layers, torch.Tensor | PointerTable):
            PointerTable(layers)


def _check_select(
    accept: torch.Tensor, draft: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> None:
    """Raise unless draft and other are alike, with contiguous rows that do not overlap."""
    op = "select_"
    for n, pair in enumerate(zip(draft, other, strict=True)):
        for name, tensor in zip(("draft", "other"), pair, strict=True):
            argument = f"{name}[{n}]"
            if tensor.dim() == 0 or tensor.shape[0] != len(accept):
                raise _value(op, argument, f"be [B, ...] with B = {len(accept)}", shape_of(tensor))
            if tensor.shape != pair[0].shape:
                rule = f"have the shape of draft[{n}], {shape_of(pair[0])}"
                raise _value(op, argument, rule, shape_of(tensor))
            if tensor.dtype is not pair[0].dtype:
                raise _type(op, argument, f"be {pair[0].dtype} as draft[{n}]", tensor.dtype)
            if tensor.device != accept.device:
                raise _value(op, argument, f"be on {accept.device} as accept", tensor.device)
            if not (tensor.is_contiguous() or tensor[:1].is_contiguous()):
                got, remedy = f"strides {list(tensor.stride())}", "make it with .contiguous()"
                raise _value(op, argument, "have contiguous rows", got, remedy)
        kept = pair[0]
        if len(accept) > 1 and kept.numel() and kept.stride(0) < kept[0].numel():
            got, remedy = f"strides {list(kept.stride())}", "make it with .contiguous()"
            raise _value(op, f"draft[{n}]", "have rows that do not overlap", got, remedy)


# the checks build a message only when it is raised: an engine calls stage_ once per layer and step


def _value(op: str, argument: str, rule: str, got: object, remedy: str = "") -> ValueError:
    return ValueError(message(op, argument, rule, got, remedy))


def _type(op: str, argument: str, rule: str, got: object) -> TypeError:
    return TypeError(message(op, argument, rule, got))


def _layers(op: str, name: str, layers: Layers) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """Return the tensors, one of 5 dimensions or one of 4 per layer, and `[layers, B, T, H, D]`.

    Of a list only the first layer is looked at.
    """
    if isinstance(layers, torch.Tensor):
        tensors, sizes = [layers], layers.shape
        if len(sizes) != 5:
            raise _value(op, name, "be [layers, B, T, H, D]", list(sizes))
    elif isinstance(layers, PointerTable):
        tensors, sizes = layers.tensors, (len(layers.tensors), *layers.shape)
    else:
        tensors = list(layers)
        if not tensors or tensors[0].dim() != 4:
            PointerTable(tensors)
        sizes = (len(tensors), *tensors[0].shape)
    heads, width = sizes[3], sizes[4]
    stride = tensors[0].stride()
    if (width != 1 and stride[-1] != 1) or (heads != 1 and stride[-2] != width):
        raise _value(op, name, "have contiguous [H, D]", f"strides {list(stride)}")
    return tensors, sizes


def _caches(
    op: str, k_cache: Layers, v_cache: Layers, sink: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[int, ...]]:
    """Check the caches; return their tensors and `[layers, B, S, H, D]`."""
    k, sizes = _layers(op, "k_cache", k_cache)
    v, v_sizes = _layers(op, "v_cache", v_cache)
    if v_sizes != sizes:
        raise _value(op, "v_cache", f"be {list(sizes)} as k_cache", list(v_sizes))
    if v[0].dtype is not k[0].dtype:
        raise _type(op, "v_cache", f"be {k[0].dtype} as k_cache", v[0].dtype)
    if v[0].device != k[0].device:
        raise _value(op, "v_cache", f"be on {k[0].device} as k_cache", v[0].device)
    if not 0 <= sink < sizes[2]:
        raise _value(op, "sink", f"be at least 0 and less than S = {sizes[2]}", sink)
    return k, v, sizes


def _rows(
    op: str,
    name: str,
    rows: Layers,
    cache: torch.Tensor,
    cached: tuple[int, ...],
    b: int,
    sink: int,
    tokens: int | None = None,
) -> tuple[list[torch.Tensor], int]:
    """Check new or saved rows against the cache, whose sizes are `cached`; return them and T."""
    tensors, sizes = _layers(op, name, rows)
    layers, batch, count, heads, width = sizes
    if (layers, batch, heads, width) != (cached[0], b, *cached[3:]) or count != (tokens or count):
        wanted = [cached[0], b, "T" if tokens is None else tokens, *cached[3:]]
        rule = f"be [layers, b, T, H, D] = [{', '.join(map(str, wanted))}]"
        raise _value(op, name, rule, list(sizes))
    if count > cached[2] - sink:
        raise _value(op, name, f"have at most S - sink = {cached[2] - sink} tokens", count)
    first = tensors[0]
    if first.dtype is not cache.dtype:
        raise _type(op, name, f"be {cache.dtype} as the cache", first.dtype)
    if first.device != cache.device:
        raise _value(op, name, f"be on {cache.device} as the cache", first.device)
    return tensors, count


def _check_lengths(
    op: str,
    lengths: torch.Tensor,
    batch_idx: torch.Tensor | None,
    like: torch.Tensor,
    sequences: int,
) -> int:
    """Check what says which sequences a call is about; return how many these are."""
    if lengths.dtype is not torch.int32:
        raise _type(op, "lengths", "be int32", lengths.dtype)
    if lengths.shape != (sequences,) or not lengths.is_contiguous():
        rule = f"be [B], contiguous, with B = {sequences}"
        raise _value(op, "lengths", rule, shape_of(lengths))
    if lengths.device != like.device:
        raise _value(op, "lengths", f"be on {like.device} as the cache", lengths.device)
    if batch_idx is None:
        return sequences
    if batch_idx.dtype not in (torch.int32, torch.int64):
        raise _type(op, "batch_idx", "be int32 or int64", batch_idx.dtype)
    if batch_idx.dim() != 1 or not batch_idx.is_contiguous():
        raise _value(op, "batch_idx", "be [b], contiguous", shape_of(batch_idx))
    if batch_idx.device != like.device:
        raise _value(op, "batch_idx", f"be on {like.device} as lengths", batch_idx.device)
    return batch_idx.shape[0]


def _check_pair(op: str, undo: object) -> None:
    if not isinstance(undo, tuple | list) or len(undo) != 2:
        got = len(undo) if isinstance(undo, tuple | list) else type(undo).__name__
        raise _value(op, "undo", "be a pair (undo_k, undo_v)", got)


def _check_accept(op: str, accept: torch.Tensor, b: int, like: torch.Tensor) -> None:
    if accept.dtype is not torch.bool:
        raise _type(op, "accept", "be bool", accept.dtype)
    if accept.shape != (b,) or not accept.is_contiguous():
        raise _value(op, "accept", f"be [b], contiguous, with b = {b}", shape_of(accept))
    if accept.device != like.device:
        raise _value(op, "accept", f"be on {like.device} as lengths", accept.device)


for _name in ("stage_", "commit_", "rollback_", "compact_", "select_"):
    _function = getattr(reference, _name)
    # with the extension, CUDA tensors are its own
    _cuda = _function if _ops.load_extension()[0] is None else None
    _ops.implement(_name, cpu=_function, cuda=_cuda)
