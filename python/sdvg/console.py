"""What the commands share: models and steps, device, output paths, warnings of prompts, Ctrl-C."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from sdvg.schedule import Schedule, preset


class Choice(NamedTuple):
    """Which models a command runs, and in what steps."""

    # names that `embedded.load` knows, or folders of transformers
    drafter: str | Path
    target: str | Path
    schedule: Schedule
    drafter_schedule: Schedule

    def told(self) -> dict[str, str]:
        """Return it as texts."""
        return {
            "drafter": str(self.drafter),
            "target": str(self.target),
            "schedule": steps_of(self.schedule),
            "drafter schedule": steps_of(self.drafter_schedule),
        }


def choose(args: argparse.Namespace) -> Choice:
    """Return the models and steps that `--schedule`, `--drafter`, `--target` ask for.

    A schedule `diagonal...` comes with the diagonally distilled models where none are named, and
    such a model with the steps that it was distilled for where no schedule is given for it: a
    diagonal one is for every distilled model, another one for the target and for a drafter that is
    not distilled. That takes `self_forcing` where the target's steps have no clean pass.

    Raises ValueError for another name, or a schedule that cannot be.
    """
    from sdvg.models import embedded

    diagonal = args.schedule is not None and args.schedule.partition(":")[0] == "diagonal"
    usual = ("student", "diagonal") if diagonal else ("teacher", "four-step")
    given = (args.target, args.drafter)
    named = [default if name is None else name for name, default in zip(given, usual, strict=True)]
    target = _model("target", named[0], embedded.TARGETS)
    drafter = _model("drafter", named[1], embedded.DRAFTERS)
    schedule = _own(target) or preset("self_forcing")
    if args.schedule is not None:
        schedule = preset(args.schedule)
    drafting = schedule if diagonal else _own(drafter)
    if _own(drafter) is None:
        drafting = schedule if schedule.clean_pass else preset("self_forcing")
    if args.drafter_timesteps is not None:
        steps = (tuple(args.drafter_timesteps),)
        drafting = Schedule(steps, clean_pass=drafting.clean_pass)
    return Choice(drafter, target, schedule, drafting)


def steps_of(schedule: Schedule) -> str:
    """Return the timesteps of each block in a line, and whether a clean pass follows."""
    blocks = (" ".join(f"{step:g}" for step in steps) for steps in schedule.timesteps)
    clean = "clean pass of repaired blocks alone" if schedule.clean_context else "no clean pass"
    return f"{' | '.join(blocks)}, {'a clean pass' if schedule.clean_pass else clean}"


def _model(part: str, given: str, names: Iterable[str]) -> str | Path:
    if given in names:
        return given
    if not given or not Path(given).is_dir():
        raise ValueError(f"{part}: must be {', '.join(names)}, or a folder, got {given!r}")
    return Path(given)


def _own(model: str | Path) -> Schedule | None:
    """Return the schedule that a model was distilled for; None for others."""
    from sdvg.models import embedded

    if isinstance(model, Path) and (model / "distillation.json").is_file():
        told = embedded.distilled(model)
        return Schedule(told.timesteps, clean_pass=told.clean_pass, clean_context=told.repair > 0)
    return preset("diagonal") if model in ("student", "diagonal") else None


def prepare(args: argparse.Namespace) -> str:
    """Set the threads and return the device that `args` ask for; ValueError where it is none."""
    if args.threads < 1:
        raise ValueError(f"threads: must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: must be cpu, cuda, cuda:1, ..., got {device!r}") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {device} needs a GPU and a CUDA build of torch, got none")
    with suppress(ImportError):
        from transformers.utils import logging

        # its bar for weights that load in a moment
        logging.disable_progress_bar()
    return device


def interrupted_sweep(store: Path) -> int:
    """Say what Ctrl-C has left in `store` and return the exit code; raise on if that is nothing."""
    # its first line holds the settings
    if not store.is_file() or store.read_bytes().count(b"\n") < 2:
        raise
    print(
        f"sdvg: interrupted; the finished videos are kept in {store}, "
        "and the same command goes on from there",
        file=sys.stderr,
    )
    return 130


def output_paths(out: Path, count: int) -> list[Path]:
    """Return the mp4 of each of `count` videos; ValueError where they cannot be."""
    if out.suffix != ".mp4":
        raise ValueError(f"output: --out must end in .mp4, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"output: the folder {out.parent} does not exist; create it first")
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}.mp4") for number in range(1, count + 1)]


def warn_of_prompts(weights: Path, prompts: Sequence[str]) -> None:
    """Say in a line each which words the models never saw, and which prompts they see cut."""
    from tokenizers import Tokenizer

    from sdvg.models.embedded.text import LENGTH

    tokenizer = Tokenizer.from_file(str(weights / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # a prompt without any word stands for itself; an empty one is refused later
    named = [re.findall(r"\w+", text.lower()) or [repr(text)] for text in prompts if text.strip()]
    words = dict.fromkeys(word for each in named for word in each)
    unknown = [word for word in words if tokenizer.token_to_id(word) is None]
    sizes = [len(tokenizer.encode(text).ids) for text in prompts]
    cut = [f"prompt {place} has {size}" for place, size in enumerate(sizes, 1) if size > LENGTH]
    if cut:
        print(
            f"sdvg: warning: the models read a prompt's first {LENGTH} tokens; {', '.join(cut)}",
            file=sys.stderr,
        )
    if unknown:
        known = "they know digits, directions and speeds"
        print(
            f"sdvg: warning: the models do not know {', '.join(unknown)}; {known}", file=sys.stderr
        )


def asked(args: argparse.Namespace) -> dict[str, object]:
    """Return what the user asked for, as JSON holds it."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("run", "debug")
    }


class Interrupts:
    """Within it, Ctrl-C is a KeyboardInterrupt, but one during `held` waits for its end."""

    def __init__(self) -> None:
        self._holding = self._pending = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def ignore(self) -> None:
        """Hear no Ctrl-C from here to the end."""
        self._holding = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a Ctrl-C wait until what runs inside is done."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._pending = True
