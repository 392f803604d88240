"""The gradients of `block_causal_attention` at the sizes of training on clips of Wan 1.3B.

A clip is 21 latent frames of 1,560 tokens in blocks of 3, all of them in one query: each block sees
itself and those before it, or a sink and a window of them. Forward and backward together run in a
CUDA graph; the backward alone is timed by the wall clock, as autograd calls it: it takes
milliseconds, beside which the host's part is small.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.bench_attention import BLOCK, FRAME, Shape, block_by_block, eager, runs_of
from benchmarks.harness import Bench, Candidate, Case, Plan, main
from benchmarks.peers import Peer, attention_peers
from sdvg_kernels import block_causal_attention, implementations
from sdvg_kernels.testing import assert_within_budget, fails_alone

_NAMES = ("query", "key", "value")


def shapes(cpu: bool, quick: bool) -> list[Shape]:
    """Return the problems, the ones that matter most first."""
    if cpu:
        return [Shape(1, 24, 2, 24, 24, 64, blocks=3), Shape(2, 24, 2, 24, 24, 64, 4, 12, 3)]
    clip = Shape(1, 21 * FRAME, 12, 21 * FRAME, 21 * FRAME, blocks=7)
    seen = {"sink": 3 * FRAME, "window": 12 * FRAME}
    one_block = clip._replace(rows=BLOCK, blocks=1)
    return [clip._replace(**seen), *([] if quick else [clip, one_block])]


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases: the backward alone, then behind its forward."""
    for shape in shapes(bench.device.type == "cpu", bench.quick):
        for alone in (True, False):
            yield Plan(f"{_op(alone)} {shape}", partial(case, bench, shape, alone))


def case(bench: Bench, shape: Shape, alone: bool) -> Case:
    """Return one problem with fresh random inputs, ours and every peer that is here."""
    device, cpu = bench.device, bench.device.type == "cpu"
    dtype = torch.float32 if cpu else torch.bfloat16
    visible = shape.visible()
    sizes = (shape.heads, shape.dim)
    given = [
        torch.randn(shape.batch, tokens, *sizes, dtype=dtype, device=device)
        for tokens in (shape.rows, shape.slots, shape.slots)
    ]
    grad = torch.randn_like(given[0])
    # what is made here records gradients from now on
    given = [tensor.requires_grad_() for tensor in given]
    ours = partial(
        block_causal_attention,
        cache_seqlens=torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device),
        block_size=shape.rows // shape.blocks,
        sink=shape.sink,
        window=shape.window,
    )
    gather = partial(block_by_block, runs=[runs_of(row) for row in visible])
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    exact = _gradients(partial(ours, implementation="reference"), wide, grad.double())()
    plain = _gradients(partial(gather, eager), given, grad)()

    def check(found: object) -> None:
        for name, *three in zip(_NAMES, found, plain, exact, strict=True):
            assert_within_budget(*three, f"gradient of {name}")

    work = _backward if alone else _gradients
    names, peers, left_out = _who(device)
    candidates = [
        Candidate(name, work(partial(ours, implementation=name), given, grad), check)
        for name in names
    ]
    seen = visible.to(device)
    ways = {"sdpa-mask": partial(_with_dense_mask, seen)}
    for peer in peers:
        ways[peer.name] = partial(_attend, peer, peer.build(), seen, gather)
    candidates += [
        Candidate(name, work(attend, given, grad), check, peer=True)
        for name, attend in ways.items()
    ]

    pairs = int(visible.sum()) * (shape.rows // shape.blocks)
    values = shape.batch * shape.heads * shape.dim
    # query, its gradient and the output's, the output; keys, values and their gradients
    moved = values * (4 * shape.rows + 4 * shape.slots) * grad.element_size()
    return Case(
        op=_op(alone),
        shape=str(shape),
        dtype=str(dtype).removeprefix("torch."),
        candidates=candidates,
        flops=(10 if alone else 14) * values * pairs,
        bytes=moved,
        wall=alone,
        left_out=left_out,
    )


def _op(alone: bool) -> str:
    return f"block_causal_attention {'backward' if alone else 'forward and backward'}"


def _gradients(
    attend: Callable[..., torch.Tensor], given: list[torch.Tensor], grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return what runs forward and backward."""

    def run() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(attend(*given), given, grad)

    return run


def _backward(
    attend: Callable[..., torch.Tensor], given: list[torch.Tensor], grad: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return what runs backward, after a forward in its first call."""

    @functools.cache
    def out() -> torch.Tensor:
        with torch.enable_grad():
            return attend(*given)

    return lambda: torch.autograd.grad(out(), given, grad, retain_graph=True)


def _who(device: torch.device) -> tuple[list[str], list[Peer], dict[str, str]]:
    """Return our implementations, the peers, and why others are left out."""
    names, left_out = [], {}
    for name, reason in implementations()["attention"].items():
        # the reference is what serves a CPU, and no candidate on a GPU; e4m3 has no gradients
        if (name == "reference") is not (device.type == "cpu") or name == "hopper_fp8":
            continue
        # what no GPU has passed yet must not keep the others from their figures
        if name == "hopper" and not reason:
            reason = fails_alone(name, 60.0)
        if reason:
            left_out[name] = reason
        else:
            names.append(name)
    peers = [peer for peer in attention_peers(device) if not peer.quantized]
    left_out |= {peer.name: peer.reason for peer in peers if peer.reason}
    return names, [peer for peer in peers if not peer.reason], left_out


def _attend(
    peer: Peer,
    attend: Callable[..., torch.Tensor],
    visible: torch.Tensor,
    gather: Callable[..., torch.Tensor],
    *tensors: torch.Tensor,
) -> torch.Tensor:
    """Return a peer's attention: with the mask, or block by block on the keys it sees."""
    return attend(*tensors, visible) if peer.masks else gather(attend, *tensors)


def _with_dense_mask(visible: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Return torch's scaled_dot_product_attention, its own choice, with a mask of every pair."""
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    mask = visible.repeat_interleave(query.shape[2] // len(visible), 0)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main("bench_attention_backward", plans, sys.argv[1:]))
