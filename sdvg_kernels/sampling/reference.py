"""`sample_tokens` in eager PyTorch: the definition of truth, and the op's CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor

# Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_RAISES = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def sample_tokens(
    logits: Tensor,
    uncond: Tensor | None,
    seeds: Tensor | None,
    sequences: Tensor | None,
    positions: Tensor | None,
    *,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    index: Tensor | None,
    out: Tensor,
) -> None:
    """Write the chosen ids into `out`; a `top_k` of 0 keeps all."""
    x = guided(logits, uncond, guidance)
    scores = x
    if temperature > 0:
        kept = warped(x, temperature, top_k, top_p)
        race = exponential(seeds, sequences, positions, x.shape[1])
        scores = kept - race.log()
    # argmax takes any of several maxima: the first is wanted
    best = scores.amax(1, keepdim=True)
    token = (scores == best).to(torch.uint8).argmax(1)
    token = torch.where(x.isnan().any(1) | x.amax(1).isinf(), -1, token).to(out.dtype)
    flat = out.view(-1)
    if index is None:
        flat.copy_(token)
        return
    index = index.long()
    inside = (index >= 0) & (index < len(flat))
    # what goes nowhere goes to a place more
    padded = torch.cat((flat, flat.new_empty(1)))
    padded[torch.where(inside, index, len(flat))] = token
    flat.copy_(padded[:-1])


def guided(logits: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """Return `u + guidance * (c - u)` [N, V] float32; -inf where `c` is."""
    x = logits.float()
    if uncond is not None:
        u = uncond.float()
        scale = torch.full((), guidance, dtype=torch.float32, device=x.device)
        x = torch.where(x == -torch.inf, x, u + scale * (x - u))
    return x


def warped(x: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the logits [N, V] float64 after temperature, top-k and top-p; -inf: left out."""
    if top_k:
        least = x.topk(top_k, 1).values[:, -1:]
        x = x.masked_fill(x < least, -torch.inf)
    scaled = x.double() / temperature
    if top_p < 1:
        ordered = scaled.sort(1, descending=True).values
        mass = (ordered - ordered[:, :1]).exp().cumsum(1)
        # the first place where the mass, its own included, reaches top_p
        last = (mass < top_p * mass[:, -1:]).sum(1, keepdim=True).clamp(max=x.shape[1] - 1)
        scaled = scaled.masked_fill(scaled < ordered.gather(1, last), -torch.inf)
    return scaled


def exponential(seeds: Tensor, sequences: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return standard exponential noise [N, count] float64: word `v % 4` of counter `v // 4`."""
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    # [N, blocks]
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
    bits = torch.stack((c0, c1, c2, c3), -1).flatten(1)[:, :count]
    # 1 - u, exactly, for the uniform u = (bits + 1/2) / 2^32
    return -((_WORD - bits).double().add(0.5) * 2.0**-32).log()
