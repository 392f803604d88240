"""Make the embedded token model: ``python -m sdvg.train.tokens --out DIR``.

Stage ``tokenizer`` trains diffusers' `VQModel` on frames of moving digits, stage ``model`` a small
Llama on clips of its codes. A finished stage lies in ``--out``; ``--resume`` goes on from the
checkpoints in ``--runs``.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS, SPEEDS
from sdvg.models.embedded.tokens import (
    ACTIONS,
    CELL,
    FRAMES,
    HEIGHT,
    PROMPT,
    STRIDE,
    WIDTH,
    VideoTokens,
    load_text,
    load_vq,
)
from sdvg.train.data import (
    HIGH,
    LOW,
    Motions,
    Scans,
    load_scans,
    render,
    sample_motions,
    sample_request,
    write_prompt,
)
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from diffusers import VQModel
    from transformers import LlamaForCausalLM

CODES = 128
# steps of the shipped run
STEPS = {"tokenizer": 1300, "model": 2000}
VQ = {
    "in_channels": 1, "out_channels": 1, "sample_size": 32, "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 8, "vq_embed_dim": 8, "num_vq_embeddings": CODES, "norm_num_groups": 4,
    "mid_block_add_attention": False, "lookup_from_codebook": True,
}  # fmt: skip
LLAMA = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    # the longest wave of 1000 spans two clips of 8 frames
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# until this share of the steps: clips of a batch, frames of a clip, slots of a clip
PHASES = (
    (0.15, 16, 3, 256),
    (0.8, 8, FRAMES, 600),
    # all slots from here on; most of what is left to learn lies in frame 0
    (0.95, 14, 2, 4096),
    (1.0, 4, FRAMES, 4096),
)


class Quantised(nn.Module):
    """The tokenizer, and how often each code was used of late, the dark counted against it."""

    def __init__(self) -> None:
        from diffusers import VQModel

        super().__init__()
        self.vq = VQModel(**VQ)
        self.register_buffer("used", torch.zeros(CODES))


def train_tokenizer(runs: Path, *, steps: int, resume: bool, seed: int = 11) -> VQModel:
    """The trained tokenizer: first without its codebook, which then starts as cluster centres.

    A code that for 50 steps stands for the dark more often than for strokes moves to where a stroke
    is. What is dark is pulled towards code 0, so that it has one code alone, whatever else a frame
    shows.
    """
    torch.manual_seed(seed)
    scans = load_scans()
    module = Quantised()
    vq, codebook = module.vq, module.vq.quantize.embedding.weight
    start, last = steps // 4, 9 * steps // 10

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        if step == start:
            frames = _frames(scans, 256, g)
            with torch.no_grad():
                codebook.copy_(_centres(vq.encode(frames).latents, _strokes(frames), g))
        frames = _frames(scans, 48, g)
        latents = vq.encode(frames).latents
        strokes = _strokes(frames)
        away = (latents.permute(0, 2, 3, 1)[~strokes] - codebook[0].detach()).square().mean()
        quantised, commit = latents, torch.zeros(())
        if step >= start:
            quantised, commit, (_, _, codes) = vq.quantize(latents)
            module.used += torch.bincount(codes, strokes.flatten() * 2.0 - 1, CODES)
            if start < step < last and step % 50 == 0:
                _revive(codebook, module.used, latents, strokes, g)
                module.used.zero_()
        out = vq.decoder(vq.post_quant_conv(quantised))
        error = out - frames
        # most of a frame is dark: the strokes weigh more
        weight = 1 + 3 * (frames > -0.9).float()
        mse = (weight * error.square()).mean()
        total = mse + 0.2 * (weight * error.abs()).mean() + commit + 4 * away
        used = (module.used > 0).float().mean()
        return {"loss": total, "mse": mse, "commit": commit, "away": away, "used": used}

    fit(
        "tokens-tokenizer", module, loss, steps=steps, lr=3e-3, runs=runs, resume=resume,
        seed=seed, ema=None,
    )  # fmt: skip
    return vq.eval()


def _frames(scans: Scans, n: int, g: torch.Generator) -> Tensor:
    """Frames ``[n, 1, 32, 32]`` in [-1, 1], a digit anywhere within the walls."""
    chosen = torch.randint(len(scans.images), (n,), generator=g)
    centres = LOW + (HIGH - LOW) * torch.rand(n, 1, 2, generator=g)
    return render(scans.images[chosen], centres) * 2 - 1


def _strokes(frames: Tensor) -> Tensor:
    """Which cells ``[n, 16, 16]`` are not dark."""
    return F.max_pool2d(frames, CELL)[:, 0] > -0.96


def _centres(latents: Tensor, strokes: Tensor, g: torch.Generator) -> Tensor:
    """Codebook ``[CODES, dim]``: the mean of the dark, and k-means centres of what is not."""
    rows = latents.permute(0, 2, 3, 1)
    points = rows[strokes]
    centres = points[torch.randperm(len(points), generator=g)[: CODES - 1]].clone()
    for _ in range(20):
        nearest = torch.cdist(points, centres).argmin(1)
        count = torch.bincount(nearest, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(count > 0, sums / count.clamp(1), centres)
    return torch.cat((rows[~strokes].mean(0, keepdim=True), centres))


@torch.no_grad()
def _revive(
    codebook: Tensor, used: Tensor, latents: Tensor, strokes: Tensor, g: torch.Generator
) -> None:
    points = latents.permute(0, 2, 3, 1)[strokes]
    dead = (used[1:] <= 0).nonzero()[:, 0] + 1
    codebook[dead] = points[torch.randperm(len(points), generator=g)[: len(dead)]]


def build(vocabulary: int) -> LlamaForCausalLM:
    """A freshly initialised model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **LLAMA))


class Clips(NamedTuple):
    """Clips with what they show: pixels, indices into `ACTIONS`, prompts."""

    frames: Tensor  # [N, F, 32, 32] in [0, 1]
    actions: Tensor  # [N, F - 1]
    prompts: list[str]


def sample_clips(n: int, frames: int, g: torch.Generator) -> Clips:
    """``n`` random clips: half go on as the prompt says, the others turn where an action says so.

    One prompt in ten is empty, for guidance.
    """
    scans = load_scans()
    chosen = torch.randint(len(scans.images), (n,), generator=g)
    motions = sample_motions(n, g)
    rate = torch.tensor([0.0, 0.25, 1.0])[
        torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True, generator=g)
    ]
    asked = torch.rand(n, frames - 1, generator=g) < rate[:, None]
    actions = torch.randint(1, len(ACTIONS), asked.shape, generator=g) * asked
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=g)))
    shown = zip(scans.labels[chosen].tolist(), motions.direction.tolist(), motions.speed.tolist(),
                strict=True)  # fmt: skip
    prompts = [write_prompt(sample_request(rng, *row), rng) for row in shown]
    dropped = (torch.rand(n, generator=g) < 0.1).tolist()
    prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
    return Clips(render(scans.images[chosen], travel(motions, actions)), actions, prompts)


def travel(motions: Motions, actions: Tensor) -> Tensor:
    """Centres ``[N, F, 2]`` in pixels, `STRIDE` pixel frames apart, for ``actions [N, F - 1]``.

    Without an action equal to every fourth of `Motions.centres`.
    """
    ways, paces = torch.tensor(list(DIRECTIONS.values())), torch.tensor(list(SPEEDS.values()))
    # [direction, speed, 2] -> the rows of ACTIONS after the first
    table = STRIDE * (ways[:, None] * paces[:, None]).flatten(0, 1)
    velocity = table[motions.direction * len(SPEEDS) + motions.speed]
    centres = [motions.centres(1)[:, 0]]
    for action in actions.unbind(1):
        velocity = torch.where(action[:, None] > 0, table[action - 1], velocity)
        place = centres[-1] + velocity
        velocity = torch.where((place < LOW) | (place > HIGH), -velocity, velocity)
        centres.append(place.clamp(LOW, HIGH) * 2 - place)
    return torch.stack(centres, 1)


class Memory(NamedTuple):
    """Keys and values of all slots up to now, each ``[layers, B, kv_heads, slots, 64]``."""

    keys: Tensor
    values: Tensor


def forward(
    model: LlamaForCausalLM,
    ids: Tensor,
    positions: Tensor,
    memory: Memory | None = None,
    start: int = 0,
    mask: Tensor | BlockMask | None = None,
) -> Tensor:
    """Logits ``[B, L, vocabulary]``: the stock model's arithmetic, on a CPU in half its time.

    Args:
        ids: ``[B, L]``; each attends to those before it, whichever slots they come from.
        positions: their slots ``[B, L]`` or ``[L]``.
        memory: written at ``start`` to ``start + L``; with ``start`` above 0 ``L`` must be 1.
        mask: what each attends to instead: bool ``[B, 1, L, L]``, or FlexAttention's.
    """
    x = model.model.embed_tokens(ids)
    inner = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    angles = positions[..., None].float() * model.model.rotary_emb.inv_freq
    cos, sin = (part.repeat_interleave(1, -1) for part in (angles.cos(), angles.sin()))
    cos, sin = (torch.cat((part, part), -1).unsqueeze(-3).to(inner) for part in (cos, sin))
    for i, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        n = _rms(layer.input_layernorm, x).to(inner)
        query, key, value = (
            project(n).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = _turn(query, cos, sin), _turn(key, cos, sin)
        if memory is not None:
            end = start + key.shape[2]
            memory.keys[i, :, :, start:end], memory.values[i, :, :, start:end] = key, value
            key, value = memory.keys[i, :, :, :end], memory.values[i, :, :, :end]
        out = _attend(query, key, value, mask)
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))
        n = _rms(layer.post_attention_layernorm, x).to(inner)
        mlp = layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(n)) * mlp.up_proj(n))
    return model.lm_head(_rms(model.model.norm, x))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | None = None
) -> Tensor:
    """Attention ``[B, H, L, 64]``: causal, of all slots or of the last alone, or as masked."""
    if isinstance(mask, BlockMask):
        return _flex()(query, key, value, block_mask=mask, enable_gqa=True)
    if query.shape[2] == 1:
        # heads that share keys stand in as queries: nothing of the memory is copied
        grouped = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        return F.scaled_dot_product_attention(grouped, key, value).flatten(1, 2).unsqueeze(2)
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, 1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _rms(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Thinned(NamedTuple):
    """Some slots of each sequence, what comes after them, and how much each counts."""

    slots: Tensor  # [N, L], rising
    targets: Tensor  # [N, L]
    weight: Tensor  # [N, L] float32; 0 where no code follows


def thin(
    ids: Tensor, following: Tensor, dark: int, codes: int, length: int, g: torch.Generator
) -> Thinned:
    """``length`` slots of each of ``ids [N, S]``: all near a stroke, and some of the dark.

    Nine tokens in ten are dark and say little. Those kept count for those left out, so that the
    mean loss is that of whole sequences. ``following [N, S]`` is what each slot predicts, ``dark``
    the code of an empty cell; ids below ``codes`` are codes.
    """
    n, total = ids.shape
    is_dark = (ids == dark) & (following == dark)
    # a slot's own fate depends on nothing after what it predicts: slots kept give nothing away
    rank = (~is_dark).float() + 0.999 * torch.rand(n, total, generator=g)
    slots = rank.topk(min(length, total), 1).indices.sort(1).values
    kept = is_dark.gather(1, slots)
    share = kept.sum(1, keepdim=True) / is_dark.sum(1, keepdim=True)
    targets = following.gather(1, slots)
    weight = torch.where(kept, 1 / share.clamp(1e-6), 1.0) * (targets < codes)
    return Thinned(slots, targets, weight)


def train_model(
    vq: VQModel, runs: Path, *, steps: int, resume: bool, seed: int = 12
) -> LlamaForCausalLM:
    """The trained model: clips thinned out first, short then long; then all slots (`PHASES`).

    A few codes of the context are those of a near miss, so that the model goes on from its own.
    """
    torch.manual_seed(seed)
    text = load_text()
    model = build(vq.config.num_vq_embeddings + len(text) + len(ACTIONS))
    models = VideoTokens(vq, model, text)
    dark = dark_code(models, seed)
    near = neighbours(vq)

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        count, frames, length = next(shape for until, *shape in PHASES if step < until * steps)
        clips = sample_clips(count, frames, g)
        codes = models.encode(clips.frames)
        ids = models.sequence(models.prompts(clips.prompts), codes, clips.actions)
        following = F.pad(ids[:, 1:], (0, 1), value=models.codes)
        chosen = thin(ids, following, dark, models.codes, length, g)
        spoilt = spoil(ids, dark, near, g).gather(1, chosen.slots)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(model, spoilt, chosen.slots).float()
        # of frame 0: from the prompt's last slot on
        return weigh(logits, chosen, dark, chosen.slots < models.slot(1) - 2)

    return fit(
        "tokens-model", model, loss, steps=steps, lr=2e-3, runs=runs, resume=resume, seed=seed,
        ema=0.99,
    )  # fmt: skip


def weigh(logits: Tensor, chosen: Thinned, dark: int, is_first: Tensor) -> dict[str, Tensor]:
    """The loss per stroke, its two parts, and how often the likeliest code is right.

    Frame 0 (``is_first [N, L]``), which has everything to invent, weighs three times its share.
    """
    _, targets, weight = chosen
    error = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    error = weight * error.view_as(weight)
    stroke = (weight > 0) & (targets != dark)
    parts = {
        "first": error[is_first].sum() / stroke[is_first].sum(),
        "later": error[~is_first].sum() / stroke[~is_first].sum(),
    }
    hits = (logits.argmax(-1) == targets)[stroke & ~is_first].float().mean()
    total = error.sum() + 2 * error[is_first].sum()
    return {"loss": total / stroke.sum(), **parts, "accuracy": hits}


def dark_code(models: VideoTokens, seed: int = 0) -> int:
    """The code of an empty cell: training gave the dark one alone."""
    shown = _frames(load_scans(), 64, torch.Generator().manual_seed(seed))
    return int(models.encode(shown[:, 0] / 2 + 0.5).flatten().mode().values)


@torch.no_grad()
def neighbours(vq: VQModel, count: int = 6) -> Tensor:
    """The nearest other codes of each code, ``[codes, count]``."""
    book = vq.quantize.embedding.weight
    return torch.cdist(book, book).topk(count + 1, largest=False).indices[:, 1:]


def spoil(ids: Tensor, dark: int, near: Tensor, g: torch.Generator) -> Tensor:
    """``ids [N, S]`` with up to a tenth of the strokes' codes replaced by a neighbour."""
    rate = 0.1 * torch.rand(len(ids), 1, generator=g)
    hit = (torch.rand(ids.shape, generator=g) < rate) & (ids < len(near)) & (ids != dark)
    pick = torch.randint(near.shape[1], ids.shape, generator=g)
    return torch.where(hit, near[ids.clamp(max=len(near) - 1), pick], ids)


@torch.no_grad()
def raster(
    models: VideoTokens,
    prompts: Sequence[str],
    *,
    frames: int = FRAMES,
    actions: Tensor | None = None,
    temperature: float = 1.0,
    guidance: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Codes ``[B, frames, 16, 16]``, one a pass: the plain loop that all faster ones are held to.

    Args:
        actions: ``[B, frames - 1]`` indices into `ACTIONS`; none by default.
        temperature: 0 takes the likeliest code.
        guidance: logits are ``u + guidance * (c - u)``, ``u`` those of the empty prompt.
    """
    model, n = models.model, len(prompts)
    g = torch.Generator().manual_seed(seed)
    asked = torch.zeros(n, frames - 1, dtype=torch.long) if actions is None else actions
    copies = 2 if guidance != 1.0 else 1
    ids = models.prompts([*prompts, *([""] * n if copies == 2 else [])])
    config = model.config
    shape = (config.num_hidden_layers, copies * n, config.num_key_value_heads)
    shape = (*shape, models.slot(frames), config.head_dim)
    memory = Memory(torch.empty(shape, dtype=model.dtype), torch.empty(shape, dtype=model.dtype))
    logits = forward(model, ids, torch.arange(PROMPT), memory)[:, -1]
    made = []
    for slot in tqdm(range(PROMPT, models.slot(frames) - 1), desc="raster", mininterval=5):
        frame, place = divmod(slot - PROMPT, HEIGHT * WIDTH + 1)
        if place == HEIGHT * WIDTH:
            token = models.actions(asked[:, frame])
        else:
            scores = logits[:, : models.codes].float()
            if copies == 2:
                with_prompt, without = scores.chunk(2)
                scores = without + guidance * (with_prompt - without)
            if temperature == 0:
                token = scores.argmax(-1)
            else:
                chances = (scores / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=g)[:, 0]
            made.append(token)
        ids = token.repeat(copies)[:, None]
        logits = forward(model, ids, torch.tensor([slot]), memory, slot)[:, -1]
    return torch.stack(made, 1).view(n, frames, HEIGHT, WIDTH)


def prompts_to_grade(count: int = 40) -> list[str]:
    """Prompts that name digit, direction and speed, all digits equally often."""
    motions = sample_motions(count, torch.Generator().manual_seed(13))
    ways, paces = list(DIRECTIONS), list(SPEEDS)
    return [
        f"a {DIGITS[i % 10]} moving {ways[way]}, {paces[pace]}"
        for i, (way, pace) in enumerate(
            zip(motions.direction.tolist(), motions.speed.tolist(), strict=True)
        )
    ]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m sdvg.train.tokens", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished models")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs")
    parser.add_argument("--stage", choices=["all", *STEPS], default="all")
    parser.add_argument("--steps", type=int, help="instead of the shipped run's")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --runs"
    )
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for stage in STEPS if options.stage == "all" else (options.stage,):
        common = {"steps": options.steps or STEPS[stage], "resume": options.resume}
        if stage == "tokenizer":
            vq = train_tokenizer(options.runs, **common)
            vq.half().save_pretrained(options.out / "vq")
        else:
            model = train_model(load_vq(options.out), options.runs, **common)
            model.half().save_pretrained(options.out / "model")
        log = options.out / "training"
        log.mkdir(exist_ok=True)
        for path in options.runs.glob(f"tokens-{stage}.csv"):
            shutil.copy(path, log / path.name)


if __name__ == "__main__":
    main()
