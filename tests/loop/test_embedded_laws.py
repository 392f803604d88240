"""The laws of the loop on the embedded pair itself, with its own reward deciding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sdvg import SDVG, Always, Never, Recompute, Reward, Schedule, preset
from sdvg.models.embedded import EmbeddedPair, load
from tests.loop.test_laws import Interrupting, latents, verdicts, video
from tests.tiny import float64_norms

pytest.importorskip("diffusers", reason="the embedded models are diffusers' classes")

PROMPTS = ["a seven moving left, slowly", "a two moving up right, quickly"]
BLOCKS = 4


@pytest.fixture(scope="module")
def pair() -> EmbeddedPair:
    return load()


@pytest.fixture(scope="module")
def pair64() -> Iterator[EmbeddedPair]:
    with float64_norms():
        yield load(dtype=torch.float64)


@pytest.fixture(scope="module")
def tau(pair: EmbeddedPair) -> float:
    """A threshold between the rewards of the drafts, so that both verdicts occur."""
    blocks = list(SDVG(*pair, Reward(float("-inf"))).generate(PROMPTS, num_blocks=BLOCKS))
    scores = sorted(v.score for block in blocks[1:] for v in block.verdicts)
    middle = len(scores) // 2
    assert scores[middle - 1] < scores[middle]
    return (scores[middle - 1] + scores[middle]) / 2


def run(engine: SDVG, prompts: list[str] = PROMPTS, **options: object) -> list:
    return list(engine.generate(prompts, num_blocks=BLOCKS, seed=0, **options))


def test_never_gives_target_only_bitwise(pair: EmbeddedPair) -> None:
    routed = run(SDVG(*pair, Never()))
    alone = run(SDVG(None, pair.target, pair.decoder))
    assert torch.equal(video(routed), video(alone))


def test_always_without_forced_first_gives_draft_only_bitwise(pair: EmbeddedPair) -> None:
    routed = run(SDVG(*pair, Always(), force_first=False))
    alone = run(SDVG(pair.drafter, None, pair.decoder))
    assert torch.equal(video(routed), video(alone))


def test_an_interrupted_and_resumed_iterator_gives_one_run_bitwise(
    pair: EmbeddedPair, tau: float
) -> None:
    whole = run(SDVG(*pair, Reward(tau)))
    for at in (5, 17, 33):
        interrupting = Interrupting(at)
        parts = [interrupting.wrap(part) for part in pair]
        video_of = SDVG(*parts, Reward(tau)).generate(PROMPTS, num_blocks=BLOCKS, seed=0)
        blocks, interrupts = [], 0
        while len(blocks) < BLOCKS:
            try:
                blocks.append(next(video_of))
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts == 1
        assert torch.equal(video(blocks), video(whole))


def test_lazy_equals_eager_commit(pair64: EmbeddedPair, tau: float) -> None:
    lazy, eager = (run(SDVG(*pair64, Reward(tau), commit=commit)) for commit in ("lazy", "eager"))
    assert {kept for block in verdicts(lazy)[1:] for kept in block} == {True, False}
    torch.testing.assert_close(latents(lazy), latents(eager), rtol=0, atol=1e-10)
    torch.testing.assert_close(video(lazy), video(eager), rtol=0, atol=1e-10)


def test_a_batch_equals_its_sequences_and_running_ahead_running_in_turn(
    pair64: EmbeddedPair, tau: float
) -> None:
    together = run(SDVG(*pair64, Reward(tau)))
    ahead = run(SDVG(*pair64, Reward(tau), run_ahead=2))
    torch.testing.assert_close(video(ahead), video(together), rtol=0, atol=1e-10)
    for row, prompt in enumerate(PROMPTS):
        alone = run(SDVG(*pair64, Reward(tau)), [prompt], sequences=[row])
        torch.testing.assert_close(video(together)[row], video(alone)[0], rtol=0, atol=1e-10)


def test_kreas_last_step_is_next_to_nothing(pair: EmbeddedPair) -> None:
    """The figures that `preset` gives: 1.4% of the deviation, where a real step is 21%."""
    steps = preset("krea").steps(0)

    def first(schedule: str | Schedule) -> torch.Tensor:
        loop = SDVG(None, pair.target, pair.decoder, schedule=schedule, commit=Recompute(3))
        (block,) = loop.generate(PROMPTS, num_blocks=1, seed=3)
        return block.latents

    made = first("krea")
    five, three = (
        (first(other) - made).square().mean().sqrt() / made.std()
        for other in ("krea_5", Schedule((steps[:3],)))
    )
    assert 0.001 < five < 0.03
    assert three > 0.1
