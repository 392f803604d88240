"""What the loop says of wrong parts and requests, and what it reports, on plain models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sdvg import SDVG, Always, Never, Random, Recompute, Reward, Schedule, Stride, preset
from sdvg.types import Draft

SHAPE = (3, 2, 2, 2)


class ConstantModel:
    """A `CausalModel` that always predicts `value`."""

    device = torch.device("cpu")
    dtype = torch.float32
    receptive_frames = None
    window_frames = None
    sink_frames = 0

    def __init__(self, value: float = 0.0, shape: tuple[int, ...] = SHAPE) -> None:
        self.value, self.block_shape = value, shape

    def start(self, prompts: Sequence[str]) -> None:
        pass

    def denoise(
        self, latents: Tensor, timestep: float, *, start_frame: int, rows: Tensor | None = None
    ) -> Tensor:
        return torch.full_like(latents, self.value)

    def write(self, latents: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
        pass

    def keep(self, *, start_frame: int, rows: Tensor | None = None) -> None:
        pass


class RepeatingDecoder:
    """Each latent frame becomes two gray frames whose level is the latents' mean."""

    def start(self, batch: int) -> int:
        return 0

    def decode(self, latents: Tensor, state: int) -> tuple[Tensor, int]:
        level = latents.mean(dim=(2, 3, 4)).repeat_interleave(2, dim=1)
        return level[:, :, None, None, None].expand(-1, -1, 3, 4, 4), state + 1

    def take(self, state: int, rows: Tensor) -> int:
        return state

    def select(self, draft: int, other: int, rows: Tensor) -> int:
        assert draft == other, "both decoded the same block"
        return draft


def brightness(frames: Tensor, prompts: Sequence[str]) -> Tensor:
    return frames.mean(dim=(2, 3, 4))


def engine(router: object = None, **options: object) -> SDVG:
    parts = {
        "drafter": ConstantModel(0.25),
        "target": ConstantModel(0.75),
        "decoder": RepeatingDecoder(),
        "scorer": brightness,
    }
    return SDVG(**(parts | {"router": router or Reward(0.5)} | options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"drafter": None, "target": None}, "must not both be None"),
        (
            {"drafter": ConstantModel(shape=(3, 2, 4, 4))},
            r"share one latent block shape \[F, C, h, w\], got \[3, 2, 4, 4\] and \[3, 2, 2, 2\]",
        ),
        (dict.fromkeys(("drafter", "target"), ConstantModel()), "got one model twice"),
        ({"scorer": None}, "scorer must be given for the router"),
        ({"decoder": None}, "decoder must turn latents to frames, got None"),
        ({"router": "reward"}, "router must be callable, got 'reward'; take one of sdvg.router"),
        (
            {"commit": "sometimes"},
            "commit: must be lazy, eager or recompute:FRAMES, got 'sometimes'",
        ),
        ({"drafter_cache": "shared"}, "drafter_cache must be 'own' or 'synced', got 'shared'"),
        ({"commit": Recompute(4)}, "Recompute must hold whole blocks of 3 frames, got 4"),
        ({"run_ahead": -1}, "run_ahead must be 0"),
        ({"run_ahead": 1, "drafter_cache": "synced"}, "run_ahead must be 0 unless"),
        ({"schedule": "fast"}, "preset must be one of self_forcing, krea, diagonal, got 'fast'"),
    ],
)
def test_parts_that_do_not_fit_are_named_in_one_sentence(
    options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        engine(**options)


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        ([], {}, "prompts must be a non-empty list"),
        ("a seven", {}, "prompts must be a non-empty list"),
        (["a seven", "  "], {}, "a prompt must not be empty"),
        (["a seven"], {"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        (
            ["a seven"],
            {"sequences": [1, 2]},
            "sequences must name one for each of 1 prompts, got 2",
        ),
    ],
)
def test_a_wrong_request_is_named_in_one_sentence(
    prompts: object, options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        engine().generate(prompts, **options)


@pytest.mark.parametrize(
    ("prompts", "options", "text"),
    [
        (["a seven", 7], {}, "a prompt must be a text, got 7"),
        (["a seven"], {"num_blocks": 2.5}, "num_blocks must be an integer, got 2.5"),
        (["a seven"], {"seed": "0"}, "seed must be an integer for each of 1 prompts, got '0'"),
    ],
)
def test_a_request_of_the_wrong_type_is_named_in_one_sentence(
    prompts: object, options: dict[str, object], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        engine().generate(prompts, **options)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Reward(math.nan), "tau must be a number, got nan"),
        (lambda: Reward(0.0, "median"), "aggregate must be 'min' or 'mean', got 'median'"),
        (lambda: Stride(0), "period must be at least 1, got 0"),
        (lambda: Random(1.5), r"accept must lie in \[0, 1\], got 1.5"),
        (lambda: Recompute(0), "frames must be at least 1, got 0"),
        (lambda: Schedule(()), "at least one step for each block"),
        (lambda: Schedule(((1000.0,), ())), "at least one step for each block"),
        (lambda: Schedule(((500.0, 1000.0),)), r"must fall within \[0, 1000\]"),
        (lambda: Schedule(((math.nan,),)), r"must fall within \[0, 1000\]"),
        (lambda: Schedule(((0.0,),)), r"must fall within \[0, 1000\] from above 0"),
        (lambda: Schedule(((1200.0,),)), r"must fall within \[0, 1000\]"),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(("part", "stage"), [("drafter", "draft"), ("target", "target")])
def test_a_model_that_returns_nan_is_reported_with_block_and_stage(part: str, stage: str) -> None:
    run = engine(**{part: ConstantModel(math.nan)}).generate(["a seven"])
    with pytest.raises(RuntimeError, match=f"the {part} returned .* at block 0, stage {stage}"):
        next(run)


def test_a_decoder_that_returns_nan_is_reported_with_its_block() -> None:
    class Broken(RepeatingDecoder):
        def decode(self, latents: Tensor, state: int) -> tuple[Tensor, int]:
            frames, after = super().decode(latents, state)
            return (frames * math.nan if state else frames), after

    run = engine(decoder=Broken()).generate(["a seven"])
    next(run)
    with pytest.raises(RuntimeError, match=r"the decoder returned .* at block 1, stage decode"):
        next(run)


def test_a_scorer_that_raises_is_reported_with_its_block_and_cause() -> None:
    def broken(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        raise OSError("no such model")

    run = engine(scorer=broken).generate(["a seven"])
    next(run)
    with pytest.raises(RuntimeError, match="scorer failed at block 1: no such model") as caught:
        next(run)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_scorer_of_the_wrong_shape_is_reported() -> None:
    run = engine(scorer=lambda frames, prompts: torch.zeros(1)).generate(["a seven"])
    next(run)
    with pytest.raises(ValueError, match=r"one reward a frame \[1, 6\], got \[1\] at block 1"):
        next(run)


def test_a_router_of_the_wrong_shape_is_reported() -> None:
    run = engine(lambda draft: torch.tensor(True)).generate(["a", "b"])
    next(run)
    with pytest.raises(ValueError, match=r"one decision a sequence \[2\], got \[\]"):
        next(run)


def test_a_router_or_scorer_that_returns_no_tensor_is_reported() -> None:
    run = engine(lambda draft: [True]).generate(["a"])
    next(run)
    with pytest.raises(TypeError, match="the router must return a tensor, got list"):
        next(run)
    run = engine(scorer=lambda frames, prompts: [0.0]).generate(["a"])
    next(run)
    with pytest.raises(TypeError, match="the scorer must return a tensor, got list"):
        next(run)


def test_any_callable_is_a_router() -> None:
    seen: list[Draft] = []

    def odd(draft: Draft) -> Tensor:
        seen.append(draft)
        return torch.tensor([draft.block % 2 == 1] * len(draft.sequences))

    blocks = list(engine(odd).generate(["a", "b"], num_blocks=4, sequences=[5, 9], seed=3))
    assert [block.verdicts[0].accepted for block in blocks] == [False, True, False, True]
    assert [draft.block for draft in seen] == [1, 2, 3]
    assert seen[0].sequences == (5, 9)
    assert seen[0].rewards.shape == (2, 6)


def test_frames_come_from_the_model_that_the_verdict_names() -> None:
    blocks = list(engine(Stride(2)).generate(["a"], num_blocks=4))
    levels = [block.frames.unique().item() for block in blocks]
    assert levels == [0.75, 0.25, 0.75, 0.25]


def test_the_forced_first_block_may_be_switched_off() -> None:
    (block,) = engine(Always(), force_first=False).generate(["a"], num_blocks=1)
    assert block.verdicts[0].accepted
    assert block.verdicts[0].reason == "router"
    (block,) = engine(Always()).generate(["a"], num_blocks=1)
    assert not block.verdicts[0].accepted
    assert block.verdicts[0].reason == "first"


def test_nan_rewards_reject() -> None:
    def nowhere(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full(frames.shape[:2], math.nan)

    blocks = list(engine(Reward(-9.0), scorer=nowhere).generate(["a"], num_blocks=2))
    assert not blocks[1].verdicts[0].accepted


def test_random_routing_is_keyed_and_meets_its_rate() -> None:
    draws = [Random(0.7)(Draft(block, 4, tuple(range(100)), None)).tolist() for block in range(30)]
    assert draws == [
        Random(0.7)(Draft(block, 4, tuple(range(100)), None)).tolist() for block in range(30)
    ]
    rate = sum(map(sum, draws)) / 3000
    # four standard deviations of 3000 draws
    assert abs(rate - 0.7) < 0.034
    assert draws[0] != draws[1]


def test_summary_counts_what_the_router_decided() -> None:
    run = engine(Stride(3)).generate(["a", "b"], num_blocks=7)
    list(run)
    stats = run.summary()
    assert (stats.blocks, stats.sequences, stats.frames) == (7, 2, 84)
    # blocks 3 and 6 of the six that the router decided are the target's
    assert stats.acceptance == pytest.approx(4 / 6)
    assert stats.speedup_source == "predicted"
    assert stats.speedup > 0
    assert set(stats.stages) == {"draft", "target", "commit", "decode"}
    assert 0 < sum(stats.stages.values()) < stats.total
    measured = run.summary(target_only_seconds=2 * stats.total)
    assert measured.speedup == pytest.approx(2)
    assert measured.speedup_source == "measured"


def test_the_drafters_clean_pass_does_not_dilute_the_predicted_speed_up() -> None:
    class Slow(ConstantModel):
        def write(self, latents: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
            time.sleep(0.01)

    run = engine(Never(), target=Slow(0.75)).generate(["a"], num_blocks=5)
    list(run)
    stats = run.summary()
    assert stats.stages["commit"] >= 0.04
    assert stats.speedup * stats.total >= 0.04


def test_summary_of_draft_only_has_nothing_to_compare_with() -> None:
    run = engine(Always(), target=None).generate(["a"], num_blocks=2)
    list(run)
    stats = run.summary()
    assert (stats.acceptance, stats.speedup, stats.speedup_source) == (None, None, "none")


def test_never_pays_more_than_target_only() -> None:
    run = engine(Never()).generate(["a"], num_blocks=3)
    list(run)
    assert run.summary().speedup < 1


def test_presets_are_the_published_timesteps() -> None:
    warped = (1000.0, 937.5, 833.33, 625.0)
    for name in ("self_forcing", "krea"):
        assert tuple(round(step, 2) for step in preset(name).steps(8)) == warped
        assert preset(name).clean_pass
    diagonal = preset("diagonal")
    assert [len(diagonal.steps(block)) for block in range(4)] == [4, 3, 2, 2]
    assert diagonal.steps(5) == pytest.approx((1000, 357.142857))
    assert not diagonal.clean_pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": [1000.0]}, r"schedule must be a Schedule or a preset's name, got \[1000.0\]"),
        ({"run_ahead": 1.5}, "run_ahead must be an integer, got 1.5"),
    ],
)
def test_a_part_of_the_wrong_type_is_named_in_one_sentence(
    options: dict[str, object], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        engine(**options)


def test_a_scorer_builds_no_graph_of_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def scorer(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        rewards = brightness(frames, prompts) * weight
        seen.append(rewards.requires_grad)
        return rewards

    list(engine(scorer=scorer).generate(["a"], num_blocks=3))
    assert seen == [False, False]


def test_a_video_waits_for_drafts_that_ran_ahead_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They went on in the cache that the next video had begun to fill."""
    events = []

    class Elsewhere(ConstantModel):
        device = torch.device("cuda", 0)

        def start(self, prompts: Sequence[str]) -> None:
            events.append("start")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))
    engine(drafter=Elsewhere()).generate(["a"])
    assert events == ["cuda:0", "start"]


def test_going_on_with_an_older_generation_is_refused() -> None:
    loop = engine()
    older = loop.generate(["a"], num_blocks=3)
    next(older)
    newer = loop.generate(["b"], num_blocks=3)
    with pytest.raises(RuntimeError, match="belongs to a generation that was started later"):
        next(older)
    assert len(list(newer)) == 3
