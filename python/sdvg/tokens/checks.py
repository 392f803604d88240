"""What decoders of token grids are given: a sentence for what they cannot take."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdvg.tokens.diagonal import Actions, Layout, Sampling
    from sdvg.tokens.window import TokenModel


def whole(op: str, name: str, value: object, least: int | None = None) -> int:
    """Return a whole number as an int; TypeError for what is none, ValueError below `least`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {number}")
    return number


def each(op: str, name: str, values: Sequence[int] | None, default: Sequence[int]) -> list[int]:
    """Return one whole number for each sequence of a batch: `values`, or `default` for None."""
    if values is None:
        return list(default)
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(f"{op}: {name} must be whole numbers, one each, got {values!r}")
    if len(values) != len(default):
        raise ValueError(f"{op}: {name} must be {len(default)}, one each, got {len(values)}")
    return [whole(op, name, value) for value in values]


def check_layout(op: str, layout: Layout, vocabulary: int) -> None:
    """Raise unless the model has the ids of the layout."""
    last = layout.first + layout.codes
    if not 0 <= layout.first < last <= vocabulary:
        raise ValueError(
            f"{op}: codes must lie in the vocabulary of {vocabulary}, got [{layout.first}, {last})"
        )
    if layout.eol is not None and not 0 <= layout.eol < vocabulary:
        raise ValueError(f"{op}: eol must lie in the vocabulary of {vocabulary}, got {layout.eol}")


def check_videos(
    op: str,
    model: TokenModel,
    layout: Layout,
    sampling: Sampling,
    *,
    prompts: Tensor,
    frames: int,
    uncond: Tensor | None,
    actions: Tensor | Actions | None,
) -> None:
    """Raise unless what videos are asked for with fits together."""
    if not isinstance(prompts, Tensor):
        raise TypeError(f"{op}: prompts must be a tensor of ids, got {type(prompts).__name__}")
    if prompts.ndim != 2 or not prompts.shape[1]:
        raise ValueError(f"{op}: prompts must be ids [B, P >= 1], got {list(prompts.shape)}")
    whole(op, "frames", frames, 1)
    check_ids("prompts", prompts, tuple(prompts.shape), model.vocabulary, op=op)
    guided = sampling.guidance != 1
    if guided != (uncond is not None):
        raise ValueError(
            f"{op}: uncond must be given with guidance and only then, got guidance "
            f"{sampling.guidance:g} {'without' if guided else 'with'} it"
        )
    if uncond is not None:
        check_ids("uncond", uncond, tuple(prompts.shape), model.vocabulary, op=op)
    if isinstance(actions, Tensor):
        wanted = (len(prompts), frames - 1, layout.extra)
        check_ids("actions", actions, wanted, model.vocabulary, op=op)
    elif layout.extra and frames > 1 and not isinstance(actions, Callable):
        raise ValueError(
            f"{op}: actions must be given for {layout.extra} tokens between frames, got {actions!r}"
        )


def check_ids(
    name: str, ids: Tensor, shape: tuple[int, ...], vocabulary: int, *, op: str = "diagonal"
) -> None:
    """Raise unless `ids` have `shape` and lie in the vocabulary; they are read by the host."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of ids, got {type(ids).__name__}")
    if tuple(ids.shape) != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {ids.dtype}")
    if ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{op}: {name} must lie in the vocabulary of {vocabulary}, "
                f"got ids from {low} to {high}"
            )


def require_tokens(
    codes: Tensor, frame: int, sequences: Sequence[int], *, op: str = "diagonal"
) -> None:
    """Raise unless each place of `codes [rows, h, w]` was drawn; the host waits for them."""
    bad = (codes < 0).flatten(1).any(1).tolist()
    if any(bad):
        raise ValueError(
            f"{op}: logits must be finite, got NaN or infinity in frame "
            f"{frame} of sequence {sequences[bad.index(True)]}"
        )
