"""Patched pipelines give what they gave, without moving their caches.

`Attention` and `Pipeline` stand in for Self-Forcing's: the same names, cache dicts, rolling and
calls, written from the description of its protocol, tiny.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdvg.adapters import patch, unpatch

DIM, HEADS, LAYERS = 32, 2, 2
HEIGHT, WIDTH, FRAMES = 2, 3, 3
FRAME, BLOCK = HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope(x: Tensor, grid_sizes: Tensor, freqs: Tensor, start_frame: int) -> Tensor:
    """Rotate `[B, T, H, D]` as the original does: complex, in float64, sample by sample."""
    pairs = x.shape[3] // 2
    axes = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    out = []
    for sample, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
        turns = torch.cat(
            (
                axes[0][start_frame : start_frame + f].view(f, 1, 1, -1).expand(f, h, w, -1),
                axes[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
                axes[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ),
            dim=-1,
        ).reshape(f * h * w, 1, -1)
        turned = torch.view_as_complex(sample.double().unflatten(-1, (-1, 2))) * turns
        out.append(torch.view_as_real(turned).flatten(-2))
    return torch.stack(out).type_as(x)


class Attention(nn.Module):
    def __init__(self, local_attn_size: int, sink_size: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM // HEADS
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM), RMSNorm(DIM)

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor | None,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: None,
        kv_cache: dict | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q = self.norm_q(self.q(x)).unflatten(2, heads)
        k = self.norm_k(self.k(x)).unflatten(2, heads)
        v = self.v(x).unflatten(2, heads)
        frame = int(grid_sizes[0][1] * grid_sizes[0][2])
        q, k = (rope(part, grid_sizes, freqs, current_start // frame) for part in (q, k))
        if kv_cache is None:
            return self.o(attend(q, k, v).flatten(2))
        new, end = q.shape[1], current_start + q.shape[1]
        size, sink = kv_cache["k"].shape[1], self.sink_size * frame
        global_end, local_end = (
            value.item() if isinstance(value, Tensor) else value
            for value in (kv_cache["global_end_index"], kv_cache["local_end_index"])
        )
        evicted = 0
        if self.local_attn_size != -1 and end > global_end and new + local_end > size:
            evicted = new + local_end - size
            kept = local_end - evicted - sink
            for name in ("k", "v"):
                source = kv_cache[name][:, sink + evicted : sink + evicted + kept].clone()
                kv_cache[name][:, sink : sink + kept] = source
        local_end = local_end + end - global_end - evicted
        kv_cache["k"][:, local_end - new : local_end] = k
        kv_cache["v"][:, local_end - new : local_end] = v
        seen = slice(max(0, local_end - self.max_attention_size), local_end)
        out = attend(q, kv_cache["k"][:, seen], kv_cache["v"][:, seen])
        for name, value in (("global_end_index", end), ("local_end_index", local_end)):
            if isinstance(kv_cache[name], Tensor):
                kv_cache[name].fill_(value)
            else:
                kv_cache[name] = value
        return self.o(out.flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.self_attn = Attention(*sizes)
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        x = x + self.self_attn(nn.functional.layer_norm(x, x.shape[-1:]), *rest)
        return x + self.ffn(x)


class Pipeline:
    """Holds a model and its caches, as `CausalInferencePipeline` does."""

    def __init__(self, local: int, sink: int, indices: str = "tensor", batch: int = 2) -> None:
        torch.manual_seed(local * 10 + sink)
        self.generator = nn.ModuleList(Block(local, sink) for _ in range(LAYERS))
        self.generator.requires_grad_(False).double()
        pairs = DIM // HEADS // 2
        sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        positions = torch.arange(64, dtype=torch.float64)
        angles = [torch.outer(positions, 1e4 ** (-torch.arange(n) / n)) for n in sizes]
        angle = torch.cat(angles, dim=1)
        self.freqs = torch.polar(torch.ones_like(angle), angle)
        size = FRAME * (21 if local == -1 else local)
        shape = (batch, size, HEADS, DIM // HEADS)
        index = (lambda: torch.zeros(1, dtype=torch.long)) if indices == "tensor" else (lambda: 0)
        self.caches = [
            {
                "k": torch.zeros(shape, dtype=torch.float64),
                "v": torch.zeros(shape, dtype=torch.float64),
                "global_end_index": index(),
                "local_end_index": index(),
            }
            for _ in range(LAYERS)
        ]

    def step(self, x: Tensor, frames: int, start: int) -> Tensor:
        grid_sizes = torch.tensor([[frames, HEIGHT, WIDTH]] * len(x))
        for block, cache in zip(self.generator, self.caches, strict=True):
            x = block(x, None, grid_sizes, self.freqs, None, cache, start, None)
        return x

    def run(self, blocks: int, batch: int = 2) -> Tensor:
        """Make `blocks` blocks: two denoising steps and the pass that writes clean keys."""
        g = torch.Generator().manual_seed(1)
        out = []
        for block in range(blocks):
            for _ in range(2):
                x = torch.randn(batch, BLOCK, DIM, generator=g, dtype=torch.float64)
                x = self.step(x, FRAMES, block * BLOCK)
                out.append(x)
            self.step(x.tanh(), FRAMES, block * BLOCK)
        return torch.stack(out)


class Counting(TorchDispatchMode):
    """Counts the calls of each op, and of `clone` the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.cloned = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        out = func(*args, **(kwargs or {}))
        if name in ("clone", "roll", "cat"):
            self.cloned = max(self.cloned, out.numel())
        return out


@contextmanager
def counting() -> Iterator[Counting]:
    with Counting() as mode:
        yield mode


@pytest.mark.parametrize("indices", ["tensor", "int"])
@pytest.mark.parametrize(("local", "sink"), [(6, 0), (9, 3), (7, 1), (12, 3), (9, 0)])
def test_patched_equals_unpatched_over_twelve_blocks(local: int, sink: int, indices: str) -> None:
    plain, patched = Pipeline(local, sink, indices), Pipeline(local, sink, indices)
    assert patch(patched) == LAYERS
    assert (patched.run(12) - plain.run(12)).abs().max() < 1e-10
    for mine, theirs in zip(patched.caches, plain.caches, strict=True):
        for name in ("global_end_index", "local_end_index"):
            assert type(mine[name]) is type(theirs[name])
            assert int(mine[name]) == int(theirs[name])


def test_without_local_attention_too_up_to_the_end_of_the_cache() -> None:
    plain, patched = Pipeline(-1, 0), Pipeline(-1, 0)
    patch(patched)
    assert (patched.run(7) - plain.run(7)).abs().max() < 1e-10
    with pytest.raises(ValueError, match="within its cache of 126 tokens, got 144"):
        patched.step(torch.zeros(2, BLOCK, DIM, dtype=torch.float64), FRAMES, 7 * BLOCK)


def test_a_patched_run_clones_no_cache_and_reads_nothing_back() -> None:
    plain, patched = Pipeline(6, 0), Pipeline(6, 0)
    patch(patched)
    # warm: tables and indices are made once
    patched.run(1)
    with counting() as ours:
        patched.run(12)
    with counting() as theirs:
        plain.run(12)
    slots = plain.caches[0]["k"].numel()
    assert theirs.cloned >= slots // 2
    assert theirs.calls["_local_scalar_dense"] > 100
    assert ours.cloned < slots // 2
    assert ours.calls["_local_scalar_dense"] == 0


def test_a_new_video_in_the_same_caches_is_not_disturbed_by_the_old_one() -> None:
    fresh, used = Pipeline(6, 0), Pipeline(6, 0)
    patch(fresh), patch(used)
    used.run(5)
    for cache in used.caches:
        cache["global_end_index"] = torch.zeros(1, dtype=torch.long)
        cache["local_end_index"] = torch.zeros(1, dtype=torch.long)
    assert torch.equal(used.run(5), fresh.run(5))


def test_unpatch_restores_the_original() -> None:
    plain, patched = Pipeline(6, 0), Pipeline(6, 0)
    assert patch(patched) == patch(patched) == LAYERS
    assert unpatch(patched) == LAYERS
    assert unpatch(patched) == 0
    assert torch.equal(patched.run(4), plain.run(4))


def test_a_call_without_a_cache_goes_to_the_original() -> None:
    pipeline = Pipeline(6, 0)
    layer = pipeline.generator[0].self_attn
    x = torch.randn(1, BLOCK, DIM, dtype=torch.float64)
    arguments = (x, None, torch.tensor([[FRAMES, HEIGHT, WIDTH]]), pipeline.freqs, None)
    before = layer(*arguments)
    patch(pipeline.generator)
    assert torch.equal(layer(*arguments), before)


def test_what_cannot_be_patched_is_named() -> None:
    with pytest.raises(ValueError, match="must hold self-attention of Self-Forcing's shape"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got int with none"):
        patch(3)
    uneven = Pipeline(6, 0)
    patch(uneven)
    x = torch.randn(2, BLOCK, DIM, dtype=torch.float64)
    grid_sizes = torch.tensor([[3, 2, 3], [3, 3, 2]])
    with pytest.raises(ValueError, match="must be the same in a batch"):
        uneven.generator[0].self_attn(
            x, None, grid_sizes, uneven.freqs, None, uneven.caches[0], 0, None
        )
