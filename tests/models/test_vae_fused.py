"""The fused decoder on a GPU, over modules without diffusers; what it computes: test_vae.py."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.wan_decoder import wan_decoder
from sdvg.models.vae_fused import DecoderGraphs, Feature, FusedDecoder
from sdvg_kernels.testing import assert_within_budget

NONE: tuple[Feature, ...] = (None,) * 40


class Streamed:
    """A decoder of blocks `[B, C, F, h, w]`, a video's first latent frame alone."""

    def __init__(self, dtype: torch.dtype, device: str, width: int = 32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            decoder = wan_decoder(width, blocks=1)
        # rounded once: all devices and dtypes have the weights of bfloat16
        self.fused = FusedDecoder(decoder.bfloat16().to(device, dtype))

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        features: Sequence[Feature],
        first: bool,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Feature, ...]]:
        parts = latents.split([1, latents.shape[2] - 1], 2) if first else (latents,)
        frames = []
        for part, alone in zip(parts, (first, False), strict=False):
            out, features = self.fused(part, features, alone, into)
            frames.append(out)
        return torch.cat(frames, 2), tuple(features)


@functools.cache
def video() -> Tensor:
    """Four blocks of three latent frames, rounded to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 16, 12, 6, 10, generator=generator).bfloat16()


def test_without_diffusers_it_decodes_block_by_block() -> None:
    decoder, latents = Streamed(torch.float64, "cpu"), video()[:1, :, :4, :2, :3].double()
    whole, _ = decoder(latents, NONE, True)
    frames, features = decoder(latents[:, :, :3], NONE, True)
    rest, _ = decoder(latents[:, :, 3:], features, False)
    assert (frames.shape[2], rest.shape[2]) == (9, 4)
    torch.testing.assert_close(torch.cat((frames, rest), 2), whole, rtol=0, atol=1e-12)


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_twice_the_cpus_error(dtype: torch.dtype) -> None:
    # small: a CPU's convolutions in float16 are slow
    small, made = video()[:1, :, :6, :4, :5], []
    for kind, device in ((torch.float64, "cpu"), (dtype, "cpu"), (dtype, "cuda")):
        decoder, latents = Streamed(kind, device), small.to(device, kind)
        frames, features = decoder(latents[:, :, :3], NONE, True)
        rest, _ = decoder(latents[:, :, 3:], features, False)
        made.append(torch.cat((frames, rest), 2).cpu())
    exact, plain, got = made
    assert_within_budget(got, plain, exact)


@pytest.mark.gpu
def test_graphs_equal_launches_bitwise() -> None:
    decoder = Streamed(torch.bfloat16, "cuda")
    graphs = DecoderGraphs(decoder, decoder.fused.decoder.parameters)
    blocks = video().cuda().split(3, 2)
    for _ in range(2):
        graphs.start()
        wanted = features = NONE
        for i, block in enumerate(blocks):
            before = [entry.clone() for entry in features if isinstance(entry, Tensor)]
            # rejected: the state before it is gone back to
            graphs(torch.randn_like(block), features, i == 0)
            assert all(map(torch.equal, before, features))
            expected, wanted = decoder(block, wanted, i == 0)
            got, features = graphs(block, features, i == 0)
            assert torch.equal(got, expected)
            assert all(map(torch.equal, features, wanted))
    # one sequence of the two
    alone = [entry[1:] for entry in features]
    block = blocks[0][1:]
    assert torch.equal(graphs(block, alone, False)[0], decoder(block, alone, False)[0])
    reasons = [found for found in graphs._captured.values() if isinstance(found, str)]
    assert not reasons
    assert len(graphs._captured) == 3


@pytest.mark.gpu
def test_a_broken_capture_is_launched_and_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoder = Streamed(torch.bfloat16, "cuda")
    broken = [True]

    def waits(
        latents: Tensor,
        features: Sequence[Feature],
        first: bool,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Feature, ...]]:
        if broken[0] and torch.cuda.is_current_stream_capturing():
            # a graph cannot hold a wait
            latents.sum().item()
        return decoder(latents, features, first, into)

    graphs = DecoderGraphs(waits, decoder.fused.decoder.parameters)
    block = video()[:, :, :3].cuda()
    graphs.start()
    expected, _ = decoder(block, NONE, True)
    stream = torch.cuda.current_stream()
    assert torch.equal(graphs(block, NONE, True)[0], expected)
    assert "launched one by one: the capture failed" in caplog.text
    assert torch.cuda.current_stream() == stream
    assert torch.rand(2, device="cuda").isfinite().all()
    # other graphs are captured after it
    broken[0] = False
    graphs._drop()
    assert torch.equal(graphs(block, NONE, True)[0], expected)
    assert not isinstance(graphs._captured[block.shape, True], str)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("replayed", [False, True])
def test_a_decode_waits_for_nothing(replayed: bool) -> None:
    decoder = Streamed(torch.bfloat16, "cuda")
    decode = DecoderGraphs(decoder, decoder.fused.decoder.parameters) if replayed else decoder
    blocks = video().cuda().split(3, 2)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            features = NONE
            for i, block in enumerate(blocks):
                _, features = decode(block, features, i == 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 96])
def test_convolutions_stay_channels_last(width: int) -> None:
    decoder = Streamed(torch.bfloat16, "cuda", width).fused.decoder
    for conv in (decoder.conv_in, decoder.mid_block.resnets[0].conv1):
        window = torch.randn(1, 5, 6, 7, conv.in_channels, device="cuda").bfloat16()
        out = torch.nn.functional.conv3d(
            window.permute(0, 4, 1, 2, 3), conv.weight, padding=(0, 1, 1)
        )
        assert out.permute(0, 2, 3, 4, 1).is_contiguous()
