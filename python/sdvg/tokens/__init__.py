"""Loops that decode grids of tokens, and what they take and give."""

from sdvg.tokens.diagonal import DiagonalDecoder, Frame, Generation, Layout, Sampling
from sdvg.tokens.jacobi import JacobiDecoder
from sdvg.tokens.skipping import Dynamic, Uniform
from sdvg.tokens.speculative import Exact, Relaxed, SpeculativeDecoder, Typical

__all__ = [
    "DiagonalDecoder",
    "Dynamic",
    "Exact",
    "Frame",
    "Generation",
    "JacobiDecoder",
    "Layout",
    "Relaxed",
    "Sampling",
    "SpeculativeDecoder",
    "Typical",
    "Uniform",
]
