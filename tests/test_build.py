"""The build from source: from a clean copy, with whatever torch is here, CPU-only included."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc to build the extension")
OPS = ("stage_", "commit_", "rollback_", "compact_", "select_")


def copy_sources(to: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, to / name)
    shutil.copytree(ROOT / "csrc", to / "csrc")
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "sdvg_kernels", to / "sdvg_kernels", ignore=ignored)
    (to / "python").mkdir()
    return to


def build(where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build in place in `where`, for one architecture unless told otherwise."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SDVG_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=where,
        env={**clean, "SDVG_CUDA_ARCHS": "80", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_python(where: Path, code: str) -> str:
    """Run code that imports the copy's sdvg_kernels, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(where)}
    # an editable install of this checkout would lend the copy its _C
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    done = subprocess.run(
        [sys.executable, "-c", alone + code],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_nvcc(where: Path) -> dict[str, str]:
    """Return an environment in which no nvcc can be found: the search is part of what is tested."""
    source = (where / "setup.py").read_text()
    assert source.count("/usr/local/cuda*/bin/nvcc") == 1
    (where / "setup.py").write_text(source.replace("/usr/local/cuda*/bin/nvcc", "/nowhere/nvcc"))
    return {"PATH": str(Path(sys.executable).parent), "CUDA_HOME": "", "CUDA_PATH": ""}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = copy_sources(tmp_path_factory.mktemp("built"))
    done = build(where, SDVG_FORCE_CUDA="1")
    assert done.returncode == 0, done.stdout
    return where


@needs_nvcc
def test_the_build_loads_and_registers_its_ops(built: Path) -> None:
    out = run_python(
        built,
        f"""
import torch, sdvg_kernels.cache
from sdvg_kernels import _C
assert _C.__file__.startswith({str(built)!r}), _C.__file__
has = torch._C._dispatch_has_kernel_for_dispatch_key
for op in {OPS}:
    assert has("sdvg_kernels::" + op, "CUDA"), op
    assert has("sdvg_kernels::" + op, "CPU"), op
    assert has("sdvg_kernels_host::" + op, "CPU"), op
lengths = torch.zeros(2, dtype=torch.int32)
torch.ops.sdvg_kernels_host.commit_(lengths, torch.tensor([True, False]), None, 3)
print(lengths.tolist())
""",
    )
    assert out == "[3, 0]\n"


@needs_nvcc
def test_build_info_says_how_it_was_built(built: Path) -> None:
    out = run_python(
        built, "import json, torch; from sdvg_kernels import _C; print(json.dumps(_C.build_info()))"
    )
    info = json.loads(out)
    assert set(info) == {"nvcc", "archs", "flags", "torch", "stable_abi"}
    assert info["archs"] == "sm_80"
    assert info["torch"] == torch.__version__
    assert info["stable_abi"] == "0x020b000000000000"
    assert "-gencode=arch=compute_80,code=sm_80" in info["flags"]


@needs_nvcc
def test_one_binary_serves_cpu_and_cuda_torch(built: Path) -> None:
    (library,) = (built / "sdvg_kernels").glob("_C*.so")
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs nm and readelf")
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout
    stream = [line.split() for line in symbols.splitlines() if "get_current_cuda_stream" in line]
    # weak and undefined: null under a CPU-only torch, torch's own under a CUDA torch
    assert stream == [["w", "aoti_torch_get_current_cuda_stream"]]
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    # without libtorch.so by name, the weak symbol stays null under a CUDA torch
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@needs_nvcc
def test_only_what_changed_is_compiled_again(built: Path) -> None:
    again = build(built)
    assert again.returncode == 0, again.stdout
    assert "no work to do" in again.stdout
    module = built / "csrc" / "module.cpp"
    module.write_text(module.read_text() + "\n")
    changed = build(built)
    assert "module.cpp" in changed.stdout
    assert "cache.cu" not in changed.stdout


@needs_nvcc
def test_a_compiler_error_shows_the_compilers_own_message(tmp_path: Path) -> None:
    where = copy_sources(tmp_path)
    (where / "csrc" / "cache.cu").write_text("__global__ void broken() { undeclared_name = 1; }\n")
    done = build(where)
    assert done.returncode != 0
    assert 'cache.cu(1): error: identifier "undeclared_name" is undefined' in done.stdout
    assert not list((where / "sdvg_kernels").glob("_C*"))


@pytest.mark.parametrize("skip", [False, True], ids=["no nvcc", "skipped"])
def test_without_nvcc_the_install_is_pure_python_and_says_so_in_one_line(
    tmp_path: Path, skip: bool
) -> None:
    where = copy_sources(tmp_path)
    done = build(where, **({"SDVG_SKIP_CUDA_BUILD": "1"} if skip else without_nvcc(where)))
    assert done.returncode == 0, done.stdout
    searched = "nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda*)"
    reason = "SDVG_SKIP_CUDA_BUILD=1" if skip else searched
    line = f"sdvg: pure-Python install, without the CUDA kernels: {reason}\n"
    assert done.stdout == line
    assert not list((where / "sdvg_kernels").glob("_C*"))
    out = run_python(
        where,
        "import sdvg_kernels.cache as c; from sdvg_kernels import _ops;"
        "print(_ops.load_extension()[0], c.__file__)",
    )
    assert out == f"None {where / 'sdvg_kernels' / 'cache' / '__init__.py'}\n"


def test_forcing_the_build_where_it_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    where = copy_sources(tmp_path)
    done = build(where, SDVG_FORCE_CUDA="1", **without_nvcc(where))
    assert done.returncode != 0
    assert (
        "SDVG_FORCE_CUDA=1, but sdvg_kernels._C cannot be built: nvcc was not found" in done.stdout
    )


@needs_nvcc
def test_a_malformed_architecture_is_an_error(tmp_path: Path) -> None:
    done = build(copy_sources(tmp_path), SDVG_CUDA_ARCHS="hopper")
    assert done.returncode != 0
    assert "SDVG_CUDA_ARCHS must be like '80+PTX;90a;100a', got 'hopper'" in done.stdout
