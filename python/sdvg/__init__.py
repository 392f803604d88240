"""Speculative generation of video, block by block: draft, score, route, repair."""

from sdvg.commit import Recompute
from sdvg.engine import SDVG, Generation
from sdvg.router import Always, Never, Random, Reward, Stride
from sdvg.schedule import Schedule, preset
from sdvg.types import Block, Draft, Stats, Verdict

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
    "preset",
]
