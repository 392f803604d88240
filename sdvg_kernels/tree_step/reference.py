"""A tree's step in eager PyTorch: the definition of truth, and what a CPU runs.

Source: VVS (arXiv 2511.13587) for chains and stale features, the selector and similarity of paths;
EAGLE-2 (arXiv 2406.16858) for trees.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_RAISES = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def draft_entries(
    ids: Tensor,
    features: Tensor,
    known: Tensor,
    lengths: Tensor,
    drafted: Tensor,
    layout: list[int],
    room: int,
) -> tuple[Tensor, ...]:
    """Return the fields of DraftEntries."""
    prefix, tokens, extra, _ = layout
    size, words = ids.shape[1] - 1, -(-room // 32)
    # [R, T]
    entry = torch.arange(room, dtype=torch.int32, device=ids.device)
    slots = drafted[:, None] + entry
    live = slots < known[:, None]
    before, missing = slots - 1, (known - 1 - lengths)[:, None]
    # the features of the chain are missing: those of as many tokens before stand in
    source = torch.where(before < lengths[:, None], before, before - missing).clamp(0, size)
    fed = torch.where(live[..., None], _rows(features, source), features.new_zeros(()))
    found = ids.gather(1, slots.clamp(0, size).long()).clamp(min=0).masked_fill(~live, 0)
    mask = torch.where(live[..., None], _below(entry + 1, words), 0)
    root = ids.gather(1, (known - 1).long()[:, None])[:, 0]
    # no feature stands before the first token of all: a prompt of one is fed alone
    limit = torch.where(lengths > 0, _end(known, layout, size) - known, 0)
    made, stride = known - prefix, tokens + extra
    places = made // stride * tokens + made % stride
    last = (known - 1 - drafted).clamp(0, room - 1).long()
    return found, fed, slots.masked_fill(~live, -1), mask, last, root, limit, places


def beam_entries(
    known: Tensor,
    tokens: Tensor,
    scores: Tensor,
    beams: Tensor,
    features: Tensor,
    mask: Tensor | None,
    level: int,
    words: int,
    first: int,
) -> tuple[Tensor, ...]:
    """Return the fields of BeamEntries."""
    rows, width = len(known), beams.shape[1]
    index = beams.long()
    above = _each(index // width, rows)
    ids = tokens.gather(1, index).clamp(min=0) + first
    at = torch.arange(level * width, (level + 1) * width, dtype=torch.int32, device=known.device)
    sees = (_below(at + 1, words) ^ _below(at, words)).expand(rows, -1, -1)
    if mask is not None:
        sees = sees | _rows(mask, above)
    begin = width + (level - 1) * width**2 if level else 0
    return (
        _each(ids, rows),
        _rows(features, above),
        known[:, None] + at,
        (known + level)[:, None].repeat(1, width),
        sees.contiguous(),
        scores.gather(1, index),
        (beams + begin).repeat_interleave(width, 1),
    )


def tree_entries(
    ids: Tensor,
    known: Tensor,
    lengths: Tensor,
    skipping: Tensor,
    tokens: Tensor,
    depths: Tensor,
    mask: Tensor,
    room: int,
    first: int,
) -> tuple[Tensor, ...]:
    """Return the fields of TreeEntries."""
    rows, size = len(ids), ids.shape[1] - 1
    nodes, words = tokens.shape[1], -(-room // 32)
    chain = torch.where(_each(skipping, rows) | (known >= size), -1, known - 1 - lengths)
    i = torch.arange(room, dtype=torch.int32, device=ids.device)
    j = torch.arange(nodes, dtype=torch.int32, device=ids.device)
    levels, behind = _each(depths, rows), lengths[:, None] + i
    # [R, room + N]
    live = torch.cat((i < chain[:, None], (levels >= 0) & (chain >= 0)[:, None]), 1)
    slots = torch.cat((behind, lengths[:, None] + 32 * words + j), 1)
    positions = torch.cat((behind, (known - 1)[:, None] + levels), 1).clamp(0, size - 1)
    waiting = ids.gather(1, behind.clamp(0, size).long())
    grown = _each(tokens, rows) + first
    grown[:, 0] = ids.gather(1, (known - 1).long()[:, None])[:, 0]
    found = torch.cat((waiting, grown), 1).clamp(min=0)
    before = torch.cat(
        (
            _below(i + 1, words).expand(rows, -1, -1),
            _below(chain, words)[:, None].expand(-1, nodes, -1),
        ),
        1,
    )
    own = torch.nn.functional.pad(_each(mask, rows), (0, 0, room, 0))
    return (
        found.masked_fill(~live, 0),
        slots.masked_fill(~live, -1),
        positions.masked_fill(~live, 0),
        torch.cat((before, own), 2) * live[..., None],
        chain,
    )


def commit_tree_(
    ids: Tensor,
    features: Tensor,
    known: Tensor,
    lengths: Tensor,
    drafted: Tensor,
    tokens: Tensor,
    path: Tensor,
    counts: Tensor,
    drawn: Tensor | None,
    chain: Tensor | None,
    out: Tensor | None,
    layout: list[int],
) -> Tensor:
    """Commit to the state, and return the path that `compact_` takes."""
    rows, (batch, levels) = len(ids), path.shape
    size, extra, first = ids.shape[1] - 1, layout[2], layout[3]
    nodes = path.clamp(0, tokens.shape[1] - 1).long()
    counts = counts.int()
    moves = known.new_empty((rows, 0))
    found = tokens.gather(1, nodes) + first
    if drawn is None:
        made = (counts - 1).clamp(min=0)
    else:
        # a row without a distribution commits its -1, which is found when the frame is whole
        made = counts = torch.where(chain[:batch] >= 0, counts.clamp(min=1), 0)
        moves = _keep(features, lengths, chain, nodes, counts, out, tokens.shape[1])
        # the drawn one comes right behind the accepted
        last = torch.where(drawn < 0, -1, drawn + first)[:, None]
        order = torch.arange(levels + 1, device=ids.device)
        found = torch.cat((found, last), 1)
        found = torch.where(order == (counts - 1)[:, None], last, found)
    order = torch.arange(found.shape[1], dtype=torch.int32, device=ids.device)
    made, slots, end = _each(made, rows), known[:, None] + order, _end(known, layout, size)
    # a token drawn behind a frame's last is none
    there = (order < made[:, None]) & (slots < end[:, None])
    ids.scatter_(1, torch.where(there, slots, size).long(), _each(found, rows))
    after = torch.minimum(known + made, end)
    whole = (after == end) & (after < size)
    known.copy_(torch.where(whole, after + extra, after))
    drafted.copy_(lengths + 1)
    return moves


def _keep(
    features: Tensor,
    lengths: Tensor,
    chain: Tensor,
    nodes: Tensor,
    counts: Tensor,
    out: Tensor,
    size: int,
) -> Tensor:
    """Copy the features of chain and path to their slots, and return where their K/V lie."""
    rows, room = len(out), out.shape[1] - size
    path = _each(torch.nn.functional.pad(nodes, (1, 0)), rows)
    k = torch.arange(room + path.shape[1], device=out.device)
    beyond = k - chain[:, None]
    node = path.gather(1, beyond.clamp(0, path.shape[1] - 1))
    is_chain, there = beyond < 0, beyond < _each(counts, rows)[:, None]
    slots = torch.where(there, lengths[:, None] + k, features.shape[1] - 1)
    slots = slots.clamp(max=features.shape[1] - 1)
    kept = _rows(out, torch.where(is_chain, k, node + room))
    features[torch.arange(rows, device=out.device)[:, None], slots] = kept
    base = 32 * -(-room // 32)
    return torch.where(there, torch.where(is_chain, k, node + base), -1).int()


def select_path(
    depths: Tensor,
    first_child: Tensor,
    mask: Tensor,
    wanted: Tensor,
    seeds: Tensor,
    sequences: Tensor,
    positions: Tensor,
    levels: int,
    likely: bool,
) -> tuple[Tensor, Tensor]:
    """Return path [B, levels] int32 and counts [B] int32."""
    leaves = (first_child < 0) & (depths >= 0)
    bits = _philox(seeds, sequences, positions, depths.shape[1])
    # argmin takes any of several minima: the first is wanted
    bits = bits.masked_fill(~leaves, _WORD + 1)
    leaf = (bits == bits.amin(1, keepdim=True)).to(torch.uint8).argmax(1)[:, None]
    if likely:
        leaf = torch.zeros_like(leaf)
        for _ in range(levels):
            # children stand behind their parents
            leaf = torch.maximum(leaf, first_child.gather(1, leaf).long())
    lengths = torch.where(leaves, depths + 1, 0)
    mean = lengths.sum(1) // leaves.sum(1).clamp(min=1)
    kept = torch.minimum(depths.gather(1, leaf)[:, 0], mean - 1).clamp(0, levels).int()
    # [B, N]: the leaf and what is above it
    above = _seen(mask, depths.shape[1]).gather(1, leaf[..., None].expand(-1, -1, depths.shape[1]))[
        :, 0
    ]
    above = above & (depths >= 1) & (depths <= levels)
    node = torch.arange(depths.shape[1], dtype=torch.int32, device=depths.device)
    path = torch.full((len(depths), levels + 1), -1, dtype=torch.int32, device=depths.device)
    # what is not on it goes to a place more
    place = torch.where(above, depths - 1, levels).long()
    path.scatter_(1, place, node.expand_as(depths).contiguous())
    counts = torch.where(wanted & (kept > 0), kept + 1, 0)
    return path[:, :levels].contiguous(), counts


def path_similarity(
    tokens: Tensor,
    depths: Tensor,
    first_child: Tensor,
    mask: Tensor,
    codebook: Tensor,
    decay: float,
    stride: int,
) -> Tensor:
    """Return the similarity [B] float32."""
    size = depths.shape[1]
    levels = max(size - 1, 1)
    leaves = (first_child < 0) & (depths >= 0)
    used = leaves & ((leaves.long().cumsum(1) - 1) % stride == 0)
    # [B, N]: how many of the paths a node is on
    weight = (_seen(mask, size) & used[..., None]).sum(1).double()
    vectors = codebook[tokens.clamp(0, len(codebook) - 1)].double()
    # [B, L, N]
    level = depths[:, None] == torch.arange(1, levels + 1, device=depths.device)[:, None]
    share = level * weight[:, None]
    alone = (share * vectors.square().sum(-1)[:, None]).sum(2)
    pairs = ((share @ vectors).square().sum(-1) - alone) / 2
    # levels beyond the longest path take no share
    factor = (share > 0).any(2) * decay ** torch.arange(levels, device=depths.device).double()
    number = used.sum(1).double()
    total = (factor * pairs).sum(1) / factor.sum(1).clamp(min=1e-9)
    found = total / (number * (number - 1) / 2).clamp(min=1)
    return torch.where(number > 1, found, 0.0).float()


def _seen(mask: Tensor, size: int) -> Tensor:
    """Return whether node i (second) sees node j (last): bool [B, N, N]."""
    node = torch.arange(size, device=mask.device)
    return (mask[..., node // 32] >> node % 32 & 1).bool()


def _philox(seeds: Tensor, sequences: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return words [B, count] int64 of noise: word `n % 4` of counter (n // 4, ., ., 0)."""
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    zero = torch.zeros_like(seeds[:, None] + blocks)
    c0, c1, c2, c3 = (
        zero + blocks,
        zero + (positions.long() & _WORD)[:, None],
        zero + (sequences.long() & _WORD)[:, None],
        zero,
    )
    key = [seeds[:, None] & _WORD, (seeds[:, None] >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # a product of two words fills 64 bits, sign included: the shift brings copies of it in
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ key[0], second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ key[1], first & _WORD
        key = [(word + raised) & _WORD for word, raised in zip(key, _RAISES, strict=True)]
    return torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :count]


def _end(known: Tensor, layout: list[int], size: int) -> Tensor:
    """Return the slot behind the frame of the next token, or the video where frames are joined."""
    prefix, tokens, extra, _ = layout
    if not extra:
        return torch.full_like(known, size)
    stride = tokens + extra
    return prefix + (known - prefix) // stride * stride + tokens


def _each(values: Tensor, rows: int) -> Tensor:
    """Return `values [B, ...]` of sequences for all rows: r is of sequence r % B."""
    return values.repeat(rows // max(len(values), 1), *(1,) * (values.dim() - 1))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Return `values [R, n, C]` at `index [R, m]`, bit for bit: on a CPU `gather` changes NaN."""
    return values[torch.arange(len(values), device=values.device)[:, None], index.long()]


def _below(counts: Tensor, words: int) -> Tensor:
    """Return int32 words [..., words] whose first `counts` bits are set."""
    left = counts.long()[..., None] - 32 * torch.arange(words, device=counts.device)
    bits = (1 << left.clamp(0, 32)) - 1
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()
