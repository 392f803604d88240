"""`sdvg tokens generate | sweep`: videos of the embedded token model, the table of its orders."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from sdvg import env
from sdvg.console import (
    Interrupts,
    asked,
    interrupted_sweep,
    output_paths,
    prepare,
    warn_of_prompts,
)
from sdvg.sweep import digest
from sdvg.token_sweep import QUICK, WIDTHS, Line, lines, require_plots, write
from sdvg.token_sweep import sweep as run_sweep
from sdvg.tokens import Sampling
from sdvg.tokens.diagonal import MODES
from sdvg.tokens.embedded import JACOBI
from sdvg.video import Aside, VideoWriter, save_strip

if TYPE_CHECKING:
    from sdvg.models.embedded.tokens import VideoTokens
    from sdvg.models.tokens import TokenLlama
    from sdvg.tokens.embedded import EmbeddedVideos, Shown

# what a table has, and what it may have beside that
ORDERS = (*(mode for mode in MODES if mode != "raster"), "scd")
KNOWN = tuple(dict.fromkeys((*ORDERS, *JACOBI)))


def generate(args: argparse.Namespace) -> int:
    """Make one video for each prompt, with its frames in a row and a report."""
    from sdvg.models import embedded
    from sdvg.tokens.embedded import EmbeddedVideos

    paths = output_paths(args.out, len(args.prompt))
    # raster order has the width's, and a window a default of its own
    free = args.k is not None or args.mode in ("raster", *JACOBI)
    how = _how(args, args.mode, args.k if free else 2)
    actions = _actions(args.action, args.frames).expand(len(args.prompt), -1)
    with Aside() as aside, Interrupts() as interrupts:
        files = [
            {kind: aside.create(path.with_suffix(f".{kind}")) for kind in ("mp4", "png", "json")}
            for path in paths
        ]
        models = _load(args, tuned=args.tuned)
        warn_of_prompts(embedded.WEIGHTS, args.prompt)
        videos = EmbeddedVideos(models, **how)
        writers = [VideoWriter(kinds["mp4"], fps=args.fps) for kinds in files]
        shown: list[Shown] = []
        interrupted, began = False, time.perf_counter()
        try:
            frames = videos.generate(
                args.prompt, frames=args.frames, actions=actions, seed=args.seed
            )
            for frame in tqdm(frames, total=args.frames, unit="frame", desc="generate"):
                # a frame is in every file or in none
                with interrupts.held():
                    for writer, pixels in zip(writers, frame.frames, strict=True):
                        writer.write(pixels[None])
                    shown.append(frame)
        except KeyboardInterrupt:
            interrupted = True
        interrupts.ignore()
        if not shown:
            raise KeyboardInterrupt
        seconds = time.perf_counter() - began
        summary = _summary(videos, shown, seconds, len(paths))
        for row, (kinds, writer) in enumerate(zip(files, writers, strict=True)):
            writer.close()
            save_strip(kinds["png"], torch.cat([frame.frames[row : row + 1] for frame in shown]))
            report = {
                "prompt": args.prompt[row],
                "sequence": row,
                "interrupted": interrupted,
                "arguments": asked(args),
                "versions": env.versions() | {"device": str(models.model.device)},
                "summary": summary,
            }
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
            kinds["json"].write_text(text + "\n", encoding="utf-8")
        aside.keep()
    for path in paths:
        print(*(path.with_suffix(suffix) for suffix in (".mp4", ".png", ".json")), sep="\n")
    print(
        f"{len(shown)} frames in {seconds:.2f} s: {summary['passes']} passes, "
        f"{summary['tokens_per_pass']:.1f} tokens a pass, "
        f"{summary['tokens_per_second']:.0f} tokens/s"
    )
    if interrupted:
        print(
            f"sdvg: interrupted; {len(shown)} of {args.frames} frames were finished and are kept",
            file=sys.stderr,
        )
    return 130 if interrupted else 0


def sweep(args: argparse.Namespace) -> int:
    """Write the table of modes, k and weights: diagonal.csv, diagonal.md, plot and frames."""
    from sdvg.models import embedded
    from sdvg.models.embedded import tokens
    from sdvg.models.tokens import from_transformers
    from sdvg.tokens.embedded import EmbeddedVideos

    count = (2 if args.quick else 40) if args.prompts is None else args.prompts
    frames = (2 if args.quick else tokens.FRAMES) if args.frames is None else args.frames
    widths = args.k or (QUICK if args.quick else WIDTHS)
    weights = {"no": (False,), "yes": (True,), "both": (False, True)}[args.tuned]
    table = lines(args.modes, widths, weights, tokens.WIDTH)
    if not set(args.modes) - set(JACOBI):
        # windows are the table's own
        for name, value in (("k", args.k), ("row_start", args.row_start)):
            if value is not None:
                raise ValueError(f"{name}: must be left out for {args.modes[0]}, got {value}")
    sampling = _sampling(args)
    require_plots()
    loaded: dict[bool, tuple[VideoTokens, TokenLlama]] = {}
    for tuned in {line.tuned for line in table}:
        models = _load(args, tuned=tuned)
        loaded[tuned] = models, from_transformers(models.model)

    def videos(line: Line) -> EmbeddedVideos:
        how = {} if line.mode in JACOBI or not args.row_start else {"row_start": args.row_start}
        return EmbeddedVideos(
            *loaded[line.tuned], mode=line.mode, k=line.k, sampling=sampling, **how
        )

    # k that cannot be is refused before anything is made
    for line in table:
        videos(line)
    device = loaded[False][0].model.device
    settings: Mapping[str, object] = {
        "weights": digest(tokens.FOLDER, "vq", "model", "diagonal"),
        "sampling": dataclasses.asdict(sampling),
        "dtype": args.dtype, "row start": args.row_start or "newest", "torch": torch.__version__,
        "machine": env.gpu() if device.type == "cuda" else env.processor(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    judge = partial(embedded.quality, stride=tokens.STRIDE)
    try:
        rows = run_sweep(
            videos, judge, args.out, lines=table, count=count, frames=frames,
            tokens=tokens.HEIGHT * tokens.WIDTH, seed=args.seed, settings=settings,
        )  # fmt: skip
        about = (
            f"{count} prompts, {frames} frames of {tokens.HEIGHT * tokens.WIDTH} tokens each, seed "
            f"{args.seed}; "
            + ", ".join(f"{name} {value}" for name, value in settings.items())
            + ". Made by `sdvg tokens sweep`."
        )
        print(*write(args.out, rows, about), sep="\n")
    except KeyboardInterrupt:
        return interrupted_sweep(args.out / "diagonal.jsonl")
    return 0


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add `tokens generate` and `tokens sweep` to the command line."""
    top = commands.add_parser("tokens", help="token grids, decoded along diagonals")
    inner = top.add_subparsers(required=True, metavar="generate | sweep")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add("--row-start", choices=("newest", "above"),
        help="what stands in for a row's end that is not there yet, default newest")  # fmt: skip
    add("--temperature", type=float, default=0.9, help="0 takes the likeliest token")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--guidance", type=float, default=1.5)
    add("--seed", type=int, default=0)
    # the embedded model is too small for more, and threads that wait for each other slow it
    add("--threads", type=int, default=1, help="CPU threads of torch")

    new = inner.add_parser("generate", parents=[common, shared], help="make videos")
    add = new.add_argument
    add("prompt", nargs="+", help="several prompts make one batch, written to NAME-1.mp4, ...")
    add(
        "--out", type=Path, default=Path("tokens.mp4"), help="with NAME.png and NAME.json beside it"
    )
    add("--mode", default="spatial", help=f"one of {', '.join((*MODES, *JACOBI))}")
    add("--k", type=int,
        help="tokens a row is behind the last, default 2; scd and sjd: window, 16")  # fmt: skip
    add("--tuned", action="store_true", help="the weights tuned for diagonal decoding")
    add("--frames", type=int, default=8)
    add("--action", action="append", default=[], metavar="FRAME=DIRECTION,SPEED",
        help="turn from that frame on, as in 3=up left,quickly; may be repeated")  # fmt: skip
    add("--context", type=int, help="slots of the cache; a longer video slides on")
    add("--keep", type=int, help="frames that are kept when the context slides, default 1")
    add("--fps", type=int, default=4)
    new.set_defaults(run=generate)

    new = inner.add_parser("sweep", parents=[common, shared], help="mode and k: passes and quality")
    add = new.add_argument
    add("--out", type=Path, default=Path("tokens-sweep"), metavar="FOLDER")
    add("--modes", nargs="+", choices=KNOWN, default=ORDERS, metavar="MODE",
        help=f"of {', '.join(KNOWN)}; default: all but sjd")  # fmt: skip
    add("--k", type=int, nargs="+", help="of the diagonal orders")
    add("--tuned", choices=("no", "yes", "both"), default="both", help="which weights")
    add("--prompts", type=int, help="default 40; with --quick 2")
    add("--frames", type=int, help="default 8; with --quick 2")
    add("--quick", action="store_true", help="few prompts, frames and k")
    new.set_defaults(run=sweep)


def _how(args: argparse.Namespace, mode: str, k: int | None) -> dict[str, object]:
    """Return what `EmbeddedVideos` takes for a mode."""
    own = {name: getattr(args, name) for name in ("context", "keep", "row_start")}
    own = {name: value for name, value in own.items() if value is not None}
    if mode in JACOBI:
        for name, value in own.items():
            raise ValueError(f"{name}: must be left out for {mode}, got {value}")
    if "keep" in own and "context" not in own:
        raise ValueError(f"keep: must come with context, got {args.keep}; nothing slides without")
    return {"mode": mode, "k": k, "sampling": _sampling(args), **own}


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.guidance)


def _load(args: argparse.Namespace, *, tuned: bool) -> VideoTokens:
    device = prepare(args)
    from sdvg.models.embedded import tokens

    return tokens.load(tuned=tuned, device=device, dtype=getattr(torch, args.dtype))


def _actions(given: Sequence[str], frames: int) -> Tensor:
    """Return indices [1, frames - 1] into `ACTIONS` from texts such as `3=up left,quickly`."""
    from sdvg.models.embedded.tokens import ACTIONS

    actions = torch.zeros(1, max(0, frames - 1), dtype=torch.int64)
    if given and frames < 2:
        raise ValueError(f"action: must be left out where no second frame is, got {given[0]!r}")
    for text in given:
        place, _, action = text.partition("=")
        way = tuple(part.strip() for part in action.split(","))
        if not place.isdecimal() or not 1 <= int(place) < frames or way not in ACTIONS:
            raise ValueError(
                f"action: must be FRAME=DIRECTION,SPEED with a frame from 1 to {frames - 1}, "
                f"got {text!r}; such as 3=up left,quickly"
            )
        if actions[0, int(place) - 1]:
            raise ValueError(f"action: must be one for each frame, got another: {text!r}")
        actions[0, int(place) - 1] = ACTIONS.index(way)
    return actions


def _summary(
    videos: EmbeddedVideos, shown: Sequence[Shown], seconds: float, batch: int
) -> dict[str, float | int]:
    """Return what happened; times in seconds."""
    layout, passes = videos.decoder.layout, shown[-1].passes
    tokens = len(shown) * batch * layout.height * layout.width
    return {
        "frames": len(shown),
        "sequences": batch,
        "passes": passes,
        "tokens_per_pass": tokens / passes,
        "tokens_per_second": tokens / seconds,
        "loop_seconds": shown[-1].seconds,
        "seconds": seconds,
    }
