"""What `codegen` compiles, and what each compiled kernel may cost. Budgets stand beside the kernels, in op/config.py."""

from __future__ import annotations

from dataclasses import dataclass, field

# bytes of shared memory that one program may have; sm_80 stands for all of 8.x, where 8.6 and 8.9 have the least
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may cost at most, and the matrix instruction that it must have."""

    registers: int = 255
    # bytes stored to and loaded from local memory, summed over the instructions
    spill_bytes: int = 0
    # prefix of a SASS mnemonic: HMMA, HGMMA, UTC; None: any or none
    matrix: str | None = None


@dataclass(frozen=True)
class Compilation:
    """One Triton kernel with one shipped configuration for one architecture, as a launch would compile it."""

    kernel: object
    arch: int
    config: str
    # argument -> Triton type, for the arguments that are not in `constants`
    signature: dict[str, str]
    constants: dict[str, object]
    # integer and pointer arguments that are multiples of 16 in the launches that matter
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    budget: Budget = field(default_factory=Budget)
