"""Loops that decode grids of tokens, and what they take and give."""

from sdvg.tokens.diagonal import DiagonalDecoder, Frame, Generation, Layout, Sampling

__all__ = ["DiagonalDecoder", "Frame", "Generation", "Layout", "Sampling"]
