"""`rms_norm_silu` in eager PyTorch: the definition of truth, and the op's CPU implementation.

    total = x + bias + residual
    out   = SiLU(total / max(||total||, 1e-12) * sqrt(C) * weight)

Arithmetic is float32, and float64 where x is float64; the sum is rounded to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# of `F.normalize`: a row of zeros stays zero
EPS = 1e-12


def rms_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    silu: bool,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write total where it is not None, and out, [B, N, C] each."""
    wide = torch.promote_types(x.dtype, torch.float32)
    summed = x.to(wide)
    for added in (bias, residual):
        if added is not None:
            summed = summed + added.to(wide)
    # the norm sees what is stored
    summed = summed.to(x.dtype).to(wide)
    if total is not None:
        total.copy_(summed)
    # `vector_norm` would walk the channels of a row one by one on a CPU
    length = summed.square().sum(-1, keepdim=True).sqrt().clamp_min(EPS)
    normed = summed * (x.shape[-1] ** 0.5 / length) * weight.to(wide)
    out.copy_(F.silu(normed, inplace=True) if silu else normed)
