"""`sdvg tokens generate | speculate | sweep`: videos of the embedded token model, its tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from sdvg import env, vvs_sweep
from sdvg.console import (
    Interrupts,
    asked,
    interrupted_sweep,
    output_paths,
    prepare,
    warn_of_prompts,
)
from sdvg.sweep import digest
from sdvg.token_sweep import QUICK, WIDTHS, Line, collect, lines, require_plots, write
from sdvg.token_sweep import sweep as run_sweep
from sdvg.tokens import Dynamic, Exact, Relaxed, Sampling, Typical, Uniform
from sdvg.tokens.diagonal import MODES
from sdvg.tokens.embedded import JACOBI, NEAR, SPECULATIVE, TREE, codebook
from sdvg.tokens.skipping import neighbours
from sdvg.video import Aside, VideoWriter, save_strip

if TYPE_CHECKING:
    from sdvg.models.drafter import EagleDrafter
    from sdvg.models.embedded.tokens import VideoTokens
    from sdvg.models.tokens import TokenLlama
    from sdvg.tokens.embedded import EmbeddedVideos, Shown

# what a table has, and what it may have beside that
ORDERS = (*(mode for mode in MODES if mode != "raster"), "scd")
KNOWN = tuple(dict.fromkeys((*ORDERS, *JACOBI)))
# what each way to verify is set to by default
SETTINGS = {
    "exact": {},
    "lantern": {"delta": 0.1},
    "lantern++": {"ratio": 2.0},
    "typical": {"epsilon": 0.09, "alpha": 0.3},
}
SKIPS = {"none": {}, "uniform": {"interval": 2}, "dynamic": {"threshold": 0.65}}


def generate(args: argparse.Namespace) -> int:
    """Make one video for each prompt along diagonals, with its frames in a row and a report."""
    from sdvg.tokens.embedded import EmbeddedVideos

    if args.mode == SPECULATIVE:
        raise ValueError(f"mode: must be left to `sdvg tokens speculate`, got {args.mode}")
    # raster order has the width's, and a window a default of its own
    free = args.k is not None or args.mode in ("raster", *JACOBI)
    how = _how(args, args.mode, args.k if free else 2)
    return _make(args, lambda: EmbeddedVideos(_load(args, tuned=args.tuned), **how))


def speculate(args: argparse.Namespace) -> int:
    """Make one video for each prompt by a drafter's trees, with its frames and a report."""
    from sdvg.tokens.embedded import EmbeddedVideos

    verification = _chosen("verification", args.verification, SETTINGS, args)
    schedule = _chosen("skip", args.skip, SKIPS, args)
    if args.likely and args.skip == "none":
        raise ValueError("likely: must be left out for skip none; nothing is skipped")
    skips = {"uniform": Uniform, "dynamic": Dynamic}
    skip = skips[args.skip](**schedule, likely=args.likely) if args.skip in skips else None
    how: dict[str, object] = {
        "sampling": _sampling(args), "skip": skip,
        "depth": args.depth, "top_k": args.children, "nodes": args.nodes,
    }  # fmt: skip

    def videos() -> EmbeddedVideos:
        models = _load(args, tuned=False)
        if args.verification.startswith("lantern"):
            made = Relaxed(neighbours(codebook(models), NEAR), **verification)
        else:
            made = {"exact": Exact, "typical": Typical}[args.verification](**verification)
        return EmbeddedVideos(models, mode=SPECULATIVE, verification=made, **how)

    return _make(args, videos)


def _make(args: argparse.Namespace, load: Callable[[], EmbeddedVideos]) -> int:
    """Write what `load()` makes of each prompt: a video, its frames in a row and a report."""
    from sdvg.models import embedded

    paths = output_paths(args.out, len(args.prompt))
    actions = _actions(args.action, args.frames).expand(len(args.prompt), -1)
    with Aside() as aside, Interrupts() as interrupts:
        files = [
            {kind: aside.create(path.with_suffix(f".{kind}")) for kind in ("mp4", "png", "json")}
            for path in paths
        ]
        videos = load()
        warn_of_prompts(embedded.WEIGHTS, args.prompt)
        writers = [VideoWriter(kinds["mp4"], fps=args.fps) for kinds in files]
        shown: list[Shown] = []
        interrupted, began = False, time.perf_counter()
        try:
            frames = videos.generate(
                args.prompt, frames=args.frames, actions=actions, seed=args.seed
            )
            for frame in tqdm(frames, total=args.frames, unit="frame"):
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
                "versions": env.versions() | {"device": str(videos.models.model.device)},
                "summary": summary,
            }
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
            kinds["json"].write_text(text + "\n", encoding="utf-8")
        aside.keep()
    for path in paths:
        print(*(path.with_suffix(suffix) for suffix in (".mp4", ".png", ".json")), sep="\n")
    together = f" of {len(paths)} videos" if len(paths) > 1 else ""
    print(
        f"{len(shown)} frames in {seconds:.2f} s: {summary['passes']} passes, "
        f"{summary['tokens_per_pass']:.1f} tokens a pass{together}, "
        f"{summary['tokens_per_second']:.0f} tokens/s"
    )
    if shown[-1].counts is not None:
        print(_stages(summary, seconds))
    if interrupted:
        print(
            f"sdvg: interrupted; {len(shown)} of {args.frames} frames were finished and are kept",
            file=sys.stderr,
        )
    return 130 if interrupted else 0


def sweep(args: argparse.Namespace) -> int:
    """Write a table of ways to decode: csv, text, plot and frames."""
    own = {"diagonal": ("modes", "k", "tuned", "row_start"), "vvs": ("methods",)}
    for table, names in own.items():
        for name in names:
            value = getattr(args, name)
            if table != args.table and value is not None:
                raise ValueError(
                    f"{name}: must be left out for the table {args.table}, got {value}"
                )
    return {"diagonal": _sweep_orders, "vvs": _sweep_methods}[args.table](args)


def _sweep_methods(args: argparse.Namespace) -> int:
    """Write the table of speculative decoding: vvs.csv, vvs.md, plot and frames."""
    from sdvg.models import embedded
    from sdvg.models.embedded import tokens
    from sdvg.models.tokens import from_transformers
    from sdvg.tokens.embedded import EmbeddedVideos

    count, frames = _size(args, 20, 4)
    table = vvs_sweep.chosen(args.methods or vvs_sweep.METHODS)
    sampling = _sampling(args)
    require_plots()
    models = _load(args, tuned=False)
    model = from_transformers(models.model)
    drafter = tokens.load_drafter(device=model.device, dtype=models.model.dtype)
    near = neighbours(codebook(models), NEAR)

    def videos(line: vvs_sweep.Line) -> EmbeddedVideos:
        how = line.options(near)
        shared: EagleDrafter | None = drafter if how["mode"] == SPECULATIVE else None
        return EmbeddedVideos(models, model, drafter=shared, sampling=sampling, **how)

    settings = _settings(args, model.device, "vq", "model", "drafter") | {
        "tree": TREE,
        "neighbours": NEAR,
    }
    try:
        done = collect(
            videos, partial(embedded.quality, stride=tokens.STRIDE), args.out / "vvs.jsonl",
            lines=table, count=count, frames=frames, seed=args.seed, settings=settings,
        )  # fmt: skip
        rows = vvs_sweep.summarise(done, table, count, frames * tokens.HEIGHT * tokens.WIDTH)
        about = _about(args, count, frames, settings)
        print(*vvs_sweep.write(args.out, rows, about), sep="\n")
    except KeyboardInterrupt:
        return interrupted_sweep(args.out / "vvs.jsonl")
    return 0


def _sweep_orders(args: argparse.Namespace) -> int:
    """Write the table of modes, k and weights: diagonal.csv, diagonal.md, plot and frames."""
    from sdvg.models import embedded
    from sdvg.models.embedded import tokens
    from sdvg.models.tokens import from_transformers
    from sdvg.tokens.embedded import EmbeddedVideos

    count, frames = _size(args, 40, tokens.FRAMES)
    modes, widths = args.modes or ORDERS, args.k or (QUICK if args.quick else WIDTHS)
    weights = {"no": (False,), "yes": (True,), "both": (False, True)}[args.tuned or "both"]
    table = lines(modes, widths, weights, tokens.WIDTH)
    if not set(modes) - set(JACOBI):
        # windows are the table's own
        for name, value in (("k", args.k), ("row_start", args.row_start)):
            if value is not None:
                raise ValueError(f"{name}: must be left out for {modes[0]}, got {value}")
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
    settings = _settings(args, device, "vq", "model", "diagonal") | {
        "row start": args.row_start or "newest"
    }
    judge = partial(embedded.quality, stride=tokens.STRIDE)
    try:
        rows = run_sweep(
            videos, judge, args.out, lines=table, count=count, frames=frames,
            tokens=tokens.HEIGHT * tokens.WIDTH, seed=args.seed, settings=settings,
        )  # fmt: skip
        about = _about(args, count, frames, settings)
        print(*write(args.out, rows, about), sep="\n")
    except KeyboardInterrupt:
        return interrupted_sweep(args.out / "diagonal.jsonl")
    return 0


def _size(args: argparse.Namespace, prompts: int, frames: int) -> tuple[int, int]:
    """Return how many prompts and frames a sweep has; those given are its table's own."""
    if args.quick:
        prompts = frames = 2
    return (
        prompts if args.prompts is None else args.prompts,
        frames if args.frames is None else args.frames,
    )


def _settings(args: argparse.Namespace, device: torch.device, *parts: str) -> dict[str, object]:
    """Return what decides a sweep's results; `parts` are the folders of its weights."""
    from sdvg.models.embedded import tokens

    return {
        "weights": digest(tokens.FOLDER, *parts),
        "sampling": dataclasses.asdict(_sampling(args)),
        "dtype": args.dtype, "torch": torch.__version__,
        "machine": env.gpu() if device.type == "cuda" else env.processor(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _about(
    args: argparse.Namespace, count: int, frames: int, settings: Mapping[str, object]
) -> str:
    from sdvg.models.embedded import tokens

    return (
        f"{count} prompts, {frames} frames of {tokens.HEIGHT * tokens.WIDTH} tokens each, seed "
        f"{args.seed}; "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
        + f". Made by `sdvg tokens sweep --table {args.table}`."
    )


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add `tokens generate | speculate | sweep` to the command line."""
    top = commands.add_parser("tokens", help="token grids, along diagonals or by speculation")
    inner = top.add_subparsers(required=True, metavar="generate | speculate | sweep")
    shared, orders, video = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    add = shared.add_argument
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add("--temperature", type=float, default=0.9, help="0 takes the likeliest token")
    add("--top-k", type=int)
    add("--top-p", type=float, default=1.0)
    add("--guidance", type=float, default=1.5)
    add("--seed", type=int, default=0)
    # the embedded model is too small for more, and threads that wait for each other slow it
    add("--threads", type=int, default=1, help="CPU threads of torch")
    orders.add_argument("--row-start", choices=("newest", "above"),
        help="what stands in for a row's end that is not there yet, default newest")  # fmt: skip
    add = video.add_argument
    add("prompt", nargs="+", help="several prompts make one batch, written to NAME-1.mp4, ...")
    add(
        "--out", type=Path, default=Path("tokens.mp4"), help="with NAME.png and NAME.json beside it"
    )
    add("--frames", type=int, default=8)
    add("--action", action="append", default=[], metavar="FRAME=DIRECTION,SPEED",
        help="turn from that frame on, as in 3=up left,quickly; may be repeated")  # fmt: skip
    add("--fps", type=int, default=4)

    new = inner.add_parser("generate", parents=[common, shared, orders, video], help="make videos")
    add = new.add_argument
    add("--mode", default="spatial", help=f"one of {', '.join((*MODES, *JACOBI))}")
    add("--k", type=int,
        help="tokens a row is behind the last, default 2; scd and sjd: window, 16")  # fmt: skip
    add("--tuned", action="store_true", help="the weights tuned for diagonal decoding")
    add("--context", type=int, help="slots of the cache; a longer video slides on")
    add("--keep", type=int, help="frames that are kept when the context slides, default 1")
    new.set_defaults(run=generate)

    new = inner.add_parser(
        "speculate", parents=[common, shared, video], help="make videos from a drafter's trees"
    )
    add = new.add_argument
    add("--verification", choices=SETTINGS, default="exact", help="default exact, as EAGLE-2")
    add("--delta", type=float, help="of lantern: total variation of a token, default 0.1")
    add("--ratio", type=float, help="of lantern++: its lambda, default 2")
    add("--epsilon", type=float, help="of typical, default 0.09")
    add("--alpha", type=float, help="of typical, default 0.3")
    add("--skip", choices=SKIPS, default="none", help="verification skipping, default none")
    add("--interval", type=int, help="of uniform: every so many steps, default 2")
    add("--threshold", type=float, help="of dynamic: similarity of paths, default 0.65")
    add("--likely", action="store_true", help="skip by the likeliest path, not by one at random")
    add("--depth", type=int, default=TREE["depth"], help="levels of a tree")
    add("--children", type=int, default=TREE["top_k"], help="of a node, and nodes that go on")
    add("--nodes", type=int, default=TREE["nodes"], help="of a tree, its root included")
    new.set_defaults(run=speculate)

    new = inner.add_parser(
        "sweep", parents=[common, shared, orders], help="passes, time and quality of many ways"
    )
    add = new.add_argument
    add("--table", choices=("diagonal", "vvs"), default="diagonal",
        help="orders of a grid, or speculative decoding; default diagonal")  # fmt: skip
    add("--out", type=Path, default=Path("tokens-sweep"), metavar="FOLDER")
    add("--modes", nargs="+", choices=KNOWN, metavar="MODE",
        help=f"of the table diagonal: of {', '.join(KNOWN)}; default: all but sjd")  # fmt: skip
    add("--k", type=int, nargs="+", help="of the diagonal orders")
    add("--tuned", choices=("no", "yes", "both"), help="which weights, default both")
    add("--methods", nargs="+", choices=vvs_sweep.METHODS, metavar="METHOD",
        help=f"of the table vvs: of {', '.join(vvs_sweep.METHODS)}; default: all")  # fmt: skip
    add("--prompts", type=int, help="default 40, vvs 20; with --quick 2")
    add("--frames", type=int, help="default 8, vvs 4; with --quick 2")
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


def _chosen(
    name: str, value: str, table: Mapping[str, Mapping[str, float]], args: argparse.Namespace
) -> dict[str, float]:
    """Return the settings of a choice, its defaults where none are given; refuse another's."""
    for other, settings in table.items():
        for setting in settings:
            given = getattr(args, setting)
            if given is not None and setting not in table[value]:
                raise ValueError(
                    f"{setting}: must be left out for {name} {value}, got {given}; it is {other}'s"
                )
    own = {setting: getattr(args, setting) for setting in table[value]}
    return {
        **table[value],
        **{setting: own[setting] for setting in own if own[setting] is not None},
    }


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
    summary = {
        "frames": len(shown),
        "sequences": batch,
        "passes": passes,
        "tokens_per_pass": tokens / passes,
        "tokens_per_second": tokens / seconds,
        "loop_seconds": shown[-1].seconds,
        "seconds": seconds,
    }
    counts, stages = shown[-1].counts, shown[-1].stages
    if counts is not None and stages is not None:
        summary |= {"drafts": counts.drafts, "skipped": counts.skipped}
        summary |= {f"{name}_seconds": spent for name, spent in stages.items()}
    return summary


def _stages(summary: Mapping[str, float | int], seconds: float) -> str:
    """Return in a line where the time of speculative decoding went."""
    draft, target = summary["draft_seconds"], summary["target_seconds"]
    return (
        f"{summary['drafts']} drafts, {summary['skipped']} steps of a video not verified; "
        f"draft {draft / seconds:.0%}, target {target / seconds:.0%}, "
        f"the rest {(seconds - draft - target) / seconds:.0%} of the time"
    )
