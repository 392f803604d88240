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
