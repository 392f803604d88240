"""`expand_tree` and `build_tree`: from a drafter's logits to a token tree, on the device."""

from __future__ import annotations

import functools
import math

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    by_preference,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.tree import reference
from sdvg_kernels.tree.token_tree import TokenTree

# what a program holds in registers
MOST_CHILDREN, MOST_CANDIDATES, MOST_NODES = 16, 1024, 128
_INTEGERS = (torch.int32, torch.int64)


def expand_tree(
    logits: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    top_k: int,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft one level of a tree: the K likeliest children of each of W beams, and the next K beams.

    Equals, with `x = uncond + guidance * (logits - uncond)` in float32 where there is `uncond`:

        chances, tokens = (x / temperature).log_softmax(-1).topk(K)    # of equal ones the lower id
        scores = (scores[:, :, None] + chances).view(B, W * K)
        beams = scores.topk(K)[1]                                      # ... the lower index

    so that candidate `w * K + k` is child k of beam w, and beam `i` of the next level continues
    beam `beams[:, i] // K` of this one. A token of -inf in `logits`, whatever `uncond` says, is no
    child. A place without a child has token -1 and score -inf: past the last token that can come,
    in a row that has no distribution (it holds NaN, or its largest logit is not finite), and below
    a beam whose score is not finite. `build_tree` leaves such candidates out; where fewer than K
    are left, `beams` goes on with them: clamp their token before it is embedded.

    Tokens are chosen exactly, by guided logits in float32; beams exactly, by the scores that are
    returned. Scores are computed in float32 by Triton, float64 by the reference, and a candidate's
    is never above its beam's.

    Args:
        logits: [B, W, V] floating, any strides, W >= 1, 1 <= V < 2^30; float64 is rounded to
            float32.
        scores: [B, W] float32: cumulative log-probabilities of the beams; None: 0, as the root's.
        top_k: K, 1 to 16 and at most 1024 / W.
        uncond: [B, W, V] logits without the condition, of logits' dtype.
        guidance: 1 is no guidance; needs `uncond` otherwise.
        temperature: above 0. A greedy target's tree is drafted at 1.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns:
        tokens [B, W * K] int64, scores [B, W * K] float32, beams [B, K] int32.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: EAGLE-2, expansion phase; LANTERN's drafter for guidance.
    Cost: a program a beam reads its logits once.
    """
    check = functools.partial(require, "expand_tree")
    check_type = functools.partial(require_dtype, "expand_tree")
    shape, device = logits.shape, logits.device
    good = len(shape) == 3 and shape[1] > 0 and 0 < shape[2] < 2**30
    check(good, "logits", "be [B, W, V] with W >= 1 and 1 <= V < 2^30", shape)
    check_type(logits.dtype.is_floating_point, "logits", "be floating", logits.dtype)
    most = min(MOST_CHILDREN, MOST_CANDIDATES // shape[1])
    check(most > 0, "logits", f"have at most {MOST_CANDIDATES} beams", shape[1])
    if not 1 <= top_k <= most:
        check(False, "top_k", f"lie in [1, {most}] with {shape[1]} beams", top_k)
    check(0 < temperature < math.inf, "temperature", "be finite and above 0", temperature,
          "draft a greedy target's tree at 1")  # fmt: skip
    check(math.isfinite(guidance), "guidance", "be finite", guidance)
    if scores is not None:
        check_type(scores.dtype == torch.float32, "scores", "be float32", scores.dtype)
        check(scores.shape == shape[:2], "scores", "be [B, W]", scores.shape)
        check(scores.device == device, "scores", "be on logits' device", scores.device)
    if uncond is None:
        check(guidance == 1, "guidance", "be 1 without uncond", guidance, "give uncond")
    else:
        check(uncond.shape == shape, "uncond", "have the shape of logits", uncond.shape)
        same = uncond.dtype is logits.dtype
        check_type(same, "uncond", "have the dtype of logits", uncond.dtype)
        check(uncond.device == device, "uncond", "be on logits' device", uncond.device)
    available = _available(device.type)
    chosen = require_implementation(
        "expand_tree", implementation, available, f"{device.type} tensors"
    )
    return torch.ops.sdvg_kernels.expand_tree(
        logits, scores, top_k, uncond, float(guidance), float(temperature), chosen
    )


def build_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    parents: torch.Tensor,
    *,
    size: int,
    limit: torch.Tensor | None = None,
    implementation: str | None = None,
) -> TokenTree:
    """Build each sequence's tree of the `size` - 1 best of its candidates below its root.

    Candidates are what `expand_tree` gave, level after level. Chosen are the best by score, of
    equal ones the first, among those of depth `limit` at most; they stay in the order in which they
    came. A parent comes before its children and scores at least as much, so that it is chosen with
    them. What is below a candidate that is not chosen is left out, and so is a candidate whose
    token is negative, whose score is not finite, or whose parent does not come before it (and what
    is below it): the tree is always one, if smaller than `size`, and padded.

    Args:
        root: [B] integers: the last token that is committed.
        tokens: [B, M] integers, M <= 1024.
        scores: [B, M] float32.
        parents: [B, M] integers: the candidate that each continues; -1: the root.
        size: N, 1 to 128.
        limit: [B] integers: the depth that the tree may have (the root's is 0); None: any.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    All are int32 or int64 and of any strides.

    Returns:
        A TokenTree of N nodes.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: EAGLE-2, reranking phase.
    Cost: one program a sequence.
    """
    check = functools.partial(require, "build_tree")
    shape, device = tokens.shape, tokens.device
    good = len(shape) == 2 and shape[1] <= MOST_CANDIDATES
    check(good, "tokens", f"be [B, M] with M <= {MOST_CANDIDATES}", shape)
    _integers("root", root, shape[:1], "[B]", device)
    _integers("tokens", tokens, shape, "[B, M]", device)
    _integers("parents", parents, shape, "[B, M] like tokens", device)
    require_dtype("build_tree", scores.dtype == torch.float32, "scores", "be float32", scores.dtype)
    check(scores.shape == shape, "scores", "be [B, M] like tokens", scores.shape)
    check(scores.device == device, "scores", "be on tokens' device", scores.device)
    if not 1 <= size <= MOST_NODES:
        check(False, "size", f"lie in [1, {MOST_NODES}]", size)
    if limit is not None:
        _integers("limit", limit, shape[:1], "[B]", device)
    available = _available(device.type)
    chosen = require_implementation(
        "build_tree", implementation, available, f"{device.type} tensors"
    )
    return TokenTree(
        *torch.ops.sdvg_kernels.build_tree(root, tokens, scores, parents, limit, size, chosen)
    )


def _integers(
    name: str, tensor: torch.Tensor, shape: torch.Size, words: str, device: torch.device
) -> None:
    """Check an argument of `build_tree`."""
    integer = tensor.dtype in _INTEGERS
    require_dtype("build_tree", integer, name, "be int32 or int64", tensor.dtype)
    if tensor.shape != shape:
        require("build_tree", False, name, f"be {words}", tensor.shape)
    require("build_tree", tensor.device == device, name, "be on tokens' device", tensor.device)


@functools.cache
def _available(device: str) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on `device`, in order of preference."""
    reason = triton_reason(device)
    return by_preference(device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _expand(
    logits: torch.Tensor,
    scores: torch.Tensor | None,
    top_k: int,
    uncond: torch.Tensor | None,
    guidance: float,
    temperature: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the chosen implementation of `expand_tree`."""
    options = {
        "top_k": top_k,
        "uncond": uncond,
        "guidance": guidance,
        "temperature": temperature,
    }
    if implementation == "reference":
        return reference.expand_tree(logits, scores, **options)
    from sdvg_kernels.tree import kernel

    return kernel.expand_tree(logits, scores, **options)


def _build(
    root: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    parents: torch.Tensor,
    limit: torch.Tensor | None,
    size: int,
    implementation: str,
) -> tuple[torch.Tensor, ...]:
    """Run the chosen implementation of `build_tree`."""
    if implementation == "reference":
        return reference.build_tree(root, tokens, scores, parents, limit, size=size)
    from sdvg_kernels.tree import kernel

    return kernel.build_tree(root, tokens, scores, parents, limit, size=size)


_ops.implement("expand_tree", cpu=_expand, cuda=_expand)
_ops.implement("build_tree", cpu=_build, cuda=_build)
