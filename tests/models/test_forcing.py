"""The training forward in bfloat16: what autocast on a GPU makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from sdvg.train import transformer
from sdvg.train.forcing import BlockForward


def predicted(device: str, dtype: torch.dtype) -> torch.Tensor:
    """One prediction of a drafter, two blocks beside two clean ones."""
    torch.manual_seed(0)
    model = transformer.build("drafter").to(device)
    sizes = {"blocks": 2, "frames": 3, "height": 4, "width": 4}
    forward = BlockForward(model, window_frames=6, sink_frames=3, dtype=dtype, **sizes)
    noisy, clean = torch.randn(2, 1, model.config.in_channels, 6, 4, 4).to(device)
    text, sigma = torch.randn(1, 24, 128).to(device), torch.full((1, 2), 0.5, device=device)
    with torch.no_grad():
        return forward(model, noisy, sigma, text, context=clean)


def test_a_norm_that_autocast_widens_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it does: queries once came in float32 to values in bfloat16."""
    expected = predicted("cpu", torch.bfloat16)
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *arguments: norm(*arguments).float())
    assert torch.equal(predicted("cpu", torch.bfloat16), expected)


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_near_float32() -> None:
    wide, narrow = (predicted("cuda", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (wide - narrow).norm() < 0.05 * wide.norm()
