"""`quantize_rows` in eager PyTorch: the definition of truth, and the op's CPU implementation.

y = activation(float32(x))
scale = max |y| / 448        value = e4m3(y * (448 / max |y|))        of each row
"""

from __future__ import annotations

import math

import torch

E4M3_MAX = 448.0
# a row that reaches no further is a row of zeros
TINY = 2.0**-100


def quantize_rows(x: torch.Tensor, activation: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values [N, K] e4m3, scales [N, 1] float32)."""
    wide = x.float()
    if activation == "gelu_tanh":
        # x sigmoid(2 u) is x (1 + tanh(u)) / 2, with no difference of near numbers
        u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
        wide = wide * torch.sigmoid(2 * u)
    largest = wide.abs().amax(1, keepdim=True)
    holds = ~(largest < TINY)
    scale = torch.where(holds, largest * (1 / E4M3_MAX), 1.0)
    # torch divides a number by a tensor in two roundings
    inverse = torch.where(holds, torch.full_like(largest, E4M3_MAX) / largest, 1.0)
    lost = ~largest.isfinite()
    scale, inverse = (row.masked_fill(lost, torch.nan) for row in (scale, inverse))
    scaled = (wide * inverse).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn), scale
