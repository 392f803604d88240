"""`quantize_rows` at the widths of Wan's linear layers, and the products that it is for.

The chain is what eager PyTorch launches for the same rows, also compiled; with the GELU it rounds
that to bfloat16 first. Both are held to float64 by what their rows give back. GB/s are of x and of
the rows and scales written.

The product in e4m3 is a row of its own (`fp8_linear`: quantising, product, bias), and there the
peer is the same layer in bfloat16, which nothing is lost in: what e4m3 gains after its own cost.
It is held to 25 dB of signal to noise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, Candidate, Case, Plan, Unavailable, main
from benchmarks.peers import eager_quantised
from sdvg.models.linear import Fp8Linear
from sdvg_kernels import implementations, quantize_rows
from sdvg_kernels.testing import assert_within_budget, signal_to_noise


class Size(NamedTuple):
    """Rows of one layer's input, and for a product its outputs."""

    layer: str
    inputs: int
    gelu: bool = False
    outputs: int = 0
    rows: int = 4680

    def __str__(self) -> str:
        text = f"{self.layer} N={self.rows} K={self.inputs}"
        return text + f" out={self.outputs}" * bool(self.outputs) + " GELU" * self.gelu


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        layers = [Size("tiny", 128, outputs=64, rows=6), Size("tiny", 96, True, 32, rows=6)]
    else:
        layers = [
            Size("14B q, k, v", 5120, outputs=15360),
            Size("14B FFN's second", 13824, True, 5120),
            Size("1.3B q, k, v", 1536, outputs=4608),
            Size("1.3B FFN's second", 8960, True, 1536),
        ]
        if not bench.quick:
            layers += [Size("14B, a frame", 5120, outputs=15360, rows=1560)]
    for size in layers:
        rows = size._replace(outputs=0)
        yield Plan(f"quantize_rows {rows}", partial(_rows, bench, rows))
    for size in layers:
        yield Plan(f"fp8_linear {size}", partial(_linear, bench, size))


def _input(bench: Bench, size: Size) -> torch.Tensor:
    return torch.randn(size.rows, size.inputs, dtype=torch.bfloat16, device=bench.device)


def _names(bench: Bench) -> tuple[list[str], dict[str, str]]:
    """Return the implementations that run here, and what is left out."""
    if bench.device.type == "cpu":
        return ["reference"], {}
    available = implementations()["quantize"]
    left_out = {name: reason for name, reason in available.items() if reason}
    return [name for name in available if name not in left_out], left_out


def _rows(bench: Bench, size: Size) -> Case:
    x, activation = _input(bench, size), "gelu_tanh" if size.gelu else None
    exact = F.gelu(x.double(), approximate="tanh") if size.gelu else x.double()
    plain = _back(quantize_rows(exact.float(), implementation="reference"))

    def check(out: object) -> None:
        assert_within_budget(_back(out), plain, exact)

    def roughly(out: object) -> None:
        # one more rounding of what is rounded
        error = (_back(out) - exact).norm() / exact.norm()
        assert error < 0.03, f"error {error:.3g} of the norm"

    names, left_out = _names(bench)
    on_cpu = bench.device.type == "cpu"
    ours = [
        Candidate(
            name,
            partial(quantize_rows, x, activation=activation, implementation=name),
            check,
            peer=name == "reference" and not on_cpu,
        )
        for name in names
    ]
    chain = partial(eager_quantised, x, size.gelu)
    peers = [Candidate("eager chain", chain, roughly, peer=True)]
    if not on_cpu:
        torch._dynamo.reset()
        compiled = torch.compile(eager_quantised, dynamic=False)
        peers.append(
            Candidate("compiled chain", partial(compiled, x, size.gelu), roughly, peer=True)
        )
    return Case(
        op="quantize_rows",
        shape=str(size),
        dtype="bfloat16",
        candidates=[*ours, *peers],
        bytes=x.nbytes + x.numel() + 4 * size.rows,
        left_out=left_out,
    )


def _back(out: object) -> torch.Tensor:
    """Return the rows [N, K] that values and scales stand for."""
    values, scales = out
    return values.float() * scales


def _linear(bench: Bench, size: Size) -> Case:
    if bench.device.type == "cuda" and torch.cuda.get_device_capability(bench.device) < (8, 9):
        raise Unavailable("e4m3 products need compute capability 8.9")
    x, activation = _input(bench, size), "gelu_tanh" if size.gelu else None
    plain = torch.nn.Linear(
        size.inputs, size.outputs, dtype=torch.bfloat16, device=bench.device
    ).requires_grad_(False)
    plain.weight.normal_(std=size.inputs**-0.5)
    plain.bias.normal_()
    eight = Fp8Linear(plain)
    eight.activation = activation

    def stock() -> torch.Tensor:
        return plain(F.gelu(x, approximate="tanh") if size.gelu else x)

    given = F.gelu(x.double(), approximate="tanh") if size.gelu else x.double()
    exact = given @ plain.weight.double().T + plain.bias.double()

    def check(out: object) -> None:
        decibels = signal_to_noise(out, exact)
        assert decibels >= 25, f"signal to noise is {decibels:.1f} dB, must be 25"

    return Case(
        op="fp8_linear",
        shape=str(size),
        dtype="float8_e4m3fn",
        candidates=[
            Candidate("quantize_rows, _scaled_mm", partial(eight, x), check),
            Candidate("bfloat16", stock, check, peer=True),
        ],
        flops=2.0 * size.rows * size.inputs * size.outputs,
    )


if __name__ == "__main__":
    sys.exit(main("bench_quantize", plans, sys.argv[1:]))
