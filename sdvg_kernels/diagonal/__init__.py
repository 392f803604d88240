"""Diagonal decoding: which tokens a pass feeds, what each one sees, and attention by that rule."""

from sdvg_kernels.diagonal.api import diagonal_attention, diagonal_mask
from sdvg_kernels.diagonal.schedule import DiagonalSchedule, TokenGrid, diagonal_schedule

__all__ = [
    "DiagonalSchedule",
    "TokenGrid",
    "diagonal_attention",
    "diagonal_mask",
    "diagonal_schedule",
]
