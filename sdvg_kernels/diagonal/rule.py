"""The rule of diagonal decoding in Triton, for the mask and for attention.

pass(s) = frame FP + row k + lead (row > 0) + column      FP passes from frame to frame
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

# a grid's numbers, in the order in which the ops take them
GRID = ("prefix", "height", "width", "row_stride", "frame_stride", "k", "lead", "frame_passes")


@triton.jit
def decoded_in(o_s, grid):
    """Return the pass that gives the token of slots o_s; -1 where they hold none of a grid."""
    prefix, height, width, row_stride, frame_stride, k, lead, frame_passes = grid
    o_in = o_s - prefix
    o_f = o_in // frame_stride
    o_in = o_in - o_f * frame_stride
    o_r = o_in // row_stride
    o_c = o_in - o_r * row_stride
    o_step = o_f * frame_passes + o_r * k + tl.where(o_r > 0, lead, 0) + o_c
    return tl.where((o_s >= prefix) & (o_r < height) & (o_c < width), o_step, -1)


@triton.jit
def first_undecoded(step, S, grid):
    """Return the first slot of a grid whose token does not come before pass `step`, a scalar."""
    prefix, height, width, row_stride, frame_stride, k, lead, frame_passes = grid
    # frames overlap if the next one starts before the last row of one ends
    overlap = frame_passes < (height - 1) * k + lead + width
    step = tl.maximum(step, 0)
    most = S // frame_stride + 1
    f = tl.where(overlap, 0, tl.minimum(step // frame_passes, most))
    left = step - f * frame_passes
    # rows that are whole, of the frame or of all frames
    later = left - width - lead
    row = tl.where(left < width, 0, tl.where(later < 0, 1, later // k + 1))
    f = tl.where(overlap, tl.minimum(row // height, most), f)
    left = tl.where(overlap, step - f * frame_passes, left)
    row = tl.where(overlap, row % height, tl.minimum(row, height - 1))
    column = left - row * k - tl.where(row > 0, lead, 0)
    column = tl.minimum(tl.maximum(column, 0), width)
    return prefix + f * frame_stride + row * row_stride + column
