"""`sdvg bench loop`: what the loop costs with Wan's own shapes, stage by stage.

Weights are random: time does not depend on them. Acceptance does, so it is set from outside and
every draft is still decoded and scored. Variants, in the order in which they are measured:

    original  the way the original repositories run: complex128 RoPE, a cache that is cloned and
              shifted, indices read back in every layer, dense attention over the cache
    eager     the ring cache and its kernels on diffusers' blocks
    fused     `accelerate`: the blocks and the decoder on the fused ops
    graphs    the same, replayed from CUDA graphs
    fp8       the same, with the target's linear layers in e4m3
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdvg.engine import SDVG
from sdvg.host import is_there
from sdvg.models.vae import StreamingVAE, TinyDecoder
from sdvg.models.wan import CausalWan
from sdvg.types import Draft, Scorer

VARIANTS = ("original", "eager", "fused", "graphs", "fp8")
ACCEPTANCES = (0.0, 0.731, 0.889, 1.0)
STAGES = ("draft", "decode", "score", "commit", "target")


class Row(NamedTuple):
    """One line of the table; milliseconds are per block, memory is the run's peak."""

    variant: str
    # kept / decided; None: target-only
    acceptance: float | None
    fps: float
    # from `generate` to the first block's frames
    first_ms: float
    # against this variant's own target-only generation
    speedup: float
    draft_ms: float
    decode_ms: float
    score_ms: float
    commit_ms: float
    target_ms: float
    # None: not a GPU
    memory_gib: float | None
    # largest difference of the latents from the eager variant's, relative to their deviation
    difference: float


@dataclass(frozen=True)
class Pattern:
    """A router that keeps a share of the drafts, spread evenly, whatever they score."""

    share: float
    needs_score = True

    def __call__(self, draft: Draft) -> Tensor:
        """Return `accept` `[B]`."""
        # the nearest whole number of the drafts so far, block 0 not counted
        before, kept = (int(n * self.share + 0.5) for n in (draft.block - 1, draft.block))
        return torch.full((len(draft.sequences),), kept > before)


class Parts(NamedTuple):
    """What is measured: models that `accelerate` can change, and what stands around them."""

    drafter: CausalWan
    target: CausalWan
    decoder: StreamingVAE
    scorer: Scorer


def measure(
    parts: Parts,
    *,
    variants: Sequence[str] = VARIANTS,
    acceptances: Sequence[float] = ACCEPTANCES,
    blocks: int = 9,
    prompts: Sequence[str] = ("a random video",),
    **options: object,
) -> Iterator[Row]:
    """Yield the rows, variant by variant; each run is warmed up with its own first blocks.

    `options` go to `SDVG` (schedule, in_flight).

    A variant whose latents or frames are not those of `eager` within its precision raises
    RuntimeError: no figure of a wrong result is given. FP8 is lossy and only reports how far it is
    off. Raises ValueError for a variant that there is not, `original` with a sink, or fewer than
    two blocks.
    """
    if blocks < 2:
        raise ValueError(
            f"bench: blocks must be at least 2, for the target makes the first, got {blocks}"
        )
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(
                f"bench: variants must be among {', '.join(VARIANTS)}, got {variant!r}"
            )
    if "original" in variants and (parts.drafter.sink_frames or parts.target.sink_frames):
        raise ValueError("bench: original has no sink, got one; leave the variant out")
    expected: dict[float | None, tuple[Tensor, Tensor]] = {}
    wide = parts.target.dtype == torch.float32
    ordered = [variant for variant in VARIANTS if variant in variants]
    if "eager" in ordered:
        # it is what the others are compared with
        ordered.remove("eager")
        ordered.insert(0, "eager")
    for variant in ordered:
        _turn_into(variant, parts)
        alone = 0.0
        for share in (None, *acceptances):
            row, latents, frames = _run(parts, variant, share, blocks, prompts, options)
            seconds = 1 / row.fps
            alone = seconds if share is None else alone
            reference, seen = expected.setdefault(share, (latents, frames))
            off = float((latents - reference).abs().max() / reference.std())
            grey = float((frames - seen).abs().mean())
            if variant != "fp8" and not (off <= (1e-3 if wide else 0.5) and grey <= 0.02):
                raise RuntimeError(
                    f"bench: {variant} is {off:.3g} deviations off the eager latents, and "
                    f"{grey:.3g} off the last frames"
                )
            yield row._replace(speedup=alone / seconds, difference=off)


def _turn_into(variant: str, parts: Parts) -> None:
    for model in (parts.drafter, parts.target):
        if variant == "original":
            _original(model)
        elif variant == "eager":
            model._install()
        else:
            # e4m3 stays once it is there: the order of the variants follows that
            model.accelerate(
                graphs=variant in ("graphs", "fp8"), fp8=variant == "fp8" and model is parts.target
            )
    if variant in ("original", "eager"):
        parts.decoder._install()
    else:
        parts.decoder.accelerate(graphs=variant in ("graphs", "fp8"))


def _run(
    parts: Parts,
    variant: str,
    share: float | None,
    blocks: int,
    prompts: Sequence[str],
    options: Mapping[str, object],
) -> tuple[Row, Tensor, Tensor]:
    drafter = None if share is None else parts.drafter
    router = None if share is None else Pattern(share)
    loop = SDVG(drafter, parts.target, parts.decoder, parts.scorer, router, **options)
    device = parts.target.device
    cuda = device.type == "cuda"
    # kernels are compiled, graphs captured and memory taken before anything is timed; a rejected
    # block after kept ones makes the longest pass
    list(loop.generate(prompts, num_blocks=blocks, seed=0))
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    video = loop.generate(prompts, num_blocks=blocks, seed=0)
    *_, last = video
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    stats = video.summary()
    spent = {f"{stage}_ms": 1e3 * stats.stages.get(stage, 0.0) / blocks for stage in STAGES}
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
    row = Row(
        variant, stats.acceptance, stats.frames / seconds, 1e3 * stats.first_frames, 0.0, **spent,
        memory_gib=memory, difference=0.0,
    )  # fmt: skip
    return row, torch.cat(video.latents, dim=1).float(), last.frames.float()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(map(_cells, rows))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    body = [_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(Row._fields, *body, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (Row._fields, *body)
    )


def _cells(row: Row) -> list[str]:
    none = {"acceptance": "target-only", "memory_gib": "-"}
    return [
        none[name] if value is None else f"{value:.4g}" if isinstance(value, float) else value
        for name, value in row._asdict().items()
    ]


_SIZES = {
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64,
             "text_dim": 16, "freq_dim": 32},
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}  # fmt: skip


def random_wan(
    drafter: str = "1.3B",
    target: str = "14B",
    *,
    height: int = 480,
    width: int = 832,
    window_frames: int = 6,
    sink_frames: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    scorer: Scorer | None = None,
) -> Parts:
    """Return random models of Wan's shapes, a random autoencoder, and a scorer.

    Args:
        drafter, target: "1.3B", "14B", or "tiny" for a machine without a GPU; a tiny drafter has a
            tiny autoencoder and a tiny target with it.
        height, width: of the video, multiples of 16.
        window_frames, sink_frames: latent frames that a block sees, itself included, and the first
            ones, which it always sees.
        device, dtype: where and in what everything lies.
        scorer: None: one that costs next to nothing.

    Raises:
        ValueError: an argument that does not fit, in one sentence.
    """
    if (drafter == "tiny") != (target == "tiny"):
        raise ValueError(f"bench: both models must be tiny or none, got {drafter} and {target}")
    sizes = {
        "height": height, "width": width, "window_frames": window_frames,
        "sink_frames": sink_frames, "device": device, "dtype": dtype,
    }  # fmt: skip
    drafting, repairing = random_model(drafter, 1, **sizes), random_model(target, 2, **sizes)
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    torch.manual_seed(0)
    vae = _made(lambda: AutoencoderKLWan(**(small if drafter == "tiny" else {})), device, dtype)
    return Parts(
        drafting, repairing, StreamingVAE(vae), scorer or (lambda frames, _: frames.mean((2, 3, 4)))
    )


def random_model(
    size: str,
    seed: int = 0,
    *,
    height: int = 480,
    width: int = 832,
    window_frames: int = 6,
    sink_frames: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> CausalWan:
    """Return one random model of `random_wan`, its weights drawn with `seed`; it raises the same.

    Its prompts are noise, of the length and width that Wan's text encoder gives.
    """
    if not is_there(device) or torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(
            f"bench: device must be cpu, or a GPU of this machine such as cuda:1, got {device!r}"
        )
    for name, pixels in (("height", height), ("width", width)):
        if pixels < 16 or pixels % 16:
            raise ValueError(f"bench: {name} must be a multiple of 16, got {pixels}")
    if size not in _SIZES:
        raise ValueError(f"bench: a model must be one of {', '.join(_SIZES)}, got {size!r}")
    from diffusers import WanTransformer3DModel

    def encode(prompts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompts))
        length, dim = (8, 16) if size == "tiny" else (512, 4096)
        return 0.1 * torch.randn(len(prompts), length, dim, generator=generator)

    torch.manual_seed(seed)
    model = _made(lambda: WanTransformer3DModel(**_SIZES[size]), device, dtype)
    return CausalWan(
        model, encode, height=height // 8, width=width // 8, window_frames=window_frames,
        sink_frames=sink_frames,
    )  # fmt: skip


def random_tiny_decoder(
    widths: Sequence[int] = (256, 128, 64, 64),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> TinyDecoder:
    """Return a random `TinyDecoder` of the sizes of taew2_1, or of stages of other `widths`."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def convolution(place: str, out: int, inside: int, size: int = 3, bias: bool = False) -> None:
        weight = torch.randn(out, inside, size, size, generator=generator)
        weights[f"decoder.{place}.weight"] = weight * (2 / (inside * size**2)) ** 0.5
        if bias:
            weights[f"decoder.{place}.bias"] = torch.zeros(out)

    convolution("1", widths[0], 16, bias=True)
    for stage, (*memory, grow, end) in enumerate(TinyDecoder._STAGES):
        width = widths[stage]
        for place in memory:
            for layer, inside in ((0, 2 * width), (2, width), (4, width)):
                convolution(f"{place}.conv.{layer}", width, inside, bias=True)
        convolution(f"{grow}.conv", width if stage == 0 else 2 * width, width, size=1)
        convolution(str(end), widths[stage + 1], width)
    convolution("22", 3, widths[3], bias=True)
    return TinyDecoder({name: weight.to(dtype) for name, weight in weights.items()}).to(device)


def _made(
    build: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Return a model made on its device in its dtype: no float32 copy on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build()
    finally:
        torch.set_default_dtype(before)


def _original(model: CausalWan) -> None:
    """Give a `CausalWan` the attention of the original repositories."""
    model._install()
    processors = dict(model.transformer.attn_processors)
    for layer in range(len(model.transformer.blocks)):
        processors[f"blocks.{layer}.attn1.processor"] = _Original(model)
    model.transformer.set_attn_processor(processors)


class _Original:
    """Self-attention as Self-Forcing runs it: a shifted cache, complex128 RoPE, read-backs."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self.key: Tensor | None = None

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        model, heads = self.model, (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        cos, sin = rotary_emb
        query, key = (_turned(part, cos, sin) for part in (query, key))
        start = model.running.start_frame * model.frame_tokens
        if self.key is None or start == 0:
            size = model.window_frames * model.frame_tokens
            self.key, self.value = (
                part.new_zeros(len(part), size, *part.shape[2:]) for part in (key, value)
            )
            self.ends = torch.zeros(2, dtype=torch.long, device=key.device)
        out = []
        # one block at a time, as the repositories write clean blocks
        block = model.block_shape[0] * model.frame_tokens
        for at in range(0, key.shape[1], block):
            part = slice(at, at + block)
            out.append(self._attend(query[:, part], key[:, part], value[:, part], start + at))
        return attn.to_out[0](torch.cat(out, 1).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
        size, new, end = self.key.shape[1], key.shape[1], start + key.shape[1]
        global_end, local_end = self.ends[0].item(), self.ends[1].item()
        evicted = 0
        if start > global_end:
            # the loop left out blocks that can change nothing any more, and so can what is older
            global_end, local_end = start, 0
        if end > global_end and new + local_end > size:
            evicted = new + local_end - size
            for cache in (self.key, self.value):
                cache[:, : local_end - evicted] = cache[:, evicted:local_end].clone()
        local_end += end - global_end - evicted
        self.key[:, local_end - new : local_end] = key
        self.value[:, local_end - new : local_end] = value
        self.ends[0], self.ends[1] = end, local_end
        parts = (query, self.key[:, :local_end], self.value[:, :local_end])
        attended = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in parts))
        return attended.transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos.double(), sin.double())
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)
