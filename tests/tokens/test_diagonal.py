"""The diagonal loop against loops that know nothing of its tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdvg.models.tokens import LlamaSizes, TokenLlama
from sdvg.tokens import DiagonalDecoder, Frame, Layout, Sampling
from sdvg_kernels import diagonal_schedule, sample_tokens

SIZES = LlamaSizes(2, 32, 4, 2, 16, 48, 41)
# 30 codes from 5 on, 2 action tokens between frames
LAYOUT = Layout(3, 4, 30, first=5, extra=2)


@pytest.fixture(scope="module")
def model() -> TokenLlama:
    return random_model()


def random_model(sizes: LlamaSizes = SIZES, seed: int = 3) -> TokenLlama:
    torch.manual_seed(seed)
    made = TokenLlama(sizes).double()
    # weights so large that what a token sees decides what comes next
    for layer in made.layers:
        layer.qkv.weight.data *= 3
        layer.out.weight.data *= 3
        layer.down.weight.data *= 3
    made.head.weight.data *= 20
    return made.eval().requires_grad_(False)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(SIZES.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def next_logits(model: TokenLlama, ids: Tensor) -> Tensor:
    """Return the logits after `ids [B, L]`, without a cache to go wrong."""
    cache = model.new_cache(len(ids), ids.shape[1])
    model.prefill(ids[:, :-1], cache)
    slots = torch.full((len(ids), 1), ids.shape[1] - 1, dtype=torch.int32)
    grid = diagonal_schedule(1, 1, 1, 1, prefix=1000).grid
    return model(ids[:, -1:], slots, torch.zeros_like(slots), grid, cache)[:, 0]


def raster(
    model: TokenLlama,
    prompts: Tensor,
    frames: int,
    layout: Layout,
    actions: Tensor | None,
    sampling: Sampling,
    seed: int = 0,
    uncond: Tensor | None = None,
) -> Tensor:
    """Return codes [B, frames, h, w], each from a whole forward over all ids before it."""
    batch, made = len(prompts), []
    every = [prompts] if uncond is None else [prompts, uncond]
    ids = torch.cat(every)
    for frame in range(frames):
        if frame and layout.extra:
            ids = torch.cat((ids, actions[:, frame - 1].repeat(len(every), 1)), 1)
        for place in range(layout.height * layout.width):
            logits = next_logits(model, ids)[:, layout.first : layout.first + layout.codes]
            code = sample_tokens(
                logits[:batch],
                uncond=None if uncond is None else logits[batch:],
                seeds=torch.full((batch,), seed),
                sequences=torch.arange(batch),
                positions=torch.full((batch,), frame * layout.height * layout.width + place),
                guidance=sampling.guidance,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
            made.append(code)
            ids = torch.cat((ids, (code + layout.first).repeat(len(every))[:, None]), 1)
            if layout.eol is not None and place % layout.width == layout.width - 1:
                ids = torch.cat((ids, torch.full_like(ids[:, :1], layout.eol)), 1)
    return torch.stack(made, 1).view(batch, frames, layout.height, layout.width)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.9, top_k=12, top_p=0.9),
        Sampling(guidance=2.5),
    ],
)
@pytest.mark.parametrize("layout", [LAYOUT, Layout(3, 4, 30), Layout(2, 3, 20, eol=40)])
def test_k_of_the_width_is_raster_decoding(
    model: TokenLlama, layout: Layout, sampling: Sampling
) -> None:
    prompts, actions = random_ids(2, 5), random_ids(2, 2, layout.extra)
    uncond = random_ids(2, 5, seed=9) if sampling.guidance != 1 else None
    expected = raster(model, prompts, 3, layout, actions, sampling, 7, uncond)
    for mode in ("raster", "spatial", "spatiotemporal"):
        k = None if mode == "raster" else layout.width
        decoder = DiagonalDecoder(model, layout, k=k, mode=mode, sampling=sampling)
        run = decoder.generate(prompts, frames=3, uncond=uncond, actions=actions, seed=7)
        found = list(run)
        assert [frame.index for frame in found] == [0, 1, 2]
        assert all(frame.rows == (0, 1) for frame in found)
        assert torch.equal(torch.stack([frame.codes for frame in found], 1), expected)
        assert torch.equal(run.codes, expected)
        assert run.passes == decoder.passes(3) == 3 * layout.height * layout.width


def by_the_rule(
    model: TokenLlama, prompts: Tensor, frames: int, layout: Layout, actions: Tensor, **how: object
) -> Tensor:
    """Decode by what each token may see alone: a whole forward for each token, under a mask.

    Keys are the true tokens of what is decoded; a row's start is a stand-in that only it sees.
    """
    plan = diagonal_schedule(
        frames, layout.height, layout.width, prefix=prompts.shape[1], extra=layout.extra, **how
    )
    grid, size = plan.grid, plan.size
    ids = torch.zeros(len(prompts), size, dtype=torch.int64)
    ids[:, : prompts.shape[1]] = prompts
    step = torch.full((size,), -1)
    fed_in = torch.zeros(size, dtype=torch.int64)
    for frame in range(frames):
        for row in range(layout.height):
            for column in range(layout.width):
                slot = grid.slot(frame, row, column)
                step[slot] = grid.start(frame, row) + column
                fed_in[slot] = step[slot] + 1
        if frame:
            start = grid.slot(frame, 0, 0)
            ids[:, start - layout.extra : start] = actions[:, frame - 1]
            fed_in[start - layout.extra : start] = grid.start(frame, 0)
    for place, (outputs, sources) in enumerate(zip(plan.outputs, plan.sources, strict=True)):
        for output, source in zip(outputs.tolist(), sources.tolist(), strict=True):
            if output < 0:
                continue
            # what came before this pass, in raster order, and the token that is fed
            seen = ((step < place) & (torch.arange(size) < output - 1)).nonzero()[:, 0]
            slots = torch.cat((seen, torch.tensor([output - 1])))
            fed = torch.cat((ids[:, seen], ids[:, source : source + 1]), 1)
            logits = _forward(model, fed, slots, step, fed_in[slots], place)
            logits = logits[:, layout.first : layout.first + layout.codes]
            ids[:, output] = logits.argmax(1) + layout.first
    frames_ids = [
        ids[:, grid.slot(frame, 0, 0) :][:, : layout.height * layout.width]
        for frame in range(frames)
    ]
    return torch.stack(frames_ids, 1).unflatten(2, (layout.height, layout.width)) - layout.first


def _forward(
    model: TokenLlama, ids: Tensor, slots: Tensor, step: Tensor, fed_in: Tensor, place: int
) -> Tensor:
    """Return the last token's logits in pass `place`: each of `ids` sees by the pass it is fed in.

    A token is fed for good in the pass after the one that gave it: as input, or as a fill.
    """
    fed_in = torch.cat((fed_in[:-1], torch.tensor([place])))
    sees = (slots <= slots[:, None]) & (step[slots] < fed_in[:, None])
    sees |= torch.eye(len(slots), dtype=torch.bool)
    cache = model.new_cache(len(ids), int(slots.max()) + 1)
    x = model.embedding(ids)
    cos, sin = cache.cos[slots], cache.sin[slots]
    for layer in model.layers:
        query, key, value = layer.project(x, (cos, sin))
        out = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value)),
            attn_mask=sees,
            enable_gqa=True,
        )
        x = layer.feed(x, out.transpose(1, 2))
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], model.norm, model.sizes.eps)
    return model.head(x[:, -1])


@pytest.mark.parametrize("mode", ["spatial", "spatiotemporal", "zipar"])
@pytest.mark.parametrize("row_start", ["newest", "above", "prompt"])
def test_each_token_sees_what_the_rule_says(mode: str, row_start: str, model: TokenLlama) -> None:
    # "prompt" takes stand-ins from the frame that the prompt ends with
    prompts, actions = random_ids(2, 14 if row_start == "prompt" else 3), random_ids(2, 1, 2)
    for k in (1, 2, 3):
        how = {"k": k, "mode": mode, "row_start": row_start}
        decoder = DiagonalDecoder(model, LAYOUT, **how, sampling=Sampling(temperature=0))
        run = decoder.generate(prompts, frames=2, actions=actions)
        list(run)
        assert torch.equal(run.codes, by_the_rule(model, prompts, 2, LAYOUT, actions, **how))
        assert run.passes == decoder.passes(2)


def test_the_cache_ends_as_raster_decoding_of_the_same_tokens_would_leave_it(
    model: TokenLlama,
) -> None:
    # the K/V of the first layer depend on the token and its slot alone
    prompts, actions = random_ids(1, 3), random_ids(1, 1, 2)
    decoder = DiagonalDecoder(model, LAYOUT, k=1)
    run = decoder.generate(prompts, frames=2, actions=actions)
    list(run)
    left = decoder._cache
    codes = run.codes.flatten(2) + LAYOUT.first
    ids = torch.cat((prompts, codes[:, 0], actions[:, 0], codes[:, 1]), 1)
    cache = model.new_cache(1, ids.shape[1])
    model.prefill(ids, cache)
    # the last token is fed by nobody
    torch.testing.assert_close(left.k[0, :, :-2], cache.k[0, :, :-2])
    torch.testing.assert_close(left.v[0, :, :-2], cache.v[0, :, :-2])


def _video(decoder: DiagonalDecoder, frames: int = 3, **options: object) -> Tensor:
    run = decoder.generate(frames=frames, **options)
    list(run)
    return run.codes


def test_a_video_is_the_same_alone_and_in_a_batch(model: TokenLlama) -> None:
    prompts, uncond = random_ids(3, 4), random_ids(3, 4, seed=5)
    actions = random_ids(3, 2, 2)
    for mode, k in (("spatial", 1), ("spatiotemporal", 2)):
        decoder = DiagonalDecoder(
            model, LAYOUT, k=k, mode=mode, sampling=Sampling(top_k=9, guidance=1.5)
        )
        together = _video(decoder, prompts=prompts, uncond=uncond, actions=actions, seed=4)
        assert torch.equal(
            _video(decoder, prompts=prompts, uncond=uncond, actions=actions, seed=4), together
        )
        for row in range(3):
            one = slice(row, row + 1)
            alone = _video(
                decoder, prompts=prompts[one], uncond=uncond[one], actions=actions[one], seed=4,
                sequences=[row],
            )  # fmt: skip
            assert torch.equal(alone, together[one])


def test_sequences_at_different_passes_equal_them_one_by_one(model: TokenLlama) -> None:
    prompts, actions = random_ids(3, 4), random_ids(3, 2, 2)
    decoder = DiagonalDecoder(model, LAYOUT, k=2, mode="spatiotemporal")
    together = _video(decoder, prompts=prompts, actions=actions)
    run = decoder.generate(prompts, frames=3, actions=actions, delays=[7, 0, 3])
    found = list(run)
    assert torch.equal(run.codes, together)
    assert run.passes == decoder.passes(3) + 7
    # each frame comes when it is whole, of the first to begin first
    assert [(frame.index, frame.rows) for frame in found if frame.index == 2] == [
        (2, (1,)), (2, (2,)), (2, (0,)),
    ]  # fmt: skip
    assert all(torch.equal(f.codes, together[list(f.rows), f.index]) for f in found)


def test_an_action_may_come_while_the_video_runs(model: TokenLlama) -> None:
    prompts, actions = random_ids(2, 4), random_ids(2, 2, 2)
    decoder = DiagonalDecoder(model, LAYOUT, k=1)
    seen: list[Frame] = []
    asked: list[tuple[int, int]] = []

    def play(frame: int, rows: tuple[int, ...]) -> Tensor:
        # the frame before was shown first
        asked.append((frame, len(seen)))
        return actions[list(rows), frame - 1]

    run = decoder.generate(prompts, frames=3, actions=play, seed=2)
    for frame in run:
        seen.append(frame)
    assert asked == [(1, 1), (2, 2)]
    assert torch.equal(run.codes, _video(decoder, prompts=prompts, actions=actions, seed=2))


def test_a_full_context_slides_to_the_last_frames(model: TokenLlama) -> None:
    prompts, actions = random_ids(2, 4), random_ids(2, 4, 2)
    # prompt, two frames and a half
    context = 4 + 2 * 14 + 13
    sampling = Sampling(top_k=5)
    decoder = DiagonalDecoder(model, LAYOUT, k=2, sampling=sampling, context=context)
    run = decoder.generate(prompts, frames=5, actions=actions, seed=3)
    found = [frame.codes for frame in run]
    assert decoder._cache.slots == context
    whole = DiagonalDecoder(model, LAYOUT, k=2, sampling=sampling)
    # the first three fit
    three = _video(whole, prompts=prompts, actions=actions[:, :2], seed=3)
    assert torch.equal(torch.stack(found[:3], 1), three)
    # frames 3 and 4 come from the prompt, frame 2 and its action
    kept = torch.cat((prompts, found[2].flatten(1) + 5, actions[:, 2]), 1)
    window = raster_like(model, kept, actions[:, 3:], sampling, first_frame=3)
    assert torch.equal(torch.stack(found[3:], 1), window)


def raster_like(
    model: TokenLlama, prompts: Tensor, actions: Tensor, sampling: Sampling, first_frame: int
) -> Tensor:
    """Decode two frames behind `prompts`, whose noise is that of frames from `first_frame` on."""
    from sdvg.tokens.window import Window

    decoder = DiagonalDecoder(model, LAYOUT, k=2, sampling=sampling)
    cache = model.new_cache(2, prompts.shape[1] + 26)
    window = Window(decoder, cache, 2, prompts.shape[1], 2)
    window.begin(prompts, None, first_frame, 3, (0, 1), (0, 0))
    for place in range(len(window.plan.widths)):
        if place == window.plan.frame_starts[1]:
            window.write_extra(1, (0, 1), actions[:, 0])
        window.run([place, place])
    return torch.stack([window.frame(frame, (0, 1)) for frame in (0, 1)], 1)


def test_noise_is_keyed_by_a_tokens_place_in_the_video_alone() -> None:
    # a model that sees nothing: what differs can only be the noise
    blind = random_model()
    blind.embedding.weight.zero_()
    prompts, actions = random_ids(2, 4), random_ids(2, 4, 2)
    given = {"frames": 5, "prompts": prompts, "actions": actions, "seed": 6}
    expected = _video(DiagonalDecoder(blind, LAYOUT, mode="raster"), **given)
    assert len(expected.unique()) > 5
    for how in ({"k": 1}, {"k": 2, "mode": "spatiotemporal"}, {"k": 3, "context": 45}):
        assert torch.equal(_video(DiagonalDecoder(blind, LAYOUT, **how), **given), expected)


def test_a_pass_of_each_width_is_recorded_once(
    model: TokenLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[int] = []

    class Recorder:
        """A recording runs nothing, a replay runs the pass: as on a GPU."""

        def warm_up(self, forward: Callable[[], None], _: torch.device) -> None:
            forward()
            forward()

        def record(
            self, forward: Callable[[], None], _: torch.device
        ) -> tuple[None, Callable[[], None]]:
            recorded.append(forward.args[0])
            return None, forward

    prompts, actions = random_ids(3, 5), random_ids(3, 2, 2)
    for how in ({"k": 2}, {"k": 1, "mode": "spatiotemporal"}):
        decoder = DiagonalDecoder(model, LAYOUT, **how)
        expected = _video(decoder, prompts=prompts, actions=actions)
        monkeypatch.setattr(decoder, "graphs", True)
        monkeypatch.setattr(decoder, "recorder", Recorder())
        recorded.clear()
        for delays in (None, None, [4, 0, 9]):
            found = _video(decoder, prompts=prompts, actions=actions, delays=delays)
            assert torch.equal(found, expected)
        (window,) = decoder._windows.values()
        assert sorted(recorded) == sorted(set(window.plan.buckets))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt("Ctrl-C")])
def test_a_broken_capture_drops_its_pool(
    error: BaseException, model: TokenLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[bool] = []

    class Recorder:
        """A recording fails, as where memory has run out."""

        def drop(self) -> None:
            dropped.append(True)

        def warm_up(self, forward: Callable[[], None], _: torch.device) -> None:
            forward()

        def record(self, *_: object) -> None:
            raise error

    decoder = _decoder(model)
    monkeypatch.setattr(decoder, "graphs", True)
    run = decoder.generate(random_ids(1, 2), frames=1)
    decoder.window(1, 2, 1, run._slots)
    monkeypatch.setattr(decoder, "recorder", Recorder())
    with pytest.raises(type(error), match=str(error)):
        next(run)
    assert dropped == [True]


def test_steps_are_passes(model: TokenLlama) -> None:
    decoder = DiagonalDecoder(model, LAYOUT, k=2)
    run = decoder.generate(random_ids(1, 2), frames=1)
    frames = []
    for _ in range(decoder.passes(1)):
        assert not frames
        frames += run.step()
    assert len(frames) == 1
    with pytest.raises(StopIteration):
        run.step()


def test_the_published_mask_attends_to_what_is_not_decoded(model: TokenLlama) -> None:
    prompts = random_ids(1, 3)
    how = {"sampling": Sampling(temperature=0)}
    actions = random_ids(1, 1, 2)
    ours, theirs = (
        _video(
            DiagonalDecoder(model, LAYOUT, k=1, published=published, **how),
            2, prompts=prompts, actions=actions,
        )
        for published in (False, True)
    )  # fmt: skip
    assert not torch.equal(ours, theirs)
    # in raster order nothing is left undecoded
    ours, theirs = (
        _video(
            DiagonalDecoder(model, LAYOUT, mode="raster", published=published, **how),
            2, prompts=prompts, actions=actions,
        )
        for published in (False, True)
    )  # fmt: skip
    assert torch.equal(ours, theirs)


def test_what_ran_before_leaves_no_trace_in_a_published_video(model: TokenLlama) -> None:
    """The slots that are not decoded yet held an older video's K/V: a seed gave other tokens."""
    actions = random_ids(1, 1, 2)
    decoder = DiagonalDecoder(model, LAYOUT, k=2, published=True)
    given = {"frames": 2, "prompts": random_ids(1, 3), "actions": actions}
    first = _video(decoder, **given)
    _video(decoder, 2, prompts=random_ids(1, 3, seed=8), actions=actions, seed=5)
    assert torch.equal(_video(decoder, **given), first)


def _decoder(model: TokenLlama, **options: object) -> DiagonalDecoder:
    return DiagonalDecoder(model, LAYOUT, **{"k": 2, **options})


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda m: _decoder(m, k=0), "diagonal_schedule: k must be in [1, width 4], got 0"),
        (lambda m: _decoder(m, k=5), "diagonal_schedule: k must be in [1, width 4], got 5"),
        (lambda m: _decoder(m, k=None), "diagonal: k must be given, got None; k = width is raster"),
        (lambda m: _decoder(m, mode="raster"), "diagonal: k must be the width 4 in raster order"),
        (lambda m: _decoder(m, mode="rows"), "diagonal: mode must be one of raster, spatial, spat"),
        (lambda m: _decoder(m, keep=0), "diagonal: keep must be at least 1 frame, got 0"),
        (lambda m: _decoder(m, row_start="eol"), "diagonal: row_start must be 'eol' where the lay"),
        (
            lambda m: _decoder(m, row_start="last"),
            "diagonal: row_start must be one of newest, abov",
        ),
        (
            lambda m: DiagonalDecoder(m, Layout(3, 4, 40, first=5), k=1),
            "diagonal: codes must lie in the vocabulary of 41, got [5, 45)",
        ),
        (
            lambda m: _decoder(m).generate(torch.full((1, 2), 41), frames=1),
            "diagonal: prompts must lie in the vocabulary of 41, got ids from 41 to 41",
        ),
        (
            lambda m: _decoder(m).generate(random_ids(1, 0), frames=1),
            "diagonal: prompts must be ids [B, P >= 1], got [1, 0]",
        ),
        (
            lambda m: _decoder(m).generate(random_ids(1, 2), frames=0),
            "diagonal: frames must be at least 1, got 0",
        ),
        (
            lambda m: _decoder(m).generate(random_ids(1, 2), frames=2),
            "diagonal: actions must be given for 2 tokens between frames, got None",
        ),
        (
            lambda m: _decoder(m).generate(
                random_ids(1, 2), frames=2, actions=torch.tensor([[[1, -1]]])
            ),
            "diagonal: actions must lie in the vocabulary of 41, got ids from -1 to 1",
        ),
        (
            lambda m: next(_decoder(m, context=13).generate(random_ids(1, 2), frames=1)),
            "diagonal: context must hold at least 14 slots, the prompt and one frame, got 13",
        ),
        (
            lambda m: _decoder(m, context=20).generate(
                random_ids(1, 2), frames=2, actions=random_ids(1, 1, 2)
            ),
            "diagonal: context must hold at least 28 slots, the prompt and one frame after 1 kept",
        ),
        (
            lambda m: _decoder(m, sampling=Sampling(guidance=2.0)).generate(
                random_ids(1, 2), frames=1
            ),
            "diagonal: uncond must be given with guidance and only then, got guidance 2 without it",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    act: Callable[[TokenLlama], object], text: str, model: TokenLlama
) -> None:
    with pytest.raises(ValueError, match="diagonal") as caught:
        act(model)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_nan_logits_are_one_sentence() -> None:
    broken = random_model()
    broken.layers[1].down.weight[3] = torch.nan
    decoder = _decoder(broken)
    run = decoder.generate(random_ids(2, 2), frames=1, sequences=[4, 8])
    text = "diagonal: logits must be finite, got NaN or infinity in frame 0 of sequence 4"
    with pytest.raises(ValueError, match=text):
        list(run)
    with pytest.raises(RuntimeError, match="must not go on after an error"):
        next(run)


def test_a_video_of_nan_leaves_no_trace_in_the_next() -> None:
    """K/V of it stayed in slots that a mask leaves out, and 0 x NaN is NaN."""
    model = random_model()
    decoder, given = _decoder(model), {"prompts": random_ids(2, 4), "actions": random_ids(2, 2, 2)}
    first = _video(decoder, **given)
    weight = model.layers[0].down.weight
    good = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits must be finite"):
        _video(decoder, **given)
    weight.copy_(good)
    assert torch.equal(_video(decoder, **given), first)


def test_a_decoder_goes_on_outside_of_a_callers_inference_mode(model: TokenLlama) -> None:
    """What a first video had made in inference mode, the next could not write outside of it."""
    decoder = _decoder(model)
    prompts, actions = random_ids(2, 4), random_ids(2, 2, 2)
    with torch.inference_mode():
        first = _video(decoder, prompts=prompts, actions=actions)
    assert torch.equal(_video(decoder, prompts=prompts, actions=actions), first)


def test_weights_may_move_between_two_videos() -> None:
    """Captured passes replayed the memory that weights had left; the cache kept its old dtype."""
    moving = random_model()
    decoder, given = _decoder(moving), {"prompts": random_ids(2, 4), "actions": random_ids(2, 2, 2)}
    _video(decoder, **given)
    (old,) = decoder._windows.values()
    moving.float()
    found = _video(decoder, **given)
    (new,) = decoder._windows.values()
    assert new is not old
    assert torch.equal(found, _video(_decoder(moving), **given))


def test_an_older_generation_does_not_go_on(model: TokenLlama) -> None:
    decoder = _decoder(model)
    first = decoder.generate(random_ids(1, 2), frames=1)
    decoder.generate(random_ids(1, 2), frames=1)
    with pytest.raises(RuntimeError, match="must run one generation at a time"):
        next(first)


def test_attention_by_the_op_gives_the_tokens_of_a_mask(model: TokenLlama) -> None:
    prompts, actions = random_ids(2, 3), random_ids(2, 1, 2)
    by_op = random_model()
    by_op.masked = False
    for published in (False, True):
        how = {"k": 1, "mode": "spatiotemporal", "published": published}
        expected, found = (
            _video(DiagonalDecoder(one, LAYOUT, **how), 2, prompts=prompts, actions=actions)
            for one in (model, by_op)
        )
        assert torch.equal(found, expected)


MODES = {
    "raster": {"mode": "raster"},
    "spatial": {"k": 2},
    "spatiotemporal": {"k": 1, "mode": "spatiotemporal"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_tokens_of_the_cpu(mode: str) -> None:
    # in float64, where no order of sums decides a token
    options = {**MODES[mode], "sampling": Sampling(0.9, top_k=9, guidance=1.5)}
    given = {
        "prompts": random_ids(3, 5), "uncond": random_ids(3, 5, seed=9),
        "actions": random_ids(3, 2, 2),
    }  # fmt: skip
    expected = _video(DiagonalDecoder(random_model(), LAYOUT, **options), **given)
    there = random_model().cuda()
    there.masked = True
    given = {name: ids.cuda() for name, ids in given.items()}
    assert torch.equal(_video(DiagonalDecoder(there, LAYOUT, **options), **given).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_graphs_replay_what_runs_without_them(mode: str) -> None:
    model = random_model(LlamaSizes(2, 128, 4, 2, 64, 96, 41)).bfloat16().cuda()
    options = {**MODES[mode], "sampling": Sampling(0.9, top_k=9, guidance=1.5)}
    given = {
        "prompts": random_ids(3, 5).cuda(), "uncond": random_ids(3, 5, seed=9).cuda(),
        "actions": random_ids(3, 2, 2).cuda(),
    }  # fmt: skip
    expected = _video(DiagonalDecoder(model, LAYOUT, **options, graphs=False), **given)
    captured = DiagonalDecoder(model, LAYOUT, **options)
    for _ in range(2):
        assert torch.equal(_video(captured, **given), expected)
    # other prompts and seeds in the same graphs
    given["prompts"] = random_ids(3, 5, seed=4).cuda()
    other = _video(DiagonalDecoder(model, LAYOUT, **options, graphs=False), **given, seed=8)
    assert torch.equal(_video(captured, **given, seed=8), other)
    # a context that slides has graphs of its own
    slid = [
        _video(DiagonalDecoder(model, LAYOUT, **options, context=40, graphs=graphs), 4, **{
            **given, "actions": random_ids(3, 3, 2).cuda()
        })
        for graphs in (False, True)
    ]  # fmt: skip
    assert torch.equal(*slid)


@pytest.mark.gpu
def test_late_sequences_come_through_graphs_of_other_widths() -> None:
    model = random_model().cuda()
    model.masked = True
    prompts, actions = random_ids(3, 5).cuda(), random_ids(3, 2, 2).cuda()
    decoder = DiagonalDecoder(model, LAYOUT, k=2)
    together = _video(decoder, prompts=prompts, actions=actions)
    assert torch.equal(
        _video(decoder, prompts=prompts, actions=actions, delays=[4, 0, 9]), together
    )


@pytest.mark.gpu
def test_the_host_waits_at_the_end_of_a_frame_only() -> None:
    model = random_model().cuda()
    prompts, actions = random_ids(2, 5).cuda(), random_ids(2, 1, 2).cuda()
    decoder = DiagonalDecoder(model, LAYOUT, k=2)
    _video(decoder, 2, prompts=prompts, actions=actions)
    run = decoder.generate(prompts, frames=2, actions=actions)
    run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # all passes but the frame's last
        for _ in range(decoder.passes(1) - 2):
            assert not run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step()


@pytest.mark.gpu
def test_the_host_does_not_wait_where_a_frame_starts_before_the_last_is_whole() -> None:
    model = random_model().cuda()
    prompts, actions = random_ids(2, 5).cuda(), random_ids(2, 1, 2).cuda()
    decoder = DiagonalDecoder(model, LAYOUT, k=1, mode="spatiotemporal")
    _video(decoder, 2, prompts=prompts, actions=actions)
    run = decoder.generate(prompts, frames=2, actions=actions)
    run.step()
    end = LAYOUT.height - 1 + LAYOUT.width
    torch.cuda.set_sync_debug_mode("error")
    try:
        # the second frame's first pass is among them
        for _ in range(end - 2):
            assert not run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step()
