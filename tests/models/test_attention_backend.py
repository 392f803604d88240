"""diffusers' attention dispatcher with the backend "sdvg": registered, right, refusing, gone."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

from sdvg.adapters import (
    diffusers_backend,
    register_attention_backend,
    unregister_attention_backend,
)

NAMES, REGISTRY = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    """The backend, registered for a test and gone after it."""
    active = REGISTRY._active_backend
    yield register_attention_backend()
    REGISTRY.set_active_backend(active)
    unregister_attention_backend()


def tensors(queries: int, keys: int, heads: int = 2, cached: int = 2) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((queries, heads), (keys, cached), (keys, cached))
    return tuple(torch.randn(2, *shape, 64, generator=random) for shape in shapes)


def tiny_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2, "ffn_dim": 64}
    model = WanTransformer3DModel(
        **sizes, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, rope_max_seq_len=32
    )
    return model.eval().requires_grad_(False)


def passed(model: WanTransformer3DModel) -> Tensor:
    """A pass with more latent tokens than text tokens: cross-attention has L_q > L_k."""
    random = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    latents = torch.randn(1, 4, 3, 4, 6, generator=random).to(device)
    text = torch.randn(1, 7, 16, generator=random).to(device)
    step = torch.tensor([500.0], device=device)
    return model(latents, step, text, return_dict=False)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes", [(9, 9), (9, 5), (40, 7), (3, 50), (1, 1), (5, 9, 4, 2), (300, 77)]
)
def test_the_dispatcher_gives_what_native_gives(sizes: tuple[int, ...], device: str) -> None:
    query, key, value = (tensor.to(device) for tensor in tensors(*sizes))
    gqa = query.shape[2] != key.shape[2]
    native, ours = (
        dispatch_attention_fn(query, key, value, backend=name, enable_gqa=gqa, scale=0.2)
        for name in ("native", "sdvg")
    )
    torch.testing.assert_close(ours, native, rtol=0, atol=2e-5)


def test_the_log_sum_exp_lies_as_diffusers_has_it() -> None:
    query, key, value = tensors(9, 5)
    out, lse = dispatch_attention_fn(
        query, key, value, backend="sdvg", attention_kwargs={"return_lse": True}
    )
    logits = torch.einsum("bthd,bshd->bths", query, key) / 8
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, dispatch_attention_fn(query, key, value))


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_takes_it_by_name_and_gives_it_back(device: str) -> None:
    model = tiny_wan().to(device)
    native = passed(model)
    model.set_attention_backend("sdvg")
    assert REGISTRY._active_backend is NAMES("sdvg")
    assert {block.attn2.processor._attention_backend for block in model.blocks} == {NAMES("sdvg")}
    torch.testing.assert_close(passed(model), native, rtol=0, atol=2e-5)
    # a copy, through pickle too, keeps its backend
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks[0].attn1.processor._attention_backend is NAMES("sdvg")
    with pytest.raises(RuntimeError, match="must not be active, got the active backend; call"):
        unregister_attention_backend()
    model.reset_attention_backend()
    assert torch.equal(passed(model), native)


def test_a_context_takes_it_for_a_while() -> None:
    query, key, value = tensors(9, 5)
    before = REGISTRY._active_backend
    with attention_backend("sdvg"):
        assert REGISTRY._active_backend is NAMES.SDVG
        dispatch_attention_fn(query, key, value)
        with pytest.raises(NotImplementedError, match="is_causal must be False"):
            dispatch_attention_fn(query, key, value, is_causal=True)
    assert REGISTRY._active_backend is before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"attn_mask": torch.ones(2, 1, 9, 5, dtype=torch.bool)}, "attn_mask must be None"),
        ({"is_causal": True}, "is_causal must be False"),
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
        ({"parallel_config": object()}, "parallel_config must be None"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(change: dict[str, object], text: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        dispatch_attention_fn(*tensors(9, 5), **change, backend="sdvg")
    said = f"attention backend 'sdvg': {text}, got another; choose backend 'native' for this"
    assert str(caught.value) == said


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = tensors(9, 5, 4, 2)
    with pytest.raises(NotImplementedError, match="enable_gqa must be True"):
        dispatch_attention_fn(query, key, value, backend="sdvg")
    with pytest.raises(ValueError, match="number of heads that divides query's"):
        dispatch_attention_fn(query[:, :, :3], key, value, enable_gqa=True, backend="sdvg")
    with pytest.raises(TypeError, match="k_cache must have query's dtype"):
        dispatch_attention_fn(query[:, :, :2], key.half(), value, backend="sdvg")


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_native(device: str) -> None:
    given = [tensor.to(device).requires_grad_() for tensor in tensors(9, 5, 4, 2)]
    native, ours = (
        torch.autograd.grad(
            dispatch_attention_fn(*given, backend=name, enable_gqa=True).square().sum(), given
        )
        for name in ("native", "sdvg")
    )
    for one, two in zip(ours, native, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_model_has_no_graph_break(device: str) -> None:
    query, key, value = (tensor.to(device) for tensor in tensors(9, 5))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dispatch_attention_fn(query, key, value, backend="sdvg") * 2

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))


def test_registering_twice_changes_nothing_and_unregistering_leaves_nothing() -> None:
    members = list(NAMES)
    assert register_attention_backend() == "sdvg"
    assert list(NAMES) == members
    unregister_attention_backend()
    unregister_attention_backend()
    assert "sdvg" not in [name.value for name in NAMES]
    assert not hasattr(NAMES, "SDVG")
    assert "sdvg" not in REGISTRY.list_backends()
    with pytest.raises(ValueError, match="sdvg"):
        tiny_wan().set_attention_backend("sdvg")
    # ... and all that was there before still is
    assert NAMES("native") is NAMES.NATIVE
    assert [*NAMES, register_attention_backend()] == [*members[:-1], "sdvg"]


def test_a_name_that_somebody_else_took_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY._backends, NAMES.SDVG, print)
    with pytest.raises(RuntimeError, match="got a backend of that name by somebody else"):
        register_attention_backend()
    unregister_attention_backend()
    assert NAMES("sdvg") in REGISTRY._backends


def test_other_releases_of_diffusers_are_judged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffusers.__version__", "0.34.0")
    with pytest.raises(RuntimeError, match=r"must be 0\.36 or later, got 0\.34\.0$"):
        register_attention_backend()
    monkeypatch.setattr("diffusers.__version__", "1.2.0.dev0")
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        register_attention_backend()
    (said,) = caplog.messages
    assert said.endswith("this is 1.2.0.dev0")
    with monkeypatch.context() as without:
        without.delattr(REGISTRY, "_constraints")
        with pytest.raises(RuntimeError, match=r"without _AttentionBackendRegistry\._constraints$"):
            register_attention_backend()


@pytest.mark.gpu
def test_a_gpu_never_gets_the_reference() -> None:
    query, key, value = (tensor.cuda()[..., :48] for tensor in tensors(9, 5))
    with pytest.raises(NotImplementedError, match="head dim 64 and 128"):
        dispatch_attention_fn(query, key, value, backend="sdvg")
    with pytest.raises(NotImplementedError, match="float64"):
        dispatch_attention_fn(*(t.double().cuda() for t in tensors(9, 5)), backend="sdvg")
    assert diffusers_backend._on_gpus != "reference"
