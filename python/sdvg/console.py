"""What the commands share: the device, output paths, warnings of prompts, Ctrl-C."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch


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
