"""A model of transformers over a cache that takes tokens at any slots, several of them a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from sdvg.models.llama import tree_mask
from sdvg.tokens.diagonal import Layout
from sdvg_kernels import TokenGrid, diagonal_attention, diagonal_mask, tree_attention

ATTENTION = "sdvg_slots"
# those that take a 4-D mask
_MASKABLE = ("sdpa", "eager")
_HEAD_DIMS = (64, 100, 128)


class _Attend(Protocol):
    """One of our ops, which knows by itself what the entries of a pass see."""

    def __call__(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, /, *, softmax_scale: float | None
    ) -> Tensor:
        """Return attention [B, T, H, D] of query [B, T, H, D] to K and V [B, S, Hk, D]."""
        ...


class SlotCache(Cache):
    """K and V of all layers `[layers, B, slots + 1, heads, D]`, written at any slots.

    Padding is written to the last slot, which nothing reads. `leftpad` [B] int32: slots at the
    start of a sequence that nobody sees.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__(layers=[])
        self.k, self.v = k, v
        self.leftpad = torch.zeros(k.shape[1], dtype=torch.int32, device=k.device)
        self._rows = torch.arange(k.shape[1], device=k.device)[:, None]
        self._place, self._seen = self._rows, 0

    @property
    def slots(self) -> int:
        """How many tokens of a sequence it holds."""
        return self.k.shape[2] - 1

    def aim(self, place: Tensor, seen: int) -> None:
        """Write what comes next to `place [B, T]`, and show the first `seen` slots."""
        self._place, self._seen = place, seen

    def place(self, slots: Tensor) -> Tensor:
        """Return where K/V go that belong to `slots`: int64, the last slot for -1, padding."""
        return torch.where(slots < 0, self.slots, slots).long()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write K and V [B, heads, T, D] and return those of the slots that are shown."""
        shown = []
        for cache, states in ((self.k[layer_idx], key_states), (self.v[layer_idx], value_states)):
            cache.index_put_((self._rows, self._place), states.transpose(1, 2))
            shown.append(cache[:, : self._seen].transpose(1, 2))
        return shown[0], shown[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given with every call."""
        return 0


class TransformersTokens:
    """A model of transformers that feeds tokens to any slots of a cache: a `TokenModel`.

    Made by `token_model`. The weights are the model's own: nothing is copied, and the model stays
    as it is for other uses.

    Attributes:
        codes: how many an image's token may be.
        vocabulary: how many ids the loop may feed.
        padding: the id of nothing, at the start of a prompt that is shorter than others.
        masked: attend by the model's own attention under a 4-D mask; else by `diagonal_attention`.
        eol: the loop's id of the token that ends a row; None: there is none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        codes: int,
        *,
        eol: int | None,
        masked: bool | None,
    ) -> None:
        config = decoder.config
        self.model, self.decoder, self.codes = model, decoder, codes
        self._own = config.vocab_size
        self.padding = codes + self._own
        self.vocabulary = self.padding + 1
        self._check()
        if eol is not None and not 0 <= eol < self._own:
            raise ValueError(
                f"token_model: eol must lie in the vocabulary of {self._own}, got {eol}"
            )
        self.eol = None if eol is None else codes + eol
        heads = config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        fits = self.device.type == "cuda" and self._head_dim in _HEAD_DIMS
        self.masked = not fits if masked is None else masked
        if not self.masked:
            AttentionInterface.register(ATTENTION, _attention)

    @property
    def width(self) -> int:
        """How wide a feature is, a hidden state behind the last norm."""
        return self.decoder.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.device

    def parameters(self) -> Iterator[Tensor]:
        """Yield the model's weights."""
        return self.model.parameters()

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """Return what lies where in a sequence, for `DiagonalDecoder`.

        Raises ValueError where the size must be given, or is not one that the model has.
        """
        if height is None or width is None:
            raise ValueError(
                f"token_model: height and width must be given in tokens for {self._name}, got "
                f"{height} and {width}"
            )
        return Layout(height, width, self.codes, eol=self.eol)

    def prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        length: int | None = None,
        pixel_values: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Return the loop's ids [B, length] of prompts as a tokenizer or processor gives them.

        Args:
            input_ids: [B, P] integers in the model's own vocabulary.
            attention_mask: [B, P], 0 for padding, which must be at the left.
            length: padded to it at the left, so that prompts and negative prompts of different
                lengths go together; None: P.
            pixel_values: must be None: an image in a prompt goes in as its tokens' ids.
            _: what else a processor returns, such as sizes.

        Raises ValueError, in one sentence.
        """
        rule = "token_model: input_ids must"
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(f"{rule} be [B, P >= 1], got {list(input_ids.shape)}")
        if input_ids.numel():
            low, high = (int(end) for end in input_ids.aminmax())
            if low < 0 or high >= self._own:
                raise ValueError(
                    f"{rule} lie in the vocabulary of {self._own}, got ids from {low} to {high}"
                )
        if pixel_values is not None:
            raise ValueError(
                "token_model: pixel_values must be None, got images; put their ids into input_ids "
                "(model.model.get_image_tokens)"
            )
        ids = input_ids + self.codes
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"token_model: attention_mask must be {list(input_ids.shape)}, got "
                    f"{list(attention_mask.shape)}"
                )
            seen = attention_mask.bool()
            if not (seen[:, -1].all() and (seen[:, 1:] >= seen[:, :-1]).all()):
                raise ValueError(
                    "token_model: attention_mask must be padded at the left, got 0 behind a 1; "
                    "set tokenizer.padding_side = 'left'"
                )
            ids = torch.where(seen, ids, self.padding)
        length = ids.shape[1] if length is None else length
        if length < ids.shape[1]:
            raise ValueError(
                f"token_model: length must be at least {ids.shape[1]}, the longest prompt's, got "
                f"{length}"
            )
        return F.pad(ids, (length - ids.shape[1], 0), value=self.padding)

    def uncond(self, prompts: Tensor) -> Tensor:
        """Return the loop's ids of the prompts without their text, as the model was trained.

        Raises ValueError for a model that has a negative prompt of the user's instead.
        """
        raise ValueError(
            f"token_model: uncond must be a negative prompt of your own for {self._name}, got "
            "none; pass its ids through prompts(ids, mask, length=prompts.shape[1])"
        )

    def sequence(self, codes: Tensor) -> Tensor:
        """Return codes [B, h, w] as the model's own ids [B, n], with the ends of rows."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Return the pixels of codes [B, h, w] as the model's `decode_image_tokens` does."""
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, width] of the loop's ids [B, T]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, T, codes] of hidden states [B, T, width]."""
        raise NotImplementedError

    def new_cache(self, batch: int, slots: int, *, scratch: int = 0) -> SlotCache:
        """Return an empty cache for `batch` sequences; ValueError where positions end before.

        `scratch` slots more have no position of their own: for `feed_tree`, which says positions.
        """
        config = self.decoder.config
        most = config.max_position_embeddings
        if slots > most:
            raise ValueError(
                f"token_model: slots must be at most {most}, the positions of {self._name}, got "
                f"{slots}; take a smaller grid or a shorter prompt"
            )
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = (config.num_hidden_layers, batch, slots + scratch + 1, heads, self._head_dim)
        # zeros: what is masked must not be NaN times 0
        k, v = (torch.zeros(shape, dtype=self.decoder.dtype, device=self.device) for _ in range(2))
        return SlotCache(k, v)

    def clear(self, cache: SlotCache) -> None:
        """Write zeros over all K/V, as in a new cache."""
        cache.k.zero_()
        cache.v.zero_()

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: SlotCache) -> Tensor:
        """Write the K/V of `ids [B, L]` to the first slots; each token sees those before it.

        Returns: the features [B, L, width].
        """
        batch, length = ids.shape
        cache.leftpad.copy_((ids == self.padding).sum(1))
        if not length:
            return self.embed(ids)
        place = torch.arange(length, device=ids.device)
        # padding sees itself, and nobody sees it
        sees = (place <= place[:, None]) & (place >= cache.leftpad[:, None, None])
        sees = sees | torch.eye(length, dtype=torch.bool, device=ids.device)
        place = place.expand(batch, -1)
        return self._run(ids, place, place, cache, length, _additive(sees, self.decoder.dtype))

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        steps: Tensor,
        grid: TokenGrid,
        cache: SlotCache,
        *,
        published: bool = False,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass and return the logits of the codes.

        Args:
            ids: [B, T] int64, the loop's.
            slots, steps: [B, T] int32, as a `DiagonalSchedule` has them; slot -1 is padding.
            grid: the schedule's.
            cache: written at `slots`.
            published: the released loops' mask (`diagonal_attention`, mode "published").
            length: no slot from here on is seen; None: all may be.

        Returns: [B, T, codes]; of padding, anything.

        Cost: the weights and the visible cache once. Safe in a CUDA graph.
        """
        seen = cache.slots if length is None else length
        run = partial(self._run, ids, cache.place(slots), slots, cache, seen)
        if not self.masked:
            attend = partial(
                diagonal_attention, slots=slots, steps=steps, grid=grid,
                mode="published" if published else "exact", cache_leftpad=cache.leftpad,
            )  # fmt: skip
            return self.logits(run(None, attend))
        dtype = self.decoder.dtype
        if published:
            every = torch.arange(seen, device=slots.device)
            sees = (every <= slots[..., None]) & (every >= cache.leftpad[:, None, None])
            mask = _additive(sees, dtype)
        else:
            mask = diagonal_mask(slots, steps, grid, seen, cache_leftpad=cache.leftpad, dtype=dtype)
        return self.logits(run(mask))

    @torch.no_grad()
    def feed_tree(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        mask: Tensor,
        cache: SlotCache,
        *,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass of chains and trees and return its features, as `TokenLlama.feed_tree` does.

        Args:
            ids: [B, T] int64, the loop's.
            slots: [B, T] int32, where K/V are written; -1 is padding.
            positions: [B, T] int32, as if each token stood in the slot of that number; siblings
                share theirs.
            lengths, mask: as for `sdvg_kernels.tree_attention`.
            cache: written at `slots`.
            length: no slot from here on is seen; None: all may be.

        Returns: [B, T, width], what `logits` takes; of padding, anything.

        Cost: the weights and the visible cache once. Safe in a CUDA graph.
        """
        seen = cache.slots if length is None else length
        run = partial(self._run, ids, cache.place(slots), positions, cache, seen)
        if not self.masked:
            attend = partial(
                tree_attention, lengths=lengths, mask=mask, cache_leftpad=cache.leftpad
            )
            return run(None, attend)
        return run(_additive(tree_mask(lengths, mask, cache.leftpad, seen), self.decoder.dtype))

    def _run(
        self,
        ids: Tensor,
        place: Tensor,
        positions: Tensor,
        cache: SlotCache,
        seen: int,
        mask: Tensor | None,
        attend: _Attend | None = None,
    ) -> Tensor:
        """Return the hidden states [B, T, width] of `ids`, fed to `place`."""
        cache.aim(place, seen)
        # a prompt's own first token has position 0
        positions = (positions - cache.leftpad[:, None]).long()
        with self._attending(attend):
            out = self.decoder(
                inputs_embeds=self.embed(ids),
                attention_mask=None if mask is None else mask[:, None],
                position_ids=positions.clamp(0, self.decoder.config.max_position_embeddings - 1),
                past_key_values=cache,
                use_cache=True,
                **({} if attend is None else {"sdvg_attend": attend}),
            )
        return out.last_hidden_state

    @contextlib.contextmanager
    def _attending(self, attend: _Attend | None) -> Iterator[None]:
        """Attend by our op where there is one, and leave the model as it was."""
        before = self.decoder.config._attn_implementation
        if attend is None:
            if before not in _MASKABLE:
                raise ValueError(
                    f"token_model: attn_implementation must be 'sdpa' or 'eager', got {before!r}, "
                    "which takes no mask; call model.set_attn_implementation('sdpa')"
                )
            yield
            return
        # "": this configuration alone, not those of its parts
        self.decoder.set_attn_implementation({"": ATTENTION})
        try:
            yield
        finally:
            self.decoder.set_attn_implementation({"": before})

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _check(self) -> None:
        """Raise for a model that is in no state to decode."""
        if self.model.training:
            raise ValueError(
                "token_model: model must not be training, got dropout; call model.eval()"
            )
        devices = sorted({str(weight.device) for weight in self.model.parameters()})
        if len(devices) > 1:
            raise ValueError(
                f"token_model: model must be on one device, got {', '.join(devices)}; load it with "
                "device_map={'': 0}"
            )
        kinds = set(getattr(self.decoder.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"token_model: layers must attend to the whole sequence, got {sorted(kinds)}"
            )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sdvg_attend: _Attend,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend by our op: transformers' interface, out [B, T, H, D]."""
    # [B, H, T, D] -> [B, T, H, D]
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return sdvg_attend(*parts, softmax_scale=scaling), None


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a bool mask is true, elsewhere the lowest finite number."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(
        ~sees, torch.finfo(dtype).min
    )
