"""Sampling: from many rows of logits to token ids, by noise that is keyed."""

from sdvg_kernels.sampling.api import sample_tokens

__all__ = ["sample_tokens"]
