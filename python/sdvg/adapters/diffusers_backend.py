"""Our attention as diffusers' backend "sdvg": dense attention of any lengths, GQA, log-sum-exp.

diffusers finds a backend by a member of an Enum, which a plain registration cannot extend: it is
extended here as Python's own `Enum` does it. That is diffusers' private ground, so it is only
entered in releases where it looks as it is expected to.
"""

from __future__ import annotations

import functools
import inspect
import logging
from types import ModuleType

from torch import Tensor

from sdvg_kernels import dense_attention, implementations

BACKEND = "sdvg"
# the releases that were tried; a later one is looked at, and taken with a warning
_OLDEST, _NEWEST = (0, 36), (0, 42)
_LOG = logging.getLogger("sdvg")
_OP = "attention backend 'sdvg'"
# found when the backend is registered: a compiler is not to trace the search
_on_gpus = "triton"


def register_attention_backend() -> str:
    """Make "sdvg" a backend of diffusers' attention; return its name. Again: nothing changes.

    Then these take it:

        model.set_attention_backend("sdvg")
        with attention_backend("sdvg"): ...
        dispatch_attention_fn(query, key, value, backend="sdvg")

    It serves self- and cross-attention without a mask: on a GPU by our kernel (head dims 64 and
    128; bfloat16, float16, float32), on CPUs by the reference; gradients are served too. Masks,
    causal attention, dropout, context parallelism, and what the kernel does not serve are refused
    in one sentence.

    Raises:
        ImportError: diffusers is not installed.
        RuntimeError: this release of diffusers has another dispatcher than the one expected.
    """
    dispatch = _dispatcher()
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    if BACKEND in names._value2member_map_:
        if registry._backends.get(names(BACKEND)) is not _attention:
            raise RuntimeError(
                f"register_attention_backend: {BACKEND!r} must not be taken, got a backend of that "
                "name by somebody else"
            )
        return BACKEND
    global _on_gpus
    _on_gpus = _kernel()
    # the order in which Enum's own constructor fills its tables
    member = str.__new__(names, BACKEND)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    member.__objclass__, member._sort_order_ = names, len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[BACKEND] = member
    registry.register(member)(_attention)
    return BACKEND


def unregister_attention_backend() -> None:
    """Take "sdvg" from diffusers' backends again; where it is not registered, do nothing.

    Raises:
        RuntimeError: it is the active backend: `model.reset_attention_backend()` first.
    """
    dispatch = _dispatcher()
    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    member = names._value2member_map_.get(BACKEND)
    if member is None or registry._backends.get(member) is not _attention:
        return
    if registry._active_backend == member:
        raise RuntimeError(
            f"unregister_attention_backend: {BACKEND!r} must not be active, got the active "
            "backend; call model.reset_attention_backend() first"
        )
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)
    type.__delattr__(names, member._name_)
    names._member_names_.remove(member._name_)
    del names._member_map_[member._name_], names._value2member_map_[BACKEND]


def _dispatcher() -> ModuleType:
    """Return diffusers' dispatcher; raise unless it looks as `register_attention_backend` needs."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "register_attention_backend: diffusers must be installed, got none; "
            "pip install 'sdvg[diffusers]'"
        ) from error
    rule = f"register_attention_backend: diffusers must be {'.'.join(map(str, _OLDEST))} or later"
    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    if release < _OLDEST:
        raise RuntimeError(f"{rule}, got {diffusers.__version__}")
    from diffusers.models import attention_dispatch as dispatch

    if missing := _missing(dispatch):
        raise RuntimeError(
            f"{rule} with a dispatcher known here, got {diffusers.__version__} without {missing}"
        )
    if release > _NEWEST:
        _warn_once(diffusers.__version__)
    return dispatch


def _missing(dispatch: ModuleType) -> str:
    """Return "" or what is not there of all that is used."""
    names = getattr(dispatch, "AttentionBackendName", None)
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    wanted = [
        (names, "AttentionBackendName", ("_member_map_", "_member_names_", "_value2member_map_")),
        (registry, "_AttentionBackendRegistry", ("register", "_active_backend", "_backends")),
        (registry, "_AttentionBackendRegistry", ("_constraints", "_supported_arg_names")),
    ]
    for owner, name, parts in wanted:
        for part in parts:
            if not hasattr(owner, part):
                return f"{name}.{part}"
    known = inspect.signature(registry.register).parameters
    return "" if "backend" in known else "register(backend)"


@functools.cache
def _warn_once(version: str) -> None:
    newest = ".".join(map(str, _NEWEST))
    _LOG.warning("%s: tried with diffusers up to %s, this is %s", _OP, newest, version)


def _kernel() -> str:
    """Return the kernel that serves GPUs by default, or the one to name in the refusal."""
    served = implementations()["attention"]
    return next((name for name in served if not served[name] and name != "reference"), "triton")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return out [B, T, H, D]; with `return_lse` lse [B, T, H] too, as diffusers' others do.

    All that the dispatcher may pass is named: what is not named it drops without a word.
    """
    refused = (
        ("attn_mask", attn_mask is not None, "be None"),
        ("dropout_p", dropout_p != 0.0, "be 0"),
        ("is_causal", is_causal, "be False"),
        ("parallel_config", _parallel_config is not None, "be None"),
        ("enable_gqa", not enable_gqa and query.shape[2] != key.shape[2], "be True for fewer keys"),
    )
    for name, wrong, rule in refused:
        if wrong:
            raise NotImplementedError(
                f"{_OP}: {name} must {rule}, got another; choose backend 'native' for this"
            )
    # on a GPU the reference would be slow, and nobody asked for it
    implementation = _on_gpus if query.device.type == "cuda" else None
    result = dense_attention(
        query,
        key,
        value,
        softmax_scale=scale,
        return_lse=return_lse,
        implementation=implementation,
    )
    if not return_lse:
        return result
    out, lse = result
    return out, lse.transpose(1, 2).contiguous()
