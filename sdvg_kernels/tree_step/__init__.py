"""What lies between the passes of speculative decoding: what they are fed, and what is kept."""

from sdvg_kernels.tree_step.api import (
    beam_entries,
    commit_tree_,
    draft_entries,
    path_similarity,
    select_path,
    tree_entries,
)
from sdvg_kernels.tree_step.entries import (
    BeamEntries,
    DraftEntries,
    FrameLayout,
    TreeEntries,
    TreeState,
)

__all__ = [
    "BeamEntries",
    "DraftEntries",
    "FrameLayout",
    "TreeEntries",
    "TreeState",
    "beam_entries",
    "commit_tree_",
    "draft_entries",
    "path_similarity",
    "select_path",
    "tree_entries",
]
