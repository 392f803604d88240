"""RMS norm over channels and SiLU, fused with what is added before: a video decoder's own chain."""

from sdvg_kernels.norm_silu.api import rms_norm_silu

__all__ = ["rms_norm_silu"]
