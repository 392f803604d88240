"""diffusers' Wan transformer as a block-autoregressive model with a KV cache; no copy of the model.

Two attention processors and a rotary embedding with an offset are put on a stock
`WanTransformer3DModel`: self-attention writes its keys (after RoPE, at absolute frame positions,
as Self-Forcing does) and values into the ring and attends to it block-causally; cross-attention
projects the prompt once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sdvg.cache import KVCache
from sdvg.models.accelerate import RopeTable, fuse, unfuse_blocks, unfuse_projections
from sdvg.models.graphs import Graphs
from sdvg.models.linear import projected, quantise, require_e4m3
from sdvg_kernels import KeyBias

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


class Pass(NamedTuple):
    """What the processors need to know of the forward that is running."""

    start_frame: int
    # int32 [b] of the sequences that take part; None: all of them
    rows: Tensor | None
    # int32 [b] committed and staged tokens
    seqlens: Tensor
    # the timestep's embedding [b, dim], its modulation [b, 6 dim], and its sigma [1] float64; with
    # a timestep for each of n blocks [b, n, dim], [b, n, 6 dim] and [1, n F, 1, 1, 1]
    embedded: tuple[Tensor, Tensor, Tensor]


class CausalWan:
    """A `CausalModel` (see `sdvg.types`) around a stock `WanTransformer3DModel`.

    Args:
        transformer: the model; its self- and cross-attention processors and its RoPE are replaced.
        encode: prompts -> text embeddings `[B, L, text_dim]`, zero past each prompt's true length.
        height, width: of the latents; must be multiples of the patch size.
        frames: latent frames of a block.
        sink_frames: first latent frames, always seen and never evicted.
        window_frames: how far back a block sees, itself included; None: everything, up to
            `max_frames`.
        max_frames: without a window, how many latent frames a sequence may have.
        write_blocks: the most blocks that one pass takes at once: a longer `write` takes several
            passes, and so many may be in flight.
        past_weight: what a key after the first frame and before the current block weighs in the
            softmax, in (0, 1]; Krea Realtime's pipelines take 0.3 against drift.
        device: where it runs; None: where the transformer lies now (an offloaded one lies apart).

    Raises:
        ValueError: sizes that do not fit each other, or a sequence longer than the cache.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        encode: Callable[[Sequence[str]], Tensor],
        *,
        height: int,
        width: int,
        frames: int = 3,
        sink_frames: int = 0,
        window_frames: int | None = None,
        max_frames: int = 21,
        write_blocks: int = 4,
        past_weight: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        if hasattr(transformer, "_orig_mod"):
            # the wrapper would trace what is put on the module inside
            raise ValueError(
                "wan: transformer must be the module itself, got torch.compile's wrapper around "
                "it; call transformer.compile(), which compiles it in place"
            )
        config = transformer.config
        patch_frames, patch_height, patch_width = config.patch_size
        if patch_frames != 1 or height % patch_height or width % patch_width:
            raise ValueError(
                f"wan: latents must be multiples of the patch {tuple(config.patch_size)}, a frame "
                f"deep, got {height} x {width}"
            )
        if config.added_kv_proj_dim is not None:
            raise ValueError(
                "wan: transformer must be a text-to-video model, got one with image projections "
                f"(added_kv_proj_dim={config.added_kv_proj_dim})"
            )
        if not 0 < past_weight <= 1:
            raise ValueError(f"wan: past_weight must lie in (0, 1], got {past_weight}")
        self.transformer = transformer.eval().requires_grad_(False)
        self.block_shape = (frames, config.in_channels, height, width)
        self.frame_tokens = (height // patch_height) * (width // patch_width)
        self.sink_frames = sink_frames
        self.window_frames = window_frames
        self.max_frames = max_frames
        self.write_blocks = write_blocks
        self.receptive_frames = (
            None if window_frames is None else config.num_layers * (window_frames - frames)
        )
        self.key_bias = None
        if past_weight < 1:
            self.key_bias = KeyBias(math.log(past_weight), start=self.frame_tokens)
        self._encode = encode
        self._device = None if device is None else torch.device(device)
        self.cache: KVCache | None = None
        self.running: Pass | None = None
        # replays captured forwards, where `accelerate(graphs=True)` asked for it
        self.graphs: Graphs | None = None
        self.rope_table: RopeTable | None = None
        # ((timestep, sigma) of one block or of each, batch) -> what `Pass` holds of them
        self._embedded: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}
        self._take_over()

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self._device or self.transformer.proj_out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's own dtype."""
        return self.transformer.proj_out.weight.dtype

    @property
    def installed(self) -> bool:
        """Whether the transformer still runs for this model: another around it takes it over."""
        return getattr(self.transformer.blocks[0].attn1.processor, "model", None) is self

    def accelerate(self, *, graphs: bool = False, fp8: bool = False) -> CausalWan:
        """Run the blocks on the fused ops from now on; see `sdvg.accelerate`. Returns self."""
        if fp8:
            require_e4m3(self.device)
        fuse(self)
        if fp8:
            quantise(self.transformer)
        self.graphs = Graphs(self) if graphs else None
        return self

    def release(self) -> None:
        """Let go of the cache, the prompt's keys and captured graphs: gigabytes of the device.

        The next `start` makes them anew.
        """
        if self.cache is not None and self.cache.k.is_cuda:
            # drafts ahead of a video that was left may still be at work in it, on another stream
            torch.cuda.synchronize(self.cache.k.device)
        self.cache = self.running = None
        self._embedded.clear()
        if self.graphs is not None:
            self.graphs.release()
        if self.installed:
            for block in self.transformer.blocks:
                block.attn2.processor.release()

    def grid(self, tokens: int) -> tuple[int, int, int]:
        """Return (frames, height, width) of a pass over `tokens` tokens."""
        _, patch_height, patch_width = self.transformer.config.patch_size
        _, _, height, width = self.block_shape
        return tokens // self.frame_tokens, height // patch_height, width // patch_width

    # what is made here stays, and is written in a caller's inference mode or out of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self, prompts: Sequence[str]) -> None:
        """Encode `prompts` and empty the cache for one sequence each."""
        self._require_installed()
        config = self.transformer.config
        frames = self.block_shape[0]
        # a block's own frames are part of the window, so a pass of n blocks needs n - 1 more
        ring = self.max_frames
        if self.window_frames is not None:
            ring = self.sink_frames + self.window_frames + (self.write_blocks - 1) * frames
        window = None if self.window_frames is None else self.window_frames * self.frame_tokens
        sizes = {
            "layers": config.num_layers,
            "batch": len(prompts),
            "slots": ring * self.frame_tokens,
            "heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "block": frames * self.frame_tokens,
            "sink": self.sink_frames * self.frame_tokens,
            "window": window,
            "dtype": self.dtype,
            "device": self.device,
        }
        # gigabytes, and captured graphs hold its address: what is in it is not seen any more
        if self.cache is None or self._sizes != sizes:
            self.cache, self._sizes = KVCache(**sizes), sizes
        self.cache.seek(0)
        text = self._encode(prompts).to(self.device, self.dtype)
        self._bring()
        # weights may have changed since the last prompt
        self._embedded.clear()
        with torch.autocast(self.device.type, enabled=False):
            embedded = self.transformer.condition_embedder.text_embedder(text)
            for block in self.transformer.blocks:
                block.attn2.processor.start(block.attn2, embedded)
        if self.graphs is not None:
            self.graphs.start()

    def denoise(
        self,
        latents: Tensor,
        timestep: float,
        *,
        start_frame: int,
        rows: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Predict clean latents from noisy ones: `x_0 = x_t - sigma * v`, in float32 or wider."""
        level = (timestep, timestep / 1000 if sigma is None else sigma)
        return self._forward(latents, [level], start_frame, rows)

    def denoise_blocks(
        self, latents: Tensor, levels: Sequence[tuple[float, float]], *, start_frame: int
    ) -> Tensor:
        """`denoise` of several blocks in one pass, each at its own (timestep, sigma).

        Raises ValueError for more blocks than `write_blocks`.
        """
        if len(levels) > self.write_blocks:
            raise ValueError(
                f"wan: denoise_blocks must take at most write_blocks = {self.write_blocks} blocks, "
                f"got {len(levels)}; make the model with room for more"
            )
        return self._forward(latents, levels, start_frame, None)

    def write(
        self,
        latents: Tensor,
        *,
        start_frame: int,
        rows: Tensor | None = None,
        timestep: float = 0.0,
    ) -> None:
        """The clean pass: forward at timestep 0 and commit, `write_blocks` blocks at a time."""
        for chunk in latents.split(self.write_blocks * self.block_shape[0], dim=1):
            self._forward(chunk, [(timestep, timestep / 1000)], start_frame, rows)
            self._commit(start_frame, chunk.shape[1], rows)
            start_frame += chunk.shape[1]

    def keep(self, *, start_frame: int, rows: Tensor | None = None) -> None:
        """Commit what the last `denoise` at `start_frame` staged."""
        self._commit(start_frame, self.block_shape[0], rows)

    def _require_installed(self) -> None:
        if not self.installed:
            raise RuntimeError(
                "wan: the transformer runs for another CausalWan that was made around it later; "
                "make this one anew, or load the transformer twice"
            )

    def _bring(self) -> None:
        """Have the weights here: accelerate's offloading brings them for a forward only."""
        if (hook := getattr(self.transformer, "_hf_hook", None)) is not None:
            hook.pre_forward(self.transformer)

    def _commit(self, start_frame: int, frames: int, rows: Tensor | None) -> None:
        self.cache.seek(start_frame * self.frame_tokens, rows)
        self.cache.commit(frames * self.frame_tokens, None if rows is None else rows.int())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _forward(
        self,
        latents: Tensor,
        levels: Sequence[tuple[float, float]],
        start_frame: int,
        rows: Tensor | None,
    ) -> Tensor:
        self._require_installed()
        end = start_frame + latents.shape[1]
        if self.window_frames is None and end > self.max_frames:
            raise ValueError(
                f"wan: a sequence must end within max_frames = {self.max_frames}, got {end}; "
                "give the model a window to go on"
            )
        self.cache.seek(start_frame * self.frame_tokens, rows)
        index = None if rows is None else rows.int()
        forward = self.forward if self.graphs is None else self.graphs
        # in a caller's autocast keys would not have the cache's dtype
        with torch.autocast(self.device.type, enabled=False):
            return forward(start_frame, latents, self._embed(tuple(levels), len(latents)), index)

    def forward(
        self,
        start_frame: int,
        latents: Tensor,
        embedded: tuple[Tensor, Tensor, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """Return `latents [b, F, C, h, w]` made clean, their keys staged behind the committed."""
        hidden = latents.transpose(1, 2).to(self.dtype)
        lengths = self.cache.lengths
        lengths = lengths if rows is None else lengths.index_select(0, rows)
        seqlens = lengths + hidden.shape[2] * self.frame_tokens
        self.running = Pass(start_frame, rows, seqlens, embedded)
        # the timestep is embedded and cross-attention holds the prompt already
        steps = hidden.new_zeros(embedded[0].shape[:-1])
        text = hidden.new_empty((len(hidden), 0, self.transformer.config.text_dim))
        (velocity,) = self.transformer(hidden, steps, text, return_dict=False)
        wide = torch.promote_types(latents.dtype, torch.float32)
        step = embedded[2].to(wide) * velocity.transpose(1, 2).to(wide)
        return (latents.to(wide) - step).to(latents.dtype)

    def _install(self) -> None:
        """Undo `accelerate`: eager passes of the stock blocks, but for layers in e4m3."""
        unfuse_projections(self.transformer)
        self._take_over()

    def _take_over(self) -> None:
        """Make the transformer run for this model, eagerly."""
        unfuse_blocks(self.transformer)
        self.graphs = None
        processors: dict[str, object] = {}
        for layer in range(len(self.transformer.blocks)):
            processors[f"blocks.{layer}.attn1.processor"] = _SelfAttention(self, layer)
            processors[f"blocks.{layer}.attn2.processor"] = _CrossAttention(self)
        self.transformer.set_attn_processor(processors)
        self.transformer.rope = _OffsetRope(self)
        # the instance's own forward, so that names of weights stay diffusers'
        self.transformer.condition_embedder.forward = self._condition

    def _condition(
        self, timestep: Tensor, text: Tensor, *rest: object, **options: object
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return what the running pass says of its timestep, or for each token of its block's."""
        temb, modulation, _ = self.running.embedded
        if temb.dim() == 3:
            tokens = self.block_shape[0] * self.frame_tokens
            temb = _spread(temb, tokens)
            # the fused blocks take a row for each block
            if isinstance(self.transformer.rope, _OffsetRope):
                modulation = _spread(modulation, tokens)
        return temb, modulation, text, None

    def _embed(
        self, levels: tuple[tuple[float, float], ...], batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is known of the timesteps, of which a schedule has only a few."""
        key = (levels, batch)
        if key not in self._embedded and len(levels) > 1:
            rows, modulations, sigmas = zip(
                *(self._embed((level,), batch) for level in levels), strict=True
            )
            sigma = torch.cat([own.expand(self.block_shape[0]) for own in sigmas])
            self._embedded[key] = (
                torch.stack(rows, 1), torch.stack(modulations, 1), sigma.view(1, -1, 1, 1, 1)
            )  # fmt: skip
        elif key not in self._embedded:
            ((timestep, level),) = levels
            self._bring()
            embedder, device = self.transformer.condition_embedder, self.device
            steps = torch.full((batch,), timestep, device=device)
            shape = (batch, 0, self.transformer.config.text_dim)
            text = torch.empty(shape, dtype=self.dtype, device=device)
            sigmas = torch.full((1,), level, dtype=torch.float64, device=device)
            self._embedded[key] = (*type(embedder).forward(embedder, steps, text)[:2], sigmas)
        return self._embedded[key]


def _spread(rows: Tensor, tokens: int) -> Tensor:
    """Return `[b, n, C]` with each row repeated for its block's tokens."""
    return rows[:, :, None].expand(-1, -1, tokens, -1).flatten(1, 2)


class _OffsetRope(nn.Module):
    """Wan's 3-D RoPE with the frame axis beginning at the running pass's `start_frame`."""

    def __init__(self, model: CausalWan, theta: float = 10000.0) -> None:
        super().__init__()
        # not an attribute that nn.Module would register: the model holds the transformer
        # that holds this
        self._model = (model,)
        head_dim = model.transformer.config.attention_head_dim
        space = 2 * (head_dim // 6)
        # radians per position for each pair of channels: frame, row, column (44, 42, 42
        # channels of 128)
        self._rates = [
            theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
            for channels in (head_dim - 2 * space, space, space)
        ]
        self._key: tuple[object, ...] | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin `[1, T, 1, D / 2]` for latents `[b, C, F, h, w]`."""
        (model,) = self._model
        frames, height, width = hidden_states.shape[2:]
        _, patch_height, patch_width = model.transformer.config.patch_size
        start = model.running.start_frame
        grid = (frames, height // patch_height, width // patch_width)
        key = (start, grid, hidden_states.device, hidden_states.dtype)
        if self._key != key:
            axes = (
                torch.arange(start, start + grid[0]),
                torch.arange(grid[1]),
                torch.arange(grid[2]),
            )
            angles = [
                torch.outer(positions.double(), rates)
                for positions, rates in zip(axes, self._rates, strict=True)
            ]
            shapes = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
            full = [
                angle.view(*shape, angle.shape[1]).expand(*grid, -1)
                for angle, shape in zip(angles, shapes, strict=True)
            ]
            # [1, T, 1, D / 2]
            table = torch.cat(full, dim=-1).flatten(0, 2)[None, :, None]
            wide = torch.promote_types(hidden_states.dtype, torch.float32)
            self._tables = tuple(
                part.to(hidden_states.device, wide) for part in (table.cos(), table.sin())
            )
            self._key = key
        return self._tables


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of `[b, T, H, D]`, in the tables' dtype."""
    real, imaginary = tensor.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(pairs, dim=-1).flatten(-2).to(tensor.dtype)


class _SelfAttention:
    """QK-norm, RoPE, stage, attend: one layer's self-attention over the ring."""

    # diffusers looks these up on every processor
    _attention_backend = None
    _parallel_config = None

    def __init__(self, model: CausalWan, layer: int) -> None:
        self.model = model
        self.layer = layer

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value = projected(attn, hidden_states)
        query = _rotate(attn.norm_q(query).unflatten(2, (attn.heads, -1)), *rotary_emb)
        key = _rotate(attn.norm_k(key).unflatten(2, (attn.heads, -1)), *rotary_emb)
        value = value.unflatten(2, (attn.heads, -1))
        cache, running = self.model.cache, self.model.running
        cache.stage(self.layer, key, value, running.rows)
        out = cache.attend(self.layer, query, running.seqlens, running.rows, self.model.key_bias)
        return attn.to_out[0](out.flatten(2))


class _CrossAttention:
    """Cross-attention whose K and V are projected once for each prompt."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def start(self, attn: nn.Module, text: Tensor) -> None:
        """Project the embedded prompts `[B, L, dim]`."""
        key, value = projected(attn, text)
        heads = (attn.heads, -1)
        # [B, H, L, D]
        made = attn.norm_k(key).unflatten(2, heads).transpose(1, 2)
        if self.key is None or self.key.shape != made.shape or self.key.dtype != made.dtype:
            self.key, self.value = torch.empty_like(made), torch.empty_like(made)
        # in place: captured graphs hold the addresses
        self.key = self.key.to(made.device).copy_(made)
        self.value = self.value.to(made.device).copy_(value.unflatten(2, heads).transpose(1, 2))

    def release(self) -> None:
        """Let go of the prompt's keys and values."""
        self.key = self.value = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key, value, rows = self.key, self.value, self.model.running.rows
        if rows is not None:
            key, value = key[rows], value[rows]
        out = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), key, value)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
