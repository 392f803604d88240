"""The one training loop of every stage: seeded by step, resumable to the bit, logged as CSV."""

from __future__ import annotations

import copy
import csv
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024): all singular values of an update are near one.

    Convolutions count as matrices ``[out, in * taps]``. Scaled so that one rate serves AdamW's
    parameters too (Liu et al. 2025, arXiv 2502.16982). On these small models one step is worth
    several of AdamW's.
    """

    def __init__(self, params: list[dict[str, object]], momentum: float = 0.95) -> None:
        super().__init__(params, {"momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Change all parameters by one update from their gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = 0.2 * max(update.shape) ** 0.5
                p.sub_(_orthogonal(update).view_as(p), alpha=group["lr"] * scale)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz steps in bfloat16."""
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float()


def _optimizers(module: nn.Module, lr: float | Mapping[str, float]) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    parts = lr.items() if isinstance(lr, Mapping) else (("", lr),)
    for part, rate in parts:
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, p in module.get_submodule(part).named_parameters():
            # embeddings and the small ends of a network keep AdamW
            hidden = (
                p.ndim >= 2
                and min(p.shape[0], p[0].numel()) >= 12
                and "shared" not in name
                and "bias" not in name
            )
            # a row of these belongs to one token
            token = any(part in name for part in ("table", "embed_tokens", "lm_head"))
            groups[hidden and not token].append(p)
        for kind, found in zip((rest, matrices), groups, strict=True):
            if found:
                kind.append({"params": found, "lr": rate, "rate": rate})
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0))
    if matrices:
        made.append(Muon(matrices))
    return made


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[torch.Generator, int], dict[str, torch.Tensor]],
    *,
    steps: int,
    lr: float | Mapping[str, float],
    runs: Path,
    resume: bool = False,
    seed: int = 0,
    warmup: int = 50,
    ema: float | None = 0.995,
    save_every: int = 100,
    accelerator: Accelerator | None = None,
) -> nn.Module:
    """The trained module (its moving average when ``ema`` is a decay), in eval mode.

    ``loss(generator, step)`` returns named scalars, ``"loss"`` the one minimised; step ``i`` always
    gets a generator seeded by ``(seed, i)``, so a resumed run equals an unbroken one. Writes
    ``runs/<name>.pt`` (checkpoint, every ``save_every`` steps, written aside and renamed) and
    ``runs/<name>.csv`` (step, seconds, lr, losses). ``lr`` may name a rate for each child; rates
    warm up, stay, and fall linearly over the last 40 %. With an ``accelerator`` of several
    processes each draws batches of its own, gradients are their mean, and the first process writes.
    """
    runs.mkdir(parents=True, exist_ok=True)
    path, log = runs / f"{name}.pt", runs / f"{name}.csv"
    average = copy.deepcopy(module) if ema is not None else module
    optimizers = _optimizers(module, lr)
    first, spent = 0, 0.0
    rows: list[dict[str, float]] = []
    if resume and path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent, rows = state["step"], state["seconds"], state["rows"]
    started = time.perf_counter() - spent
    sums: dict[str, float] = {}
    module.train()
    # other numbers in each process; of a seed the generator takes the lowest 32 bits alone
    rank = 0 if accelerator is None else accelerator.process_index
    stream = seed * 1_000_003 + rank * 715_827_883
    bar = tqdm(
        range(first, steps), desc=name, initial=first, total=steps, mininterval=5, disable=rank > 0
    )
    for step in bar:
        scale = min((step + 1) / warmup, (steps - step) / (0.4 * steps), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * scale
        g = torch.Generator().manual_seed(stream + step)
        # dropout and the like draw from the default generator
        torch.manual_seed(stream + step)
        losses = loss(g, step)
        losses["loss"].backward()
        if accelerator is not None and accelerator.num_processes > 1:
            for p in module.parameters():
                if p.grad is not None:
                    p.grad = accelerator.reduce(p.grad, reduction="mean")
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"{name}: the gradient became {norm.item()} at step {step}; lower the rate"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            decay = min(ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(average.parameters()), list(module.parameters()), 1 - decay
                )
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        if (step + 1) % 20 == 0:
            row = {k: round(v / 20, 6) for k, v in sums.items()}
            rows.append(
                {
                    "step": step + 1,
                    "seconds": round(time.perf_counter() - started, 1),
                    "lr": scale * (max(lr.values()) if isinstance(lr, Mapping) else lr),
                    **row,
                }
            )
            bar.set_postfix({k: f"{v:.4g}" for k, v in row.items()})
            sums = {}
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            state = {
                "module": module.state_dict(),
                "average": average.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
                "seconds": time.perf_counter() - started,
                "rows": rows,
            }
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            if rows:
                with log.open("w", newline="") as f:
                    writer = csv.DictWriter(f, fieldnames=list(rows[-1]))
                    writer.writeheader()
                    writer.writerows(rows)
    return average.eval()
