"""The GPU that tensors lie on: where Triton launches, and what it has."""

from __future__ import annotations

import contextlib
import functools

import torch


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which Triton launches on `device`; another GPU may be the current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors there are; 1 for a CPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
