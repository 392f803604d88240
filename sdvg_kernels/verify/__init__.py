"""Decisions: which drafted blocks are kept."""

from sdvg_kernels.verify.api import route_blocks

__all__ = ["route_blocks"]
