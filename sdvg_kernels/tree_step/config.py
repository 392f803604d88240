"""Launch configurations of the Triton kernels between passes, and what they may cost."""

from __future__ import annotations

from dataclasses import dataclass

from sdvg_kernels._budget import Budget


@dataclass(frozen=True)
class Copy:
    """A program copies one feature, BD elements at a time, and writes an entry's integers."""

    BD: int
    num_warps: int
    reason: str


# not measured; a feature of LlamaGen-XL is 1280 elements of 2 bytes, and some thirty programs are
# all that there is to do: what counts is how long one takes
COPIES = (
    Copy(512, 2, "8 elements a thread: one access of 16 bytes"),
    Copy(2048, 8, "8 elements a thread; all of a feature is on its way at once"),
    Copy(4096, 8, "16 elements a thread; a wider feature takes turns"),
)
# not measured; entries of a target's pass that a program writes: more programs share a row's
ENTRIES, ENTRY_WARPS = 32, 4
# not measured; a node a thread
SELECT_WARPS = 2
# not measured; numbers of a code at once, of all nodes of a tree
VECTOR, SIMILARITY_WARPS = 16, 4
# a sequence is a program: asked for none, ptxas spills to fit more of them beside it (Triton 3.6)
SIMILARITY_MAXNREG = 255
BUDGET = Budget(registers=40)
# a feature comes and goes by 16 bytes a thread
COPY_BUDGET = Budget(registers=40, wide=2)

SIMILARITY_BUDGET = Budget(registers=128)


def copy(width: int) -> Copy:
    """Return the launch for features of `width` elements."""
    return next((one for one in COPIES if width <= one.BD), COPIES[-1])
