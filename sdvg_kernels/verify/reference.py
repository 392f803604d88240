"""`route_blocks` in eager PyTorch: the definition of truth, and the op's CPU implementation."""

from __future__ import annotations

import torch


def route_blocks(
    frame_rewards: torch.Tensor,
    first: torch.Tensor | None,
    *,
    tau: float,
    all_first: bool,
    aggregate: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (accept [B] bool, score [B] float32); a NaN in a row makes its score NaN: rejected."""
    if aggregate == "min":
        score = frame_rewards.float().amin(1)
    else:
        # a float64 sum rounds to the same float32 in any order
        score = frame_rewards.float().double().mean(1).float()
    accept = score >= torch.full((), tau, dtype=torch.float32, device=score.device)
    if all_first:
        accept = torch.zeros_like(accept)
    elif first is not None:
        accept = accept & ~first
    return accept, score
