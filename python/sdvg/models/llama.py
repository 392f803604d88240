"""What token models and their drafters are made of: a Llama's layers over a static KV cache.

A pass writes K and V to explicit slots, then attends. On a CPU that is PyTorch's attention under a
mask which is made once for all layers; elsewhere an op of `sdvg_kernels` reads the cache in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg_kernels import tree_attention

# query [B, T, H, D], and K and V of a layer's slots that may be seen -> [B, T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LlamaSizes:
    """What a Llama's weights do not say by their shapes, and what they do.

    `grid` is the (frames, height, width) of rotary angles in three axes (Cosmos), slot by slot in
    raster order; None: one axis, the slot itself.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    eps: float = 1e-6
    theta: float = 1e4
    qk_norm: bool = False
    grid: tuple[int, int, int] | None = None


class TokenCache(NamedTuple):
    """K and V of all layers `[layers, B, slots + 1, kv_heads, head_dim]`; padding is written last.

    Nothing ever reads the last slot. `cos` and `sin` `[positions, 1, head_dim]` are the positions'
    angles, of as many as there are slots without the scratch ones.
    `leftpad` [B] int32: slots at a sequence's start that nobody sees; None: all are seen.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    leftpad: Tensor | None = None

    @property
    def slots(self) -> int:
        """How many tokens of a sequence it holds."""
        return self.k.shape[2] - 1

    def place(self, slots: Tensor) -> Tensor:
        """Return where K/V go that belong to `slots`: int64, the last slot for -1, padding."""
        return torch.where(slots < 0, self.slots, slots).long()

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[B, T, 1, head_dim]` of positions; past the last, its."""
        at = positions.clamp(0, len(self.cos) - 1)
        return self.cos[at], self.sin[at]


class LlamaLayer(nn.Module):
    """One block of a Llama, apart from its attention; `normed` is whether its input is normed."""

    def __init__(self, sizes: LlamaSizes, *, normed: bool = True) -> None:
        super().__init__()
        self.sizes = sizes
        width, dim = sizes.width, sizes.head_dim
        if normed:
            self.attention_norm = nn.Parameter(torch.ones(width))
        self.normed = normed
        self.ffn_norm = nn.Parameter(torch.ones(width))
        # query, key and value in one product, gate and up in one
        self.qkv = nn.Linear(width, (sizes.heads + 2 * sizes.kv_heads) * dim, bias=False)
        self.out = nn.Linear(sizes.heads * dim, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, width, bias=False)
        if sizes.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(dim))
            self.k_norm = nn.Parameter(torch.ones(dim))

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value `[B, T, heads, D]`, rotated."""
        sizes = self.sizes
        if self.normed:
            x = F.rms_norm(x, x.shape[-1:], self.attention_norm, sizes.eps)
        heads = self.qkv(x).unflatten(-1, (-1, sizes.head_dim))
        query, key, value = heads.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), 2)
        if sizes.qk_norm:
            query = F.rms_norm(query, (sizes.head_dim,), self.q_norm, sizes.eps)
            key = F.rms_norm(key, (sizes.head_dim,), self.k_norm, sizes.eps)
        return _turn(query, *angles), _turn(key, *angles), value

    def feed(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the stream after the layer's attention `[B, T, heads, D]` and its products."""
        x = x + self.out(attended.flatten(2))
        normed = F.rms_norm(x, x.shape[-1:], self.ffn_norm, self.sizes.eps)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def empty_cache(
    sizes: LlamaSizes,
    batch: int,
    slots: int,
    table: tuple[Tensor, Tensor],
    like: Tensor,
    leftpad: Tensor | None,
) -> TokenCache:
    """Return a `TokenCache` of zeros with the angles `table`, in the dtype and place of `like`."""
    shape = (sizes.layers, batch, slots + 1, sizes.kv_heads, sizes.head_dim)
    # zeros: what is masked must not be NaN times 0
    k, v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in "kv")
    return TokenCache(k, v, *(part.to(like) for part in table), leftpad)


def run_layers(
    layers: Iterable[LlamaLayer],
    x: Tensor,
    turned: tuple[Tensor, Tensor],
    cache: TokenCache,
    place: Tensor,
    seen: int,
    attend: Attend,
) -> Tensor:
    """Return the stream [B, T, width] behind the layers.

    Writes K/V to the slots `place [B, T]` int64, and attends to the first `seen` slots.
    """
    batch = torch.arange(len(x), device=x.device)[:, None]
    for i, layer in enumerate(layers):
        query, key, value = layer.project(x, turned)
        k_cache, v_cache = cache.k[i], cache.v[i]
        k_cache.index_put_((batch, place), key.to(k_cache.dtype))
        v_cache.index_put_((batch, place), value.to(v_cache.dtype))
        x = layer.feed(x, attend(query, k_cache[:, :seen], v_cache[:, :seen]))
    return x


def attend_causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention `[B, T, H, D]` to all before and itself, or where `mask [B, 1, T, S]` is."""
    out = F.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def attend_tree(
    lengths: Tensor, mask: Tensor, leftpad: Tensor | None, seen: int, masked: bool
) -> Attend:
    """Return the attention of `feed_tree`'s entries: by our op, or `masked` by PyTorch's."""
    if masked:
        return partial(attend_masked, mask=tree_mask(lengths, mask, leftpad, seen)[:, None])
    return lambda query, k_cache, v_cache: tree_attention(
        query, k_cache, v_cache, lengths, mask, cache_leftpad=leftpad
    )


def angles(sizes: LlamaSizes, slots: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[slots, 1, head_dim]` float32, for rotation by halves.

    With a `grid`, a third of the angles each turn by frame, row and column: `head_dim // 6` pairs
    by row, as many by column, the others, first, by frame.
    """
    position = torch.arange(slots, dtype=torch.float32)
    if sizes.grid is None:
        turned = position[:, None] * frequencies(sizes.head_dim, sizes.theta)
    else:
        _, height, width = sizes.grid
        spatial = sizes.head_dim // 6 * 2
        axes = (
            (position // (height * width), sizes.head_dim - 2 * spatial),
            (position // width % height, spatial),
            (position % width, spatial),
        )
        turned = torch.cat(
            [place[:, None] * frequencies(dim, sizes.theta) for place, dim in axes], 1
        )
    both = torch.cat((turned, turned), 1)[:, None]
    return both.cos(), both.sin()


def frequencies(dim: int, theta: float) -> Tensor:
    """Return what the pairs of `dim` dims turn by for one position: [dim / 2] float32."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def by_halves(weight: Tensor, sizes: LlamaSizes) -> Tensor:
    """Return the rows of query, key and value so that the pairs that turn are half a head apart.

    In the release a pair lies side by side; a product of query and key does not tell.
    """
    turned = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    pairs = weight[:turned].unflatten(0, (-1, sizes.head_dim // 2, 2))
    return torch.cat((pairs.transpose(1, 2).flatten(0, 2), weight[turned:]))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def tree_mask(lengths: Tensor, mask: Tensor, leftpad: Tensor | None, size: int) -> Tensor:
    """Return which of `size` slots the entries of `feed_tree` see: bool [B, T, size]."""
    every = torch.arange(size, device=mask.device)
    # [B, size]: which bit a slot has
    bit = every - lengths[:, None]
    word = (bit >> 5).clamp(0, mask.shape[2] - 1)[:, None].expand(-1, mask.shape[1], -1)
    marked = (mask.gather(2, word) >> (bit & 31)[:, None] & 1).bool()
    behind = ((bit >= 0) & (bit < 32 * mask.shape[2]))[:, None]
    before = bit < 0 if leftpad is None else (bit < 0) & (every >= leftpad[:, None])
    return (before[:, None] & (mask != 0).any(2, keepdim=True)) | (behind & marked)


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return attention `[B, T, H, D]` where `mask [B, 1, T, S]`; heads that share keys are rows."""
    batch, rows, heads, dim = query.shape
    shared = heads // key.shape[2]
    # [B, Hk, shared * T, D]
    grouped = query.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        grouped, key.transpose(1, 2), value.transpose(1, 2), mask.repeat(1, 1, shared, 1)
    )
    out = out.unflatten(2, (shared, rows)).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, rows, heads, dim)
