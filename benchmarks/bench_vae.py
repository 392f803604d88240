"""A decoded block of Wan's VAE at 480 x 832: three latent frames, twelve pixel frames, in bf16.

The limit on one H200, by arithmetic: 40.6 TFLOP of convolutions (14.3 each at 480 x 832 with 96
channels and at 240 x 416 with 192), 58 to 68 ms at 600 to 700 TFLOP/s. Beside them, fused: norms
read 10 GB and write 10 GB, the sums of the residual stream 12 GB, the upsamplings 4 GB, the cached
frames 8 GB: 9 ms at 4.8 TB/s. diffusers' chain moves about 48 bytes an element in a norm, SiLU and
the padding behind them, 240 GB: 50 ms. 120 ms a block leave the convolutions 110 ms, 57% of the
product's rate at 650 TFLOP/s: whether they reach it, and called in which way, is to be measured. So
one convolution of the last stage has a case of its own, with its peers: the layout that models come
in, the three taps in time as three convolutions of images, and the same with the taps in the
channels (which the norm could write, three times).

Weights are random, and modules without diffusers where that is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from benchmarks.wan_decoder import wan_decoder
from sdvg.models.vae_fused import DecoderGraphs, FusedDecoder
from sdvg_kernels.testing import assert_within_budget, signal_to_noise


class Size(NamedTuple):
    """Latents of a block, and the width of the decoder's last stage."""

    height: int = 60
    width: int = 104
    frames: int = 3
    batch: int = 1
    channels: int = 96

    def __str__(self) -> str:
        pixels = f"H={8 * self.height} W={8 * self.width}"
        return f"B={self.batch} F={4 * self.frames} {pixels} C={self.channels}"


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    cpu = bench.device.type == "cpu"
    size = Size(2, 3, 1, channels=8) if cpu else Size()
    yield Plan(f"vae_decode {size}", partial(_decode, bench, size))
    yield Plan(f"convolution {size}", partial(_convolution, bench, size))
    yield Plan(f"vae_decode with its host work {size}", partial(_streamed, bench, size))
    if not (cpu or bench.quick):
        small = Size(48, 80)
        yield Plan(f"vae_decode {small}", partial(_decode, bench, small))


def _convolution(bench: Bench, size: Size) -> Case:
    """One of the six convolutions of the last stage, with two frames of history."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    channels, frames = size.channels, 4 * size.frames
    like = {"dtype": dtype, "device": bench.device}
    shape = (size.batch, frames + 2, 8 * size.height, 8 * size.width, channels)
    window = torch.randn(shape, **like)
    weight = torch.randn(channels, channels, 3, 3, 3, **like) * (27 * channels) ** -0.5
    # as PyTorch's own layout has them
    video, taps = window.permute(0, 4, 1, 2, 3), weight.unbind(2)
    plain, last = video.contiguous(), weight.contiguous(memory_format=torch.channels_last_3d)
    images = [tap.contiguous(memory_format=torch.channels_last) for tap in taps]
    # [out, (tap, in), 3, 3]
    joined = torch.cat(taps, 1).contiguous(memory_format=torch.channels_last)
    stacked = torch.cat([window[:, i : i + frames] for i in range(3)], -1)

    def as_images(part: Tensor, taps: Tensor) -> Tensor:
        out = F.conv2d(part.flatten(0, 1).permute(0, 3, 1, 2), taps, padding=1)
        return out.unflatten(0, part.shape[:2]).transpose(1, 2)

    def in_turn() -> Tensor:
        out = as_images(window[:, :frames], images[0])
        for i in (1, 2):
            out += as_images(window[:, i : i + frames], images[i])
        return out

    # a corner in float64: the kernels do not differ from place to place
    corner = (slice(None), slice(None), slice(None), slice(16), slice(16))
    exact = F.conv3d(video[..., :18, :18].double().cpu(), weight.double().cpu(), padding=(0, 1, 1))[
        corner
    ].to(bench.device)
    rounded = exact.to(dtype)

    def check(out: object) -> None:
        assert out.shape[1:3] == (channels, frames), f"shape {list(out.shape)}"
        near = out[corner]
        if dtype == torch.float32:
            assert (near - exact).abs().max() < 1e-4, "not the convolution"
        else:
            # the sum of 2592 products in float32, rounded once; in turn: three times
            assert_within_budget(near, rounded * (1 + torch.finfo(dtype).eps), exact)

    channels_last = partial(F.conv3d, video, last, padding=(0, 1, 1))
    return Case(
        op="convolution",
        shape=str(size),
        dtype=str(dtype).removeprefix("torch."),
        candidates=[
            Candidate("conv3d, channels-last", channels_last, check),
            Candidate(
                "conv3d, contiguous", partial(F.conv3d, plain, weight, padding=(0, 1, 1)), check,
                peer=True,
            ),
            Candidate("three conv2d", in_turn, check, peer=True),
            Candidate("conv2d, taps in the channels", partial(as_images, stacked, joined), check,
                      peer=True),
        ],
        flops=2 * 27 * channels * channels * size.batch * frames * shape[2] * shape[3],
        bytes=(window.numel() * (1 + frames / (frames + 2))) * dtype.itemsize,
    )  # fmt: skip


class _Decoders(NamedTuple):
    """A decoder with its state before a block, and what it gives in float32."""

    fused: FusedDecoder
    latents: Tensor
    features: tuple[Tensor, ...]
    stock: Callable[[], Tensor] | None
    check: Callable[[object], None]
    flops: float


def _decoders(bench: Bench, size: Size) -> _Decoders:
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    options = {} if size.channels == 96 else {"width": size.channels, "blocks": 1, "channels": 4}
    decoder = wan_decoder(**options).to(bench.device)
    channels = decoder.conv_in.in_channels
    shape = (size.batch, channels, 1 + size.frames, size.height, size.width)
    first, latents = torch.randn(shape, device=bench.device).split([1, size.frames], 2)
    with torch.no_grad():
        wide = FusedDecoder(decoder)
        _, features = wide(first, (None,) * 64, True)
        exact, _ = wide(latents, features, False)
        features = tuple(entry.to(dtype) for entry in features)
        fused = FusedDecoder(decoder.to(dtype))
    latents = latents.to(dtype)

    def check(out: object) -> None:
        decibels = signal_to_noise(out.float(), exact)
        # bf16 has 49 dB a rounding, and they add up through 32 convolutions
        assert decibels > 25, f"{decibels:.1f} dB of signal to noise, at least 25"

    return _Decoders(
        fused,
        latents,
        features,
        _stock(decoder, latents, features),
        check,
        _flops(decoder, latents),
    )


def _stock(
    decoder: torch.nn.Module, latents: Tensor, features: tuple[Tensor, ...]
) -> Callable[[], Tensor] | None:
    """Return diffusers' own decode of the same block by the same weights, if it is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    width, blocks = decoder.norm_out.gamma.shape[0], len(decoder.up_blocks[0].resnets) - 1
    with torch.device("meta"):
        stock = WanDecoder3d(width, latents.shape[1], [1, 2, 4, 4], blocks, [], [True, True, False])
    own = {name: value.contiguous() for name, value in decoder.state_dict().items()}
    stock.load_state_dict(own, assign=True)
    stock.eval().requires_grad_(False)
    given = [entry.contiguous() for entry in features]

    def decode() -> Tensor:
        return stock(latents, feat_cache=[*given, *[None] * 8], feat_idx=[0])

    return decode


def _flops(decoder: torch.nn.Module, latents: Tensor) -> float:
    """Return the operations of the convolutions and the attention of one block."""
    batch, _, frames, height, width = latents.shape
    work, places = 0.0, batch * frames * height * width

    def conv(module: torch.nn.Module) -> float:
        return 2 * places * module.weight.numel()

    work += conv(decoder.conv_in) + sum(map(conv, _convs(decoder.mid_block)))
    # keys and values of a frame
    work += 4 * places * height * width * decoder.conv_in.out_channels
    for block in decoder.up_blocks:
        work += sum(map(conv, _convs(block.resnets)))
        for upsampler in block.upsamplers or ():
            if upsampler.mode == "upsample3d":
                work += conv(upsampler.time_conv)
                places *= 2
            places *= 4
            work += conv(upsampler.resample[1])
    return work + conv(decoder.conv_out)


def _convs(module: torch.nn.Module) -> list[torch.nn.Module]:
    kinds = torch.nn.Conv2d | torch.nn.Conv3d
    return [part for part in module.modules() if isinstance(part, kinds)]


def _decode(bench: Bench, size: Size) -> Case:
    parts = _decoders(bench, size)

    @torch.no_grad()
    def fused() -> Tensor:
        return parts.fused(parts.latents, parts.features, False)[0]

    candidates = [Candidate("fused", fused, parts.check)]
    if bench.device.type == "cuda":
        # measured once for each shape, so that other kernels may be chosen
        @torch.no_grad()
        def chosen() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                return fused()

        candidates.append(Candidate("fused, cudnn.benchmark", chosen, parts.check))
    left_out = {}
    if parts.stock is None:
        left_out["diffusers"] = "is not installed"
    else:
        stock = torch.no_grad()(parts.stock)
        candidates.append(Candidate("diffusers", stock, parts.check, peer=True))
    return Case(
        op="vae_decode",
        shape=str(size),
        dtype=str(parts.latents.dtype).removeprefix("torch."),
        candidates=candidates,
        flops=parts.flops,
        left_out=left_out,
    )


def _streamed(bench: Bench, size: Size) -> Case:
    """The same by the wall clock: launches, graphs, and the copies that keep a state a value."""
    parts = _decoders(bench, size)

    @torch.no_grad()
    def launched() -> Tensor:
        return parts.fused(parts.latents, parts.features, False)[0]

    candidates = [Candidate("fused", launched, parts.check)]
    if bench.device.type == "cuda":
        graphs = DecoderGraphs(
            lambda latents, features, first, into: parts.fused(latents, features, first, into),
            parts.fused.decoder.parameters,
        )
        graphs.start()

        @torch.no_grad()
        def replayed() -> Tensor:
            return graphs(parts.latents, parts.features, False)[0]

        candidates.append(Candidate("fused, graphs", replayed, parts.check))
    if parts.stock is not None:
        stock = torch.no_grad()(parts.stock)
        candidates.append(Candidate("diffusers", stock, parts.check, peer=True))
    return Case(
        op="vae_decode with its host work",
        shape=str(size),
        dtype=str(parts.latents.dtype).removeprefix("torch."),
        candidates=candidates,
        flops=parts.flops,
        wall=True,
    )


if __name__ == "__main__":
    sys.exit(main("bench_vae", plans, sys.argv[1:]))
