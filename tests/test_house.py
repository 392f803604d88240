"""The house rules: who may import whom, what a room must hold, what must not be written down."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import Row

ROOT = Path(__file__).resolve().parent.parent
KERNELS, LAYER, BENCHMARKS = ROOT / "sdvg_kernels", ROOT / "python" / "sdvg", ROOT / "benchmarks"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/api.py"))
SHARED = (
    "_ops", "_check", "_budget", "_tuned", "_combine", "_tickets", "_fold", "_warp", "_few_rows",
    "_device",
)  # fmt: skip

# a room imports only from the storeys below its own
STOREYS = (
    ("types", "noise", "clock", "host", "video", "store"),
    ("router", "schedule", "cache", "models", "scorers"),
    ("commit", "request"),
    ("grid",),
    ("engine", "tokens"),
    ("report", "sweep", "bench", "env", "quality", "recipes", "arguments", "console"),
    ("token_sweep",),
    ("vvs_sweep", "distill_sweep"),
    ("token_cli", "distill_report"),
    ("cli", "pipeline", "adapters", "train"),
)
# ... and from these of its own
BESIDE = {("models", "cache"), ("models", "scorers"), ("scorers", "models")}
# what the loop never sees, though it lies below
_LOOP = ("commit", "grid", "engine")
HIDDEN = {(room, part) for room in _LOOP for part in ("models", "scorers")}
HEAVY = {
    "accelerate", "av", "diffusers", "imageio", "matplotlib", "PIL", "scipy", "sklearn",
    "tokenizers", "torchvision", "transformers",
}  # fmt: skip


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _module(path: Path) -> str:
    """Return the dotted name of a file of one of the packages."""
    top = LAYER.parent if path.is_relative_to(LAYER) else ROOT
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name or "") of every import below `tree`; `package` is what `from .` means."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((base, alias.name) for alias in node.names)


def _of(path: Path, tree: ast.AST | None = None) -> list[tuple[str, str]]:
    name = _module(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    return list(_imports(tree or _tree(path), package))


def _room(module: str, name: str, package: str) -> str:
    """Return the room of `package` that an import reaches: `from sdvg import env` -> "env"."""
    if module != package:
        return module.removeprefix(package + ".").split(".")[0]
    inside = ROOT / "python" / package if package == "sdvg" else ROOT / package
    return name if (inside / name).is_dir() or (inside / f"{name}.py").exists() else ""


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_kernels_import_neither_the_layer_nor_anything_but_torch_triton_and_numpy() -> None:
    known = {"sdvg_kernels", "torch", "triton", "numpy", *sys.stdlib_module_names}
    for path in _files(KERNELS):
        foreign = {module for module, _ in _of(path) if module.split(".")[0] not in known}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("op", OPS)
def test_ops_import_only_their_own_rooms_and_what_all_share(op: str) -> None:
    for path in _files(KERNELS / op):
        for module, name in _of(path):
            if _within(module, "sdvg_kernels"):
                room = _room(module, name, "sdvg_kernels")
                assert room in (op, *SHARED), f"{path.relative_to(ROOT)} imports {module} {name}"


@pytest.mark.parametrize("op", OPS)
def test_references_import_only_torch(op: str) -> None:
    for module, _ in _of(KERNELS / op / "reference.py"):
        top = module.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names, f"{op}/reference.py: {module}"


@pytest.mark.parametrize("op", OPS)
def test_rooms_do_not_import_their_api(op: str) -> None:
    for path in _files(KERNELS / op):
        if path.stem not in ("__init__", "api"):
            reached = {f"{module}.{name}" for module, name in _of(path)}
            assert not any(f"{op}.api" in target for target in reached), path.name


def test_what_ops_share_imports_no_op() -> None:
    for stem in SHARED:
        for module, name in _of(KERNELS / f"{stem}.py"):
            if _within(module, "sdvg_kernels"):
                assert _room(module, name, "sdvg_kernels") in (*SHARED, "_C"), f"{stem}: {module}"


def _storey(room: str) -> int:
    found = [i for i, rooms in enumerate(STOREYS) if room in rooms]
    assert found, f"sdvg.{room} has no place in STOREYS (tests/test_house.py): give it one"
    return found[0]


@pytest.mark.parametrize("path", _files(LAYER), ids=lambda path: str(path.relative_to(LAYER)))
def test_the_layer_imports_only_downwards(path: Path) -> None:
    own = path.relative_to(LAYER).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for module, name in _of(path):
        if not _within(module, "sdvg"):
            continue
        room = _room(module, name, "sdvg")
        assert room, f"{path.name} imports {name} from sdvg itself: name the room"
        allowed = room == own or _storey(room) < _storey(own) or (own, room) in BESIDE
        assert allowed, f"sdvg.{own} must not import sdvg.{room}"
        assert (own, room) not in HIDDEN, f"sdvg.{own} must not import sdvg.{room}"


def test_the_layer_uses_only_public_names_of_the_kernels() -> None:
    import sdvg_kernels

    public = {*sdvg_kernels.__all__, "__version__"}
    for path in _files(LAYER):
        for module, name in _of(path):
            if _within(module, "sdvg_kernels"):
                fine = module == "sdvg_kernels" and (not name or name in public)
                assert fine, f"{path.relative_to(LAYER)} imports {name} from {module}"


@pytest.mark.parametrize("path", _files(LAYER), ids=lambda path: str(path.relative_to(LAYER)))
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    # classes that inherit from diffusers' own cannot wait for a call
    if path.relative_to(LAYER).parts[0] in ("pipeline.py", "adapters"):
        return
    for module, _ in _of(path, _at_import(_tree(path))):
        assert module.split(".")[0] not in HEAVY, f"{path.relative_to(LAYER)} imports {module}"


def _at_import(tree: ast.Module) -> ast.Module:
    """Return the statements that run when the module is imported."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                return node.orelse
            return self.generic_visit(node)

    return Prune().visit(tree)


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_four_rooms_or_says_why_not(op: str) -> None:
    said = ast.get_docstring(_tree(KERNELS / op / "__init__.py")) or ""
    for room in ("api", "reference", "kernel", "config"):
        there = (KERNELS / op / f"{room}.py").exists()
        assert there or f"{room}.py" in said, f"sdvg_kernels/{op} has no {room}.py and no reason"


def test_each_schema_stands_once_and_only_in_ops() -> None:
    import torch

    import sdvg_kernels

    for op in sdvg_kernels.__all__:
        getattr(sdvg_kernels, op)
    text = (KERNELS / "_ops.py").read_text()
    # a schema opens in a string at the start of an argument of `define`, whole or joined
    names = re.findall(r'define\(\s*f?"(\w+)', text)
    assert len(names) == len(set(names)), f"defined twice: {names}"
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("sdvg_kernels::")
    }
    assert registered == set(names)
    elsewhere = re.compile(
        r"custom_op|triton_op|library\.define|[\"']DEF[\"']|FRAGMENT|"
        r"STABLE_TORCH_LIBRARY\(|m\.def\("
    )
    sources = [*_files(KERNELS), *_files(LAYER), *(ROOT / "csrc").glob("*.c[uhp]*")]
    for path in sources:
        # pybind11's functions in module.cpp are no ops
        if path.name not in ("_ops.py", "module.cpp"):
            assert not elsewhere.search(path.read_text()), f"{path.relative_to(ROOT)} defines an op"


def _undocumented(tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree) and tree.body:
        yield "the module"
    bodies: list[tuple[str, list[ast.stmt]]] = [("", tree.body)]
    while bodies:
        prefix, body = bodies.pop()
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                bodies.append((f"{prefix}{node.name}.", node.body))


@pytest.mark.parametrize(
    "path",
    [path for folder in (KERNELS, LAYER, BENCHMARKS) for path in _files(folder)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert not list(_undocumented(_tree(path)))


def _texts() -> list[Path]:
    """Return the project's text files: what git tracks or would, else all sources."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        folders = ("sdvg_kernels", "python", "benchmarks", "csrc", "tests")
        paths = [*ROOT.glob("*"), *(p for name in folders for p in (ROOT / name).rglob("*"))]
    kinds = {"", ".py", ".cu", ".cuh", ".h", ".cpp", ".md", ".toml", ".txt", ".json", ".csv"}
    return [path for path in paths if path.suffix in kinds and path.is_file()]


def test_no_file_is_long() -> None:
    for path in _texts():
        if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
            # a file of tests is a list, read by its names
            limit = 800 if path.is_relative_to(ROOT / "tests") else 550
            lines = path.read_bytes().count(b"\n")
            assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_nothing_names_one_machines_paths() -> None:
    # put together here, or this file would name them too
    roots = "|".join(("work", "home", "root", "tmp", "Users"))
    paths = re.compile(rf"(?<![\w.$}}/-])/(?:{roots})/\w")
    for path in _texts():
        if found := paths.search(path.read_text(errors="replace")):
            pytest.fail(f"{path.relative_to(ROOT)} names {found.group()}...")


def test_all_shipped_weights_stay_under_60_megabytes() -> None:
    weights = [p for p in LAYER.rglob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".npz")]
    assert sum(path.stat().st_size for path in weights) <= 60e6


def _python(code: str) -> None:
    """Run `code` in a fresh interpreter that finds the packages of this checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr


def _without(names: set[str]) -> str:
    """Return code after which these packages are as good as not installed."""
    return f"import sys\nsys.modules.update(dict.fromkeys({sorted(names)!r}))\n"


def test_kernels_import_with_torch_alone() -> None:
    absent = HEAVY | {"triton", "safetensors", "tqdm", "sdvg"}
    _python(
        _without(absent) + "import torch, sdvg_kernels\n"
        "for name in sdvg_kernels.__all__: getattr(sdvg_kernels, name)\n"
        "assert sdvg_kernels.implementations()\n"
        "scores = torch.tensor([[0.5, 1.0], [0.1, 1.0]])\n"
        "assert sdvg_kernels.route_blocks(scores, 0.3, False).tolist() == [True, False]\n"
    )


def test_the_layer_imports_without_diffusers() -> None:
    _python(_without(HEAVY) + "import sdvg\nfor name in sdvg.__all__: getattr(sdvg, name)\n")


def test_the_pipeline_without_diffusers_says_what_to_install() -> None:
    code = (
        "import sdvg\ntry: sdvg.SDVGPipeline\nexcept ImportError as error:\n  text = str(error)\n"
    )
    _python(_without(HEAVY) + code + "assert \"pip install 'sdvg[diffusers]'\" in text, text\n")


RESULTS = sorted((BENCHMARKS / "results").rglob("*.json"))


def test_result_files_parse() -> None:
    for path in RESULTS:
        json.loads(path.read_text())


def test_result_rows_have_all_keys_and_were_verified_on_a_gpu() -> None:
    # digits/ holds reports of the embedded pair, not timings
    for path in (p for p in RESULTS if "digits" not in p.relative_to(BENCHMARKS).parts):
        rows = json.loads(path.read_text())
        assert isinstance(rows, list), path
        for row in rows:
            assert tuple(row) == Row._fields, path
            assert row["verified"] is True, path
            assert row["gpu"] != "cpu", path
            assert row["us"] > 0, path
