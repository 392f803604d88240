"""The KV cache of one model: it owns the tensors and the lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from sdvg_kernels import KeyBias, block_causal_attention, commit_, stage_


class KVCache:
    """K and V of every layer in a ring with a sink; nothing in it is ever shifted.

    Logical token `t` lies in slot `t` if `t < sink`, else `sink + (t - sink) % (slots - sink)`.

    Args (all counts in tokens):
        layers, batch, heads, head_dim: sizes of `k` and `v`, `[layers, B, slots, H, D]`.
        slots: size of the ring with its sink.
        block: tokens of one block; a query of several blocks is masked block by block.
        sink: first tokens, which are never evicted and always seen.
        window: how far back a block sees, itself included; None: everything.

    Attributes:
        lengths: int32 `[B]` on the device, committed tokens of each sequence.
        capacity: the most tokens that one `stage` may write without overwriting what its first
            block still sees.

    Raises:
        ValueError: the window is shorter than a block, or the ring is too small for one block.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        slots: int,
        heads: int,
        head_dim: int,
        block: int,
        sink: int = 0,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if window is not None and window < block:
            raise ValueError(f"cache: window must cover a block of {block} tokens, got {window}")
        past = 0 if window is None else sink + window - block
        if slots - past < block:
            raise ValueError(
                f"cache: slots must be at least sink + window = {past + block} tokens, got {slots}"
            )
        self.block, self.sink, self.window = block, sink, window
        self.capacity = slots - past
        shape = (layers, batch, slots, heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._all = torch.ones(batch, dtype=torch.bool, device=device)

    def seek(self, tokens: int, rows: Tensor | None = None) -> None:
        """Set the committed length of sequences `rows` (int64 `[b]`, None: all); no bytes move."""
        if rows is None:
            self.lengths.fill_(tokens)
        else:
            self.lengths.index_fill_(0, rows, tokens)

    def stage(self, layer: int, key: Tensor, value: Tensor, rows: Tensor | None = None) -> None:
        """Write `[b, T, H, D]` behind what is committed of `rows` (int32 `[b]`); lengths stay."""
        one = slice(layer, layer + 1)
        stage_(
            self.k[one], self.v[one], key[None], value[None], self.lengths,
            sink=self.sink, batch_idx=rows,
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        query: Tensor,
        cache_seqlens: Tensor,
        rows: Tensor | None = None,
        key_bias: KeyBias | None = None,
    ) -> Tensor:
        """Block-causal attention of the staged queries `[b, T, H, D]` over `layer`'s cache."""
        return block_causal_attention(
            query, self.k[layer], self.v[layer], cache_seqlens, block_size=self.block,
            sink=self.sink, window=self.window, cache_batch_idx=rows, key_bias=key_bias,
        )  # fmt: skip

    def commit(self, tokens: int, rows: Tensor | None = None) -> None:
        """Make the staged tokens of `rows` (int32 `[b]`) final: `lengths += tokens`."""
        accept = self._all if rows is None else self._all[: len(rows)]
        commit_(self.lengths, accept, tokens, batch_idx=rows)
