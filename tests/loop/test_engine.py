"""What the loop says of wrong parts and requests, and what it reports, on plain models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdvg import (
    SDVG,
    Always,
    Never,
    Random,
    Recompute,
    Reward,
    Schedule,
    Stride,
    clock,
    host,
    noise,
    preset,
)
from sdvg import engine as engine_module
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

    def write(self, latents: Tensor, *, start_frame: int, **rest: object) -> None:
        pass

    def keep(self, *, start_frame: int, rows: Tensor | None = None) -> None:
        pass


class Stepping(ConstantModel):
    """Predicts what it is given."""

    def denoise(self, latents: Tensor, timestep: float, **rest: object) -> Tensor:
        return latents


class RepeatingDecoder:
    """Each latent frame becomes two gray frames whose level is the latents' mean."""

    def start(self, batch: int) -> int:
        return 0

    def decode(self, latents: Tensor, state: int) -> tuple[Tensor, int]:
        level = latents.mean(dim=(2, 3, 4))[:, :, None].expand(-1, -1, 2).flatten(1, 2)
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
        ({"schedule": "fast"}, "preset must be one of self_forcing, krea, krea_5, diagonal or"),
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
        (lambda: Schedule.diagonal(()), r"at least 2 steps for each block, got \[\]"),
        (
            lambda: preset("diagonal:9999999999"),
            r"at most 1000 steps for each block, got 9999999999",
        ),
        (lambda: preset("diagonal:4,1"), r"at least 2 steps for each block, got \[4, 1\]; the K"),
        (lambda: preset("diagonal:4,x"), "preset must be one of .*, got 'diagonal:4,x'"),
        (lambda: preset("krea:4"), "preset must be one of .*, got 'krea:4'"),
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


def test_first_frames_are_timed_from_generate_without_the_callers_own_time() -> None:
    class Slow(ConstantModel):
        def start(self, prompts: Sequence[str]) -> None:
            time.sleep(0.02)

        def denoise(self, latents: Tensor, timestep: float, **rest: object) -> Tensor:
            time.sleep(0.005)
            return super().denoise(latents, timestep, **rest)

    run = engine(Never(), drafter=None, target=Slow(0.75)).generate(["a"], num_blocks=3)
    assert run.summary().first_frames is None
    time.sleep(0.3)
    next(run)
    first = run.summary()
    assert 0.04 <= first.first_frames < 0.25
    assert f"first frames after {first.first_frames:.2f} s" in str(first)
    list(run)
    assert run.summary().first_frames == first.first_frames


def test_the_predicted_speed_up_counts_the_steps_of_each_block() -> None:
    """A first block of four steps once stood for all, where later ones have two."""

    class Slow(ConstantModel):
        def denoise(self, latents: Tensor, timestep: float, **rest: object) -> Tensor:
            time.sleep(0.01)
            return super().denoise(latents, timestep, **rest)

    run = engine(Always(), target=Slow(0.75), schedule="diagonal").generate(["a"], num_blocks=6)
    list(run)
    stats = run.summary()
    # 4 + 3 + 4 * 2 steps, of which the first block's four were run
    assert 0.15 <= stats.speedup * stats.total < 0.21


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
    assert preset("krea_5").steps(8) == (*preset("krea").steps(8), 0.0)
    diagonal = preset("diagonal")
    assert [len(diagonal.steps(block)) for block in range(4)] == [4, 3, 2, 2]
    assert diagonal.steps(5) == pytest.approx((1000, 357.142857))
    assert not diagonal.clean_pass
    assert preset("diagonal:4,3,2") == diagonal


@pytest.mark.parametrize("counts", [(5, 3, 3), (5, 4, 3, 2), (4, 2), (2,), (7, 6)])
def test_diagonal_schedules_take_any_numbers_of_steps(counts: tuple[int, ...]) -> None:
    made = preset(f"diagonal:{','.join(map(str, counts))}")
    assert made == Schedule.diagonal(counts)
    assert [len(made.steps(block)) for block in range(8)] == [
        *counts, *counts[-1:] * (8 - len(counts))
    ]  # fmt: skip
    last = pytest.approx(1000 * 5 * 0.1 / (1 + 4 * 0.1))
    assert all((made.steps(n)[0], made.steps(n)[-1]) == (1000, last) for n in range(8))


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


def test_a_step_at_timestep_0_is_at_the_least_level_of_the_table() -> None:
    seen = []

    class Recording(ConstantModel):
        def denoise(
            self, latents: Tensor, timestep: float, *, sigma: float | None = None, **rest: object
        ) -> Tensor:
            seen.append((timestep, sigma, latents))
            return super().denoise(latents, timestep, **rest)

    (block,) = engine(
        target=Recording(0.75), drafter=None, schedule="krea_5", commit="recompute:3"
    ).generate(["a"], num_blocks=1)
    assert [timestep for timestep, _, _ in seen][-1] == 0
    assert [sigma is None for _, sigma, _ in seen] == [True] * 4 + [False]
    # 5 * 0.001 / (1 + 4 * 0.001)
    level = seen[-1][1]
    assert level == pytest.approx(0.00498, abs=1e-5)
    drawn = noise.normal(SHAPE, seed=0, sequences=(0,), block=0, step=4)
    torch.testing.assert_close(seen[-1][2], (1 - level) * 0.75 + level * drawn)
    assert block.latents.unique().tolist() == [0.75]


class Counting(TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    WAITS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if getattr(func, "__name__", "") in self.WAITS:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"]], ids=len)
@pytest.mark.parametrize("options", [{}, {"commit": "eager"}, {"run_ahead": 2}], ids=str)
def test_a_block_waits_once_for_a_verdict_and_once_at_its_end(
    prompts: list[str], options: dict[str, object]
) -> None:
    """Every draft, repair and frames was once waited for alone, and each batch of rows twice."""

    def mixed(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        own = torch.arange(len(prompts)).remainder(2)[:, None]
        return own.expand(frames.shape[:2]).float()

    run = engine(scorer=mixed, **options).generate(prompts, num_blocks=6)
    next(run)
    for block in range(1, 6):
        with Counting() as count:
            made = next(run)
        assert [v.accepted for v in made.verdicts] == [row % 2 == 1 for row in range(len(prompts))]
        assert count.waits == ["tolist"] * 2, f"block {block}"


def test_a_draft_that_nobody_looks_at_is_booked_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock waited for it, so that running ahead gained nothing."""

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, end: Event) -> float:
            return 250.0

    events = [Event() for _ in range(4)]
    marks = iter(events)
    monkeypatch.setattr(clock, "_mark", lambda device: next(marks))
    watch, device = clock.Clock(), torch.device("cpu")
    for block in (0, 1):
        with watch.stage("draft", 1, device, block):
            pass
    assert watch.end(0) == {}
    events[1].done = events[3].done = True
    # the draft of block 1 was made in the time of block 0 and is block 1's
    assert watch.end(0) == {"draft": 0.25}
    assert watch.end(1) == {"draft": 0.25}
    assert watch.seconds == {"draft": 0.5}
    events += [Event(), Event()]
    marks = iter(events[4:])
    with watch.stage("draft", 1, device, 1):
        pass
    watch.finish(1)
    assert watch.seconds == {"draft": 0.75}


def test_seconds_of_a_draft_that_ran_ahead_are_its_own_blocks() -> None:
    class Slow(ConstantModel):
        def denoise(self, latents: Tensor, timestep: float, **rest: object) -> Tensor:
            time.sleep(0.002)
            return super().denoise(latents, timestep, **rest)

    run = engine(drafter=Slow(0.25), run_ahead=9).generate(["a"], num_blocks=3)
    assert all(0.008 <= block.seconds["draft"] < 0.1 for block in run)


def test_what_is_not_finite_is_named_before_what_it_led_to() -> None:
    def picky(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        assert torch.isfinite(frames).all()
        return brightness(frames, prompts)

    run = engine(drafter=ConstantModel(math.nan), scorer=picky, force_first=False).generate(["a"])
    with pytest.raises(RuntimeError, match=r"the drafter returned .* at block 0, stage draft"):
        next(run)


def test_each_video_may_have_a_seed_of_its_own() -> None:
    loop = engine(Random(0.5), target=Stepping(), drafter=None)
    both = list(loop.generate(["a", "b"], num_blocks=2, seed=[5, 9]))
    for row, seed in enumerate((5, 9)):
        alone = list(loop.generate(["a"], num_blocks=2, seed=seed))
        for mine, block in zip(alone, both, strict=True):
            assert torch.equal(mine.latents[0], block.latents[row])
    draft = Draft(3, (4, 4), (0, 0), None)
    assert Random(0.5)(draft).unique().numel() == 1
    with pytest.raises(ValueError, match="seed must name one for each of 2 prompts, got 1"):
        loop.generate(["a", "b"], seed=[5])


def test_parts_get_what_they_need_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents go to the target's device, frames to the scorer's; the clock watches each there."""
    moved, watched = [], []

    class Scorer(torch.nn.Linear):
        def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
            return brightness(frames, prompts)

    scorer = Scorer(1, 1)
    place = torch.device("cpu", 0)
    assert engine_module.device_of(scorer, place) == torch.device("cpu")
    monkeypatch.setattr(
        engine_module, "device_of", lambda part, other: place if part is scorer else other
    )
    move, stage = engine_module.move, clock.Clock.stage
    monkeypatch.setattr(
        engine_module,
        "move",
        lambda x, device: (moved.append((x.ndim, device)), move(x, device))[1],
    )
    monkeypatch.setattr(
        clock.Clock,
        "stage",
        lambda self, name, units, device, block: (
            watched.append((name, device)),
            stage(self, name, units, device, block),
        )[1],
    )
    (block,) = engine(scorer=scorer, force_first=False).generate(["a"], num_blocks=1)
    assert (5, place) in moved
    assert dict(watched)["score"] == place
    assert dict(watched)["decode"] == torch.device("cpu") != place
    assert block.verdicts[0].score is not None


def test_videos_share_one_stream_beside_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each video took one of torch's 32, until that of a captured graph came round again."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: (index, made.append(index)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    host._side_stream.cache_clear()
    try:
        streams = [host.side_stream(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda")]
    finally:
        host._side_stream.cache_clear()
    assert [index for index, _ in streams] == [0, 1, 1]
    assert made == [0, 1]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", [{}, {"commit": "eager"}, {"run_ahead": 2}], ids=str)
def test_on_a_gpu_nothing_waits_but_the_verdict_and_the_end(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(ConstantModel):
        device = torch.device("cuda", torch.cuda.current_device())

    def mixed(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        own = torch.arange(len(prompts), device=frames.device).remainder(2)[:, None]
        return own.expand(frames.shape[:2]).float()

    waits = []

    def reading(parts: Sequence[Tensor]) -> list[list[float]]:
        waits.append(len(parts))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return host.read(parts)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    loop = engine(drafter=OnGpu(0.25), target=OnGpu(0.75), scorer=mixed, **options)
    run = loop.generate(["a", "b", "c"], num_blocks=8)
    # kernels are compiled and memory is taken
    blocks = [next(run), next(run)]
    monkeypatch.setattr("sdvg.engine.read", reading)
    try:
        for _ in range(6):
            torch.cuda.set_sync_debug_mode("error")
            blocks.append(next(run))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 12
    assert all(block.seconds["target"] > 0 for block in blocks)
    on_cpu = engine(scorer=mixed, **options).generate(["a", "b", "c"], num_blocks=8)
    for mine, other in zip(blocks, on_cpu, strict=True):
        assert torch.equal(mine.latents.cpu(), other.latents)
        assert mine.verdicts == other.verdicts
    assert run.summary().stages["draft"] > 0
