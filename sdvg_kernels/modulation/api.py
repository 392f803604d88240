"""Adaptive LayerNorm and gated residual, with one row of modulation for each frame."""

from __future__ import annotations

import functools
import logging

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import by_preference, message, require_implementation, triton_reason
from sdvg_kernels.modulation import reference

# [B, F, C], or that and a [C] that is added to each of its rows
Modulation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# a row lies in registers: what a program of the widest launch holds (config.py)
MAX_WIDTH = 8192
_LOG = logging.getLogger("sdvg_kernels")


def modulated_layer_norm(
    x: torch.Tensor,
    shift: Modulation | None = None,
    scale: Modulation | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """LayerNorm over the channels, scaled and shifted by frame.

    Equals, in float32 and rounded once,

        normed = F.layer_norm(x.float(), [C], weight, bias, eps)
        normed.unflatten(1, (F, -1)) * (1 + scale[:, :, None]) + shift[:, :, None]

    Token `t` belongs to frame `t // (T / F)`. A pair `(rows, table)` stands for `rows + table`:
    Wan adds each block's table [6, C] to the timestep's [B, F, 6, C], and here that sum is never
    written. There is no backward.

    Args:
        x: [B, T, C] bfloat16, float16, float32 (the reference: float64 too), contiguous in C.
        shift, scale: [B, F, C], F dividing T, floating, contiguous in C (other strides any, 0 too);
            or a pair of that and a [C]. Both or neither.
        weight, bias: [C] floating, contiguous; both or neither.
        eps: added to the variance.
        dtype: of the output; None: x's.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA up to 8192 channels, else the reference, and a warning is logged.

    Returns:
        [B, T, C] in `dtype`, contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: DiT's adaLN (arXiv 2212.09748), Wan's blocks (arXiv 2503.20314).
    Cost: x is read once and the output written once; the modulation comes from the caches.
    """
    op = "modulated_layer_norm"
    _check_rows(op, "x", x)
    shifts, scales = _check_modulation(op, x, {"shift": shift, "scale": scale})
    _check_norm(op, x, shift, scale, weight, bias)
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(message(op, "dtype", "be floating", dtype))
    chosen = _choose(op, implementation, x, dtype)
    arguments = (x, *shifts, *scales, weight, bias, eps, dtype, chosen)
    return torch.ops.sdvg_kernels.modulated_layer_norm(*arguments)


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None = None,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """The residual stream x plus a branch y, gated by frame.

    Equals `x + y.unflatten(1, (F, -1)) * gate[:, :, None]` in float32, rounded once; without a
    gate, `x + y`.

    Args:
        x: [B, T, C] bfloat16, float16, float32 (the reference: float64 too), contiguous in C.
        y: of x's shape; its dtype may be another (Wan may keep the stream in float32).
        gate: [B, F, C] or a pair, as in `modulated_layer_norm`.
        implementation: as in `modulated_layer_norm`.

    Returns:
        [B, T, C] in x's dtype, contiguous.

    Raises, guarantees and source: as for `modulated_layer_norm`.
    Cost: x and y are read once and the output written once.
    """
    op = "gated_residual"
    _check_rows(op, "x", x)
    _check_branch(op, x, y)
    (gates,) = _check_modulation(op, x, {"gate": gate})
    chosen = _choose(op, implementation, x, y.dtype)
    return torch.ops.sdvg_kernels.gated_residual(x, y, *gates, chosen)


def gated_residual_layer_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None = None,
    shift: Modulation | None = None,
    scale: Modulation | None = None,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated residual and the next norm of it, in one pass.

    Equals `residual = gated_residual(x, y, gate)` and `modulated_layer_norm(residual, shift,
    scale, ...)`: the norm is of the residual as it is rounded to x's dtype.

    Args:
        x, y, gate: as in `gated_residual`.
        shift, scale, weight, bias, eps: as in `modulated_layer_norm`; F is gate's.
        dtype: of the norm; None: y's, what the next product computes in.
        implementation: as in `modulated_layer_norm`.

    Returns:
        (residual [B, T, C] in x's dtype, norm [B, T, C] in `dtype`), both contiguous.

    Raises, guarantees and source: as for `modulated_layer_norm`.
    Cost: x and y are read once, both outputs written once; the residual is not read back.
    """
    op = "gated_residual_layer_norm"
    _check_rows(op, "x", x)
    _check_branch(op, x, y)
    given = {"gate": gate, "shift": shift, "scale": scale}
    gates, shifts, scales = _check_modulation(op, x, given)
    _check_norm(op, x, shift, scale, weight, bias)
    dtype = y.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(message(op, "dtype", "be floating", dtype))
    chosen = _choose(op, implementation, x, dtype)
    arguments = (x, y, *gates, *shifts, *scales, weight, bias, eps, dtype, chosen)
    return torch.ops.sdvg_kernels.gated_residual_layer_norm(*arguments)


def _check_rows(op: str, name: str, rows: torch.Tensor) -> None:
    """Raise unless `rows` is [B, T, C], floating and dense in C."""
    shape = rows.shape
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(message(op, name, "be [B, T, C] with at least one channel", shape))
    if not rows.dtype.is_floating_point:
        raise TypeError(message(op, name, "be floating", rows.dtype))
    if rows.stride(2) != 1 and shape[2] > 1:
        rule, remedy = "be contiguous in the last dim", "call .contiguous()"
        raise ValueError(message(op, name, rule, f"stride {rows.stride(2)}", remedy))


def _check_branch(op: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise unless `y` has x's shape and device, is floating and dense in C."""
    if y.shape != x.shape:
        raise ValueError(message(op, "y", "have x's shape", y.shape))
    _check_rows(op, "y", y)
    if y.device != x.device:
        raise ValueError(message(op, "y", "be on x's device", y.device))


def _check_modulation(
    op: str, x: torch.Tensor, given: dict[str, Modulation | None]
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return (rows, table) for each name; raise unless they fit x and one another."""
    batch, tokens, width = x.shape
    device = x.device
    expected, pairs = None, []
    for name, value in given.items():
        if value is None:
            pairs.append((None, None))
            continue
        rows, table = value if isinstance(value, tuple) else (value, None)
        _check_rows(op, name, rows)
        shape = rows.shape
        if expected is None:
            frames = shape[1]
            if frames == 0 or tokens % frames:
                rule = f"have a number of frames that divides x's {tokens} tokens"
                raise ValueError(message(op, name, rule, shape))
            expected = (batch, frames, width)
        if shape != expected:
            raise ValueError(message(op, name, f"be {list(expected)}", shape))
        if rows.device != device:
            raise ValueError(message(op, name, "be on x's device", rows.device))
        if table is not None:
            _check_vector(op, name, table, width, device, part="[1]")
        pairs.append((rows, table))
    return pairs


def _check_norm(
    op: str,
    x: torch.Tensor,
    shift: Modulation | None,
    scale: Modulation | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raise unless shift and scale, and weight and bias, come together and fit x."""
    if (shift is None) != (scale is None):
        given = "None" if scale is None else "no shift"
        raise ValueError(message(op, "scale", "be given together with shift", given))
    if (weight is None) != (bias is None):
        given = "None" if bias is None else "no weight"
        raise ValueError(message(op, "bias", "be given together with weight", given))
    if weight is not None and bias is not None:
        _check_vector(op, "weight", weight, x.shape[2], x.device)
        _check_vector(op, "bias", bias, x.shape[2], x.device)


def _check_vector(
    op: str, name: str, vector: torch.Tensor, width: int, device: torch.device, part: str = ""
) -> None:
    """Raise unless `vector`, `part` of an argument, is a contiguous floating [C] on `device`."""
    if vector.shape != (width,) or not vector.is_contiguous():
        got = f"{list(vector.shape)} of stride {list(vector.stride())}"
        raise ValueError(message(op, name + part, f"be a contiguous [{width}]", got))
    if not vector.dtype.is_floating_point:
        raise TypeError(message(op, name + part, "be floating", vector.dtype))
    if vector.device != device:
        raise ValueError(message(op, name + part, "be on x's device", vector.device))


def _choose(op: str, implementation: str | None, x: torch.Tensor, dtype: torch.dtype) -> str:
    """Return which implementation runs; a reference that nobody asked for is logged once."""
    device, width = x.device.type, x.shape[2]
    available = _available(device, width, x.dtype, dtype)
    if implementation is None:
        chosen = next(iter(available))
        if not (reason := available[chosen]):
            return chosen
        _warn_once(op, device, reason)
    where = f"{device} tensors of {width} channels and {x.dtype}"
    return require_implementation(op, implementation, available, where)


@functools.cache
def _available(device: str, width: int, *dtypes: torch.dtype) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device)
    if not reason and width > MAX_WIDTH:
        reason = f"the Triton kernel has at most {MAX_WIDTH} channels"
    for dtype in dtypes:
        if not reason and dtype not in DTYPES:
            reason = f"the Triton kernel has no {dtype}"
    return by_preference(device, reason)


@functools.cache
def _warn_once(op: str, device: str, reason: str) -> None:
    _LOG.warning("%s: the reference serves %s tensors here: %s", op, device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda", 1536, torch.bfloat16))
    return {"triton": "no CUDA device is available", "reference": ""}


_Vector = torch.Tensor | None


def _run_norm(
    x: torch.Tensor,
    shift: _Vector,
    shift_table: _Vector,
    scale: _Vector,
    scale_table: _Vector,
    weight: _Vector,
    bias: _Vector,
    eps: float,
    dtype: torch.dtype,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation of `modulated_layer_norm`."""
    vectors = (shift, shift_table, scale, scale_table, weight, bias)
    if implementation == "reference":
        return reference.modulated_layer_norm(x, *vectors, eps=eps, dtype=dtype)
    from sdvg_kernels.modulation import kernel

    return kernel.modulated_layer_norm(x, *vectors, eps=eps, dtype=dtype)


def _run_residual(
    x: torch.Tensor, y: torch.Tensor, gate: _Vector, gate_table: _Vector, implementation: str
) -> torch.Tensor:
    """Run the chosen implementation of `gated_residual`."""
    if implementation == "reference":
        return reference.gated_residual(x, y, gate, gate_table)
    from sdvg_kernels.modulation import kernel

    return kernel.gated_residual(x, y, gate, gate_table)


def _run_both(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: _Vector,
    gate_table: _Vector,
    shift: _Vector,
    shift_table: _Vector,
    scale: _Vector,
    scale_table: _Vector,
    weight: _Vector,
    bias: _Vector,
    eps: float,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation of `gated_residual_layer_norm`."""
    vectors = (shift, shift_table, scale, scale_table, weight, bias)
    if implementation == "reference":
        residual = reference.gated_residual(x, y, gate, gate_table)
        normed = reference.modulated_layer_norm(residual, *vectors, eps=eps, dtype=dtype)
        return residual, normed
    from sdvg_kernels.modulation import kernel

    return kernel.gated_residual_layer_norm(x, y, gate, gate_table, *vectors, eps=eps, dtype=dtype)


_ops.implement("modulated_layer_norm", cpu=_run_norm, cuda=_run_norm)
_ops.implement("gated_residual", cpu=_run_residual, cuda=_run_residual)
_ops.implement("gated_residual_layer_norm", cpu=_run_both, cuda=_run_both)
