"""Token models with a static KV cache: one Llama for every layout, several tokens a pass.

A pass feeds tokens to explicit cache slots, and a token's position is its slot, as in MineWorld and
Cosmos. Attention is `sdvg_kernels.diagonal_attention`, which reads the cache in place and knows
from slots and passes what each token sees; on a CPU it is PyTorch's with `diagonal_mask`, which is
made once for all layers. A pass of speculative decoding feeds a chain and a tree (`feed_tree`):
their entries say by bits which slots they see behind those that all see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.llama import (
    LlamaLayer,
    LlamaSizes,
    TokenCache,
    angles,
    attend_causal,
    attend_masked,
    attend_tree,
    empty_cache,
    run_layers,
)
from sdvg_kernels import TokenGrid, diagonal_attention, diagonal_mask

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

_Model = TypeVar("_Model", bound=nn.Module)

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
        self.layers = nn.ModuleList(LlamaLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.width))
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.sizes.vocabulary

    @property
    def width(self) -> int:
        """How wide a feature is."""
        return self.sizes.width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.device

    def new_cache(self, batch: int, slots: int, *, scratch: int = 0) -> TokenCache:
        """Return an empty cache for `batch` sequences; ValueError where positions end before.

        `scratch` slots more have no position of their own: for `feed_tree`, which says positions.
        """
        leftpad = None
        if self.padding is not None:
            leftpad = torch.zeros(batch, dtype=torch.int32, device=self.device)
        return empty_cache(
            self.sizes, batch, slots + scratch, self.angles(slots), self.norm, leftpad
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of ids."""
        return self.embedding(ids)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits `[..., ids]` of features, as a pass returns them."""
        return self.head(features)

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
    def prefill(self, ids: Tensor, cache: TokenCache) -> Tensor:
        """Write the K/V of `ids [B, L]` to the first slots; each token sees those before it.

        Returns: the features [B, L, width].
        """
        batch, length = ids.shape
        sees = None
        if cache.leftpad is not None:
            cache.leftpad.copy_((ids == self.padding).sum(1))
            place = torch.arange(length, device=ids.device)
            sees = (place <= place[:, None]) & (place >= cache.leftpad[:, None, None])
            # what nobody sees sees itself: no row of weights is empty
            sees = (sees | torch.eye(length, dtype=torch.bool, device=ids.device))[:, None]
        if not length:
            return self.embed(ids)
        place = torch.arange(length, device=ids.device).expand(batch, -1)
        x = run_layers(
            self.layers, self.embed(ids), (cache.cos[:length], cache.sin[:length]), cache, place,
            length, partial(attend_causal, mask=sees),
        )  # fmt: skip
        return self._features(x)

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
        seen, leftpad = cache.slots if length is None else length, cache.leftpad
        if not self._masks(ids):
            mode = "published" if published else "exact"

            def attend(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
                return diagonal_attention(
                    query, k_cache, v_cache, slots, steps, grid, mode=mode, cache_leftpad=leftpad
                )

        else:
            if published:
                mask = _published(slots, seen, leftpad)[:, None]
            else:
                mask = diagonal_mask(slots, steps, grid, seen, cache_leftpad=leftpad)[:, None]
            attend = partial(attend_masked, mask=mask)
        x = run_layers(
            self.layers, self.embed(ids), cache.turns(slots), cache, cache.place(slots), seen,
            attend,
        )  # fmt: skip
        return self.logits(self._features(x))

    @torch.no_grad()
    def feed_tree(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        mask: Tensor,
        cache: TokenCache,
        *,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass of chains and trees and return its features.

        Args:
            ids: [B, T] int64.
            slots: [B, T] int32, where K/V are written; -1 is padding.
            positions: [B, T] int32, what queries and keys turn by; siblings share theirs.
            lengths: [B] int32, the slots that all entries of a sequence see.
            mask: [B, T, W] int32; bit j % 32 of word j // 32: the entry sees slot `lengths + j`
                too. Without a bit it is padding.
            cache: written at `slots`.
            length: no slot from here on is seen; None: all may be.

        Returns: [B, T, width], what `logits` takes; of padding, anything.

        Cost: the weights and the visible cache once. Safe in a CUDA graph.
        """
        seen = cache.slots if length is None else length
        x = run_layers(
            self.layers, self.embed(ids), cache.turns(positions), cache, cache.place(slots), seen,
            attend_tree(lengths, mask, cache.leftpad, seen, self._masks(ids)),
        )  # fmt: skip
        return self._features(x)

    def _features(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norm, self.sizes.eps)

    def _masks(self, ids: Tensor) -> bool:
        return ids.device.type == "cpu" if self.masked is None else self.masked


def _published(slots: Tensor, size: int, leftpad: Tensor | None) -> Tensor:
    """Return which slots are seen where the order of decoding is left out: [B, T, size]."""
    every = torch.arange(size, device=slots.device)
    sees = every <= slots[..., None]
    return sees if leftpad is None else sees & (every >= leftpad[:, None, None])


def from_transformers(model: LlamaForCausalLM) -> TokenLlama:
    """Return the same model over a static cache, its weights copied.

    Raises ValueError for what it has that this one has not: biases, rotary angles that are scaled.
    """
    made = load_checkpoint(model.state_dict(), read_sizes(model.config))
    return made.to(model.device)


def read_sizes(config: LlamaConfig) -> LlamaSizes:
    """Return the sizes of a model of transformers; ValueError for rotary angles that are scaled."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"tokens: rope_type must be 'default', got {kind!r}")
    return LlamaSizes(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.intermediate_size, config.vocab_size,
        config.rms_norm_eps, float(rope["rope_theta"]),
    )  # fmt: skip


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
