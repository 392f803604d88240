"""Whom we compare with: what each peer is, its version, and why it is not here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# query [B, T, H, D], key and value [B, S, H, D], visible bool [blocks of the query, S] -> out [B,
# T, H, D]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Peer(NamedTuple):
    """An attention that somebody else wrote, on the same inputs."""

    name: str
    what: str
    version: str
    # "" or why it cannot run here
    reason: str
    # whether it looks at `visible`; the others are called block by block with the keys that it
    # sees, gathered inside the timed region where they do not lie together
    masks: bool
    # returns the function for one shape: compiled peers compile for each
    build: Callable[[], Attention]
    # whether it computes in 8 bits: measured beside ours in 8 bits, never beside 16
    quantized: bool = False


def attention_peers(device: torch.device) -> list[Peer]:
    """Return the peers of `block_causal_attention`; those that cannot run say why."""
    on_cpu = device.type == "cpu"
    here = "needs an NVIDIA GPU" if on_cpu else ""
    cudnn = torch.backends.cudnn.version()
    smoke = Peer(
        "sdpa",
        "torch's scaled_dot_product_attention, its own choice of backend",
        torch.__version__,
        "",
        False,
        lambda: functools.partial(_sdpa, None),
    )
    return [
        # on a GPU the backends are measured one by one
        *([smoke] if on_cpu else []),
        Peer(
            "sdpa-flash",
            "torch's scaled_dot_product_attention, FlashAttention backend",
            torch.__version__,
            here,
            False,
            lambda: functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        ),
        Peer(
            "sdpa-cudnn",
            "torch's scaled_dot_product_attention, cuDNN backend",
            f"{torch.__version__}, cuDNN {cudnn}",
            here or ("" if cudnn else "this torch has no cuDNN"),
            False,
            lambda: functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        ),
        Peer(
            "flex",
            "torch's FlexAttention, compiled for the shape, with a block mask of the visible slots",
            torch.__version__,
            here,
            True,
            _flex,
        ),
        Peer(
            "fa3",
            "FlashAttention-3's flash_attn_func",
            _version("flash_attn_3", "flash-attn-3"),
            here or _absent("flash_attn_interface"),
            False,
            lambda: _flash("flash_attn_interface"),
        ),
        Peer(
            "fa4",
            "FlashAttention-4's flash_attn_func (CuTe DSL)",
            _version("flash-attn-4", "flash_attn"),
            here or _absent("flash_attn.cute"),
            False,
            lambda: _flash("flash_attn.cute"),
        ),
        Peer(
            "sage",
            "SageAttention's sageattn, its own choice of 8-bit kernel",
            _version("sageattention"),
            here or _absent("sageattention"),
            False,
            _sage,
            quantized=True,
        ),
    ]


def _sdpa(
    backend: SDPBackend | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    # one compilation a shape: past dynamo's limit of recompilations it would run eagerly, which is
    # nobody's peer
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    # the mask of the one shape, made outside of what is timed
    masks: list[BlockMask] = []

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        if not masks:
            block = query.shape[1] // len(visible)

            def sees(
                batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, slot: torch.Tensor
            ) -> torch.Tensor:
                return visible[row // block, slot]

            sizes = (query.shape[1], key.shape[1])
            masks.append(create_block_mask(sees, None, None, *sizes, device=str(query.device)))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return compiled(query, key, value, block_mask=masks[0]).transpose(1, 2)

    return run


def _flash(module: str) -> Attention:
    attend = importlib.import_module(module).flash_attn_func

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        out = attend(query, key, value)
        return out[0] if isinstance(out, tuple) else out

    return run


def _sage() -> Attention:
    from sageattention import sageattn

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        return sageattn(query, key, value, tensor_layout="NHD", is_causal=False)

    return run


def _absent(module: str) -> str:
    """Return "" or that the package of `module` is not here."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # the package above it is not here
        found = None
    return "" if found else "is not installed"


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


# --- QK-norm and RoPE, op by op, as Wan's pipelines run them ---


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return `x` [B, T, H, D] normed over all heads' channels, as Wan's RMSNorm rounds it."""
    flat = x.flatten(2)
    wide = flat.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (wide.type_as(flat) * weight).view(x.shape)


def complex_rope(
    x: torch.Tensor, grid: tuple[int, int, int], start_frame: int, theta: float = 10000.0
) -> torch.Tensor:
    """Rotate `x` [B, T, H, D] in complex128, sequence by sequence, as Self-Forcing does.

    The angles of the grid are put together in every call, from a table that is made once.
    """
    frames, height, width = grid
    pairs = x.shape[3] // 2
    space = pairs // 3
    time, row, column = _turns(pairs, theta, x.device).split([pairs - 2 * space, space, space], 1)
    out = []
    for sequence in x:
        turns = torch.cat(
            [
                time[start_frame : start_frame + frames, None, None].expand(*grid, -1),
                row[None, :height, None].expand(*grid, -1),
                column[None, None, :width].expand(*grid, -1),
            ],
            dim=-1,
        ).reshape(frames * height * width, 1, pairs)
        rotated = torch.view_as_complex(sequence.double().unflatten(-1, (-1, 2))) * turns
        out.append(torch.view_as_real(rotated).flatten(-2))
    return torch.stack(out).type_as(x)


@functools.cache
def _turns(pairs: int, theta: float, device: torch.device) -> torch.Tensor:
    """Return [1024, pairs] complex128: Self-Forcing's table."""
    space = pairs // 3
    rates = torch.cat(
        [
            theta ** -(torch.arange(count, dtype=torch.float64, device=device) / count)
            for count in (pairs - 2 * space, space, space)
        ]
    )
    angles = torch.outer(torch.arange(1024, dtype=torch.float64, device=device), rates)
    return torch.polar(torch.ones_like(angles), angles)


def float_rope(
    x: torch.Tensor, grid: tuple[int, int, int], start_frame: int, table: torch.Tensor
) -> torch.Tensor:
    """Rotate `x` [B, T, H, D] in float32 by a table [P, D] (cosines, sines), as diffusers does."""
    frames, height, width = grid
    space = x.shape[3] // 2 // 3
    parts = []
    for half in table.chunk(2, dim=1):
        time, row, column = half.split([half.shape[1] - 2 * space, space, space], dim=1)
        parts.append(
            torch.cat(
                [
                    time[start_frame : start_frame + frames, None, None].expand(*grid, -1),
                    row[None, :height, None].expand(*grid, -1),
                    column[None, None, :width].expand(*grid, -1),
                ],
                dim=-1,
            ).reshape(1, frames * height * width, 1, -1)
        )
    cos, sin = parts
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., 0::2] = real * cos - imaginary * sin
    out[..., 1::2] = real * sin + imaginary * cos
    return out


# --- modulation, op by op, as Wan's pipelines run it: float32 between the casts ---


def eager_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Norm `x` [B, T, C] and modulate it by [B, F, C] rows (F: the tokens, or the frames)."""
    normed = F.layer_norm(x.float(), x.shape[2:], eps=1e-6).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).type_as(x)


def eager_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return x + y * gate for [B, T, C] and [B, F, C] (F: the tokens, or the frames)."""
    branch = y.float().unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return (x.float() + branch.flatten(1, 2)).type_as(x)


# --- rows in e4m3, op by op, as torchao's eager path ---


def eager_quantised(x: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` [N, K], or its tanh-GELU rounded to x's dtype, in e4m3 and the scales [N, 1]."""
    if gelu:
        x = F.gelu(x, approximate="tanh")
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


# --- a scorer's input ---


def pillow_frames(
    video: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Preprocess `video` [B, 3, F, H, W] by Pillow on the CPU, there and back, frame by frame."""
    from PIL import Image

    height, width = video.shape[3:]
    short = min(height, width)
    full = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in full)
    box = (left, top, left + size, top + size)
    # as diffusers' video processor
    unit = (video * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).flatten(0, 1)
    images = (unit.cpu().float().numpy() * 255).round().astype("uint8")
    small = torch.stack(
        [
            torch.frombuffer(
                bytearray(
                    Image.fromarray(image)
                    .resize(full, Image.Resampling.BICUBIC)
                    .crop(box)
                    .tobytes()
                ),
                dtype=torch.uint8,
            ).view(size, size, 3)
            for image in images
        ]
    )
    grey = small.permute(0, 3, 1, 2).to(torch.float32).div(255)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    out = (grey - shift) / scale
    return out.to(video.device, video.dtype).unflatten(0, (len(video), -1))


def interpolated_frames(
    video: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Preprocess `video` [B, 3, F, H, W] by torch's antialiased bicubic: near Pillow's levels."""
    height, width = video.shape[3:]
    short = min(height, width)
    full = (size * height // short, size * width // short)
    top, left = (round((side - size) / 2) for side in full)
    unit = (video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2).flatten(0, 1)
    small = F.interpolate(
        (unit.float() * 255).round(), full, mode="bicubic", antialias=True, align_corners=False
    )
    grey = small[..., top : top + size, left : left + size].round().clamp(0, 255) / 255
    # made on the device: a copy from the host has no place in a graph
    shift, scale = (
        torch.stack([torch.full((1, 1), value, device=video.device) for value in values])
        for values in (mean, std)
    )
    return ((grey - shift) / scale).to(video.dtype).unflatten(0, (len(video), -1))
