"""`preprocess_frames`: a decoder's frames as an image scorer wants them, on the GPU all along."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    by_preference,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.frames import reference

# CLIP's, which ImageReward uses too
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# how far Triton's kernel reduces a side: beyond, its sums could be inexact
MAX_REDUCTION = 10
_OP = "preprocess_frames"
_LOG = logging.getLogger("sdvg_kernels")
_value = functools.partial(require, _OP)
_type = functools.partial(require_dtype, _OP)


def preprocess_frames(
    video: torch.Tensor,
    size: int = 224,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Frames of a decoder as an image scorer's input: 8 bits, resized, cropped, normalised.

    Equals, for each frame, diffusers' `VideoProcessor` to 8-bit images and torchvision's

        Compose([Resize(size, BICUBIC), CenterCrop(size), ToTensor(), Normalize(mean, std)])

    of Pillow images, bit for bit:

    - to 8 bits: `(video * 0.5 + 0.5).clamp(0, 1)` in the video's own dtype, then in float32 times
      255 and rounded to the nearest, halves to even. NaN becomes black.
    - the short side becomes `size`, the long side `size * long / short` rounded down, by Pillow's
      antialiased bicubic: along rows, then along columns, to 8 bits each time, with weights of 22
      bits. (Pillow 13 takes the columns first where the height shrinks distinctly more than the
      width, of portrait frames only; here, as in Pillow 12 and before, the rows are always first.)
    - the crop begins at half the surplus, rounded, halves to even.
    - each grey level becomes `(level / 255 - mean) / std`, computed in float32.

    Only pixels that the crop sees are read. There is no backward.

    Args:
        video: [B, 3, F, H, W] bfloat16, float16, float32 (the reference: float64 too), in [-1, 1],
            any strides.
        size: pixels of the output's side, at least 1.
        mean, std: of the three channels, for values in [0, 1].
        dtype: of the output; None: the video's.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA unless a side is reduced more than tenfold, else the reference, and a
            warning is logged.

    Returns:
        [B, F, 3, size, size] in `dtype`, contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here),
        RuntimeError (the first call at a size, inside a graph's capture).

    Deterministic; no host synchronisation after the first call at a size, which copies small tables
    to the device; from then on safe in a CUDA graph.
    Source: ImageReward's and CLIP's preprocessing; Pillow's `Image.resize`.
    Cost: the cropped part of the video is read once, or a little more at the tiles' edges, and the
    output written once.
    """
    shape, given = video.shape, video.dtype
    _value(len(shape) == 5 and shape[1] == 3, "video", "be [B, 3, F, H, W]", shape)
    _value(shape[3] > 0 and shape[4] > 0, "video", "have at least one pixel", shape)
    _type(given.is_floating_point, "video", "be floating", given)
    _value(size >= 1, "size", "be at least 1", size)
    mean, std = tuple(mean), tuple(std)
    known = len(mean) == 3 and all(map(math.isfinite, mean))
    _value(known, "mean", "be three finite numbers", mean)
    known = len(std) == 3 and all(math.isfinite(value) and value > 0 for value in std)
    _value(known, "std", "be three finite numbers above 0", std)
    dtype = given if dtype is None else dtype
    _type(dtype.is_floating_point, "dtype", "be floating", dtype)
    device = video.device.type
    sides = reference.axes(shape[3], shape[4], size)
    tiny = sides[0].stretch > MAX_REDUCTION or sides[1].stretch > MAX_REDUCTION
    available = _available(device, tiny, given, dtype)
    chosen = next(iter(available)) if implementation is None else implementation
    if reason := available.get(chosen, "unknown"):
        if implementation is None:
            _warn_once(device, reason)
        where = f"{device} tensors of {shape[3]} x {shape[4]} and {given}"
        chosen = require_implementation(_OP, implementation, available, where)
    return torch.ops.sdvg_kernels.preprocess_frames(video, size, mean, std, dtype, chosen)


@functools.cache
def _available(device: str, tiny: bool, *dtypes: torch.dtype) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such a video, by preference."""
    reason = triton_reason(device)
    if not reason and tiny:
        reason = f"the Triton kernel reduces at most to one in {MAX_REDUCTION}"
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
        return dict(_available("cuda", False, torch.bfloat16))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    video: torch.Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation."""
    options = {"size": size, "mean": tuple(mean), "std": tuple(std), "dtype": dtype}
    if implementation == "reference":
        return reference.preprocess_frames(video, **options)
    from sdvg_kernels.frames import kernel

    return kernel.preprocess_frames(video, **options)


_ops.implement("preprocess_frames", cpu=_run, cuda=_run)
