"""Attention of a chain and a token tree over a cache, by a bit-packed mask."""

from sdvg_kernels.masked.api import tree_attention

__all__ = ["tree_attention"]
