"""The streaming VAE: diffusers' own forward, the fused one, and its graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the VAE is diffusers'")

import diffusers

from benchmarks.wan_decoder import wan_decoder
from sdvg import accelerate
from sdvg.models import vae_fused
from sdvg.models.vae import DecoderState, StreamingVAE
from sdvg_kernels.testing import assert_within_budget
from tests.tiny import float64_norms, tiny_pair

WAN21: dict[str, object] = {}
WAN22: dict[str, object] = {
    "decoder_base_dim": 8,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
LAYOUTS = {"wan 2.1": WAN21, "wan 2.2": WAN22}


@functools.cache
def _stock(layout: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
            **LAYOUTS[layout],
        ).eval()


def stock(layout: str = "wan 2.1", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A random VAE with nothing of ours on it, Wan's strides and widths that grow."""
    vae = copy.deepcopy(_stock(layout))
    return vae if dtype == torch.float32 else vae.to(dtype)


def fused(
    layout: str = "wan 2.1", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> StreamingVAE:
    return StreamingVAE(stock(layout, dtype).to(device)).accelerate()


def latents(frames: int, height: int = 3, width: int = 5, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, 4, height, width, generator=generator)


@torch.no_grad()
def whole(vae: torch.nn.Module, video: Tensor) -> Tensor:
    """What diffusers' `decode` makes of a whole video of normalised latents, in [0, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(video)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    made = vae.decode(video.transpose(1, 2) * std + mean, return_dict=False)[0].transpose(1, 2)
    return (made.to(torch.promote_types(made.dtype, torch.float32)) + 1) / 2


def streamed(
    decoder: StreamingVAE, video: Tensor, blocks: int | Sequence[int] = 3
) -> tuple[Tensor, DecoderState]:
    state, frames = decoder.start(len(video)), []
    for block in video.split(blocks, 1):
        made, state = decoder.decode(block, state)
        frames.append(made)
    return torch.cat(frames, 1), state


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_equals_diffusers_whole_decode(layout: str, size: tuple[int, int]) -> None:
    video = latents(6, *size).double()
    with float64_norms():
        expected = whole(stock(layout, torch.float64), video)
        got, _ = streamed(fused(layout, torch.float64), video)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_is_within_twice_diffusers_error(layout: str, dtype: torch.dtype) -> None:
    video = latents(6).to(dtype)
    with float64_norms():
        # of the same rounded weights and latents
        exact = whole(stock(layout, dtype).double(), video.double())
    got, _ = streamed(fused(layout, dtype), video)
    plain = whole(stock(layout, dtype), video)
    assert_within_budget(got.to(dtype), plain.to(dtype), exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_split_into_blocks_gives_the_same_video(layout: str) -> None:
    video, decoder = latents(7, 2, 1, batch=1).double(), fused(layout, torch.float64)
    at_once, _ = streamed(decoder, video, 7)
    for blocks in ([1, 3, 3], [2, 1, 1, 3]):
        got, _ = streamed(decoder, video, blocks)
        torch.testing.assert_close(got, at_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("accelerated", [False, True], ids=["diffusers", "fused"])
def test_a_rejected_block_leaves_no_trace_bitwise(accelerated: bool) -> None:
    decoder = StreamingVAE(stock())
    if accelerated:
        decoder.accelerate()
    video = latents(9)
    expected, _ = streamed(decoder, video)
    state, frames = decoder.start(2), []
    for block in video.split(3, 1):
        _, after = decoder.decode(torch.randn_like(block), state)
        decoder.decode(torch.randn_like(block), after)
        made, state = decoder.decode(block, state)
        frames.append(made)
    assert torch.equal(torch.cat(frames, 1), expected)


def test_sequences_are_taken_and_put_back() -> None:
    decoder = fused()
    first, draft, other = (latents(3, batch=3) + i for i in range(3))
    _, before = decoder.decode(first, decoder.start(3))
    rows = torch.tensor([2, 0])
    _, after = decoder.decode(draft, before)
    frames, mended = decoder.decode(other[rows], decoder.take(before, rows))
    chosen = decoder.select(after, mended, rows)
    mixed = draft.index_copy(0, rows, other[rows])
    wanted_frames, wanted = decoder.decode(mixed, before)
    torch.testing.assert_close(frames, wanted_frames[rows], rtol=0, atol=1e-5)
    for mine, theirs in zip(chosen.features, wanted.features, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_features_are_no_larger_than_diffusers() -> None:
    def held(decoder: StreamingVAE) -> int:
        _, state = streamed(decoder, latents(6))
        entries = [entry for entry in state.features if isinstance(entry, Tensor)]
        # what they keep alive, not only what they show
        return sum(entry.untyped_storage().nbytes() for entry in entries)

    assert held(fused()) <= held(StreamingVAE(stock()))


def test_weights_stay_diffusers() -> None:
    vae, video = stock(), latents(3)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    expected = whole(vae, video)
    StreamingVAE(vae).accelerate()
    after = vae.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(whole(vae, video), expected, rtol=0, atol=1e-5)


def test_a_video_goes_on_through_accelerate() -> None:
    video = latents(7).double()
    for blocks in ([1, 3, 3], [3, 1, 3]):
        decoder, frames = StreamingVAE(stock(dtype=torch.float64)), []
        expected, _ = streamed(fused(dtype=torch.float64), video, blocks)
        state = decoder.start(2)
        with float64_norms():
            for block in video.split(blocks, 1):
                made, state = decoder.decode(block, state)
                frames.append(made)
                decoder.accelerate()
        torch.testing.assert_close(torch.cat(frames, 1), expected, rtol=0, atol=1e-10)


def test_the_decoder_without_diffusers_has_its_names_and_sizes() -> None:
    with torch.device("meta"):
        own, theirs = wan_decoder(), diffusers.AutoencoderKLWan().decoder
        shapes = [
            {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
            for decoder in (own, theirs)
        ]
    assert shapes[0] == shapes[1]


def test_a_pair_and_a_pipeline_accelerate_their_decoder() -> None:
    pair = tiny_pair()
    accelerate(pair)
    assert pair.decoder._fused is not None
    pytest.importorskip("transformers", reason="the pipeline's text encoder is transformers'")
    from sdvg import SDVGPipeline
    from sdvg.models.embedded import WEIGHTS

    pipe = SDVGPipeline.from_pretrained(WEIGHTS)
    decoders = []
    for accelerated in (False, True, True):
        if accelerated:
            accelerate(pipe)
        loop = pipe.stream("a seven moving left", num_blocks=1)
        decoders += loop._decoders
        assert (decoders[-1]._fused is not None) == accelerated
    # it would hold the graphs
    assert decoders[1] is decoders[2]


def test_an_unknown_decoder_stays_diffusers_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Other(torch.nn.SiLU):
        pass

    vae = stock()
    expected, _ = streamed(StreamingVAE(copy.deepcopy(vae)), latents(3))
    vae.decoder.mid_block.resnets[0].nonlinearity = Other()
    decoder = StreamingVAE(vae).accelerate(graphs=True)
    assert "mid_block.resnets.0.nonlinearity: Other has no fused forward" in caplog.text
    assert torch.equal(streamed(decoder, latents(3))[0], expected)


def test_graphs_without_a_gpu_say_why(caplog: pytest.LogCaptureFixture) -> None:
    vae_fused._warn_once.cache_clear()
    expected, _ = streamed(fused(), latents(6))
    decoder = fused().accelerate(graphs=True)
    got, _ = streamed(decoder, latents(6))
    assert torch.equal(got, expected)
    (said,) = caplog.messages
    assert said.endswith("one by one: CUDA graphs need a GPU, and the decoder is on cpu")


# --- the graphs' buffers, on a CPU: what a graph would replay is run again ---


class _Rerun:
    """Stands for a recorder: a replay runs the forward again, on the same buffers."""

    def __init__(self, graphs: vae_fused.DecoderGraphs) -> None:
        self.graphs, self.captures = graphs, 0

    def drop(self) -> None:
        """Let go of nothing."""

    def warm_up(self, forward: Callable[[], object], device: torch.device) -> object:
        """Return what `forward` does."""
        return forward()

    def record(
        self, forward: Callable[[], Tensor], device: torch.device
    ) -> tuple[Tensor, Callable[[], None]]:
        """Return what `forward` does, not yet written, as capturing runs nothing."""
        self.captures += 1
        frames = torch.full_like(forward(), torch.nan)
        for buffers in self.graphs._buffers.values():
            for buffer in buffers:
                buffer.fill_(torch.nan)
        return frames, lambda: frames.copy_(forward())


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> StreamingVAE:
    monkeypatch.setattr(vae_fused, "_reason", lambda *_: "")
    decoder = fused()
    decoder._graphs = vae_fused.DecoderGraphs(decoder._forward, decoder.vae.parameters)
    decoder._graphs._recorder = _Rerun(decoder._graphs)
    return decoder


def test_replayed_blocks_equal_launched_ones_bitwise(replayed: StreamingVAE) -> None:
    video = latents(12)
    expected, wanted = streamed(fused(), video)
    for _ in range(2):
        got, state = streamed(replayed, video)
        assert torch.equal(got, expected)
        assert all(map(torch.equal, state.features, wanted.features))
    # the first block and later ones
    assert replayed._graphs._recorder.captures == 2


def test_a_state_outlives_replays_bitwise(replayed: StreamingVAE) -> None:
    video, launched = latents(9), fused()
    _, before = replayed.decode(video[:, :3], replayed.start(2))
    kept = [entry.clone() for entry in before.features]
    once, after = replayed.decode(video[:, 3:6], before)
    # a rejection, another, and a second video in between
    replayed.decode(torch.randn_like(video[:, :3]), before)
    streamed(replayed, torch.randn_like(video))
    assert all(map(torch.equal, before.features, kept))
    again, _ = replayed.decode(video[:, 3:6], before)
    assert torch.equal(again, once)
    _, other = launched.decode(video[:, :3], launched.start(2))
    _, other = launched.decode(video[:, 3:6], other)
    expected, _ = launched.decode(video[:, 6:], other)
    assert torch.equal(replayed.decode(video[:, 6:], after)[0], expected)


def test_features_are_copied_in_only_after_a_rejection(
    replayed: StreamingVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, copy_in = [], torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda into, given: copies.append(1) or copy_in(into, given)
    )
    video = latents(12)
    state = replayed.start(2)
    for at, block in enumerate(video.split(3, 1)):
        if at == 2:
            replayed.decode(torch.randn_like(block), state)
        _, state = replayed.decode(block, state)
    # into fresh buffers, and back to what the rejected block has overwritten
    assert len(copies) == 2


def test_rows_of_a_batch_have_graphs_of_their_own(replayed: StreamingVAE) -> None:
    video, launched, rows = latents(6, batch=3), fused(), torch.tensor([2, 0])
    expected = []
    for decoder in (launched, replayed):
        _, before = decoder.decode(video[:, :3], decoder.start(3))
        _, after = decoder.decode(video[:, 3:], before)
        frames, mended = decoder.decode(video[rows, 3:] + 1, decoder.take(before, rows))
        chosen = decoder.select(after, mended, rows)
        expected.append((frames, decoder.decode(video[:, 3:], chosen)[0]))
    assert all(map(torch.equal, *expected))
    assert replayed._graphs._recorder.captures == 3


def test_graphs_of_inference_mode_are_replayed_outside_of_it_too(replayed: StreamingVAE) -> None:
    """Their buffers could not be written any more."""
    with torch.inference_mode():
        inside, _ = streamed(replayed, latents(6))
    assert torch.equal(streamed(replayed, latents(6))[0], inside)


def test_moved_weights_are_captured_anew(replayed: StreamingVAE) -> None:
    streamed(replayed, latents(6))
    streamed(replayed, latents(6))
    assert replayed._graphs._recorder.captures == 2
    conv = replayed.vae.decoder.conv_in
    conv.weight.data = conv.weight.data * 2
    got, _ = streamed(replayed, latents(6))
    assert replayed._graphs._recorder.captures == 4
    other = fused()
    other.vae.decoder.conv_in.weight.data *= 2
    assert torch.equal(got, streamed(other, latents(6))[0])


def test_a_capture_that_fails_is_said_and_launched(
    replayed: StreamingVAE, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae_fused._warn_once.cache_clear()

    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(_Rerun, "record", fails)
    got, _ = streamed(replayed, latents(6))
    assert torch.equal(got, streamed(fused(), latents(6))[0])
    (said,) = caplog.messages
    assert said.endswith("one by one: the capture failed: RuntimeError: operation not permitted")


def test_install_goes_back_to_diffusers_own(replayed: StreamingVAE) -> None:
    streamed(replayed, latents(6))
    replayed._install()
    assert torch.equal(
        streamed(replayed, latents(6))[0], streamed(StreamingVAE(stock()), latents(6))[0]
    )


def test_release_lets_go_of_the_graphs(replayed: StreamingVAE) -> None:
    expected, _ = streamed(replayed, latents(6))
    replayed.release()
    assert torch.equal(streamed(replayed, latents(6))[0], expected)


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_on_the_gpu_is_within_twice_diffusers_error(
    layout: str, dtype: torch.dtype
) -> None:
    video = latents(9, 8, 12).to(dtype)
    with float64_norms():
        exact = whole(stock(layout, dtype).double(), video.double())
    plain = whole(stock(layout, dtype).cuda(), video.cuda()).cpu()
    got, _ = streamed(fused(layout, dtype, "cuda"), video)
    assert_within_budget(got.cpu().to(dtype), plain.to(dtype), exact)
