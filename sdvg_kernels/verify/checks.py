"""What token verification takes and gives, and the checks that its functions share."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, Protocol

import torch

from sdvg_kernels._check import require, require_dtype

INTEGERS = (torch.int32, torch.int64)


class Tree(Protocol):
    """What is read of a token tree (`TokenTree` has it); node 0 is the root, -1 is none."""

    @property
    def tokens(self) -> torch.Tensor:
        """[B, N] int64."""

    @property
    def parents(self) -> torch.Tensor:
        """[B, N] int32; a parent comes before its children."""

    @property
    def first_child(self) -> torch.Tensor:
        """[B, N] int32."""

    @property
    def next_sibling(self) -> torch.Tensor:
        """[B, N] int32."""


class Verified(NamedTuple):
    """What a verification kept, on the device."""

    # [B, P] int32: the accepted nodes from the root on (0 first), -1 behind
    path: torch.Tensor
    # [B] int32: how many nodes are accepted, the root included; 0: see tokens
    counts: torch.Tensor
    # [B] int64: the token that follows the path; -1: a row that decided had no distribution
    tokens: torch.Tensor

    def check(self, op: str = "verify") -> Verified:
        """Return this, read back; ValueError names the sequences without a distribution."""
        lost = (self.tokens < 0).nonzero()[:, 0].tolist()
        rule = "have a distribution in each row that decides"
        remedy = "it held NaN, no finite largest value, or probabilities that do not sum to 1"
        require(op, not lost, "logits", rule, f"none for sequences {lost}", remedy)
        return self


def fields(tree: Tree) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the fields of a tree in the order that the op takes them."""
    return tree.tokens, tree.parents, tree.first_child, tree.next_sibling


def check_logits(op: str, logits: torch.Tensor, rows: str) -> None:
    """Check `logits` [B, rows, V]."""
    shape = logits.shape
    good = len(shape) == 3 and shape[1] > 0 and 0 < shape[2] < 2**31
    rule = f"be [B, {rows}, V] with at least one row and 1 <= V < 2^31"
    require(op, good, "logits", rule, shape)
    require_dtype(op, logits.dtype.is_floating_point, "logits", "be floating", logits.dtype)


def check_tree(op: str, tree: Tree, logits: torch.Tensor) -> None:
    """Check `logits` [B, N, V] and the fields of `tree`."""
    check_logits(op, logits, "N")
    shape, device = logits.shape[:2], logits.device
    for name, field in zip(
        ("tree.tokens", "tree.parents", "tree.first_child", "tree.next_sibling"),
        fields(tree),
        strict=True,
    ):
        require(op, field.shape == shape, name, "be [B, N] for logits [B, N, V]", field.shape)
        require(op, field.device == device, name, "be on logits' device", field.device)
        if name == "tree.tokens":
            require_dtype(op, field.dtype in INTEGERS, name, "be int32 or int64", field.dtype)
        else:
            require_dtype(op, field.dtype == torch.int32, name, "be int32", field.dtype)


def check_common(
    op: str,
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    keys: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    guidance: float,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> tuple[float, float, int, float]:
    """Check what all verification shares; return (guidance, temperature, top_k, top_p)."""
    check, check_type = (functools.partial(how, op) for how in (require, require_dtype))
    shape, device = logits.shape, logits.device
    good = 0 <= temperature < math.inf
    check(good, "temperature", "be finite and at least 0", temperature)
    check(math.isfinite(guidance), "guidance", "be finite", guidance)
    check(top_k is None or top_k >= 1, "top_k", "be at least 1", top_k, "None keeps all tokens")
    check(0 < top_p <= 1, "top_p", "lie in (0, 1]", top_p)
    if uncond is None:
        check(guidance == 1, "guidance", "be 1 without uncond", guidance, "give uncond")
    else:
        check(uncond.shape == shape, "uncond", "have the shape of logits", uncond.shape)
        same = uncond.dtype is logits.dtype
        check_type(same, "uncond", "have the dtype of logits", uncond.dtype)
        check(uncond.device == device, "uncond", "be on logits' device", uncond.device)
    for name, key in zip(("seeds", "sequences", "positions"), keys, strict=True):
        if key is None:
            check(temperature == 0, name, "be given unless temperature is 0", None)
            continue
        check_type(key.dtype in INTEGERS, name, "be int32 or int64", key.dtype)
        check(key.shape == shape[:1], name, "be [B], one a sequence", key.shape)
        check(key.device == device, name, "be on logits' device", key.device)
    if keys[0] is not None:
        check_type(keys[0].dtype == torch.int64, "seeds", "be int64", keys[0].dtype)
    # as many as there are: nothing to leave out
    kept = 0 if top_k is None or top_k >= shape[2] else top_k
    return float(guidance), float(temperature), kept, float(top_p)


def check_depth(op: str, depth: int | None, levels: int) -> int:
    """Return how many levels below the root are looked at."""
    require(op, depth is None or depth >= 0, "depth", "be at least 0", depth)
    return levels if depth is None else depth
