"""A reward per frame for moving digits: is the digit that the prompt names there, and legible?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sdvg.models.checkpoints import read_json, read_tensors, require_same
from sdvg.models.embedded.classifier import DigitClassifier
from sdvg.models.embedded.prompts import parse_prompt


class DigitsReward(nn.Module):
    """A `Scorer` (see `sdvg.types`) for the embedded models.

    ``reward(frames [B, N, 3, H, W] in [0, 1], prompts) -> [B, N]`` float32. The net sees the
    surroundings of each frame's centre of brightness and gives a probability to each digit and to
    "spoilt" (noise, blur, ghosts, parts missing, two digits in one). The reward is the
    log-probability of the digit that the prompt names, of the likeliest one if it names none, no
    lower than -8, shifted and scaled to mean 0 and deviation 1 over a drafter's frames. Frames of
    another size are resized to 32 x 32.
    """

    def __init__(self, width: int = 14, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.width, self.mean, self.std = width, mean, std
        self.net = DigitClassifier(width)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward of each frame; ValueError for shapes that do not fit each other."""
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(
                f"digits_reward: frames must be [B, N, 3, H, W], got {tuple(frames.shape)}"
            )
        if len(prompts) != len(frames):
            raise ValueError(
                f"digits_reward: prompts must be one for each of {len(frames)} sequences, "
                f"got {len(prompts)}"
            )
        weight = self.net.head.weight
        grey = frames.to(weight.device, weight.dtype).mean(2)
        if grey.shape[-2:] != (32, 32):
            grey = F.interpolate(grey, (32, 32), mode="bilinear", antialias=True)
        scores = (
            self.net(grey.flatten(0, 1))
            .log_softmax(-1)[:, :10]
            .clamp(-8)
            .unflatten(0, grey.shape[:2])
        )
        asked = [parse_prompt(prompt).digit for prompt in prompts]
        rows = [
            row.amax(-1) if digit is None else row[:, digit]
            for row, digit in zip(scores, asked, strict=True)
        ]
        return (torch.stack(rows) - self.mean) / self.std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (fp16)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"width": self.width, "mean": self.mean, "std": self.std}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DigitsReward:
        """Read what `save_pretrained` wrote, as float32; ValueError where it is something else."""
        op, folder = "digits_reward", Path(folder)
        config, path = read_json(folder / "config.json", op), folder / "model.safetensors"
        if set(config) != {"width", "mean", "std"} or not isinstance(config["width"], int):
            raise ValueError(
                f"{op}: {folder / 'config.json'} must hold width, mean and std, got {config}"
            )
        reward = cls(**config)
        weights = read_tensors(path, op)
        sizes = (
            {n: list(w.shape) for n, w in each.items()} for each in (reward.state_dict(), weights)
        )
        require_same(path, "the reward", *sizes, op)
        reward.load_state_dict({name: value.float() for name, value in weights.items()})
        return reward.eval().requires_grad_(False)
