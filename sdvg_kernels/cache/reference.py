"""The cache ops in eager PyTorch: the definition of truth, and what runs on the CPU.

A cache is a list of tensors, each `[layers, B, S, H, D]` or one layer's `[B, S, H, D]`. Nothing
here reads a value from a GPU, so the same functions may be captured in a CUDA graph; values on the
CPU are free to read, and checked.
"""

from __future__ import annotations

import torch

Tensors = list[torch.Tensor]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def slots_of(tokens: torch.Tensor, sink: int, slots: int) -> torch.Tensor:
    """Return each token's slot: t where t < sink, else sink + (t - sink) % (slots - sink)."""
    wrapped = torch.remainder(tokens - sink, slots - sink).add_(sink)
    return torch.where(tokens < sink, tokens, wrapped) if sink else wrapped


def stage_(
    k_cache: Tensors,
    v_cache: Tensors,
    key: Tensors,
    value: Tensors,
    lengths: torch.Tensor,
    batch_idx: torch.Tensor | None,
    undo_k: Tensors,
    undo_v: Tensors,
    sink: int,
) -> None:
    """Write the rows after `lengths`; with undo tensors, save what was there first."""
    _check_values("stage_", lengths, batch_idx)
    where = _where(k_cache, lengths, batch_idx, key[0].shape[-3], sink)
    for caches, rows, undo in ((k_cache, key, undo_k), (v_cache, value, undo_v)):
        if undo:
            for cache, saved in _by_layer(caches, undo):
                saved.copy_(cache[:, *where])
        for cache, new in _by_layer(caches, rows):
            cache[:, *where] = new


def commit_(
    lengths: torch.Tensor, accept: torch.Tensor, batch_idx: torch.Tensor | None, count: int
) -> None:
    """Add `count` to the lengths of the accepted sequences."""
    _check_values("commit_", lengths, batch_idx)
    if batch_idx is None:
        lengths.add_(accept, alpha=count)
    else:
        lengths.index_add_(0, batch_idx, accept.to(lengths.dtype), alpha=count)


def rollback_(
    k_cache: Tensors,
    v_cache: Tensors,
    lengths: torch.Tensor,
    accept: torch.Tensor,
    undo_k: Tensors,
    undo_v: Tensors,
    batch_idx: torch.Tensor | None,
    sink: int,
) -> None:
    """Put the undo rows back for the sequences that were not accepted."""
    _check_values("rollback_", lengths, batch_idx)
    where = _where(k_cache, lengths, batch_idx, undo_k[0].shape[-3], sink)
    keep = accept[:, None, None, None]
    for caches, undo in ((k_cache, undo_k), (v_cache, undo_v)):
        for cache, saved in _by_layer(caches, undo):
            cache[:, *where] = torch.where(keep, cache[:, *where], saved)


def compact_(
    k_cache: Tensors,
    v_cache: Tensors,
    lengths: torch.Tensor,
    path: torch.Tensor,
    batch_idx: torch.Tensor | None,
    sink: int,
) -> None:
    """Move row `lengths + path[i]` to `lengths + i` for each valid i; advance `lengths`."""
    _check_values("compact_", lengths, batch_idx)
    size = k_cache[0].shape[-3] - sink
    if path.is_cpu and path.numel() and (most := int(path.max())) >= size:
        rule = f"stay within the ring, below S - sink = {size}"
        raise ValueError(f"compact_: path must {rule}, got {most}")
    valid = path >= 0
    if path.is_cpu and (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError(f"compact_: path must have -1 at its end only, got {path.tolist()}")
    batch, target = _where(k_cache, lengths, batch_idx, path.shape[1], sink)
    source = slots_of(lengths[batch] + path.clamp(min=0), sink, k_cache[0].shape[-3])
    for caches in (k_cache, v_cache):
        for (cache,) in _by_layer(caches):
            moved = torch.where(
                valid[:, :, None, None], cache[:, batch, source], cache[:, batch, target]
            )
            cache[:, batch, target] = moved
    lengths.index_add_(0, batch[:, 0], valid.sum(1, dtype=lengths.dtype))


def select_(accept: torch.Tensor, draft: Tensors, other: Tensors) -> None:
    """Replace the rows of `draft` that were not accepted by those of `other`."""
    for kept, replacement in zip(map(_bits, draft), map(_bits, other), strict=True):
        shaped = accept.view(-1, *[1] * (kept.dim() - 1))
        torch.where(shaped, kept, replacement, out=kept)


def _check_values(op: str, lengths: torch.Tensor, batch_idx: torch.Tensor | None) -> None:
    """On the CPU, raise unless the call names sequences of the cache, each once, of length >= 0."""
    if not lengths.is_cpu:
        return
    held = lengths.tolist()
    if batch_idx is not None:
        left = dict(enumerate(held))
        try:
            held = [left.pop(b) for b in batch_idx.tolist()]
        except KeyError as error:
            rule = f"name distinct sequences of the cache, below B = {len(lengths)}"
            raise ValueError(f"{op}: batch_idx must {rule}, got {batch_idx.tolist()}") from error
    if held and min(held) < 0:
        raise ValueError(f"{op}: lengths must be at least 0, got {min(held)}")


def _where(
    cache: Tensors, lengths: torch.Tensor, batch_idx: torch.Tensor | None, rows: int, sink: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index (sequence `[b, 1]`, slot `[b, rows]`) of the tokens after `lengths`."""
    start = lengths if batch_idx is None else lengths[batch_idx]
    batch = torch.arange(len(lengths), device=lengths.device) if batch_idx is None else batch_idx
    tokens = start[:, None] + torch.arange(rows, dtype=lengths.dtype, device=lengths.device)
    return batch[:, None], slots_of(tokens, sink, cache[0].shape[-3])


def _by_layer(*groups: Tensors) -> list[tuple[torch.Tensor, ...]]:
    """Return the groups' bits side by side: all layers at once if each is one tensor, else each."""
    if not all(len(group) == 1 and group[0].dim() == 5 for group in groups):
        groups = tuple(
            [part[None] for x in group for part in (x if x.dim() == 5 else x[None])]
            for group in groups
        )
    return list(zip(*(map(_bits, group) for group in groups), strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as integers, so that any dtype is moved, bit for bit."""
    return tensor.view(_INTEGERS[tensor.element_size()])
