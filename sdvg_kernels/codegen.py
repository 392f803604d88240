"""Compiles every kernel for sm_80, sm_90 and sm_100 without a GPU, and holds it to its budget.

    python -m sdvg_kernels.codegen [--arch sm_90] [--kernel attention] [--json out.json]

Triton and Gluon kernels are compiled in every shipped configuration: what `compilations(arch)` of
each op/kernel.py and op/hopper.py yields. CUDA kernels are read from the built extension, or
compiled from csrc/ where there is nvcc. What is printed is read from the code: registers, bytes
spilled, shared memory, the matrix instructions, the waits for warpgroup products in the main loops
and the registers of the partitions. Exit code 1, with a list, when a kernel is over its budget
(op/config.py; `// budget: <kernel> registers <n>` in csrc/).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sdvg_kernels._budget import SHARED_LIMIT, Budget, Compilation

# nvcc's names have a suffix for instructions of one generation only
_CUDA_ARCH = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parent / "csrc"
# [0]: the mnemonic with its modifiers
_MATRIX = re.compile(r"\b(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)\b")
_WIDE = re.compile(r"\b(?:LDG|STG)\.[\w.]*128\b")
_LOCAL = re.compile(r"\b(?:STL|LDL)((?:\.\w+)*)")
# LLVM names a block's innermost loop, and a header's parents, in comments
_LOOP = re.compile(r"(?:(Parent Loop|in Loop: Header=)\s*(BB\w+)|=>\s*This (?:Inner )?Loop Header)")


class Row(NamedTuple):
    """What one compiled kernel costs, and what is wrong with it."""

    kernel: str
    arch: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    # "waits 1 0, 1 0": of each main loop with warpgroup products; "setmaxnreg 240 24"
    pipeline: str
    over: str


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return the exit code: 1 when a kernel is over its budget."""
    parser = argparse.ArgumentParser(prog="python -m sdvg_kernels.codegen", description=__doc__)
    names = [f"sm_{arch}" for arch in SHARED_LIMIT]
    parser.add_argument("--arch", choices=names, action="append", help="only this; default all")
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA kernels out")
    options = parser.parse_args(arguments)
    archs = [int(name[3:]) for name in options.arch or names]
    interpreting = os.environ.pop("TRITON_INTERPRET", None)
    if interpreting:
        print("codegen: TRITON_INTERPRET is ignored", file=sys.stderr)
    try:
        return _check_all(archs, options)
    finally:
        # whoever calls this from Python goes on as before
        if interpreting is not None:
            os.environ["TRITON_INTERPRET"] = interpreting


def _check_all(archs: list[int], options: argparse.Namespace) -> int:
    start = time.perf_counter()
    holding = [room for room in rooms() if hasattr(importlib.import_module(room), "compilations")]
    silent = sorted({*rooms()} - {*holding})
    jobs = [
        (room, arch, index)
        for room in holding
        for arch in archs
        for index, case in enumerate(_cases(room, arch))
        if options.kernel in case.kernel.__name__
    ]
    # spawned: a forked child would share its parent's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(options.jobs, len(jobs))), context) as pool:
        rows = list(pool.map(_compile, jobs))
    cuda, note = ([], "") if options.no_cuda else _cuda_rows(archs)
    rows += [row for row in cuda if options.kernel in row.kernel]

    print(_table(rows))
    seconds = time.perf_counter() - start
    print(f"{len(rows)} kernels in {seconds:.0f} s, Triton {_triton_version()}{note}")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    over = [row for row in rows if row.over]
    for row in over:
        print(f"over budget: {row.kernel} {row.arch} {row.config}: {row.over}", file=sys.stderr)
    for room in silent:
        print(f"codegen: {room} must export compilations(arch), got none", file=sys.stderr)
    if not rows:
        print(f"codegen: --kernel must name a kernel, got {options.kernel!r}", file=sys.stderr)
    return 1 if over or silent or not rows else 0


def rooms() -> list[str]:
    """Return the modules that hold kernels: each op folder's `kernel` and `hopper*`."""
    found = (path for stem in ("kernel", "hopper*") for path in _PACKAGE.glob(f"*/{stem}.py"))
    return sorted(f"sdvg_kernels.{path.parent.name}.{path.stem}" for path in found)


def _triton_version() -> str:
    import triton

    return triton.__version__


def _cases(room: str, arch: int) -> Iterator[Compilation]:
    yield from importlib.import_module(room).compilations(arch)


def _compile(job: tuple[str, int, int]) -> Row:
    """Compile the kernel `job` (room, arch, index) and return its row."""
    room, arch, index = job
    case = list(_cases(room, arch))[index]
    try:
        return compiled_row(case)
    except Exception as error:
        # the others are still of interest
        reason = next(iter(str(error).strip().splitlines()), "")
        over = f"does not compile: {type(error).__name__}: {reason}"
        return Row(case.kernel.__name__, f"sm_{arch}", case.config, 0, 0, 0, "", "", over)


def compiled_row(case: Compilation) -> Row:
    """Compile a Triton or Gluon kernel and return its row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    gluon = case.kernel.is_gluon()
    source = (GluonASTSource if gluon else ASTSource)(
        case.kernel,
        {name: "constexpr" if name in case.constants else case.signature[name] for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in case.divisible
            if name not in case.constants
        },
    )
    options: dict[str, object] = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # only ptxas's own log says that it put products one after another; a cache has no log
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = gluon
        compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        (facts,) = _read(cubin.name).values()
    facts = facts._replace(
        # Triton's shared memory is dynamic: the machine code does not tell
        shared_bytes=compiled.metadata.shared,
        waits=_main_loop_waits(compiled.asm["ptx"]),
        setmaxnreg=_partition_registers(compiled.asm["ptx"]),
        serialized="serialized" in log.getvalue(),
    )
    return _row(case.kernel.__name__, case.arch, case.config, facts, case.budget)


def _main_loop_waits(ptx: str) -> tuple[tuple[int, ...], ...]:
    """Return what each innermost loop with warpgroup products waits for: products left in flight.

    The loops are LLVM's own, from its comments: text order would not tell a loop's blocks.
    """
    # what each loop issues and waits for in blocks of its own, and its parents
    products, waits, parents = Counter(), defaultdict(list), defaultdict(set)
    block, loop, above = "", "", set()
    for line in ptx.splitlines():
        if label := re.match(r"(?:\$L__|// %)(BB\w+|bb\.\d+):", line):
            block, loop, above = label.group(1), "", set()
        if found := _LOOP.search(line):
            kind, name = found.groups()
            if kind == "Parent Loop":
                above.add(name)
            elif kind is None:
                loop = block
                parents[loop] |= above
            else:
                loop = name
        elif "wgmma.mma_async" in line:
            products[loop] += 1
        elif wait := re.search(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", line):
            waits[loop].append(int(wait.group(1)))
    loops = [name for name in products if name]
    outer = {name for inner in loops for name in parents[inner]}
    return tuple(tuple(waits[name]) for name in loops if name not in outer)


def _partition_registers(ptx: str) -> tuple[int, ...]:
    """Return the register counts that partitions set, largest first."""
    return tuple(sorted({int(n) for n in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}, reverse=True))


class _Facts(NamedTuple):
    registers: int
    shared_bytes: int
    spill_bytes: int
    matrix: dict[str, int]
    # of each main loop with warpgroup products: products that its waits leave in flight
    waits: tuple[tuple[int, ...], ...] = ()
    setmaxnreg: tuple[int, ...] = ()
    # ptxas gave up on products in flight: each waits for the one before it
    serialized: bool = False
    # 16-byte accesses of global memory
    wide: int = 0


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
    if facts.wide < budget.wide:
        over.append(f"{facts.wide} 16-byte accesses of {budget.wide}")
    if facts.serialized:
        over.append("ptxas serialized the warpgroup products")
    if budget.overlapped and not (facts.waits and all(any(loop) for loop in facts.waits)):
        over.append("a main loop without a wgmma wait above 0")
    if missing := set(budget.setmaxnreg) - set(facts.setmaxnreg):
        over.append(f"no setmaxnreg {' '.join(map(str, sorted(missing)))}")
    matrix = " ".join(f"{count} {name}" for name, count in sorted(facts.matrix.items()))
    pipeline = [f"waits {', '.join(' '.join(map(str, loop)) for loop in facts.waits)}"]
    pipeline = pipeline if facts.waits else []
    if facts.setmaxnreg:
        pipeline.append(f"setmaxnreg {' '.join(map(str, facts.setmaxnreg))}")
    return Row(
        kernel,
        f"sm_{arch}",
        config,
        facts.registers,
        facts.spill_bytes,
        facts.shared_bytes,
        matrix,
        "; ".join(pipeline),
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
        wide = len(_WIDE.findall(code[name]))
        facts[name] = _Facts(int(registers), int(shared), _spilled(code[name]), matrix, wide=wide)
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
    head = (
        "kernel",
        "arch",
        "config",
        "registers",
        "spilled",
        "shared",
        "matrix",
        "pipeline",
        "budget",
    )
    body = [(*map(str, row[:-1]), row.over or "ok") for row in rows]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


if __name__ == "__main__":
    sys.exit(main())
