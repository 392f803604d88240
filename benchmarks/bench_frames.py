"""`preprocess_frames` at the sizes of Wan's decoder, against Pillow on the CPU and torch's resize.

Pillow's way is timed by the wall clock, with the copies there and back, in a case of its own: it
has no place in a CUDA graph. torch's antialiased bicubic has no 8-bit step between its passes and
gives other grey levels here and there. GB/s are of the pixels that the crop sees, and the output.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from benchmarks.peers import interpolated_frames, pillow_frames
from sdvg_kernels import implementations, preprocess_frames

# CLIP's, which ImageReward uses too
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Size(NamedTuple):
    """A decoded block, in pixels, and the side of the scorer's input."""

    height: int
    width: int
    frames: int = 12
    batch: int = 1
    size: int = 224

    @property
    def seen(self) -> int:
        """Pixels of the input that the crop sees, about: the middle square."""
        return self.batch * 3 * self.frames * min(self.height, self.width) ** 2

    def __str__(self) -> str:
        text = f"B={self.batch} F={self.frames} H={self.height} W={self.width}"
        return f"{text} size={self.size}"


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size(48, 83, frames=2, size=22)]
    else:
        # a block of three latent frames, the first block, the sizes of 720p
        sizes = [Size(480, 832), Size(480, 832, 9), Size(720, 1280), Size(832, 480)]
        if not bench.quick:
            sizes.append(Size(480, 832, batch=4))
    for size in sizes:
        yield Plan(f"preprocess_frames {size}", partial(_device, bench, size))
    yield Plan(
        f"preprocess_frames, host work included, {sizes[0]}", partial(_wall, bench, sizes[0])
    )


def _video(bench: Bench, size: Size) -> torch.Tensor:
    """Smooth frames with noise and sharp edges, in [-1, 1]."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    shape = (size.batch, 3, size.frames, size.height, size.width)
    video = torch.linspace(-1, 1, size.width, device=bench.device).expand(shape).to(dtype)
    video = video + 0.1 * torch.randn(shape, dtype=dtype, device=bench.device)
    video[..., ::7, : size.width // 2] *= -1
    return video


def _ours(bench: Bench, video: torch.Tensor, size: Size) -> tuple[list[Candidate], dict[str, str]]:
    """Return our candidates, and what is left out; on a GPU the reference is a peer."""
    # the reference on the CPU: the same bits everywhere
    expected = preprocess_frames(video.cpu(), size.size, implementation="reference")

    def check(out: object) -> None:
        assert torch.equal(out.cpu(), expected), "not the reference's bits"

    available = implementations()["frames"]
    on_cpu = bench.device.type == "cpu"
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    ours = [
        Candidate(
            name,
            partial(preprocess_frames, video, size.size, implementation=name),
            check,
            peer=name == "reference" and not on_cpu,
        )
        for name in names
    ]
    left_out = {} if on_cpu else {name: reason for name, reason in available.items() if reason}
    return ours, left_out


def _device(bench: Bench, size: Size) -> Case:
    video = _video(bench, size)
    ours, left_out = _ours(bench, video, size)
    # tables are copied to the device by the first call, never by a captured one
    expected = ours[0].run()

    def near(out: object) -> None:
        # in grey levels, on average: single pixels differ by more
        error = (out.float() - expected.float()).abs().mean().item() * 255 * min(STD)
        assert error < 0.5, f"{error:.2f} grey levels from Pillow's on average"

    torch_s = partial(interpolated_frames, video, size.size, MEAN, STD)
    peers = [Candidate("interpolate, antialiased", torch_s, near, peer=True)]
    return Case(
        op="preprocess_frames",
        shape=str(size),
        dtype=str(video.dtype).removeprefix("torch."),
        candidates=[*ours, *peers],
        bytes=(size.seen + expected.numel()) * video.element_size(),
        left_out=left_out,
    )


def _wall(bench: Bench, size: Size) -> Case:
    video = _video(bench, size)
    ours, left_out = _ours(bench, video, size)
    peers = []
    if importlib.util.find_spec("PIL") is None:
        left_out["Pillow"] = "is not installed"
    else:
        work = partial(pillow_frames, video, size.size, MEAN, STD)
        peers.append(Candidate("Pillow on the CPU", work, ours[0].check, peer=True))
    return Case(
        op="preprocess_frames with its host work",
        shape=str(size),
        dtype=str(video.dtype).removeprefix("torch."),
        candidates=[*ours, *peers],
        wall=True,
        left_out=left_out,
    )


if __name__ == "__main__":
    sys.exit(main("bench_frames", plans, sys.argv[1:]))
