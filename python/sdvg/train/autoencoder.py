"""Stage ``vae``: diffusers' causal Wan autoencoder, tiny, trained on clips of moving digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdvg.train.data import CLIP_FRAMES, load_scans, render, sample_motions, to_video
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

CONFIG = {
    "base_dim": 12,
    "z_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    # as Wan 2.2: pixels are folded 2 x 2 into channels first, so decoding on a CPU stays cheap
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}


def build() -> AutoencoderKLWan:
    """A freshly initialised autoencoder: 4 x in time, 8 x in space, 16 channels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**CONFIG)


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent mean and log-variance ``[N, 16, 1 + k, 4, 4]`` of ``video [N, 3, 1 + 4k, 32, 32]``.

    Equals ``vae.encode`` in two calls instead of one per latent frame.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    vae.clear_cache()
    x, cache = patchify(video, 2), vae._enc_feat_map
    out = vae.encoder(x[:, :, :1], feat_cache=cache, feat_idx=[0])
    if x.shape[2] > 1:
        out = torch.cat((out, vae.encoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])), 2)
    return vae.quant_conv(out).float().chunk(2, 1)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Video ``[N, 3, 1 + 4k, 32, 32]``, not clamped, of raw latents ``[N, 16, 1 + k, 4, 4]``."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    x, cache = vae.post_quant_conv(latents), vae._feat_map
    out = [vae.decoder(x[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)]
    if x.shape[2] > 1:
        out.append(vae.decoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0]))
    return unpatchify(torch.cat(out, 2).float(), 2)


def train(runs: Path, *, steps: int, resume: bool, seed: int = 1) -> AutoencoderKLWan:
    """The trained autoencoder, its latent mean and deviation measured and set in its config."""
    torch.manual_seed(seed)
    vae = build()
    scans = load_scans()

    def loss(g: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        video = _clips(scans.images, 8, 9, g)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = encode(vae, video)
            logvar = logvar.clamp(-20, 10)
            z = mean + torch.randn(mean.shape, generator=g) * (logvar / 2).exp()
            out = decode(vae, z)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = out - video
        # most of a frame is dark: the strokes weigh more
        weight = 1 + 3 * (video > -0.9).float()
        mse = (weight * error.square()).mean()
        return {"loss": mse + 0.2 * (weight * error.abs()).mean() + 1e-4 * kl, "mse": mse, "kl": kl}

    vae = fit("vae", vae, loss, steps=steps, lr=5e-3, runs=runs, resume=resume, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        z = encode(vae, _clips(scans.images, 64, CLIP_FRAMES, g))[0]
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in z.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 5) for v in z.std((0, 2, 3, 4)).tolist()],
    )
    return vae


def _clips(images: torch.Tensor, n: int, frames: int, g: torch.Generator) -> torch.Tensor:
    """``n`` clips ``[n, 3, frames, 32, 32]`` cut out of longer ones at a random start."""
    chosen = torch.randint(len(images), (n,), generator=g)
    centres = sample_motions(n, g).centres(CLIP_FRAMES)
    start = torch.randint(CLIP_FRAMES - frames + 1, (n,), generator=g)
    index = start[:, None] + torch.arange(frames)
    return to_video(render(images[chosen], centres[torch.arange(n)[:, None], index]))


def statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent mean and deviation ``[1, 16, 1, 1, 1]`` from the config."""
    shape = (1, -1, 1, 1, 1)
    return (
        torch.tensor(vae.config.latents_mean).view(shape),
        torch.tensor(vae.config.latents_std).view(shape),
    )
