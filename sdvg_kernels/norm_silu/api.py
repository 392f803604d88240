"""`rms_norm_silu`: RMS norm over the channels and SiLU, written where the next product reads."""

from __future__ import annotations

import functools
import logging

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import by_preference, message, require_implementation, triton_reason
from sdvg_kernels.norm_silu import config, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OP = "rms_norm_silu"
_LOG = logging.getLogger("sdvg_kernels")


def rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = True,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """SiLU of the RMS norm over the channels of x, or of x plus what is added to it.

    Equals, in float32 and rounded once (the sum is rounded to x's dtype before the norm),

        total = x + bias + residual
        out = F.silu(F.normalize(total.float(), dim=-1) * sqrt(C) * weight)

    A row of zeros stays zero. One with NaN becomes NaN, one with an infinity zero but there.
    There is no backward.

    Args:
        x: [B, N, C] bfloat16, float16, float32 (the reference: float64 too), contiguous in C. A
            channels-last video [B, C, F, H, W] is `video.permute(0, 2, 3, 4, 1).flatten(1, 3)`.
        weight: [C] floating, contiguous.
        bias: [C] floating, contiguous, added to each row: of the convolution that made x.
        residual: [B, N, C] of x's dtype, contiguous in C, added row by row.
        silu: False: the norm alone.
        total: [B, N, C] of x's dtype, contiguous in C; the sum is written there.
        out: [B, N, C] floating, contiguous in C: part of a convolution's padded input, say. None: a
            new tensor of x's dtype.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA up to 8192 channels, else the reference, and a warning is logged.

    Returns:
        out, [B, N, C].

    Mutates: total and out, which must overlap nothing else that is given.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Wan's VAE (arXiv 2503.20314): `WanRMS_norm` and the activation behind it.
    Cost: x and residual are read once, total and out are written once.
    """
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(message(_OP, "x", "be [B, N, C] with at least one channel", shape))
    if not dtype.is_floating_point:
        raise TypeError(message(_OP, "x", "be floating", dtype))
    _check_dense("x", x)
    _check_vector("weight", weight, shape[2], device)
    if bias is not None:
        _check_vector("bias", bias, shape[2], device)
    for name, rows in (("residual", residual), ("total", total)):
        if rows is None:
            continue
        _check_rows(name, rows, x)
        if rows.dtype != dtype:
            raise TypeError(message(_OP, name, f"be {dtype}, as x is", rows.dtype))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        _check_rows("out", out, x)
        if not out.dtype.is_floating_point:
            raise TypeError(message(_OP, "out", "be floating", out.dtype))
    available = _available(device.type, shape[2], dtype, out.dtype)
    chosen = next(iter(available)) if implementation is None else implementation
    if reason := available.get(chosen, "unknown"):
        if implementation is None:
            _warn_once(device.type, reason)
        where = f"{device.type} tensors of {shape[2]} channels and {dtype}"
        chosen = require_implementation(_OP, implementation, available, where)
    torch.ops.sdvg_kernels.rms_norm_silu(x, weight, bias, residual, silu, total, out, chosen)
    return out


def _check_dense(name: str, rows: torch.Tensor) -> None:
    """Raise unless `rows` [B, N, C] is contiguous in C."""
    if rows.stride(2) != 1 and rows.shape[2] > 1:
        rule, remedy = "be contiguous in the last dim", "call .contiguous()"
        raise ValueError(message(_OP, name, rule, f"stride {rows.stride(2)}", remedy))


def _check_rows(name: str, rows: torch.Tensor, x: torch.Tensor) -> None:
    """Raise unless `rows` has x's shape and device and is contiguous in C."""
    if rows.shape != x.shape:
        raise ValueError(message(_OP, name, f"be {list(x.shape)}, as x is", rows.shape))
    if rows.device != x.device:
        raise ValueError(message(_OP, name, "be on x's device", rows.device))
    _check_dense(name, rows)


def _check_vector(name: str, vector: torch.Tensor, width: int, device: torch.device) -> None:
    """Raise unless `vector` is a contiguous floating [C] on `device`."""
    if vector.shape != (width,) or not vector.is_contiguous():
        got = f"{list(vector.shape)} of stride {list(vector.stride())}"
        raise ValueError(message(_OP, name, f"be a contiguous [{width}]", got))
    if not vector.dtype.is_floating_point:
        raise TypeError(message(_OP, name, "be floating", vector.dtype))
    if vector.device != device:
        raise ValueError(message(_OP, name, "be on x's device", vector.device))


@functools.cache
def _available(device: str, width: int, *dtypes: torch.dtype) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device)
    if not reason and width > config.MAX_WIDTH:
        reason = f"the Triton kernel has at most {config.MAX_WIDTH} channels"
    for dtype in dtypes:
        if not reason and dtype not in DTYPES:
            reason = f"the Triton kernel has no {dtype}"
    return by_preference(device, reason)


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    _LOG.warning("%s: the reference serves %s tensors here: %s", _OP, device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda", 96, torch.bfloat16))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    silu: bool,
    total: torch.Tensor | None,
    out: torch.Tensor,
    implementation: str,
) -> None:
    """Run the chosen implementation."""
    if implementation == "reference":
        run = reference.rms_norm_silu
    else:
        from sdvg_kernels.norm_silu import kernel

        run = kernel.rms_norm_silu
    run(x, weight, bias, residual, silu=silu, total=total, out=out)


_ops.implement("rms_norm_silu", cpu=_run, cuda=_run)
