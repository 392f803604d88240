"""The command line: what it writes, what it says of an error, what Ctrl-C leaves."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdvg import SDVG, Reward, cli
from sdvg.cli import main
from sdvg.models import embedded
from sdvg.models.embedded import EmbeddedPair as Pair
from tests.tiny import TAU, BrightnessScorer, tiny_pair

av = pytest.importorskip("av", reason="the mp4 writer is PyAV's")

ROOT = Path(__file__).parents[2]
PROMPT = "a seven moving left"

ROUTERS = ("reward", "stride", "random", "always", "never")
PRESETS = "self_forcing, krea, krea_5, diagonal or diagonal:STEPS (5,3,3)"
COMMITS = "must be lazy, eager or recompute:FRAMES"


class Quality(NamedTuple):
    value: float


def tokenizer_folder(folder: Path) -> Path:
    """Copy the shipped tokenizer into `folder`, which has nothing else."""
    shutil.copytree(embedded.WEIGHTS / "tokenizer", folder / "tokenizer")
    return folder


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Pair], Pair]:
    """Return a function that makes the command line load a pair of our own."""
    monkeypatch.setattr(embedded, "WEIGHTS", tokenizer_folder(tmp_path / "w"), raising=False)
    monkeypatch.setattr(
        embedded, "quality", lambda frames, prompt: Quality(float(frames.mean())), raising=False
    )
    monkeypatch.chdir(tmp_path)

    def put(pair: Pair) -> Pair:
        monkeypatch.setattr(embedded, "load", lambda *_, **__: pair, raising=False)
        return pair

    return put


@pytest.fixture
def pair(give: Callable[[Pair], Pair]) -> Pair:
    return give(Pair(*tiny_pair(), BrightnessScorer()))


def generate(*arguments: str) -> int:
    return main(["generate", PROMPT, "--tau", str(TAU), "--out", "a.mp4", *arguments])


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_generate_writes_video_sheet_and_report(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--blocks", "4", "--seed", "5") == 0
    assert outputs(tmp_path) == ["a.json", "a.mp4", "a.png"]
    assert frames_in(tmp_path / "a.mp4") == 9 + 3 * 12
    report = json.loads((tmp_path / "a.json").read_text())
    loop = SDVG(*pair, Reward(TAU), drafter_cache="synced")
    video = loop.generate([PROMPT], num_blocks=4, seed=5)
    verdicts = [block.verdicts[0] for block in video]
    got = [(b["accepted"], b["score"], b["reason"]) for b in report["blocks"]]
    assert got == [(v.accepted, v.score, v.reason) for v in verdicts]
    assert report["summary"]["acceptance"] == video.summary().acceptance
    assert report["summary"]["speedup_source"] == "predicted"
    assert report["summary"]["frames"] == 45
    assert not report["interrupted"]
    assert report["arguments"]["seed"] == 5
    assert report["versions"]["torch"] == torch.__version__
    said = capsys.readouterr()
    assert said.out.splitlines()[:3] == ["a.mp4", "a.png", "a.json"]
    assert "drafts kept" in said.err


def test_compare_measures_the_speed_up(pair: Pair, tmp_path: Path) -> None:
    assert generate("--blocks", "2", "--compare") == 0
    summary = json.loads((tmp_path / "a.json").read_text())["summary"]
    assert summary["speedup_source"] == "measured"
    assert summary["speedup"] > 0


def test_several_prompts_are_one_batch_of_numbered_videos(pair: Pair, tmp_path: Path) -> None:
    texts = [PROMPT, "a seven", "left moving"]
    routed = ["--router", "random", "--accept", "0.5", "--no-force-first"]
    assert main(["generate", *texts, "--blocks", "2", "--out", "b.mp4", *routed]) == 0
    expected = [f"b-{n}.{kind}" for n in (1, 2, 3) for kind in ("json", "mp4", "png")]
    assert outputs(tmp_path) == expected
    reports = [json.loads((tmp_path / f"b-{n}.json").read_text()) for n in (1, 2, 3)]
    assert [report["prompt"] for report in reports] == texts
    assert [report["sequence"] for report in reports] == [0, 1, 2]
    assert {report["blocks"][0]["reason"] for report in reports} == {"router"}


def test_drafter_timesteps_are_the_drafters_alone(pair: Pair) -> None:
    taken: dict[str, list[float]] = {"drafter": [], "target": []}
    for name, steps in taken.items():
        model = getattr(pair, name)

        def record(
            *args: object, whole: Callable = model.denoise, steps: list = steps, **rest: object
        ) -> object:
            steps.append(args[1])
            return whole(*args, **rest)

        model.denoise = record
    options = ("--blocks", "2", "--router", "always", "--drafter-timesteps", "1000", "800")
    assert generate(*options) == 0
    assert taken["drafter"] == [1000.0, 800.0]
    assert [round(step, 1) for step in taken["target"]] == [1000.0, 937.5, 833.3, 625.0]


@pytest.mark.parametrize(
    "options",
    [
        ("--router", "stride", "--stride", "2", "--schedule", "diagonal"),
        ("--router", "always", "--commit", "recompute:3", "--schedule", "krea"),
        ("--router", "never", "--commit", "eager", "--drafter-cache", "synced"),
        ("--aggregate", "mean", "--run-ahead", "1"),
        ("--router", "stride", "--stride", "2", "--schedule", "diagonal", "--in-flight", "2"),
    ],
)
def test_every_option_reaches_the_loop(
    pair: Pair, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert generate("--blocks", "2", *options) == 0
    verdicts = [b["accepted"] for b in json.loads((tmp_path / "a.json").read_text())["blocks"]]
    expected = {"stride": [False, True], "always": [False, True], "never": [False, False]}
    assert verdicts == expected.get(options[1], verdicts)


DIAGONAL = [[1000.0, 933.0, 733.0, 357.1], [1000.0, 933.0, 357.1], [1000.0, 357.1]]
FOUR = [[1000.0, 937.5, 833.3, 625.0]] * 3


@pytest.mark.parametrize(
    ("options", "named", "drafted", "made"),
    [
        ((), ("four-step", "teacher"), FOUR, FOUR),
        (("--schedule", "diagonal"), ("diagonal", "student"), DIAGONAL, DIAGONAL),
        (("--drafter", "diagonal"), ("diagonal", "teacher"), DIAGONAL, FOUR),
        (("--target", "student"), ("four-step", "student"), FOUR, DIAGONAL),
        (
            ("--schedule", "diagonal", "--drafter", "four-step"),
            ("four-step", "student"), FOUR, DIAGONAL,
        ),
        (
            ("--schedule", "diagonal:3,2", "--target", "teacher"),
            ("diagonal", "teacher"),
            [[1000.0, 933.0, 357.1]] + [[1000.0, 357.1]] * 2,
            [[1000.0, 933.0, 357.1]] + [[1000.0, 357.1]] * 2,
        ),
        (
            ("--drafter", "diagonal", "--drafter-timesteps", "900", "500"),
            ("diagonal", "teacher"), [[900.0, 500.0]] * 3, FOUR,
        ),
        (("--drafter", "models/mine"), (Path("models/mine"), "teacher"), [[1000.0]] * 3, FOUR),
    ],
)  # fmt: skip
def test_diagonal_models_come_with_their_schedule(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    named: tuple[object, ...],
    drafted: list[list[float]],
    made: list[list[float]],
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    told = {"timesteps": [[1000]], "clean_pass": False, "forcing": False, "flow": 0}
    (tmp_path / "models" / "mine" / "distillation.json").write_text(json.dumps(told))
    asked: dict[str, object] = {}

    def load(_: object, **given: object) -> Pair:
        asked.update(given)
        return pair

    monkeypatch.setattr(embedded, "load", load)
    taken: dict[str, list[list[float]]] = {"drafter": [], "target": []}
    for name, blocks in taken.items():
        model = getattr(pair, name)

        def record(
            *args: object, whole: Callable = model.denoise, blocks: list = blocks, **rest: object
        ) -> object:
            # a block begins anew
            if rest["start_frame"] == 3 * len(blocks):
                blocks.append([])
            blocks[-1].append(round(args[1], 1))
            return whole(*args, **rest)

        model.denoise = record
    both = ("--blocks", "3", "--router", "never", "--drafter-cache", "own")
    assert generate(*both, *options) == 0
    assert (asked["drafter"], asked["target"]) == named
    assert taken == {"drafter": drafted, "target": made}
    models = json.loads((tmp_path / "a.json").read_text())["models"]
    assert (models["drafter"], models["target"]) == tuple(map(str, named))
    first = " ".join(f"{step:g}" for step in drafted[0])[:8]
    assert models["drafter schedule"].startswith(first)
    assert models["schedule"].endswith("no clean pass" if made != FOUR else "a clean pass")


def test_unknown_words_are_named_and_generated_anyway(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a purple seven, purple left", "--blocks", "1", "--out", "c.mp4"]) == 0
    warning, *_ = capsys.readouterr().err.splitlines()
    assert warning == (
        "sdvg: warning: the models do not know purple; they know digits, directions and speeds"
    )
    assert frames_in(tmp_path / "c.mp4") == 9


def test_a_prompt_without_a_word_is_warned_of(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "!!!", "--blocks", "1"]) == 0
    warning, *_ = capsys.readouterr().err.splitlines()
    assert warning == (
        "sdvg: warning: the models do not know '!!!'; they know digits, directions and speeds"
    )


def test_prompts_that_are_cut_are_named(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    # 23 words and the end token fit
    whole, cut = " ".join(["seven"] * 23), " ".join(["seven"] * 30)
    assert main(["generate", whole, cut, "--blocks", "1"]) == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == ("sdvg: warning: the models read a prompt's first 24 tokens; prompt 2 has 31")
    assert "warning" not in second


def test_a_negative_infinity_keeps_every_draft(pair: Pair, tmp_path: Path) -> None:
    assert main(["generate", PROMPT, "--blocks", "3", "--tau=-inf", "--out", "a.mp4"]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [block["accepted"] for block in report["blocks"]] == [False, True, True]


def refuse(capsys: pytest.CaptureFixture[str], folder: Path, run: Callable[[], int]) -> str:
    """Return an error's sentence, after checking that it came with code 2 and left no file."""
    before = outputs(folder)
    try:
        code = run()
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in said.err
    assert outputs(folder) == before
    lines = [line for line in said.err.replace("\r", "\n").splitlines() if line]
    # the bar of a run that had begun comes first
    assert all("block" in line for line in lines[:-1])
    return lines[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--tau nan", "router: tau must be a number, got nan"),
        ("--blocks 0", "num_blocks must be at least 1, got 0"),
        ("--router random --accept 1.5", "router: accept must lie in [0, 1], got 1.5"),
        ("--router best", f"router: must be one of {', '.join(ROUTERS)}, got 'best'"),
        ("--schedule fast", f"schedule: preset must be one of {PRESETS}, got 'fast'"),
        ("--drafter x", "drafter: must be four-step, diagonal, or a folder, got 'x'"),
        ("--drafter=", "drafter: must be four-step, diagonal, or a folder, got ''"),
        ("--target 4", "target: must be teacher, student, or a folder, got '4'"),
        ("--commit late", f"commit: {COMMITS}, got 'late'"),
        ("--commit recompute:x", f"commit: {COMMITS}, got 'recompute:x'"),
        ("--device gpu", "device: must be cpu, cuda, cuda:1, ..., got 'gpu'"),
        ("--in-flight 0", "in_flight must be at least 1, got 0"),
        ("--threads 0", "threads: must be at least 1, got 0"),
        ("--fps 0", "video: fps must be at least 1, got 0"),
        ("--out a.gif", "output: --out must end in .mp4, got a.gif"),
        ("--out no/a.mp4", "output: the folder no does not exist; create it first"),
    ],
)
def test_bad_option_is_one_sentence_and_code_2(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, sentence: str
) -> None:
    command = ["generate", PROMPT, *options.split()]
    assert refuse(capsys, tmp_path, lambda: main(command)) == f"sdvg: {sentence}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((" ",), "sdvg: a prompt must not be empty, got ' '"),
        ((), "sdvg generate: the following arguments are required: prompt"),
        ((PROMPT, "--blocks", "x"), "sdvg generate: argument --blocks: invalid int value: 'x'"),
    ],
)
def test_bad_argument_is_one_sentence_and_code_2(
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    sentence: str,
) -> None:
    assert refuse(capsys, tmp_path, lambda: main(["generate", *arguments])) == sentence


def test_path_that_cannot_be_written_is_named(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").mkdir()
    said = refuse(capsys, tmp_path, generate)
    assert said == "sdvg: output: a.mp4 cannot be written: it is a folder"


def test_latent_shapes_that_differ_are_named(
    give: Callable[[Pair], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafter, target, decoder = tiny_pair()
    drafter.block_shape = (3, 4, 8, 8)
    give(Pair(drafter, target, decoder, BrightnessScorer()))
    assert refuse(capsys, tmp_path, generate) == (
        "sdvg: drafter and target must share one latent block shape [F, C, h, w], "
        "got [3, 4, 8, 8] and [3, 4, 4, 4]"
    )


@pytest.mark.parametrize(("side", "stage"), [("drafter", "draft"), ("target", "target")])
def test_nan_is_reported_with_block_and_stage(
    give: Callable[[Pair], Pair],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
    stage: str,
) -> None:
    pair = give(Pair(*tiny_pair(), BrightnessScorer()))
    model = getattr(pair, side)
    whole = model.denoise

    def break_at_two(
        latents: Tensor, timestep: float, *, start_frame: int, **rest: object
    ) -> Tensor:
        out = whole(latents, timestep, start_frame=start_frame, **rest)
        return out * float("nan") if start_frame == 6 else out

    model.denoise = break_at_two
    said = refuse(capsys, tmp_path, lambda: generate("--tau", "1e9"))
    assert said == f"sdvg: the {side} returned values that are not finite at block 2, stage {stage}"


def test_decoder_that_returns_nan_is_reported(
    give: Callable[[Pair], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = give(Pair(*tiny_pair(), BrightnessScorer()))
    pair.decoder.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    assert "finite" in refuse(capsys, tmp_path, generate)


def test_scorer_that_raises_is_reported_with_its_block(
    give: Callable[[Pair], Pair], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scorer(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("no such prompt")

    give(Pair(*tiny_pair(), scorer))
    said = refuse(capsys, tmp_path, generate)
    assert said == "sdvg: the scorer failed at block 1: 'no such prompt'"


def spoilt_weights(folder: Path) -> Path:
    """Link the shipped weights into `folder`, and return the path of the target's, left out."""
    for path in embedded.WEIGHTS.rglob("*"):
        copy = folder / path.relative_to(embedded.WEIGHTS)
        if path.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    spoilt = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    spoilt.unlink()
    return spoilt


@pytest.mark.parametrize("how", ["truncated", "mismatched", "missing"])
def test_spoilt_weights_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    spoilt = spoilt_weights(tmp_path / "w")
    whole = embedded.WEIGHTS / "transformer" / spoilt.name
    if how == "truncated":
        spoilt.write_bytes(whole.read_bytes()[:-1000])
    elif how == "mismatched":
        spoilt.symlink_to(embedded.WEIGHTS / "drafter" / spoilt.name)
    command = ["generate", PROMPT, "--weights", str(tmp_path / "w")]
    said = refuse(capsys, tmp_path, lambda: main([*command, "--out", str(tmp_path / "a.mp4")]))
    assert said.startswith("sdvg: embedded: ")
    assert str(spoilt) in said


def test_gpu_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert refuse(capsys, tmp_path, lambda: generate("--device", "cuda")) == (
        "sdvg: device: cuda needs a GPU and a CUDA build of torch, got none"
    )


def test_debug_shows_the_traceback(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--blocks", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_failure_leaves_the_older_files(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"an older video")
    refuse(capsys, tmp_path, lambda: generate("--blocks", "0"))
    assert (tmp_path / "a.mp4").read_bytes() == b"an older video"


SLOW = """
import sys, time
from pathlib import Path
import torch
from sdvg.cli import main
from sdvg.models import embedded
from tests.loop.test_cli import Pair, tokenizer_folder
from tests.tiny import BrightnessScorer, tiny_pair

torch.set_num_threads(1)
pair = Pair(*tiny_pair(), BrightnessScorer())
denoise = pair.target.denoise

def slowly(*arguments, **options):
    time.sleep(0.3)
    return denoise(*arguments, **options)

pair.target.denoise = slowly
embedded.load = lambda *_, **__: pair
embedded.WEIGHTS = tokenizer_folder(Path("w"))
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_keeps_the_finished_blocks_playable(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        SLOW,
        "generate",
        PROMPT,
        "--router",
        "never",
        "--out",
        "a.mp4",
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )
    partial, deadline = tmp_path / "a.mp4.partial", time.monotonic() + 120
    seen = 0
    # the second block has begun to show: the file grows while the run goes on
    while seen <= 9 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        try:
            seen = frames_in(partial)
        except (OSError, ValueError):
            continue
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert outputs(tmp_path) == ["a.json", "a.mp4", "a.png"]
    report = json.loads((tmp_path / "a.json").read_text())
    blocks = len(report["blocks"])
    assert 2 <= blocks < 9
    assert report["interrupted"]
    assert report["summary"]["blocks"] == blocks
    assert frames_in(tmp_path / "a.mp4") == 9 + 12 * (blocks - 1)
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert last == f"sdvg: interrupted; {blocks} of 9 blocks were finished and are kept"


def test_ctrl_c_before_the_first_block_leaves_nothing(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(1)

    monkeypatch.setattr(pair.target, "denoise", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert generate() == 130
    assert outputs(tmp_path) == []
    assert "sdvg: interrupted; nothing was written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_env_names_what_serves_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["ops"]) >= {"attention", "cache", "verify"}
    for op, choices in facts["ops"].items():
        serving = next(name for name, reason in choices.items() if not reason)
        assert any(line.split() == [op, serving] for line in text.splitlines())
        # every other one says why not
        assert all(f"not {name}: " in text for name in choices if name != serving)


def test_sweep_command_writes_its_files_and_goes_on(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot is matplotlib's")
    arguments = ["sweep", "--out", "s", "--prompts", "1", "--blocks", "1", "--quick"]
    assert main(arguments) == 0
    with (tmp_path / "s" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["target", "draft", "reward", "reward", "reward", "reward-mean", "random"]
    assert [row["method"] for row in rows] == [*names, "random-free-first"]
    stored = (tmp_path / "s" / "videos.jsonl").read_text()
    assert main(arguments) == 0
    assert (tmp_path / "s" / "videos.jsonl").read_text() == stored
    capsys.readouterr()
    code = main([*arguments[:-1], "--quick", "--seed", "3"])
    assert code == 2
    assert "was made with another seed" in capsys.readouterr().err


def test_a_sweep_of_a_diagonal_drafter_is_held_against_another_front(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot is matplotlib's")
    arguments = ["sweep", "--prompts", "1", "--blocks", "1", "--quick"]
    assert main([*arguments, "--out", "old"]) == 0
    assert "2.6x" not in (tmp_path / "old" / "table.md").read_text()
    arguments += ["--drafter", "diagonal"]
    against = ["--against", "old/sweep.csv"]
    assert main([*arguments, "--out", "new", *against]) == 0
    table = (tmp_path / "new" / "table.md").read_text()
    assert "drafter diagonal, target teacher, schedule 1000 937.5 833.333 625, a clean" in table
    assert "drafter schedule 1000 933 733 357.143 | 1000 933 357.143 | 1000 357.143, no cl" in table
    assert table.count("95.7% of target-only quality at 2.6x or more") == 2
    # this repository's own front is the default
    assert main([*arguments, "--out", "new"]) == 0
    assert table != (tmp_path / "new" / "table.md").read_text()
    # another target is not held against it
    assert main([*arguments, "--out", "other", "--target", "student"]) == 0
    assert "2.6x" not in (tmp_path / "other" / "table.md").read_text()
    capsys.readouterr()
    for options, said in (
        (["--out", "old", *against], "against: old/sweep.csv must not be overwritten"),
        (["--out", "c", "--against", "no.csv"], "no.csv must be a sweep's sweep.csv, got FileN"),
        (["--out", "old"], "was made with another drafter, drafter schedule"),
    ):
        assert main([*arguments, *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("where", ["_load", "run_sweep", "write_sweep"])
def test_ctrl_c_in_a_sweep_says_what_is_kept(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """While it loaded or wrote, it once said that nothing was written."""
    pytest.importorskip("matplotlib", reason="the plot is matplotlib's")
    arguments = ["sweep", "--out", "s", "--prompts", "1", "--blocks", "1", "--quick"]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    assert main(arguments) == 0
    capsys.readouterr()
    monkeypatch.setattr(cli, where, interrupt)
    assert main(arguments) == 130
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last == (
        f"sdvg: interrupted; the finished videos are kept in {Path('s', 'videos.jsonl')}, "
        "and the same command goes on from there"
    )


@pytest.mark.parametrize("stored", ["", '{"settings": {}}\n'], ids=["nothing", "settings"])
def test_ctrl_c_in_a_sweep_without_a_video_says_so(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stored: str,
) -> None:
    def interrupt(*_: object) -> None:
        (tmp_path / "s" / "videos.jsonl").write_text(stored)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_load", interrupt)
    assert main(["sweep", "--out", "s", "--quick"]) == 130
    assert capsys.readouterr().err == "sdvg: interrupted; nothing was written\n"


def test_help_of_every_command_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "sweep", "env"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert "--debug" in capsys.readouterr().out
