"""What a Gluon kernel holds in the lane besides values: shared memory, barriers, descriptors."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl

from sdvg_kernels._gluon.machine import Allocation, LaneFault, Machine, Mbarrier
from sdvg_kernels._gluon.values import TO_TRITON, Pointer, Tile, torch_dtype


class Shared:
    """A view of shared memory."""

    def __init__(self, owner: Allocation, data: torch.Tensor, layout: object) -> None:
        self.owner, self.data, self.layout = owner, data, layout

    @property
    def shape(self) -> list[int]:
        """Return its shape."""
        return list(self.data.shape)

    @property
    def dtype(self) -> tl.dtype:
        """Return its Triton type."""
        return TO_TRITON[self.data.dtype]

    @property
    def rank(self) -> int:
        """Return how many dimensions it has."""
        return self.data.ndim

    @property
    def numel(self) -> int:
        """Return how many elements it has."""
        return self.data.numel()

    def _view(self, data: torch.Tensor) -> Shared:
        return Shared(self.owner, data, self.layout)

    def index(self, index: int) -> Shared:
        """Return the view of one place of the first dimension."""
        if not 0 <= index < len(self.data):
            raise LaneFault(f"{self.owner.name} has no place {index} of {len(self.data)}")
        return self._view(self.data[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """Return the view of a run of places."""
        return self._view(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        """Return the view with its dimensions in another order."""
        return self._view(self.data.permute(tuple(order)))

    def reshape(self, shape: list[int]) -> Shared:
        """Return the view in another shape."""
        return self._view(self.data.view([int(size) for size in shape]))

    def _reinterpret(self, dtype: tl.dtype, shape: list[int], layout: object) -> Shared:
        count, kind = math.prod(shape), torch_dtype(dtype)
        start = self.data.storage_offset() * self.data.element_size()
        taken = self.owner.storage[start : start + count * kind.itemsize]
        if not self.data.is_contiguous() or count * kind.itemsize > self.data.nbytes:
            raise LaneFault(f"{self.owner.name} cannot be reinterpreted as {dtype}{shape}")
        return Shared(self.owner, taken.view(kind).view(shape), layout)

    def _keep_alive(self) -> None:
        """Do nothing."""

    def load(self, layout: object) -> Tile:
        """Read it."""
        machine = self.owner.machine
        event = machine.event(f"load of {self.owner.name}")
        self.owner.read(self.data, event, "threads")
        machine.task.known |= 1 << event
        return Tile(self.data.clone(), layout)

    def store(self, value: Tile) -> None:
        """Write it."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise LaneFault(
                f"{self.owner.name} is {self.dtype}{self.shape}, and a store brings"
                f" {value.dtype}{value.shape}"
            )
        machine = self.owner.machine
        event = machine.event(f"store to {self.owner.name}")
        self.owner.write(self.data, event, "threads")
        machine.task.known |= 1 << event
        machine.task.unfenced |= 1 << event
        self.data.copy_(value.data)


class Barriers:
    """mbarriers in shared memory."""

    def __init__(self, found: list[object]) -> None:
        self.found = found

    def index(self, index: int) -> object:
        """Return one of them."""
        if not 0 <= index < len(self.found):
            raise LaneFault(f"there is no mbarrier {index} of {len(self.found)}")
        return self.found[int(index)]


def mbarrier_of(found: object) -> Mbarrier:
    """Return the one mbarrier that a kernel names."""
    if isinstance(found, Barriers) and len(found.found) == 1:
        found = found.found[0]
    if not isinstance(found, Mbarrier):
        raise LaneFault(f"{found!r} is not one mbarrier")
    return found


class Descriptor:
    """A TMA descriptor: reads beyond the tensor give zeros, writes beyond it are dropped."""

    def __init__(self, host: object, name: str, pointer: Pointer) -> None:
        self.name, self.pointer = name, pointer
        self.layout = host.layout
        self.block_shape = [int(size) for size in host.block_shape]
        self.shape, self.strides = ([int(x) for x in y] for y in (host.shape, host.strides))
        self.fill = float("nan") if host.padding == "nan" else 0.0
        memory = pointer.memory
        self.tensor = memory.as_strided(self.shape, self.strides, pointer.offset)
        self.dtype = TO_TRITON[memory.dtype]
        nbytes = math.prod(self.block_shape) * memory.element_size()
        self.nbytes_per_cta = nbytes
        self.block_type = SimpleNamespace(
            nbytes=nbytes, shape=self.block_shape, element_ty=self.dtype
        )

    def boxes(self, coordinates: object) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return which part of the tensor a box at `coordinates` covers, and of the box."""
        if len(coordinates) != len(self.shape):
            raise LaneFault(f"{self.name} has {len(self.shape)} dimensions, got {coordinates}")
        far, near = [], []
        for start, box, size in zip(coordinates, self.block_shape, self.shape, strict=True):
            low, high = min(max(start, 0), size), min(max(start + box, 0), size)
            far.append(slice(int(low), int(high)))
            near.append(slice(int(low - start), int(high - start)))
        return tuple(far), tuple(near)

    def elements(self, part: tuple[slice, ...]) -> np.ndarray:
        """Return which elements of the memory a part of the tensor covers."""
        offset = np.full((), self.pointer.offset)
        for run, stride in zip(part, self.strides, strict=True):
            offset = offset[..., None] + np.arange(run.start, run.stop) * stride
        return offset.ravel()


class Product:
    """A product by wgmma that is not waited for: its value must not be touched."""

    def __init__(self, value: Tile, event: int) -> None:
        self.__dict__.update(value=value, event=event)

    def __getattr__(self, name: str) -> object:
        raise LaneFault(f"`.{name}` of a product is used before warpgroup_mma_wait")

    def _touched(self, *_: object) -> object:
        raise LaneFault("a product is computed with before warpgroup_mma_wait")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _touched
    __truediv__ = __rtruediv__ = __neg__ = __getitem__ = __bool__ = _touched
    __lt__ = __le__ = __gt__ = __ge__ = _touched


def barriers(machine: Machine, name: str, shape: list[int]) -> Barriers:
    """Return mbarriers of a shape."""
    if len(shape) == 1:
        return Barriers([Mbarrier(machine, f"{name}[{i}]") for i in range(shape[0])])
    return Barriers([barriers(machine, f"{name}[{i}]", shape[1:]) for i in range(shape[0])])
