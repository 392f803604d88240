"""Make the embedded token model's drafter: ``python -m sdvg.train.drafter --out DIR``.

EAGLE's distillation (arXiv 2401.15077): on whole clips of moving digits the drafter learns the
frozen target's next feature (smooth L1), and what the target's head makes of it (cross-entropy with
the target's own distribution), from noisy features. As in HASS (arXiv 2408.15766) it also goes on
from features of its own, under the mask that drafting has: those of older tokens are the target's.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sdvg.models.drafter import EagleDrafter
from sdvg.models.embedded.tokens import DRAFTER, FRAMES, VideoTokens, drafter_sizes, load
from sdvg.models.llama import attend_causal, attend_masked
from sdvg.models.tokens import TokenLlama, from_transformers
from sdvg.train.loop import fit
from sdvg.train.tokens import dark_code, neighbours, sample_clips, spoil

# steps of the shipped run
STEPS = 800
# until this share of the steps: clips of a batch, frames of a clip
PHASES = ((0.4, 8, 2), (1.0, 2, FRAMES))
# features of its own that it goes on from in training, at so many tokens of a clip
DEPTH, ROOTS = 2, 256
# noise on the target's features, each way; their root mean square is 1.2
NOISE = 0.1
# what the cross-entropy counts beside the features' error (EAGLE: 0.1): it decides what is accepted
HEAD = 1.0
# share of the clips whose prompt is empty: guidance drafts from both
EMPTY = 0.3
# clips that training never saw, for the grade
HELD_OUT = 8


class Shown(NamedTuple):
    """Whole clips as their target sees them."""

    ids: Tensor  # [N, S]
    embedded: Tensor  # [N, S, width]
    features: Tensor  # [N, S, width], the target's


@torch.no_grad()
def show(target: TokenLlama, ids: Tensor) -> Shown:
    """The target's embeddings and features of clips' ids ``[N, S]``."""
    features = target.prefill(ids, target.new_cache(len(ids), ids.shape[1]))
    return Shown(ids, target.embed(ids), features)


def unroll(
    drafter: EagleDrafter,
    shown: Shown,
    turned: tuple[Tensor, Tensor],
    roots: Tensor,
    depth: int,
    noise: float = 0.0,
) -> list[Tensor]:
    """The drafter's features: ``[N, S - 1, width]`` of tokens 1, 2, ..., then of each draft.

    Draft d of root token r is fed token r + d and the drafter's own feature before it. It sees the
    target's features up to the root and the drafts before it: what `EagleDrafter.feed` gives.

    Args:
        turned: cosines and sines ``[S, 1, head_dim]`` of the target's slots.
        roots: slots ``[N, R]`` in ``[1, S - depth)``.
        noise: on the target's features, uniform each way.
    """
    embedded, features = shown.embedded[:, 1:], shown.features[:, :-1]
    if noise:
        features = features + noise * (2 * torch.rand_like(features) - 1)
    count, size = roots.shape
    # token r stands at r - 1
    before = torch.arange(embedded.shape[1]) < roots[..., None]
    own = torch.eye(size, dtype=torch.bool).expand(count, -1, -1)
    row = torch.arange(count)[:, None]
    made, memory = [], [(), ()]
    for d in range(depth + 1):
        if d == 0:
            mask, angles = None, tuple(part[1:] for part in turned)
        else:
            mask = torch.cat((before, *(own,) * d), 2)[:, None]
            angles = tuple(part[roots + d] for part in turned)
            embedded = shown.embedded[row, roots + d]
            features = made[0][row, roots - 1] if d == 1 else made[-1]
        x = drafter.join(embedded, features)
        (layer,) = drafter.layers
        query, key, value = layer.project(x, angles)
        memory = [(*old, new) for old, new in zip(memory, (key, value), strict=True)]
        if mask is None:
            out = attend_causal(query, key, value)
        else:
            out = attend_masked(query, *(torch.cat(parts, 1) for parts in memory), mask)
        made.append(layer.feed(x, out))
    return made


def distil(
    target: TokenLlama, codes: int, made: Tensor, wanted: Tensor, follows: Tensor
) -> dict[str, Tensor]:
    """The loss of features ``made`` for ``wanted``, its parts, and how much would be accepted.

    Args:
        made, wanted: ``[..., width]``.
        follows: ``[...]``, whether a code follows: nothing else is drafted.
    """
    made, wanted = made[follows].float(), wanted[follows]
    with torch.no_grad():
        chances = target.logits(wanted)[:, :codes].float().softmax(-1)
    logs = target.logits(made)[:, :codes].float().log_softmax(-1)
    feature = F.smooth_l1_loss(made, wanted)
    head = -(chances * logs).sum(-1).mean()
    accepted = torch.minimum(chances, logs.exp()).sum(-1).mean()
    return {"loss": feature + HEAD * head, "feature": feature, "head": head, "accepted": accepted}


def train(
    models: VideoTokens, runs: Path, *, steps: int = STEPS, resume: bool = False, seed: int = 31
) -> EagleDrafter:
    """The trained drafter of ``models``, a moving average.

    A few codes of the clips are those of a near miss, as in the target's training.
    """
    torch.manual_seed(seed)
    target = from_transformers(models.model)
    drafter = EagleDrafter(drafter_sizes(target.sizes))
    dark, near = dark_code(models, seed), neighbours(models.vq)

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        count, frames = next(shape for until, *shape in PHASES if step < until * steps)
        clips = sample_clips(count, frames, g)
        dropped = (torch.rand(count, generator=g) < EMPTY).tolist()
        prompts = ["" if d else p for d, p in zip(dropped, clips.prompts, strict=True)]
        codes = models.encode(clips.frames)
        ids = models.sequence(models.prompts(prompts), codes, clips.actions)
        ids = spoil(ids, dark, near, g)
        follows = F.pad(ids[:, 1:] < models.codes, (0, 1))
        roots = draw_roots(ids, dark, g)
        turned = target.angles(ids.shape[1])
        with torch.autocast("cpu", torch.bfloat16):
            shown = show(target, ids)
            made = unroll(drafter, shown, turned, roots, DEPTH, NOISE)
            row = torch.arange(count)[:, None]
            parts = [distil(target, models.codes, made[0], shown.features[:, 1:], follows[:, 1:])]
            for d in range(1, DEPTH + 1):
                at = row, roots + d
                parts.append(distil(target, models.codes, made[d], shown.features[at], follows[at]))
        total = sum(part["loss"] for part in parts) / len(parts)
        named = {key: parts[0][key] for key in ("feature", "head", "accepted")}
        later = {f"accepted_{d}": part["accepted"] for d, part in enumerate(parts[1:], 1)}
        return {"loss": total, **named, **later}

    return fit(
        "tokens-drafter", drafter, loss, steps=steps, lr=2e-3, runs=runs, resume=resume, seed=seed,
        ema=0.99,
    )  # fmt: skip


def draw_roots(ids: Tensor, dark: int, g: torch.Generator) -> Tensor:
    """Slots ``[N, ROOTS]`` to unroll from, those before a stroke ten times as often as others."""
    stroke = (ids != dark).float()
    near = 0.1 + stroke[:, 1:]
    # neither slot 0, which is never fed, nor one too near the end
    chance = near[:, 1 : ids.shape[1] - DEPTH - 1]
    return torch.multinomial(chance, min(ROOTS, chance.shape[1]), generator=g) + 1


class Grade(NamedTuple):
    """How one depth of drafting fares on clips that training never saw."""

    depth: int  # 0: from the target's features alone
    top1: float  # how often drafter and target hold the same code for the likeliest
    top4: float  # how often the target's likeliest is among the drafter's four
    accepted: float  # mass of the target's distribution that exact rejection sampling accepts
    length: float  # codes accepted up to this depth of one chain, on average


@torch.no_grad()
def grade(
    models: VideoTokens,
    drafter: EagleDrafter,
    *,
    count: int,
    depth: int = 4,
    temperature: float = 0.9,
    guidance: float = 1.5,
    seed: int = 1_000,
) -> list[Grade]:
    """Agreement by depth on ``count`` held-out clips, at all codes alike, as the card samples.

    Drafts are the clip's own codes: what a path of a tree is fed where it is accepted.
    """
    target = from_transformers(models.model)
    g = torch.Generator().manual_seed(seed)
    clips = sample_clips(count, FRAMES, g)
    codes = models.encode(clips.frames)
    both = [
        show(target, models.sequence(models.prompts(prompts), codes, clips.actions))
        for prompts in (clips.prompts, [""] * count)
    ]
    total = both[0].ids.shape[1]
    # a code at the root and at each depth, of one frame
    follows = both[0].ids < models.codes
    whole = torch.stack([follows[:, d : total - depth - 1 + d] for d in range(1, depth + 2)]).all(0)
    whole[:, 0] = False
    roots = torch.multinomial(whole.float(), 2 * ROOTS, generator=g)
    row = torch.arange(count)[:, None]
    turned = target.angles(total)
    made = [unroll(drafter, shown, turned, roots, depth) for shown in both]
    grades, length, chain = [], 0.0, torch.ones(roots.shape)
    for d in range(depth + 1):
        wanted = [shown.features[row, roots + d] for shown in both]
        drafted = [parts[0][row, roots - 1] if d == 0 else parts[d] for parts in made]
        given, own = (
            ((u + guidance * (c - u)) / temperature)[..., : models.codes].softmax(-1)
            for c, u in ([target.logits(part) for part in parts] for parts in (wanted, drafted))
        )
        likeliest = given.argmax(-1, keepdim=True)
        accepted = torch.minimum(given, own).sum(-1)
        chain = chain * accepted
        length += float(chain.mean())
        best = own.topk(4).indices == likeliest
        grades.append(
            Grade(
                d, float(best[..., 0].float().mean()), float(best.any(-1).float().mean()),
                float(accepted.mean()), length,
            )
        )  # fmt: skip
    return grades


def save(drafter: EagleDrafter, path: Path) -> None:
    """Write the drafter in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: part.half().contiguous() for name, part in drafter.state_dict().items()}
    save_file(tensors, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and write ``OUT/drafter`` and its logs."""
    parser = argparse.ArgumentParser(prog="python -m sdvg.train.drafter", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the drafter, its logs")
    parser.add_argument("--base", type=Path, help="folder of the models (default: the shipped)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --runs")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    models = load(options.base)
    drafter = train(models, options.runs, steps=options.steps, resume=options.resume)
    save(drafter, options.out / DRAFTER)
    log = options.out / "training"
    log.mkdir(exist_ok=True)
    shutil.copy(options.runs / "tokens-drafter.csv", log)
    grades = grade(models, drafter, count=HELD_OUT)
    with (log / "tokens-drafter-grade.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Grade._fields)
        writer.writerows([round(value, 4) for value in row] for row in grades)


if __name__ == "__main__":
    main()
