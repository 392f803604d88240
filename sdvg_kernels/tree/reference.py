"""`expand_tree` and `build_tree` in eager PyTorch: the definition of truth, and what a CPU runs.

No step waits for the device: parents are followed by doubling, never until all have arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor

# where a climb along the parents ends: at the root, or at a candidate that is none
_ROOT, _DEAD = -1, -2


def expand_tree(
    logits: Tensor,
    scores: Tensor | None,
    *,
    top_k: int,
    uncond: Tensor | None,
    guidance: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [B, W * K] int64, scores [B, W * K] float32 and beams [B, K] int32."""
    # [B, W, V]
    x = _guided(logits, uncond, guidance)
    chances = (x.double() / temperature).log_softmax(2)
    is_good = ~x.isnan().any(2) & x.amax(2).isfinite()
    # a stable sort leaves equal logits in the order of their ids
    ids = x.sort(dim=2, descending=True, stable=True).indices[:, :, :top_k]
    total = chances.gather(2, ids)
    if scores is not None:
        is_good = is_good & scores.isfinite()
        total = scores[:, :, None].double() + total
    total = total.float().masked_fill(~is_good[:, :, None], -torch.inf)
    ids = ids.masked_fill(total == -torch.inf, -1)
    # a vocabulary that has fewer than K tokens
    short = (0, top_k - ids.shape[2])
    ids = torch.nn.functional.pad(ids, short, value=-1).flatten(1)
    total = torch.nn.functional.pad(total, short, value=-torch.inf).flatten(1)
    beams = total.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return ids, total, beams.int()


def _guided(logits: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Return `u + guidance * (c - u)` in float32; -inf where `c` is."""
    x = logits.float()
    if uncond is not None:
        u = uncond.float()
        scale = torch.full((), guidance, dtype=torch.float32, device=x.device)
        x = torch.where(x == -torch.inf, x, u + scale * (x - u))
    return x


def build_tree(
    root: Tensor,
    tokens: Tensor,
    scores: Tensor,
    parents: Tensor,
    limit: Tensor | None,
    *,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of a TokenTree of `size` nodes for each sequence."""
    batch, count = tokens.shape
    device = tokens.device
    place = torch.arange(count, device=device)
    parents = parents.long()
    is_good = (tokens >= 0) & scores.isfinite() & (parents >= _ROOT) & (parents < place)
    depths, ends = _climbed(parents.masked_fill(~is_good, _DEAD))
    fits = ends == _ROOT
    if limit is not None:
        fits = fits & (depths <= limit[:, None])
    order = scores.masked_fill(~fits, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
    # of those that do not fit, rank or not, none is chosen
    chosen = fits & (rank < size - 1)
    kept = _climbed(parents.masked_fill(~chosen, _DEAD))[1] == _ROOT
    # the root is node 0; what is not kept goes to a place more
    nodes = torch.where(kept, kept.cumsum(1), size)
    above = nodes.gather(1, parents.clamp(0, max(count - 1, 0))).masked_fill(parents < 0, 0)
    tree_tokens = torch.zeros((batch, size + 1), dtype=torch.int64, device=device)
    tree_tokens.scatter_(1, nodes, tokens.long())[:, 0] = root
    tree_parents = torch.full((batch, size + 1), -1, dtype=torch.int64, device=device)
    tree_parents.scatter_(1, nodes, above)
    tree_parents = tree_parents[:, :size]
    return tree_tokens[:, :size].contiguous(), tree_parents.int(), *links(tree_parents)


def _climbed(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each [B, M] is below where its climb ends, and where: _ROOT or _DEAD."""
    up, depths = parents, torch.ones_like(parents)
    for _ in range(parents.shape[1].bit_length()):
        going, at = up >= 0, up.clamp(min=0)
        depths = torch.where(going, depths + depths.gather(1, at), depths)
        up = torch.where(going, up.gather(1, at), up)
    return depths, up


def links(parents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return first_child, next_sibling, depths and mask of trees with `parents` [B, N] int64.

    A parent comes before its children; -1: the root, which is node 0, or padding.
    """
    size, device = parents.shape[1], parents.device
    node = torch.arange(size, device=device)
    is_node = (parents >= 0) | (node == 0)
    # [B, N, N]: whether node j (last) is a child, or a later sibling, of node i
    child = parents[:, None, :] == node[:, None]
    later = (parents[:, None, :] == parents[:, :, None]) & (node > node[:, None])
    later = later & (parents >= 0)[:, :, None]
    sees = torch.eye(size, dtype=torch.bool, device=device) & is_node[:, :, None]
    up = parents
    for _ in range(size.bit_length()):
        beyond = sees.gather(1, up.clamp(min=0)[:, :, None].expand_as(sees))
        sees = sees | (beyond & (up >= 0)[:, :, None])
        up = torch.where(up >= 0, up.gather(1, up.clamp(min=0)), up)
    depths = sees.sum(2).int() - 1
    words = torch.nn.functional.pad(sees, (0, -size % 32)).unflatten(2, (-1, 32)).long()
    words = (words << torch.arange(32, device=device)).sum(3)
    mask = torch.where(words >= 2**31, words - 2**32, words).int()
    return _first(child), _first(later), depths, mask


def _first(marks: Tensor) -> Tensor:
    """Return the first place that is marked in the last dimension, int32; -1: none is."""
    first = marks.to(torch.uint8).argmax(-1)
    return first.masked_fill(~marks.any(-1), -1).int()
