"""Token models with a static KV cache: one Llama for every layout, several tokens a pass.

A pass feeds tokens to explicit cache slots, and a token's position is its slot, as in MineWorld and
Cosmos. Attention is `sdvg_kernels.diagonal_attention`, which reads the cache in place and knows
from slots and passes what each token sees; on a CPU it is PyTorch's with `diagonal_mask`, which is
made once for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg_kernels import TokenGrid, diagonal_attention, diagonal_mask

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_Model = TypeVar("_Model", bound=nn.Module)


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


# the released configurations (microsoft/mineworld, nvidia-cosmos/cosmos-predict1)
MINEWORLD = {
    "300M": LlamaSizes(20, 1024, 16, 4, 64, 4096, 8262),
    "700M": LlamaSizes(20, 2048, 32, 4, 64, 4096, 8262),
    "1200M": LlamaSizes(20, 2048, 32, 4, 64, 8192, 8262),
}
COSMOS = {
    "4B": LlamaSizes(16, 4096, 32, 8, 128, 14336, 64000, 1e-5, 5e5, True, (5, 40, 64)),
    "12B": LlamaSizes(40, 5120, 32, 8, 128, 14336, 64000, 1e-5, 5e5, True, (5, 40, 64)),
}


class TokenCache(NamedTuple):
    """K and V of all layers `[layers, B, slots + 1, kv_heads, head_dim]`; padding is written last.

    Nothing ever reads the last slot. `cos` and `sin` `[slots, 1, head_dim]` are the slots' angles.
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


class _Layer(nn.Module):
    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width, dim = sizes.width, sizes.head_dim
        self.attention_norm = nn.Parameter(torch.ones(width))
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
        normed = F.rms_norm(x, x.shape[-1:], self.attention_norm, sizes.eps)
        heads = self.qkv(normed).unflatten(-1, (-1, sizes.head_dim))
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


class TokenLlama(nn.Module):
    """A Llama that feeds any tokens to any slots of its cache.

    Made by `from_transformers`, or by `load_checkpoint` of MineWorld's or Cosmos' weights; with
    random weights by its sizes alone.

    Attributes:
        masked: attend by PyTorch's own op under a mask; None: on a CPU.
        padding: id of nothing, at the start of a prompt that is shorter than others; None: all
            prompts of a batch are of one length.
    """

    masked: bool | None = None
    padding: int | None = None

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.width))
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.sizes.vocabulary

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    def new_cache(self, batch: int, slots: int) -> TokenCache:
        """Return an empty cache for `batch` sequences; ValueError where positions end before."""
        sizes, dtype, device = self.sizes, self.norm.dtype, self.device
        table = (part.to(device, dtype) for part in self.angles(slots))
        shape = (sizes.layers, batch, slots + 1, sizes.kv_heads, sizes.head_dim)
        # zeros: what is masked must not be NaN times 0
        tensors = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        leftpad = None
        if self.padding is not None:
            leftpad = torch.zeros(batch, dtype=torch.int32, device=device)
        return TokenCache(*tensors, *table, leftpad)

    def angles(self, slots: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[slots, 1, head_dim]` of the slots; ValueError beyond them."""
        grid = self.sizes.grid
        if grid is not None and slots > (most := grid[0] * grid[1] * grid[2]):
            raise ValueError(
                f"tokens: slots must be at most {most}, the positions of a grid of "
                f"{list(grid)}, got {slots}; decode fewer frames, or set a shorter context"
            )
        return angles(self.sizes, slots)

    def clear(self, cache: TokenCache) -> None:
        """Write zeros over all K/V, as in a new cache."""
        cache.k.zero_()
        cache.v.zero_()

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: TokenCache) -> None:
        """Write the K/V of `ids [B, L]` to the first slots; each token sees those before it."""
        length, sees = ids.shape[1], None
        if cache.leftpad is not None:
            cache.leftpad.copy_((ids == self.padding).sum(1))
            place = torch.arange(length, device=ids.device)
            sees = (place <= place[:, None]) & (place >= cache.leftpad[:, None, None])
            # what nobody sees sees itself: no row of weights is empty
            sees = (sees | torch.eye(length, dtype=torch.bool, device=ids.device))[:, None]
        if not length:
            return
        cos, sin = cache.cos[:length], cache.sin[:length]
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            query, key, value = layer.project(x, (cos, sin))
            cache.k[i, :, :length], cache.v[i, :, :length] = key, value
            out = F.scaled_dot_product_attention(
                *(part.transpose(1, 2) for part in (query, key, value)),
                attn_mask=sees,
                is_causal=sees is None,
                enable_gqa=True,
            )
            x = layer.feed(x, out.transpose(1, 2))

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        steps: Tensor,
        grid: TokenGrid,
        cache: TokenCache,
        *,
        published: bool = False,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass and return its logits.

        Args:
            ids: [B, T] int64.
            slots, steps: [B, T] int32, as a `DiagonalSchedule` has them; slot -1 is padding.
            grid: the schedule's.
            cache: written at `slots`.
            published: the released loops' mask (`diagonal_attention`, mode "published").
            length: no slot from here on is seen; None: all may be.

        Returns: [B, T, vocabulary]; of padding, anything.

        Cost: the weights and the visible cache once. Safe in a CUDA graph.
        """
        batch = torch.arange(len(ids), device=ids.device)[:, None]
        place = torch.where(slots < 0, cache.slots, slots).long()
        cos, sin = (part[slots.clamp(min=0)] for part in (cache.cos, cache.sin))
        seen = cache.slots if length is None else length
        masked = ids.device.type == "cpu" if self.masked is None else self.masked
        mask, leftpad = None, cache.leftpad
        if masked and published:
            mask = _published(slots, seen, leftpad)[:, None]
        elif masked:
            mask = diagonal_mask(slots, steps, grid, seen, cache_leftpad=leftpad)[:, None]
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            query, key, value = layer.project(x, (cos, sin))
            k_cache, v_cache = cache.k[i], cache.v[i]
            k_cache.index_put_((batch, place), key)
            v_cache.index_put_((batch, place), value)
            k_cache, v_cache = k_cache[:, :seen], v_cache[:, :seen]
            if masked:
                out = _masked(query, k_cache, v_cache, mask)
            else:
                mode = "published" if published else "exact"
                out = diagonal_attention(
                    query, k_cache, v_cache, slots, steps, grid, mode=mode, cache_leftpad=leftpad
                )
            x = layer.feed(x, out)
        return self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.sizes.eps))


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


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _published(slots: Tensor, size: int, leftpad: Tensor | None) -> Tensor:
    """Return which slots are seen where the order of decoding is left out: [B, T, size]."""
    every = torch.arange(size, device=slots.device)
    sees = every <= slots[..., None]
    return sees if leftpad is None else sees & (every >= leftpad[:, None, None])


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
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


def from_transformers(model: LlamaForCausalLM) -> TokenLlama:
    """Return the same model over a static cache, its weights copied.

    Raises ValueError for what it has that this one has not: biases, rotary angles that are scaled.
    """
    config = model.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"tokens: rope_type must be 'default', got {kind!r}")
    sizes = LlamaSizes(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.intermediate_size, config.vocab_size,
        config.rms_norm_eps, float(rope["rope_theta"]),
    )  # fmt: skip
    made = load_checkpoint(model.state_dict(), sizes)
    return made.to(model.device)


def load_checkpoint(state: Mapping[str, Tensor], sizes: LlamaSizes) -> TokenLlama:
    """Return the model of a checkpoint with transformers', MineWorld's or Cosmos' names.

    MineWorld's are transformers' behind `transformer.`, Cosmos' are Llama's own (`wq`, `w1`, ...).
    Whether there are norms of query and key is read from the names.

    Raises ValueError for names that are missing, left over or of another shape: cross-attention,
    which Cosmos' Video2World models have, is among what is not built.
    """
    names = read_names(state, sizes.layers)
    sizes = replace(sizes, qk_norm="layers.0.q_norm" in names)
    if "head.weight" not in names and "embedding.weight" in names:
        names["head.weight"] = names["embedding.weight"]
    with torch.device("meta"):
        model = TokenLlama(sizes)
    return fit(model, names)


def read_names(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by our names, those joined that we have joined."""
    names = {_name(name): tensor for name, tensor in state.items()}
    # angles are made anew; MineWorld ships its tokenizer beside
    names = {
        name: tensor
        for name, tensor in names.items()
        if not name.endswith(("inv_freq", "cos_cached", "sin_cached", "rope.freqs", "_extra_state"))
        and not name.startswith("tokenizer.")
    }
    for i in range(layers):
        for whole, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            parts = [f"layers.{i}.{part}.weight" for part in parts]
            if all(part in names for part in parts):
                made = torch.cat([names.pop(part) for part in parts])
                names[f"layers.{i}.{whole}.weight"] = made
    return names


def fit(model: _Model, names: Mapping[str, Tensor]) -> _Model:
    """Return `model` with the tensors of these names, to infer; ValueError unless all fit."""
    wanted = model.state_dict()
    for what, found in (
        ("have", sorted(wanted.keys() - names.keys())),
        ("have no", sorted(names.keys() - wanted.keys())),
    ):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(f"tokens: the checkpoint must {what} {found[0]}{more}, got otherwise")
    for name, tensor in wanted.items():
        if names[name].shape != tensor.shape:
            raise ValueError(
                f"tokens: {name} must be {list(tensor.shape)}, got {list(names[name].shape)}"
            )
    model.load_state_dict(names, assign=True)
    return model.eval().requires_grad_(False)


# of transformers, then of Llama's own files, which Cosmos keeps
_NAMES = {
    "embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "head.weight",
    "norm.weight": "norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "out",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "input_layernorm.weight": "attention_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "tok_embeddings.weight": "embedding.weight",
    "output.weight": "head.weight",
    "attention.wqkv": "qkv",
    "attention.wq": "q",
    "attention.wk": "k",
    "attention.wv": "v",
    "attention.wo": "out",
    "attention.q_norm.weight": "q_norm",
    "attention.k_norm.weight": "k_norm",
    "feed_forward.w1": "gate",
    "feed_forward.w3": "up",
    "feed_forward.w2": "down",
    "attention_norm.weight": "attention_norm",
    "ffn_norm.weight": "ffn_norm",
}


def _name(name: str) -> str:
    """Return our name of a checkpoint's tensor, or its own without the prefix."""
    for prefix in ("transformer.", "model."):
        name = name.removeprefix(prefix)
    head, part = "", name
    if name.startswith("layers."):
        _, number, part = name.split(".", 2)
        head = f"layers.{number}."
    if part in _NAMES:
        return head + _NAMES[part]
    stem, _, leaf = part.rpartition(".")
    return f"{head}{_NAMES[stem]}.{leaf}" if stem in _NAMES else name
