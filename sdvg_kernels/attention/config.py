"""Launch configurations of the Triton attention kernels with their reasons, and their budgets.

No GPU was measured. Reasons cite arithmetic and what `python -m sdvg_kernels.codegen` shows under
Triton 3.6 and 3.7: registers, spills, shared memory. Measured gains belong in benchmarks/results.

A short query reads its keys once and waits for memory. To run at the memory's rate a multiprocessor
must have rate x latency / processors bytes on their way (700 ns):

    GPU            GB/s   processors   KB on their way   KB a us
    A100 80 GB     2039          108                13        19
    RTX 4090       1008          128                 6         8
    RTX 5090       1792          170                 7        11
    H100           3350          132                18        25
    H200           4800          132                25        36
    B200           8000          148                38        54

A program has (stages - 1) x BS x D x 4 bytes of K and V on their way: 64 KB for 64 keys of D = 128
in 3 stages, 16 KB for 32 keys in 2. A key tile is some 1000 to 1400 cycles of barriers and latency
for one program, 0.6 to 0.8 us: 32 KB a tile are about 40 KB a us, so two programs a multiprocessor
where a tile does little arithmetic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sdvg_kernels import _tuned
from sdvg_kernels._budget import SHARED_LIMIT, Budget


@dataclass(frozen=True)
class Launch:
    """A tile of BT query rows and BS keys, its warps, and the stages of the two key loops."""

    BT: int
    BS: int
    num_warps: int
    num_stages: int
    # stages of the loop over masked tiles: few, so registers matter more than overlap
    edge_stages: int
    reason: str
    # programs on a multiprocessor that splits of the keys fill
    programs: int = 1


# 8.x, and 12.x too: both have generations of 99 KB of shared memory
_AMPERE, _HOPPER, _BLACKWELL = 80, 90, 100
_DECODE = "m16n8k16 needs no more than 16 rows"
_TWO = "two programs on a multiprocessor"
_ONE = "one program a multiprocessor, as two would double the parts, 32 KB each at T = 64"
_MIDDLE = "one warp per 16 rows; two programs on a multiprocessor hide each other's softmax"
_SCALAR = "exact float32 products run on FMA units: the largest tile without spills"

# (architecture, head dim, is float32) -> (most rows, launch), fewest rows first; None: any
LAUNCHES: dict[tuple[int, int, bool], tuple[tuple[int | None, Launch], ...]] = {
    (_AMPERE, 128, False): (
        (16, Launch(16, 32, 4, 3, 2, f"{_DECODE}; 37 KB: {_TWO} of 100 KB (RTX) too", 2)),
        (64, Launch(64, 32, 4, 2, 2, f"{_MIDDLE}; 64 keys come within 2 registers of a spill", 2)),
        (None, Launch(128, 64, 8, 2, 2, "64 KB of shared memory; 128 keys would take 96 KB of 99")),
    ),
    (_AMPERE, 64, False): (
        (16, Launch(16, 64, 4, 3, 2, f"{_DECODE}; as for head dim 128", 2)),
        (64, Launch(64, 64, 4, 2, 2, _MIDDLE, 2)),
        (None, Launch(128, 64, 8, 2, 2, "under 192 registers and 32 KB of shared memory")),
    ),
    (_AMPERE, 128, True): ((None, Launch(32, 16, 4, 2, 2, f"{_SCALAR}, at 128 registers")),),
    (_AMPERE, 64, True): ((None, Launch(32, 32, 4, 2, 2, _SCALAR)),),
    (_HOPPER, 128, False): (
        (16, Launch(16, 64, 4, 3, 2, f"{_DECODE}; 64 KB on their way; {_TWO}", 2)),
        (64, Launch(64, 64, 4, 3, 3, f"wgmma has 64 rows; 64 KB on their way; {_ONE}")),
        (
            None,
            Launch(
                128,
                128,
                8,
                2,
                1,
                "64 keys make wgmma read as many bytes as shared memory delivers, 128 do not; "
                "254 registers: a pipelined edge loop would spill",
            ),
        ),
    ),
    (_HOPPER, 64, False): (
        (16, Launch(16, 128, 4, 3, 2, f"{_DECODE}; 64 KB on their way; {_TWO}", 2)),
        (64, Launch(64, 128, 4, 3, 3, f"wgmma has 64 rows; 64 KB on their way; {_ONE}")),
        (None, Launch(128, 128, 8, 2, 1, "as for head dim 128")),
    ),
    (_BLACKWELL, 128, False): (
        (16, Launch(16, 64, 4, 3, 2, f"{_DECODE}; 64 KB on their way; {_TWO}", 2)),
        (64, Launch(64, 64, 4, 3, 3, f"tcgen05.mma has 64 rows; {_MIDDLE}", 2)),
        (None, Launch(128, 128, 8, 2, 1, "tcgen05.mma has 128 rows; 160 KB of shared memory")),
    ),
    (_BLACKWELL, 64, False): (
        (16, Launch(16, 128, 4, 3, 3, f"{_DECODE}; 64 KB on their way; {_TWO}", 2)),
        (64, Launch(64, 128, 4, 3, 3, f"tcgen05.mma has 64 rows; {_MIDDLE}", 2)),
        (None, Launch(128, 128, 8, 2, 1, "tcgen05.mma has 128 rows")),
    ),
    **{
        (arch, 128, True): ((None, Launch(16, 16, 4, 2, 2, f"{_SCALAR}: 32 rows spill")),)
        for arch in (_HOPPER, _BLACKWELL)
    },
    **{
        (arch, 64, True): ((None, Launch(32, 32, 4, 2, 2, _SCALAR)),)
        for arch in (_HOPPER, _BLACKWELL)
    },
}

# a bias per row and key costs registers that a tile of 128 x 128 does not have
BIASED = Launch(
    128, 64, 8, 2, 1, "128 keys and a key bias spill, and so does a pipelined edge loop on sm_100"
)

# small tiles: inputs that the interpreter can afford still cross tile borders
INTERPRETED = Launch(16, 16, 4, 1, 1, "Triton's interpreter")

# rows of all heads that share keys, of all tokens: within them one tile reads the keys for all
MOST_PACKED = 64


def choose(
    capability: tuple[int, int] | None,
    dim: int,
    dtype: torch.dtype,
    rows: int,
    biased: bool,
    gpu: str | None = None,
) -> Launch:
    """Return the launch for a GPU of `capability` (None: the interpreter) and a query of `rows`.

    `gpu` is its name, where what was measured on it counts (_tuned.py).
    """
    if capability is None:
        return INTERPRETED
    arch = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _AMPERE)
    is_float32 = dtype == torch.float32
    table = LAUNCHES[arch, dim, is_float32]
    most, launch = next(entry for entry in table if entry[0] is None or rows <= entry[0])
    if biased and launch.BT == launch.BS == 128:
        return BIASED
    # what was measured without a bias may spill with one
    if biased or gpu is None:
        return launch
    choices = functools.partial(candidates, arch, dim, is_float32, most)
    return _tuned.choose(OP, key(dim, is_float32, most), gpu, launch, choices)


@dataclass(frozen=True)
class Delta:
    """Rows of one head that a program of the delta kernel reads, and its warps."""

    BT: int
    num_warps: int
    reason: str


DELTA = Delta(32, 4, "16 KB of two tensors on their way at D = 128. Not measured.")

# The backward. It has 7 products of 2 H D FLOP per row and seen key, 3 for the query's gradient and
# 4 for the keys', where 5 would do if tiles of dx were added up across programs: no atomics, and
# runs repeat bit for bit. A tile of rows and one of keys are resident, the other kind is read again
# for each: (T / BT + S / BS) tiles of 4 D bytes a row or key, a few hundred FLOP a byte at the
# tiles below, so that products bound it. wgmma reads its operands from shared memory at 128 bytes a
# cycle: m64 n64 k16 takes 32 cycles of products and 32 of reads, n32 takes 16 and 24.
# The loop over masked tiles is pipelined where there is wgmma: otherwise ptxas puts all products of
# the kernel one after another. Not measured, none of it.
_ROWS_64 = "64 rows a step would be even with shared memory, and spill: addresses of two tiles"
# (architecture, head dim, is float32) -> (of the query's gradient, of the keys')
BACKWARD: dict[tuple[int, int, bool], tuple[Launch, Launch]] = {
    (_AMPERE, 128, False): (
        Launch(64, 32, 4, 2, 1, f"{_TWO} of 53 KB; 64 keys need 255 registers"),
        Launch(64, 64, 8, 2, 1, "82 KB of 99; 128 keys spill"),
    ),
    (_AMPERE, 64, False): (
        Launch(64, 32, 4, 2, 1, "as for head dim 128"),
        Launch(32, 128, 8, 2, 1, "64 rows come within 8 bytes of a spill, or beyond"),
    ),
    (_HOPPER, 128, False): (
        Launch(128, 64, 8, 3, 2, "two warpgroups; 128 keys spill"),
        Launch(32, 128, 8, 3, 2, f"two warpgroups; {_ROWS_64}"),
    ),
    (_HOPPER, 64, False): (
        Launch(128, 128, 8, 2, 2, "128 keys: a product's reads are three quarters of its time"),
        Launch(64, 128, 8, 3, 2, "two warpgroups; 128 rows spill"),
    ),
    (_BLACKWELL, 128, False): (
        Launch(128, 64, 8, 2, 2, "tcgen05.mma has 128 rows; 128 keys spill"),
        Launch(64, 128, 8, 2, 2, "tcgen05.mma has 128 rows; 128 a step take 263 KB"),
    ),
    (_BLACKWELL, 64, False): (
        Launch(128, 64, 8, 3, 2, "tcgen05.mma has 128 rows; 128 keys spill"),
        Launch(64, 128, 8, 2, 2, "tcgen05.mma has 128 rows; 128 a step spill"),
    ),
    **{
        (arch, 128, True): (
            Launch(16, 16, 4, 2, 1, f"{_SCALAR}: 32 rows spill on sm_80"),
            Launch(16, 16, warps, 2, 1, f"{_SCALAR}: 32 rows or keys spill, and {others}"),
        )
        for arch, warps, others in (
            (_AMPERE, 8, "4 warps"),
            (_HOPPER, 8, "4 warps on sm_80"),
            (_BLACKWELL, 4, "8 warps under Triton 3.6"),
        )
    },
    **{
        (arch, 64, True): (
            Launch(32, 32, 8, 2, 1, f"{_SCALAR}: 4 warps spill"),
            Launch(32, 32, 8, 2, 1, f"{_SCALAR}: 4 warps spill"),
        )
        for arch in (_AMPERE, _HOPPER, _BLACKWELL)
    },
}


def choose_backward(
    capability: tuple[int, int] | None, dim: int, dtype: torch.dtype
) -> tuple[Launch, Launch]:
    """Return the launches of the query's gradient and of the keys'; capability as in `choose`."""
    if capability is None:
        return INTERPRETED, INTERPRETED
    arch = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _AMPERE)
    return BACKWARD[arch, dim, dtype == torch.float32]


OP = "attention"


def key(dim: int, is_float32: bool, most: int | None) -> str:
    """Return the name of a choice: queries of at most `most` rows, or of more."""
    return f"D{dim} {'float32' if is_float32 else 'half'} {'long' if most is None else f'T{most}'}"


def candidates(arch: int, dim: int, is_float32: bool, most: int | None) -> tuple[Launch, ...]:
    """Return the launches that autotune measures, the default first."""
    default = next(launch for rows, launch in LAUNCHES[arch, dim, is_float32] if rows == most)
    why = "measured by sdvg_kernels.autotune"
    if is_float32:
        tried = [Launch(16, 16, 4, 2, 2, why), Launch(32, 16, 4, 2, 2, why)]
        tried += [Launch(32, 32, 4, 2, 2, why), Launch(32, 32, 8, 2, 2, why)]
    elif most is None:
        tried = [Launch(128, 64, 8, stages, 2, why) for stages in (2, 3)]
        tried += [Launch(128, 128, 8, 2, 1, why), Launch(64, 64, 4, 2, 2, why)]
    else:
        tried = [
            Launch(default.BT, keys, 4, stages, 2, why, programs)
            for keys in (32, 64, 128)
            for stages in (2, 3, 4)
            for programs in (1, 2, 3)
            # K and V of all programs on a multiprocessor
            if (stages - 1) * programs * keys * dim * 4 <= SHARED_LIMIT[arch]
        ]
    known = _tuned.numbers(default)
    return (default, *(launch for launch in tried if _tuned.numbers(launch) != known))


def splits(launch: Launch, tiles: int, key_tiles: int, processors: int) -> int:
    """Return in how many parts to split the keys, from shapes alone.

    As many as fill every multiprocessor with `launch.programs`, all resident at once: programs of
    equal shares then end together, and there is no second wave. Of the counts with the same longest
    share the smallest, since each part is written and read back. A part has at least 4 key tiles,
    so that this stays small beside its keys: T x 4 bytes of it to 64 x BS or more of K and V.
    """
    if tiles * 5 >= processors * 4 * launch.programs:
        return 1
    most = max(1, min(processors * launch.programs // tiles, key_tiles // 4, 64))
    return -(-key_tiles // -(-key_tiles // most))


def budget(arch: int, rows: int, dtype: torch.dtype) -> Budget:
    """Return what a kernel with products of `rows` rows may cost: no spills; its instruction."""
    if dtype == torch.float32:
        return Budget()
    wide = {_HOPPER: "HGMMA", _BLACKWELL: "UTC"}.get(arch, "HMMA")
    return Budget(matrix=wide if rows >= 64 else "HMMA")


@dataclass(frozen=True)
class HopperLaunch:
    """Keys of a unit, stages of K and of V, and the registers that setmaxnreg gives the roles."""

    BN: int
    stages: int
    consumer_registers: int
    producer_registers: int
    reason: str


# three warpgroups start with 168 registers a thread: what the partitions set adds up to 3 x 168
HOPPER_MAXNREG = 168
# head dim -> launch, for H100 and H200 alike: they differ in memory, not in the multiprocessor
HOPPER: dict[int, HopperLaunch] = {
    128: HopperLaunch(
        128,
        2,
        232,
        40,
        "128 keys: 64 would double the turns and barriers a key. 2 stages take 193 KB with the "
        "output's; a unit is 2048 cycles of wgmma, a copy of 32 KB with its latency under half of "
        "that. Not measured.",
    ),
    64: HopperLaunch(
        128, 4, 232, 40, "a unit is half as long and half as large: twice the stages. Not measured."
    ),
}


# e4m3 K and V: half the bytes a unit
HOPPER_FP8: dict[int, HopperLaunch] = {
    128: HopperLaunch(
        128,
        4,
        232,
        40,
        "a unit is 1024 cycles of wgmma, and its copy with its latency not much less: 4 stages in "
        "213 KB. Not measured.",
    ),
    64: HopperLaunch(128, 4, 232, 40, "as for head dim 128, in 109 KB. Not measured."),
}


# of the 16-bit kernel with every feature under Triton 3.7.1, none under 3.6: packed predicates and
# scalars, once a segment, not in the loop over units
HOPPER_SPILLS = 64
# of the e4m3 kernel with every feature: scalars, once a segment, not in the loop over units
HOPPER_FP8_SPILLS = 64


def hopper_budget(launch: HopperLaunch, matrix: str = "HGMMA", spill_bytes: int = 0) -> Budget:
    """Return what a Hopper kernel may cost: no spills; products in flight beside the softmax."""
    return Budget(
        registers=HOPPER_MAXNREG,
        spill_bytes=spill_bytes,
        matrix=matrix,
        overlapped=True,
        setmaxnreg=(launch.consumer_registers, launch.producer_registers),
    )
