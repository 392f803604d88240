"""tree_attention: chains and trees over the cache, by brute force and by plain attention."""

from __future__ import annotations

import torch

from sdvg_kernels import tree_attention
from sdvg_kernels.testing import assert_within_budget


def test_entries_see_the_committed_slots_and_those_of_their_bits(random: torch.Generator) -> None:
    # a chain of two in word 0; a root, two children and a grandchild in word 1; padding
    words = [[0b01, 0], [0b11, 0], [0b11, 1], [0b11, 0b11], [0b11, 0b101], [0b11, -(2**31)], [0, 0]]
    mask = torch.tensor([words, words], dtype=torch.int32)
    lengths, pad = torch.tensor([[5, 0], [2, 0]], dtype=torch.int32)
    query = torch.randn(2, 7, 4, 8, generator=random, dtype=torch.float64)
    k, v = (torch.randn(2, 70, 2, 8, generator=random, dtype=torch.float64) for _ in range(2))
    out = tree_attention(query, k, v, lengths, mask, cache_leftpad=pad)
    for b, (length, first) in enumerate(zip(lengths.tolist(), pad.tolist(), strict=True)):
        for t, entry in enumerate(words):
            bits = [32 * w + j for w in range(2) for j in range(32) if entry[w] >> j & 1]
            seen = [*range(first, length), *(length + bit for bit in bits)] if bits else []
            for h in range(4):
                weights = (k[b, seen, h // 2] @ query[b, t, h] * 8**-0.5).softmax(0)
                expected = weights @ v[b, seen, h // 2]
                assert_within_budget(out[b, t, h], expected, expected)
