"""Blocks of one model side by side in one forward: two give the same video, more another one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sdvg import SDVG, Always, Block, Random, Recompute, Schedule, preset
from sdvg.clock import Clock
from sdvg.commit import CachedModel
from sdvg.grid import Grid
from sdvg.models import accelerate
from sdvg.models.wan import CausalWan
from tests.loop.test_engine import ConstantModel, RepeatingDecoder
from tests.loop.test_laws import (
    PROMPTS,
    Interrupting,
    blocks_of,
    latents,
    require_both_verdicts,
    speculate,
    verdicts,
    video,
)
from tests.tiny import TAU, BrightnessScorer, TinyPair, float64_norms, tiny_pair, tiny_wan

pytest.importorskip("diffusers", reason="the models are diffusers' classes")

DIAGONAL, FOUR = preset("diagonal"), preset("self_forcing")
SCHEDULES = {
    "diagonal": DIAGONAL,
    "5,3,3": preset("diagonal:5,3,3"),
    "clean pass": FOUR,
    "a step at 0": Schedule(((1000.0, 500.0, 0.0),), clean_pass=False),
    "few, then many": Schedule(((1000.0, 400.0), (1000.0, 900.0, 700.0, 300.0))),
}


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return tiny_pair()


@pytest.fixture(scope="module")
def pair64() -> Iterator[TinyPair]:
    with float64_norms():
        yield tiny_pair(torch.float64)


def recorded(model: CausalWan) -> list[list[tuple[int, float]]]:
    """Return what will hold (block, timestep) of each block in each forward of `model`."""
    seen: list[list[tuple[int, float]]] = []
    denoise_blocks, denoise, write = model.denoise_blocks, model.denoise, model.write

    def several(x: Tensor, levels: list[tuple[float, float]], *, start_frame: int) -> Tensor:
        first = start_frame // 3
        seen.append([(first + at, round(level[0])) for at, level in enumerate(levels)])
        return denoise_blocks(x, levels, start_frame=start_frame)

    def one(x: Tensor, timestep: float, *, start_frame: int, **rest: object) -> Tensor:
        seen.append([(start_frame // 3, round(timestep))])
        return denoise(x, timestep, start_frame=start_frame, **rest)

    def written(x: Tensor, *, start_frame: int, **rest: object) -> None:
        count = x.shape[1] // 3
        seen.append([(start_frame // 3 + at, 0) for at in range(count)])
        write(x, start_frame=start_frame, **rest)

    model.denoise_blocks, model.denoise, model.write = several, one, written
    return seen


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_grid_with_one_in_flight_is_the_sequential_form_bitwise(
    pair: TinyPair, schedule: Schedule
) -> None:
    caches, videos = [], []
    for kind, options in ((CachedModel, {}), (Grid, {"in_flight": 1, "num_blocks": 4})):
        model = kind(pair.target, schedule, PROMPTS, seed=11, **options)
        made: list[Tensor] = []
        for index in range(4):
            start = model.catch_up(index, None, made, Clock())
            made.append(model.denoise(index, None, start))
        videos.append(torch.cat(made, dim=1))
        caches.append(torch.stack((pair.target.cache.k, pair.target.cache.v)).clone())
    assert torch.equal(*videos)
    assert torch.equal(*caches)
    # and it is what the engine gives, by default and asked for one
    for options in ({}, {"in_flight": 1}):
        alone = SDVG(None, pair.target, RepeatingDecoder(), schedule=schedule, **options)
        assert torch.equal(latents(blocks_of(alone, num_blocks=4)), videos[0])


@pytest.mark.parametrize(
    ("side", "schedule"),
    [*(("target", schedule) for schedule in SCHEDULES.values()), ("drafter", DIAGONAL)],
    ids=[*SCHEDULES, "drafter"],
)
def test_two_in_flight_equal_one_after_the_other(
    pair64: TinyPair, side: str, schedule: Schedule
) -> None:
    """With a clean pass, too: a first step runs in the forward that leaves the clean keys."""
    parts = (pair64.drafter, None) if side == "drafter" else (None, pair64.target)
    turn, grid = (
        latents(blocks_of(loop, PROMPTS[:2], num_blocks=4))
        for loop in (
            SDVG(*parts, RepeatingDecoder(), schedule=schedule, in_flight=count) for count in (1, 2)
        )
    )
    torch.testing.assert_close(grid, turn, rtol=0, atol=1e-10)


def test_the_embedded_pair_with_two_in_flight_equals_one_after_the_other() -> None:
    from sdvg.models import embedded

    with float64_norms():
        pair = embedded.load(dtype=torch.float64)
        for parts in ((pair.drafter, None), (None, pair.target)):
            turn, grid = (
                blocks_of(SDVG(*parts, pair.decoder, schedule="diagonal", in_flight=count),
                          PROMPTS[:1], num_blocks=5)
                for count in (1, 2)
            )  # fmt: skip
            assert latents(turn).std() > 0.1
            torch.testing.assert_close(latents(grid), latents(turn), rtol=0, atol=1e-10)
            torch.testing.assert_close(video(grid), video(turn), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (DIAGONAL, {}),
        (FOUR, {}),
        (DIAGONAL, {"run_ahead": 2}),
        (DIAGONAL, {"commit": "recompute:6"}),
    ],
    ids=["diagonal", "clean pass", "run ahead", "recompute"],
)
def test_a_drafter_ahead_in_one_forward_changes_no_verdict(
    pair64: TinyPair, schedule: Schedule, options: dict[str, object]
) -> None:
    options = {"drafter_schedule": schedule, "schedule": FOUR} | options
    turn, grid = (
        blocks_of(speculate(pair64, in_flight=count, **options), num_blocks=4) for count in (1, 2)
    )
    require_both_verdicts(grid)
    assert verdicts(grid) == verdicts(turn)
    torch.testing.assert_close(video(grid), video(turn), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["eager", "accelerated", "past weight", "no window"])
def test_forwards_of_two_blocks_equal_forwards_of_one_on_every_path(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused blocks take a row of modulation for each block; the ring wraps in block 4."""
    options = {
        "past weight": {"past_weight": 0.3, "sink_frames": 0},
        "no window": {"window_frames": None, "sink_frames": 0},
    }.get(kind, {"window_frames": 6, "write_blocks": 2})
    with float64_norms():
        model = tiny_wan(seed=2, dtype=torch.float64, **options)
        rows = set()
        if kind == "accelerated":
            model.accelerate()
            read = accelerate._modulation
            monkeypatch.setattr(
                accelerate,
                "_modulation",
                lambda block, given: (rows.add(given.shape[1]), read(block, given))[1],
            )
        loops = (
            SDVG(None, model, RepeatingDecoder(), schedule="diagonal", in_flight=count)
            for count in (1, 2)
        )
        turn, grid = (latents(blocks_of(loop, num_blocks=6)) for loop in loops)
    # never a row for each token
    assert rows <= {1, 2}
    torch.testing.assert_close(grid, turn, rtol=0, atol=1e-10)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", [DIAGONAL, FOUR], ids=["diagonal", "clean pass"])
def test_forwards_are_those_of_the_sequential_form_less_one_a_border(
    schedule: Schedule, blocks: int
) -> None:
    model = tiny_wan(seed=2)
    seen = recorded(model)
    counts = []
    for count in (1, 2):
        loop = SDVG(None, model, RepeatingDecoder(), schedule=schedule, in_flight=count)
        list(loop.generate(["a"], num_blocks=blocks))
        counts.append(len(seen))
        seen.clear()
    steps = sum(len(schedule.steps(block)) for block in range(blocks))
    whole = steps + schedule.clean_pass * (blocks - 1)
    assert counts == [whole, whole - (blocks - 1)]


def grid_of(schedule: Schedule, in_flight: int, blocks: int) -> list[list[tuple[int, float]]]:
    model = tiny_wan(seed=2)
    seen = recorded(model)
    loop = SDVG(None, model, RepeatingDecoder(), schedule=schedule, in_flight=in_flight)
    list(loop.generate(["a"], num_blocks=blocks))
    return seen


def test_the_grid_is_the_one_that_is_drawn() -> None:
    assert grid_of(DIAGONAL, 2, 5) == [
        [(0, 1000)], [(0, 933)], [(0, 733)], [(0, 357), (1, 1000)], [(1, 933)],
        [(1, 357), (2, 1000)], [(2, 357), (3, 1000)], [(3, 357), (4, 1000)], [(4, 357)],
    ]  # fmt: skip
    # a clean pass for nothing; the last block needs none
    assert grid_of(FOUR, 2, 2) == [
        [(0, 1000)], [(0, 938)], [(0, 833)], [(0, 625)],
        [(0, 0), (1, 1000)], [(1, 938)], [(1, 833)], [(1, 625)],
    ]  # fmt: skip
    # three of three steps each: one forward a block, behind blocks that are not done
    assert grid_of(preset("diagonal:3"), 3, 4) == [
        [(0, 1000)], [(0, 933), (1, 1000)], [(0, 357), (1, 933), (2, 1000)],
        [(1, 357), (2, 933), (3, 1000)], [(2, 357), (3, 933)], [(3, 357)],
    ]  # fmt: skip
    # no block ends before the one before it
    short = Schedule(((1000.0, 900.0, 700.0, 300.0), (1000.0, 300.0)), clean_pass=False)
    assert grid_of(short, 4, 3) == [
        [(0, 1000)], [(0, 900)], [(0, 700)], [(0, 300), (1, 1000)],
        [(1, 300), (2, 1000)], [(2, 300)],
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", [preset("diagonal:5,3,3"), FOUR], ids=["5,3,3", "clean pass"])
def test_three_in_flight_save_forwards_and_give_another_video(
    pair: TinyPair, schedule: Schedule
) -> None:
    counts, videos = [], []
    for count in (2, 3):
        model = tiny_wan(seed=2)
        seen = recorded(model)
        loop = SDVG(None, model, RepeatingDecoder(), schedule=schedule, in_flight=count)
        videos.append(latents(blocks_of(loop, num_blocks=6)))
        counts.append(len(seen))
    assert counts[1] < 0.8 * counts[0]
    off = (videos[1] - videos[0]).abs().amax((0, 2, 3, 4))
    assert off[3:].min() > 1e-4
    assert videos[1].isfinite().all()
    # what an old block is asked for does not depend on who flies beside it
    alone = latents(
        blocks_of(SDVG(None, tiny_wan(seed=2), pair.decoder, schedule=schedule, in_flight=3),
                  PROMPTS[:1], num_blocks=6)
    )  # fmt: skip
    torch.testing.assert_close(alone, videos[1][:1], rtol=1e-4, atol=1e-4)


def test_finished_blocks_are_committed_and_those_in_flight_are_staged(pair: TinyPair) -> None:
    model = tiny_wan(seed=2, sink_frames=0, window_frames=12)
    run = SDVG(None, model, pair.decoder, schedule="diagonal", in_flight=2).generate(
        PROMPTS, num_blocks=3, seed=11
    )
    tokens = 3 * model.frame_tokens
    for index in range(3):
        next(run)
        assert model.cache.lengths.tolist() == [tokens * (index + 1)] * 3
        staged = model.cache.k[:, :, (index + 1) * tokens : (index + 2) * tokens]
        assert bool(staged.any()) == (index < 2)


ONE = Schedule(((900.0,),), clean_pass=False)


@pytest.mark.parametrize(
    ("side", "schedule"),
    [(side, schedule) for side in ("target", "both") for schedule in (DIAGONAL, FOUR)]
    + [("target", ONE)],
    ids=["diagonal", "clean pass", "both, diagonal", "both, clean pass", "one step"],
)
def test_an_interrupted_and_resumed_iterator_gives_one_run_bitwise(
    pair: TinyPair, side: str, schedule: Schedule
) -> None:
    """Also where a block was finished and its frames were not: it is asked for again."""
    options = {"schedule": schedule, "in_flight": 2}
    count = 4 if side == "both" else 3

    def run(interrupting: Interrupting) -> tuple[list[Block], int]:
        parts = [interrupting.wrap(part) for part in (*pair, BrightnessScorer())]
        loop = speculate(TinyPair(*parts[:3]), **options)
        if side == "target":
            loop = SDVG(None, *parts[1:3], **options)
        run = loop.generate(PROMPTS[:1], num_blocks=count, seed=3)
        blocks, interrupts = [], 0
        while len(blocks) < count:
            try:
                blocks.append(next(run))
            except KeyboardInterrupt:
                interrupts += 1
        return blocks, interrupts

    counter = Interrupting(10**9)
    whole, _ = run(counter)
    calls = 10**9 - counter.left
    # what starts them may not be interrupted
    for at in range(6 if side == "both" else 4, calls + 1, 5 if side == "both" else 1):
        blocks, interrupts = run(Interrupting(at))
        assert interrupts == 1
        assert torch.equal(video(blocks), video(whole)), f"interrupted at call {at}"


@pytest.mark.parametrize("schedule", [DIAGONAL, FOUR], ids=["diagonal", "clean pass"])
@pytest.mark.parametrize("side", ["drafter", "target", "both"])
def test_switches_and_given_blocks_are_those_of_the_sequential_form(
    pair64: TinyPair, side: str, schedule: Schedule
) -> None:
    """What is in flight followed the old prompts: it begins again."""
    parts = {"drafter": (pair64.drafter, None), "target": (None, pair64.target)}
    runs = []
    for count in (1, 2):
        if side == "both":
            loop = speculate(pair64, Random(0.5), schedule=schedule, in_flight=count)
        else:
            loop = SDVG(*parts[side], RepeatingDecoder(), schedule=schedule, in_flight=count)
        given = torch.randn(3, 6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        run = loop.generate(PROMPTS, num_blocks=6, seed=11, given=given)
        made = [next(run) for _ in range(4)]
        run.switch(PROMPTS[::-1])
        runs.append(latents(made + list(run)))
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-10)


def test_a_batch_equals_its_sequences_one_by_one(pair64: TinyPair) -> None:
    loop = SDVG(pair64.drafter, None, RepeatingDecoder(), schedule="diagonal", in_flight=2)
    together = latents(blocks_of(loop))
    for row, prompt in enumerate(PROMPTS):
        alone = latents(blocks_of(loop, [prompt], sequences=[row]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"in_flight": 0}, ValueError, "in_flight must be at least 1, got 0"),
        ({"in_flight": 1.5}, TypeError, "in_flight must be an integer, got 1.5"),
        (
            {"in_flight": 2, "drafter_cache": "synced"},
            ValueError,
            r"in_flight must be 1 where a draft waits for the verdict .*'synced'\), got 2",
        ),
        (
            {"in_flight": 2, "drafter": None, "commit": Recompute(3)},
            ValueError,
            r"in_flight must be 1 with Recompute\(frames=3\), which keeps nothing .*, got 2",
        ),
        (
            {"in_flight": 2, "drafter": ConstantModel(shape=(3, 4, 4, 4))},
            ValueError,
            "in_flight must be 1 for ConstantModel, which has no denoise_blocks, got 2",
        ),
    ],
)
def test_where_nothing_can_be_in_flight_a_sentence_says_why(
    pair: TinyPair, options: dict[str, object], error: type[Exception], text: str
) -> None:
    parts = {"drafter": pair.drafter, "target": pair.target, "decoder": pair.decoder}
    with pytest.raises(error, match=text):
        SDVG(**(parts | {"router": Always()} | options))


def test_more_blocks_than_the_ring_has_room_for_are_refused(pair: TinyPair) -> None:
    model = tiny_wan(seed=2, write_blocks=2)
    loop = SDVG(None, model, pair.decoder, schedule="diagonal:3", in_flight=3)
    with pytest.raises(ValueError, match="at most write_blocks = 2 blocks, got 3; make the model"):
        blocks_of(loop)
    # with its drafts kept and thrown away, a synced drafter without a target waits for nobody
    alone = SDVG(pair.drafter, None, pair.decoder, drafter_cache="synced", in_flight=2)
    assert len(blocks_of(alone, num_blocks=2)) == 2


def test_graphs_replay_a_pass_with_a_timestep_for_each_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is no GPU, by a stand-in that runs what was recorded on its own buffers."""
    plain, model = tiny_wan(seed=2).accelerate(), tiny_wan(seed=2).accelerate(graphs=True)
    captured = []

    def capture(forward: object) -> object:
        captured.append(forward)
        return forward

    monkeypatch.setattr(model.graphs, "_reason", lambda latents: "")
    monkeypatch.setattr(model.graphs, "_capture", capture)
    turn, grid = (
        latents(blocks_of(SDVG(None, own, RepeatingDecoder(), schedule="diagonal", in_flight=2)))
        for own in (plain, model)
    )
    # passes of one block, and of two
    assert len(captured) == 2
    assert torch.equal(turn, grid)
    # a clean pass over two blocks has one timestep: another shape of what is known of it
    model.write(torch.randn(3, 6, 4, 4, 4), start_frame=0)
    assert len(captured) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", [DIAGONAL, FOUR], ids=["diagonal", "clean pass"])
def test_on_a_gpu_graphs_with_two_in_flight_equal_the_sequential_form(schedule: Schedule) -> None:
    made = []
    for count, graphs in ((1, False), (2, False), (2, True)):
        model = tiny_wan(seed=2, head_dim=64, device="cuda").accelerate(graphs=graphs)
        loop = SDVG(None, model, RepeatingDecoder(), schedule=schedule, in_flight=count)
        made.append(latents(blocks_of(loop, num_blocks=7)))
        if graphs:
            assert model.graphs._failure == ""
            # the same again, replayed
            assert torch.equal(latents(blocks_of(loop, num_blocks=7)), made[-1])
    for other in made[1:]:
        assert (other - made[0]).abs().max() / made[0].std() < 1e-2


def test_a_model_alone_is_no_faster_than_itself() -> None:
    """Its clean passes, in the forwards of first steps, were once counted twice."""
    loop = SDVG(None, tiny_wan(seed=2), RepeatingDecoder(), schedule=FOUR, in_flight=2)
    run = loop.generate(PROMPTS[:1], num_blocks=6)
    list(run)
    assert 0.7 < run.summary().speedup < 1.1


def test_rewards_decide_as_without_blocks_in_flight(pair: TinyPair) -> None:
    """The scorer sees a draft when it is done, not when the next one is begun."""
    watched: list[int] = []

    class Scorer(BrightnessScorer):
        def __call__(self, frames: Tensor, prompts: list[str]) -> Tensor:
            watched.append(frames.shape[1])
            return super().__call__(frames, prompts)

    loop = speculate(pair, in_flight=2)
    loop.scorer = Scorer()
    assert loop.router.tau == TAU
    blocks = blocks_of(loop, num_blocks=4)
    assert len(blocks) == 4
    assert watched == [12, 12, 12]
