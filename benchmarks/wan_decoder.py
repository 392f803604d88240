"""Wan 2.1's VAE decoder as bare modules: names, sizes and random weights, without diffusers.

A machine that measures may have no diffusers. The modules have no forward of their own: they are
what `sdvg.models.vae_fused` walks over.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn


class WanCausalConv3d(nn.Conv3d):
    """A convolution whose padding the caller does, as diffusers' class of this name."""

    def __init__(
        self, inside: int, out: int, size: tuple[int, int, int], padding: tuple[int, int, int]
    ) -> None:
        super().__init__(inside, out, size)
        frames, rows, columns = padding
        self._padding = (columns, columns, rows, rows, 2 * frames, 0)


def _module(kind: str, **parts: object) -> nn.Module:
    """Return a module of a class named `kind` that holds `parts`."""
    module = type(kind, (nn.Module,), {})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def _norm(width: int, dims: int) -> nn.Module:
    return _module("WanRMS_norm", gamma=nn.Parameter(torch.ones(width, *[1] * dims)), bias=0.0)


def _conv(inside: int, out: int) -> WanCausalConv3d:
    return WanCausalConv3d(inside, out, (3, 3, 3), (1, 1, 1))


def _resnet(inside: int, out: int) -> nn.Module:
    shortcut = WanCausalConv3d(inside, out, (1, 1, 1), (0, 0, 0))
    return _module(
        "WanResidualBlock",
        norm1=_norm(inside, 3),
        conv1=_conv(inside, out),
        norm2=_norm(out, 3),
        conv2=_conv(out, out),
        conv_shortcut=nn.Identity() if inside == out else shortcut,
    )


def _upsampler(width: int, mode: str) -> nn.Module:
    resample = nn.Sequential(_module("WanUpsample"), nn.Conv2d(width, width // 2, 3, padding=1))
    parts: dict[str, object] = {"mode": mode, "resample": resample}
    if mode == "upsample3d":
        parts["time_conv"] = WanCausalConv3d(width, 2 * width, (3, 1, 1), (1, 0, 0))
    return _module("WanResample", **parts)


def wan_decoder(
    width: int = 96,
    channels: int = 16,
    multiples: Sequence[int] = (1, 2, 4, 4),
    blocks: int = 2,
    doubles: Sequence[bool] = (True, True, False),
) -> nn.Module:
    """Return the decoder; the defaults are Wan 2.1's: 73 M weights, from 60 x 104 to 480 x 832.

    Args:
        width: channels of the last stage; each stage has a multiple of it, the last stage first.
        channels: of the latents.
        blocks: residual blocks of a stage, less one.
        doubles: whether each upsampling but the last stage's doubles the frames too.
    """
    widths = [width * times for times in (multiples[-1], *reversed(multiples))]
    middle = widths[0]
    attention = _module(
        "WanAttentionBlock",
        norm=_norm(middle, 2),
        to_qkv=nn.Conv2d(middle, 3 * middle, 1),
        proj=nn.Conv2d(middle, middle, 1),
    )
    stages = []
    for stage, (before, out) in enumerate(itertools.pairwise(widths)):
        # the upsampler of the stage before has halved them
        inside = before // 2 if stage else before
        resnets = [_resnet(inside if i == 0 else out, out) for i in range(blocks + 1)]
        upsamplers = None
        if stage < len(doubles):
            mode = "upsample3d" if doubles[stage] else "upsample2d"
            upsamplers = nn.ModuleList([_upsampler(out, mode)])
        stages.append(_module("WanUpBlock", resnets=nn.ModuleList(resnets), upsamplers=upsamplers))
    decoder = _module(
        "WanDecoder3d",
        conv_in=_conv(channels, middle),
        mid_block=_module(
            "WanMidBlock",
            attentions=nn.ModuleList([attention]),
            resnets=nn.ModuleList([_resnet(middle, middle) for _ in range(2)]),
        ),
        up_blocks=nn.ModuleList(stages),
        norm_out=_norm(width, 3),
        conv_out=_conv(width, 3),
    )
    return decoder.eval().requires_grad_(False)
