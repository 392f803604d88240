"""Stand-ins for the models that `sdvg.adapters.patch` takes, written from descriptions, tiny.

`SelfForcing`, `LongLive` and `Krea` have the names, cache dicts, rolling and calls of the original
repositories' causal Wan; nothing here is theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

DIM, HEADS, LAYERS, TEXT = 32, 2, 2, 5
HEIGHT, WIDTH, FRAMES = 2, 3, 3
FRAME, BLOCK = HEIGHT * WIDTH, FRAMES * HEIGHT * WIDTH
Cache = dict[str, object]


class RMSNorm(nn.Module):
    """Over all heads, with a weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`."""
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


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of `[B, T, H, D]`, with a bias on the logits."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def number(value: object) -> int:
    """An index as the originals read it: from the device, where it is a tensor."""
    return value.item() if isinstance(value, Tensor) else value


def put(kv_cache: Cache, **indices: int) -> None:
    """Write indices, in place where they are tensors."""
    for name, value in indices.items():
        if isinstance(kv_cache[name], Tensor):
            kv_cache[name].fill_(value)
        else:
            kv_cache[name] = value


class Projections(nn.Module):
    """What self- and cross-attention have in common."""

    def __init__(self, local_attn_size: int = -1, sink_size: int = 0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIM // HEADS
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM), RMSNorm(DIM)

    def project(self, x: Tensor, of: Tensor) -> tuple[Tensor, ...]:
        """Return q of `x`, k and v of `of`, by heads."""
        parts = self.norm_q(self.q(x)), self.norm_k(self.k(of)), self.v(of)
        return tuple(part.unflatten(2, (self.num_heads, self.head_dim)) for part in parts)


class CrossAttention(Projections):
    """K and V of the text are computed once, and kept in a dict with `is_init`."""

    def forward(
        self, x: Tensor, context: Tensor, context_lens: Tensor | None, crossattn_cache: Cache | None
    ) -> Tensor:
        """Attend to the text."""
        q, k, v = self.project(x, context)
        if crossattn_cache is not None:
            if not crossattn_cache["is_init"]:
                crossattn_cache |= {"is_init": True, "k": k, "v": v}
            k, v = crossattn_cache["k"], crossattn_cache["v"]
        return self.o(attend(q, k, v).flatten(2))


class SelfForcingAttention(Projections):
    """A cache that is shifted left when it is full, by clone and copy."""

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor | None,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Tensor | None,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attend to the cache, or without one to the tokens themselves."""
        frame = int(grid_sizes[0][1] * grid_sizes[0][2])
        q, k, v = self.project(x, x)
        q, k = (rope(part, grid_sizes, freqs, current_start // frame) for part in (q, k))
        if kv_cache is None:
            return self.o(attend(q, k, v).flatten(2))
        new, end, local_end = self.roll(kv_cache, x.shape[1], current_start, frame)
        kv_cache["k"][:, local_end - new : local_end] = k
        kv_cache["v"][:, local_end - new : local_end] = v
        seen = slice(max(0, local_end - self.max_attention_size), local_end)
        out = self.seen(q, kv_cache["k"][:, seen], kv_cache["v"][:, seen], frame)
        put(kv_cache, global_end_index=end, local_end_index=local_end)
        return self.o(out.flatten(2))

    def roll(self, kv_cache: Cache, new: int, start: int, frame: int) -> tuple[int, int, int]:
        """Make room, and return the new tokens, their end, and where they end in the cache."""
        end, size, sink = start + new, kv_cache["k"].shape[1], self.sink_size * frame
        global_end, local_end = (
            number(kv_cache[name]) for name in ("global_end_index", "local_end_index")
        )
        evicted = 0
        if self.local_attn_size != -1 and end > global_end and new + local_end > size:
            evicted = new + local_end - size
            kept = local_end - evicted - sink
            for name in ("k", "v"):
                source = kv_cache[name][:, sink + evicted : sink + evicted + kept].clone()
                kv_cache[name][:, sink : sink + kept] = source
        return new, end, local_end + end - global_end - evicted

    def seen(self, q: Tensor, k: Tensor, v: Tensor, frame: int) -> Tensor:
        """Attend to what is seen."""
        return attend(q, k, v)


class UnropedAttention(SelfForcingAttention):
    """Keys are cached before RoPE, and the whole window is rotated in every call."""

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor | None,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Tensor | None,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> Tensor:
        """Attend to the cache."""
        frame = int(grid_sizes[0][1] * grid_sizes[0][2])
        q, k, v = self.project(x, x)
        new, end, local_end = self.roll(kv_cache, x.shape[1], current_start, frame)
        kv_cache["k"][:, local_end - new : local_end] = k
        kv_cache["v"][:, local_end - new : local_end] = v
        put(kv_cache, global_end_index=end, local_end_index=local_end)
        sizes = grid_sizes.clone()
        sizes[:, 0] = local_end // frame
        keys = rope(kv_cache["k"][:, :local_end], sizes, freqs, 0)
        q = rope(q, grid_sizes, freqs, (local_end - new) // frame)
        return self.o(attend(q, keys, kv_cache["v"][:, :local_end]).flatten(2))


class LongLiveAttention(SelfForcingAttention):
    """Writes go to clones; what is to be kept is returned beside the output."""

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor | None,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Tensor | None,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        sink_recache_after_switch: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[object, ...]]:
        """Attend to the sink and the newest keys of cloned caches."""
        given = (x, seq_lens, grid_sizes, freqs, block_mask)
        if kv_cache is None:
            return super().forward(*given)
        copied = {name: kv_cache[name].clone() for name in ("k", "v")}
        copied |= {name: number(kv_cache[name]) for name in ("global_end_index", "local_end_index")}
        out = super().forward(*given, copied, current_start)
        return out, tuple(copied.values())


class KreaAttention(SelfForcingAttention):
    """A pass with a block mask rebuilds the cache; old keys may weigh less."""

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor | None,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: Tensor | None,
        kv_cache: Cache | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        kv_cache_attention_bias: float = 1.0,
    ) -> Tensor:
        """Attend to the cache, or by a mask to the tokens, which then are the cache."""
        self.weight = kv_cache_attention_bias
        if block_mask is None:
            given = (x, seq_lens, grid_sizes, freqs, None, kv_cache, current_start)
            return super().forward(*given)
        q, k, v = self.project(x, x)
        q, k = (rope(part, grid_sizes, freqs, 0) for part in (q, k))
        kv_cache["k"][:, : x.shape[1]], kv_cache["v"][:, : x.shape[1]] = k, v
        put(kv_cache, global_end_index=x.shape[1], local_end_index=x.shape[1])
        return self.o(attend(q, k, v, block_mask).flatten(2))

    def seen(self, q: Tensor, k: Tensor, v: Tensor, frame: int) -> Tensor:
        """Attend, with a log-bias on the keys between the first frame and the block."""
        bias = q.new_zeros(k.shape[1])
        bias[frame : k.shape[1] - q.shape[1]] = math.log(self.weight)
        return attend(q, k, v, bias.expand(q.shape[1], -1))


class Block(nn.Module):
    """Self-attention, cross-attention, a small FFN; a deferred update is handed on."""

    def __init__(self, kind: type[Projections], *sizes: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = kind(*sizes), CrossAttention()
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(
        self, x: Tensor, text: Tensor, crossattn_cache: Cache, *given: object, **more: object
    ) -> object:
        """Return x, or x and the update."""
        y = self.self_attn(layer_norm(x, x.shape[-1:]), *given, **more)
        y, update = y if isinstance(y, tuple) else (y, None)
        x = x + y
        x = x + self.cross_attn(layer_norm(x, x.shape[-1:]), text, None, crossattn_cache)
        x = x + self.ffn(x)
        return x if update is None else (x, update)


class Model(nn.Module):
    """The blocks one after another."""

    def __init__(self, kind: type[Projections], *sizes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind, *sizes) for _ in range(LAYERS))
        pairs = DIM // HEADS // 2
        parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        positions = torch.arange(64, dtype=torch.float64)
        angle = torch.cat([torch.outer(positions, 1e4 ** (-torch.arange(n) / n)) for n in parts], 1)
        self.freqs = torch.polar(torch.ones_like(angle), angle)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        kv_cache: list[Cache],
        crossattn_cache: list[Cache],
        frames: int,
        start: int,
        block_mask: Tensor | None = None,
        **more: object,
    ) -> Tensor:
        """Return the last block's x `[B, T, C]`."""
        grid_sizes = torch.tensor([[frames, HEIGHT, WIDTH]] * len(x))
        updates = []
        caches = zip(self.blocks, kv_cache, crossattn_cache, strict=True)
        for index, (block, cache, cross) in enumerate(caches):
            given = (None, grid_sizes, self.freqs, block_mask, cache, start, None)
            x = block(x, text, cross, *given, **more)
            if isinstance(x, tuple):
                x, update = x
                updates.append((index, update))
        if updates:
            self._apply_cache_updates(kv_cache, updates)
        return x


class DeferringModel(Model):
    """Writes what its layers returned."""

    def _apply_cache_updates(self, kv_cache: list[Cache], updates: list[tuple]) -> None:
        for index, (k, v, global_end, local_end) in updates:
            kv_cache[index]["k"].copy_(k)
            kv_cache[index]["v"].copy_(v)
            put(kv_cache[index], global_end_index=global_end, local_end_index=local_end)


class SelfForcing:
    """Holds a model and its caches, as `CausalInferencePipeline` does."""

    attention: type[Projections] = SelfForcingAttention
    model: type[Model] = Model

    def __init__(self, local: int, sink: int = 0, indices: str = "tensor", batch: int = 2) -> None:
        torch.manual_seed(local * 10 + sink)
        self.generator = self.model(self.attention, local, sink)
        self.generator.requires_grad_(False).double()
        self.text = torch.randn(batch, TEXT, DIM, dtype=torch.float64)
        size = FRAME * (21 if local == -1 else local)
        shape = (batch, size, HEADS, DIM // HEADS)
        index = (lambda: torch.zeros(1, dtype=torch.long)) if indices == "tensor" else (lambda: 0)
        self.caches: list[Cache] = [
            {
                "k": torch.zeros(shape, dtype=torch.float64),
                "v": torch.zeros(shape, dtype=torch.float64),
                "global_end_index": index(),
                "local_end_index": index(),
            }
            for _ in range(LAYERS)
        ]
        self.cross: list[Cache] = [{"is_init": False} for _ in range(LAYERS)]

    def to(self, device: str, dtype: torch.dtype) -> SelfForcing:
        """Move the model, the text and the caches; indices keep their dtype."""
        self.generator.to(device).to(dtype).freqs = self.generator.freqs.to(device)
        self.text = self.text.to(device, dtype)
        for cache in self.caches:
            for name, value in cache.items():
                if isinstance(value, Tensor):
                    cache[name] = value.to(device, dtype if name in ("k", "v") else value.dtype)
        return self

    def step(self, x: Tensor, frames: int, start: int, *rest: object, **more: object) -> Tensor:
        """Run the model."""
        caches = (self.caches, self.cross)
        return self.generator(x, self.text, *caches, frames, start, *rest, **more)

    def block(self, index: int, random: torch.Generator, **more: object) -> list[Tensor]:
        """Make a block: two denoising steps and the pass that writes clean keys."""
        out = []
        for _ in range(2):
            shape = (len(self.text), BLOCK, DIM)
            x = torch.randn(shape, generator=random, dtype=torch.float64).to(self.text)
            x = self.step(x, FRAMES, index * BLOCK, **more)
            out.append(x)
        self.step(x.tanh(), FRAMES, index * BLOCK, **more)
        return out

    def run(self, blocks: int, **more: object) -> Tensor:
        """Make `blocks` blocks, and return all that the model gave."""
        random = torch.Generator().manual_seed(1)
        made = [self.block(index, random, **more) for index in range(blocks)]
        return torch.stack([x for block in made for x in block])


class LongLive(SelfForcing):
    """The model writes its caches at the end of a forward."""

    attention, model = LongLiveAttention, DeferringModel


class Krea(SelfForcing):
    """Rebuilds its cache from the newest clean block before each block."""

    attention = KreaAttention

    def __init__(self, indices: str = "int") -> None:
        super().__init__(2 * FRAMES, 0, indices)
        self.clean: Tensor | None = None

    def block(self, index: int, random: torch.Generator, **more: object) -> list[Tensor]:
        """Rebuild the cache, then denoise behind it."""
        for cache in self.caches:
            cache["k"].zero_()
            cache["v"].zero_()
            put(cache, global_end_index=0, local_end_index=0)
        if self.clean is not None:
            self.step(self.clean, FRAMES, 0, torch.ones(BLOCK, BLOCK, dtype=torch.bool))
        start = 0 if self.clean is None else BLOCK
        x = torch.randn(len(self.text), BLOCK, DIM, generator=random, dtype=torch.float64)
        out = []
        for _ in range(2):
            x = self.step(x, FRAMES, start, **more)
            out.append(x)
        self.clean = x.tanh()
        return out
