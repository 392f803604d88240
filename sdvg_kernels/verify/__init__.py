"""Decisions: which drafted blocks and which drafted tokens are kept."""

from sdvg_kernels.verify.api import (
    Tree,
    Verified,
    route_blocks,
    verify_chain,
    verify_relaxed,
    verify_tree,
    verify_typical,
)

__all__ = [
    "Tree",
    "Verified",
    "route_blocks",
    "verify_chain",
    "verify_relaxed",
    "verify_tree",
    "verify_typical",
]
