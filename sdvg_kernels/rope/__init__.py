"""QK-RMSNorm, 3-D RoPE and the write into the KV cache, fused."""

from sdvg_kernels.rope.api import norm_rope, norm_rope_stage_, rope_table

__all__ = ["norm_rope", "norm_rope_stage_", "rope_table"]
