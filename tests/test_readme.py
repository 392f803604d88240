"""The README's snippets run, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from sdvg.adapters import unpatch, unregister_attention_backend
from sdvg.cli import parser
from tests.models.causal_wan import LAYERS, SelfForcing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = "".join(text for kind, text in SNIPPETS if kind == "bash").splitlines()


def test_python_snippets_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="the embedded models are diffusers classes")
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    # a reader's own pipeline, and the same as it was
    names: dict[str, object] = {"pipeline": SelfForcing(6)}
    plain = SelfForcing(6)
    snippets = [text for kind, text in SNIPPETS if kind == "python"]
    assert len(snippets) == 5
    for text in snippets:
        exec(compile(text, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "0 (1, 9, 3, 32, 32)" in said
    assert "2 (1, 12, 3, 32, 32)" in said
    torch.testing.assert_close(names["pipeline"].run(3), plain.run(3), rtol=0, atol=1e-10)
    assert unpatch(names["pipeline"]) == LAYERS
    assert dispatch_attention_fn(*torch.ones(3, 1, 2, 1, 8), backend="sdvg").sum() == 16
    unregister_attention_backend()


def test_commands_parse() -> None:
    commands = [line for line in COMMANDS if line.startswith("sdvg ")]
    assert {shlex.split(line)[1] for line in commands} == {"generate", "sweep", "tokens", "env"}
    for line in commands:
        parser().parse_args(shlex.split(line, comments=True)[1:])


def test_make_targets_stand_in_the_makefile() -> None:
    targets = [shlex.split(line, comments=True)[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_it_opens_with_the_two_commands() -> None:
    assert README.split("```")[1].startswith("bash\nmake demo")
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_links_lead_to_files(link: str) -> None:
    assert (ROOT / link).is_file()
