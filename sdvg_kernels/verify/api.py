"""Which drafts are kept, decided on the device: blocks by reward, tokens by the target's logits.

`route_blocks` judges blocks; `verify_chain`, `verify_tree`, `verify_relaxed` and `verify_typical`
judge drafted tokens. The arguments that the last four share are those of `verify_tree`.
"""

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
from sdvg_kernels.verify import reference
from sdvg_kernels.verify.checks import (
    INTEGERS,
    Tree,
    Verified,
    check_common,
    check_depth,
    check_logits,
    check_tree,
    fields,
)
from sdvg_kernels.verify.reference import Keys, Warp

_OP = "route_blocks"
AGGREGATES = ("min", "mean")
_LARGEST = torch.finfo(torch.float32).max
_value = functools.partial(require, _OP)
_type = functools.partial(require_dtype, _OP)
_TABLES = (torch.int16, torch.uint16, torch.int32)


def route_blocks(
    frame_rewards: torch.Tensor,
    tau: float,
    first: bool | torch.Tensor,
    aggregate: str = "min",
    *,
    return_score: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Accept a drafted block whose worst (or mean) frame reward reaches `tau`, unless it is first.

    Equals `(frame_rewards.float().amin(1) >= tau) & ~first` with `tau` rounded to float32. A NaN
    reward makes the score NaN, and a NaN score is rejected. The mean is summed in float64 and
    rounded once.

    Args:
        frame_rewards: [B, F] floating, any strides, `F >= 1`.
        tau: threshold, in the scorer's unit; -inf accepts all but NaN, inf only an infinite reward.
        first: True rejects every block; a [B] bool tensor on the same device rejects where True.
        aggregate: "min" (worst frame) or "mean".
        return_score: also return the aggregate.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns:
        accept [B] bool on the device; with `return_score`, (accept, score [B] float32).

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: SDVG, worst-frame aggregation and forced rejection of the first block.
    """
    shape = frame_rewards.shape
    good = len(shape) == 2 and shape[1] > 0
    _value(good, "frame_rewards", "be [B, F] with at least one frame", shape)
    dtype = frame_rewards.dtype
    _type(dtype.is_floating_point, "frame_rewards", "be floating", dtype)
    _value(not math.isnan(tau), "tau", "be a number", tau)
    _value(aggregate in AGGREGATES, "aggregate", "be 'min' or 'mean'", repr(aggregate))
    device = frame_rewards.device
    if isinstance(first, torch.Tensor):
        _type(first.dtype == torch.bool, "first", "be bool", first.dtype)
        _value(first.shape == shape[:1], "first", "be [B]", first.shape)
        _value(first.device == device, "first", "be on frame_rewards' device", first.device)
    available = _available(device.type)
    chosen = require_implementation(_OP, implementation, available, f"{device.type} tensors")
    per_sequence = isinstance(first, torch.Tensor)
    # beyond float32: what it rounds to
    tau = float(tau) if abs(tau) <= _LARGEST else math.copysign(math.inf, tau)
    accept, score = torch.ops.sdvg_kernels.route_blocks(
        frame_rewards,
        first if per_sequence else None,
        tau,
        not per_sequence and bool(first),
        aggregate,
        chosen,
    )
    return (accept, score) if return_score else accept


def verify_chain(
    draft: torch.Tensor,
    logits: torch.Tensor,
    *,
    draft_logits: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    draft_uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    depth: int | None = None,
    implementation: str | None = None,
) -> Verified:
    """Accept the first tokens of a drafted chain, and draw the one that follows: exactly.

    With `p` and `q` the processed distributions of the target and of the drafter, `u` the coin:

        token x of `draft` is accepted where u <= p(x) / q(x), if all before it are
        rejected:      the token that follows is drawn from max(0, p - q), normalised
        all accepted:  it is drawn from p behind the last

    so that what comes out is distributed as the target's own tokens, provided that each token of
    `draft` was drawn from its `q`. With neither `draft_logits` nor `draft_probs` the drafter is
    certain: q is 1 at its token. Node `i + 1` of the path is token `i` of the chain.

    Args:
        draft: [B, n] int32 or int64. An id outside the vocabulary is rejected.
        logits: [B, n + 1, V] floating: row i is what the target says behind i tokens of the draft.
        draft_logits, draft_uncond: [B, n, V] the drafter's; they are processed as the target's are.
            Without `draft_uncond` they are not guided.
        draft_probs: [B, n, V] floating, instead: the drafter's distributions, processed already.
            They are divided by their sum, which must be 1 to 1%.
        The others: see `verify_tree`; depth: None is n.

    Returns, Raises, Source, Cost: see `verify_tree`; a drafter's rows cost what the target's do.
    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", 2023.
    """
    op = "verify_chain"
    check, check_type = (functools.partial(how, op) for how in (require, require_dtype))
    shape, device = logits.shape, logits.device
    check_logits(op, logits, "n + 1")
    batch, drafted = shape[0], shape[1] - 1
    check(
        draft.shape == (batch, drafted), "draft", "be [B, n] for logits [B, n + 1, V]", draft.shape
    )
    check_type(draft.dtype in INTEGERS, "draft", "be int32 or int64", draft.dtype)
    check(draft.device == device, "draft", "be on logits' device", draft.device)
    both = draft_logits is not None and draft_probs is not None
    check(not both, "draft_probs", "come without draft_logits", "both")
    given = (("draft_logits", draft_logits), ("draft_probs", draft_probs))
    for name, guess in (*given, ("draft_uncond", draft_uncond)):
        if guess is not None:
            fits = guess.shape == (batch, drafted, shape[2])
            check(fits, name, "be [B, n, V] for logits [B, n + 1, V]", guess.shape)
            check_type(guess.dtype.is_floating_point, name, "be floating", guess.dtype)
            check(guess.device == device, name, "be on logits' device", guess.device)
    if draft_uncond is not None:
        check(draft_logits is not None, "draft_uncond", "come with draft_logits", "it alone")
        same = draft_uncond.dtype is draft_logits.dtype
        check_type(same, "draft_uncond", "have the dtype of draft_logits", draft_uncond.dtype)
    keys = (seeds, sequences, positions)
    warp = check_common(op, logits, uncond, keys, guidance, temperature, top_k, top_p)
    chosen = require_implementation(
        op, implementation, _available(device.type), f"{device.type} tensors"
    )
    depth = check_depth(op, depth, drafted)
    out = torch.ops.sdvg_kernels.verify_chain(
        draft, logits, draft_logits, draft_probs, uncond, draft_uncond, *keys, *warp, depth, chosen
    )
    return Verified(*out)


def verify_tree(
    tree: Tree,
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    depth: int | None = None,
    coupled: bool = False,
    implementation: str | None = None,
) -> Verified:
    """Accept a path down a tree of drafted tokens, and draw the token that follows: exactly.

    At each node, from the root on, with `p` the processed distribution of its row and one coin `u`:

        the first child x with u <= p(its elder siblings) + p(x) is accepted, and is the next node
        none:  the token that follows is drawn from p without the children, normalised

    which equals trying each child in turn with a coin of its own, p renormalised after each that is
    rejected. What comes out is distributed as the target's own tokens whatever the tree holds, as
    long as it was not chosen by them: its children are the drafter's likeliest, say. With
    `coupled`, the node's token is the one that `sample_tokens` draws from the row with the same
    key, and the child that carries it is accepted: as many are, and what comes out equals plain
    sampling with these keys token for token, however it was drafted.

    Rows are processed as `sample_tokens` does it: guidance, temperature, top-k and top-p, in
    float32 with exact thresholds; at temperature 0 the likeliest token has probability 1. The coin
    is `(bits + 1/2) / 2^32` of word 0 of Philox 4x32-10 with key `seeds` and counter `(0, position,
    sequences, 1)`, where `position` is `positions` plus the node's depth; the drawn token is
    `sample_tokens`' own with that position, over what is left of the row. Probabilities are summed
    in float32 by Triton, float64 by the reference.

    Args:
        tree: `TokenTree`, or anything with these of its fields, [B, N] each: `tokens` (int32 or
            int64), `parents`, `first_child`, `next_sibling` (int32). A child that its parent does
            not know, that does not know its parent, or that stands before it or before an elder
            sibling is not there; a token outside the vocabulary is never accepted, and one that
            stands twice among siblings counts once.
        logits: [B, N, V] floating, any strides: what the target says behind each node. Rows of
            leaves that the walk does not reach, and of padding, are not read.
        seeds, sequences, positions: [B] integers that key the noise, as in `sample_tokens`;
            `positions` of the token that follows the root. Not needed at temperature 0.
        uncond, guidance, temperature, top_k, top_p: as in `sample_tokens`.
        depth: how many levels below the root are looked at; None: N - 1. Give the tree's own: the
            path is so much shorter.
        coupled: see above.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns:
        Verified: path [B, depth + 1], counts [B], tokens [B]. A sequence whose walk came to a row
        without a distribution (it holds NaN, or its largest logit is not finite) has a path of -1,
        count 0, token -1: see `Verified.check`.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic. Triton: no host synchronisation, safe in a CUDA graph; the reference reads back.
    Source: EAGLE and SpecInfer for deterministic drafts; SGLang for the one coin of a node.
    Cost: the rows of inner nodes are read once, each by a program of its own; then one program a
    sequence walks by their statistics, and reads the row of the last node.
    """
    op = "verify_tree"
    check_tree(op, tree, logits)
    keys = (seeds, sequences, positions)
    warp = check_common(op, logits, uncond, keys, guidance, temperature, top_k, top_p)
    depth = check_depth(op, depth, logits.shape[1] - 1)
    rule = "coupled" if coupled else "exact"
    return _verify(op, implementation, tree, logits, uncond, None, keys, warp, depth, rule)


def verify_relaxed(
    tree: Tree,
    logits: torch.Tensor,
    neighbours: torch.Tensor,
    *,
    delta: float | None = None,
    ratio: float | None = None,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    depth: int | None = None,
    implementation: str | None = None,
) -> Verified:
    """Accept a path down a tree where a token counts for its neighbours too, up to a bound.

    `verify_tree`, but a child x stands for its first m neighbours too:

        it is accepted with p(x) + p(n_1) + ... + p(n_m), m the largest with a sum of p(n_j) that is
        at most the bound; rejected, x and these m are left out of what follows, and no others
        bound = what is left of `delta` at the node, and at most (ratio - 1) p(x)

    So at most `delta` of the mass of a node's p moves, from neighbours to children: the law of its
    token is within `delta` of the target's in total variation. `delta` of 0, and `ratio` of 1, give
    `verify_tree` draw by draw; so does temperature 0.

    Args:
        neighbours: [V, K] int16, uint16 or int32, the nearest tokens of each, nearest first, itself
            not among them, no two the same; ids outside the vocabulary count nothing.
        delta: the mass that may move at a node, in [0, 1); None: no such bound.
        ratio: how many times as likely a token may become, at least 1; None: no such bound. One of
            the two must be given.
        The others: see `verify_tree`.

    Returns, Raises: see `verify_tree`.
    Source: LANTERN (delta, of which each child has its own there) and LANTERN++ (ratio).
    Cost: `verify_tree`'s, and up to K scattered logits for each child that is looked at.
    """
    op = "verify_relaxed"
    check_tree(op, tree, logits)
    check, check_type = (functools.partial(how, op) for how in (require, require_dtype))
    table, vocabulary = neighbours.shape, logits.shape[2]
    check(len(table) == 2 and table[1] > 0, "neighbours", "be [V, K] with K >= 1", table)
    remedy = "give a row for each token"
    check(table[0] == vocabulary, "neighbours", "be [V, K] for logits [B, N, V]", table, remedy)
    check_type(
        neighbours.dtype in _TABLES, "neighbours", "be int16, uint16 or int32", neighbours.dtype
    )
    check(
        neighbours.device == logits.device, "neighbours", "be on logits' device", neighbours.device
    )
    remedy = "verify_tree is exact"
    bounded = delta is not None or ratio is not None
    check(bounded, "delta", "be given, or ratio", None, remedy)
    check(delta is None or 0 <= delta < 1, "delta", "lie in [0, 1)", delta, remedy)
    check(
        ratio is None or 1 <= ratio < math.inf, "ratio", "be finite and at least 1", ratio, remedy
    )
    keys = (seeds, sequences, positions)
    warp = check_common(op, logits, uncond, keys, guidance, temperature, top_k, top_p)
    depth = check_depth(op, depth, logits.shape[1] - 1)
    # more than all cannot move
    bounds = (1.0 if delta is None else delta, math.inf if ratio is None else ratio)
    tensors = (tree, logits, uncond, neighbours)
    return _verify(op, implementation, *tensors, keys, warp, depth, "relaxed", bounds)


def verify_typical(
    tree: Tree,
    logits: torch.Tensor,
    *,
    epsilon: float,
    alpha: float,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    depth: int | None = None,
    implementation: str | None = None,
) -> Verified:
    """Accept the longest path on which every token is typical of the target: lossy, without a coin.

    Token x is typical where `p(x) > min(epsilon, alpha * exp(-entropy(p)))`, with `p` the processed
    distribution behind its parent, entropy in nats. Of the longest paths the likeliest is taken, of
    equally likely ones the first. The token that follows is drawn from the last node's p.

    Args:
        epsilon: in (0, 1); alpha: above 0.
        The others: see `verify_tree`; a child is known by `parents` here, and stands behind them.

    Returns, Raises: see `verify_tree`; a row without a distribution ends the paths through it.
    Source: Medusa (`posterior_threshold`, `posterior_alpha`).
    Cost: that of `verify_tree`.
    """
    op = "verify_typical"
    check_tree(op, tree, logits)
    require(op, 0 < epsilon < 1, "epsilon", "lie in (0, 1)", epsilon)
    require(op, 0 < alpha < math.inf, "alpha", "be finite and above 0", alpha)
    keys = (seeds, sequences, positions)
    warp = check_common(op, logits, uncond, keys, guidance, temperature, top_k, top_p)
    depth = check_depth(op, depth, logits.shape[1] - 1)
    tensors = (tree, logits, uncond, None)
    return _verify(op, implementation, *tensors, keys, warp, depth, "typical", (epsilon, alpha))


def _verify(
    op: str,
    implementation: str | None,
    tree: Tree,
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    neighbours: torch.Tensor | None,
    keys: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    warp: tuple[float, float, int, float],
    depth: int,
    rule: str,
    bounds: tuple[float, float] = (0.0, 0.0),
) -> Verified:
    """Run the op that the three functions of trees share."""
    device = logits.device.type
    available = _available(device)
    chosen = require_implementation(op, implementation, available, f"{device} tensors")
    bounds = (float(bounds[0]), float(bounds[1]))
    out = torch.ops.sdvg_kernels.verify_tree(
        *fields(tree), logits, uncond, neighbours, *keys, *warp, depth, rule, *bounds, chosen
    )
    return Verified(*out)


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


def _run(
    frame_rewards: torch.Tensor,
    first: torch.Tensor | None,
    tau: float,
    all_first: bool,
    aggregate: str,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation."""
    options = {"tau": tau, "all_first": all_first, "aggregate": aggregate}
    if implementation == "reference":
        return reference.route_blocks(frame_rewards, first, **options)
    from sdvg_kernels.verify import kernel

    return kernel.route_blocks(frame_rewards, first, **options)


_ops.implement("route_blocks", cpu=_run, cuda=_run)


def _run_chain(
    draft: torch.Tensor,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_probs: torch.Tensor | None,
    uncond: torch.Tensor | None,
    draft_uncond: torch.Tensor | None,
    seeds: torch.Tensor | None,
    sequences: torch.Tensor | None,
    positions: torch.Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    depth: int,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the chosen implementation."""
    tensors = (draft, logits, draft_logits, draft_probs, uncond, draft_uncond)
    keys = Keys(seeds, sequences, positions)
    warp = Warp(guidance, temperature, top_k, top_p)
    if implementation == "reference":
        return reference.verify_chain(*tensors, keys, warp, depth=depth)
    from sdvg_kernels.verify import chain

    return chain.verify_chain(*tensors, keys, warp, depth=depth)


def _run_tree(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    neighbours: torch.Tensor | None,
    seeds: torch.Tensor | None,
    sequences: torch.Tensor | None,
    positions: torch.Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    depth: int,
    rule: str,
    first_bound: float,
    second_bound: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the chosen implementation of `rule`; its bounds are (delta, ratio), (epsilon, alpha)."""
    tree = (tokens, parents, first_child, next_sibling)
    keys = Keys(seeds, sequences, positions)
    warp = Warp(guidance, temperature, top_k, top_p)
    bounds = (first_bound, second_bound)
    tensors = (*tree, logits, uncond, neighbours, keys, warp)
    if implementation == "reference":
        return reference.verify_tree(*tensors, depth=depth, rule=rule, bounds=bounds)
    from sdvg_kernels.verify import walk

    return walk.verify_tree(*tensors, depth=depth, rule=rule, bounds=bounds)


_ops.implement("verify_chain", cpu=_run_chain, cuda=_run_chain)
_ops.implement("verify_tree", cpu=_run_tree, cuda=_run_tree)
