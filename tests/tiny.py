"""A tiny pair of random models from the real classes, for tests of the loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdvg.models.vae import StreamingVAE
from sdvg.models.wan import CausalWan

CHANNELS, HEIGHT, WIDTH, FRAMES = 4, 4, 4, 3
TEXT_DIM, TEXT_LENGTH = 16, 6


class TinyPair(NamedTuple):
    drafter: CausalWan
    target: CausalWan
    decoder: StreamingVAE


def encode(prompts: Sequence[str]) -> Tensor:
    """Return text embeddings that depend on each prompt alone."""
    rows = []
    for prompt in prompts:
        digest = hashlib.sha256(prompt.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(TEXT_LENGTH, TEXT_DIM, generator=generator))
    return torch.stack(rows)


def tiny_wan(
    *,
    seed: int,
    layers: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: object,
) -> CausalWan:
    """Return a random `CausalWan` of 2 heads; `options` go to `CausalWan`."""
    diffusers = pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=head_dim,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=64,
            num_layers=layers,
        )
    if dtype != torch.float32:
        transformer.to(dtype)
    transformer.to(device)
    options = {"sink_frames": 3, "window_frames": 6} | options
    return CausalWan(transformer, encode, height=HEIGHT, width=WIDTH, frames=FRAMES, **options)


def tiny_vae(dtype: torch.dtype = torch.float32) -> StreamingVAE:
    """Return a random `StreamingVAE` with Wan's strides (4 in time, 8 in space)."""
    diffusers = pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        )
    if dtype != torch.float32:
        vae.to(dtype)
    return StreamingVAE(vae)


def tiny_pair(dtype: torch.dtype = torch.float32, **options: object) -> TinyPair:
    """Return a drafter of one layer, a target of two and a decoder, all random."""
    return TinyPair(
        tiny_wan(seed=1, layers=1, dtype=dtype, **options),
        tiny_wan(seed=2, layers=2, dtype=dtype, **options),
        tiny_vae(dtype),
    )


class BrightnessScorer:
    """Rewards that follow the pixels alone; worst frames of a random VAE: about [-0.5, 2]."""

    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        return ((frames.double().mean(dim=(2, 3, 4)) - 0.5) * 1000).float()


def distilled_weights(folder: Path) -> Path:
    """Return `folder` with the shipped weights by links, and untrained distilled models in it.

    Both are the shipped drafter: what matters is who is loaded, and its schedule.
    """
    from sdvg.models.embedded import WEIGHTS

    folder.mkdir()
    for part in WEIGHTS.iterdir():
        if part.name != "diagonal":
            (folder / part.name).symlink_to(part)
    told = {"timesteps": [[1000, 933, 733, 2500 / 7], [1000, 933, 2500 / 7], [1000, 2500 / 7]],
            "clean_pass": False, "forcing": True, "flow": 1.0}  # fmt: skip
    for name in ("drafter", "student"):
        own = folder / "diagonal" / name
        own.mkdir(parents=True)
        for part in (WEIGHTS / "drafter").iterdir():
            (own / part.name).symlink_to(part)
        (own / "distillation.json").write_text(json.dumps(told))
    return folder


# keeps about half of the tiny drafter's blocks
TAU = 0.25


@contextmanager
def float64_norms() -> Iterator[None]:
    """Let diffusers' Wan keep float64, which its norms and modulation would round to float32."""
    narrow = torch.Tensor.float

    def keep(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 else narrow(self)

    torch.Tensor.float = keep
    try:
        yield
    finally:
        torch.Tensor.float = narrow
