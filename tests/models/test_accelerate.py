"""The fused ops change nothing but rounding, in every way that the loop uses a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")

from sdvg import SDVG, Random, Recompute
from sdvg.models import graphs as room
from sdvg.models.graphs import Graphs
from sdvg.models.wan import CausalWan
from tests.tiny import FRAMES, TinyPair, encode, float64_norms, tiny_pair, tiny_wan

PROMPTS = ["a seven moving left", "a two moving up", "a nine moving right, slowly"]


def both(dtype: torch.dtype = torch.float64, **options: object) -> tuple[CausalWan, CausalWan]:
    """Return a random model twice, the second one accelerated."""
    return (
        tiny_wan(seed=3, layers=3, dtype=dtype, **options),
        tiny_wan(seed=3, layers=3, dtype=dtype, **options).accelerate(),
    )


def run(model: CausalWan, latents: Tensor, prompts: Sequence[str] = PROMPTS) -> list[Tensor]:
    """Return what every kind of pass over four blocks gives."""
    model.start(prompts)
    rows, out = torch.tensor([2, 0], device=latents.device), []
    for block, part in enumerate(latents.split(FRAMES, dim=1)):
        start = block * FRAMES
        out.append(model.denoise(part, 937.5, start_frame=start))
        out.append(model.denoise(part[rows], 625.0, start_frame=start, rows=rows))
        model.write(part, start_frame=start)
    model.start(prompts)
    model.write(latents[:, : 2 * FRAMES], start_frame=0)
    out.append(model.denoise(latents[:, 2 * FRAMES : 3 * FRAMES], 500.0, start_frame=2 * FRAMES))
    return out


@pytest.mark.parametrize("window", [6, 9, None], ids=str)
@pytest.mark.parametrize("sink", [0, 3])
def test_accelerated_passes_equal_plain_ones(window: int | None, sink: int) -> None:
    with float64_norms():
        plain, fused = both(sink_frames=sink, window_frames=window)
        latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        for mine, theirs in zip(run(fused, latents), run(plain, latents), strict=True):
            assert (mine - theirs).abs().max() < 1e-10
        assert (fused.cache.k - plain.cache.k).abs().max() < 1e-10


@pytest.mark.parametrize("which", [0, 1], ids=["plain", "accelerated"])
def test_a_model_that_ran_in_inference_mode_runs_outside_of_it_too(which: int) -> None:
    """The cache was made in that mode and could not be written any more."""
    model, fresh = both(torch.float32)[which], both(torch.float32)[which]
    latents = torch.randn(3, 4 * FRAMES, *model.block_shape[1:])
    with torch.inference_mode():
        inside = run(model, latents.clone())
    for outs in zip(run(fresh, latents), inside, run(model, latents), strict=True):
        assert all(torch.equal(out, outs[0]) for out in outs[1:])


def test_the_weight_of_past_keys_reaches_both() -> None:
    with float64_norms():
        (plain, fused), (even, _) = both(past_weight=0.3), both()
        latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        weighed = run(plain, latents)
        for mine, theirs in zip(run(fused, latents), weighed, strict=True):
            assert (mine - theirs).abs().max() < 1e-10
        # block 0 has no past
        assert (weighed[0] - run(even, latents)[0]).abs().max() < 1e-12
        assert (weighed[-1] - run(even, latents)[-1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"past_weight must lie in \(0, 1\], got 0"):
        tiny_wan(seed=3, past_weight=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_near_to_the_exact_result(dtype: torch.dtype) -> None:
    plain, fused = both(dtype)
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    with float64_norms():
        exact_model = tiny_wan(seed=3, layers=3, dtype=torch.float64)
        # the weights as they were rounded
        exact_model.transformer.load_state_dict(plain.transformer.state_dict())
        exact = run(exact_model, latents.double())
    for mine, theirs, true in zip(run(fused, latents), run(plain, latents), exact, strict=True):
        error = (theirs.double() - true).abs().max()
        assert (mine.double() - true).abs().max() <= 2 * error + 1e-6


@pytest.mark.parametrize("commit", ["lazy", "eager", Recompute(3)], ids=str)
def test_the_loop_gives_the_same_video(commit: object) -> None:
    def video(pair: TinyPair) -> Tensor:
        engine = SDVG(*pair, router=Random(0.5), commit=commit, drafter_cache="synced")
        made = engine.generate(PROMPTS, num_blocks=5, seed=4)
        return torch.cat([block.frames for block in made], dim=1)

    with float64_norms():
        plain = video(tiny_pair(torch.float64))
        pair = tiny_pair(torch.float64)
        fused = video(
            pair._replace(drafter=pair.drafter.accelerate(), target=pair.target.accelerate())
        )
    assert (fused - plain).abs().max() < 1e-9


def held(module: nn.Module) -> int:
    """Return the bytes of all storages that parameters and buffers of `module` are in."""
    tensors = [*module.parameters(), *module.buffers()]
    # one on the meta device has no address: it would be counted once for each view
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


MOVES = {
    "stays": lambda module: None,
    "to(float64)": lambda module: module.to(torch.float64),
    "half()": lambda module: module.half(),
    "to(meta)": lambda module: module.to("meta"),
    "to_empty": lambda module: module.to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_weights_are_stored_once_wherever_they_are_moved(move: object) -> None:
    """`.to` gave each view of the fused weight memory of its own: 6 GB in the 14B."""
    plain, fused = both(torch.float32)
    for model in (plain, fused):
        move(model.transformer)
    assert held(fused.transformer.blocks) == held(plain.transformer.blocks)


def test_names_and_values_are_the_stock_ones_in_every_dtype() -> None:
    plain, fused = both(torch.float32)
    for dtype in (torch.float32, torch.float64):
        mine, theirs = (model.transformer.to(dtype).state_dict() for model in (fused, plain))
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name in ("to_q", "to_k", "to_v"):
        for layer in ("attn1", "attn2"):
            mine, theirs = (
                getattr(getattr(model.transformer.blocks[1], layer), name)
                for model in (fused, plain)
            )
            assert torch.equal(mine.weight, theirs.weight)
            x = torch.randn(2, 5, mine.weight.shape[1], dtype=torch.float64)
            torch.testing.assert_close(mine(x), theirs(x), rtol=0, atol=1e-12)
    assert not fused.transformer.blocks[0].attn1.to_qkv.weight.requires_grad


def test_a_fused_model_is_saved_and_loaded_by_diffusers(tmp_path: Path) -> None:
    plain, fused = both(torch.float32)
    fused.transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    again = type(plain.transformer).from_pretrained(tmp_path)
    theirs = plain.transformer.state_dict()
    assert set(again.state_dict()) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())


def test_a_fused_model_reads_files_as_a_stock_one_does() -> None:
    plain, fused = both(torch.float32)
    other = tiny_wan(seed=4, layers=3).transformer.state_dict()
    for assign in (False, True):
        fused.transformer.load_state_dict(other, assign=assign)
        mine = fused.transformer.state_dict()
        assert all(torch.equal(mine[name], other[name]) for name in other)
        fused.transformer.load_state_dict(plain.transformer.state_dict())

    name = "blocks.1.attn1.to_k.weight"
    lacking = {key: value for key, value in other.items() if key != name}
    kept = fused.transformer.state_dict()[name].clone()
    found = fused.transformer.load_state_dict(lacking, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([name], [])
    assert torch.equal(fused.transformer.state_dict()[name], kept)
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        fused.transformer.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        fused.transformer.load_state_dict(other | {name: torch.zeros(3, 3)})


def test_going_back_to_eager_leaves_a_stock_model() -> None:
    plain, fused = both(torch.float32)
    fused.accelerate(graphs=True)
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    expected = run(plain, latents)
    fused._install()
    assert fused.graphs is None
    for mine, theirs in zip(run(fused, latents), expected, strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = (dict(model.transformer.named_modules()) for model in (fused, plain))
    assert {name: type(module) for name, module in mine.items()} == {
        name: type(module) for name, module in theirs.items()
    }
    assert "forward" not in vars(fused.transformer.blocks[0])
    attn = fused.transformer.blocks[0].attn1
    assert not attn._state_dict_hooks
    assert not attn._load_state_dict_pre_hooks
    # and forth again
    for mine, theirs in zip(run(fused.accelerate(), latents), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_another_model_around_a_fused_transformer_runs_eagerly_and_copies_no_weight() -> None:
    """Seconds for 14B that lie on the CPU: another size of the same pipeline is such a model."""
    plain, fused = both(torch.float32)
    before = [tensor.data_ptr() for tensor in fused.transformer.parameters()]
    sizes = {"height": 4, "width": 4, "frames": FRAMES, "sink_frames": 3, "window_frames": 6}
    other = CausalWan(fused.transformer, encode, **sizes)
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    for _ in range(2):
        for mine, theirs in zip(run(other, latents), run(plain, latents), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        other.accelerate()
    assert [tensor.data_ptr() for tensor in other.transformer.parameters()] == before


def test_diffusers_own_attention_runs_on_fused_projections() -> None:
    """Also where somebody has fused, or takes apart, by diffusers' own methods."""
    plain, fused = both(torch.float32)
    stock = type(plain.transformer)(**plain.transformer.config)
    stock.load_state_dict(plain.transformer.state_dict())
    x = torch.randn(2, 6, plain.transformer.blocks[0].attn1.inner_dim)
    text = torch.randn(2, 4, x.shape[2])
    blocks = {"ours": fused.transformer.blocks[0]}
    theirs = tiny_wan(seed=3, layers=3)
    theirs.transformer.fuse_qkv_projections()
    blocks["diffusers', then ours"] = theirs.accelerate().transformer.blocks[0]
    assert held(theirs.transformer.blocks) == held(stock.blocks)
    for block in blocks.values():
        for _ in range(2):
            for name, given in (("attn1", None), ("attn2", text)):
                attn, other = getattr(block, name), getattr(stock.blocks[0], name)
                out = type(other.processor)()(attn, x, given)
                torch.testing.assert_close(out, other(x, given), rtol=1e-5, atol=1e-6)
                attn.unfuse_projections()
    # accelerated still, its projections apart
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    for mine, same in zip(run(theirs, latents), run(fused, latents), strict=True):
        torch.testing.assert_close(mine, same, rtol=1e-4, atol=1e-5)


def test_weights_that_are_elsewhere_are_not_fused() -> None:
    model = tiny_wan(seed=3)
    model.transformer.blocks.to("meta")
    with pytest.raises(ValueError, match="weights in memory, got meta tensors; layers must"):
        model.accelerate()


def test_a_video_longer_than_the_table_goes_on() -> None:
    with float64_norms():
        plain, fused = both(sink_frames=0, window_frames=3)
        part = torch.randn(1, FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        out = []
        for model in (plain, fused):
            model.start(PROMPTS[:1])
            out.append(model.denoise(part, 500.0, start_frame=1023))
        assert (out[0] - out[1]).abs().max() < 1e-10


def test_accelerating_twice_is_accelerating_once() -> None:
    _, fused = both(torch.float32)
    blocks = [block.forward for block in fused.transformer.blocks]
    fused.accelerate()
    assert [block.forward for block in fused.transformer.blocks] == blocks


class FrozenGraphs(Graphs):
    """Captures on the host: a replay sees the buffers, and of all else what it was at capture."""

    def _reason(self, hidden: Tensor) -> str:
        return ""

    def _capture(self, forward: object) -> object:
        out = forward().clone()
        self.captured = getattr(self, "captured", 0) + 1
        return lambda: out.copy_(forward())


@pytest.mark.parametrize("window", [6, None], ids=str)
def test_nothing_that_changes_between_passes_is_baked_into_a_graph(window: int | None) -> None:
    with float64_norms():
        plain, fused = both(window_frames=window)
        fused.graphs = FrozenGraphs(fused)
        latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        # the second video has other prompts in the same buffers
        for _ in range(2):
            for mine, theirs in zip(run(fused, latents), run(plain, latents), strict=True):
                assert (mine - theirs).abs().max() < 1e-10
            latents = latents.flip(1)
        # a block of all, a block of two, two blocks of all
        assert fused.graphs.captured == 3


def test_graphs_are_captured_again_when_the_cache_or_the_table_is_another() -> None:
    with float64_norms():
        _, fused = both(sink_frames=0, window_frames=3)
        fused.graphs = FrozenGraphs(fused)
        part = torch.randn(2, FRAMES, *fused.block_shape[1:], dtype=torch.float64)
        for prompts, start, captured in (
            (PROMPTS[:2], 0, 1),
            (PROMPTS[1:], 3, 1),
            (PROMPTS[:1], 3, 2),
            (PROMPTS[:2], 3, 3),
            (PROMPTS[:2], 1023, 4),
            (PROMPTS[:2], 0, 4),
        ):
            fused.start(prompts)
            fused.denoise(part[: len(prompts)], 500.0, start_frame=start)
            assert fused.graphs.captured == captured


def test_graphs_are_captured_again_when_the_prompts_keys_or_the_weights_have_moved() -> None:
    """A graph holds addresses: of keys of another length, or of weights that went away and back."""
    _, fused = both(torch.float32)
    fused.graphs = FrozenGraphs(fused)
    part, encode = torch.randn(3, *fused.block_shape), fused._encode

    def move(model: CausalWan) -> None:
        for parameter in model.transformer.parameters():
            parameter.data = parameter.data.clone()

    def lengthen(model: CausalWan) -> None:
        model._encode = lambda prompts: torch.cat((encode(prompts), encode(prompts)), dim=1)

    for change, captured in ((None, 1), (None, 1), (lengthen, 2), (None, 2), (move, 3), (None, 3)):
        if change is not None:
            change(fused)
        fused.start(PROMPTS)
        fused.denoise(part, 500.0, start_frame=0)
        assert fused.graphs.captured == captured


def test_a_fused_models_weights_are_saved_and_loaded_under_the_stock_names() -> None:
    plain, fused = both(torch.float32)
    other = tiny_wan(seed=4, layers=3).accelerate()
    state = fused.transformer.state_dict()
    assert set(state) == set(plain.transformer.state_dict())
    other.transformer.load_state_dict(state)
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    for mine, theirs in zip(run(other, latents), run(fused, latents), strict=True):
        assert torch.equal(mine, theirs)


def test_without_a_gpu_graphs_say_why_they_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    room._warn_once.cache_clear()
    model = tiny_wan(seed=3).accelerate(graphs=True)
    model.start(PROMPTS)
    for _ in range(2):
        model.denoise(torch.randn(3, *model.block_shape), 500.0, start_frame=0)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("accelerate: passes are launched one by one: CUDA graphs need a GPU")


class BrokenGraphs(FrozenGraphs):
    """Captures fail, as where something waits for the host within one."""

    def _reason(self, hidden: Tensor) -> str:
        return self._failure

    def _capture(self, forward: object) -> object:
        forward()
        self.tried = getattr(self, "tried", 0) + 1
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            # what ends the capture fails too
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_capture_that_fails_is_not_tried_again_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room._warn_once.cache_clear()
    with float64_norms():
        plain, fused = both()
        fused.graphs = BrokenGraphs(fused)
        latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        for mine, theirs in zip(run(fused, latents), run(plain, latents), strict=True):
            assert (mine - theirs).abs().max() < 1e-10
    assert fused.graphs.tried == 1
    (said,) = [record.message for record in caplog.records if record.name == "sdvg"]
    assert said.endswith(
        "a capture failed: RuntimeError: operation not permitted when stream is capturing"
    )


def test_accelerating_without_graphs_lets_go_of_them() -> None:
    """They stayed, where a decoder's and a pipeline's went."""
    model = tiny_wan(seed=3, layers=1).accelerate(graphs=True)
    assert model.graphs is not None
    assert model.accelerate().graphs is None


def test_a_cache_is_let_go_of_when_nothing_works_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts ahead of a video that was left wrote into memory that was somebody else's by then."""
    model, waited = tiny_wan(seed=3, layers=1), []
    device = torch.device("cuda", 1)
    held = SimpleNamespace(k=SimpleNamespace(is_cuda=True, device=device))
    monkeypatch.setattr(model, "cache", held)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda place: waited.append((place, model.cache is held))
    )
    model.release()
    assert waited == [(device, True)]
    assert model.cache is None


def test_a_released_model_goes_on_with_graphs_of_its_new_cache() -> None:
    """After `release` the next video was launched kernel by kernel, without a word."""
    _, fused = both(torch.float32)
    fused.graphs = FrozenGraphs(fused)
    part = torch.randn(3, *fused.block_shape)
    out = []
    for captured in (1, 2):
        fused.start(PROMPTS)
        out.append(fused.denoise(part, 500.0, start_frame=0))
        assert fused.graphs.captured == captured
        fused.release()
        assert fused.cache is None
        assert fused.transformer.blocks[0].attn2.processor.key is None
        assert not fused.graphs._graphs
    assert torch.equal(*out)


def test_what_a_graph_gave_is_not_overwritten_by_the_next_replay() -> None:
    _, fused = both(torch.float32)
    fused.graphs = FrozenGraphs(fused)
    fused.start(PROMPTS)
    first, second = torch.randn(2, 3, *fused.block_shape)
    out = fused.denoise(first, 500.0, start_frame=0)
    kept = out.clone()
    fused.denoise(second, 500.0, start_frame=0)
    assert torch.equal(out, kept)


# --- GPU only ---


def on_gpu(seed: int, device: str = "cuda", **options: bool) -> CausalWan:
    """Return a model whose ring of sink and window wraps in four blocks."""
    model = tiny_wan(
        seed=seed, layers=3, head_dim=64, device=device, dtype=torch.bfloat16,
        sink_frames=3, window_frames=6,
    )  # fmt: skip
    return model.accelerate(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_replays_equal_launches_bit_for_bit_over_a_wrapped_ring(fp8: bool) -> None:
    """All sequences and some of them, clean passes of one and two blocks, then other prompts."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 products need compute capability 8.9")
    plain, graphed = (on_gpu(3, graphs=graphs, fp8=fp8) for graphs in (False, True))
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], device="cuda")
    for prompts in (PROMPTS, PROMPTS[::-1]):
        for mine, theirs in zip(
            run(graphed, latents, prompts), run(plain, latents, prompts), strict=True
        ):
            assert torch.equal(mine, theirs)
        assert torch.equal(graphed.cache.k, plain.cache.k)
    assert not graphed.graphs._failure
    assert len(graphed.graphs._graphs) == 3
