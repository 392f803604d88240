"""The drafter's training shows it what drafting will, and its one command makes a loadable file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
pytest.importorskip("transformers", reason="the model is a transformers class")
pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

from sdvg.models.drafter import EagleDrafter
from sdvg.models.embedded import tokens as embedded
from sdvg.models.llama import LlamaSizes
from sdvg.models.tokens import TokenLlama
from sdvg.train import drafter as train


def test_training_unrolls_what_drafting_feeds() -> None:
    torch.manual_seed(0)
    target = TokenLlama(LlamaSizes(1, 32, 4, 2, 8, 24, 17)).double().eval()
    drafter = EagleDrafter(LlamaSizes(1, 32, 4, 2, 8, 24, 17)).double().eval()
    ids = torch.randint(17, (2, 12))
    shown = train.show(target, ids)
    roots = torch.tensor([[1, 4, 8], [2, 6, 7]])
    made = train.unroll(drafter, shown, target.angles(12), roots, 2)
    assert [part.shape[1] for part in made] == [11, 3, 3]
    # a root at a time: its whole past, then its drafts one by one
    for b in range(2):
        for r, root in enumerate(roots[b].tolist()):
            cache = drafter.new_cache(target, 1, 12)
            for slot in range(1, root + 3):
                at = torch.tensor([[slot]], dtype=torch.int32)
                # behind the root, what was drafted last
                if slot <= root:
                    given = shown.features[b : b + 1, slot - 1 : slot]
                given = drafter.feed(
                    shown.embedded[b : b + 1, slot : slot + 1], given, at, at, at[0],
                    torch.ones(1, 1, 1, dtype=torch.int32), cache,
                )  # fmt: skip
                expected = made[0][b, slot - 1] if slot <= root else made[slot - root][b, r]
                torch.testing.assert_close(given[0, 0], expected)


def test_only_what_a_code_follows_counts() -> None:
    torch.manual_seed(1)
    target = TokenLlama(LlamaSizes(1, 32, 4, 2, 8, 24, 17)).eval()
    wanted = torch.randn(2, 5, 32)
    follows = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    # right where it counts, anything elsewhere
    made = torch.where(follows[..., None], wanted, torch.nan)
    parts = train.distil(target, 11, made, wanted, follows)
    assert parts["feature"] == 0
    torch.testing.assert_close(parts["accepted"], torch.tensor(1.0))
    chances = target.logits(wanted[follows])[:, :11].softmax(-1)
    entropy = -(chances * chances.log()).sum(-1).mean()
    torch.testing.assert_close(parts["head"], entropy)


def test_one_command_makes_a_drafter_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "PHASES", ((1.0, 1, 2),))
    monkeypatch.setattr(train, "FRAMES", 2)
    monkeypatch.setattr(train, "ROOTS", 8)
    monkeypatch.setattr(train, "HELD_OUT", 1)
    out, runs = tmp_path / "out", tmp_path / "runs"
    options = ["--runs", str(runs), "--steps", "20", "--threads", "1"]
    train.main(["--out", str(out), *options])
    for name in ("config.json", "model.safetensors"):
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / name).symlink_to(embedded.FOLDER / "model" / name)
    drafter = embedded.load_drafter(out, dtype=torch.float64)
    assert drafter.fc.weight.dtype == torch.float64
    assert not drafter.fc.weight.requires_grad
    log = (out / "training" / "tokens-drafter.csv").read_text().splitlines()
    assert log[0] == "step,seconds,lr,loss,feature,head,accepted,accepted_1,accepted_2"
    assert len(log) == 2
    with (out / "training" / "tokens-drafter-grade.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["depth"]) for row in rows] == [0, 1, 2, 3, 4]
    assert all(0 <= float(row["top1"]) <= float(row["top4"]) <= 1 for row in rows)
    # a finished run has nothing to go on with: the same weights again
    again = tmp_path / "again"
    train.main(["--out", str(again), *options, "--resume"])
    assert (again / embedded.DRAFTER).read_bytes() == (out / embedded.DRAFTER).read_bytes()


def test_a_broken_file_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model/config\.json, which is missing"):
        embedded.load_drafter(tmp_path)
    (tmp_path / "model").symlink_to(embedded.FOLDER / "model")
    with pytest.raises(ValueError, match=r"drafter/model.safetensors.*nothing of that name"):
        embedded.load_drafter(tmp_path)
    train.save(EagleDrafter(LlamaSizes(1, 32, 4, 2, 8, 24, 17)), tmp_path / embedded.DRAFTER)
    with pytest.raises(ValueError, match=r"fc.weight must be \[256, 512\], got \[32, 64\] \(.*saf"):
        embedded.load_drafter(tmp_path)


def test_the_shipped_drafter_goes_on_as_its_target() -> None:
    models = embedded.load()
    grades = train.grade(models, embedded.load_drafter(), count=1)
    # seven in eight, and five drafts in a row are worth nearly four codes
    assert [grade.depth for grade in grades] == [0, 1, 2, 3, 4]
    assert min(grade.top1 for grade in grades) > 0.8
    assert grades[0].accepted > 0.87
    assert grades[-1].length > 3.8
