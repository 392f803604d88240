"""Values of a Gluon kernel on the CPU: scalars, tiles in registers, pointers.

They compute as Triton does where Python or PyTorch would not: integer division truncates, integers
are 32 bits wide unless one is 64, tiles of different rank do not broadcast, float8 saturates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton.language as tl

from sdvg_kernels._gluon.machine import Global, LaneFault

TO_TORCH = {
    tl.int1: torch.bool,
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
TO_TRITON = {there: here for here, there in TO_TORCH.items()}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def torch_dtype(dtype: tl.dtype) -> torch.dtype:
    """Return PyTorch's name of a type."""
    if dtype not in TO_TORCH:
        raise LaneFault(f"the lane has no type {dtype}")
    return TO_TORCH[dtype]


def cast(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `data` in another type, as the GPU converts it."""
    if dtype in _FLOAT8 and data.is_floating_point():
        limit = torch.finfo(dtype).max
        return data.float().clamp(-limit, limit).to(dtype)
    return data.to(dtype)


# what a GPU makes of an integer that is divided by zero: no trap, and no use
_GARBAGE = -559038737


def _quotient(a: int, b: int) -> int:
    """Return a / b, truncated."""
    if b == 0:
        return _GARBAGE
    magnitude = abs(a) // abs(b)
    return magnitude if (a < 0) == (b < 0) else -magnitude


# --- scalars ---


class Int(int):
    """An integer that is known at run time: 32 or 64 bits, or one (a truth value)."""

    dtype: tl.dtype

    def __new__(cls, value: int, dtype: tl.dtype = tl.int32) -> Int:
        bits = dtype.primitive_bitwidth
        if bits >= 32 and not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise LaneFault(f"the integer {int(value)} does not fit into {dtype}")
        found = super().__new__(cls, value)
        found.dtype = dtype
        return found

    def to(self, dtype: tl.dtype, *_: object, **__: object) -> Int | Float:
        """Return it in another type."""
        if dtype.is_floating():
            return Float(self)
        return Int(bool(self), dtype) if dtype == tl.int1 else Int(int(self), dtype)

    cast = to

    def __invert__(self) -> Int:
        return Int(not self, tl.int1) if self.dtype == tl.int1 else Int(~int(self), self.dtype)

    def __neg__(self) -> Int:
        return Int(-int(self), self.dtype)

    def __index__(self) -> int:
        return int(self)

    def __hash__(self) -> int:
        return hash(int(self))


class Float(float):
    """A float that is known at run time."""

    dtype = tl.float32

    def to(self, dtype: tl.dtype, *_: object, **__: object) -> Float | Int:
        """Return it in another type."""
        if not dtype.is_floating():
            return Int(int(self), dtype)
        return Float(torch.tensor(float(self)).to(torch_dtype(dtype)).item())

    cast = to


def _wide(a: object, b: object) -> tl.dtype:
    wide = any(getattr(x, "dtype", None) == tl.int64 or abs(x) >= 2**31 for x in (a, b))
    return tl.int64 if wide else tl.int32


def _scalar(name: str, a: object, b: object) -> object:
    """Return the scalar result of an operator."""
    if isinstance(a, float) or isinstance(b, float):
        if name == "truediv" and b == 0:
            return Float(float("nan") if a == 0 else float("inf") * (1 if a > 0 else -1))
        found = getattr(operator, name)(float(a), float(b))
        return Int(found, tl.int1) if isinstance(found, bool) else Float(found)
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        return Int(getattr(operator, name)(int(a), int(b)), tl.int1)
    if name == "truediv":
        return Float(int(a) / int(b))
    if name == "floordiv":
        return Int(_quotient(int(a), int(b)), _wide(a, b))
    if name == "mod":
        return Int(int(a) - int(b) * _quotient(int(a), int(b)), _wide(a, b))
    truth = all(isinstance(x, bool) or getattr(x, "dtype", None) == tl.int1 for x in (a, b))
    if name in ("and_", "or_", "xor") and truth:
        return Int(getattr(operator, name)(bool(a), bool(b)), tl.int1)
    return Int(getattr(operator, name)(int(a), int(b)), _wide(a, b))


# --- tiles ---


class Tile:
    """A tile in registers, [shape]."""

    def __init__(self, data: torch.Tensor, layout: object = None) -> None:
        self.data = data
        self.layout = layout

    @property
    def dtype(self) -> tl.dtype:
        """Return its Triton type."""
        return TO_TRITON[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        """Return its shape."""
        return list(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        """Return what `x.type` tells a kernel."""
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype)

    def to(self, dtype: tl.dtype, bitcast: bool = False, **_: object) -> Tile:
        """Return it in another type."""
        if bitcast:
            return Tile(self.data.view(torch_dtype(dtype)), self.layout)
        return Tile(cast(self.data, torch_dtype(dtype)), self.layout)

    cast = to

    def reshape(self, *shape: object) -> Tile:
        """Return it in another shape."""
        sizes = shape[0] if isinstance(shape[0], list | tuple) else shape
        return Tile(self.data.reshape([int(size) for size in sizes]))

    def __getitem__(self, index: object) -> Tile:
        index = index if isinstance(index, tuple) else (index,)
        if any(part is not None and part != slice(None) for part in index):
            raise LaneFault(f"a tile is indexed with {index}: only `:` and `None` are known")
        return Tile(self.data[index])

    def __bool__(self) -> bool:
        raise LaneFault(f"a tile of shape {self.shape} is used as one truth value")

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.layout)

    def __invert__(self) -> Tile:
        return Tile(~self.data, self.layout)

    def __getattr__(self, name: str) -> object:
        raise LaneFault(f"the lane knows no `.{name}` of a tile")

    __hash__ = None


def _operands(a: object, b: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as tensors of one type, with scalars as weak as Triton has them."""
    if isinstance(a, Tile) and isinstance(b, Tile):
        if a.data.ndim != b.data.ndim:
            raise LaneFault(f"tiles of shapes {a.shape} and {b.shape} do not broadcast")
        dtype = torch.promote_types(a.data.dtype, b.data.dtype)
        return a.data.to(dtype), b.data.to(dtype)
    tile, other = (a, b) if isinstance(a, Tile) else (b, a)
    if not isinstance(other, int | float):
        raise LaneFault(f"a tile meets {other!r}")
    dtype = tile.data.dtype
    if isinstance(other, float) and not dtype.is_floating_point:
        dtype = torch.float32
    elif dtype == torch.bool and not (isinstance(other, bool) or _is_truth(other)):
        dtype = torch.int32
    elif dtype == torch.int32 and _wide(other, 0) == tl.int64:
        dtype = torch.int64
    plain = float(other) if isinstance(other, float) else int(other)
    single = torch.tensor(plain).to(dtype)
    whole = tile.data.to(dtype)
    return (whole, single) if tile is a else (single, whole)


def _is_truth(x: object) -> bool:
    return isinstance(x, Int) and x.dtype == tl.int1


def _whole_quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    zero = b == 0
    quotient = torch.div(a, b.masked_fill(zero, 1), rounding_mode="trunc")
    return quotient.masked_fill(zero, _GARBAGE)


_TORCH: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.div,
    "floordiv": _whole_quotient,
    "mod": lambda a, b: a - b * _whole_quotient(a, b),
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and_": torch.bitwise_and,
    "or_": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}


def binary(name: str, a: object, b: object) -> object:
    """Return `a <name> b` for scalars and tiles."""
    if not isinstance(a, Tile) and not isinstance(b, Tile):
        return _scalar(name, a, b)
    left, right = _operands(a, b)
    if left.dtype in _FLOAT8:
        raise LaneFault("float8 has no arithmetic: convert it first")
    layout = a.layout if isinstance(a, Tile) else b.layout
    if name in ("add", "sub", "mul", "lshift") and left.dtype == torch.int32:
        exact = _TORCH[name](left.long(), right.long())
        if exact.numel() and not -(2**31) <= exact.min() <= exact.max() < 2**31:
            raise LaneFault(f"an int32 tile overflows in {name}")
        return Tile(exact.int(), layout)
    if name == "truediv" and not left.is_floating_point():
        left, right = left.float(), right.float()
    return Tile(_TORCH[name](left, right), layout)


def _attach() -> None:
    """Give scalars and tiles their operators."""
    python = {"and_": "and", "or_": "or"}
    for name in _TORCH:
        stem = python.get(name, name)

        def forward(a: object, b: object, name: str = name) -> object:
            if b is None or isinstance(b, Pointer):
                return NotImplemented
            return binary(name, a, b)

        def backward(a: object, b: object, name: str = name) -> object:
            return binary(name, b, a)

        compares = name in ("lt", "le", "gt", "ge", "eq", "ne")
        for kind in (Int, Tile):
            setattr(kind, f"__{stem}__", forward)
            if not compares:
                setattr(kind, f"__r{stem}__", backward)
        if name in ("add", "sub", "mul", "truediv", *("lt", "le", "gt", "ge")):
            setattr(Float, f"__{stem}__", forward)
            if not compares:
                setattr(Float, f"__r{stem}__", backward)


# --- pointers ---


class Pointer:
    """A place in a tensor's memory, or a tile of places; offsets count elements."""

    def __init__(
        self, memory: torch.Tensor, watch: Global, name: str, offset: int | torch.Tensor
    ) -> None:
        self.memory, self.watch, self.name, self.offset = memory, watch, name, offset

    @property
    def dtype(self) -> SimpleNamespace:
        """Return what `pointer.dtype` tells a kernel."""
        return SimpleNamespace(element_ty=TO_TRITON[self.memory.dtype])

    @property
    def shape(self) -> list[int]:
        """Return the shape of the tile of places."""
        return list(self.offset.shape) if isinstance(self.offset, torch.Tensor) else []

    def _moved(self, by: object, sign: int) -> Pointer:
        if isinstance(by, Tile):
            by = by.data.long()
            if isinstance(self.offset, torch.Tensor) and by.ndim != self.offset.ndim:
                raise LaneFault(
                    f"places {self.shape} and offsets {list(by.shape)} do not broadcast"
                )
        elif isinstance(by, int):
            by = int(by)
        else:
            raise LaneFault(f"a pointer is moved by {by!r}")
        return Pointer(self.memory, self.watch, self.name, self.offset + sign * by)

    def __add__(self, by: object) -> Pointer:
        return self._moved(by, 1)

    __radd__ = __add__

    def __sub__(self, by: object) -> Pointer:
        return self._moved(by, -1)

    def __getitem__(self, index: object) -> Pointer:
        tile = Tile(torch.as_tensor(self.offset))[index]
        return Pointer(self.memory, self.watch, self.name, tile.data)


_attach()
