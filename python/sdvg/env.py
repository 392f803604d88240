"""What this machine has: versions, the GPU, the extension, and what serves each op."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import sdvg_kernels

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "av")


def versions() -> dict[str, str]:
    """Return name -> version of what decides a result; "missing" where it is not installed."""
    found = {"sdvg": sdvg_kernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found | {"cuda": torch.version.cuda or "none", "gpu": gpu() or "none"}


def gpu() -> str | None:
    """Return the first GPU's name, compute capability and memory, or None."""
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"


def processor() -> str:
    """Return the CPU's name, or what `platform` knows of it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def environment() -> dict[str, object]:
    """Return the versions, the extension's build, and each op's implementations with why not."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "extension": sdvg_kernels.build_info(),
        "ops": sdvg_kernels.implementations(),
    }


def describe() -> str:
    """Return `environment` as text."""
    facts = environment()
    lines = [f"{name:<13} {text}" for name, text in facts["versions"].items()]
    lines.append(f"{'platform':<13} {facts['platform']}")
    build = facts["extension"]
    if "missing" in build:
        lines.append(f"{'extension':<13} not there: {build['missing']}")
    else:
        lines += [f"{'extension':<13} {name} {build[name]}" for name in ("nvcc", "archs", "torch")]
    for op, choices in facts["ops"].items():
        serving = next(name for name, reason in choices.items() if not reason)
        lines.append(f"{op:<13} {serving}")
        for name, reason in choices.items():
            if name != serving:
                lines.append(f"{'':<13}   not {name}: {reason or 'it comes after in preference'}")
    return "\n".join(lines)
