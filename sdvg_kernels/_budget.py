"""What `codegen` compiles, and what it may cost; the budgets themselves stand in op/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field

# bytes of shared memory that a program may have; sm_80 stands for 8.x, where 8.6 and 8.9 have least
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may cost at most, and the matrix instruction that it must have."""

    registers: int = 255
    # bytes stored to and loaded from local memory, summed over the instructions
    spill_bytes: int = 0
    # prefix of a SASS mnemonic: HMMA, HGMMA, QGMMA, UTC; None: any or none
    matrix: str | None = None
    # least number of instructions that read or write 16 bytes of global memory a thread
    wide: int = 0
    # whether each main loop (innermost, with warpgroup products) must do other work while products
    # are in flight: it has a wgmma.wait_group above 0
    overlapped: bool = False
    # register counts that the partitions must set (setmaxnreg), in any order
    setmaxnreg: tuple[int, ...] = ()


@dataclass(frozen=True)
class Compilation:
    """A Triton or Gluon kernel in one shipped configuration, as a launch on `arch` compiles it."""

    kernel: object
    arch: int
    config: str
    # argument -> Triton type, for the arguments that are not in `constants`; a descriptor's type:
    # f"tensordesc<bf16[64, 128],{layout!r}>"
    signature: dict[str, str]
    constants: dict[str, object]
    # integer and pointer arguments that are multiples of 16 in the launches that matter
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    budget: Budget = field(default_factory=Budget)
    # the launch's options of these names
    maxnreg: int | None = None
    enable_fp_fusion: bool = True
