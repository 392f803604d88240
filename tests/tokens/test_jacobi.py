"""Speculative coupled decoding has raster order's law, and its own bookkeeping holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sdvg.models.tokens import LlamaSizes, TokenLlama
from sdvg.tokens import DiagonalDecoder, JacobiDecoder, Layout, Sampling
from sdvg.tokens.jacobi import probabilities
from sdvg_kernels import diagonal_schedule

SIZES = LlamaSizes(1, 16, 2, 1, 8, 16, 6)
# three codes of six ids, one action between frames
LAYOUT = Layout(1, 2, 3, first=2, extra=1)


@pytest.fixture(scope="module")
def model() -> TokenLlama:
    torch.manual_seed(2)
    made = TokenLlama(SIZES).double()
    for layer in made.layers:
        layer.qkv.weight.data *= 2
        layer.out.weight.data *= 3
    made.head.weight.data *= 2
    return made.eval().requires_grad_(False)


def _after(model: TokenLlama, ids: Tensor) -> Tensor:
    """Return the logits after `ids [B, L]`."""
    cache = model.new_cache(len(ids), ids.shape[1])
    model.prefill(ids[:, :-1], cache)
    slots = torch.full((len(ids), 1), ids.shape[1] - 1, dtype=torch.int32)
    grid = diagonal_schedule(1, 1, 1, 1, prefix=1000).grid
    return model(ids[:, -1:], slots, torch.zeros_like(slots), grid, cache)[:, 0]


def _law(model: TokenLlama, prompt: Tensor, uncond: Tensor, action: int, how: Sampling) -> Tensor:
    """Return the chance of each of the 81 videos of two frames, by enumeration."""
    videos = torch.tensor(list(itertools.product(range(3), repeat=4)))
    rows = [
        torch.cat((part.expand(81, -1), torch.empty(81, 0).long()), 1) for part in (prompt, uncond)
    ]
    chance = torch.ones(81, dtype=torch.float64)
    for place in range(4):
        if place == 2:
            rows = [torch.cat((ids, torch.full((81, 1), action)), 1) for ids in rows]
        logits, without = (_after(model, ids)[:, 2:5] for ids in rows)
        law = probabilities(logits, without if how.guidance != 1 else None, how).double()
        chance *= law.gather(1, videos[:, place : place + 1])[:, 0]
        rows = [torch.cat((ids, videos[:, place : place + 1] + 2), 1) for ids in rows]
    return chance


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.8, top_k=2, guidance=1.7), Sampling(top_p=0.8)]
)
def test_the_law_is_that_of_raster_order(window: int, how: Sampling, model: TokenLlama) -> None:
    count = 3000
    prompt, uncond = torch.tensor([[0, 5]]), torch.tensor([[1, 5]])
    decoder = JacobiDecoder(model, LAYOUT, window=window, sampling=how)
    run = decoder.generate(
        prompt.expand(count, -1),
        frames=2,
        uncond=uncond.expand(count, -1) if how.guidance != 1 else None,
        actions=torch.full((count, 1, 1), 1),
        seed=window,
    )
    list(run)
    video = (run.codes.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1)
    chance = _law(model, prompt, uncond, 1, how)
    found = torch.bincount(video, minlength=81).double()
    assert (found[chance == 0] == 0).all()
    # rare videos count as one
    common = chance * count >= 5
    seen, expected = found[common], chance[common] * count
    rest = chance[~common].sum() * count
    if rest >= 5:
        seen = torch.cat((seen, found[~common].sum()[None]))
        expected = torch.cat((expected, rest[None]))
    statistic = ((seen - expected).square() / expected).sum()
    freedom = len(expected) - 1
    # beyond the 99.9% quantile, nearly
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, f"{statistic:.1f} of {freedom}"


def test_greedy_is_raster_order_in_fewer_passes(model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts = torch.tensor([[0, 5], [1, 3], [4, 4]])
    actions = torch.tensor([[[1]], [[0]], [[5]]])
    greedy = Sampling(temperature=0)
    expected = DiagonalDecoder(model, layout, mode="raster", sampling=greedy).generate(
        prompts, frames=2, actions=actions
    )
    list(expected)
    run = JacobiDecoder(model, layout, window=6, sampling=greedy).generate(
        prompts, frames=2, actions=actions
    )
    frames = list(run)
    assert torch.equal(run.codes, expected.codes)
    assert run.passes < expected.passes
    for frame in frames:
        assert torch.equal(frame.codes, expected.codes[list(frame.rows), frame.index])
    assert sorted(row for frame in frames for row in frame.rows) == [0, 0, 1, 1, 2, 2]


def test_a_video_is_the_same_alone_and_in_a_batch(model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts, actions = torch.tensor([[0, 5], [1, 3]]), torch.tensor([[[1]], [[0]]])
    decoder = JacobiDecoder(model, layout, window=4)
    together = decoder.generate(prompts, frames=2, actions=actions, seed=3)
    list(together)
    for row in range(2):
        one = slice(row, row + 1)
        alone = decoder.generate(
            prompts[one], frames=2, actions=actions[one], seed=3, sequences=[row]
        )
        list(alone)
        assert torch.equal(alone.codes, together.codes[one])


def test_bad_input_gets_one_sentence(model: TokenLlama) -> None:
    with pytest.raises(ValueError, match="jacobi: window must be at least 2, got 1"):
        JacobiDecoder(model, LAYOUT, window=1)
    with pytest.raises(ValueError, match="jacobi: rows must have no end-of-line token, got 5"):
        JacobiDecoder(model, Layout(1, 2, 3, eol=5))
    decoder = JacobiDecoder(model, LAYOUT)
    with pytest.raises(ValueError, match=r"jacobi: actions must be \[1, 1, 1\], got None"):
        decoder.generate(torch.zeros(1, 1).long(), frames=2)
    with pytest.raises(ValueError, match="jacobi: frames must be at least 1, got 0"):
        decoder.generate(torch.zeros(1, 1).long(), frames=0)
    with pytest.raises(ValueError, match=r"prompts must be ids \[B, P >= 1\], got \[3\]"):
        decoder.generate(torch.zeros(3).long(), frames=1)


def test_nan_logits_are_one_sentence(model: TokenLlama) -> None:
    broken = TokenLlama(SIZES).double()
    broken.load_state_dict(model.state_dict())
    broken.norm.data[3] = torch.nan
    run = JacobiDecoder(broken, LAYOUT).generate(torch.zeros(2, 1).long(), frames=1)
    with pytest.raises(ValueError, match="logits must be finite, got NaN or infinity in frame 0"):
        list(run)


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_cpu(model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts, actions = torch.tensor([[0, 5], [1, 3]]), torch.tensor([[[1]], [[0]]])
    here = JacobiDecoder(model, layout, window=4).generate(prompts, frames=2, actions=actions)
    list(here)
    moved = TokenLlama(SIZES).double()
    moved.load_state_dict(model.state_dict())
    moved = moved.eval().requires_grad_(False).cuda()
    moved.masked = True
    there = JacobiDecoder(moved, layout, window=4).generate(
        prompts.cuda(), frames=2, actions=actions.cuda()
    )
    list(there)
    assert torch.equal(there.codes.cpu(), here.codes)
