"""A tree's step but its passes, its levels and its verification.

    draft_entries   drafter   expand_tree, beam_entries, drafter   (a level each)   build_tree
    skipped         path_similarity, select_path, commit_tree_
    else            tree_entries, target, verify_tree, commit_tree_, compact_

Each is one launch, of copies and integers that are exact in every implementation but for
`path_similarity`. All take
`implementation=`: "triton" or "reference"; None: Triton on CUDA, else the reference. They raise
ValueError (shape, value), TypeError (dtype) and NotImplementedError (cannot run here); they are
deterministic, never wait for the device, and are safe in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    by_preference,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.tree_step import reference
from sdvg_kernels.tree_step.entries import (
    BeamEntries,
    DraftEntries,
    FrameLayout,
    TreeEntries,
    TreeState,
)

# entries of a pass, levels and nodes of a tree that a program holds
MOST_ENTRIES, MOST_LEVELS, MOST_NODES = 1024, 64, 128
_INTEGERS = (torch.int32, torch.int64)


class Tree(Protocol):
    """What is read of a `sdvg_kernels.TokenTree`."""

    tokens: torch.Tensor
    first_child: torch.Tensor
    depths: torch.Tensor
    mask: torch.Tensor


def draft_entries(
    state: TreeState, layout: FrameLayout, room: int, *, implementation: str | None = None
) -> DraftEntries:
    """Return what the drafter is fed before a tree: the pairs (token, feature before it) to `room`.

        slot    drafted ... lengths | lengths + 1 ... known - 1 | padding
        feature of the slot before: |  of as many slots before  |
                  the target's own  |  as K/V and features miss |

    so that the chain's pairs go on from the newest features that there are, VVS's stale ones. An
    entry sees the entries up to itself, and all slots below `drafted`.

    Args:
        state: read only.
        layout: of the video; `state.known` is at least its `prefix`.
        room: T, 1 to 1024; where there are more pairs, the rest is left out, the root too.

    Returns:
        DraftEntries: with it, what the tree needs that is drafted from there.

    Cost: reads and writes T features of each row.
    """
    op = "draft_entries"
    _check_state(op, state)
    _check_layout(op, layout)
    if not 1 <= room <= MOST_ENTRIES:
        require(op, False, "room", f"lie in [1, {MOST_ENTRIES}]", room)
    chosen = _choose(op, state.ids, implementation)
    return DraftEntries(*torch.ops.sdvg_kernels.draft_entries(*state, list(layout), room, chosen))


def beam_entries(
    known: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    beams: torch.Tensor,
    features: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    level: int,
    words: int,
    first: int = 0,
    implementation: str | None = None,
) -> BeamEntries:
    """Return what the drafter is fed after a level: its K beams, behind those that they continue.

    Beam k of level l stands in slot `known + l K + k` at position `known + l`; it sees itself, what
    the beam sees that it continues, and all slots below `known`. Where it is a place without a
    child (token -1), it is fed as code 0; nothing that follows it has a score.

    Args:
        known: [R] int32, as a `TreeState` has them.
        tokens, scores: [B, W * K] int64 and float32, contiguous: the level's candidates, of
            `expand_tree`; R is a multiple of B.
        beams: [B, K] int32, contiguous, of `expand_tree`, too.
        features: [R, W, width] floating: the drafter's, of the beams that have been expanded.
        mask: [R, W, `words`] int32, contiguous, of the level before; None for level 0.
        level: from 0 on.
        words: of the mask: at least `(level + 1) * K` bits.
        first: the id of code 0.

    Cost: reads and writes K features of each row.
    """
    op = "beam_entries"
    shape, device = beams.shape, known.device
    if known.dim() != 1:
        require(op, False, "known", "be [R]", known.shape)
    if len(shape) != 2 or not shape[1]:
        require(op, False, "beams", "be [B, K] with K >= 1", shape)
    (rows,), (batch, width), wide = known.shape, shape, tokens.shape
    _check_rows(op, rows, "beams", batch)
    if len(wide) != 2 or wide[0] != batch or wide[1] % width or not wide[1]:
        require(op, False, "tokens", "be [B, W * K] with W >= 1", wide)
    count, given = wide[1] // width, features.shape
    if len(given) != 3 or given[0] != rows or given[1] != count:
        rule = f"be [R, W, width] with R = {rows}, W = {count}"
        require(op, False, "features", rule, given)
    floating = features.dtype.is_floating_point
    require_dtype(op, floating, "features", "be floating", features.dtype)
    require(op, features.device == device, "features", "be on known's device", features.device)
    require(op, level >= 0, "level", "be at least 0", level)
    if 32 * words < (level + 1) * width:
        require(op, False, "words", f"hold {(level + 1) * width} bits", words)
    _plain(op, "known", known, torch.int32, (rows,), device)
    _plain(op, "tokens", tokens, torch.int64, wide, device)
    _plain(op, "scores", scores, torch.float32, wide, device)
    _plain(op, "beams", beams, torch.int32, shape, device)
    if mask is not None:
        _plain(op, "mask", mask, torch.int32, (rows, count, words), device)
    else:
        require(op, level == 0, "mask", "be given after level 0", None)
    chosen = _choose(op, known, implementation)
    return BeamEntries(
        *torch.ops.sdvg_kernels.beam_entries(
            known, tokens, scores, beams, features, mask, level, words, first, chosen
        )
    )


def tree_entries(
    state: TreeState,
    layout: FrameLayout,
    tree: Tree,
    skipping: torch.Tensor,
    room: int,
    *,
    implementation: str | None = None,
) -> TreeEntries:
    """Return what the target is fed: [chain | tree], padded to `room` and the tree's nodes.

        entry   0 ... chain - 1 | ... room - 1 | room + j, node j of the tree
        slot    lengths + entry |  (padding)   | lengths + 32 ceil(room / 32) + j

    Entry i of the chain sees those up to itself; a node sees the chain, itself and what is above
    it; all see the slots below `lengths`. The root is the token in slot `known - 1` of each row.

    Args:
        state: read only.
        layout: of the video.
        tree: a TokenTree of B trees, contiguous; R is a multiple of B.
        skipping: [B] bool: these are not fed, nor are those that know all S tokens.
        room: 0 to 1024: no less than the longest chain that is fed.

    Cost: a program a row.
    """
    op = "tree_entries"
    (rows, _), device = _check_ids(op, state)
    _check_layout(op, layout)
    batch, nodes = _check_tree(op, tree, device)
    _check_rows(op, rows, "tree", batch)
    _plain(op, "skipping", skipping, torch.bool, (batch,), device)
    if not 0 <= room <= MOST_ENTRIES - nodes:
        require(op, False, "room", f"lie in [0, {MOST_ENTRIES - nodes}]", room)
    chosen = _choose(op, state.ids, implementation)
    return TreeEntries(
        *torch.ops.sdvg_kernels.tree_entries(
            state.ids, state.known, state.lengths, skipping, tree.tokens, tree.depths, tree.mask,
            room, layout.first, chosen,
        )
    )  # fmt: skip


def commit_tree_(
    state: TreeState,
    layout: FrameLayout,
    tokens: torch.Tensor,
    path: torch.Tensor,
    counts: torch.Tensor,
    *,
    drawn: torch.Tensor | None = None,
    chain: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Commit a path of each tree, and what the target has seen of it; return `compact_`'s path.

    Tokens go behind `known`, no further than the frame that the first belongs to; where they end
    it, `known` passes its extra tokens, too. `drafted` becomes `lengths + 1`. After a pass of the
    target (`drawn`, `chain` and `out` are given, none without the others) the drawn token comes
    behind the path, `counts` is taken to be at least 1 and a drawn token below 0 is committed as
    -1; the features of chain, root and path go to the slots from `lengths` on, where `compact_`,
    which is to follow, moves their K/V and counts them in `lengths`.

    Args:
        state: its ids, features, known and drafted are written.
        layout: of the video.
        tokens: [B, N] int64, contiguous: the tree's; R is a multiple of B.
        path: [B, P] integers, any strides: the nodes below the root, 1 <= P <= 64.
        counts: [B] integers, any stride: how many nodes are committed, the root included; 0: none.
        drawn: [B] int64, any stride.
        chain: [R] int32, contiguous, of `tree_entries`: where it is -1, nothing is committed.
        out: [R, room + N, width] of the features' dtype: the target's, of `tree_entries`.

    Returns:
        [R, room + 1 + P] int32, offsets from `lengths`, padded with -1; [R, 0] without `out`.

    Mutates: state.
    Cost: reads and writes the features of chain and path; a program each.
    """
    op = "commit_tree_"
    (rows, _), device = _check_state(op, state)
    _check_layout(op, layout)
    batch, nodes = _check_tokens(op, "tokens", tokens, device)
    _check_rows(op, rows, "tokens", batch)
    given = path.shape
    if len(given) != 2 or given[0] != batch or not 1 <= given[1] <= MOST_LEVELS:
        require(op, False, "path", f"be [B, P] with P from 1 to {MOST_LEVELS}", given)
    require_dtype(op, path.dtype in _INTEGERS, "path", "be int32 or int64", path.dtype)
    require(op, path.device == device, "path", "be on the state's device", path.device)
    _strided(op, "counts", counts, _INTEGERS, batch, device)
    if out is None or drawn is None or chain is None:
        found = sum(one is not None for one in (drawn, chain, out))
        require(op, not found, "drawn, chain and out", "come together", f"{found} of them")
    else:
        _strided(op, "drawn", drawn, _INTEGERS[1:], batch, device)
        _plain(op, "chain", chain, torch.int32, (rows,), device)
        width, given = state.features.shape[2], out.shape
        good = len(given) == 3 and given[0] == rows and given[2] == width
        if not good or not nodes <= given[1] <= MOST_ENTRIES:
            rule = f"be [{rows}, room + {nodes}, {width}], at most {MOST_ENTRIES} entries"
            require(op, False, "out", rule, given)
        if out.dtype is not state.features.dtype:
            rule = f"be {state.features.dtype} like the features"
            require_dtype(op, False, "out", rule, out.dtype)
        require(op, out.device == device, "out", "be on the state's device", out.device)
    chosen = _choose(op, state.ids, implementation)
    return torch.ops.sdvg_kernels.commit_tree_(
        *state, tokens, path, counts, drawn, chain, out, list(layout), chosen
    )


def select_path(
    tree: Tree,
    wanted: torch.Tensor,
    levels: int,
    *,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    likely: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a path of each tree that is committed unseen: VVS's selector.

    A leaf at random, each as likely, and of its path as much as paths are long on average:

        lengths = depths[leaves] + 1
        kept = min(depths[leaf], lengths.sum() // len(lengths) - 1)

    The leaf is what `sample_tokens` draws with these keys from equal logits of the leaves: that
    whose word of Philox noise is least. With `likely` it is the one that first children lead to,
    each node's likeliest in the drafter's eyes.

    Args:
        tree: a TokenTree of B trees, contiguous.
        wanted: [B] bool: of the others nothing is kept.
        levels: P, 1 to 64: the most below the root.
        seeds, sequences: [B] int64, contiguous; they key the noise with
        positions: [B] int32, contiguous.
        likely: follow first children; there is no noise then.

    Returns:
        path [B, P] int32, from the root's child to the leaf, -1 behind, and counts [B] int32: how
        many nodes are kept, the root included; 0 where that is the root alone, or not wanted. Both
        are what `commit_tree_` takes.

    Source: VVS, verification-free token selector with dynamic truncation; `likely` is the choice by
    confidence of its ablation, node by node.
    """
    op = "select_path"
    device = tree.tokens.device
    batch, _ = _check_tree(op, tree, device)
    if not 1 <= levels <= MOST_LEVELS:
        require(op, False, "levels", f"lie in [1, {MOST_LEVELS}]", levels)
    _plain(op, "wanted", wanted, torch.bool, (batch,), device)
    _plain(op, "seeds", seeds, torch.int64, (batch,), device)
    _plain(op, "sequences", sequences, torch.int64, (batch,), device)
    _plain(op, "positions", positions, torch.int32, (batch,), device)
    chosen = _choose(op, tree.tokens, implementation)
    return torch.ops.sdvg_kernels.select_path(
        tree.depths, tree.first_child, tree.mask, wanted, seeds, sequences, positions, levels,
        likely, chosen,
    )  # fmt: skip


def path_similarity(
    tree: Tree,
    codebook: torch.Tensor,
    *,
    decay: float = 0.9,
    stride: int = 1,
    implementation: str | None = None,
) -> torch.Tensor:
    """Return how alike each tree's paths are [B] float32; 0 for fewer than two.

    The mean over pairs of paths of the products of their codes, level by level, each level weighing
    `decay` times the one above; a level that one of the two has not counts 0:

        sum_l w_l mean_{i<j} <code_il, code_jl> / sum_l w_l,     w_l = decay^(l - 1)

    Args:
        tree: a TokenTree of B trees, contiguous.
        codebook: [V, E] float32, contiguous: with rows of length one, products are cosines. A token
            beyond counts as the last.
        decay: in (0, 1].
        stride: at least 1: every so many leaves are compared, from the first on.

    Computed in float32 by Triton, float64 by the reference.
    Source: VVS, dynamic scheduling.
    Cost: reads the codes of a tree once; no pair is looked at.
    """
    op = "path_similarity"
    device = tree.tokens.device
    _check_tree(op, tree, device)
    good = codebook.dim() == 2 and min(codebook.shape) > 0
    require(op, good, "codebook", "be [V, E] with V, E >= 1", codebook.shape)
    _plain(op, "codebook", codebook, torch.float32, codebook.shape, device)
    if not 0 < decay <= 1:
        require(op, False, "decay", "lie in (0, 1]", decay)
    require(op, stride >= 1, "stride", "be at least 1", stride)
    chosen = _choose(op, tree.tokens, implementation)
    return torch.ops.sdvg_kernels.path_similarity(
        tree.tokens, tree.depths, tree.first_child, tree.mask, codebook, float(decay), stride,
        chosen,
    )  # fmt: skip


def _check_ids(op: str, state: TreeState) -> tuple[torch.Size, torch.device]:
    """Check what all ops read of a state; return the shape of its ids, and where it lies."""
    ids, _, known, lengths, _ = state
    shape, device = ids.shape, ids.device
    if len(shape) != 2 or shape[1] < 2:
        require(op, False, "state.ids", "be [R, S + 1] with S >= 1", shape)
    _plain(op, "state.ids", ids, torch.int64, shape, device)
    _plain(op, "state.known", known, torch.int32, shape[:1], device)
    _plain(op, "state.lengths", lengths, torch.int32, shape[:1], device)
    return shape, device


def _check_state(op: str, state: TreeState) -> tuple[torch.Size, torch.device]:
    """Check all of a state; return the shape of its ids, and where it lies."""
    shape, device = _check_ids(op, state)
    features, wide = state.features, state.features.shape
    if len(wide) != 3 or wide[:2] != shape:
        require(op, False, "state.features", "be [R, S + 1, width] like ids", wide)
    floating = features.dtype.is_floating_point
    require_dtype(op, floating, "state.features", "be floating", features.dtype)
    _plain(op, "state.features", features, features.dtype, wide, device)
    _plain(op, "state.drafted", state.drafted, torch.int32, shape[:1], device)
    return shape, device


def _check_layout(op: str, layout: FrameLayout) -> None:
    prefix, tokens, extra, first = layout
    if tokens < 1 or prefix < 0 or extra < 0 or first < 0:
        require(op, False, "layout", "hold tokens >= 1 and nothing below 0", tuple(layout))


def _check_tokens(op: str, name: str, tokens: torch.Tensor, device: torch.device) -> torch.Size:
    """Check a tree's tokens [B, N] and return their shape."""
    shape = tokens.shape
    if len(shape) != 2 or not 1 <= shape[1] <= MOST_NODES:
        require(op, False, name, f"be [B, N] with N from 1 to {MOST_NODES}", shape)
    _plain(op, name, tokens, torch.int64, shape, device)
    return shape


def _check_tree(op: str, tree: Tree, device: torch.device) -> torch.Size:
    """Check what is read of a tree and return its shape [B, N]."""
    shape = _check_tokens(op, "tree.tokens", tree.tokens, device)
    _plain(op, "tree.first_child", tree.first_child, torch.int32, shape, device)
    _plain(op, "tree.depths", tree.depths, torch.int32, shape, device)
    _plain(op, "tree.mask", tree.mask, torch.int32, (*shape, -(-shape[1] // 32)), device)
    return shape


def _check_rows(op: str, rows: int, name: str, batch: int) -> None:
    if rows % batch if batch else rows:
        require(op, False, name, f"be of a number of sequences that divides {rows} rows", batch)


def _plain(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Check a contiguous tensor of a known shape."""
    good = tensor.dtype is dtype and tensor.shape == shape
    if good and tensor.is_contiguous() and tensor.device == device:
        return
    require_dtype(op, tensor.dtype is dtype, name, f"be {dtype}", tensor.dtype)
    if tensor.shape != shape or not tensor.is_contiguous():
        got = f"{list(tensor.shape)} with strides {list(tensor.stride())}"
        require(op, False, name, f"be {list(shape)}, contiguous", got)
    require(op, False, name, f"be on {device}", tensor.device)


def _strided(
    op: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    batch: int,
    device: torch.device,
) -> None:
    """Check integers [B] of any stride."""
    if tensor.dtype in dtypes and tensor.shape == (batch,) and tensor.device == device:
        return
    rule = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require_dtype(op, tensor.dtype in dtypes, name, f"be {rule}", tensor.dtype)
    require(op, tensor.shape == (batch,), name, f"be [B] with B = {batch}", tensor.shape)
    require(op, False, name, f"be on {device}", tensor.device)


def _choose(op: str, tensor: torch.Tensor, implementation: str | None) -> str:
    device = tensor.device.type
    if implementation is None:
        return _default(device)
    return require_implementation(op, implementation, _available(device), f"{device} tensors")


@functools.cache
def _default(device: str) -> str:
    return require_implementation("", None, _available(device), "")


@functools.cache
def _available(device: str) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on `device`, in order of preference."""
    return by_preference(device, triton_reason(device))


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(name: str) -> Callable[..., object]:
    """Return what runs the op `name`: its last argument chooses the implementation."""

    def run(*arguments: object) -> object:
        *given, implementation = arguments
        if implementation == "reference":
            return getattr(reference, name)(*given)
        from sdvg_kernels.tree_step import kernel

        return getattr(kernel, name)(*given)

    return run


for _name in (
    "draft_entries", "beam_entries", "tree_entries", "commit_tree_", "select_path",
    "path_similarity",
):  # fmt: skip
    _ops.implement(_name, cpu=_run(_name), cuda=_run(_name))
