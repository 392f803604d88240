"""Adaptive LayerNorm and gated residual, fused."""

from sdvg_kernels.modulation.api import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
)

__all__ = ["gated_residual", "gated_residual_layer_norm", "modulated_layer_norm"]
