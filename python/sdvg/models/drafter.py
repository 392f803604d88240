"""Feature-level drafters (EAGLE): one Llama layer that goes on from a target's features.

What a target's head takes at token p - 1, and the embedding of token p, give what the head would
take at token p:

    feature~(p) = layers(fc [embedding(p) ; feature(p - 1)])      token p + 1 ~ head(feature~(p))

Embedding and head are the target's, and a drafter goes on from its own features the same way. An
entry's slot and position are those of the token that it is fed, so slot 0 is never used.

Source: EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858), LANTERN (arXiv 2410.03355).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from sdvg.models.llama import (
    LlamaLayer,
    LlamaSizes,
    TokenCache,
    angles,
    attend_causal,
    attend_tree,
    by_halves,
    empty_cache,
    run_layers,
)
from sdvg.models.tokens import TokenLlama, fit, read_names


class Target(Protocol):
    """A target as its drafter knows it (`TokenLlama`, or a model of transformers)."""

    width: int

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of ids."""
        ...


class EagleDrafter(nn.Module):
    """A drafter of features, for targets whose features are as wide.

    With random weights by its sizes alone; made by `sdvg.models.embedded.tokens.load_drafter`, or
    by `load_drafter` of LANTERN's files.

    Args:
        sizes: as a `TokenLlama`'s; the vocabulary is the target's.
        bias: whether `fc` has one.
        table: whether it has embeddings of its own; else they are the target's.

    Attributes:
        blank: id that stands for all from `sizes.vocabulary` on, what conditions; None: they are
            embedded as they are.
        masked: attend by PyTorch's own op under a mask; None: on a CPU.
    """

    blank: int | None = None
    masked: bool | None = None

    def __init__(self, sizes: LlamaSizes, *, bias: bool = True, table: bool = False) -> None:
        super().__init__()
        self.sizes = sizes
        self.fc = nn.Linear(2 * sizes.width, sizes.width, bias=bias)
        # the features are normed already
        self.layers = nn.ModuleList(
            LlamaLayer(sizes, normed=i > 0) for i in range(sizes.layers)
        )  # fmt: skip
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width) if table else None

    @property
    def width(self) -> int:
        """How wide a feature is."""
        return self.sizes.width

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.fc.weight.device

    def embed(self, ids: Tensor, target: Target) -> Tensor:
        """Return the embeddings `[..., width]` of the target's ids that this drafter is fed."""
        if self.blank is not None:
            ids = torch.where(ids < self.sizes.vocabulary, ids, self.blank)
        return target.embed(ids) if self.embedding is None else self.embedding(ids)

    def new_cache(self, target: Target, batch: int, slots: int, *, scratch: int = 0) -> TokenCache:
        """Return an empty cache for `batch` sequences of `slots` tokens, turned as the target's.

        `leftpad` is 1: a sequence's own is the target's and 1 more. `scratch` slots more have no
        position of their own.

        Raises ValueError for a target of another width or other heads, or where its positions end.
        """
        sizes = self.sizes
        if target.width != sizes.width:
            raise ValueError(
                f"drafter: target must have features of {sizes.width}, got {target.width}; take "
                "the target that the drafter was trained for"
            )
        # a model of transformers turns by the slot alone
        table = target.angles(slots) if isinstance(target, TokenLlama) else angles(sizes, slots)
        if table[0].shape[-1] != sizes.head_dim:
            raise ValueError(
                f"drafter: target must have heads of {sizes.head_dim}, got {table[0].shape[-1]}"
            )
        leftpad = torch.ones(batch, dtype=torch.int32, device=self.device)
        return empty_cache(sizes, batch, slots + scratch, table, self.fc.weight, leftpad)

    def join(self, embedded: Tensor, features: Tensor) -> Tensor:
        """Return what the layers take [B, T, width] of embeddings and features."""
        # autocast gives less than the stream has
        return self.fc(torch.cat((embedded, features), -1)).to(features.dtype)

    def forward(self, embedded: Tensor, features: Tensor, turned: tuple[Tensor, Tensor]) -> Tensor:
        """Return the features of whole sequences [B, L, width], each token seeing those before it.

        Args:
            embedded: [B, L, width], of tokens p.
            features: [B, L, width], of tokens p - 1.
            turned: cosines and sines [L, 1, head_dim] of the positions p.
        """
        x = self.join(embedded, features)
        for layer in self.layers:
            query, key, value = layer.project(x, turned)
            x = layer.feed(x, attend_causal(query, key, value))
        return x

    @torch.no_grad()
    def feed(
        self,
        embedded: Tensor,
        features: Tensor,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        mask: Tensor,
        cache: TokenCache,
        *,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass of chains and trees and return the features, which the target's head takes.

        Args:
            embedded: [B, T, width], of tokens p (`embed`).
            features: [B, T, width], of the tokens before them: the target's, or this drafter's.
            slots: [B, T] int32, where K/V are written; -1 is padding.
            positions: [B, T] int32, the target's numbers of the tokens; siblings share theirs.
            lengths, mask, length: as for `TokenLlama.feed_tree`.
            cache: written at `slots`.

        Returns: [B, T, width]; of padding, anything.

        Cost: the weights and the visible cache once. Safe in a CUDA graph.
        """
        seen = cache.slots if length is None else length
        masked = embedded.device.type == "cpu" if self.masked is None else self.masked
        return run_layers(
            self.layers, self.join(embedded, features), cache.turns(positions), cache,
            cache.place(slots), seen, attend_tree(lengths, mask, cache.leftpad, seen, masked),
        )  # fmt: skip


def load_drafter(
    state: Mapping[str, Tensor], sizes: LlamaSizes, *, target: TokenLlama | None = None
) -> EagleDrafter:
    """Return the drafter of one of LANTERN's files for LlamaGen (`jadohu/llamagen_drafter`, ...).

    It was trained with what conditions fed as code 0 (`EagleDrafter.blank`). A file's embeddings
    are kept where they are not the target's: the released training takes the target's head for
    them where it does not find the others.

    Args:
        state: the released file as `torch.load` or safetensors give it.
        sizes: of the target, as `LLAMAGEN` has them; its `layers` count for nothing.
        target: whose embeddings are shared where the file has the same; None: the file's are kept.

    Raises ValueError for names that are missing, left over or of another shape.
    """
    layers = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    names = read_names(state, layers)
    table = names.get("embedding.weight")
    if table is not None and target is not None:
        own = target.embedding.weight[: len(table)]
        if own.shape == table.shape and torch.equal(own, table.to(own)):
            table = None
            del names["embedding.weight"]
    # of LANTERN's configurations, whatever the target's is
    sizes = replace(sizes, layers=layers, eps=1e-6)
    with torch.device("meta"):
        drafter = EagleDrafter(sizes, bias="fc.bias" in names, table=table is not None)
    drafter = fit(drafter, names)
    drafter.blank = 0
    for layer in drafter.layers:
        # the pairs that turn lie side by side, as in LlamaGen
        layer.qkv.weight = nn.Parameter(by_halves(layer.qkv.weight, sizes), requires_grad=False)
    return drafter
