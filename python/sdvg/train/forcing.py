"""A stock Wan transformer over all blocks of a clip at once, a noise level for each block.

Two arrangements, with the masks that a KV cache with a sink of one block and a window of three
would make. Alone, noisy blocks attend to each other's K/V, as where no clean pass follows a block;
beside a context, noisy block ``b`` attends to itself and to the context's blocks before it:

    keys        context 0 1 2 3 4     noisy 0 1 2 3 4
    noisy 0             . . . . .           x . . . .
    noisy 1             x . . . .           . x . . .
    noisy 3             x x x . .           . . . x .
    noisy 4             x . x x .           . . . . x
    context 4           x . x x x           . . . . .
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdvg_kernels import block_causal_attention

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Attended = tuple[Tensor, Tensor]


class BlockForward:
    """The stock model's arithmetic, arranged for training under the masks drawn above.

    A timestep belongs to a block, so modulation is computed for each block and broadcast; the
    stock forward would expand it to every token in float32, which on a CPU costs more than the
    matrix products.

    Args:
        model: gives the rotary embedding and the sizes; any model of the same sizes may be called.
        blocks, frames: blocks of a clip, latent frames of a block.
        height, width: of the latents.
        window_frames, sink_frames: what a block sees, as `CausalWan` has them; None: all before it.
        gap: the most that a call may put between the sink and the rest.
        dtype: of the matrix products: autocast, unless it is the model's own.
        checkpointing: keep a layer's input alone for the backward, and run the layer again there.

    Raises ValueError for a window that leaves less than a block before the block itself.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        *,
        blocks: int,
        frames: int,
        height: int,
        width: int,
        window_frames: int | None,
        sink_frames: int,
        gap: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        checkpointing: bool = False,
    ) -> None:
        _, self.patch, _ = model.config.patch_size
        frame = (height // self.patch) * (width // self.patch)
        self.blocks, self.tokens = blocks, frames * frame
        self.sink = sink_frames * frame
        self.window = (blocks * frames if window_frames is None else window_frames) * frame
        # beside a context a block sees the window of the one before it, a block shorter
        narrow = self.window < 2 * self.tokens and (self.sink or self.window != self.tokens)
        if blocks > 1 and narrow:
            raise ValueError(
                f"forcing: window_frames must be None or at least two blocks, {2 * frames}, got "
                f"{window_frames}"
            )
        self.dtype, self.checkpointing = dtype, checkpointing
        device = model.proj_out.weight.device
        self.length, self.frame = blocks * self.tokens, frame
        shape = (1, 1, blocks * frames + gap, height, width)
        cos, sin = model.rope(torch.empty(shape, device=device))
        # [1, T + gap, 1, D], pairs of channels turn together
        self.cos = cos[..., 0::2].repeat_interleave(2, -1).to(dtype)
        self.sin = sin[..., 1::2].repeat_interleave(2, -1).to(dtype)

    def __call__(
        self,
        model: WanTransformer3DModel,
        noisy: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        context: Tensor | None = None,
        context_sigma: Tensor | None = None,
        gap: int = 0,
    ) -> Tensor:
        """Return the predicted ``noise - x_0`` of ``noisy [N, C, F, h, w]``, float32.

        Args:
            model: a stock transformer.
            noisy: latents at the levels ``sigma [N, blocks]``.
            sigma: noise levels in [0, 1].
            text: embeddings ``[N, L, text_dim]``.
            context: latents of ``noisy``'s shape that the blocks after them attend to.
            context_sigma: their levels ``[N, blocks]``; None: they are clean.
            gap: latent frames between the sink and what follows it here, as late in a long video.
        """
        device = noisy.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            latents, levels = noisy, sigma
            if context is not None:
                known = torch.zeros_like(sigma) if context_sigma is None else context_sigma
                latents, levels = torch.cat((context, noisy), 2), torch.cat((known, sigma), 1)
            x = model.patch_embedding(latents).float()
            grid = x.shape[2:]
            # [N, blocks, tokens, dim]
            x = x.flatten(2).transpose(1, 2).unflatten(1, (-1, self.tokens))
            temb, modulation, text, _ = model.condition_embedder(
                1000 * levels.flatten(), text, None, timestep_seq_len=levels.shape[1]
            )
            modulation = modulation.unflatten(2, (6, -1)).float()
            turn = self._turn(gap, halves=1 if context is None else 2)
            for block in model.blocks:
                given = (block, x, text, modulation, turn)
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(self._block, *given, use_reentrant=False)
                else:
                    x = self._block(*given)
            if context is not None:
                x, temb = x[:, self.blocks :], temb[:, self.blocks :]
                grid = (grid[0] // 2, *grid[1:])
            shift, scale = (model.scale_shift_table + temb.float()[:, :, None]).split(1, 2)
            out = model.proj_out(_norm(x) * (1 + scale) + shift).float()
        out = out.flatten(1, 2).unflatten(1, grid).unflatten(-1, (self.patch, self.patch, -1))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        turn: tuple[Tensor, Tensor],
    ) -> Tensor:
        modulation = block.scale_shift_table[0] + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.split(1, 2)
        attn = block.attn1
        n = torch.addcmul(shift, _norm(x), 1 + scale).to(self.dtype).flatten(1, 2)
        query, key = (
            _rotate(_heads(attn, norm(project(n))), *turn)
            for norm, project in ((_rms(attn.norm_q), attn.to_q), (_rms(attn.norm_k), attn.to_k))
        )
        out = self._attend(query, key, _heads(attn, attn.to_v(n)))
        x = torch.addcmul(x, attn.to_out[0](out.flatten(2)).view_as(x).float(), gate)
        attn = block.attn2
        n = block.norm2(x).to(self.dtype).flatten(1, 2)
        query = _heads(attn, _rms(attn.norm_q)(attn.to_q(n)))
        key = _heads(attn, _rms(attn.norm_k)(attn.to_k(text)))
        out = _cross(query, key, _heads(attn, attn.to_v(text)))
        x = x + attn.to_out[0](out.flatten(2)).view_as(x)
        n = torch.addcmul(ffn_shift, _norm(x), 1 + ffn_scale).to(self.dtype)
        return torch.addcmul(x, block.ffn(n).float(), ffn_gate)

    def _turn(self, gap: int, halves: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of all tokens; positions begin again at the noisy half."""
        apart = self.sink + gap * self.frame
        end = apart + self.length - self.sink
        cos, sin = (
            torch.cat((x[:, : self.sink], x[:, apart:end]), 1).repeat(1, halves, 1, 1)
            for x in (self.cos, self.sin)
        )
        return cos, sin

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention `[N, T, H, D]` under the masks drawn above; no mask is ever made."""
        size, length = self.tokens, self.blocks * self.tokens

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: int) -> Attended:
            # newest tokens of a cache that holds them all; what they must not see is cut off
            lengths = torch.full((len(key),), key.shape[1], dtype=torch.int32, device=key.device)
            # where all of them are the sink's, none is cut off
            if options.get("sink", 0) >= key.shape[1]:
                options = {}
            return block_causal_attention(
                query, key, value, lengths, block_size=size, return_lse=True, **options
            )

        past = {"sink": self.sink, "window": self.window}
        if query.shape[1] == length:
            return attend(query, key, value, **past)[0]
        known, mine = zip(*(x.split(length, 1) for x in (query, key, value)), strict=True)
        context, _ = attend(*known, **past)
        # each block alone, as a sequence of its own
        out, lse = attend(*(x.unflatten(1, (-1, size)).flatten(0, 1) for x in mine))
        out, lse = out.view_as(mine[0]), lse.unflatten(0, (-1, self.blocks))
        lse = lse.transpose(1, 2).flatten(2)
        if self.window > size and self.blocks > 1:
            # a block later: its query sees what the block before it sees, but for the oldest
            before = (mine[0][:, size:], *(x[:, :-size] for x in known[1:]))
            seen, seen_lse = attend(*before, sink=self.sink, window=self.window - size)
            share = (seen_lse - lse[..., size:]).sigmoid().transpose(1, 2)[..., None]
            later = torch.lerp(out[:, size:], seen, share.to(out.dtype))
            out = torch.cat((out[:, :size], later), 1)
        return torch.cat((context, out), 1)


def _cross(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + turned * sin


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _rms(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    # the weight in the input's dtype, or PyTorch leaves its fused kernel; the output again, which
    # autocast on a GPU makes float32
    def normed(x: Tensor) -> Tensor:
        weight = norm.weight.to(x.dtype)
        return F.rms_norm(x, norm.normalized_shape, weight, norm.eps).to(x.dtype)

    return normed


def _heads(attn: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))
