"""`preprocess_frames` in eager PyTorch: the definition of truth, and the op's CPU implementation.

The resize is Pillow's: along a row, then along a column, each a sum of whole grey levels times
fixed-point weights,

    out = clip((sum_i level[first + i] * weight[i] + 2^21) >> 22, 0, 255)

where weight[i] = round(2^22 k(i) / sum k), k(i) = bicubic((first + i + 0.5 - centre) / stretch),
a = -0.5, centre = (output + 0.5) * size_in / size_out, stretch = max(1, size_in / size_out); taps
reach 2 * stretch to both sides of the centre. Only outputs inside the crop are computed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# 32 bits less 8 of a grey level and 2 of headroom: weights reach beyond 1, and below 0
PRECISION = 22


class Axis(NamedTuple):
    """One direction of the resize: `size_in` pixels become `size_out`, of which a part is kept."""

    size_in: int
    size_out: int
    # the outputs kept: [start, start + count)
    start: int
    count: int

    @property
    def stretch(self) -> float:
        """How many input pixels an output pixel stands for, at least 1."""
        return max(1.0, self.size_in / self.size_out)


@functools.lru_cache(64)
def axes(height: int, width: int, size: int) -> tuple[Axis, Axis]:
    """Return (vertical, horizontal): the short side becomes `size`, the middle is kept.

    As torchvision's Resize and CenterCrop: the long side is rounded down, the crop's start to the
    nearest, halves to even.
    """
    found = []
    for own, other in ((height, width), (width, height)):
        full = size if own <= other else size * own // other
        found.append(Axis(own, full, round((full - size) / 2), size))
    return found[0], found[1]


@functools.lru_cache(64)
def taps(axis: Axis, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return first [count] int64, the first input of each output, and weights [count, taps] int32.

    Made on the CPU and kept on `device`. Taps past the last input have weight 0.
    """
    scale = axis.size_in / axis.size_out
    reach = 2.0 * axis.stretch
    outputs = torch.arange(axis.start, axis.start + axis.count, dtype=torch.float64)
    centre = (outputs + 0.5) * scale
    # both ends are at least 0 before they lose their fraction
    first = (centre - reach + 0.5).clamp(min=0).long()
    end = (centre + reach + 0.5).long().clamp(max=axis.size_in)
    most = int((end - first).max())
    index = first[:, None] + torch.arange(most)
    distance = (index - centre[:, None] + 0.5).abs() * (1.0 / axis.stretch)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * -0.5 + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(index < end[:, None], weights, 0.0)
    weights = weights / weights.sum(1, keepdim=True) * 2**PRECISION
    # halves away from zero
    weights = (weights.abs() + 0.5).floor().copysign(weights).int()
    return first.to(device), weights.to(device)


@functools.lru_cache(64)
def levels(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return what each grey level of each channel becomes, [3, 256], kept on `device`.

    Made on the CPU in float32, as torchvision's ToTensor and Normalize do, and rounded once.
    """
    wide = torch.promote_types(dtype, torch.float32)
    grey = torch.arange(256, dtype=wide) / 255
    parts = [(grey - torch.tensor(m, dtype=wide)) / s for m, s in zip(mean, std, strict=True)]
    return torch.stack(parts).to(device, dtype)


def to_grey(video: torch.Tensor) -> torch.Tensor:
    """Return the grey levels 0 to 255 of values in [-1, 1], int32; NaN is black.

    As diffusers' video processor: halved and shifted in the tensor's own dtype, then float32 times
    255, rounded to the nearest, halves to even.
    """
    unit = (video * 0.5 + 0.5).clamp(0, 1)
    wide = torch.promote_types(video.dtype, torch.float32)
    return (unit.to(wide) * 255).round().nan_to_num(0.0).int()


def resize(grey: torch.Tensor, vertical: Axis, horizontal: Axis) -> torch.Tensor:
    """Return grey levels [..., H, W] int32 resized and cropped, [..., count, count] int32."""
    return _resize_rows(_resize_rows(grey, horizontal).mT, vertical).mT


def _resize_rows(grey: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Return grey levels [..., size_in] int32 resized along the last dim, [..., count] int32."""
    first, weights = taps(axis, grey.device)
    total = grey.new_full((*grey.shape[:-1], axis.count), 1 << (PRECISION - 1))
    for i in range(weights.shape[1]):
        # past the last input the weight is 0
        index = (first + i).clamp(max=axis.size_in - 1)
        total += grey.index_select(-1, index) * weights[:, i]
    return (total >> PRECISION).clamp(0, 255)


def preprocess_frames(
    video: torch.Tensor,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return [B, F, 3, size, size] in `dtype` from a video [B, 3, F, H, W] in [-1, 1]."""
    vertical, horizontal = axes(*video.shape[3:], size)
    # [B, F, 3, H, W]
    small = resize(to_grey(video).transpose(1, 2), vertical, horizontal)
    table = levels(mean, std, dtype, video.device)
    channel = torch.arange(3, device=video.device)[:, None, None]
    return table[channel, small].contiguous()
