"""The state that speculative decoding keeps of its rows, and what passes are fed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FrameLayout(NamedTuple):
    """Where the tokens of a video lie.

        slots   0 ... prefix | tokens | extra | tokens | extra | ... tokens |
                prompt         frame 0          frame 1          last frame

    With `extra` a tree ends with its frame: what leads to the next is given, not drawn.
    """

    # tokens of the prompt
    prefix: int
    # tokens of a frame
    tokens: int
    # tokens between frames
    extra: int
    # the id of code 0
    first: int


class TreeState(NamedTuple):
    """What is kept of R rows: contiguous tensors on one device.

        slots     0 ... lengths - 1 | lengths ... known - 2 | known - 1 | ...
                  K/V                 the chain               the root

    Row r belongs to sequence `r % B`: with guidance there are two rows of each, first those with
    the condition. S is the slots of a video; one more takes what goes nowhere.
    """

    # [R, S + 1] int64: by slot; below 0: none could be drawn
    ids: torch.Tensor
    # [R, S + 1, width] floating: of the target, by slot, where there are K/V
    features: torch.Tensor
    # [R] int32: tokens in slots below are committed; at least 1 and lengths + 1
    known: torch.Tensor
    # [R] int32: those below have K/V and features
    lengths: torch.Tensor
    # [R] int32, at least 1: the drafter has seen those below with features that were no stand-ins
    drafted: torch.Tensor


class DraftEntries(NamedTuple):
    """What the drafter is fed first; slots are positions, too. In padding 0, its slots -1."""

    # [R, T] int64, none below 0
    ids: torch.Tensor
    # [R, T, width]: of the tokens before
    features: torch.Tensor
    # [R, T] int32
    slots: torch.Tensor
    # [R, T, ceil(T / 32)] int32, over the slots from `drafted` on: each entry sees those up to it
    mask: torch.Tensor
    # [R] int64: which entry is the root's
    last: torch.Tensor
    # [R] int64: the root's id, as it is
    root: torch.Tensor
    # [R] int32: the levels that a tree may have below its root
    limit: torch.Tensor
    # [R] int32: the place of the next token, counted over all frames: it keys the noise
    places: torch.Tensor


class BeamEntries(NamedTuple):
    """What the drafter is fed next: the beams of a level."""

    # [R, K] int64, none below 0
    ids: torch.Tensor
    # [R, K, width]: of the beams that they continue
    features: torch.Tensor
    # [R, K] int32
    slots: torch.Tensor
    # [R, K] int32
    positions: torch.Tensor
    # [R, K, W] int32, over the slots from `known` on
    mask: torch.Tensor
    # [B, K] float32
    scores: torch.Tensor
    # [B, K * K] int32: the candidates that the next level's continue
    parents: torch.Tensor


class TreeEntries(NamedTuple):
    """What the target is fed: [chain | tree]. In padding 0, its slots -1."""

    # [R, T] int64, none below 0
    ids: torch.Tensor
    # [R, T] int32
    slots: torch.Tensor
    # [R, T] int32
    positions: torch.Tensor
    # [R, T, W] int32, over the slots from `lengths` on
    mask: torch.Tensor
    # [R] int32: how long the chain is; -1: the row is not fed
    chain: torch.Tensor
