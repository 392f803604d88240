"""`quantize_rows`: what a rowwise e4m3 product takes, made in one pass."""

from __future__ import annotations

import functools
import logging

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import by_preference, message, require_implementation, triton_reason
from sdvg_kernels.quantize import reference

_OP = "quantize_rows"
ACTIVATIONS = (None, "gelu_tanh")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG = logging.getLogger("sdvg_kernels")


def quantize_rows(
    x: torch.Tensor, *, activation: str | None = None, implementation: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in e4m3, each with the scale that undoes it, of x or of its activation.

    Equals, in float32 and rounded once, to nearest even,

        y = x.float()  or  F.gelu(x.float(), approximate="tanh")
        scales = y.abs().amax(1, keepdim=True) / 448
        values = (y / scales).to(torch.float8_e4m3fn)

    so that `values * scales` is y to 2^-4 of each value, or 2^-10 / 448 of the row's largest. What
    is rounded is `y * (448 / amax)`, both factors rounded to float32. A row that does not reach
    2^-100 is zeros of scale 1. A row with a NaN or an infinity (e4m3 has none) is NaN, and so is
    its scale.

    Args:
        x: [N, K] bfloat16, float16, float32 (the reference: float64 too, rounded to float32
            first), dense in K, any stride between rows.
        activation: None, or "gelu_tanh", which costs no pass of its own.
        implementation: "triton" (compute capability 8.9) or "reference"; one that is asked for
            never falls back. None: Triton where it runs, else the reference, and a warning is
            logged on CUDA.

    Returns:
        (values [N, K] float8_e4m3fn, scales [N, 1] float32), contiguous: the first two of what
        `torch._scaled_mm` takes rowwise.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: FP8 formats (arXiv 2209.05433), rowwise scaling as in torchao's float8 recipes.
    Cost: x is read once, up to 16384 wide (beyond, twice, then from L2); K + 4 bytes are written.
    """
    shape = x.shape
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(message(_OP, "x", "be [N, K] with at least one column", shape))
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise TypeError(message(_OP, "x", "be floating, of 16 bits or more", x.dtype))
    if x.stride(1) != 1 and shape[1] > 1:
        rule, remedy = "be contiguous in the last dim", "call .contiguous()"
        raise ValueError(message(_OP, "x", rule, f"stride {x.stride(1)}", remedy))
    if activation not in ACTIVATIONS:
        raise ValueError(message(_OP, "activation", "be None or 'gelu_tanh'", repr(activation)))
    chosen = _choose(implementation, x.device, x.dtype)
    return torch.ops.sdvg_kernels.quantize_rows(x, activation, chosen)


@functools.cache
def _choose(implementation: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return which implementation runs; a reference that nobody asked for is logged once."""
    available = _available(device, dtype)
    if implementation is None and (reason := next(iter(available.values()))):
        _LOG.warning("%s: the reference serves %s tensors here: %s", _OP, device.type, reason)
    return require_implementation(_OP, implementation, available, f"{device.type} {dtype}")


@functools.cache
def _available(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device.type)
    if not reason and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            reason = "e4m3 needs compute capability 8.9, this device has {}.{}".format(*capability)
    if not reason and dtype not in DTYPES:
        reason = f"the Triton kernel has no {dtype}"
    return by_preference(device.type, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    x: torch.Tensor, activation: str | None, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation."""
    if implementation == "reference":
        return reference.quantize_rows(x, activation)
    from sdvg_kernels.quantize import kernel

    return kernel.quantize_rows(x, activation)


_ops.implement(_OP, cpu=_run, cuda=_run)
