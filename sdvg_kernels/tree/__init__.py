"""Token trees: what one is, and how a drafter's level by level candidates become one."""

from sdvg_kernels.tree.api import build_tree, expand_tree
from sdvg_kernels.tree.token_tree import TokenTree

__all__ = ["TokenTree", "build_tree", "expand_tree"]
