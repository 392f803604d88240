"""preprocess_frames in every lane, bit for bit against Pillow, torchvision and diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sdvg_kernels import preprocess_frames
from sdvg_kernels.frames import api, config, reference
from sdvg_kernels.testing import Lane

# height, width, size: a block of Wan's at a tenth, portrait, enlarged, hardly changed, odd, tiny
SIZES = [
    (48, 83, 22),
    (83, 48, 22),
    (30, 21, 45),
    (33, 33, 33),
    (37, 36, 35),
    (64, 64, 32),
    (7, 200, 13),
    (90, 97, 10),
    (1, 1, 3),
    (5, 3, 1),
]


def noise(height: int, width: int, random: torch.Generator) -> torch.Tensor:
    """Grey levels [2, 3, H, W] uint8: noise of all levels, and noise of black and white."""
    grey = torch.randint(0, 256, (2, 3, height, width), generator=random)
    grey[1] = (grey[1] > 127) * 255
    return grey.to(torch.uint8)


def as_video(grey: torch.Tensor) -> torch.Tensor:
    """A float32 video [1, 3, F, H, W] in [-1, 1] of grey levels [F, 3, H, W]."""
    return (grey.float() / 127.5 - 1).transpose(0, 1)[None]


def by_pillow(grey: torch.Tensor, size: int) -> torch.Tensor:
    """Resize and crop levels [F, 3, H, W] with Pillow and torchvision's rules: [F, 3, size, size].

    In two calls, rows first: Pillow 13 chooses the order of the passes by the sizes.
    """
    image = pytest.importorskip("PIL.Image")
    height, width = grey.shape[2:]
    short = min(height, width)
    full = (int(size * height / short), int(size * width / short))
    top, left = (round((side - size) / 2.0) for side in full)
    found = []
    for frame in grey.permute(0, 2, 3, 1).numpy():
        rows = image.fromarray(frame).resize((full[1], height), image.Resampling.BICUBIC)
        both = rows.resize((full[1], full[0]), image.Resampling.BICUBIC)
        found.append(np.array(both.crop((left, top, left + size, top + size))))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def normalised(grey: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """What torchvision's ToTensor and Normalize make of levels [..., 3, H, W]: float32."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (grey.float() / 255 - mean) / std


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_equals_pillow_bitwise(
    height: int, width: int, size: int, lane: Lane, random: torch.Generator
) -> None:
    grey = noise(height, width, random)
    out = preprocess_frames(
        as_video(grey).to(lane.device), size, implementation=lane.implementation
    )
    expected = normalised(by_pillow(grey, size), api.CLIP_MEAN, api.CLIP_STD)
    assert torch.equal(out[0].cpu(), expected)


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (720, 1280), (224, 224)])
def test_real_sizes_equal_pillow_bitwise(height: int, width: int, random: torch.Generator) -> None:
    grey = noise(height, width, random)
    out = preprocess_frames(as_video(grey), implementation="reference")
    assert torch.equal(out[0], normalised(by_pillow(grey, 224), api.CLIP_MEAN, api.CLIP_STD))


def test_a_landscape_frame_equals_one_call_of_pillow(random: torch.Generator) -> None:
    image = pytest.importorskip("PIL.Image")
    grey = noise(96, 160, random)
    small = image.fromarray(grey[0].permute(1, 2, 0).numpy()).resize((75, 45), 3)
    expected = torch.from_numpy(np.array(small.crop((15, 0, 60, 45)))).permute(2, 0, 1)
    out = preprocess_frames(as_video(grey), 45, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(out[0, 0], expected / 255)


@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
def test_to_8_bits_as_diffusers_does(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    processor = pytest.importorskip("diffusers.video_processor").VideoProcessor()
    if dtype == torch.float32:
        # beyond [-1, 1] too
        values = torch.randn(3 * 32 * 32, generator=random)
    else:
        # all the values that there are, but those too small to make a difference
        values = torch.arange(2**16).to(torch.uint16).view(dtype)
        values = values[(values.abs() > 1e-4) & (values.abs() < 1.1)]
    size = int((len(values) / 3) ** 0.5)
    video = values[: 3 * size * size].view(1, 3, 1, size, size)
    (frames,) = processor.postprocess_video(video, output_type="pil")
    expected = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames])
    out = preprocess_frames(
        video.to(lane.device),
        size,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        dtype=torch.float32,
        implementation=lane.implementation,
    )
    assert torch.equal(out[0].cpu(), expected.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
def test_every_lane_equals_the_reference_bitwise(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    video = torch.randn(2, 3, 2, 24, 31, generator=random).to(dtype)
    out = preprocess_frames(video.to(lane.device), 15, implementation=lane.implementation)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.equal(out.cpu(), preprocess_frames(video, 15, implementation="reference"))


def test_mean_std_and_dtype_are_the_callers(lane: Lane, random: torch.Generator) -> None:
    grey = noise(20, 30, random)
    mean, std = (0.5, 0.25, 0.1), (0.5, 1.5, 0.01)
    out = preprocess_frames(
        as_video(grey).to(lane.device),
        20,
        mean=mean,
        std=std,
        dtype=torch.bfloat16,
        implementation=lane.implementation,
    )
    expected = normalised(by_pillow(grey, 20), mean, std)
    assert torch.equal(out[0].cpu(), expected.bfloat16())


def test_nan_is_black_and_what_is_out_of_range_is_clamped(lane: Lane) -> None:
    values = torch.tensor([torch.nan, -torch.inf, torch.inf, -1.5, 1.5, -1, 1, 0.0])
    video = values.repeat(1, 3, 1, 8, 1).to(lane.device)
    for dtype in api.DTYPES:
        out = preprocess_frames(
            video.to(dtype),
            8,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            dtype=torch.float32,
            implementation=lane.implementation,
        )
        # 127.5 goes to the even neighbour
        expected = [0, 0, 255, 0, 255, 0, 255, 128]
        assert (out[0, 0, 1, 3] * 255).round().int().tolist() == expected


def test_what_the_crop_does_not_see_does_not_matter(lane: Lane, random: torch.Generator) -> None:
    video = torch.randn(1, 3, 1, 24, 80, generator=random).to(lane.device)
    run = {"size": 12, "implementation": lane.implementation}
    out = preprocess_frames(video, **run)
    _, horizontal = reference.axes(24, 80, 12)
    first, weights = reference.taps(horizontal)
    video[..., : int(first[0])] = 9
    video[..., int(first[-1]) + weights.shape[1] :] = -9
    assert torch.equal(out, preprocess_frames(video, **run))
    video[..., 40] = 9
    assert not torch.equal(out, preprocess_frames(video, **run))


def test_any_strides_are_read_in_place(lane: Lane, random: torch.Generator) -> None:
    video = torch.randn(2, 3, 2, 30, 41, generator=random).to(lane.device)
    run = {"size": 17, "implementation": lane.implementation}
    expected = preprocess_frames(video, **run)
    around = video.new_full((2, 2, 32, 90, 4), torch.nan)
    # [B, F, H, W, C] in memory, every second column
    strided = around.permute(0, 4, 1, 2, 3)[:, :3, :, 1:31, 3:85:2].copy_(video)
    assert torch.equal(preprocess_frames(strided, **run), expected)
    frame = video[:, :, :1].expand(-1, -1, 2, -1, -1)
    assert torch.equal(preprocess_frames(frame, **run)[:, 1], expected[:, 0])


@pytest.mark.parametrize("shape", [(0, 3, 2, 8, 9), (2, 3, 0, 8, 9)])
def test_no_frames_give_no_frames(shape: tuple[int, ...], lane: Lane) -> None:
    video = torch.empty(shape, device=lane.device)
    out = preprocess_frames(video, 4, implementation=lane.implementation)
    assert out.shape == (shape[0], shape[2], 3, 4, 4)


def test_runs_repeat_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    video = torch.randn(1, 3, 2, 40, 50, generator=random).to(lane.device)
    runs = [preprocess_frames(video, 20, implementation=lane.implementation) for _ in range(3)]
    assert all(torch.equal(runs[0], run) for run in runs)


def test_opcheck(random: torch.Generator) -> None:
    video = torch.randn(1, 3, 2, 12, 15, generator=random)
    mean, std = list(api.CLIP_MEAN), list(api.CLIP_STD)
    op = torch.ops.sdvg_kernels.preprocess_frames
    torch.library.opcheck(op, (video, 8, mean, std, torch.bfloat16, "reference"))


# --- the tables ---


def test_the_crop_is_centred_as_torchvision_does() -> None:
    # (388 - 224) / 2 = 82; 1 / 2 rounds to 0, 3 / 2 to 2
    assert [axis.start for axis in reference.axes(480, 832, 224)] == [0, 82]
    assert [axis.start for axis in reference.axes(833, 480, 224)] == [82, 0]
    assert reference.axes(10, 11, 10)[1].start == 0
    assert reference.axes(10, 13, 10)[1].start == 2


@pytest.mark.parametrize("size", [1, 7, 32, 224, 336])
def test_sums_are_exact_up_to_a_tenfold_reduction(size: int) -> None:
    kernel = pytest.importorskip("sdvg_kernels.frames.kernel")
    for size_in in {
        max(1, size * tenth // 10 + odd) for tenth in range(1, 100, 7) for odd in (0, 1)
    }:
        axis = reference.Axis(size_in, size, 0, size)
        if axis.stretch > api.MAX_REDUCTION:
            continue
        launch = config.choose(axis.stretch)
        (widest,) = (widest for _, other, widest in config.LAUNCHES if other is launch)
        tiles = kernel._cut(axis, launch.BX, config.ALIGN, launch.BK)
        assert tiles.weights.shape[-1] <= widest
        assert (tiles.span[:, 0] % config.ALIGN == 0).all()
        # the digits give the weights back
        high, low = tiles.weights.double().unbind(1)
        total = (high * 4096 + low).sum(-1).flatten()[:size]
        assert torch.equal(total, reference.taps(axis)[1].double().sum(1))


# --- error texts ---

_VIDEO = torch.zeros(1, 3, 2, 8, 9)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"video": _VIDEO[0]}, ValueError, "video must be [B, 3, F, H, W], got [3, 2, 8, 9]"),
        (
            {"video": _VIDEO.transpose(1, 2)},
            ValueError,
            "video must be [B, 3, F, H, W], got [1, 2, 3, 8, 9]",
        ),
        (
            {"video": _VIDEO[..., :0]},
            ValueError,
            "video must have at least one pixel, got [1, 3, 2, 8, 0]",
        ),
        ({"video": _VIDEO.byte()}, TypeError, "video must be floating, got torch.uint8"),
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"mean": (0.5,)}, ValueError, "mean must be three finite numbers, got (0.5,)"),
        (
            {"std": (1, 0, 1)},
            ValueError,
            "std must be three finite numbers above 0, got (1, 0, 1)",
        ),
        ({"dtype": torch.uint8}, TypeError, "dtype must be floating, got torch.uint8"),
        (
            {"implementation": "pillow"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'pillow'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        preprocess_frames(**{"video": _VIDEO, "size": 4, **change})
    assert str(caught.value) == f"preprocess_frames: {text}"


def test_an_implementation_asked_for_never_falls_back() -> None:
    video = torch.zeros(1, 3, 1, 100, 100)
    with pytest.raises(NotImplementedError, match=r"at most to one in 10|TRITON_INTERPRET"):
        preprocess_frames(video, 9, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"float64|TRITON_INTERPRET"):
        preprocess_frames(video.double(), 50, implementation="triton")
    assert preprocess_frames(video, 9).shape == (1, 1, 3, 9, 9)


def test_only_an_unasked_reference_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api, "_available", lambda *_: {"triton": "no Triton", "reference": ""})
    api._warn_once.cache_clear()
    preprocess_frames(_VIDEO, 4, implementation="reference")
    assert not caplog.messages
    for _ in range(2):
        preprocess_frames(_VIDEO, 4)
    (said,) = caplog.messages
    assert said == "preprocess_frames: the reference serves cpu tensors here: no Triton"


def test_a_capture_before_the_first_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("sdvg_kernels.frames.kernel")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    axis = reference.Axis(12345, 2345, 0, 224)
    with pytest.raises(RuntimeError) as caught:
        kernel._tables(axis, 32, 8, 32, torch.device("cuda"))
    text = "video must have run once at this size before a graph captures it, got a first call"
    assert str(caught.value) == f"preprocess_frames: {text}"


def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, sdvg_kernels as s;"
        "print(s.preprocess_frames(torch.zeros(1, 3, 1, 8, 9), 4).shape, s.implementations())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 1, 3, 4, 4]" in done.stdout


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("height", "width"), [(480, 832), (832, 480), (720, 1280), (1080, 1920), (2160, 3840), (99, 77)]
)
def test_real_sizes_are_exact_on_the_gpu(
    height: int, width: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    # all float32 values are met on the way, halves of a grey level too
    video = torch.randn(1, 3, 3, height, width, generator=random).to(dtype)
    out = preprocess_frames(video.cuda(), implementation="triton")
    assert torch.equal(out.cpu(), preprocess_frames(video, implementation="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["batch", "row"])
def test_offsets_past_2_to_the_31_are_read_right(far: str, random: torch.Generator) -> None:
    video = torch.randn(2, 3, 1, 40, 50, generator=random).to("cuda", torch.bfloat16)
    batch, row = (2**31, 50) if far == "batch" else (50, 2**26)
    stride = (batch, 40 * row if far == "batch" else 100, 0, row, 1)
    memory = torch.empty(batch + 40 * row + 3 * stride[1], dtype=torch.bfloat16, device="cuda")
    strided = memory.as_strided(video.shape, stride).copy_(video)
    out = preprocess_frames(strided, 20, implementation="triton")
    assert torch.equal(out, preprocess_frames(video, 20, implementation="triton"))


@pytest.mark.gpu
def test_a_graph_replays_on_new_frames(random: torch.Generator) -> None:
    fixed = torch.zeros(1, 3, 2, 48, 83, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        preprocess_frames(fixed, 24, implementation="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = preprocess_frames(fixed, 24, implementation="triton")
    for _ in range(2):
        video = torch.randn(fixed.shape, generator=random)
        fixed.copy_(video)
        graph.replay()
        assert torch.equal(out.cpu(), preprocess_frames(video, 24, implementation="reference"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_is_read_back_from_the_gpu(implementation: str) -> None:
    video = torch.zeros(1, 3, 2, 48, 83, device="cuda")
    preprocess_frames(video, 24, implementation=implementation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        preprocess_frames(video, 24, implementation=implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
