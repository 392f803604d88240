"""Noise keyed by (seed, sequence, block, step): what ran before leaves no trace.

Drawn on the CPU from a counter-based generator (Philox 4x64; Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), so that a video is the same on every device and every batch
size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

# streams of one key: denoising steps count from 0, the others stay clear of them
ROUTER_STREAM = 2**32


def _generator(seed: int, sequence: int, block: int, stream: int) -> numpy.random.Generator:
    # the low counter word counts draws, the others name the stream
    counter = _words(0, stream, block, sequence)
    return numpy.random.Generator(numpy.random.Philox(counter=counter, key=_words(seed, 0)))


def _words(*values: int) -> numpy.ndarray:
    # a negative value wraps like a C cast; as a list, numpy would make one of 2**63 a float64
    return numpy.array([value % 2**64 for value in values], dtype=numpy.uint64)


def normal(
    shape: tuple[int, ...],
    *,
    seed: int | Sequence[int],
    sequences: tuple[int, ...],
    block: int,
    step: int,
) -> Tensor:
    """Standard normal float32 noise `[len(sequences), *shape]` on the CPU.

    `seed` is one for all, or one for each sequence.
    """
    rows = [
        _generator(own, sequence, block, step).standard_normal(shape, dtype=numpy.float32)
        for own, sequence in _keys(seed, sequences)
    ]
    return torch.from_numpy(numpy.stack(rows))


def uniform(*, seed: int | Sequence[int], sequences: tuple[int, ...], block: int) -> Tensor:
    """One uniform float64 in [0, 1) for each sequence, for routers that draw."""
    rows = [
        _generator(own, sequence, block, ROUTER_STREAM).random()
        for own, sequence in _keys(seed, sequences)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _keys(seed: int | Sequence[int], sequences: tuple[int, ...]) -> list[tuple[int, int]]:
    seeds = [seed] * len(sequences) if isinstance(seed, int) else seed
    return list(zip(seeds, sequences, strict=True))
