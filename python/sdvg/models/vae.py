"""Streaming decode of latents, block by block, with a state that is a value.

`StreamingVAE` runs diffusers' causal Wan VAE, `TinyDecoder` a distilled decoder for previews.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.checkpoints import read_tensors
from sdvg.models.vae_fused import DecoderGraphs, Feature, FusedDecoder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_LOG = logging.getLogger("sdvg")


class DecoderState(NamedTuple):
    """The feature cache between two blocks; its tensors are shared and never written to.

    The VAE replaces the entries of its feature list and never changes them in place, so keeping
    the old tuple is a snapshot and going back to it is the restore: no bytes are copied.
    """

    # per causal convolution: a tensor [B, C, t, H, W], "Rep" (a first frame was seen), or None
    features: tuple[Feature, ...]
    first: bool


class StreamingVAE:
    """A `Decoder` (see `sdvg.types`) around a stock `AutoencoderKLWan`.

    Decoding block by block equals `vae.decode` of the whole video; the first latent frame gives
    one pixel frame, each later one four (blocks of 9, 12, 12, ... frames for three latent frames).
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm, unpatchify

        self._unpatchify = unpatchify
        for module in vae.decoder.modules():
            if isinstance(module, WanRMS_norm):
                module.forward = partial(_rms_norm, module)
        self.vae = vae.eval().requires_grad_(False)
        # the count of causal convolutions appears only here
        vae.clear_cache()
        self._convolutions = vae._conv_num
        # put there by `accelerate`
        self._fused: FusedDecoder | None = None
        self._graphs: DecoderGraphs | None = None
        self._statistics: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.vae.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes; the weights of an offloaded one lie elsewhere."""
        hook = getattr(self.vae, "_hf_hook", None)
        away = getattr(hook, "execution_device", None)
        return self.vae.post_quant_conv.weight.device if away is None else torch.device(away)

    def accelerate(self, *, graphs: bool = False) -> StreamingVAE:
        """Decode channels-last on the fused norm from now on, to the same numbers but for rounding.

        The weights change their layout in place, not their names or values, and stay usable by
        diffusers. On a GPU in half precision cuDNN should be 9.15 or later: torch passes over some
        before it (pytorch/pytorch#166643).

        Args:
            graphs: also replay one CUDA graph for each shape of latents and kind of block (a
                video's first, later ones). It keeps the decoder's activations and the features
                once more until `release`, by arithmetic 6 GB for 480 x 832 in bf16. Where that
                cannot be, a warning says why.

        Returns self. A decoder that is built of other parts than Wan's stays diffusers', with a
        warning.
        """
        if self._fused is None:
            try:
                self._fused = FusedDecoder(self.vae.decoder)
            except NotImplementedError as reason:
                _LOG.warning("accelerate: diffusers' own forward decodes: %s", reason)
                return self
        if not graphs:
            self.release()
        elif self._graphs is None:
            self._graphs = DecoderGraphs(self._forward, self.vae.parameters)
        return self

    def _install(self) -> None:
        """Decode by diffusers' own forward, as before `accelerate`; for videos that begin then."""
        if self._fused is not None:
            self._fused.undo()
        self._fused = self._graphs = None

    def release(self) -> None:
        """Let go of captured graphs, gigabytes of the device's memory; decode without them."""
        self._graphs = None

    def start(self, batch: int) -> DecoderState:
        """Return the state before the first block; it serves any batch.

        Raises ValueError where tiling was asked for: blocks are decoded whole.
        """
        if getattr(self.vae, "use_tiling", False):
            raise ValueError(
                "vae: tiling must be off, a block is decoded whole; call vae.disable_tiling(), and "
                "for less memory take fewer prompts at once"
            )
        if self._graphs is not None:
            self._graphs.start()
        return DecoderState((None,) * self._convolutions, True)

    # graphs keep what they were captured with, and write there in any mode of a later caller
    @torch.inference_mode(False)
    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return frames `[B, N, 3, H, W]` in [0, 1] of latents `[B, F, C, h, w]`, and the state.

        Frames are float32 (float64 from a float64 decoder), whatever the decoder computes in.
        """
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None:
            # accelerate's offloading brings the weights for a forward, and only for that
            hook.pre_forward(self.vae)
        weight = self.vae.post_quant_conv.weight
        latents = latents.transpose(1, 2).to(weight.device, weight.dtype)
        # the features keep the decoder's dtype in a caller's autocast too
        with torch.autocast(weight.device.type, enabled=False):
            if self._graphs is None:
                frames, features = self._forward(latents, state.features, state.first)
            else:
                offloaded = hook is not None
                frames, features = self._graphs(latents, state.features, state.first, offloaded)
        return frames, DecoderState(features, False)

    def _forward(
        self,
        latents: Tensor,
        features: Sequence[Feature],
        first: bool,
        into: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Feature, ...]]:
        """Return the frames of `[B, C, F, h, w]` and the features, `into` where that is given."""
        mean, std = self._scales(latents)
        latents = self.vae.post_quant_conv(latents * std + mean)
        # the first latent frame of a video stands alone; the others go through together
        parts = latents.split([1, latents.shape[2] - 1], dim=2) if first else (latents,)
        frames = []
        for part, alone in zip(parts, (first, False), strict=False):
            if not part.shape[2]:
                continue
            if self._fused is not None:
                out, features = self._fused(part, features, alone, into)
            else:
                features = list(features)
                out = self.vae.decoder(part, feat_cache=features, feat_idx=[0], first_chunk=alone)
            frames.append(out)
        pixels = torch.cat(frames, dim=2)
        if self.vae.config.patch_size is not None:
            # Wan 2.2's decoder leaves pixels folded into channels
            pixels = self._unpatchify(pixels, self.vae.config.patch_size)
        wide = torch.promote_types(pixels.dtype, torch.float32)
        pixels = pixels.to(wide).clamp(-1, 1).transpose(1, 2)
        return (pixels + 1) / 2, tuple(features)

    def _scales(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents' mean and deviation `[1, C, 1, 1, 1]`, kept where they are needed."""
        if self._statistics is None or self._statistics[0].device != latents.device:
            config = self.vae.config
            self._statistics = tuple(
                torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device)
                for values in (config.latents_mean, config.latents_std)
            )
        return tuple(values.to(latents.dtype) for values in self._statistics)

    def take(self, state: DecoderState, rows: Tensor) -> DecoderState:
        """Return the state of the sequences `rows` alone."""
        features = (entry[rows] if isinstance(entry, Tensor) else entry for entry in state.features)
        return DecoderState(tuple(features), state.first)

    def select(self, draft: DecoderState, other: DecoderState, rows: Tensor) -> DecoderState:
        """Return `draft` with the sequences `rows` taken from `other`, which holds them alone."""
        features = (
            mine.index_copy(0, rows, theirs) if isinstance(mine, Tensor) else mine
            for mine, theirs in zip(draft.features, other.features, strict=True)
        )
        return DecoderState(tuple(features), False)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Return the clean latents `[B, F, C, h, w]` of whole videos, as `StreamingVAE` decodes them.

    Args:
        pixels: `[B, 3, N, H, W]` in [-1, 1], where the autoencoder lies; N = 1 + 4 (F - 1).
    """
    latents = vae.encode(pixels.to(vae.post_quant_conv.weight.dtype)).latent_dist.mode()
    channels = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(channels).to(latents)
    std = torch.tensor(vae.config.latents_std).view(channels).to(latents)
    return ((latents - mean) / std).transpose(1, 2)


def _rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Return what `WanRMS_norm` does, to rounding.

    It goes through `torch.linalg.vector_norm`, which on a CPU walks the channels of each pixel one
    by one: a third of the decoder's time. In half precision, whose squares overflow, it stays.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    axis = 1 if norm.channel_first else -1
    if hidden.dtype == wide:
        length = hidden.square().sum(axis, keepdim=True).sqrt()
    else:
        length = torch.linalg.vector_norm(hidden, dim=axis, keepdim=True, dtype=wide)
    # finite in the narrow type too: a pixel of zeros stays zero
    factor = (norm.scale / length.clamp_min(1e-12)).clamp_max(torch.finfo(hidden.dtype).max)
    out = hidden * factor.to(hidden.dtype) * norm.gamma
    return out + norm.bias if isinstance(norm.bias, Tensor) else out


class TinyDecoder(nn.Module):
    """A `Decoder` (see `sdvg.types`) with TAEHV's layout: small enough to score every draft on.

    Weights are the user's (`taew2_1`, `taew2_2`: github.com/madebyollin/taehv). Latents are the
    pipeline's normalised ones. Each of the three stages doubles the size, the last two double the
    frames; a memory block sees the frame before, so one block of latents goes through in one call.
    Sizes are read off the weights.

    Args:
        weights: name -> tensor, with or without the encoder's.

    Raises:
        ValueError: weights that are not a TAEHV decoder's.
    """

    # places in the decoder's sequence: memory blocks, then what ends the stage
    _STAGES = ((3, 4, 5, 7, 8), (9, 10, 11, 13, 14), (15, 16, 17, 19, 20))
    _FIRST, _LAST = 1, 22

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        prefix = "decoder."
        weights = {k: v for k, v in weights.items() if k.startswith(prefix)}
        ends = (self._FIRST, *(stage[-1] for stage in self._STAGES), self._LAST)
        missing = [end for end in ends if f"{prefix}{end}.weight" not in weights]
        if missing:
            raise ValueError(
                f"tiny_decoder: weights must hold {prefix}{missing[0]}.weight of TAEHV's layout, "
                "got no such tensor"
            )
        # [out, in] of the convolutions between stages
        widths = [weights[f"{prefix}{end}.weight"].shape[0] for end in ends]
        channels = weights[f"{prefix}{self._FIRST}.weight"].shape[1]
        self.patch_size = math.isqrt(widths[-1] // 3)
        layers = {str(self._FIRST): nn.Conv2d(channels, widths[0], 3, padding=1)}
        for stage, (width, after) in enumerate(itertools.pairwise(widths[:-1])):
            *memory, grow, end = map(str, self._STAGES[stage])
            layers |= {place: _MemoryBlock(width) for place in memory}
            frames = 1 if stage == 0 else 2
            layers[grow] = nn.ModuleDict({"conv": nn.Conv2d(width, frames * width, 1, bias=False)})
            layers[end] = nn.Conv2d(width, after, 3, padding=1, bias=False)
            name = f"{prefix}{grow}.conv.weight"
            if name in weights:
                # a stage that was trained to grow in time and does not here keeps the last frame
                weights[name] = weights[name][-frames * width :]
        layers[str(self._LAST)] = nn.Conv2d(widths[-2], widths[-1], 3, padding=1)
        self.decoder = nn.ModuleDict(layers)
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                "tiny_decoder: weights must have TAEHV's layout, got: "
                + " ".join(str(error).split()[-12:])
            ) from error
        self.to(weights[f"{prefix}{self._FIRST}.weight"].dtype)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> TinyDecoder:
        """Read a `.safetensors` file, or a `.pth` with nothing but tensors in it.

        Raises ValueError for a file that is missing, broken or another model's, in one sentence.
        """
        return cls(read_tensors(Path(path), "tiny_decoder"))

    def start(self, batch: int) -> DecoderState:
        """Return the state before the first block; it serves any batch."""
        return DecoderState((None,) * 9, True)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return frames `[B, N, 3, H, W]` in [0, 1] of latents `[B, F, C, h, w]`, and the state.

        N is 4 F, less 3 in the first block: the first latent frame stands for one frame.
        """
        layers, batch = self.decoder, len(latents)
        hidden = latents.to(next(self.parameters())).flatten(0, 1)
        hidden = layers[str(self._FIRST)](3 * torch.tanh(hidden / 3)).relu()
        before, after = iter(state.features), []
        for stage in self._STAGES:
            *memory, grow, end = map(str, stage)
            for place in memory:
                frames = hidden.unflatten(0, (batch, -1))
                last = next(before)
                last = torch.zeros_like(frames[:, :1]) if last is None else last
                past = torch.cat((last, frames[:, :-1]), dim=1).flatten(0, 1)
                # a copy: a view would keep all frames alive
                after.append(frames[:, -1:].clone())
                hidden = layers[place](hidden, past)
            hidden = F.interpolate(hidden, scale_factor=2.0)
            width = hidden.shape[1]
            hidden = layers[grow]["conv"](hidden).unflatten(1, (-1, width)).flatten(0, 1)
            hidden = layers[end](hidden)
        pixels = F.pixel_shuffle(layers[str(self._LAST)](hidden.relu()), self.patch_size)
        pixels = pixels.unflatten(0, (batch, -1)).float().clamp(0, 1)
        return pixels[:, 3 if state.first else 0 :], DecoderState(tuple(after), False)

    take = StreamingVAE.take
    select = StreamingVAE.select


class _MemoryBlock(nn.Module):
    """A residual block that sees its input of one frame earlier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, hidden: Tensor, past: Tensor) -> Tensor:
        return (self.conv(torch.cat((hidden, past), dim=1)) + hidden).relu()
