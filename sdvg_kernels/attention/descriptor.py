"""TMA descriptors of [B, T, H, D] tensors of 16-bit elements, made once and kept."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# what TMA writes and wgmma reads: rows of 128 bytes, swizzled
LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


class _Address(NamedTuple):
    """What a descriptor needs of a tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.lru_cache(maxsize=1024)
def _kept_descriptor(
    base: _Address, shape: torch.Size, strides: tuple[int, ...], rows: int
) -> TensorDescriptor:
    """Return the descriptor of what lies at `base`, made once."""
    return _make_descriptor(base, shape, strides, rows)


def _make_descriptor(
    base: torch.Tensor | _Address, shape: torch.Size, strides: tuple[int, ...], rows: int
) -> TensorDescriptor:
    """Return a descriptor of [B, T, H, D] whose tile is [1, rows, 1, D]."""
    made = [1]
    for i in (2, 1, 0):
        # the stride of a dimension of one is never used, but must be one that TMA takes
        made.insert(0, strides[i] if shape[i] > 1 else made[0] * shape[i + 1])
    return TensorDescriptor(base, list(shape), made, [1, rows, 1, shape[3]], LAYOUT)


def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Return the descriptor of `tensor` [B, T, H, D] whose tile is [1, rows, 1, D].

    On a GPU it is kept by address, shape and strides, and keeps no memory alive.
    """
    if tensor.device.type != "cuda":
        return _make_descriptor(tensor, tensor.shape, tensor.stride(), rows)
    base = _Address(tensor.data_ptr(), tensor.dtype)
    return _kept_descriptor(base, tensor.shape, tensor.stride(), rows)


def can_copy(tensor: torch.Tensor) -> bool:
    """Return whether TMA can copy from or to `tensor` [B, T, H, D]."""
    sizes, strides = tensor.shape[:3], tensor.stride()
    if tensor.data_ptr() % 16:
        return False
    return all(
        size == 1 or (stride % 8 == 0 and 0 < stride < 2**39)
        for size, stride in zip(sizes, strides, strict=False)
    )


def missing(query: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str:
    """Return "" or why these tensors cannot be copied with TMA."""
    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not can_copy(tensor):
            return f"{name} begins at, or has a stride of, no multiple of 16 bytes"
    return ""
