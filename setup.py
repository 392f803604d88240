"""Builds `sdvg_kernels._C` from csrc/ with nvcc, for torch's stable ABI.

torch's own CUDAExtension needs a CUDA build of torch; this needs only nvcc and torch's headers, and
what it builds loads under torch 2.11 and later, with CUDA or without. Environment:

    SDVG_SKIP_CUDA_BUILD=1   install pure Python
    SDVG_FORCE_CUDA=1        where the extension cannot be built, fail instead
    SDVG_CUDA_ARCHS          what to compile for (default "80+PTX;90a;100a", if nvcc knows them)
    CUDA_HOME, CUDA_PATH     where CUDA is             MAX_JOBS   parallel compilations
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11
DEFAULT_ARCHS = "80+PTX;90a;100a"


def find_nvcc() -> Path | None:
    """Return nvcc's path: $CUDA_HOME, $CUDA_PATH, the PATH, then /usr/local/cuda*."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = [found] if (found := shutil.which("nvcc")) else []
    candidates = [f"{home}/bin/nvcc" for home in homes] + on_path
    candidates += sorted(glob.glob("/usr/local/cuda*/bin/nvcc"))
    return next((Path(c) for c in candidates if os.access(c, os.X_OK)), None)


def cuda_root(nvcc: Path) -> Path:
    """Return the toolkit's root as nvcc itself sees it: the nvcc on the PATH may be a wrapper."""
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    return Path(top.group(1)).resolve() if top else nvcc.resolve().parent.parent


def gencode(archs: str, known: str) -> list[str]:
    """Return nvcc's -gencode flags for e.g. "80+PTX;90a"; of the default, those that it knows."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d*[af]?)(\+PTX)?", arch)
        if match is None:
            raise SetupError(f"SDVG_CUDA_ARCHS must be like {DEFAULT_ARCHS!r}, got {archs!r}")
        number = match[1] + match[2]
        if archs == DEFAULT_ARCHS and f"compute_{match[1]}" not in known.split():
            continue
        targets = [f"sm_{number}"] + ([f"compute_{number}"] if match[3] else [])
        flags += [f"-gencode=arch=compute_{number},code={target}" for target in targets]
    return flags


def find_ninja() -> str | None:
    """Return ninja's path: the Python package's, then the PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return os.path.join(BIN_DIR, "ninja")


def missing() -> str:
    """Return why the extension cannot be built here, or ""."""
    if os.environ.get("SDVG_SKIP_CUDA_BUILD") == "1":
        return "SDVG_SKIP_CUDA_BUILD=1"
    if find_nvcc() is None:
        return "nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda*)"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable (install it first, then use --no-build-isolation)"
    if find_ninja() is None:
        return "ninja was not found (pip install ninja)"
    return ""


class BuildExtension(build_ext):
    """Compiles with nvcc and the host compiler through ninja: in parallel, only what changed."""

    def run(self) -> None:
        """Build all extensions; in place, the objects outlive the call, for the next one's sake."""
        if self.inplace:
            self.build_temp = str(ROOT / "build" / "csrc")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; a compiler's own message is in the error."""
        import torch
        from torch.utils.cpp_extension import include_paths

        nvcc, ninja = find_nvcc(), find_ninja()
        # `missing` has found both
        assert nvcc is not None
        assert ninja is not None
        root = cuda_root(nvcc)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)

        def ask(*arguments: str) -> str:
            return subprocess.run(
                [nvcc, *arguments], capture_output=True, text=True, check=True
            ).stdout

        version = re.search(r"V(\d+\.\d+\.\d+)", ask("--version"))
        archs = gencode(os.environ.get("SDVG_CUDA_ARCHS") or DEFAULT_ARCHS, ask("--list-gpu-arch"))
        common = ["-O3", "-std=c++20"]
        cuda = [*common, *archs, "--expt-relaxed-constexpr", "-lineinfo", "--threads=2"]
        # the host side uses torch's pybind11 and nothing else of it: some versions of torch forbid
        # pybind11 beside a target version
        cuda.append(f"-DTORCH_TARGET_VERSION={STABLE_ABI}")
        if version and tuple(map(int, version[1].split(".")[:2])) >= (12, 8):
            cuda.append("-static-global-template-stub=false")
        cuda.append("-Xcompiler=-fPIC,-fvisibility=hidden")
        host = [*common, "-fPIC", "-fvisibility=hidden"]

        facts = {
            "nvcc": version[1] if version else "unknown",
            "archs": " ".join(re.findall(r",code=(\w+)", " ".join(archs))),
            "flags": shlex.join(cuda),
            "torch": torch.__version__,
            "stable_abi": STABLE_ABI,
        }
        header = "".join(
            f"#define SDVG_BUILD_{k.upper()} {json.dumps(v)}\n" for k, v in facts.items()
        )
        if not (info := build / "build_info.h").exists() or info.read_text() != header:
            info.write_text(header)

        includes = [
            *include_paths(),
            sysconfig.get_path("include"),
            str(root / "include"),
            str(build),
        ]
        flags = [f"-I{path}" for path in dict.fromkeys(includes)]
        torch_lib = Path(torch.__file__).parent / "lib"
        cuda_libs = [f"-L{root / name}" for name in ("lib64", "lib") if (root / name).is_dir()]
        # no rpath: Python has imported torch, whichever it is, before this loads. libtorch must be
        # needed by name, or the weak stream symbol stays null under a CUDA torch
        link = [f"-L{torch_lib}", *cuda_libs, "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        link += ["-lc10", "-ltorch_cpu", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        cxx = os.environ.get("CXX", "c++")

        rules = [
            f"rule {name}\n  command = {command} -MMD -MF $out.d -c $in -o $out\n"
            f"  depfile = $out.d\n  deps = gcc\n  description = compiling $in with {name}"
            for name, command in (
                ("nvcc", shlex.join([str(nvcc), *cuda, *flags])),
                ("host", f"{cxx} {shlex.join(host + flags)}"),
            )
        ]
        rules.append(
            f"rule link\n  command = {cxx} -shared $in -o $out {shlex.join(link)}\n"
            "  description = linking $out"
        )
        objects = []
        for source in sorted(ext.sources):
            rule = "nvcc" if source.endswith(".cu") else "host"
            objects.append(f"{Path(source).stem}.o")
            path = str(ROOT / source).replace(" ", "$ ")
            rules.append(f"build {objects[-1]}: {rule} {path}")
        rules.append(f"build _C.so: link {' '.join(objects)}\n")
        (build / "build.ninja").write_text("ninja_required_version = 1.5\n" + "\n".join(rules))

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ran = subprocess.run([ninja, "-C", build, *jobs], stdout=subprocess.PIPE, text=True)
        print(ran.stdout, end="", flush=True)
        if ran.returncode:
            raise CompileError(f"sdvg_kernels._C did not compile; the compiler says:\n{ran.stdout}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # aside and renamed: a process that has the old one loaded keeps it
        shutil.copy2(build / "_C.so", partial := target.with_suffix(".partial"))
        os.replace(partial, target)


def extensions() -> list[Extension]:
    """Return the extension, or nothing and one line that says why."""
    if not (reason := missing()):
        sources = [*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cpp")]
        return [Extension("sdvg_kernels._C", sorted(str(p.relative_to(ROOT)) for p in sources))]
    if os.environ.get("SDVG_FORCE_CUDA") == "1":
        raise SetupError(f"SDVG_FORCE_CUDA=1, but sdvg_kernels._C cannot be built: {reason}")
    print(f"sdvg: pure-Python install, without the CUDA kernels: {reason}", file=sys.stderr)
    return []


setup(license="Apache-2.0", ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
