"""The command line, `sdvg generate | sweep | tokens | ...`; an error is a sentence, exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from tqdm import tqdm

from sdvg import bench, distill_report, env
from sdvg import distill_sweep as distill
from sdvg.commit import policy
from sdvg.console import (
    Choice,
    Interrupts,
    asked,
    choose,
    interrupted_sweep,
    output_paths,
    prepare,
    warn_of_prompts,
)
from sdvg.engine import SDVG, Generation
from sdvg.report import Recording, sentence
from sdvg.router import Always, Never, Random, Reward, Stride
from sdvg.sweep import MEAN_THRESHOLDS, PROBABILITIES, QUICK, THRESHOLDS, Row, digest, methods
from sdvg.sweep import read as read_sweep
from sdvg.sweep import sweep as run_sweep
from sdvg.sweep import write as write_sweep
from sdvg.token_cli import add_commands as add_token_commands
from sdvg.types import CausalModel, Decoder, Router
from sdvg.video import Aside

if TYPE_CHECKING:
    from sdvg.models.embedded import EmbeddedPair
    from sdvg.models.vae import StreamingVAE

DTYPES = ("float32", "bfloat16", "float16", "float64")
EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 for an error (one sentence on stderr), 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("sdvg: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(_one_sentence(error), file=sys.stderr)
        return 2


def generate(args: argparse.Namespace) -> int:
    """Make one video for each prompt, with sheet and report; Ctrl-C keeps the finished blocks."""
    from sdvg.models import embedded

    router, choice, commit = _router(args), choose(args), policy(args.commit)
    ahead = args.run_ahead or args.in_flight != 1
    args.drafter_cache = args.drafter_cache or ("own" if ahead else "synced")
    paths = output_paths(args.out, len(args.prompt))
    with Aside() as aside, Interrupts() as interrupts:
        recordings = [
            Recording(aside, path, prompt=prompt, sequence=row, fps=args.fps)
            for row, (path, prompt) in enumerate(zip(paths, args.prompt, strict=True))
        ]
        pair = _load(args, choice)
        warn_of_prompts(args.weights or embedded.WEIGHTS, args.prompt)
        loop = SDVG(
            pair.drafter, pair.target, pair.decoder, pair.scorer, router,
            schedule=choice.schedule, force_first=args.force_first, commit=commit,
            drafter_schedule=choice.drafter_schedule,
            drafter_cache=args.drafter_cache, run_ahead=args.run_ahead, in_flight=args.in_flight,
        )  # fmt: skip
        alone = SDVG(None, pair.target, pair.decoder, schedule=choice.schedule, commit=commit)
        if args.compare:
            # what a first call costs (kernels compiled, memory taken) belongs to neither side
            for side in (loop, alone):
                list(side.generate(args.prompt, num_blocks=min(2, args.blocks), seed=args.seed))
        video = loop.generate(args.prompt, num_blocks=args.blocks, seed=args.seed)
        interrupted, target_only = False, None
        try:
            _record(video, recordings, interrupts)
            if args.compare:
                other = alone.generate(args.prompt, num_blocks=args.blocks, seed=args.seed)
                list(tqdm(other, "target only", total=args.blocks, unit="block"))
                target_only = other.summary().total
        except KeyboardInterrupt:
            interrupted = True
        # what is finished is written out, however often Ctrl-C is pressed
        interrupts.ignore()
        blocks = recordings[0].blocks
        if not blocks:
            raise KeyboardInterrupt
        stats = video.summary(target_only)
        versions = env.versions() | {
            "device": str(pair.target.device),
            "decoder dtype": str(pair.decoder.dtype).removeprefix("torch."),
        }
        for recording in recordings:
            recording.finish(
                stats, interrupted=interrupted, models=choice.told(), arguments=asked(args),
                versions=versions,
            )  # fmt: skip
        aside.keep()
    for recording in recordings:
        print(*recording.files.values(), sep="\n")
    print(sentence(stats))
    if interrupted:
        print(
            f"sdvg: interrupted; {blocks} of {args.blocks} blocks were finished and are kept",
            file=sys.stderr,
        )
    return 130 if interrupted else 0


def bench_loop(args: argparse.Namespace) -> int:
    """Measure the loop on random Wan models, each row as soon as it is there."""
    tiny = args.models == "tiny"
    cpu = args.device == "cpu"
    if not tiny and cpu:
        raise ValueError("bench: Wan's sizes need a GPU, got cpu; --models tiny runs anywhere")
    if any(not 0 <= share <= 1 for share in args.acceptance):
        raise ValueError(f"bench: acceptance must lie in [0, 1], got {args.acceptance}")
    parts = bench.random_wan(
        args.drafter or ("tiny" if tiny else "1.3B"), args.target or ("tiny" if tiny else "14B"),
        height=args.height or (32 if tiny else 480), width=args.width or (32 if tiny else 832),
        window_frames=args.window, sink_frames=args.sink, device=args.device,
        dtype=torch.float32 if cpu else torch.bfloat16,
    )  # fmt: skip
    rows = []
    settings = {
        "variants": args.variants, "acceptances": args.acceptance, "blocks": args.blocks,
        "schedule": args.schedule, "in_flight": args.in_flight,
    }  # fmt: skip
    interrupted = False
    with Aside() as aside:
        # before minutes of measuring, not after
        out = None if args.out is None else aside.create(args.out)
        try:
            for row in bench.measure(parts, **settings):
                rows.append(row)
                print(bench.table([row]).splitlines()[-1], file=sys.stderr)
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True
        print(bench.table(rows))
        if out is not None:
            bench.write(out, rows)
        aside.keep()
    if interrupted:
        print(f"sdvg: interrupted; {len(rows)} rows were measured and are kept", file=sys.stderr)
    return 130 if interrupted else 0


def show_env(args: argparse.Namespace) -> int:
    """Print the versions, the GPU, the extension, and what serves each op."""
    print(json.dumps(env.environment(), indent=2) if args.json else env.describe())
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Reproduce the paper's Table 1: sweep.csv, table.md, Pareto plot; goes on where it stopped."""
    from sdvg.models import embedded

    if args.table == "distill":
        return sweep_distilled(args)
    if args.students is not None:
        raise ValueError(f"students: must come with --table distill, got {args.students}")
    choice = choose(args)
    grids = QUICK if args.quick else (THRESHOLDS, MEAN_THRESHOLDS, PROBABILITIES)
    asked = (args.thresholds, args.mean_thresholds, args.accept)
    lines = methods(*(grid if own is None else own for own, grid in zip(asked, grids, strict=True)))
    older = _older(args, choice)
    args.drafter_cache = args.drafter_cache or "synced"
    count = (8 if args.quick else 100) if args.prompts is None else args.prompts
    options = {
        "schedule": choice.schedule, "drafter_schedule": choice.drafter_schedule,
        "commit": policy(args.commit), "drafter_cache": args.drafter_cache,
    }  # fmt: skip
    _make_folder(args.out)
    try:
        pair = _load(args, choice)
        folder = args.weights or embedded.WEIGHTS
        outside = [digest(part) for part in choice[:2] if isinstance(part, Path)]
        used = embedded.parts(choice.drafter, choice.target)
        settings = {
            "weights": " ".join([digest(folder, *used), *outside]), **choice.told(),
            "commit": args.commit, "drafter cache": args.drafter_cache,
            **_machine(args, pair.decoder, pair.target.device),
        }  # fmt: skip
        rows = run_sweep(
            pair, embedded.quality, args.out, lines=lines, count=count, blocks=args.blocks,
            seed=args.seed, settings=settings, **options,
        )  # fmt: skip
        about = (
            f"{count} prompts, {args.blocks} blocks each, seed {args.seed}; "
            + ", ".join(f"{name} {value}" for name, value in settings.items())
            + ". Made by `sdvg sweep`."
        )
        print(*write_sweep(args.out, rows, lines, about, older), sep="\n")
    except KeyboardInterrupt:
        return interrupted_sweep(args.out / "videos.jsonl")
    return 0


def sweep_distilled(args: argparse.Namespace) -> int:
    """Compare distilled models with their teacher: two tables and plots, frames side by side."""
    from sdvg.models import embedded

    routes = (
        "schedule", "drafter", "target", "drafter_timesteps", "drafter_cache", "thresholds",
        "mean_thresholds", "accept", "against",
    )  # fmt: skip
    for name in routes:
        if (given := getattr(args, name)) is not None:
            raise ValueError(f"{name}: must be left out for the table distill, got {given}")
    folder = args.weights or embedded.WEIGHTS
    lines, missing = distill.lines(folder, args.students or folder / "diagonal")
    device = prepare(args)
    count = (4 if args.quick else 100) if args.prompts is None else args.prompts
    long, longest = min(count, 2 if args.quick else 40), 10 if args.quick else distill.LONG
    _make_folder(args.out)

    def models(line: distill.Line) -> tuple[CausalModel, Decoder]:
        pair = embedded.load(
            folder, target=line.folder or "teacher", device=device,
            dtype=getattr(torch, args.dtype),
        )  # fmt: skip
        return pair.target, pair.decoder

    try:
        shared = [part for part in embedded.parts() if part not in embedded.DRAFTERS.values()]
        settings = {
            "weights": digest(folder, *shared), **_machine(args, models(lines[0])[1], device)
        }  # fmt: skip
        options = {"seed": args.seed, "settings": settings}
        short = (models, embedded.quality, args.out)
        videos = distill.collect(*short, lines, count=count, blocks=args.blocks, **options)
        along = [line for line in lines if line.run in ("student", "no-forcing")]
        along = [lines[0], *(line for line in along if line.in_flight == 1)]
        found = distill.collect_long(*short, along, count=long, blocks=longest, **options)
        about = (
            f"{count} prompts, {args.blocks} blocks each, {long} of {longest} blocks, seed "
            f"{args.seed}; " + ", ".join(f"{name} {value}" for name, value in settings.items())
            + "; " + ", ".join(line.key for line in lines)
            + ". Made by `sdvg sweep --table distill`."
        )  # fmt: skip
        rows = distill.summarise(videos, lines, count)
        parts = distill.summarise_long(found, along, long)
        print(*distill_report.write(args.out, rows, parts, videos, missing, about), sep="\n")
    except KeyboardInterrupt:
        return interrupted_sweep(args.out / "distill.jsonl")
    return 0


def _older(args: argparse.Namespace, choice: Choice) -> list[Row] | None:
    """Return the rows of another drafter's sweep to compare with; None: nothing is compared."""
    path = args.against
    if path is None:
        # other targets are other wholes
        if choice.drafter == "four-step" or choice.target != "teacher":
            return None
        # of a checkout; an installed package has no results
        path = Path(__file__).parents[2] / "benchmarks" / "results" / "digits" / "sweep.csv"
        if not path.is_file():
            print("sdvg: no other front was given (--against FILE)", file=sys.stderr)
            return []
    if path.resolve() == (args.out / "sweep.csv").resolve():
        raise ValueError(f"against: {path} must not be overwritten; give another --out")
    return read_sweep(path)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {out} cannot be made: {error.strerror.lower()}") from error


def _machine(
    args: argparse.Namespace, decoder: StreamingVAE, device: torch.device | str
) -> dict[str, object]:
    """Return what of the machine decides a result."""
    return {
        "dtype": args.dtype,
        "decoder dtype": str(decoder.dtype).removeprefix("torch."),
        "machine": env.gpu() if torch.device(device).type == "cuda" else env.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _record(video: Generation, recordings: list[Recording], interrupts: Interrupts) -> None:
    """Drive `video` to its end, each finished block into the recordings."""
    accepted = decided = 0
    with tqdm(total=video.num_blocks, unit="block", desc="generate") as bar:
        for block in video:
            # a block is in every file or in none
            with interrupts.held():
                for recording in recordings:
                    recording.add(block)
                routed = [v.accepted for v in block.verdicts if v.reason == "router"]
                accepted, decided = accepted + sum(routed), decided + len(routed)
                if decided:
                    bar.set_postfix_str(
                        f"{accepted} of {decided} drafts kept, {accepted / decided:.0%}",
                        refresh=False,
                    )
                bar.update()


def _router(args: argparse.Namespace) -> Router:
    routers = {
        "reward": lambda: Reward(args.tau, args.aggregate),
        "stride": lambda: Stride(args.stride),
        "random": lambda: Random(args.accept),
        "always": Always,
        "never": Never,
    }
    if args.router not in routers:
        raise ValueError(f"router: must be one of {', '.join(routers)}, got {args.router!r}")
    return routers[args.router]()


def _load(args: argparse.Namespace, choice: Choice) -> EmbeddedPair:
    from sdvg.models import embedded

    device = prepare(args)
    return embedded.load(
        args.weights, drafter=choice.drafter, target=choice.target, device=device,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip


def _one_sentence(error: Exception) -> str:
    """Return what went wrong in one line."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    line = text.splitlines()[0] if text else "no message"
    if not isinstance(error, EXPECTED):
        line = f"{type(error).__name__}: {line} (--debug shows the traceback)"
    return line if line.startswith("sdvg") else f"sdvg: {line}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leave with one sentence and exit code 2, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = _Parser("sdvg", description="Video generation by speculation: draft, score, repair.")
    commands = top.add_subparsers(required=True, metavar="generate | sweep | tokens | bench | env")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    models = argparse.ArgumentParser(add_help=False)
    add = models.add_argument
    add("--weights", type=Path, metavar="FOLDER", help="default: the embedded models")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", choices=DTYPES, default="float32")
    add("--schedule", help="the steps: self_forcing (default), krea, krea_5, diagonal, or "
        "diagonal:5,3,3 with steps of one's own; diagonal takes the distilled models")  # fmt: skip
    add("--drafter", metavar="four-step | diagonal | FOLDER",
        help="diagonal: distilled for that schedule; a folder holds a transformer")  # fmt: skip
    add("--target", metavar="teacher | student | FOLDER", help="student: distilled, too")
    add("--commit", default="lazy", help="lazy, eager or recompute:FRAMES")
    add("--drafter-timesteps", type=float, nargs="+", metavar="T",
        help="the drafter's steps, falling within [0, 1000]; default: of its schedule")  # fmt: skip
    add("--drafter-cache", metavar="own | synced",
        help="what drafts go on from: synced, the final blocks (default), or own, the drafter's "
        "own, as in the paper (with --run-ahead and --in-flight, which need it)")  # fmt: skip
    add("--blocks", type=int, default=9)
    add("--seed", type=int, default=0)
    # the embedded models are too small for more, and threads that wait for each other slow them
    add("--threads", type=int, default=1, help="CPU threads of torch")

    new = commands.add_parser("generate", parents=[common, models], help="make videos")
    add = new.add_argument
    add("prompt", nargs="+", help="several prompts make one batch, written to NAME-1.mp4, ...")
    add("--out", type=Path, default=Path("sdvg.mp4"), help="with NAME.png and NAME.json beside it")
    add("--router", default="reward", help="reward, stride, random, always or never")
    add("--tau", type=float, default=-0.7,
        help="reward: keep a draft that scores this or more; --tau=-inf keeps all")  # fmt: skip
    add("--aggregate", default="min", help="reward: min (worst frame) or mean")
    add("--stride", type=int, default=3, help="stride: the target makes every such block")
    add("--accept", type=float, default=0.7, help="random: the probability to keep a draft")
    add("--force-first", action=argparse.BooleanOptionalAction, default=True,
        help="block 0 is always the target's")  # fmt: skip
    add("--run-ahead", type=int, default=0, help="blocks that drafts may be ahead of the verdicts")
    add("--in-flight", type=int, default=1,
        help="drafts made side by side in one forward: 2, the same video to rounding, in fewer "
        "forwards; more, another video")  # fmt: skip
    add("--fps", type=int, default=16)
    add("--compare", action="store_true", help="also run the target alone: a measured speed-up")
    new.set_defaults(run=generate)

    new = commands.add_parser("sweep", parents=[common, models], help="quality against speed")
    add = new.add_argument
    add("--table", choices=("routes", "distill"), default="routes",
        help="ways to route drafts, or what distilled models keep of their teacher")  # fmt: skip
    add("--students", type=Path, metavar="FOLDER",
        help="of the table distill: runs of sdvg.train.diagonal_distill, a folder each: "
        f"{', '.join(distill.RUNS)}; default: the shipped student alone")  # fmt: skip
    add("--out", type=Path, default=Path("sweep"), metavar="FOLDER")
    add("--prompts", type=int, help="default 100; with --quick 8, of the table distill 4")
    add("--quick", action="store_true", help="few prompts and thresholds")
    add("--thresholds", type=float, nargs="+", metavar="TAU", help="of the worst frame")
    add("--mean-thresholds", type=float, nargs="+", metavar="TAU", help="of the mean frame")
    add("--accept", type=float, nargs="+", metavar="P", help="probabilities of random routing")
    add("--against", type=Path, metavar="FILE",
        help="the sweep.csv of another drafter, into the same plot; default with a distilled "
        "drafter: the one of this repository")  # fmt: skip
    new.set_defaults(run=sweep)

    add_token_commands(commands, common)

    new = commands.add_parser("bench", parents=[common], help="what the loop costs")
    add = new.add_argument
    add("what", choices=["loop"], nargs="?", default="loop")
    add(
        "--models", choices=["wan", "tiny"], default="wan", help="tiny: for a machine without a GPU"
    )
    add("--weights", choices=["random"], default="random")
    add("--drafter", metavar="1.3B | 14B", help="default: 1.3B")
    add("--target", metavar="1.3B | 14B", help="default: 14B")
    add("--variants", nargs="+", default=bench.VARIANTS, help=", ".join(bench.VARIANTS))
    add("--acceptance", type=float, nargs="+", default=bench.ACCEPTANCES, metavar="SHARE")
    add("--blocks", type=int, default=9)
    add("--height", type=int, help="default: 480, tiny 32")
    add("--width", type=int, help="default: 832, tiny 32")
    add("--window", type=int, default=6, help="latent frames that a block sees, itself included")
    add("--sink", type=int, default=0, help="first latent frames, which every block sees")
    add("--schedule", default="self_forcing", help="self_forcing, krea, krea_5 or diagonal:4,3,2")
    add("--in-flight", type=int, default=1, help="blocks of one model in one forward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="also write the rows there, as CSV")
    new.set_defaults(run=bench_loop)

    new = commands.add_parser("env", parents=[common], help="versions and what serves each op")
    new.add_argument("--json", action="store_true")
    new.set_defaults(run=show_env)
    return top


if __name__ == "__main__":
    sys.exit(main())
