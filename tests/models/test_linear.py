"""Wan's linear layers in e4m3: near the exact ones, a quarter of float32's bytes, never silent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.linear import Fp8Linear, quantise, require_e4m3
from sdvg.models.wan import CausalWan
from sdvg_kernels import quantize_rows
from sdvg_kernels.testing import assert_within_budget
from tests.tiny import FRAMES, float64_norms, tiny_wan

PROMPTS = ["a seven moving left", "a two moving up"]
HALVES = (torch.bfloat16, torch.float16)


def linear(inputs: int = 64, outputs: int = 48, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return a random layer with one channel that stands out."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    made.weight[4] *= 50
    return made


def rounded(layer: Fp8Linear, x: Tensor) -> Tensor:
    """Return the product of the values as `layer` rounds them, in float64."""
    values, scales = quantize_rows(x.flatten(0, -2), activation=layer.activation)
    weight = layer.weight.double() * layer.scale.T
    out = (values.double() * scales) @ weight.T
    return out.unflatten(0, x.shape[:-1]) + layer.bias.double()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_a_layer_is_the_product_of_its_rounded_rows(dtype: torch.dtype) -> None:
    layer = Fp8Linear(linear(dtype=dtype))
    x = torch.randn(5, 7, 64, dtype=dtype)
    out, exact = layer(x), rounded(layer, x)
    assert out.shape == exact.shape
    assert out.dtype == dtype
    same = exact.to(dtype if dtype in HALVES else torch.bfloat16).to(dtype)
    assert_within_budget(out, same, exact)


def test_each_channel_is_near_the_exact_one_beside_others_that_stand_out() -> None:
    stock = linear()
    x = torch.randn(5, 7, 64)
    x[..., 3] *= 20
    exact, out = stock(x), Fp8Linear(stock)(x)
    # a row's own scale keeps small channels as exact as large ones
    error = (out - exact).flatten(0, 1).norm(dim=0) / exact.flatten(0, 1).norm(dim=0)
    assert error.max() < 0.08
    assert Fp8Linear(stock)(torch.zeros(2, 64)).isfinite().all()
    assert Fp8Linear(stock)(torch.zeros(0, 64)).shape == (0, 48)
    # a view between others' columns, as the parts of a fused projection are
    wide = torch.cat([torch.full_like(x, torch.nan), x], dim=-1)
    assert torch.equal(Fp8Linear(stock)(wide[..., 64:]), out)


def test_a_nan_is_lost_in_its_own_row_alone() -> None:
    x = torch.randn(4, 64)
    x[2, 5] = torch.nan
    assert Fp8Linear(linear())(x).isnan().any(1).tolist() == [False, False, True, False]


def test_a_change_of_dtype_or_device_leaves_the_rounded_weight_alone() -> None:
    """`.to(dtype)` took the values out of e4m3 without their scales."""
    layer = Fp8Linear(linear())
    x, weight = torch.randn(3, 64), layer.weight.clone()
    before = layer(x)
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        change(layer)
        assert torch.equal(layer.weight.float(), weight.float())
        assert (layer.weight.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert layer.bias.dtype == torch.float64
    torch.testing.assert_close(layer(x.double()).float(), before, rtol=1e-2, atol=1e-2)
    layer.to("meta", torch.float16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float8_e4m3fn)


def test_weights_that_come_too_late_are_an_error() -> None:
    stock, layer = linear(), Fp8Linear(linear())
    with pytest.raises(RuntimeError, match=r"weight must be e4m3, got torch.float32; load weights"):
        layer.load_state_dict(stock.state_dict(), strict=False)
    layer.load_state_dict(Fp8Linear(stock).state_dict())


def velocities(model: CausalWan, latents: Tensor) -> Tensor:
    """Return the velocity of each of four blocks after clean ones."""
    model.start(PROMPTS)
    out = []
    for start in range(0, latents.shape[1], FRAMES):
        part = latents[:, start : start + FRAMES]
        out.append((part - model.denoise(part, 500.0, start_frame=start)).double() / 0.5)
        model.write(part, start_frame=start)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_velocity_stays_near_the_exact_one(dtype: torch.dtype) -> None:
    sizes = {"seed": 3, "layers": 3, "head_dim": 32}
    plain, eight = (tiny_wan(**sizes, dtype=dtype) for _ in range(2))
    eight.accelerate(fp8=True)
    latents = torch.randn(2, 4 * FRAMES, *plain.block_shape[1:], dtype=dtype)
    with float64_norms():
        exact_model = tiny_wan(**sizes, dtype=torch.float64)
        exact_model.transformer.load_state_dict(plain.transformer.state_dict())
        exact = velocities(exact_model, latents.double())
    error = (velocities(eight, latents) - exact).norm() / exact.norm()
    # e4m3 rounds a value by 2.6% on average (root mean square); the residual stream dilutes it
    assert 0.001 < error < 0.025


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_blocks_take_a_byte_for_each_weight(dtype: torch.dtype) -> None:
    plain, eight = (tiny_wan(seed=3, layers=3, dtype=dtype).transformer.blocks for _ in range(2))
    model = tiny_wan(seed=3, layers=3, dtype=dtype).accelerate(fp8=True)
    eight = model.transformer.blocks
    # again: nothing is left to do
    assert quantise(model.transformer) == 0

    def held(blocks: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*blocks.parameters(), *blocks.buffers()))

    layers = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    saved = sum(layer.weight.numel() * (dtype.itemsize - 1) for layer in layers)
    scales = sum(4 * layer.out_features for layer in layers)
    assert held(eight) == held(plain) - saved + scales
    # q, k, v in one, k and v of the prompt in one: 10 layers of a block become 7
    assert sum(isinstance(module, Fp8Linear) for module in eight.modules()) == 3 * 7
    assert not any(isinstance(module, nn.Linear) for module in eight.modules())


def test_the_gelu_is_computed_where_its_output_is_rounded() -> None:
    model = tiny_wan(seed=3, layers=1)
    ffn = model.transformer.blocks[0].ffn
    x = torch.randn(2, 5, ffn.net[2].out_features)
    exact = ffn(x)
    middle = Fp8Linear(ffn.net[0].proj)(x)
    alone = Fp8Linear(ffn.net[2])
    expected = alone(F.gelu(middle, approximate="tanh"))
    model.accelerate(fp8=True)
    assert ffn.net[2].activation == "gelu_tanh"
    torch.testing.assert_close(ffn(x), expected, rtol=1e-2, atol=1e-3)
    assert (ffn(x) - exact).norm() / exact.norm() < 0.08
    assert "activation=gelu_tanh" in repr(ffn)


def test_widths_that_the_product_cannot_take_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Heads of 12 channels: 24 wide."""
    model = tiny_wan(seed=3, layers=2, head_dim=12)
    model.accelerate(fp8=True)
    (said,) = caplog.messages
    assert said == (
        "accelerate: 14 linear layers are not in e4m3: widths must be multiples of 16, got "
        "24 x 72, 24 x 24, 24 x 48, 64 x 24, 24 x 64"
    )


def test_a_gpu_without_e4m3_products_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(NotImplementedError) as caught:
        require_e4m3(torch.device("cuda", 0))
    assert str(caught.value) == (
        "accelerate: fp8 must run on a GPU of compute capability 8.9 or more, got 8.6 (RTX 3090); "
        "leave fp8 out"
    )
    require_e4m3(torch.device("cpu"))


def test_a_model_in_e4m3_goes_back_to_eager_passes_but_not_to_its_weights() -> None:
    model = tiny_wan(seed=3, layers=2).accelerate(fp8=True)
    latents = torch.randn(2, 2 * FRAMES, *model.block_shape[1:])
    fused = velocities(model, latents)
    with pytest.raises(ValueError, match="to_qkv must have its own weights to be taken apart"):
        model.transformer.unfuse_qkv_projections()
    model._install()
    torch.testing.assert_close(velocities(model, latents), fused, rtol=0.05, atol=0.05)


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 300, 4680])
@pytest.mark.parametrize("widths", [(1536, 8960), (8960, 1536), (64, 48)], ids=str)
def test_a_layer_on_the_gpu_is_the_product_of_its_rounded_rows(
    widths: tuple[int, int], rows: int, dtype: torch.dtype
) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 products need compute capability 8.9")
    layer = Fp8Linear(linear(*widths, dtype=dtype).cuda())
    x = torch.randn(1, rows, widths[0], device="cuda", dtype=dtype)
    for activation in (None, "gelu_tanh"):
        layer.activation = activation
        out, exact = layer(x), rounded(layer, x)
        # tensor cores keep about 14 bits of a sum of thousands; a wrong scale would be off by far
        assert (out - exact).norm() / exact.norm() < 0.02
