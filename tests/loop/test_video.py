"""The mp4 writer, the contact sheet and the files written aside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvg.video import Aside, ContactSheet, VideoWriter, _fitted, pixels

av = pytest.importorskip("av", reason="the mp4 writer is PyAV's")
image = pytest.importorskip("PIL.Image", reason="the contact sheet is Pillow's")


def read(path: Path) -> np.ndarray:
    """Return the frames of a video as uint8 `[N, H, W, 3]`."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def smooth(count: int, height: int, width: int) -> Tensor:
    """Return random frames in which each is one grey: what H.264 keeps almost exactly."""
    return torch.rand(count, 1, 1, 1).expand(count, 3, height, width)


def test_file_grows_playable_block_by_block(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4.partial"
    writer, written = VideoWriter(path), 0
    for count in (9, 12, 12):
        writer.write(torch.rand(count, 3, 32, 32))
        written += count
        # the newest frame's fragment is still open
        assert len(read(path)) >= written - 1
    writer.close()
    assert len(read(path)) == written == writer.frames


def test_frames_come_back_at_their_place_and_grey(tmp_path: Path) -> None:
    frames = smooth(21, 32, 32)
    writer = VideoWriter(tmp_path / "a.mp4", fps=16)
    writer.write(frames[:9])
    writer.write(frames[9:])
    writer.close()
    got = read(tmp_path / "a.mp4").mean(axis=(1, 2, 3))
    assert np.abs(got - frames.mean(dim=(1, 2, 3)).numpy() * 255).max() < 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 16


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(32, 32, (256, 256)), (33, 47, (264, 376)), (255, 301, (510, 602)), (257, 301, (258, 302))],
)
def test_small_frames_are_enlarged_and_sides_are_even(
    tmp_path: Path, height: int, width: int, shown: tuple[int, int]
) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(torch.rand(2, 3, height, width))
    writer.close()
    assert read(tmp_path / "a.mp4").shape[1:3] == shown


def test_pixels_round_and_clamp() -> None:
    frames = torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5]).view(1, 1, 1, 5).expand(1, 3, 2, 5)
    assert pixels(frames)[0, 0, :, 0].tolist() == [0, 0, 64, 255, 255]


def test_frames_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    frames = torch.rand(3, 3, 32, 32)
    frames[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="video: frames must be finite, got NaN or infinity"):
        writer.write(frames)
    writer.close()


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(torch.rand(3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"video: frames must all be \(32, 32\), got \(32, 40\)"):
        writer.write(torch.rand(3, 3, 32, 40))
    writer.close()


def test_sheet_has_a_row_a_block_with_its_colour_and_its_frames(tmp_path: Path) -> None:
    sheet = ContactSheet("a seven moving left")
    greys = torch.tensor([0.2, 0.5, 0.8])
    for kept, grey in zip((False, True, False), greys, strict=True):
        sheet.add(torch.full((12, 3, 32, 32), float(grey)), kept, ("block", "score", "time"))
    sheet.save(tmp_path / "a.png", footer="three blocks")
    with image.open(tmp_path / "a.png") as opened:
        got = np.array(opened.convert("RGB")).astype(int)
    # down a line through the middle of the first frame of each row
    line = [tuple(pixel) for pixel in got[:, 40]]
    rows = [
        [y for y, pixel in enumerate(line) if pixel == (round(g * 255),) * 3]
        for g in greys.tolist()
    ]
    assert all(len(row) == 96 for row in rows)
    assert rows[0][0] < rows[1][0] < rows[2][0]
    border = [got[row[0], 11] for row in rows]
    assert [colour[1] > colour[0] for colour in border] == [False, True, False]


def test_sheet_of_wide_frames_stays_readable(tmp_path: Path) -> None:
    sheet = ContactSheet("wide")
    sheet.add(torch.rand(12, 3, 120, 208), True, ("block 0",))
    sheet.save(tmp_path / "a.png")
    with image.open(tmp_path / "a.png") as opened:
        assert opened.width < 1600


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a seven\n  moving left\n", "a seven moving left"),
        ("a seven moving left!", "a seven moving left!"),
        ("a seven moving left, slowly", "a seven moving left…"),
        ("a seven moving x slowly", "a seven moving x sl…"),
        ("a seven moving left slowly", "a seven moving left…"),
        ("", ""),
    ],
)
def test_a_title_is_one_line_cut_to_its_room(text: str, shown: str) -> None:
    assert _fitted(text, 20, len) == shown


def test_a_title_is_drawn_in_one_line_within_the_sheet(tmp_path: Path) -> None:
    sheets = []
    for title in ("a seven moving", "a seven\nmoving", "a seven moving " * 50):
        sheet = ContactSheet(title)
        sheet.add(torch.full((12, 3, 32, 32), 0.5), True, ("block 0",))
        sheet.save(tmp_path / "a.png")
        with image.open(tmp_path / "a.png") as opened:
            sheets.append(np.array(opened.convert("RGB")))
    one, folded, cut = sheets
    assert np.array_equal(one, folded)
    assert cut.shape == one.shape
    # the margin at the right stays free
    assert (cut[:, -10:] == 255).all()


def test_what_is_not_kept_leaves_no_file(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with Aside() as aside:
            aside.create(tmp_path / "a.mp4").write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_replaces_the_old_file_whole(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    with Aside() as aside:
        aside.create(tmp_path / "a.mp4").write_bytes(b"new")
        assert (tmp_path / "a.mp4").read_bytes() == b"old"
        aside.keep()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"new"


def test_path_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with Aside() as aside:
        for path in (tmp_path / "folder.mp4", tmp_path / "file" / "a.mp4"):
            with pytest.raises(ValueError, match=r"^output: .* cannot be written: "):
                aside.create(path)
