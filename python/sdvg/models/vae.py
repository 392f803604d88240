"""Streaming decode of diffusers' causal Wan VAE, block by block, with a state that is a value."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class DecoderState(NamedTuple):
    """The feature cache between two blocks; its tensors are shared and never written to.

    The VAE replaces the entries of its feature list and never changes them in place, so keeping
    the old tuple is a snapshot and going back to it is the restore: no bytes are copied.
    """

    # per causal convolution: a tensor [B, C, t, H, W], "Rep" (a first frame was seen), or None
    features: tuple[Tensor | str | None, ...]
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
        channels = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean).view(channels)
        self._std = torch.tensor(vae.config.latents_std).view(channels)
        # the count of causal convolutions appears only here
        vae.clear_cache()
        self._convolutions = vae._conv_num

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.vae.post_quant_conv.weight.dtype

    def start(self, batch: int) -> DecoderState:
        """Return the state before the first block; it serves any batch."""
        return DecoderState((None,) * self._convolutions, True)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return frames `[B, N, 3, H, W]` in [0, 1] of latents `[B, F, C, h, w]`, and the state.

        Frames are float32 (float64 from a float64 decoder), whatever the decoder computes in.
        """
        if (hook := getattr(self.vae, "_hf_hook", None)) is not None:
            # accelerate's offloading brings the weights for a forward, and only for that
            hook.pre_forward(self.vae)
        weight = self.vae.post_quant_conv.weight
        latents = latents.transpose(1, 2).to(weight.device, weight.dtype)
        latents = self.vae.post_quant_conv(latents * self._std.to(latents) + self._mean.to(latents))
        features = list(state.features)
        # the first latent frame of a video stands alone; the others go through together
        parts = latents.split([1, latents.shape[2] - 1], dim=2) if state.first else (latents,)
        frames = [
            self.vae.decoder(part, feat_cache=features, feat_idx=[0], first_chunk=first)
            for part, first in zip(parts, (state.first, False), strict=False)
            if part.shape[2]
        ]
        pixels = torch.cat(frames, dim=2)
        if self.vae.config.patch_size is not None:
            # Wan 2.2's decoder leaves pixels folded into channels
            pixels = self._unpatchify(pixels, self.vae.config.patch_size)
        wide = torch.promote_types(pixels.dtype, torch.float32)
        pixels = pixels.to(wide).clamp(-1, 1).transpose(1, 2)
        return (pixels + 1) / 2, DecoderState(tuple(features), False)

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


def _rms_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Return what `WanRMS_norm` does, to rounding.

    It goes through `torch.linalg.vector_norm`, which on a CPU walks the channels of each pixel one
    by one: a third of the decoder's time.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    power = hidden.square().sum(1 if norm.channel_first else -1, keepdim=True, dtype=wide)
    out = hidden * (norm.scale / power.sqrt().clamp_min(1e-12)).to(hidden.dtype) * norm.gamma
    return out + norm.bias if isinstance(norm.bias, Tensor) else out
