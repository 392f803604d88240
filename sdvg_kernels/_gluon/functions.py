"""The functions of `gl` that only compute: of tiles and scalars, tiles and scalars."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl

from sdvg_kernels._gluon.machine import LaneFault
from sdvg_kernels._gluon.values import TO_TRITON, Float, Int, Tile, binary, torch_dtype


def leaves(values: object) -> list[object]:
    """Return what nested tuples hold."""
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in leaves(value)]
    return [values]


def boxed(value: object) -> Int | Float:
    """Return a single value as a scalar."""
    if isinstance(value, torch.Tensor):
        kind = TO_TRITON[value.dtype]
        return Float(value.item()) if value.is_floating_point() else Int(value.item(), kind)
    if isinstance(value, bool):
        return Int(value, tl.int1)
    if isinstance(value, int):
        return Int(value, tl.int64 if abs(value) >= 2**31 else tl.int32)
    return Float(value)


def _full(shape: list[int], value: object, dtype: tl.dtype, layout: object = None) -> Tile:
    return Tile(torch.full([int(x) for x in shape], value, dtype=torch_dtype(dtype)), layout)


def _moved(value: Tile, layout: object) -> Tile:
    return Tile(value.data, layout)


def _flat(values: tuple[object, ...]) -> list[int]:
    return [int(x) for x in leaves(values)]


def _where(condition: object, x: object, y: object) -> object:
    tiles = [one for one in (condition, x, y) if isinstance(one, Tile)]
    if not tiles:
        return _chosen(x, y, bool(condition))
    if len({tile.data.ndim for tile in tiles}) > 1:
        raise LaneFault(f"gl.where of shapes {[tile.shape for tile in tiles]}")
    values = [one for one in (x, y) if isinstance(one, Tile)]
    if len(values) == 2:
        dtype = torch.promote_types(values[0].data.dtype, values[1].data.dtype)
    elif values:
        other = y if values[0] is x else x
        dtype = binary("add", values[0], other).data.dtype
    else:
        dtype = torch.tensor(float(x) if isinstance(y, float) else x).dtype
        dtype = {torch.int64: torch.int32, torch.float64: torch.float32}.get(dtype, dtype)
    x, y = ((one.data if isinstance(one, Tile) else torch.tensor(one)).to(dtype) for one in (x, y))
    taken = condition.data if isinstance(condition, Tile) else torch.tensor(bool(condition))
    return Tile(torch.where(taken.bool(), x, y), tiles[0].layout)


def _chosen(x: object, y: object, first: bool) -> Int | Float:
    """Return x or y as a scalar of the type that both have."""
    if isinstance(x, float) or isinstance(y, float):
        return Float(x if first else y)
    kinds = [boxed(one).dtype if not isinstance(one, Int) else one.dtype for one in (x, y)]
    return Int(x if first else y, max(kinds, key=lambda kind: kind.primitive_bitwidth))


def _extreme(
    tiles: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], scalars: Callable[..., object]
) -> Callable[..., object]:
    def extreme(x: object, y: object, propagate_nan: object = None) -> object:
        if not isinstance(x, Tile) and not isinstance(y, Tile):
            chosen = scalars(x, y)
            return _chosen(chosen, y if chosen is x else x, True)
        # a maximum that meets one NaN gives the other: fmax
        pair = binary("add", x, y)
        left, right = (
            (one.data if isinstance(one, Tile) else torch.tensor(one)).to(pair.data.dtype)
            for one in (x, y)
        )
        found = tiles(left, right)
        if found.is_floating_point() and propagate_nan is None:
            found = torch.where(left.isnan(), right, torch.where(right.isnan(), left, found))
        return Tile(found, pair.layout)

    return extreme


def _summed(dtype: torch.dtype) -> torch.dtype:
    small = (torch.bool, torch.int8, torch.uint8, torch.int16)
    return torch.int32 if dtype in small else dtype


def _reduction(work: Callable[..., torch.Tensor]) -> Callable[..., object]:
    def reduction(
        input: Tile, axis: int | None = None, keep_dims: bool = False, **other: object
    ) -> object:
        other.pop("return_indices_tie_break_left", None)
        if any(other.values()):
            raise LaneFault(f"the lane knows no reduction with {other}")
        data = input.data.flatten() if axis is None else input.data
        data = work(data, 0 if axis is None else axis)
        if keep_dims and axis is not None:
            data = data.unsqueeze(axis)
        return Tile(data) if data.ndim else boxed(data)

    return reduction


def _reduce(input: Tile, axis: int, combine_fn: Callable[..., object], **_: object) -> object:
    parts = [Tile(part) for part in input.data.unbind(axis)]
    while len(parts) > 1:
        parts = [combine_fn(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0] if parts[0].data.ndim else boxed(parts[0].data)


def _scan(input: Tile, axis: int, combine_fn: Callable[..., object], reverse: bool = False) -> Tile:
    parts = [Tile(part) for part in input.data.unbind(axis)]
    parts = parts[::-1] if reverse else parts
    for i in range(1, len(parts)):
        parts[i] = combine_fn(parts[i - 1], parts[i])
    parts = parts[::-1] if reverse else parts
    return Tile(torch.stack([part.data for part in parts], axis), input.layout)


def _elementwise(work: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    def elementwise(x: object) -> object:
        if isinstance(x, Tile):
            return Tile(work(x.data), x.layout)
        return boxed(work(torch.tensor(x)))

    return elementwise


def _static_assert(cond: object, msg: str = "") -> None:
    if not cond:
        raise LaneFault(f"gl.static_assert: {msg}")


# by the names of `gl`
FUNCTIONS: dict[str, object] = {
    "constexpr": lambda value: getattr(value, "value", value),
    "static_range": range,
    "num_ctas": lambda: 1,
    "arange": lambda start, end, layout=None: Tile(
        torch.arange(start, end, dtype=torch.int32), layout
    ),
    "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
    "full_like": lambda input, value, shape=None, dtype=None, layout=None: _full(
        shape or input.shape, value, dtype or input.dtype, layout or input.layout
    ),
    "zeros_like": lambda input, shape=None, dtype=None, layout=None: _full(
        shape or input.shape, 0, dtype or input.dtype, layout or input.layout
    ),
    "where": _where,
    "maximum": _extreme(torch.maximum, max),
    "minimum": _extreme(torch.minimum, min),
    "max": _reduction(lambda x, axis: x.amax(axis)),
    "min": _reduction(lambda x, axis: x.amin(axis)),
    "sum": _reduction(lambda x, axis: x.sum(axis, dtype=_summed(x.dtype))),
    "reduce": _reduce,
    "associative_scan": _scan,
    "cdiv": lambda x, div: binary("floordiv", binary("add", x, div - 1), div),
    "convert_layout": lambda value, layout, assert_trivial=False: _moved(value, layout),
    "set_auto_layout": _moved,
    "expand_dims": lambda input, axis: Tile(input.data.unsqueeze(axis)),
    "broadcast": lambda input, other: Tile(input.data.expand(other.data.shape)),
    "permute": lambda input, *dims: Tile(input.data.permute(_flat(dims))),
    "reshape": lambda input, *shape, can_reorder=False: input.reshape(*shape),
    "cast": lambda input, dtype, fp_downcast_rounding=None, bitcast=False: input.to(dtype, bitcast),
    "to_tensor": lambda x: x if isinstance(x, Tile | Int | Float) else boxed(x),
    "static_assert": _static_assert,
    "static_print": lambda *_, **__: None,
    "device_print": lambda *_, **__: None,
    "multiple_of": lambda input, values: input,
    "max_contiguous": lambda input, values: input,
    "max_constancy": lambda input, values: input,
    "fma": lambda x, y, z: binary("add", binary("mul", x, y), z),
    "add": lambda x, y, sanitize_overflow=True: binary("add", x, y),
    "sub": lambda x, y, sanitize_overflow=True: binary("sub", x, y),
    "mul": lambda x, y, sanitize_overflow=True: binary("mul", x, y),
    "fdiv": lambda x, y, ieee_rounding=False: binary("truediv", x, y),
    "div_rn": lambda x, y: binary("truediv", x, y),
}
FUNCTIONS |= {
    name: _elementwise(getattr(torch, name))
    for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "floor", "ceil", "erf")
}
