"""Verification skipping (VVS, arXiv 2511.13587): trees that are not verified, what they leave.

A skipped step commits a random path of the tree, as far as the tree's paths are long on average;
the target sees these tokens together with the next tree. All of it stays on the device.

    selector    a = min(length of the path, floor(mean length of all paths))   the root counts
    uniform     every `interval` steps, from step 1 on
    dynamic     where the paths agree: sum_l w_l mean_{i<j} cos(code_il, code_jl) >= threshold
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg_kernels import TokenTree, sample_tokens

# features of so many tokens must be there before the first skip
WARM = 5


@dataclass(frozen=True)
class Uniform:
    """Skip every `interval` steps: 2 is every other one."""

    interval: int

    def __post_init__(self) -> None:
        if self.interval < 2:
            raise ValueError(
                f"skipping: interval must be at least 2, got {self.interval}; "
                "of two steps in a row one must be verified"
            )


@dataclass(frozen=True)
class Dynamic:
    """Skip where the tree's paths look alike, but never twice in a row.

    Args:
        threshold: of the similarity, in [-1, 1]; the paper's is 0.65, its code's 0.7.
        decay: the weight of a level, of that of the level above.
        stride: every so many paths are compared.
    """

    threshold: float = 0.65
    decay: float = 0.9
    stride: int = 2

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"skipping: threshold must lie in [-1, 1], got {self.threshold}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"skipping: decay must lie in (0, 1], got {self.decay}")
        if self.stride < 1:
            raise ValueError(f"skipping: stride must be at least 1, got {self.stride}")


class Paths(NamedTuple):
    """The tree's nodes as paths from the root."""

    # [B, N, depth + 1] int64: a node's ancestors from the root on, itself last; -1 behind
    nodes: Tensor
    # [B, N] bool: no other node continues it
    leaves: Tensor


def paths(tree: TokenTree, depth: int) -> Paths:
    """Return the paths of all nodes of trees of at most `depth` levels below the root."""
    batch, count = tree.parents.shape
    depths, parents = tree.depths.long(), tree.parents.long().clamp(min=0)
    own = torch.arange(count, device=depths.device).expand(batch, -1)
    # a column more for padding
    found = torch.full((batch, count, depth + 2), -1, device=depths.device)
    at = own
    for _ in range(depth + 1):
        level = depths.gather(1, at)
        found.scatter_(2, torch.where(level < 0, depth + 1, level)[..., None], at[..., None])
        at = parents.gather(1, at)
    return Paths(found[..., :-1], (tree.first_child < 0) & (depths >= 0))


def select(
    tree: TokenTree, ways: Paths, seeds: Tensor, sequences: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a path of each tree [B, depth] without its root, and how much of it is kept [B].

    The paper's token selector: a leaf at random, by noise that is keyed, cut to the mean length.
    """
    chance = torch.zeros_like(tree.depths, dtype=torch.float32)
    chance.masked_fill_(~ways.leaves, -torch.inf)
    leaf = sample_tokens(chance, seeds=seeds, sequences=sequences, positions=positions)
    leaf = leaf.clamp(min=0)[:, None]
    lengths = torch.where(ways.leaves, tree.depths + 1, 0)
    mean = lengths.sum(1) // ways.leaves.sum(1).clamp(min=1)
    kept = torch.minimum(tree.depths.gather(1, leaf)[:, 0], mean - 1).clamp(min=0)
    path = ways.nodes.gather(1, leaf[..., None].expand(-1, -1, ways.nodes.shape[2]))[:, 0, 1:]
    return path, kept


def similarity(
    tree: TokenTree, ways: Paths, codebook: Tensor, *, decay: float, stride: int
) -> Tensor:
    """Return how alike the tree's paths are [B] float32; 0 for fewer than two.

    The mean over pairs of paths of the cosines of their codes, level by level, `decay` weighing
    deeper ones less; a level that one of the two has not counts 0. As the code vectors have length
    one, the sum over pairs is that of `|sum|^2 - count`, halved: it costs no pair.

    Args:
        codebook: [codes, E], the tokenizer's, rows of length one.
        stride: every so many leaves are compared.
    """
    rank = ways.leaves.long().cumsum(1) - 1
    used = ways.leaves & (rank % stride == 0)
    nodes = ways.nodes[..., 1:]
    there = used[..., None] & (nodes >= 0)
    batch, count, depth = nodes.shape
    tokens = tree.tokens.gather(1, nodes.clamp(min=0).flatten(1)).view(batch, count, depth)
    vectors = codebook[tokens.clamp(0, len(codebook) - 1)] * there[..., None]
    # [B, depth]
    pairs = (vectors.sum(1).square().sum(-1) - vectors.square().sum(-1).sum(1)) / 2
    # levels beyond the longest path take no share
    weight = there.any(1) * decay ** torch.arange(depth, device=nodes.device)
    number = used.sum(1)
    total = (weight * pairs).sum(1) / weight.sum(1).clamp(min=1e-9)
    return torch.where(number > 1, total / (number * (number - 1) / 2).clamp(min=1), 0.0)


def wants(
    schedule: Uniform | Dynamic,
    steps: Tensor,
    skipped: Tensor,
    alike: Callable[[float, int], Tensor],
) -> Tensor:
    """Return which sequences [B] skip this step.

    Args:
        steps: [B], of each sequence so far.
        skipped: [B] bool, whether the step before was.
        alike: gives `similarity` of a decay and a stride.
    """
    if isinstance(schedule, Uniform):
        return steps % schedule.interval == 1
    return ~skipped & (alike(schedule.decay, schedule.stride) >= schedule.threshold)


def unit(codebook: Tensor) -> Tensor:
    """Return `codebook [codes, E]` with rows of length one, float32."""
    return F.normalize(codebook.float(), dim=1)


def neighbours(codebook: Tensor, count: int) -> Tensor:
    """Return the nearest other codes of each code [codes, count] int32, by distance."""
    if not 1 <= count < len(codebook):
        raise ValueError(
            f"neighbours: count must lie in [1, {len(codebook)}), got {count}; the codebook has "
            f"{len(codebook)} codes"
        )
    near = torch.empty(len(codebook), count, dtype=torch.int32, device=codebook.device)
    # some rows at a time: all distances of 16384 codes are a gigabyte
    for first in range(0, len(codebook), 1024):
        some = codebook[first : first + 1024].float()
        far = torch.cdist(some, codebook.float())
        own = torch.arange(first, first + len(some), device=codebook.device)
        far.scatter_(1, own[:, None], torch.inf)
        near[first : first + len(some)] = far.topk(count, largest=False).indices.int()
    return near
