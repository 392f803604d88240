"""Fine-tune the embedded token model for diagonal decoding: ``python -m sdvg.train.diagonal_tune``.

Diagonal decoding (arXiv 2503.14070) decodes the token of frame f, row r, column c in pass
``f S + r k + c`` (``S = (h - 1) k + w`` spatial, ``h k`` spatio-temporal), so a token may lack what
raster order would have shown it. The model is trained on what it will see: raster order, and of
that what is decoded before the query's output; and on the stand-ins that start rows. What is learnt
is a low-rank update of the linear layers.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils import parametrize

from sdvg.models.embedded.tokens import (
    FRAMES,
    HEIGHT,
    PROMPT,
    UPDATE,
    WIDTH,
    VideoTokens,
    load,
)
from sdvg.train.loop import fit
from sdvg.train.tokens import dark_code, forward, neighbours, sample_clips, spoil, thin, weigh
from sdvg_kernels import diagonal_schedule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MODES = ("spatial", "spatiotemporal")
# what is fed for a row's last token while that is not there yet
ROW_START = "newest"
# steps and rank of the shipped run
STEPS, RANK = 450, 64
# until this share of the steps: clips of a batch, frames of a clip, slots of a clip; all slots, as
# thinned clips teach the model a context that decoding never shows
PHASES = ((0.6, 14, 2, 4096), (1.0, 4, FRAMES, 4096))


class Entries(NamedTuple):
    """A clip as diagonal decoding feeds it: every token but the last once, and the stand-ins.

    All are ``[E]``: what is fed, where it stands, when it is decoded, what is predicted from it.
    """

    source: Tensor  # int64, the slot whose token is fed
    position: Tensor  # int64, the slot that it stands in
    step: Tensor  # int64, the pass that decodes the token of that slot; -1 for text and actions
    target: Tensor  # int64, the slot that is predicted; -1 for none
    target_step: Tensor  # int64, the pass that feeds the entry, and predicts from it
    stand_in: Tensor  # bool, seen by itself alone

    def take(self, chosen: Tensor) -> Entries:
        """The entries at ``chosen [N, L]``, each field ``[N, L]``."""
        return Entries(*(field[chosen] for field in self))


def entries(
    models: VideoTokens, frames: int, k: int, mode: str, row_start: str = ROW_START
) -> Entries:
    """The entries of a clip of ``frames`` frames, by `sdvg_kernels.diagonal_schedule`.

    Raises ValueError as that does.
    """
    plan = diagonal_schedule(frames, HEIGHT, WIDTH, k, mode, row_start, prefix=PROMPT, extra=1)
    fed = plan.slots >= 0
    # the prompt but its last token, which pass 0 feeds
    prompt = torch.arange(PROMPT - 1)
    nothing = torch.full_like(prompt, -1)
    position, source, target, target_step = (
        torch.cat((before, table[fed].long()))
        for before, table in (
            (prompt, plan.slots), (prompt, plan.sources), (nothing, plan.outputs),
            (torch.zeros_like(prompt), plan.steps),
        )
    )  # fmt: skip
    step = torch.full((plan.size,), -1)
    step[target[target >= 0]] = target_step[target >= 0]
    return Entries(source, position, step[position], target, target_step, source != position)


def mask_mod(fed: Entries) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's ``mask_mod`` over entries ``[N, L]``: raster order and decoding order.

    ``M[q, k] = position[k] <= position[q] and step[k] < target_step[q]``, and of stand-ins nobody
    sees any but its own.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = fed.position[batch, key] <= fed.position[batch, query]
        decoded = fed.step[batch, key] < fed.target_step[batch, query]
        return (earlier & decoded & ~fed.stand_in[batch, key]) | (query == key)

    return visible


def dense_mask(fed: Entries) -> Tensor:
    """`mask_mod` as bool ``[N, 1, L, L]``, for machines where FlexAttention has no backward."""
    count, length = fed.position.shape
    batch, line = torch.arange(count)[:, None, None], torch.arange(length)
    made = mask_mod(fed)(batch, torch.zeros(()), line[None, :, None], line[None, None, :])
    return made[:, None]


class LowRank(nn.Module):
    """``W + up @ down``, ``[out, in]``, at first ``W``."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, width = weight.shape
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight."""
        return torch.addmm(weight, self.up, self.down)


def adapt(model: LlamaForCausalLM, rank: int) -> nn.ModuleDict:
    """Put an update on each linear layer of the blocks; return them by the layers' names."""
    made = nn.ModuleDict()
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            update = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", update)
            # a dot would end the name of a module
            made[name.replace(".", "/")] = update
    return made


def save(updates: nn.ModuleDict, path: Path) -> None:
    """Write the updates in float16, by the names that peft gives them."""
    tensors = {}
    for name, update in updates.items():
        stem = "model.layers." + name.replace("/", ".")
        tensors[f"{stem}.lora_A.weight"] = update.down.detach().half().contiguous()
        tensors[f"{stem}.lora_B.weight"] = update.up.detach().half().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def tune(
    models: VideoTokens,
    runs: Path,
    *,
    ks: Sequence[int] = (1, 1, 2),
    modes: Sequence[str] = MODES,
    rank: int = RANK,
    steps: int = STEPS,
    lr: float = 1e-3,
    resume: bool = False,
    seed: int = 21,
) -> nn.ModuleDict:
    """The trained updates; each step draws one of ``ks`` and one of ``modes``."""
    torch.manual_seed(seed)
    model = models.model.requires_grad_(False)
    device = model.device
    updates = adapt(model, rank).to(device)
    dark, near = dark_code(models), neighbours(models.vq)

    def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
        count, frames, length = next(shape for until, *shape in PHASES if step < until * steps)
        k = ks[int(torch.randint(len(ks), (), generator=g))]
        mode = modes[int(torch.randint(len(modes), (), generator=g))]
        clips = sample_clips(count, frames, g)
        codes = models.encode(clips.frames.to(device)).cpu()
        ids = models.sequence(models.prompts(clips.prompts), codes, clips.actions)
        walk = entries(models, frames, k, mode)
        following = torch.where(walk.target < 0, models.codes, ids[:, walk.target])
        chosen = thin(ids[:, walk.source], following, dark, models.codes, length, g)
        fed = walk.take(chosen.slots)
        spoilt = spoil(ids, dark, near, g).gather(1, fed.source)
        if device.type == "cpu":
            mask = dense_mask(fed)
        else:
            on_gpu = Entries(*(field.to(device) for field in fed))
            size = spoilt.shape[1]
            mask = create_block_mask(mask_mod(on_gpu), count, None, size, size, device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, spoilt.to(device), fed.position.to(device), mask=mask)
        return weigh(logits.float().cpu(), chosen, dark, fed.target < models.slot(1) - 1)

    return fit(
        "diagonal-tune", updates, loss, steps=steps, lr=lr, runs=runs, resume=resume, seed=seed,
        ema=0.98,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, tune, and write ``OUT/diagonal/update.safetensors``."""
    parser = argparse.ArgumentParser(prog="python -m sdvg.train.diagonal_tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the update and its log")
    parser.add_argument("--base", type=Path, help="folder of the models (default: the shipped)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 1, 2], dest="ks",
                        help="drawn from, once a step")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --runs")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    updates = tune(
        load(options.base, device=options.device), options.runs, ks=options.ks,
        modes=options.modes, rank=options.rank, steps=options.steps, resume=options.resume,
    )  # fmt: skip
    save(updates, options.out / UPDATE)
    log = options.out / "training"
    log.mkdir(exist_ok=True)
    shutil.copy(options.runs / "diagonal-tune.csv", log)


if __name__ == "__main__":
    main()
