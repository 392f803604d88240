"""Kernels for block-autoregressive video generation, each with a plain PyTorch reference.

Public names are loaded on first use: `import sdvg_kernels` costs nothing but torch, and an op is
registered when its folder is first asked for.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> the room that it lives in
_EXPORTS = {
    "stage_": "cache",
    "commit_": "cache",
    "rollback_": "cache",
    "compact_": "cache",
    "select_": "cache",
    "PointerTable": "cache",
    "block_causal_attention": "attention",
    "dense_attention": "attention",
    "KeyBias": "attention",
    "route_blocks": "verify",
    "verify_chain": "verify",
    "verify_tree": "verify",
    "verify_relaxed": "verify",
    "verify_typical": "verify",
    "Verified": "verify",
    "sample_tokens": "sampling",
    "expand_tree": "tree",
    "build_tree": "tree",
    "TokenTree": "tree",
    "draft_entries": "tree_step",
    "beam_entries": "tree_step",
    "tree_entries": "tree_step",
    "commit_tree_": "tree_step",
    "select_path": "tree_step",
    "path_similarity": "tree_step",
    "TreeState": "tree_step",
    "FrameLayout": "tree_step",
    "DraftEntries": "tree_step",
    "BeamEntries": "tree_step",
    "TreeEntries": "tree_step",
    "rope_table": "rope",
    "norm_rope": "rope",
    "norm_rope_stage_": "rope",
    "modulated_layer_norm": "modulation",
    "gated_residual": "modulation",
    "gated_residual_layer_norm": "modulation",
    "preprocess_frames": "frames",
    "rms_norm_silu": "norm_silu",
    "quantize_rows": "quantize",
    "diagonal_schedule": "diagonal",
    "DiagonalSchedule": "diagonal",
    "TokenGrid": "diagonal",
    "diagonal_mask": "diagonal",
    "diagonal_attention": "diagonal",
    "tree_attention": "masked",
}
_OPS = tuple(dict.fromkeys(_EXPORTS.values()))

__all__ = [*_EXPORTS, "build_info", "implementations"]


def __getattr__(name: str) -> object:
    if name in _OPS:
        return importlib.import_module(f"sdvg_kernels.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"sdvg_kernels.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'sdvg_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_OPS])


def implementations() -> dict[str, dict[str, str]]:
    """Return each op's implementations, best first: name -> "" or why it cannot run here."""
    rooms = (importlib.import_module(f"sdvg_kernels.{op}.api") for op in _OPS)
    return {op: room.implementations() for op, room in zip(_OPS, rooms, strict=True)}


def build_info() -> dict[str, str]:
    """Return what the extension was built with (nvcc, archs, flags, ...), or {"missing": why}."""
    extension, reason = importlib.import_module("sdvg_kernels._ops").load_extension()
    return {"missing": reason} if extension is None else dict(extension.build_info())
