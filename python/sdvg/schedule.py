"""Which denoising steps each block takes.

A timestep `t` in [0, 1000] stands for the noise level `sigma = t / 1000` of flow matching:
`x_t = (1 - sigma) * x_0 + sigma * noise`. A last step at timestep 0 is at the least level of the
table of 1000 that Wan's schedulers hold, as the pipelines that take it look it up there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


def warp(timesteps: Sequence[float], shift: float = 5.0) -> tuple[float, ...]:
    """Apply Wan's flow shift: `sigma -> shift * sigma / (1 + (shift - 1) * sigma)`."""
    sigmas = [timestep / 1000 for timestep in timesteps]
    return tuple(1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas)


def noise_level(timestep: float) -> float:
    """Return sigma of a denoising step."""
    return (timestep or warp((1.0,))[0]) / 1000


@dataclass(frozen=True)
class Schedule:
    """The timesteps of block 0, 1, ...; the last entry serves every later block.

    With `clean_pass=False` there is no forward at timestep 0 after a block: the next block attends
    to the K/V that the last denoising step left. A block that the model did not make itself (an
    accepted draft, given latents, what a switch of prompts writes anew) has no such step: its
    clean latents are noised as the input of that step would be, with that step's own noise, and go
    through the model at its timestep. So what it attends to is always of the kind that it was
    trained on; K/V of timestep 0 are of another. On the embedded target, blocks written so move
    the next one by a tenth of its deviation, clean ones by about all of it. Only where a model was
    trained behind clean K/V too (`--repair` of `sdvg.train.diagonal_distill`), `clean_context=True`
    has such blocks written clean: a drafter then sees what a repaired block says, not its noise.

    Raises ValueError for no block, no step, a timestep outside [0, 1000], steps that do not fall,
    or a step at 0 alone.
    """

    timesteps: tuple[tuple[float, ...], ...]
    clean_pass: bool = True
    clean_context: bool = False

    def __post_init__(self) -> None:
        if not self.timesteps or not all(self.timesteps):
            raise ValueError(
                f"schedule: timesteps must name at least one step for each block, "
                f"got {self.timesteps}"
            )
        for steps in self.timesteps:
            rising = any(later >= earlier for earlier, later in itertools.pairwise(steps))
            inside = all(math.isfinite(step) and 0 <= step <= 1000 for step in steps)
            if rising or not inside or not steps[0]:
                raise ValueError(
                    f"schedule: timesteps must fall within [0, 1000] from above 0, "
                    f"got {steps} for one block"
                )

    @classmethod
    def diagonal(cls, steps: Sequence[int] = (4, 3, 2)) -> Schedule:
        """Return Diagonal Distillation's schedule of any numbers of steps (arXiv 2603.09488).

        `steps` are those of block 0, 1, ...; the last number serves every later block. There is no
        clean pass. 2, 3 and 4 steps have the released code's timesteps (933 and 733 are not warped,
        the last one is: 100 becomes 357.14); more are spaced evenly from 1000 to 100 before Wan's
        flow shift. The paper tries others, too: 5,3 (the best quality) and 4,2 (the fastest).

        Raises ValueError for no number, one below 2 (the next block sees nothing but the last
        step's K/V, and the first step's are those of noise), or one above the 1000 that models
        are trained with.
        """
        if any(count > 1000 for count in steps):
            raise ValueError(
                f"schedule: diagonal must name at most 1000 steps for each block, got {max(steps)}"
            )
        if not steps or any(count < 2 for count in steps):
            raise ValueError(
                f"schedule: diagonal must name at least 2 steps for each block, got {list(steps)}; "
                "the K/V of a first step are those of noise"
            )
        return cls(tuple(_diagonal(count) for count in steps), clean_pass=False)

    def steps(self, block: int) -> tuple[float, ...]:
        """Return the timesteps of `block`, falling."""
        return self.timesteps[min(block, len(self.timesteps) - 1)]

    def context(self, block: int) -> float:
        """Return the timestep at which a block that the model did not make is written."""
        return 0.0 if self.clean_pass or self.clean_context else self.steps(block)[-1]


def preset(name: str) -> Schedule:
    """Return a published schedule.

    - `self_forcing`: four steps and a clean pass (Huang et al. 2025, arXiv 2506.08009; shift 5).
    - `krea`: the first four of Krea Realtime's five steps; its K/V are those of the recomputation
      before the next block (`Recompute(3)`).
    - `krea_5`: all five. The fifth, at timestep 0, sees a latent with half a percent of noise. On
      the embedded pair it moves a block's latents by 1.4% of their deviation (leaving out a real
      step: 21%), and 6.6% after five more blocks have gone on from it: next to nothing for a fifth
      of the target's time.
    - `diagonal`: 4, 3, then 2 steps and no clean pass; `diagonal:5,3,3`: any numbers of steps
      (`Schedule.diagonal`).

    Raises ValueError for another name.
    """
    presets = {
        "self_forcing": lambda: Schedule((warp((1000, 750, 500, 250)),)),
        "krea": lambda: Schedule((warp((1000, 750, 500, 250)),)),
        "krea_5": lambda: Schedule(((*warp((1000, 750, 500, 250)), 0.0),)),
        "diagonal": Schedule.diagonal,
    }
    kind, _, counts = name.partition(":")
    numbers = counts.split(",")
    if kind == "diagonal" and all(number.strip().isdecimal() for number in numbers):
        return Schedule.diagonal([int(number) for number in numbers])
    if name not in presets:
        known = ", ".join(presets)
        raise ValueError(
            f"schedule: preset must be one of {known} or diagonal:STEPS (5,3,3), got {name!r}"
        )
    return presets[name]()


def _diagonal(count: int) -> tuple[float, ...]:
    last = warp((100,))
    released = {2: (1000.0, *last), 3: (1000.0, 933.0, *last), 4: (1000.0, 933.0, 733.0, *last)}
    evenly = [1000 - 900 * step / (count - 1) for step in range(count)]
    return released.get(count) or warp(evenly)
