"""What scorers of single images share: frames and prompts checked, frames made their input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdvg_kernels import preprocess_frames


def images_of(
    op: str,
    frames: Tensor,
    prompts: Sequence[str],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return frames `[B, N, 3, H, W]` in [0, 1] as CLIP's and ImageReward's input.

    `[B * N, 3, size, size]` in `dtype` on `device`, as PIL and torchvision would make it. Raises
    ValueError, which begins with `op`, for shapes that do not fit each other.
    """
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"{op}: frames must be [B, N, 3, H, W], got {list(frames.shape)}")
    if len(prompts) != len(frames) or isinstance(prompts, str):
        got = repr(prompts) if isinstance(prompts, str) else len(prompts)
        raise ValueError(
            f"{op}: prompts must be one for each of {len(frames)} sequences, got {got}"
        )
    video = frames.to(device, torch.float32).mul(2).sub(1).transpose(1, 2)
    return preprocess_frames(video, size, dtype=dtype).flatten(0, 1)
