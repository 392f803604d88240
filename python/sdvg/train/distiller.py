"""The losses of diagonal distillation (arXiv 2603.09488): a student, its roll-outs, two scores.

What the student made is moved along the difference of two scores, the teacher's and that of a model
of the student's own videos (distribution matching; Yin et al. 2024, arXiv 2405.14867), and so are
its temporal differences (flow distribution matching).

Under diagonal forcing the last steps of all blocks are one block-causal forward: block b's keys are
made at its own last level, and the blocks after it see them as they are. So the gradient reaches
earlier blocks through their keys, which a cache of detached K/V cannot give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.models.wan import CausalWan
from sdvg.schedule import Schedule, preset
from sdvg.train.forcing import BlockForward

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class Settings:
    """What is trained; every part of the paper's method has a switch.

    Attributes:
        schedule: the student's steps. Without a clean pass the next block attends to the K/V of the
            last step.
        forcing: train behind the K/V that ``schedule`` leaves at inference. Off: behind those of a
            clean pass, whatever inference does (the ablation).
        context_noise: with ``forcing``, behind a pass at this level over the finished block noised
            again (the released code; 0.1 in the paper) and not behind the last step itself.
        flow: weight of the loss on temporal differences; 0: none.
        levels: least and greatest noise level at which scores are compared, before ``shift``:
            where the teacher was trained.
        shift: the flow shift of those levels.
        guidance: classifier-free guidance of the teacher's score; 1: none.
        last: how often the gradient goes through each block's last step; else through an earlier,
            whose blurred frames the model of the student's videos then learns, too.
        repair: how often a block is written clean all the same, as speculation writes what the
            target made in place of a drafter's rejected block (`Schedule.clean_context`).
        gap: in half of the warm-up's clips up to so many latent frames lie between the sink and the
            rest, so that the sink is known from late in a video, too.
    """

    schedule: Schedule = field(default_factory=lambda: preset("diagonal"))
    forcing: bool = True
    context_noise: float | None = None
    flow: float = 1.0
    levels: tuple[float, float] = (0.55, 0.9)
    shift: float = 1.0
    guidance: float = 1.0
    last: float = 1.0
    repair: float = 0.0
    gap: int = 0

    def __post_init__(self) -> None:
        (low, high), noise = self.levels, self.context_noise
        last = min(steps[-1] for steps in self.schedule.timesteps)
        if last == 0:
            raise ValueError(
                f"distil: schedule must end above 0, got {self.schedule.timesteps}; a step at 0 "
                "changes next to nothing, and nothing can be learnt there"
            )
        if noise is not None and (self.schedule.clean_pass or not self.forcing):
            raise ValueError(
                f"distil: context_noise must be None without diagonal forcing, got {noise}: K/V "
                "are those of a clean pass there"
            )
        rules = (
            ("flow", self.flow >= 0, "be at least 0"),
            ("guidance", self.guidance >= 0, "be at least 0"),
            ("shift", self.shift > 0, "be above 0"),
            ("levels", 0 < low < high <= 1, "rise within (0, 1]"),
            ("last", 0 <= self.last <= 1, "lie in [0, 1]"),
            ("repair", 0 <= self.repair <= 1, "lie in [0, 1]"),
            ("gap", self.gap >= 0, "be at least 0"),
            ("context_noise", noise is None or 0 < noise <= 1, "lie in (0, 1] or be None"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"distil: {name} must {rule}, got {getattr(self, name)}")


class Prompts(Protocol):
    """Where the prompts of roll-outs come from."""

    def prompts(self, count: int, g: torch.Generator) -> list[str]:
        """Return `count` prompts."""


class Clips(Prompts, Protocol):
    """Prompts with clips, which a warm-up needs."""

    def clips(self, sigma: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Return clean latents `[N, C, F, h, w]`, noise for levels `sigma [N, blocks]`, prompts."""


class Rollout(NamedTuple):
    """One video of each prompt as the student makes it; latents are `[N, C, blocks * F, h, w]`."""

    latents: Tensor
    # for each block, what its steps began with: [steps][N, C, F, h, w]
    inputs: list[list[Tensor]]
    # for each block, what the pass that wrote its K/V saw, and at which level
    written: list[tuple[Tensor, float]]


class Distiller:
    """The student, the teacher and the model of the student's own videos, and their losses.

    Args:
        teacher: the many-step model; block-causal, as the student.
        student: what is trained; begins as the teacher, or a smaller relative.
        text: prompts -> embeddings.
        rollout: makes the cached model of a transformer, whose window, sink and sizes are trained.
        blocks: of a roll-out.
        dtype: of the matrix products in training, and on a GPU of roll-outs.
        checkpointing: keep a layer's input alone for the backward, and run the layer again there.
        settings: what is trained.
    """

    def __init__(
        self,
        teacher: WanTransformer3DModel,
        student: WanTransformer3DModel,
        text: Callable[[Sequence[str]], Tensor],
        rollout: Callable[[WanTransformer3DModel], CausalWan],
        *,
        blocks: int,
        dtype: torch.dtype = torch.bfloat16,
        checkpointing: bool = False,
        settings: Settings = Settings(),
    ) -> None:
        self.settings, self.blocks, self.text = settings, blocks, text
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.train().requires_grad_(True)
        # what rolls out: the student's weights, with a cache and without gradients
        shadow = copy.deepcopy(student)
        narrow = dtype if student.device.type == "cuda" else torch.float32
        kept = {*(student._keep_in_fp32_modules or ())}
        for name, parameter in shadow.named_parameters():
            if not kept.intersection(name.split(".")):
                parameter.data = parameter.data.to(narrow)
        self._weights = [*shadow.parameters()], [*student.parameters()]
        self.cached = rollout(shadow)
        self.frames, channels, height, width = self.cached.block_shape
        self.shape = (channels, blocks * self.frames, height, width)
        self.steps = [settings.schedule.steps(block) for block in range(blocks)]
        sizes = {
            "blocks": blocks, "frames": self.frames, "height": height, "width": width,
            "window_frames": self.cached.window_frames, "sink_frames": self.cached.sink_frames,
            "gap": settings.gap,
            "dtype": dtype,
        }  # fmt: skip
        self.forward = BlockForward(teacher, checkpointing=checkpointing, **sizes)

    def warm_up(
        self, clips: Clips, count: int, g: torch.Generator, own: float
    ) -> dict[str, Tensor]:
        """Return flow-matching losses of `count` clips behind what `settings` forces.

        `own`: how often a clip's context is what the student itself makes of the noisy blocks.
        """
        sigma = self._levels(count, g)
        clean, noise, prompts = clips.clips(sigma, g)
        text, spread = self.text(prompts), self._spread
        noisy = torch.lerp(clean, noise, spread(sigma))
        context, level = clean, self._context_level(count, g)
        gap = 0
        if self.settings.gap and float(torch.rand((), generator=g)) < 0.5:
            gap = int(torch.randint(1, self.settings.gap + 1, (), generator=g))
        if float(torch.rand((), generator=g)) < own:
            with torch.no_grad():
                context = noisy - spread(sigma) * self._velocity(
                    noisy, sigma, text, clean, level, g, gap
                )
        velocity = self._velocity(noisy, sigma, text, context, level, g, gap)
        error = (velocity - (noise - clean)).square().mean((1, 3, 4))
        error = error.unflatten(1, (self.blocks, -1)).mean(2)
        if gap:
            # what came before the block behind the gap is not there: nobody can know how it goes on
            error = error * (torch.arange(self.blocks, device=error.device) != 1)
        first, later = error[:, 0].mean(), error[:, 1:].mean()
        return {"loss": error.mean() + 0.25 * first, "first": first, "later": later}

    def distil(
        self, fake: WanTransformer3DModel, prompts: Sequence[str], g: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the losses of the student and of `fake`, the model of its videos, on roll-outs."""
        settings, text = self.settings, self.text(prompts)
        rollout = self.roll_out(prompts, g)
        last = float(torch.rand((), generator=g)) < settings.last
        made = self.again(rollout, text, g, last=last)

        # one level a video, so that differences of its frames are compared at one level
        low, high = settings.levels
        u = low + (high - low) * torch.rand(len(prompts), 1, generator=g)
        sigma = settings.shift * u / (1 + (settings.shift - 1) * u)
        sigma = sigma.expand(-1, self.blocks).to(made.device)
        noise = self._noise(made.shape, g)
        spread = self._spread(sigma)
        noisy = torch.lerp(made.detach(), noise, spread)
        before = {"context": rollout.latents}
        velocity = self.forward(fake, noisy, sigma, text, **before)
        with torch.no_grad():
            real = noisy - spread * self._teach(noisy, sigma, text, rollout.latents, len(prompts))
            guess = noisy - spread * velocity
        matching = (velocity - (noise - made.detach())).square().mean()
        losses = {"distribution": _match(made, real, guess, self.blocks)}
        if settings.flow:
            losses["flow"] = _match_flow(made, real, guess)
        total = losses["distribution"] + settings.flow * losses.get("flow", 0.0)
        apart = (guess - real).square().mean()
        return {"loss": total + matching, "fake": matching, "apart": apart, **losses}

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[str], g: torch.Generator) -> Rollout:
        """Return a video of each prompt, made block after block as at inference."""
        settings, cached = self.settings, self.cached
        torch._foreach_copy_(*self._weights)
        cached.start(prompts)
        latents, inputs, written = [], [], []
        for block, timesteps in enumerate(self.steps):
            start = block * self.frames
            shape = (len(prompts), self.shape[0], self.frames, *self.shape[2:])
            x, seen = None, []
            for timestep in timesteps:
                sigma, noise = timestep / 1000, self._noise(shape, g)
                seen.append(noise if x is None else torch.lerp(x, noise, sigma))
                x = self._denoise(seen[-1], timestep, start)
            level = self._written_level(block)
            if settings.repair and float(torch.rand((), generator=g)) < settings.repair:
                level = 0.0
            if level == 0:
                cached.write(x.transpose(1, 2), start_frame=start)
                written.append((x, 0.0))
            else:
                if settings.context_noise is None:
                    written.append((seen[-1], level))
                else:
                    written.append((torch.lerp(x, self._noise(shape, g), level), level))
                    self._denoise(written[-1][0], 1000 * level, start)
                cached.keep(start_frame=start)
            inputs.append(seen)
            latents.append(x)
        return Rollout(torch.cat(latents, 2), inputs, written)

    def again(
        self, rollout: Rollout, text: Tensor, g: torch.Generator, *, last: bool = True
    ) -> Tensor:
        """Return what a step of each block of `rollout` made, with its gradient.

        `last`: each block's last step, the roll-out's own latents to rounding; else an earlier one,
        drawn for each block with more than one.
        """
        count, device = len(rollout.latents), rollout.latents.device
        passes = []
        for seen, times in zip(rollout.inputs, self.steps, strict=True):
            step = len(times) - 1
            if not last and step:
                step = int(torch.randint(step, (), generator=g))
            passes.append((seen[step], times[step] / 1000))

        def joined(blocks: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
            levels = torch.tensor([level for _, level in blocks], device=device)
            return torch.cat([latents for latents, _ in blocks], 2), levels.expand(count, -1)

        noisy, sigma = joined(passes)
        behind = {}
        # K/V of another pass than this one
        if any(
            mine[0] is not theirs[0] for mine, theirs in zip(passes, rollout.written, strict=True)
        ):
            context, level = joined(rollout.written)
            behind = {"context": context, "context_sigma": level}
        velocity = self.forward(self.student, noisy, sigma, text, **behind)
        return noisy - self._spread(sigma) * velocity

    def _denoise(self, noisy: Tensor, timestep: float, start: int) -> Tensor:
        made = self.cached.denoise(noisy.transpose(1, 2), timestep, start_frame=start)
        return made.transpose(1, 2)

    def _teach(
        self, noisy: Tensor, sigma: Tensor, text: Tensor, context: Tensor, count: int
    ) -> Tensor:
        velocity = self.forward(self.teacher, noisy, sigma, text, context=context)
        if self.settings.guidance == 1:
            return velocity
        none = self.text([""] * count)
        unasked = self.forward(self.teacher, noisy, sigma, none, context=context)
        return torch.lerp(unasked, velocity, self.settings.guidance)

    def _velocity(
        self, noisy: Tensor, sigma: Tensor, text: Tensor, context: Tensor, level: Tensor,
        g: torch.Generator, gap: int,
    ) -> Tensor:  # fmt: skip
        """Return the student's velocity behind `context` noised to `level [N, blocks]`."""
        context = torch.lerp(context, self._noise(context.shape, g), self._spread(level))
        return self.forward(
            self.student, noisy, sigma, text, context=context, context_sigma=level, gap=gap
        )

    def _written_level(self, block: int) -> float:
        """Return the level of the pass that writes a block's K/V."""
        settings = self.settings
        if not settings.forcing or settings.schedule.clean_pass:
            return 0.0
        if settings.context_noise is not None:
            return settings.context_noise
        return self.steps[block][-1] / 1000

    def _context_level(self, count: int, g: torch.Generator) -> Tensor:
        """Return the levels `[N, blocks]` of the K/V that a clip's blocks are trained behind."""
        levels = torch.tensor([self._written_level(block) for block in range(self.blocks)])
        levels = levels.expand(count, -1)
        if self.settings.repair:
            repaired = torch.rand(count, self.blocks, generator=g) < self.settings.repair
            levels = levels.masked_fill(repaired, 0)
        return levels.to(self.cached.device)

    def _levels(self, count: int, g: torch.Generator) -> Tensor:
        """Return levels `[N, blocks]`: mostly each block's own steps, else any above the least."""
        columns = []
        for steps in self.steps:
            own = torch.tensor(steps)[torch.randint(len(steps), (count,), generator=g)] / 1000
            low = min(steps[-1] / 1000, 0.3)
            free = low + (1 - low) * torch.rand(count, generator=g)
            columns.append(torch.where(torch.rand(count, generator=g) < 0.1, free, own))
        return torch.stack(columns, 1).to(self.cached.device)

    def _spread(self, sigma: Tensor) -> Tensor:
        """Return levels `[N, blocks]` as `[N, 1, F, 1, 1]`."""
        return sigma.repeat_interleave(self.frames, 1)[:, None, :, None, None]

    def _noise(self, shape: Sequence[int], g: torch.Generator) -> Tensor:
        # drawn on the CPU: the same on every device
        return torch.randn(shape, generator=g).to(self.cached.device)


def _match(made: Tensor, real: Tensor, fake: Tensor, blocks: int) -> Tensor:
    """Return a loss whose gradient moves `made` along real - fake (DMD, equation 7).

    Scaled for each block by how far `made` is from what the teacher makes of it.
    """
    miss = (made.detach() - real).abs().unflatten(2, (blocks, -1)).mean((1, 3, 4, 5), keepdim=True)
    far = miss.clamp(min=1e-3).expand(-1, -1, -1, made.shape[2] // blocks, -1, -1).flatten(2, 3)
    return _pull(made, (fake - real) / far).mean()


def _match_flow(made: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Return the same loss on differences of neighbouring frames, weighted for each.

    The weight is 0.7 times the teacher's own motion there, relative to the mean, and 0.3 times
    1.2^i for difference i, relative to its mean: late frames drift more. (Released code of
    Diagonal Distillation: 0.7 dynamic + 0.3 * 1.2^i.)
    """
    flows = [x.diff(dim=2) for x in (made, real, fake)]
    miss = (flows[0].detach() - flows[1]).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-3)
    motion = flows[1].abs().mean((1, 3, 4))
    motion = motion / motion.mean(1, keepdim=True).clamp(min=1e-6)
    late = 1.2 ** torch.arange(motion.shape[1], device=motion.device).float()
    weight = 0.7 * motion + 0.3 * late / late.mean()
    pull = _pull(flows[0], (flows[2] - flows[1]) / miss)
    return (pull.mean((1, 3, 4)) * weight).mean()


def _pull(made: Tensor, gradient: Tensor) -> Tensor:
    """Return half the squares whose gradient by `made` is `gradient`, element by element."""
    wanted = (made - gradient.nan_to_num(0.0)).detach()
    return 0.5 * F.mse_loss(made, wanted, reduction="none")
