"""Stages ``target`` and ``drafter``: flow matching with block-causal teacher forcing.

One forward a clip: noisy blocks beside clean ones, a timestep for each block (`BlockForward`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sdvg.models.embedded import LATENT_SIZE, SINK_FRAMES, WINDOW_FRAMES
from sdvg.models.embedded.prompts import Request
from sdvg.models.embedded.text import TextEncoder
from sdvg.train.autoencoder import encode, statistics
from sdvg.train.data import (
    BLOCKS,
    CLIP_FRAMES,
    FRAMES_PER_BLOCK,
    Motions,
    keyed_noise,
    load_scans,
    render,
    sample_motions,
    sample_request,
    to_video,
    write_prompt,
)
from sdvg.train.forcing import BlockForward
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

STEPS = (1000.0, 937.5, 2500 / 3, 625.0)  # flow shift 5 of 1000, 750, 500, 250
SIZES = {
    "target": {"num_attention_heads": 3, "num_layers": 15, "ffn_dim": 768},
    # trained longest: the target is grown from it, the drafter is cut out of it
    "base": {"num_attention_heads": 3, "num_layers": 6, "ffn_dim": 768},
    "student": {"num_attention_heads": 3, "num_layers": 6, "ffn_dim": 576},
    "drafter": {"num_attention_heads": 3, "num_layers": 3, "ffn_dim": 128},
}
# which layers of the base are kept; the drafter's lose least without the others, untrained
CUT = {"student": (0, 1, 2, 3, 4, 5), "drafter": (0, 2, 5)}
# digits that come out worst are shown more often, by this weight
HARD = {2: 1.6, 7: 1.6, 8: 1.6}


class Clips(NamedTuple):
    """Encoded clips: normalised latents ``[N, 16, 27, 4, 4]`` and what they show."""

    latents: torch.Tensor
    motions: Motions
    labels: torch.Tensor
    style: torch.Tensor


def build(name: str) -> WanTransformer3DModel:
    """A freshly initialised ``"base"``, ``"target"`` or ``"drafter"``."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=128, freq_dim=128, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256, **SIZES[name],
    )  # fmt: skip


def encode_clips(vae: AutoencoderKLWan, count: int, runs: Path, seed: int = 3) -> Clips:
    """``count`` random training clips, encoded once and kept in ``runs/latents-*.pt``."""
    scans = load_scans()
    g = torch.Generator().manual_seed(seed)
    weight = torch.tensor([HARD.get(int(label), 1.0) for label in scans.labels])
    chosen = torch.multinomial(weight, count, replacement=True, generator=g)
    motions = sample_motions(count, g)
    path = runs / f"latents-{count}-{seed}.pt"
    if path.exists():
        latents = torch.load(path, weights_only=True, mmap=True)
    else:
        mean, std = statistics(vae)
        parts = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for i in tqdm(torch.arange(count).split(32), desc="encode", mininterval=5):
                part = Motions(motions.direction[i], motions.speed[i], motions.jitter[i])
                video = to_video(render(scans.images[chosen[i]], part.centres(CLIP_FRAMES)))
                parts.append(((encode(vae, video)[0] - mean) / std).half())
        latents = torch.cat(parts)
        runs.mkdir(parents=True, exist_ok=True)
        torch.save(latents, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return Clips(latents, motions, scans.labels[chosen], scans.style[chosen])


@dataclass(frozen=True)
class Rates:
    """How far the context is spoilt, so that rollouts, which see their own output, do not drift."""

    # the most white noise on a clean context, in units of its deviation
    noise: float = 0.2
    # how often a clip's context blocks are the model's own predictions, in the last half of
    # training
    own: float = 0.5


def train(
    name: str,
    clips: Clips,
    text: TextEncoder,
    runs: Path,
    *,
    steps: int,
    resume: bool,
    start: WanTransformer3DModel | None = None,
    batch: int = 8,
    lr: float = 2e-3,
    rates: Rates = Rates(),
    first_weight: float = 0.25,
    unseen: tuple[int, ...] = (),
    seed: int = 4,
) -> WanTransformer3DModel:
    """The trained transformer; all see the same clips and the same noise.

    With ``start``, the trained base, the target is grown from it and the drafter cut out of it.
    ``first_weight``: what block 0, which has everything to invent, weighs beyond its share.
    ``unseen``: digits that are left out.
    """
    torch.manual_seed(seed)
    model = build(name)
    velocity = forward_of(model)
    if start is not None and name in CUT:
        cut(name, model, start)
    elif start is not None:
        _grow(model, start)
    frames = BLOCKS * FRAMES_PER_BLOCK
    seen = shown(clips, unseen)

    def loss(g: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        sigma = _levels(batch, g)
        x0, noise, prompts = sample(clips, seen, sigma, g)
        s = sigma.repeat_interleave(FRAMES_PER_BLOCK, 1)[:, None, :, None, None]
        noisy = (1 - s) * x0 + s * noise
        embedded = text(prompts)
        amount = rates.noise * torch.rand(batch, 1, frames, 1, 1, generator=g)
        context = x0 + amount * torch.randn(x0.shape, generator=g)
        if step >= steps // 2 and float(torch.rand((), generator=g)) < rates.own:
            with torch.no_grad():
                guess = noisy - s * velocity(model, noisy, sigma, embedded, context=context)
            replaced = torch.rand(batch, BLOCKS, generator=g) < 0.7
            replaced = replaced.repeat_interleave(FRAMES_PER_BLOCK, 1)[:, None, :, None, None]
            context = torch.where(replaced, guess, context)
        v = velocity(model, noisy, sigma, embedded, context=context)
        error = (v - (noise - x0)).square().mean((1, 3, 4)).unflatten(1, (BLOCKS, -1)).mean(2)
        return {
            "loss": error.mean() + first_weight * error[:, 0].mean(),
            "first": error[:, 0].mean(),
            "later": error[:, 1:].mean(),
        }

    return fit(name, model, loss, steps=steps, lr=lr, runs=runs, resume=resume, seed=seed, ema=0.99)


def forward_of(model: WanTransformer3DModel, **options: object) -> BlockForward:
    """The training forward of a whole clip with the embedded pair's sizes."""
    return BlockForward(
        model, blocks=BLOCKS, frames=FRAMES_PER_BLOCK, height=LATENT_SIZE, width=LATENT_SIZE,
        window_frames=WINDOW_FRAMES, sink_frames=SINK_FRAMES, **options,
    )  # fmt: skip


def shown(clips: Clips, unseen: tuple[int, ...]) -> torch.Tensor:
    """Which clips show none of the digits ``unseen``, int64."""
    return torch.tensor([int(label) not in unseen for label in clips.labels]).nonzero()[:, 0]


def sample(
    clips: Clips, seen: torch.Tensor, sigma: torch.Tensor, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Clean latents, noise for the levels ``sigma [N, blocks]``, and prompts of N random clips.

    Where block 0 is nearly all noise, its noise spells what the prompt leaves open.
    """
    chosen = seen[torch.randint(len(seen), (len(sigma),), generator=g)]
    x0 = clips.latents[chosen].float()
    motions, labels = clips.motions.take(chosen), clips.labels[chosen]
    requests, prompts = write_prompts(labels, motions, g)
    noise = torch.randn(x0.shape, generator=g)
    head = noise[:, :, :FRAMES_PER_BLOCK]
    keyed = keyed_noise(head, motions, labels, clips.style[chosen], requests, g)
    # below 0.9 the signal has decided the clip; a sampler's fresh noise there spells another
    spelt = (sigma[:, 0] > 0.9)[:, None, None, None, None]
    noise[:, :, :FRAMES_PER_BLOCK] = torch.where(spelt, keyed, head)
    return x0, noise, prompts


def load_base(runs: Path) -> WanTransformer3DModel:
    """The trained base from its checkpoint; ValueError where stage ``base`` has not run."""
    path = runs / "base.pt"
    if not path.exists():
        raise ValueError(f"train: {path} must exist, which stage base writes; run that stage first")
    base = build("base")
    base.load_state_dict(torch.load(path, weights_only=True)["average"])
    return base.eval()


@torch.no_grad()
def _grow(model: WanTransformer3DModel, base: WanTransformer3DModel) -> None:
    """Make ``model`` equal to ``base``, with silent copies of layers behind their originals."""
    ratio = len(base.blocks) / len(model.blocks)
    origin = [int(layer * ratio) for layer in range(len(model.blocks))]
    weights = base.state_dict()
    grown = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for layer, source in enumerate(origin):
        copy = layer > 0 and origin[layer - 1] == source
        for name, value in weights.items():
            if name.startswith(f"blocks.{source}."):
                rest = name.split(".", 2)[2]
                # without its output projections a layer adds nothing to the residual stream
                silent = copy and ("to_out" in rest or "net.2" in rest)
                grown[f"blocks.{layer}.{rest}"] = value * 0 if silent else value
    model.load_state_dict(grown)


@torch.no_grad()
def cut(name: str, model: WanTransformer3DModel, base: WanTransformer3DModel) -> None:
    """Start ``model``, a fresh ``name``, from layers of ``base``, with their heaviest neurons."""
    state = {part: value for part, value in base.state_dict().items() if "blocks." not in part}
    for layer, source in enumerate(CUT[name]):
        weights = base.blocks[source].state_dict()
        inward, outward = weights["ffn.net.0.proj.weight"], weights["ffn.net.2.weight"]
        weight = inward.norm(dim=1) * outward.norm(dim=0)
        kept = weight.topk(model.config.ffn_dim).indices.sort().values
        for part in ("ffn.net.0.proj.weight", "ffn.net.0.proj.bias"):
            weights[part] = weights[part][kept]
        weights["ffn.net.2.weight"] = outward[:, kept]
        state |= {f"blocks.{layer}.{part}": value for part, value in weights.items()}
    model.load_state_dict(state)


def _levels(n: int, g: torch.Generator) -> torch.Tensor:
    """Noise levels ``[n, blocks]``: mostly those of inference, else anything from 0.3 to 1."""
    pick = torch.tensor(STEPS)[torch.randint(4, (n, BLOCKS), generator=g)] / 1000
    free = 0.3 + 0.7 * torch.rand(n, BLOCKS, generator=g)
    return torch.where(torch.rand(n, BLOCKS, generator=g) < 0.2, free, pick)


def write_prompts(
    labels: torch.Tensor, motions: Motions, g: torch.Generator
) -> tuple[list[Request], list[str]]:
    """What each clip is asked for with, and one of many wordings of it."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=g)))
    shown = zip(labels.tolist(), motions.direction.tolist(), motions.speed.tolist(), strict=True)
    requests = [sample_request(rng, *row) for row in shown]
    return requests, [write_prompt(r, rng) for r in requests]
