"""The small digit classifier behind both the judge and the reward, which share no data."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitClassifier(nn.Module):
    """Which digit is at the centre of brightness; class 10 is "no legible digit"."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width = width
        widths = (1, width, width, 2 * width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.hidden = nn.Linear(2 * width * 25, 64)
        self.head = nn.Linear(64, 11)

    def forward(self, grey: Tensor) -> Tensor:
        """Logits ``[N, 11]`` of frames ``[N, H, W]`` in [0, 1]."""
        x = crop(grey)[:, None]
        for i, layer in enumerate(self.layers):
            x = F.silu(layer(x))
            x = F.max_pool2d(x, 2) if i < 2 else x
        x = F.dropout(x.flatten(1), 0.3, self.training)
        return self.head(F.silu(self.hidden(x)))


def centroids(grey: Tensor) -> Tensor:
    """Centres of brightness ``[N, 2]`` (x, y), in pixels, of frames ``[N, H, W]``.

    The middle of the frame where all is dark.
    """
    light = (grey - 0.2).clamp(0)
    mass = light.sum((1, 2)).clamp(1e-6)
    y, x = (torch.arange(n, dtype=grey.dtype, device=grey.device) + 0.5 for n in grey.shape[1:])
    centre = torch.stack(((light.sum(1) * x).sum(1), (light.sum(2) * y).sum(1)), -1) / mass[:, None]
    dark = mass < 1e-3
    return torch.where(dark[:, None], centre.new_tensor([len(x), len(y)]) / 2, centre)


def crop(grey: Tensor, size: int = 20) -> Tensor:
    """``[N, size, size]`` around the centre of brightness, dark outside."""
    height, width = grey.shape[1:]
    offset = torch.arange(size, dtype=grey.dtype, device=grey.device) - (size - 1) / 2
    centre = centroids(grey)
    x = (centre[:, :1] + offset) * (2 / width) - 1
    y = (centre[:, 1:] + offset) * (2 / height) - 1
    grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
    return F.grid_sample(grey[:, None], grid, align_corners=False)[:, 0]
