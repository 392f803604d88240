"""Attention of a chain and a token tree over a cache, by a bit-packed mask.

For now there is no kernel.py and no config.py: the reference serves every device.
"""

from sdvg_kernels.masked.api import tree_attention

__all__ = ["tree_attention"]
