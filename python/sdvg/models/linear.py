"""Wan's linear layers in fewer products and fewer bytes: q, k and v as one, all of them in e4m3.

A file keeps the stock names whatever is done here: `to_q.weight` is written and read where only
`to_qkv` has a weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sdvg_kernels import quantize_rows

_LOG = logging.getLogger("sdvg")
# what `torch._scaled_mm` takes: both widths of a weight
_MULTIPLE = 16


def fuse_projections(attn: nn.Module) -> None:
    """Make one product of self-attention's q, k and v, or of a cross-attention's k and v.

    Only the fused layer (`to_qkv`, `to_kv`: diffusers' names) has weights afterwards; in place of
    the others stand slices of what it gives. `attn.unfuse_projections()` undoes it.

    Raises ValueError for weights that are elsewhere (offloaded layer by layer).
    """
    if fused_here(attn):
        return
    name, parts = _names(attn)
    if attn.to_v.weight.is_meta:
        raise ValueError(
            "accelerate: transformer must have its weights in memory, got meta tensors; "
            "layers must not be offloaded one by one: offload whole models"
        )
    trained = attn.to_v.weight.requires_grad
    attn.fuse_projections()
    getattr(attn, name).requires_grad_(trained)
    for index, part in enumerate(parts):
        setattr(attn, part, _Part(attn, index))
    hooks = (
        attn.register_state_dict_post_hook(_separate),
        attn.register_load_state_dict_pre_hook(_join),
    )
    # the class's own would lose the weights
    attn.unfuse_projections = partial(_unfuse, attn, hooks)


def fused_here(attn: nn.Module) -> bool:
    """Return whether `fuse_projections` has been here."""
    return isinstance(attn.to_v, _Part)


def projected(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v of `x`, or a cross-attention's k and v, fused or not."""
    name, parts = _names(attn)
    if getattr(attn, "fused_projections", False):
        return getattr(attn, name)(x).chunk(len(parts), dim=-1)
    return tuple(getattr(attn, part)(x) for part in parts)


def _names(attn: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return the fused layer's name and those of its parts."""
    if attn.is_cross_attention:
        return "to_kv", ("to_k", "to_v")
    return "to_qkv", ("to_q", "to_k", "to_v")


class _Part(nn.Module):
    """Stands where one projection was; its weight and what it gives are the fused one's."""

    def __init__(self, attn: nn.Module, index: int) -> None:
        super().__init__()
        # not an attribute that nn.Module would register: attn holds this
        self._attn = (attn,)
        self.index = index

    def _slice(self, whole: Tensor, dim: int) -> Tensor:
        (attn,) = self._attn
        return whole.chunk(len(_names(attn)[1]), dim=dim)[self.index]

    @property
    def fused(self) -> nn.Module:
        """The layer that has the weights."""
        (attn,) = self._attn
        return getattr(attn, _names(attn)[0])

    @property
    def weight(self) -> Tensor:
        """Its rows of the fused weight: a view."""
        return self._slice(self.fused.weight, 0)

    @property
    def bias(self) -> Tensor:
        """Its entries of the fused bias: a view."""
        return self._slice(self.fused.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return its slice of the whole product, which is computed each time."""
        return self._slice(self.fused(x), -1)


def _separate(attn: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Write the parts of the fused layer under their own names."""
    name, parts = _names(attn)
    if not isinstance(getattr(attn, name), nn.Linear):
        return
    for kind in ("weight", "bias"):
        views = state.pop(f"{prefix}{name}.{kind}").chunk(len(parts))
        state |= {f"{prefix}{part}.{kind}": view for part, view in zip(parts, views, strict=True)}


def _join(
    attn: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, object],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Read the fused layer from its parts; one that is not there, or does not fit, stays."""
    name, parts = _names(attn)
    if not isinstance(getattr(attn, name), nn.Linear):
        return
    for kind in ("weight", "bias"):
        held = []
        for part in parts:
            key, own = f"{prefix}{part}.{kind}", getattr(getattr(attn, part), kind)
            given = state.pop(key, None)
            if given is None:
                missing.append(key)
            elif given.shape != own.shape:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from "
                    f"checkpoint, the shape in current model is {own.shape}."
                )
            fits = given is not None and given.shape == own.shape
            held.append(given if fits else own.detach())
        device = next((part.device for part in held if not part.is_meta), held[0].device)
        state[f"{prefix}{name}.{kind}"] = torch.cat([part.to(device) for part in held])


def _unfuse(attn: nn.Module, hooks: tuple[torch.utils.hooks.RemovableHandle, ...]) -> None:
    """Give each projection its own weights again, as the stock class has them."""
    name, parts = _names(attn)
    fused = getattr(attn, name)
    if not isinstance(fused, nn.Linear):
        raise ValueError(
            f"accelerate: {name} must have its own weights to be taken apart, got e4m3; "
            "load the model anew"
        )
    for part in parts:
        weight, bias = (getattr(getattr(attn, part), kind).detach() for kind in ("weight", "bias"))
        with torch.device("meta"):
            linear = nn.Linear(fused.in_features, len(weight))
        linear.requires_grad_(fused.weight.requires_grad)
        linear.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
        setattr(attn, part, linear)
    for hook in hooks:
        hook.remove()
    del attn.unfuse_projections
    attn.unfuse_projections()


class Fp8Linear(nn.Module):
    """`nn.Linear` in e4m3: `x` and the weight are scaled row by row to the format's range.

    On Hopper sums are kept in the tensor cores' own precision (fast accumulation, some 14 bits), as
    torchao's rowwise recipe does. A change of dtype leaves weight and scale alone.

    Args:
        linear: the layer that it stands for; its bias stays as it is.

    Attributes:
        activation: what `quantize_rows` applies to the input; None, or "gelu_tanh".
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation: str | None = None
        weight, scale = quantize_rows(linear.weight.detach())
        # [out, in]: its transpose is the column-major operand that the product wants
        self.register_buffer("weight", weight)
        # [1, out]
        self.register_buffer("scale", scale.view(1, -1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return `activation(x) [..., in] @ weight.T + bias` in x's dtype."""
        rows, scale = quantize_rows(x.flatten(0, -2), activation=self.activation)
        # a GPU's product gives 16 bits, and adds a bias of its output's own dtype
        on_gpu, half = x.device.type == "cuda", x.dtype in (torch.bfloat16, torch.float16)
        if on_gpu:
            out = torch._scaled_mm(
                rows,
                self.weight.T,
                scale_a=scale,
                scale_b=self.scale,
                bias=self.bias if half else None,
                out_dtype=x.dtype if half else torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            # torch 2.11's product on a CPU takes one scale for all rows
            one = scale.new_ones(())
            out = torch._scaled_mm(rows, self.weight.T, one, one, out_dtype=torch.float32)
            out = out * scale * self.scale
        if self.bias is not None and not (on_gpu and half):
            out = out + self.bias
        out = out.to(x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def moved(tensor: Tensor) -> Tensor:
            after = fn(tensor)
            if tensor is self.weight or tensor is self.scale:
                return after if after.dtype == tensor.dtype else tensor.to(after.device)
            return after

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self,
        state: dict[str, Tensor],
        prefix: str,
        metadata: dict[str, object],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        given = state.get(f"{prefix}weight")
        if given is not None and given.dtype != self.weight.dtype:
            errors.append(
                f"accelerate: {prefix}weight must be e4m3, got {given.dtype}; load weights before "
                "accelerate(fp8=True)"
            )
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        activation = f", activation={self.activation}" * (self.activation is not None)
        return f"{self.in_features}, {self.out_features}{activation}"


def require_e4m3(device: torch.device) -> None:
    """Raise NotImplementedError unless `device` multiplies e4m3: a CPU does, and sm_89 or later."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise NotImplementedError(
            "accelerate: fp8 must run on a GPU of compute capability 8.9 or more, got "
            f"{major}.{minor} ({torch.cuda.get_device_name(device)}); leave fp8 out"
        )


def quantise(transformer: nn.Module) -> int:
    """Put the blocks' linear layers into e4m3, one after the other; return how many.

    The first and the last layers, the embeddings and the modulation stay as they are. Layers whose
    widths the product cannot take (multiples of 16 it can) stay too, and a warning counts them.
    The FFN's GELU is computed where its output is rounded.
    """
    count, narrow = 0, []
    for block in transformer.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if not isinstance(child, nn.Linear):
                    continue
                if child.in_features % _MULTIPLE or child.out_features % _MULTIPLE:
                    narrow.append(f"{child.in_features} x {child.out_features}")
                    continue
                setattr(module, name, Fp8Linear(child))
                count += 1
        first, _, last = block.ffn.net
        if isinstance(last, Fp8Linear) and getattr(first, "approximate", None) == "tanh":
            last.activation = "gelu_tanh"
            block.ffn.net[0] = first.proj
    if narrow:
        _LOG.warning(
            "accelerate: %d linear layers are not in e4m3: widths must be multiples of %d, got %s",
            len(narrow), _MULTIPLE, ", ".join(dict.fromkeys(narrow)),
        )  # fmt: skip
    return count
