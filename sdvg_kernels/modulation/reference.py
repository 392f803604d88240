"""The modulation ops in eager PyTorch: the definition of truth, and the op's CPU implementation.

    residual = x + y * (gate + gate_table)
    normed   = (LayerNorm(residual) * weight + bias) * (1 + scale + scale_table)
             + shift + shift_table

Arithmetic is float32, and float64 where x is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
) -> torch.Tensor:
    """Return x + y * gate, [B, T, C] in x's dtype; without a gate, x + y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    added = y.to(wide)
    if gate is not None:
        added = added * _per_token(gate, gate_table, y.shape[1], wide)
    return (x.to(wide) + added).to(x.dtype).contiguous()


def modulated_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the modulated norm of x, [B, T, C] in `dtype`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
    normed = F.layer_norm(x.to(wide), x.shape[2:], weight, bias, eps)
    if scale is not None and shift is not None:
        scale = _per_token(scale, scale_table, x.shape[1], wide)
        normed = normed * (1 + scale) + _per_token(shift, shift_table, x.shape[1], wide)
    return normed.to(dtype).contiguous()


def _per_token(
    rows: torch.Tensor, table: torch.Tensor | None, tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows [B, F, C] + table [C], each repeated for the tokens of its frame: [B, T, C]."""
    rows = rows.to(dtype)
    if table is not None:
        rows = rows + table.to(dtype)
    return rows.repeat_interleave(tokens // rows.shape[1], dim=1)
