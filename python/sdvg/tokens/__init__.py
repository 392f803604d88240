"""Loops that decode grids of tokens, and what they take and give."""

from sdvg.tokens.diagonal import DiagonalDecoder, Frame, Generation, Layout, Sampling
from sdvg.tokens.jacobi import JacobiDecoder

__all__ = ["DiagonalDecoder", "Frame", "Generation", "JacobiDecoder", "Layout", "Sampling"]
