"""TMA descriptors of tensors [., ., ., .] of 16 and 8 bits, made once and kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class _Address(NamedTuple):
    """What a descriptor needs of a tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def swizzled(itemsize: int, columns: int) -> NVMMASharedLayout:
    """Return what TMA writes and wgmma reads: rows of up to 128 bytes, swizzled."""
    width = min(128, itemsize * columns)
    return NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * itemsize, rank=4)


# rows of D = 64 or 128 elements of 16 bits
LAYOUT = swizzled(2, 64)


@functools.lru_cache(maxsize=1024)
def _kept_descriptor(
    base: _Address, shape: torch.Size, strides: tuple[int, ...], tile: tuple[int, ...]
) -> TensorDescriptor:
    """Return the descriptor of what lies at `base`, made once."""
    return _make_descriptor(base, shape, strides, tile)


def _make_descriptor(
    base: torch.Tensor | _Address,
    shape: torch.Size,
    strides: tuple[int, ...],
    tile: tuple[int, ...],
) -> TensorDescriptor:
    """Return a descriptor of a tensor whose last dim is dense."""
    itemsize = base.dtype.itemsize
    made = [1]
    for i in (2, 1, 0):
        # the stride of a dimension of one is never used, but must be one that TMA takes
        dense = made[0] * shape[i + 1] * itemsize
        made.insert(0, strides[i] if shape[i] > 1 else (dense + 15) // 16 * 16 // itemsize)
    return TensorDescriptor(base, list(shape), made, list(tile), swizzled(itemsize, tile[3]))


def tiled(tensor: torch.Tensor, tile: tuple[int, ...]) -> TensorDescriptor:
    """Return the descriptor of a tensor of four dims, the last dense, for copies of `tile`.

    On a GPU it is kept by address, shape and strides, and keeps no memory alive.
    """
    if tensor.device.type != "cuda":
        return _make_descriptor(tensor, tensor.shape, tensor.stride(), tile)
    base = _Address(tensor.data_ptr(), tensor.dtype)
    return _kept_descriptor(base, tensor.shape, tensor.stride(), tile)


def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return the descriptor of `tensor` [B, T, H, D] whose tile is [1, rows, 1, D]."""
    return tiled(tensor, (1, rows, 1, tensor.shape[3]))


def can_copy(tensor: torch.Tensor) -> bool:
    """Return whether TMA can copy from or to a tensor of four dims, the last dense."""
    sizes, strides, itemsize = tensor.shape[:3], tensor.stride(), tensor.itemsize
    if tensor.data_ptr() % 16:
        return False
    return all(
        size == 1 or (stride * itemsize % 16 == 0 and 0 < stride * itemsize < 2**40)
        for size, stride in zip(sizes, strides, strict=False)
    )


def missing(query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str:
    """Return "" or why these tensors cannot be copied with TMA."""
    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not can_copy(tensor):
            return f"{name} begins at, or has a stride of, no multiple of 16 bytes"
    return ""
