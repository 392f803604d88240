"""Fused attention over block-causal KV caches."""

from sdvg_kernels.attention.api import KeyBias, block_causal_attention, dense_attention

__all__ = ["KeyBias", "block_causal_attention", "dense_attention"]
