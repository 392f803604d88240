"""Verification skipping: the schedules, and what a codebook gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdvg.tokens import skipping
from sdvg.tokens.skipping import Dynamic, Uniform


def test_uniform_skips_every_interval_and_dynamic_never_twice() -> None:
    steps = torch.arange(7)

    def alike(decay: float, stride: int) -> Tensor:
        return torch.tensor([0.7, 0.6, 0.7, math.nan])

    skips = skipping.wants(Uniform(3), steps, torch.zeros(7, dtype=torch.bool), alike)
    assert skips.nonzero()[:, 0].tolist() == [1, 4]
    before = torch.tensor([False, False, True, False])
    skips = skipping.wants(Dynamic(0.65), steps[:4], before, alike)
    # what cannot be compared is verified
    assert skips.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Uniform(1), "interval must be at least 2, got 1"),
        (lambda: Uniform(2.5), "interval must be a whole number, got 2.5"),
        (lambda: Uniform(math.nan), "interval must be a whole number, got nan"),
        (lambda: Dynamic("0.7"), "threshold must be a number, got '0.7'"),
        (lambda: Dynamic(stride=1.5), "stride must be a whole number, got 1.5"),
        (lambda: Dynamic(1.5), r"threshold must lie in \[-1, 1\], got 1.5"),
        (lambda: Dynamic(math.nan), r"threshold must lie in \[-1, 1\], got nan"),
        (lambda: Dynamic(decay=0.0), r"decay must lie in \(0, 1\], got 0.0"),
        (lambda: Dynamic(stride=0), "stride must be at least 1, got 0"),
        (lambda: skipping.neighbours(torch.eye(4), 4), r"count must lie in \[1, 4\), got 4"),
    ],
)
def test_what_cannot_be_says_why(make: object, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        make()


def test_neighbours_are_the_nearest_other_codes() -> None:
    codebook = torch.randn(1500, 4, generator=torch.Generator().manual_seed(1))
    near = skipping.neighbours(codebook, 3)
    far = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    assert torch.equal(near.long(), far.topk(3, largest=False).indices)


def test_products_of_codes_are_cosines() -> None:
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = skipping.unit(codebook) @ skipping.unit(codebook).T
    expected = torch.cosine_similarity(codebook[:, None], codebook[None], dim=2)
    torch.testing.assert_close(found, expected.float())
