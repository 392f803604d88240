"""`TokenTree`: token trees of a batch as tensors, and the check of one that is given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sdvg_kernels._check import message, require, require_dtype
from sdvg_kernels.tree import reference

_OP = "TokenTree.from_parents"


class TokenTree(NamedTuple):
    """B trees of N nodes: what follows a committed token, in several versions.

        node    0        tokens        a  b  c  d  e        bit j of mask, node by node:
               / \\       parents      -1  0  0  1  1           0  1 . . . .
              1   2      first_child   1  3 -1 -1 -1           1  1 1 . . .
             / \\         next_sibling -1  2 -1  4 -1           2  1 . 1 . .
            3   4        depths        0  1  1  2  2           3  1 1 . 1 .
                                                               4  1 1 . . 1

    Node 0 is the root, a parent comes before its children (breadth first, where candidates come
    level by level), siblings stand in the order in which they are tried and carry different tokens
    (verification counts the chance of each), padding is last. All on one device.
    """

    # [B, N] int64; 0 in padding
    tokens: torch.Tensor
    # [B, N] int32; -1: the root, or padding
    parents: torch.Tensor
    # [B, N] int32; -1: a leaf
    first_child: torch.Tensor
    # [B, N] int32; -1: the last
    next_sibling: torch.Tensor
    # [B, N] int32; 0: the root, -1: padding
    depths: torch.Tensor
    # [B, N, ceil(N / 32)] int32; bit j % 32 of word j // 32: the node sees node j, itself or one
    # above it; 0 in padding
    mask: torch.Tensor

    @classmethod
    def from_parents(
        cls, tokens: torch.Tensor, parents: torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
    ) -> TokenTree:
        """Return trees whose shape is known to the host: static ones.

        Args:
            tokens: [B, N] or [N] (one tree) integers, N >= 1; the trees lie on their device.
            parents: [B, N], or [N] for all trees, integers: the node above each, -1 for node 0
                alone; a node comes after its parent.

        Raises:
            ValueError (shape; a cycle, an orphan, a second root, a child before its parent, with
            the tree and the node), TypeError (dtype).

        The parents are read on the host: not for CUDA graphs.
        """
        require_dtype(_OP, _integer(tokens), "tokens", "be integers", tokens.dtype)
        shape = tokens.shape
        good = len(shape) in (1, 2) and shape[-1] > 0
        require(_OP, good, "tokens", "be [B, N] or [N] with N >= 1", shape)
        above = torch.as_tensor(parents, device="cpu")
        require_dtype(_OP, _integer(above), "parents", "be integers", above.dtype)
        good = above.shape in (shape, shape[-1:])
        require(_OP, good, "parents", "be [N] or have the shape of tokens", above.shape)
        above = above.long()
        for b, tree in enumerate(above.view(-1, shape[-1]).tolist()):
            _check(tree, f" of tree {b}" if above.dim() == 2 else "")
        above = above.expand(tokens.reshape(-1, shape[-1]).shape)
        fields = (above.int(), *reference.links(above))
        return cls(
            tokens.reshape(-1, shape[-1]).long(),
            *(field.contiguous().to(tokens.device) for field in fields),
        )


def _integer(tensor: torch.Tensor) -> bool:
    return not (
        tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool
    )


def _check(parents: list[int], where: str) -> None:
    """Raise ValueError unless `parents` are those of one tree, in order."""
    for node, parent in enumerate(parents):
        if rule := _broken(parents, node, parent):
            raise ValueError(message(_OP, f"parents[{node}]{where}", rule, parent))


def _broken(parents: list[int], node: int, parent: int) -> str:
    """Return the rule that `node` breaks, or ""."""
    if node == 0:
        return "" if parent == -1 else "be -1: node 0 is the root"
    if parent == -1:
        return "name a node: node 0 is the only root"
    if not 0 <= parent < len(parents):
        return f"name one of the {len(parents)} nodes: the node is an orphan"
    if parent < node:
        return ""
    seen: set[int] = set()
    while 0 <= node < len(parents) and node not in seen:
        seen.add(node)
        node = parents[node]
    return "lead to the root: it leads around a cycle" if node in seen else "come before its child"
