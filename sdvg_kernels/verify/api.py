"""`route_blocks`: which drafted blocks are kept, by the rewards of their frames, on the device."""

from __future__ import annotations

import functools
import math

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    by_preference,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.verify import reference

_OP = "route_blocks"
AGGREGATES = ("min", "mean")
_LARGEST = torch.finfo(torch.float32).max
_value = functools.partial(require, _OP)
_type = functools.partial(require_dtype, _OP)


def route_blocks(
    frame_rewards: torch.Tensor,
    tau: float,
    first: bool | torch.Tensor,
    aggregate: str = "min",
    *,
    return_score: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Accept a drafted block whose worst (or mean) frame reward reaches `tau`, unless it is first.

    Equals `(frame_rewards.float().amin(1) >= tau) & ~first` with `tau` rounded to float32. A NaN
    reward makes the score NaN, and a NaN score is rejected. The mean is summed in float64 and
    rounded once.

    Args:
        frame_rewards: [B, F] floating, any strides, `F >= 1`.
        tau: threshold, in the scorer's unit; -inf accepts all but NaN, inf only an infinite reward.
        first: True rejects every block; a [B] bool tensor on the same device rejects where True.
        aggregate: "min" (worst frame) or "mean".
        return_score: also return the aggregate.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns:
        accept [B] bool on the device; with `return_score`, (accept, score [B] float32).

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: SDVG, worst-frame aggregation and forced rejection of the first block.
    """
    shape = frame_rewards.shape
    good = len(shape) == 2 and shape[1] > 0
    _value(good, "frame_rewards", "be [B, F] with at least one frame", shape)
    dtype = frame_rewards.dtype
    _type(dtype.is_floating_point, "frame_rewards", "be floating", dtype)
    _value(not math.isnan(tau), "tau", "be a number", tau)
    _value(aggregate in AGGREGATES, "aggregate", "be 'min' or 'mean'", repr(aggregate))
    device = frame_rewards.device
    if isinstance(first, torch.Tensor):
        _type(first.dtype == torch.bool, "first", "be bool", first.dtype)
        _value(first.shape == shape[:1], "first", "be [B]", first.shape)
        _value(first.device == device, "first", "be on frame_rewards' device", first.device)
    available = _available(device.type)
    chosen = require_implementation(_OP, implementation, available, f"{device.type} tensors")
    per_sequence = isinstance(first, torch.Tensor)
    # beyond float32: what it rounds to
    tau = float(tau) if abs(tau) <= _LARGEST else math.copysign(math.inf, tau)
    accept, score = torch.ops.sdvg_kernels.route_blocks(
        frame_rewards,
        first if per_sequence else None,
        tau,
        not per_sequence and bool(first),
        aggregate,
        chosen,
    )
    return (accept, score) if return_score else accept


@functools.cache
def _available(device: str) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on `device`, in order of preference."""
    reason = triton_reason(device)
    return by_preference(device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    frame_rewards: torch.Tensor,
    first: torch.Tensor | None,
    tau: float,
    all_first: bool,
    aggregate: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation."""
    options = {"tau": tau, "all_first": all_first, "aggregate": aggregate}
    if implementation == "reference":
        return reference.route_blocks(frame_rewards, first, **options)
    from sdvg_kernels.verify import kernel

    return kernel.route_blocks(frame_rewards, first, **options)


_ops.implement("route_blocks", cpu=_run, cuda=_run)
