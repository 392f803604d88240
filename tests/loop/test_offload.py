"""Models whose weights are away but for a forward, as accelerate's offloading has them on a GPU.

A test without a GPU offloads from the CPU to the CPU, where nothing ever is away: here it is.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdvg import SDVG, Random
from tests.tiny import BrightnessScorer, TinyPair, tiny_pair

PROMPTS = ["a seven moving left", "a two moving up"]


class Hook:
    """What accelerate puts on a module: the one before it leaves when this one is called."""

    execution_device = torch.device("cpu")

    def __init__(self, module: nn.Module, before: Hook | None) -> None:
        self.module, self.before, self.stock = module, before, module.forward
        self.held = {name: weight.data for name, weight in module.named_parameters()}
        module._hf_hook, module.forward = self, self.forward
        self.offload()

    def forward(self, *arguments: object, **options: object) -> object:
        self.pre_forward(self.module)
        return self.stock(*arguments, **options)

    def pre_forward(self, module: nn.Module) -> None:
        if self.before is not None:
            self.before.offload()
        for name, weight in module.named_parameters():
            weight.data = self.held[name]

    def offload(self) -> None:
        for weight in self.module.parameters():
            weight.data = weight.data.new_empty((0,) * weight.dim())


def made(pair: TinyPair) -> Tensor:
    loop = SDVG(*pair, BrightnessScorer(), Random(0.5))
    blocks = list(loop.generate(PROMPTS, num_blocks=4, seed=11))
    assert {verdict.accepted for block in blocks[1:] for verdict in block.verdicts} == {True, False}
    return torch.cat([block.frames for block in blocks], dim=1)


@pytest.mark.parametrize("accelerated", [False, True])
def test_weights_that_are_away_between_forwards_give_the_same_video(accelerated: bool) -> None:
    """The embedding of a new timestep read the drafter's weights while the target's were here."""
    videos = []
    for offloaded in (False, True):
        pair = tiny_pair()
        for part in pair if accelerated else ():
            part.accelerate()
        modules = [pair.drafter.transformer, pair.target.transformer, pair.decoder.vae]
        before = None
        for module in modules if offloaded else ():
            before = Hook(module, before)
        videos.append(made(pair))
    assert torch.equal(*videos)
