"""Diagonal distillation: ``python -m sdvg.train.diagonal_distill --out runs/distill/student``.

Makes a student that spends 4, 3, then 2 steps a block and has no clean pass, out of a many-step
teacher (Diagonal Distillation, arXiv 2603.09488). Two phases:

- warm-up: flow matching on clips at the schedule's levels, each block beside blocks as noisy as
  their last step leaves them (digits only: it needs clips).
- distillation: the student rolls out whole videos as at inference (diagonal forcing: each block
  attends to the K/V that the last noisy step of the ones before it left), and is moved towards the
  teacher's distribution, and that of its motion.

Without ``--teacher`` it trains the embedded models on digits that move; with it, any Wan
transformer in the formats that `sdvg.models.checkpoints` reads, on the prompts of a file. Several
GPUs: ``accelerate launch -m sdvg.train.diagonal_distill ...``, each with a batch of its own.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.embedded import LATENT_SIZE, SINK_FRAMES, WEIGHTS, WINDOW_FRAMES
from sdvg.models.wan import CausalWan
from sdvg.schedule import preset
from sdvg.train import transformer
from sdvg.train.data import BLOCKS
from sdvg.train.digits import UNSEEN, text_encoder
from sdvg.train.distiller import Clips, Distiller, Prompts, Settings
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import WanTransformer3DModel

# of the shipped runs
WARM_UP, STEPS, BATCH, ROLLOUTS, CLIPS = 3000, 120, 8, 12, 6000
# tokens of a prompt, as Wan takes them
_TEXT_LENGTH = 512
SMOKE = {
    "model": "drafter",
    "score": "drafter",
    "warm_up": 60,
    "steps": 20,
    "clips": 160,
    "rollouts": 4,
}


class Digits:
    """Clips of moving digits and prompts for them; `unseen` digits are left out."""

    def __init__(self, clips: transformer.Clips, unseen: Sequence[int] = ()) -> None:
        self._clips, self._shown = clips, transformer.shown(clips, tuple(unseen))

    def clips(self, sigma: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Return clean latents, noise for the levels `sigma [N, blocks]`, prompts."""
        clean, noise, prompts = transformer.sample(self._clips, self._shown, sigma.cpu(), g)
        return clean.to(sigma.device), noise.to(sigma.device), prompts

    def prompts(self, count: int, g: torch.Generator) -> list[str]:
        """Return the prompts of `count` random clips."""
        chosen = self._shown[torch.randint(len(self._shown), (count,), generator=g)]
        labels, motions = self._clips.labels[chosen], self._clips.motions.take(chosen)
        return transformer.write_prompts(labels, motions, g)[1]


class Lines:
    """The lines of a text file, a prompt each."""

    def __init__(self, path: Path) -> None:
        self._lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        self._lines = [line for line in self._lines if line]
        if not self._lines:
            raise ValueError(f"distil: {path} must hold a prompt on each line, got none")

    def prompts(self, count: int, g: torch.Generator) -> list[str]:
        """Return `count` random lines."""
        chosen = torch.randint(len(self._lines), (count,), generator=g)
        return [self._lines[i] for i in chosen.tolist()]


class Text:
    """Prompts -> embeddings `[N, 512, dim]`, zero past each prompt's length; each encoded once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self._encoder = UMT5EncoderModel.from_pretrained(
            folder / "text_encoder", dtype=torch.bfloat16
        ).to(device)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        device = self._encoder.device
        for prompt in {*prompts} - {*self._known}:
            batch = self._tokenizer(
                prompt, padding="max_length", truncation=True, max_length=_TEXT_LENGTH,
                return_tensors="pt",
            ).to(device)  # fmt: skip
            hidden = self._encoder(**batch).last_hidden_state
            # kept without what is zero: four megabytes a prompt otherwise
            self._known[prompt] = hidden[0, : int(batch["attention_mask"].sum())].cpu()
        rows = [self._known[prompt] for prompt in prompts]
        rows = [F.pad(row, (0, 0, 0, _TEXT_LENGTH - len(row))) for row in rows]
        return torch.stack(rows).to(device)


def train(
    distiller: Distiller,
    source: Prompts | Clips,
    runs: Path,
    *,
    warm_up: int = WARM_UP,
    steps: int = STEPS,
    batch: int = BATCH,
    rollouts: int = ROLLOUTS,
    warm_up_lr: float = 2e-3,
    lr: float = 3e-5,
    fake_lr: float = 3e-4,
    resume: bool = False,
    seed: int = 31,
    accelerator: Accelerator | None = None,
) -> WanTransformer3DModel:
    """Return the student's moving average after both phases.

    Writes ``runs/warm-up.pt`` and ``runs/distil.pt`` with their logs ``.csv``; `resume` goes on
    from there.
    """
    student = distiller.student
    common = {"runs": runs, "resume": resume, "ema": 0.99, "accelerator": accelerator}
    if warm_up:
        average = fit(
            "warm-up", student,
            lambda g, step: distiller.warm_up(source, batch, g, own=0.5 * (step > warm_up // 3)),
            steps=warm_up, lr=warm_up_lr, seed=seed, **common,
        )  # fmt: skip
        student.load_state_dict(average.state_dict())
    if not steps:
        return student.eval()
    # it begins as the teacher, and is of its size: their difference is then the videos' alone
    fake = copy.deepcopy(distiller.teacher).train().requires_grad_(True)
    both = nn.ModuleDict({"student": student, "fake": fake})
    average = fit(
        "distil", both,
        lambda g, step: distiller.distil(fake, source.prompts(rollouts, g), g),
        steps=steps, lr={"student": lr, "fake": fake_lr}, seed=seed + 1, **common,
    )  # fmt: skip
    return average["student"].eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and write the student's folder with its logs and curves.

    Its teacher goes to the folder's ``teacher``.
    """
    from accelerate import Accelerator

    options = _parser().parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(cpu=options.device == "cpu")
    settings = Settings(
        schedule=preset(options.schedule), forcing=options.forcing,
        context_noise=options.context_noise, flow=options.flow, levels=tuple(options.levels),
        shift=options.shift, guidance=options.guidance, last=options.last, repair=options.repair,
        gap=options.gap,
    )  # fmt: skip
    _check(options)
    notes = _notes(options, settings)
    runs = options.out / "checkpoints"
    if accelerator.is_main_process:
        _claim(options.out, notes, options.resume)
    accelerator.wait_for_everyone()
    parts = _wan if options.teacher else _digits
    # the first process encodes clips, the others read them
    with accelerator.main_process_first():
        distiller, source = parts(options, settings, accelerator.device)
    student = train(
        distiller, source, runs, warm_up=options.warm_up, steps=options.steps,
        batch=options.batch, rollouts=options.rollouts, warm_up_lr=options.warm_up_lr,
        lr=options.lr, fake_lr=options.fake_lr, resume=options.resume, seed=options.seed,
        accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        # the teacher beside it: what the student is held to
        for model, folder in ((student, options.out), (distiller.teacher, options.out / "teacher")):
            # or the config names the folder that the model once came from
            model.register_to_config(_name_or_path="")
            model.to(torch.float16).save_pretrained(folder)
        logs = [runs / f"{phase}.csv" for phase in ("warm-up", "distil")]
        logs = [Path(shutil.copy(log, options.out)) for log in logs if log.exists()]
        # a phase of under 20 steps has no log
        if logs:
            curves(logs, options.out / "curves.png")
        print(*(f"{log.name}: {_change(log)}" for log in logs), options.out, sep="\n")


def curves(logs: Sequence[Path], path: Path) -> None:
    """Draw every column of the logs of `fit` over its steps; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("distil: curves need matplotlib: pip install 'sdvg[plots]'") from error
    figure = Figure(figsize=(4.5 * len(logs), 3.2), layout="constrained")
    for axes, log in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs, strict=True):
        rows = _rows(log)
        for name in [*rows[0]][3:] if rows else ():
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axes.set_title(log.stem, fontsize=10)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _rows(log: Path) -> list[dict[str, float]]:
    with log.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _change(log: Path) -> str:
    """Return the loss at a log's ends; that of distillation is a pull, and need not fall."""
    first, *_, last = [row["loss"] for row in _rows(log)] * 2
    return f"loss {first:.3f}" + (f" at first, {last:.3f} at last" if len(_rows(log)) > 1 else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdvg.train.diagonal_distill", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the student, its logs and checkpoints")
    add("--smoke", action="store_true", help="a minute's run of the drafter, to see that it works")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")

    add = parser.add_argument_group("the method, and what it is without its parts").add_argument
    add("--schedule", default="diagonal", help="as sdvg generate takes it; diagonal:2 is flat")
    add("--no-forcing", dest="forcing", action="store_false",
        help="train behind a clean pass's K/V, which inference does not have")  # fmt: skip
    add("--context-noise", type=float,
        help="train behind the finished block noised again to this level in (0, 1), not behind the "
        "last step itself")  # fmt: skip
    add("--flow", type=float, default=1.0, help="weight of flow distribution matching; 0: none")
    add("--repair", type=float, default=0.0,
        help="how often a block is written clean, as repaired blocks of a drafter are")  # fmt: skip
    add("--gap", type=int, default=63,
        help="most latent frames between the sink and the rest of a warm-up's clip")  # fmt: skip
    add("--last", type=float, default=1.0,
        help="how often the gradient goes through the last step, else through another")  # fmt: skip
    add("--levels", type=float, nargs=2, default=[0.55, 0.9], metavar=("LOW", "HIGH"),
        help="noise levels at which scores are compared, before --shift")  # fmt: skip
    add("--shift", type=float, default=1.0, help="flow shift of those levels (Wan: 5)")
    add("--guidance", type=float, default=1.0, help="of the teacher's score; 1: none (Wan: 3)")

    add = parser.add_argument_group("training").add_argument
    add("--warm-up", type=int, default=WARM_UP, help="steps of flow matching on clips")
    add("--steps", type=int, default=STEPS, help="steps of distillation")
    add("--batch", type=int, default=BATCH, help="clips of a warm-up's step, on each device")
    add("--rollouts", type=int, default=ROLLOUTS,
        help="videos of a step of distillation, on each device")  # fmt: skip
    add("--warm-up-lr", type=float, default=2e-3)
    add("--lr", type=float, default=3e-5)
    add("--fake-lr", type=float, default=3e-4, help="rate of the model of the student's videos")
    add("--seed", type=int, default=31)
    add("--checkpointing", action="store_true", help="run layers again in the backward pass")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one")
    add("--threads", type=int, default=2, help="PyTorch threads")

    add = parser.add_argument_group("moving digits").add_argument
    add("--model", choices=("student", "drafter"), default="student",
        help="the student is of the base's size, the drafter of the shipped one's")  # fmt: skip
    add("--start", type=Path,
        help="warm-up.pt of another run: begin as after its warm-up, with --warm-up 0")  # fmt: skip
    add("--score", choices=("base", "target", "drafter"), default="base",
        help="the many-step model whose score teaches")  # fmt: skip
    add("--runs", type=Path, default=Path("runs"),
        help="where stage base of sdvg.train.digits left base.pt; clips stay there")  # fmt: skip
    add("--clips", type=int, default=CLIPS, help="clips encoded for the warm-up")

    add = parser.add_argument_group("other Wan models").add_argument
    add("--teacher", type=Path, help="file or folder of the many-step, block-causal model")
    add("--student", type=Path, help="what the student begins as (default: the teacher)")
    add("--text", type=Path, help="folder with tokenizer and text_encoder, in diffusers' layout")
    add("--prompts", type=Path, help="a text file, a prompt on each line")
    add("--height", type=int, default=480, help="of the frames, in pixels")
    add("--width", type=int, default=832)
    add("--blocks", type=int, default=7, help="of 3 latent frames")
    add("--window-frames", type=int, default=9, help="latent frames a block sees beside the sink")
    add("--sink-frames", type=int, default=3)
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for a number that no run can have, before anything is loaded."""
    least = {"warm_up": 0, "steps": 0, "batch": 1, "rollouts": 1, "clips": 1, "blocks": 1}
    for name, bound in least.items():
        if (given := getattr(options, name)) < bound:
            raise ValueError(f"distil: {name} must be at least {bound}, got {given}")
    for name in ("warm_up_lr", "lr", "fake_lr"):
        if not (given := getattr(options, name)) > 0:
            raise ValueError(f"distil: {name} must be above 0, got {given}")


def _notes(options: argparse.Namespace, settings: Settings) -> dict[str, object]:
    """Return what decides the result, for ``distillation.json``."""
    method = asdict(settings)
    schedule = method.pop("schedule")
    names = ("warm_up", "steps", "batch", "rollouts", "warm_up_lr", "lr", "fake_lr", "seed")
    digits = {name: getattr(options, name) for name in ("model", "score", "clips")}
    digits["start"] = None if options.start is None else str(options.start)
    wan = ("teacher", "student", "text", "prompts")
    wan = {name: None if getattr(options, name) is None else str(getattr(options, name))
           for name in wan}  # fmt: skip
    sizes = ("height", "width", "blocks", "window_frames", "sink_frames")
    wan |= {name: getattr(options, name) for name in sizes}
    models = wan if options.teacher else digits
    return schedule | method | {name: getattr(options, name) for name in names} | models


def _claim(out: Path, notes: dict[str, object], resume: bool) -> None:
    """Write the notes; where a run is resumed, they must be its own."""
    path, text = out / "distillation.json", json.dumps(notes, indent=2) + "\n"
    if resume and path.exists():
        found, wanted = json.loads(path.read_text()), json.loads(text)
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if changed:
            raise ValueError(
                f"distil: {path} must have the settings of the run that is resumed, got another "
                f"{', '.join(changed)}; give another --out, or begin anew without --resume"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _digits(
    options: argparse.Namespace, settings: Settings, device: torch.device
) -> tuple[Distiller, Digits]:
    """Return the embedded models and clips of digits."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    def named(name: str) -> WanTransformer3DModel:
        if name == "base":
            return transformer.load_base(options.runs).to(device)
        folder = WEIGHTS / ("transformer" if name == "target" else name)
        return WanTransformer3DModel.from_pretrained(folder).float().to(device)

    drafter = options.model == "drafter"
    teacher = named(options.score)
    if drafter:
        student = named("drafter")
    else:
        student = transformer.build("student")
        transformer.cut("student", student, named("base"))
        student.to(device)
    if options.start is not None:
        if options.warm_up:
            raise ValueError("distil: --start must come with --warm-up 0: it is a warm-up's end")
        student.load_state_dict(torch.load(options.start, weights_only=True)["average"])
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae").float().eval()
    clips = transformer.encode_clips(vae, options.clips, options.runs)
    encoder = text_encoder(WEIGHTS)
    encoder.encoder.to(device)

    def cached(model: WanTransformer3DModel) -> CausalWan:
        return CausalWan(
            model, encoder, height=LATENT_SIZE, width=LATENT_SIZE, sink_frames=SINK_FRAMES,
            window_frames=WINDOW_FRAMES,
        )  # fmt: skip

    distiller = Distiller(
        teacher, student, encoder, cached, blocks=BLOCKS,
        checkpointing=options.checkpointing, settings=settings,
    )  # fmt: skip
    return distiller, Digits(clips, UNSEEN if drafter else ())


def _wan(
    options: argparse.Namespace, settings: Settings, device: torch.device
) -> tuple[Distiller, Lines]:
    """Return any Wan models and the prompts of a file."""
    from sdvg.models.checkpoints import load_transformer

    missing = [name for name in ("text", "prompts") if getattr(options, name) is None]
    if missing:
        raise ValueError(f"distil: --teacher must come with --{missing[0]}, got none")
    if options.warm_up:
        raise ValueError(
            "distil: a warm-up must have clips, which --teacher comes without; give --warm-up 0"
        )
    teacher, student = (
        load_transformer(path, dtype=torch.float32, device=device)
        for path in (options.teacher, options.student or options.teacher)
    )
    text = Text(options.text, device)

    def cached(model: WanTransformer3DModel) -> CausalWan:
        return CausalWan(
            model, text, height=options.height // 8, width=options.width // 8,
            sink_frames=options.sink_frames, window_frames=options.window_frames,
        )  # fmt: skip

    distiller = Distiller(
        teacher, student, text, cached, blocks=options.blocks,
        checkpointing=options.checkpointing, settings=settings,
    )  # fmt: skip
    return distiller, Lines(options.prompts)


if __name__ == "__main__":
    main()
