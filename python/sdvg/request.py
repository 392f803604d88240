"""What a call of `SDVG.generate` asks for, checked: each refusal is one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdvg.types import CausalModel


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError for no prompt or an empty one, TypeError for what is no text."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"sdvg: prompts must be a non-empty list of texts, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"sdvg: a prompt must be a text, got {prompt!r}")
        if not prompt.strip():
            raise ValueError(f"sdvg: a prompt must not be empty, got {prompt!r}")


def check_count(num_blocks: int) -> None:
    """Raise ValueError for fewer than one block, TypeError for no integer."""
    if not isinstance(num_blocks, int):
        raise TypeError(f"sdvg: num_blocks must be an integer, got {num_blocks!r}")
    if num_blocks < 1:
        raise ValueError(f"sdvg: num_blocks must be at least 1, got {num_blocks}")


def keys(
    seed: int | Sequence[int], sequences: Sequence[int] | None, count: int
) -> tuple[int | tuple[int, ...], tuple[int, ...]]:
    """Return the seed, or one for each of `count` videos, and their ids; see `SDVG.generate`."""
    shared = isinstance(seed, int)
    if sequences is None:
        sequences = range(count) if shared else (0,) * count
    ids = _integers("sequences", sequences, count)
    return (seed if shared else _integers("seed", seed, count)), ids


def split(
    given: Tensor | None, model: CausalModel, batch: int, num_blocks: int
) -> dict[int, Tensor]:
    """Return the blocks of given clean latents where `model` lies, in float32 or wider.

    Raises ValueError unless they are whole blocks of `batch` videos, `num_blocks` at most.
    """
    if given is None:
        return {}
    size, *frame = model.block_shape
    count, rest = divmod(given.shape[1] if given.dim() == 5 else 0, size)
    if [given.shape[0], *given.shape[2:]] != [batch, *frame] or rest or not 0 < count <= num_blocks:
        shape = ", ".join(map(str, (batch, f"n * {size}", *frame)))
        raise ValueError(
            f"sdvg: given must be clean latents [{shape}] of 1 to {num_blocks} blocks, "
            f"got {list(given.shape)}"
        )
    wide = torch.promote_types(model.dtype, torch.float32)
    return dict(enumerate(given.to(model.device, wide).split(size, dim=1)))


def _integers(name: str, values: Sequence[int], count: int) -> tuple[int, ...]:
    """Return one integer for each of `count` prompts, checked."""
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or not all(isinstance(value, int) for value in values):
        raise TypeError(
            f"sdvg: {name} must be an integer for each of {count} prompts, got {values!r}"
        )
    if len(values) != count:
        raise ValueError(
            f"sdvg: {name} must name one for each of {count} prompts, got {len(values)}"
        )
    return tuple(values)
