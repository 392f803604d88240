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


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.8, top_k=2, guidance=1.7), Sampling(top_p=0.8)]
)
def test_the_law_is_that_of_raster_order(
    window: int, how: Sampling, coupled: bool, model: TokenLlama
) -> None:
    count = 3000
    prompt, uncond = torch.tensor([[0, 5]]), torch.tensor([[1, 5]])
    decoder = JacobiDecoder(model, LAYOUT, window=window, sampling=how, coupled=coupled)
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


@pytest.mark.parametrize("coupled", [True, False])
def test_greedy_is_raster_order_in_fewer_passes(coupled: bool, model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts = torch.tensor([[0, 5], [1, 3], [4, 4]])
    actions = torch.tensor([[[1]], [[0]], [[5]]])
    greedy = Sampling(temperature=0)
    expected = DiagonalDecoder(model, layout, mode="raster", sampling=greedy).generate(
        prompts, frames=2, actions=actions
    )
    list(expected)
    run = JacobiDecoder(model, layout, window=6, sampling=greedy, coupled=coupled).generate(
        prompts, frames=2, actions=actions
    )
    frames = list(run)
    assert torch.equal(run.codes, expected.codes)
    assert run.passes < expected.passes
    for frame in frames:
        assert torch.equal(frame.codes, expected.codes[list(frame.rows), frame.index])
    assert sorted(row for frame in frames for row in frame.rows) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("coupled", [True, False])
def test_a_video_is_the_same_alone_and_in_a_batch(coupled: bool, model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts, actions = torch.tensor([[0, 5], [1, 3]]), torch.tensor([[[1]], [[0]]])
    decoder = JacobiDecoder(model, layout, window=4, coupled=coupled)
    together = decoder.generate(prompts, frames=2, actions=actions, seed=3)
    list(together)
    for row in range(2):
        one = slice(row, row + 1)
        alone = decoder.generate(
            prompts[one], frames=2, actions=actions[one], seed=3, sequences=[row]
        )
        list(alone)
        assert torch.equal(alone.codes, together.codes[one])


def _pass_of(
    model: TokenLlama, chances: Tensor, label: Tensor, draft: Tensor, coupled: bool
) -> Tensor:
    """Return what one pass makes [N, W] of drafts [N, W - 1] drawn from `label`."""
    count, window = len(draft), chances.shape[0]
    decoder = JacobiDecoder(model, LAYOUT, window=window, coupled=coupled)
    run = decoder.generate(
        torch.zeros(count, 1).long(), frames=1, sequences=range(count), seed=window
    )
    run._draft, run._label = draft, label.expand(count, -1, -1)
    places = torch.arange(window).expand(count, -1)
    return run._couple(chances.expand(count, -1, -1), places)[0]


@pytest.mark.parametrize("coupled", [True, False])
def test_what_a_pass_draws_has_the_new_law_and_keeps_drafts_where_it_couples(
    coupled: bool, model: TokenLlama
) -> None:
    count, window = 20000, 4
    generator = torch.Generator().manual_seed(1)
    chances, label = torch.rand(2, window, 3, generator=generator).add(0.1)
    chances, label = chances / chances.sum(1, True), (label / label.sum(1, True))[: window - 1]
    draft = torch.multinomial(label, count, replacement=True, generator=generator).T
    drawn = _pass_of(model, chances.float(), label.float(), draft, coupled)
    found = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    # five standard errors
    assert (found - chances).abs().max() < 5 * (0.25 / count) ** 0.5
    stays = (drawn[:, :-1] == draft).double().mean(0)
    overlap = torch.minimum(chances[:-1], label).sum(1).double()
    same = (chances[:-1] * label).sum(1).double()
    # the chance that all drafts before are kept
    before = torch.cat((torch.ones(1), overlap[:-1].cumprod(0)))
    expected = overlap if coupled else before * overlap + (1 - before) * same
    assert (stays - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_coupling_takes_fewer_passes_on_the_embedded_model() -> None:
    pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
    pytest.importorskip("transformers", reason="the model is a transformers class")
    from sdvg.models.embedded import tokens
    from sdvg.models.tokens import from_transformers

    models = tokens.load()
    model, prompts = from_transformers(models.model), models.prompts(["a seven", "a two"])
    # four rows of a frame; so warm that what is drawn anew is mostly another token
    layout, how, passes = Layout(4, tokens.WIDTH, models.codes), Sampling(temperature=3), {}
    for coupled in (True, False):
        decoder = JacobiDecoder(model, layout, window=32, sampling=how, coupled=coupled)
        passes[coupled] = [frame.passes for frame in decoder.generate(prompts, frames=1)]
    assert max(passes[True]) < min(passes[False]) < 4 * tokens.WIDTH, passes


def test_a_draft_stays_where_rounding_alone_is_between_two_laws(model: TokenLlama) -> None:
    """The coin fell once in millions, and no token was left to draw instead: one of -1."""
    label = torch.tensor([[0.5, 0.5, 0.0]])
    chances = torch.stack((label[0] - 2e-2, label[0])).clamp(min=0)
    drawn = _pass_of(model, chances, label, torch.zeros(500, 1).long(), True)
    assert (drawn[:, 0] == 0).all()


def test_attention_by_the_op_gives_the_tokens_of_a_mask(model: TokenLlama) -> None:
    by_op = TokenLlama(SIZES).double()
    by_op.load_state_dict(model.state_dict())
    by_op.masked = False
    prompts, actions = torch.tensor([[0, 5], [1, 3]]), torch.tensor([[[1]], [[0]]])
    found = []
    for one in (model, by_op.eval().requires_grad_(False)):
        decoder = JacobiDecoder(one, Layout(3, 4, 3, first=2, extra=1), window=5)
        run = decoder.generate(prompts, frames=2, actions=actions)
        list(run)
        found.append(run.codes)
    assert torch.equal(*found)


def test_a_video_goes_on_outside_of_a_callers_inference_mode(model: TokenLlama) -> None:
    prompts = torch.tensor([[0, 5]])
    decoder = JacobiDecoder(model, Layout(3, 4, 3, first=2), window=4)
    expected = decoder.generate(prompts, frames=2)
    list(expected)
    with torch.inference_mode():
        run = decoder.generate(prompts, frames=2)
        next(run)
    list(run)
    assert torch.equal(run.codes, expected.codes)


def test_bad_input_gets_one_sentence(model: TokenLlama) -> None:
    with pytest.raises(ValueError, match="jacobi: window must be at least 2, got 1"):
        JacobiDecoder(model, LAYOUT, window=1)
    with pytest.raises(ValueError, match="jacobi: rows must have no end-of-line token, got 5"):
        JacobiDecoder(model, Layout(1, 2, 3, eol=5))


def test_nan_logits_are_one_sentence(model: TokenLlama) -> None:
    broken = TokenLlama(SIZES).double()
    broken.load_state_dict(model.state_dict())
    broken.norm.data[3] = torch.nan
    run = JacobiDecoder(broken, LAYOUT).generate(torch.zeros(2, 1).long(), frames=1)
    with pytest.raises(ValueError, match="jacobi: logits must be finite, got NaN or infinity in "):
        list(run)
    with pytest.raises(RuntimeError, match="must not go on after an error"):
        next(run)


@pytest.mark.gpu
@pytest.mark.parametrize("coupled", [True, False])
def test_a_gpu_gives_the_tokens_of_the_cpu(coupled: bool, model: TokenLlama) -> None:
    layout = Layout(3, 4, 3, first=2, extra=1)
    prompts, actions = torch.tensor([[0, 5], [1, 3]]), torch.tensor([[[1]], [[0]]])
    decoder = JacobiDecoder(model, layout, window=4, coupled=coupled)
    here = decoder.generate(prompts, frames=2, actions=actions)
    list(here)
    moved = TokenLlama(SIZES).double()
    moved.load_state_dict(model.state_dict())
    moved = moved.eval().requires_grad_(False).cuda()
    moved.masked = True
    there = JacobiDecoder(moved, layout, window=4, coupled=coupled).generate(
        prompts.cuda(), frames=2, actions=actions.cuda()
    )
    list(there)
    assert torch.equal(there.codes.cpu(), here.codes)
