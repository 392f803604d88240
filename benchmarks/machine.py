"""What a figure depends on beside its inputs: code, versions, the GPU's clocks and power."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# what a version of the measured code is, where there is no git: the contents of these
SOURCES = ("sdvg_kernels", "csrc", "python", "benchmarks", "setup.py")


def slug(gpu: str) -> str:
    """Return the folder name of a GPU: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def commit() -> str:
    """Return git's short commit, "-dirty" if changed; without git the sources' hash, "tree-...".

    Result files do not make it dirty: a run writes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # a repository around this one is not ours
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            raise FileNotFoundError
        changed = git("status", "--porcelain", "-uno", "--", *SOURCES, ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        kinds = {".py", ".cu", ".cuh", ".h", ".cpp"}
        for source in SOURCES:
            top = ROOT / source
            for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if path.suffix in kinds and path.is_file():
                    digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        return f"tree-{digest.hexdigest()[:12]}"


def versions() -> dict[str, str | float]:
    """Return what the figures depend on beside the code."""
    found: dict[str, str | float] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "diffusers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or "none"
        found["cudnn"] = str(torch.backends.cudnn.version() or "none")
        found.update(_smi(driver="driver_version"))
    return found


def clocks() -> dict[str, str | float]:
    """Return the GPU's clocks (MHz) and power (W) now; nothing where there is no nvidia-smi."""
    state = _smi(
        sm_mhz="clocks.sm", memory_mhz="clocks.mem", watts="power.draw", watts_limit="power.limit"
    )
    numbers: dict[str, str | float] = {}
    for name, value in state.items():
        try:
            numbers[name] = float(value)
        except ValueError:
            # "[N/A]": this machine does not tell
            continue
    return numbers


def _smi(**queries: str) -> dict[str, str]:
    fields = f"--query-gpu={','.join(queries.values())}"
    # CUDA_VISIBLE_DEVICES renumbers, nvidia-smi does not know
    uuid = torch.cuda.get_device_properties(0).uuid
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = ran.stdout.strip().split(", ")
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else {}
