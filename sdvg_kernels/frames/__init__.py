"""Decoded frames to scorer input: 8 bits, resize as Pillow does it, centre crop, normalise."""

from sdvg_kernels.frames.api import preprocess_frames

__all__ = ["preprocess_frames"]
