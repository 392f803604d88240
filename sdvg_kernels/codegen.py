"""Compiles every kernel for sm_80, sm_90 and sm_100 without a GPU, and holds it to its budget.

    python -m sdvg_kernels.codegen [--arch sm_90] [--kernel attention] [--json out.json]

Triton kernels are compiled in every shipped configuration (`compilations` in op/kernel.py); CUDA
kernels are read from the built extension, or compiled from csrc/ where there is nvcc. What is
printed is read from the machine code: registers, bytes spilled, shared memory, and the matrix
instructions. Exit code 1, with a list, when a kernel is over its budget (op/config.py; `// budget:
<kernel> registers <n>` in csrc/).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sdvg_kernels._budget import SHARED_LIMIT, Budget, Compilation

# ops with Triton kernels
TRITON_OPS = ("attention", "verify", "modulation")
# nvcc's names have a suffix for instructions of one generation only
_CUDA_ARCH = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parent / "csrc"
# [0]: the mnemonic with its modifiers
_MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b")
_LOCAL = re.compile(r"\b(?:STL|LDL)((?:\.\w+)*)")


class Row(NamedTuple):
    """What one compiled kernel costs, and what is wrong with it."""

    kernel: str
    arch: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    over: str


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return the exit code: 1 when a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m sdvg_kernels.codegen", description=__doc__)
    names = [f"sm_{arch}" for arch in SHARED_LIMIT]
    parser.add_argument("--arch", choices=names, action="append", help="only this; default all")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    archs = [int(name[3:]) for name in options.arch or names]
    if os.environ.pop("TRITON_INTERPRET", None):
        print("codegen: TRITON_INTERPRET is ignored", file=sys.stderr)

    start = time.perf_counter()
    jobs = [
        (op, arch, index)
        for op in TRITON_OPS
        for arch in archs
        for index, case in enumerate(_cases(op, arch))
        if options.kernel in case.kernel.__name__
    ]
    # spawned: a forked child would share its parent's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(options.jobs, len(jobs))), context) as pool:
        rows = list(pool.map(_compile, jobs))
    cuda, note = _cuda_rows(archs)
    rows += [row for row in cuda if options.kernel in row.kernel]

    print(_table(rows))
    print(f"{len(rows)} kernels in {time.perf_counter() - start:.0f} s{note}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    over = [row for row in rows if row.over]
    for row in over:
        print(f"over budget: {row.kernel} {row.arch} {row.config}: {row.over}", file=sys.stderr)
    if not rows:
        print(f"codegen: --kernel must name a kernel, got {options.kernel!r}", file=sys.stderr)
    return 1 if over or not rows else 0


def _cases(op: str, arch: int) -> Iterator[Compilation]:
    yield from importlib.import_module(f"sdvg_kernels.{op}.kernel").compilations(arch)


def _compile(job: tuple[str, int, int]) -> Row:
    """Compile the Triton kernel `job` (op, arch, index) and return its row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    op, arch, index = job
    case = list(_cases(op, arch))[index]
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: "constexpr" if name in case.constants else case.signature[name] for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in case.divisible
            if name not in case.constants
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (facts,) = _read(cubin.name).values()
    # Triton's shared memory is dynamic: the machine code does not tell
    facts = facts._replace(shared_bytes=compiled.metadata.shared)
    return _row(case.kernel.__name__, arch, case.config, facts, case.budget)


class _Facts(NamedTuple):
    registers: int
    shared_bytes: int
    spill_bytes: int
    matrix: dict[str, int]


def _row(kernel: str, arch: int, config: str, facts: _Facts, budget: Budget) -> Row:
    """Return the row of a kernel, judged against its budget."""
    over = []
    if facts.registers > budget.registers:
        over.append(f"{facts.registers} registers of {budget.registers}")
    if facts.spill_bytes > budget.spill_bytes:
        over.append(f"{facts.spill_bytes} bytes spilled of {budget.spill_bytes}")
    if facts.shared_bytes > SHARED_LIMIT[arch]:
        over.append(f"{facts.shared_bytes} bytes of shared memory of {SHARED_LIMIT[arch]}")
    if budget.matrix and not any(name.startswith(budget.matrix) for name in facts.matrix):
        over.append(f"no {budget.matrix} instruction")
    matrix = " ".join(f"{count} {name}" for name, count in sorted(facts.matrix.items()))
    return Row(
        kernel,
        f"sm_{arch}",
        config,
        facts.registers,
        facts.spill_bytes,
        facts.shared_bytes,
        matrix,
        "; ".join(over),
    )


def _read(binary: str, *select: str) -> dict[str, _Facts]:
    """Return the facts of each kernel in a cubin, or in an extension if `select` names an arch."""
    tool = _cuobjdump()
    usage = _run(tool, "-res-usage", *select, binary)
    code = dict(
        part.split("\n", 1)
        for part in re.split(r"^\s*Function : ", _run(tool, "-sass", *select, binary), flags=re.M)[
            1:
        ]
    )
    facts = {}
    for name, registers, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+).*? SHARED:(\d+)", usage
    ):
        matrix: dict[str, int] = {}
        for instruction in _MATRIX.findall(code[name]):
            matrix[instruction] = matrix.get(instruction, 0) + 1
        facts[name] = _Facts(int(registers), int(shared), _spilled(code[name]), matrix)
    return facts


def _spilled(code: str) -> int:
    """Return the bytes that machine code stores to and loads from local memory."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return sum(
        next((size for width, size in widths.items() if width in found.split(".")), 4)
        for found in _LOCAL.findall(code)
    )


def _cuda_rows(archs: list[int]) -> tuple[list[Row], str]:
    """Return the rows of the CUDA kernels, and a note where there are none for an architecture."""
    built = sorted(_PACKAGE.glob("_C*.so"))
    nvcc = shutil.which("nvcc")
    rows: list[Row] = []
    missing = []
    for arch in archs:
        found = _read(str(built[0]), "-arch", _CUDA_ARCH[arch]) if built else {}
        if not found and nvcc and _SOURCES.is_dir():
            for source in sorted(_SOURCES.glob("*.cu")):
                found |= _read_source(nvcc, source, arch)
        if not found:
            missing.append(f"sm_{arch}")
        for name, facts in found.items():
            kernel = _demangled(name)
            rows.append(_row(kernel, arch, "nvcc", facts, _cuda_budget(kernel)))
    why = "no built extension has them, and there is no nvcc with csrc/"
    return rows, f"; no CUDA kernels for {', '.join(missing)}: {why}" if missing else ""


def _read_source(nvcc: str, source: Path, arch: int) -> dict[str, _Facts]:
    """Return the facts of the kernels in a .cu file, compiled for `arch`."""
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        includes = [f"-I{path}" for path in include_paths()]
        flags = [
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
        ]
        _run(
            nvcc, "-cubin", f"-arch={_CUDA_ARCH[arch]}", *flags, *includes, "-o", cubin, str(source)
        )
        return _read(cubin)


def _demangled(name: str) -> str:
    """Return the identifiers in a mangled kernel name: `run_on_device SelectRows`."""
    words, rest = [], name
    while found := re.search(r"\d+", rest):
        start, length = found.end(), int(found.group())
        if 0 < length <= len(rest) - start:
            words.append(rest[start : start + length])
            # the argument of a template: h, t, j, m are uint8, uint16, uint32, uint64
            kind = re.match(r"I([htjm])E", rest[start + length :])
            if kind:
                bits = {"h": 8, "t": 16, "j": 32, "m": 64}[kind.group(1)]
                words[-1] += f"<uint{bits}>"
            start += length
        rest = rest[start:]
    return " ".join(word for word in words if word != "sdvg" and "_GLOBAL_" not in word) or name


def _cuda_budget(kernel: str) -> Budget:
    """Return the budget that stands in csrc/ for `kernel`, or no spills."""
    for source in sorted(_SOURCES.glob("*.cu*")):
        for name, registers in re.findall(r"// budget: (\w+) registers (\d+)", source.read_text()):
            if name in re.split(r"\W+", kernel):
                return Budget(registers=int(registers))
    return Budget()


def _cuobjdump() -> str:
    """Return the path of cuobjdump: Triton's own, or the CUDA toolkit's."""
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("codegen: cuobjdump must be on PATH, got none; install the CUDA toolkit")
    return found


def _run(*command: str) -> str:
    """Return what a command printed; its own message in a RuntimeError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"codegen: {command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _table(rows: list[Row]) -> str:
    """Return the rows as aligned text."""
    head = ("kernel", "arch", "config", "registers", "spilled", "shared", "matrix", "budget")
    body = [(*map(str, row[:-1]), row.over or "ok") for row in rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


if __name__ == "__main__":
    sys.exit(main())
