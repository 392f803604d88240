"""Speculative generation of video, block by block: draft, score, route, repair.

`sdvg.SDVGPipeline` is loaded on first use: it is the one name here that needs diffusers, so
`from sdvg import *` leaves it out.
"""

from typing import TYPE_CHECKING

from sdvg.commit import Recompute
from sdvg.engine import SDVG, Generation
from sdvg.models.accelerate import accelerate
from sdvg.router import Always, Never, Random, Reward, Stride
from sdvg.schedule import Schedule, preset
from sdvg.types import Block, Draft, Stats, Verdict

if TYPE_CHECKING:
    from sdvg.pipeline import SDVGPipeline as SDVGPipeline

__all__ = [
    "SDVG",
    "Always",
    "Block",
    "Draft",
    "Generation",
    "Never",
    "Random",
    "Recompute",
    "Reward",
    "Schedule",
    "Stats",
    "Stride",
    "Verdict",
    "accelerate",
    "preset",
]


def __getattr__(name: str) -> object:
    if name == "SDVGPipeline":
        try:
            from sdvg.pipeline import SDVGPipeline
        except ImportError as error:
            raise ImportError(
                "sdvg: SDVGPipeline needs diffusers and transformers: "
                f"pip install 'sdvg[diffusers]' ({error})"
            ) from error
        return SDVGPipeline
    raise AttributeError(f"module 'sdvg' has no attribute {name!r}")
