"""What tests of the Python-launched ops share: each runs in every lane of this machine."""

from __future__ import annotations

import pytest
import torch

from sdvg_kernels.testing import Lane, lanes

_LANES = {lane.name: lane for lane in lanes()}


@pytest.fixture(
    params=[
        pytest.param("reference"),
        pytest.param(
            "interpreter",
            marks=pytest.mark.skipif(
                "interpreter" not in _LANES, reason="Triton is compiled here, or not installed"
            ),
        ),
        pytest.param("reference-cuda", marks=pytest.mark.gpu),
        pytest.param("triton", marks=pytest.mark.gpu),
    ]
)
def lane(request: pytest.FixtureRequest) -> Lane:
    """Each implementation of attention and routing, where it runs."""
    return _LANES[request.param]


@pytest.fixture
def random(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the test's name: inputs differ between tests, not between runs."""
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(request.node.name)) % 2**31
    return torch.Generator().manual_seed(seed)
