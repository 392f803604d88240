"""The decoder of diffusers' Wan VAE on the fused norm, and replayed from CUDA graphs.

`StreamingVAE.accelerate` puts it in place; modules and weights stay diffusers'.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.capture import Recorder, first_cause
from sdvg_kernels import rms_norm_silu

_LOG = logging.getLogger("sdvg")
# frames that a causal convolution sees of what was before
_PAST = 2
# what a feature list holds: [B, C, t, H, W], or diffusers' own marks for no history
Feature = Tensor | str | None


class _Stream(NamedTuple):
    """The residual stream before its last additions, hidden + bias + residual, for the next norm.

    Tensors are `[B, t, H, W, C]`, channels-last videos as they lie in memory.
    """

    hidden: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None


class FusedDecoder:
    """What `WanDecoder3d.forward` computes, to rounding, over its own modules and weights.

    - Weights and activations are channels-last: the convolutions need no other layout inside.
    - A norm writes its SiLU straight into the convolution's input, behind two cached frames; the
      last two frames of that input are the next call's cache (`[B, C, 2, H, W]`, always two).
    - A convolution's bias and the residual are added by the next norm, on its way.
    - The nearest upsampling and the temporal upsampler's interleave are one copy.

    Args:
        decoder: diffusers' `WanDecoder3d`, of Wan 2.1's layout or of 2.2's.

    Raises:
        NotImplementedError: a decoder with a part that is not known here.
    """

    def __init__(self, decoder: nn.Module) -> None:
        if unknown := _unknown(decoder):
            raise NotImplementedError(f"vae: a decoder with {unknown} has no fused forward")
        self.decoder = decoder
        self._lay_out(torch.channels_last, torch.channels_last_3d)

    def undo(self) -> None:
        """Give the weights back the layout that diffusers makes them in."""
        self._lay_out(torch.contiguous_format, torch.contiguous_format)

    def _lay_out(self, images: torch.memory_format, videos: torch.memory_format) -> None:
        for module in self.decoder.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                layout = images if isinstance(module, nn.Conv2d) else videos
                module.weight.data = module.weight.data.contiguous(memory_format=layout)

    def __call__(
        self,
        latents: Tensor,
        features: Sequence[Feature],
        first: bool,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the decoder makes of `latents [B, C, t, h, w]`, and the features after it.

        Args:
            features: of the block before; None for each before the first.
            first: whether these latents (one frame) are a video's first.
            into: the features are written there, in place; they may be `features` themselves.
        """
        walk = _Walk(features, into)
        decoder = self.decoder
        video = latents.permute(0, 2, 3, 4, 1)
        window = walk.window(video.shape, video)
        window[:, _PAST:] = video
        stream = walk.convolve(decoder.conv_in, window)
        middle = decoder.mid_block
        stream = _residual_block(middle.resnets[0], stream, walk)
        for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
            stream = _residual_block(block, _attend(attention, stream), walk)
        for block in decoder.up_blocks:
            stream = _up_block(block, stream, walk, first)
        window = walk.window(stream.hidden.shape, stream.hidden)
        _norm(decoder.norm_out, stream, window[:, _PAST:])
        hidden, bias, _ = walk.convolve(decoder.conv_out, window)
        return (hidden + bias).permute(0, 4, 1, 2, 3), tuple(walk.after)


class _Walk:
    """Goes through the feature list, convolution by convolution."""

    def __init__(self, features: Sequence[Feature], into: Sequence[Tensor] | None) -> None:
        self.after: list[Tensor] = []
        self._before: Iterator[Feature] = iter(features)
        self._into: Iterator[Tensor] | None = None if into is None else iter(into)

    def window(self, shape: torch.Size, like: Tensor) -> Tensor:
        """Return `[B, 2 + t, H, W, C]` for a video `shape`: the history, and room for the video."""
        batch, frames, *rest = shape
        window = like.new_empty((batch, _PAST + frames, *rest))
        past = next(self._before)
        known = past.shape[2] if isinstance(past, Tensor) else 0
        window[:, : _PAST - known] = 0
        if known:
            window[:, _PAST - known : _PAST] = past.permute(0, 2, 3, 4, 1)
        return window

    def skip(self, like: Tensor) -> None:
        """Leave an empty history: the temporal upsampler does not see the first frame."""
        next(self._before)
        self._keep(like.new_zeros((len(like), _PAST, *like.shape[2:])))

    def convolve(self, conv: nn.Conv3d, window: Tensor) -> _Stream:
        """Return the convolution of a window that is filled, its bias still to be added."""
        self._keep(window[:, -_PAST:])
        return _Stream(_convolve(conv, window), conv.bias)

    def _keep(self, frames: Tensor) -> None:
        """Keep the last frames `[B, 2, H, W, C]` of a window as the next call's history."""
        if self._into is None:
            # a copy: a view would keep all frames alive
            kept = frames.clone(memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)
        else:
            # the same convolution's old history is in the window by now
            kept = next(self._into)
            kept.copy_(frames.permute(0, 4, 1, 2, 3))
        self.after.append(kept)


def _convolve(conv: nn.Conv3d, window: Tensor) -> Tensor:
    """Return `[B, t, H, W, C']` of `[B, k - 1 + t, H, W, C]`, without the bias."""
    weight = conv.weight
    outputs = len(weight)
    if weight.element_size() == 2 and outputs % 8:
        # tensor cores take channels by eight: three of an image are a path of their own
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, -outputs % 8))
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    # (left, right, top, bottom, before, after), which diffusers pads itself
    left, _, top, *_ = conv._padding
    out = F.conv3d(window.permute(0, 4, 1, 2, 3), weight, padding=(0, top, left))
    # no copy where the convolution works channels-last
    return out[:, :outputs].permute(0, 2, 3, 4, 1).contiguous()


def _norm(norm: nn.Module, stream: _Stream, out: Tensor, *, silu: bool = True) -> Tensor:
    """Write the norm of the stream into `out [B, t, H, W, C]`, and return the stream's sum."""
    hidden, bias, residual = stream
    plain = bias is None and residual is None
    total = hidden if plain else torch.empty_like(hidden)
    rms_norm_silu(
        hidden.flatten(1, 3),
        norm.gamma.flatten(),
        bias=bias,
        residual=None if residual is None else residual.flatten(1, 3),
        silu=silu,
        total=None if plain else total.flatten(1, 3),
        out=out.flatten(1, 3),
    )
    return total


def _sum(stream: _Stream) -> Tensor:
    """Return the stream's sum where no norm comes next."""
    hidden, bias, residual = stream
    hidden = hidden if bias is None else hidden + bias
    return hidden if residual is None else hidden.add_(residual)


def _residual_block(block: nn.Module, stream: _Stream, walk: _Walk) -> _Stream:
    """`WanResidualBlock.forward`, its last sum left to the next norm."""
    window = walk.window(stream.hidden.shape, stream.hidden)
    hidden = _norm(block.norm1, stream, window[:, _PAST:])
    shortcut = block.conv_shortcut
    residual = hidden
    if not isinstance(shortcut, nn.Identity):
        residual = _convolve(shortcut, hidden).add_(shortcut.bias)
    hidden, bias, _ = walk.convolve(block.conv1, window)
    window = walk.window(hidden.shape, hidden)
    rms_norm_silu(
        hidden.flatten(1, 3),
        block.norm2.gamma.flatten(),
        bias=bias,
        out=window[:, _PAST:].flatten(1, 3),
    )
    hidden, bias, _ = walk.convolve(block.conv2, window)
    return _Stream(hidden, bias, residual)


def _attend(block: nn.Module, stream: _Stream) -> _Stream:
    """`WanAttentionBlock.forward`: one head, each frame for itself."""
    normed = torch.empty_like(stream.hidden)
    hidden = _norm(block.norm, stream, normed, silu=False)
    # [B t, 1, H W, C]
    rows = normed.flatten(2, 3).flatten(0, 1)[:, None]
    query, key, value = F.linear(rows, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(
        3, dim=-1
    )
    rows = F.scaled_dot_product_attention(query, key, value)
    rows = F.linear(rows, block.proj.weight.flatten(1))
    return _Stream(rows.view_as(hidden), block.proj.bias, hidden)


def _up_block(block: nn.Module, stream: _Stream, walk: _Walk, first: bool) -> _Stream:
    """`WanUpBlock.forward` (Wan 2.1) or `WanResidualUpBlock.forward` (Wan 2.2)."""
    shortcut = getattr(block, "avg_shortcut", None)
    entered = None
    if shortcut is not None:
        entered = _sum(stream)
        stream = _Stream(entered)
    for resnet in block.resnets:
        stream = _residual_block(resnet, stream, walk)
    (upsampler,) = _upsamplers(block) or (None,)
    if upsampler is not None:
        stream = _upsample(upsampler, _sum(stream), walk, first)
    if shortcut is not None:
        around = shortcut(entered.permute(0, 4, 1, 2, 3), first_chunk=first)
        stream = stream._replace(residual=around.permute(0, 2, 3, 4, 1).contiguous())
    return stream


def _upsamplers(block: nn.Module) -> Sequence[nn.Module]:
    """Return the block's upsampler, if it has one."""
    if hasattr(block, "upsamplers"):
        return block.upsamplers or ()
    return () if block.upsampler is None else (block.upsampler,)


def _upsample(resample: nn.Module, hidden: Tensor, walk: _Walk, first: bool) -> _Stream:
    """`WanResample.forward` of `[B, t, H, W, C]`: twice the size.

    "upsample3d" gives twice the frames, too, but a video's first stays one.
    """
    batch, frames, height, width, channels = hidden.shape
    times = 1
    if resample.mode == "upsample3d" and first:
        walk.skip(hidden)
    elif resample.mode == "upsample3d":
        window = walk.window(hidden.shape, hidden)
        window[:, _PAST:] = hidden
        hidden, bias, _ = walk.convolve(resample.time_conv, window)
        # each frame's channels are those of two frames, one behind the other
        hidden, times = hidden.add_(bias), 2
    larger = hidden.new_empty((batch, frames, times, height, 2, width, 2, channels))
    source = hidden.unflatten(-1, (times, channels)).permute(0, 1, 4, 2, 3, 5)
    larger.copy_(source[:, :, :, :, None, :, None])
    images = larger.view(batch * frames * times, 2 * height, 2 * width, channels)
    conv = resample.resample[1]
    out = F.conv2d(images.permute(0, 3, 1, 2), conv.weight, padding=conv.padding)
    out = out.permute(0, 2, 3, 1).contiguous()
    return _Stream(out.unflatten(0, (batch, frames * times)), conv.bias)


_KNOWN = frozenset(
    "WanCausalConv3d WanRMS_norm WanUpsample WanResample WanResidualBlock WanAttentionBlock "
    "WanMidBlock WanUpBlock WanResidualUpBlock DupUp3D WanDecoder3d "
    "Conv2d Dropout Identity ModuleList Sequential SiLU".split()
)


def _unknown(decoder: nn.Module) -> str:
    """Return what in a decoder the fused forward does not know, or ""."""
    for name, module in decoder.named_modules():
        # a subclass may have another forward
        if (kind := type(module).__name__) not in _KNOWN:
            return f"{name}: {kind}"
        if kind == "WanRMS_norm" and isinstance(module.bias, Tensor):
            return f"{name}: a norm with a bias"
        if kind == "WanResample" and module.mode not in ("upsample2d", "upsample3d"):
            return f"{name}: {module.mode}"
    return ""


class _Captured(NamedTuple):
    """One graph, what it reads beside the features, and what it writes beside them."""

    latents: Tensor
    frames: Tensor
    replay: Callable[[], None]


# (latents `[B, C, F, h, w]`, features, first, into) -> (frames, features)
Forward = Callable[
    [Tensor, Sequence[Feature], bool, Sequence[Tensor] | None], tuple[Tensor, tuple[Feature, ...]]
]


class DecoderGraphs:
    """Replays a decode from CUDA graphs: one for each shape of the latents and kind of block.

    A graph reads the features from static buffers and writes the new ones over them; what it
    returns is copied out, so that a state stays a value. At 480 x 832 the features are 1.9 GB in
    bf16: the buffers hold them once more, the copy out reads and writes them once (0.8 ms at 4.8
    TB/s), and the copy in is left out where the buffers hold the given state already, as they do
    unless a block was rejected. Two sets of buffers in turns would save that millisecond, but an
    older state, which a rejection goes back to, would then have to be refused or copied anyway.

    Args:
        forward: what is captured; it launches the same kernels at each call.
        parameters: gives the tensors whose addresses the graphs hold.
    """

    def __init__(self, forward: Forward, parameters: Callable[[], Iterator[Tensor]]) -> None:
        self._forward, self._parameters = forward, parameters
        self._addresses: tuple[int, ...] = ()
        self._recorder = Recorder()
        self._drop()

    def _drop(self) -> None:
        # (shape of the latents, whether the block is a video's first) -> its graph, or why not
        self._captured: dict[tuple[torch.Size, bool], _Captured | str] = {}
        # (batch, height, width) -> the features' buffers
        self._buffers: dict[tuple[int, int, int], tuple[Tensor, ...]] = {}
        # ... -> the state that is in them
        self._held: dict[tuple[int, int, int], tuple[weakref.ref[Tensor], ...]] = {}
        self._recorder.drop()

    def start(self) -> None:
        """Begin a video: drop what was captured if weights lie elsewhere by now."""
        addresses = tuple(tensor.data_ptr() for tensor in self._parameters())
        if self._addresses != addresses:
            self._drop()
            self._addresses = addresses

    def __call__(
        self, latents: Tensor, features: Sequence[Feature], first: bool, offloaded: bool = False
    ) -> tuple[Tensor, tuple[Feature, ...]]:
        """Return what `forward` does, in tensors of their own."""
        key, place = (latents.shape, first), (len(latents), *latents.shape[3:])
        reason = _reason(latents, features, first, offloaded)
        if not reason and key not in self._captured:
            self._captured[key] = self._capture(latents, features, first)
        captured = reason or self._captured[key]
        if isinstance(captured, str):
            _warn_once(captured)
            return self._forward(latents, features, first, None)
        captured.latents.copy_(latents)
        buffers = self._buffers[place]
        if not first:
            held = self._held.get(place, ())
            if not held or any(a() is not b for a, b in zip(held, features, strict=True)):
                torch._foreach_copy_(list(buffers), list(features))
        captured.replay()
        after = tuple(buffer.clone() for buffer in buffers)
        self._held[place] = tuple(map(weakref.ref, after))
        return captured.frames.clone(), after

    def _capture(
        self, latents: Tensor, features: Sequence[Feature], first: bool
    ) -> _Captured | str:
        """Return the graph for what is given, or why there is none."""
        place, fixed = (len(latents), *latents.shape[3:]), latents.clone()
        _, after = self._recorder.warm_up(
            lambda: self._forward(latents, features, first, None), latents.device
        )
        buffers = self._buffers.setdefault(place, after)
        self._held.pop(place, None)
        del after

        def forward() -> Tensor:
            before = features if first else buffers
            return self._forward(fixed, before, first, buffers)[0]

        try:
            frames, replay = self._recorder.record(forward, latents.device)
        except RuntimeError as error:
            # a pool that a capture has failed in is not used again, nor are its graphs
            self._drop()
            return f"the capture failed: {first_cause(error)}"
        return _Captured(fixed, frames, replay)


def _reason(latents: Tensor, features: Sequence[Feature], first: bool, offloaded: bool) -> str:
    """Return why a decode cannot be replayed, or ""."""
    if offloaded:
        return "CUDA graphs need weights that stay on the GPU, and accelerate offloads them"
    if latents.device.type != "cuda":
        return f"CUDA graphs need a GPU, and the decoder is on {latents.device.type}"
    whole = (isinstance(entry, Tensor) and entry.shape[2] == _PAST for entry in features)
    if not first and not all(whole):
        return "this video began before `accelerate`, with features of another form"
    return ""


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("accelerate: the decoder's kernels are launched one by one: %s", reason)
