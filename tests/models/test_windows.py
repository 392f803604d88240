"""Videos longer than the window: the ring against the stock model under a mask, and a plain cache.

27 latents are nine blocks, 240 are eighty. A window of 9 frames behind a sink of 3 is LongLive's
local attention of 12; one of 21 without a sink is Self-Forcing's.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from sdvg.models.wan import CausalWan
from tests.tiny import FRAMES, encode, tiny_wan

PROMPTS = ["a seven moving left", "a two moving up"]
WINDOWS = {
    "LongLive": {"sink_frames": 3, "window_frames": 9},
    "Self-Forcing": {"sink_frames": 0, "window_frames": 21},
}
STEP = 500.0


def stock_of(model: CausalWan) -> nn.Module:
    """Return diffusers' own model with the same weights."""
    stock = WanTransformer3DModel(**model.transformer.config)
    stock.load_state_dict(model.transformer.state_dict())
    return stock.requires_grad_(False)


def both(accelerated: bool, **options: object) -> tuple[CausalWan, nn.Module]:
    """Return a model with a ring, and the stock one."""
    model = tiny_wan(seed=4, layers=3, **options)
    stock = stock_of(model)
    return (model.accelerate() if accelerated else model), stock


def mask_of(model: CausalWan, frames: int) -> Tensor:
    """Return `[T, T]`: who sees whom, as the window is worded.

    A block sees itself, the sink and what is at most a window before its own end.
    """
    token = torch.arange(frames * model.frame_tokens)
    frame, block = token // model.frame_tokens, token // (FRAMES * model.frame_tokens)
    end = (block + 1) * FRAMES
    near = frame[None, :] >= end[:, None] - model.window_frames
    sees = near | (frame[None, :] < model.sink_frames)
    return sees & (block[None, :] <= block[:, None])


class Masked(WanAttnProcessor):
    """Stock attention; self-attention under a mask, bool or additive."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self, attn: nn.Module, hidden: Tensor, encoder: Tensor | None = None, *rest: object
    ) -> Tensor:
        own = None if encoder is not None else self.mask
        return super().__call__(attn, hidden, encoder, own, *rest[1:])


def whole(stock: nn.Module, model: CausalWan, clean: Tensor, steps: Tensor) -> Tensor:
    """Return the clean latents that one masked pass over all of `clean` predicts."""
    stock.set_attn_processor(Masked(mask_of(model, clean.shape[1])))
    text = encode(PROMPTS[: len(clean)])
    (velocity,) = stock(clean.transpose(1, 2), steps, text, return_dict=False)
    return clean - STEP / 1000 * velocity.transpose(1, 2)


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_27_latents_block_by_block_equal_one_masked_pass(
    window: dict[str, int], accelerated: bool
) -> None:
    model, stock = both(accelerated, **window)
    clean = torch.randn(2, 27, *model.block_shape[1:])
    expected = whole(stock, model, clean, torch.full((2,), STEP))
    model.start(PROMPTS)
    for start in range(0, 27, FRAMES):
        part = slice(start, start + FRAMES)
        got = model.denoise(clean[:, part], STEP, start_frame=start)
        assert (got - expected[:, part]).abs().max() < 1e-5
        # the mask's context is at the same timestep
        model.keep(start_frame=start)
    if window["window_frames"] < 21:
        # it is the window that was tried: without one, the last block sees more
        model.window_frames = 27
        other = whole(stock, model, clean, torch.full((2,), STEP))
        assert (other - expected)[:, -FRAMES:].abs().max() > 1e-3


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_block_after_clean_passes_of_several_equals_one_masked_pass(
    window: dict[str, int], accelerated: bool
) -> None:
    """Eight blocks are written at timestep 0, up to four in one pass; the ninth is denoised."""
    model, stock = both(accelerated, write_blocks=4, **window)
    clean = torch.randn(2, 27, *model.block_shape[1:])
    steps = torch.zeros(2, 27 * model.frame_tokens)
    steps[:, 24 * model.frame_tokens :] = STEP
    expected = whole(stock, model, clean, steps)[:, 24:]
    model.start(PROMPTS)
    model.write(clean[:, :24], start_frame=0)
    got = model.denoise(clean[:, 24:], STEP, start_frame=24)
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
def test_past_keys_weigh_less_but_for_the_first_frame_as_under_an_additive_mask(
    accelerated: bool,
) -> None:
    """Krea's 0.3: the first frame and the block itself keep their weight."""
    model, stock = both(accelerated, sink_frames=0, window_frames=21, past_weight=0.3)
    clean = torch.randn(2, 9, *model.block_shape[1:])
    frame = torch.arange(9).repeat_interleave(model.frame_tokens)
    past = (frame // FRAMES < frame[:, None] // FRAMES) & (frame >= 1)
    mask = torch.zeros(past.shape).masked_fill(past, math.log(0.3))
    mask = mask.masked_fill(~mask_of(model, 9), -torch.inf)
    stock.set_attn_processor(Masked(mask))
    (velocity,) = stock(
        clean.transpose(1, 2), torch.full((2,), STEP), encode(PROMPTS), return_dict=False
    )
    expected = clean - STEP / 1000 * velocity.transpose(1, 2)
    model.start(PROMPTS)
    for start in range(0, 9, FRAMES):
        part = slice(start, start + FRAMES)
        got = model.denoise(clean[:, part], STEP, start_frame=start)
        assert (got - expected[:, part]).abs().max() < 1e-5
        model.keep(start_frame=start)


class Plain(WanAttnProcessor):
    """Stock attention over a cache that is a list of blocks, one for each layer."""

    def __init__(self, model: CausalWan) -> None:
        super().__init__()
        self.sink = model.sink_frames // FRAMES
        self.past = (model.window_frames - FRAMES) // FRAMES
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.clean = False

    def __call__(
        self,
        attn: nn.Module,
        hidden: Tensor,
        encoder: Tensor | None,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        heads = (attn.heads, -1)
        query, key = (
            turned(norm(project(hidden)).unflatten(2, heads), *rotary)
            for norm, project in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        own = (key, attn.to_v(hidden).unflatten(2, heads))
        recent = max(self.sink, len(self.blocks) - self.past)
        seen = [*self.blocks[: self.sink], *self.blocks[recent:], own]
        if self.clean:
            self.blocks.append(own)
        keys, values = (torch.cat(part, 1).transpose(1, 2) for part in zip(*seen, strict=True))
        out = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), keys, values)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs, by tables with each value twice as diffusers has them."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.complex(cos[..., 0::2], sin[..., 1::2])
    return torch.view_as_real(pairs * turns).flatten(-2)


class Later(nn.Module):
    """The stock RoPE of the whole video, and of it the rows of the running block."""

    def __init__(self, stock: nn.Module, frames: int) -> None:
        super().__init__()
        self.stock, self.frames, self.start = stock, frames, 0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin `[1, T, 1, D]`."""
        video = hidden.new_empty((1, 1, self.frames, *hidden.shape[3:]))
        tables = self.stock(video)
        tokens = tables[0].shape[1] // self.frames
        rows = slice(self.start * tokens, (self.start + hidden.shape[2]) * tokens)
        return tuple(table[:, rows] for table in tables)


@pytest.mark.parametrize("accelerated", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_240_latents_in_constant_memory_equal_a_plain_cache(
    window: dict[str, int], accelerated: bool
) -> None:
    model, stock = both(accelerated, write_blocks=1, **window)
    latents = torch.randn(1, 240, *model.block_shape[1:])
    text = encode(PROMPTS[:1])
    plain = [Plain(model) for _ in stock.blocks]
    stock.set_attn_processor(WanAttnProcessor())
    for block, processor in zip(stock.blocks, plain, strict=True):
        block.attn1.set_processor(processor)
    stock.rope = Later(stock.rope, 240)
    model.start(PROMPTS[:1])
    ring = model.cache.k
    assert ring.shape[2] == (model.sink_frames + model.window_frames) * model.frame_tokens

    def reference(part: Tensor, step: float, start: int) -> Tensor:
        stock.rope.start = start
        for processor in plain:
            processor.clean = step == 0
        steps = torch.full((1,), step)
        (velocity,) = stock(part.transpose(1, 2), steps, text, return_dict=False)
        return part - step / 1000 * velocity.transpose(1, 2)

    for start in range(0, 240, FRAMES):
        part = latents[:, start : start + FRAMES]
        # before the ring wraps, while it does, and at the end
        if start >= 228 or start % 24 == 0:
            got = model.denoise(part.flip(1), STEP, start_frame=start)
            assert (got - reference(part.flip(1), STEP, start)).abs().max() < 1e-5
        model.write(part, start_frame=start)
        reference(part, 0.0, start)
    assert model.cache.k is ring
    assert ring.isfinite().all()
