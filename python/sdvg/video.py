"""What a generated video is written to: an mp4 that plays while it grows, and a contact sheet.

Frames are `[N, 3, H, W]` in [0, 1] everywhere.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# libx264 stands in every PyAV wheel; a build of FFmpeg without it still has the other
_CODECS = ("libx264", "mpeg4")
_TEXT_WIDTH, _GAP, _STRIP, _THUMB = 330, 10, 1200, 96
_KEPT, _REDONE, _PAPER, _INK, _PALE = "#2e9e44", "#d33a2c", "#ffffff", "#1c1c1c", "#6a6a6a"


class Aside:
    """Output files named `name.partial` until `keep` renames them; the others are removed."""

    def __init__(self) -> None:
        self._files: list[tuple[Path, Path]] = []

    def create(self, path: Path) -> Path:
        """Create `path`'s partial file and return it; ValueError where it cannot be written."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            partial.touch()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ValueError(f"output: {path} cannot be written: {reason}") from error
        self._files.append((partial, path))
        return partial

    def keep(self) -> None:
        """Rename every partial file to its own name."""
        while self._files:
            partial, path = self._files[0]
            os.replace(partial, path)
            del self._files[0]

    def __enter__(self) -> Aside:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for partial, _ in self._files:
            partial.unlink(missing_ok=True)


def pixels(frames: Tensor) -> np.ndarray:
    """Return `frames` as uint8 `[N, H, W, 3]`; raises ValueError where they are not finite."""
    if not torch.isfinite(frames).all():
        raise ValueError("video: frames must be finite, got NaN or infinity from the decoder")
    whole = (frames.detach().float() * 255).round().clamp(0, 255)
    return whole.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


class VideoWriter:
    """A fragmented mp4 (H.264, one fragment a frame): it can be played before `close`.

    Args:
        path: the file, overwritten.
        fps: frames a second.
        min_side: smaller frames are enlarged by the least whole factor that makes both sides this
            long (nearest neighbour: a pixel stays a square).

    Raises:
        ImportError: PyAV is missing.
        ValueError: fps below 1, frames of another size than the first, or not finite.
    """

    def __init__(self, path: Path, *, fps: int = 16, min_side: int = 256) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError("video: writing mp4 needs PyAV: pip install 'sdvg[video]'") from error
        if fps < 1:
            raise ValueError(f"video: fps must be at least 1, got {fps}")
        self._av, self._fps, self._min_side = av, fps, min_side
        # a fragment is closed by the frame after it: only the newest frame is not playable yet
        flags = "frag_keyframe+frag_every_frame+empty_moov+default_base_moof"
        self._container = av.open(
            str(path), "w", format="mp4", options={"movflags": flags, "flush_packets": "1"}
        )
        self._stream: av.VideoStream | None = None
        self.frames = 0

    def write(self, frames: Tensor) -> None:
        """Append `frames`; the first of them can be sought to."""
        images = pixels(frames)
        _, height, width, _ = images.shape
        if self._stream is None:
            self._open(height, width)
        if (height, width) != self._size:
            raise ValueError(f"video: frames must all be {self._size}, got {(height, width)}")
        for image in images:
            large = image.repeat(self._factor, 0).repeat(self._factor, 1)
            # 4:2:0 chroma wants even sides
            even = np.pad(large, ((0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)), "edge")
            frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
            frame.pts = self.frames
            if image is images[0]:
                frame.pict_type = self._av.video.frame.PictureType.I
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def _open(self, height: int, width: int) -> None:
        codec = next(name for name in _CODECS if name in self._av.codecs_available)
        # zerolatency: a frame leaves the encoder when it enters
        options = {"tune": "zerolatency", "crf": "16"} if codec == "libx264" else {"q": "3"}
        stream = self._container.add_stream(codec, rate=self._fps, options=options)
        self._size, self._factor = (height, width), max(1, -(-self._min_side // min(height, width)))
        large_height, large_width = height * self._factor, width * self._factor
        stream.height, stream.width = large_height + large_height % 2, large_width + large_width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 10 * self._fps
        self._stream = stream


class ContactSheet:
    """A picture with one row a block: its frames in green (draft kept) or red, and text."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rows: list[tuple[list[np.ndarray], bool, tuple[str, ...]]] = []

    def add(self, frames: Tensor, kept: bool, lines: Sequence[str]) -> None:
        """Append a block: at most 12 of its `frames`, evenly spaced, and five lines of text."""
        _, _, height, width = frames.shape
        columns = min(len(frames), 12, max(3, int(_STRIP * height / (_THUMB * width))))
        chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        self._rows.append((list(pixels(frames[chosen])), kept, tuple(lines)))

    def save(self, path: Path, footer: str = "") -> None:
        """Draw the sheet as a PNG. Raises ImportError where Pillow is missing."""
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError(
                "video: the contact sheet needs Pillow: pip install pillow"
            ) from error
        title, body, small = (ImageFont.load_default(size) for size in (20, 14, 13))
        strips = [
            [_thumb(Image.fromarray(image)) for image in images] for images, _, _ in self._rows
        ]
        cell_width, cell_height = max(strip[0].size for strip in strips)
        strip_width = max(len(strip) for strip in strips) * (cell_width + 2) + 10
        row_height = max(cell_height + 12, 5 * 18 + 4) + _GAP
        width = 2 * _GAP + strip_width + _GAP + _TEXT_WIDTH
        sheet = Image.new("RGB", (width, 76 + len(strips) * row_height), _PAPER)
        draw = ImageDraw.Draw(sheet)
        line = _fitted(self._title, width - 2 * _GAP, title.getlength)
        draw.text((_GAP, _GAP), line, fill=_INK, font=title)
        draw.text((_GAP, 38), footer, fill=_PALE, font=small)
        legend = (("draft kept", _KEPT), ("made by the target", _REDONE))
        for place, (words, colour) in enumerate(legend):
            left = _GAP + strip_width + _GAP + place * 110
            draw.rectangle((left, 41, left + 11, 52), outline=colour, width=3)
            draw.text((left + 17, 38), words, fill=_PALE, font=small)
        for row, (strip, (_, kept, lines)) in enumerate(zip(strips, self._rows, strict=True)):
            colour = _KEPT if kept else _REDONE
            top = 64 + row * row_height
            right = _GAP + len(strip) * (cell_width + 2) + 9
            box = (_GAP, top, right, top + cell_height + 11)
            draw.rectangle(box, fill=_PAPER, outline=colour, width=4)
            for column, thumb in enumerate(strip):
                sheet.paste(thumb, (_GAP + 6 + column * (cell_width + 2), top + 6))
            left = 2 * _GAP + strip_width
            draw.text((left, top), lines[0] if lines else "", fill=colour, font=body)
            for place, line in enumerate(lines[1:5], 1):
                draw.text((left, top + 18 * place), line, fill=_INK, font=small)
        sheet.save(path, format="PNG")


def save_strip(path: Path, frames: Tensor) -> None:
    """Write `frames` side by side as a PNG, tiny ones enlarged. ImportError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("video: the picture needs Pillow: pip install pillow") from error
    thumbs = [_thumb(Image.fromarray(image)) for image in pixels(frames)]
    width, height = thumbs[0].size
    strip = Image.new("RGB", (len(thumbs) * (width + 2) - 2, height), _PAPER)
    for place, thumb in enumerate(thumbs):
        strip.paste(thumb, (place * (width + 2), 0))
    strip.save(path, format="PNG")


def _fitted(text: str, room: float, length: Callable[[str], float]) -> str:
    """Return `text` in one line, cut with an ellipsis where its `length` exceeds `room`."""
    line = " ".join(text.split())
    if length(line) <= room:
        return line
    # the longest beginning that leaves room for the ellipsis
    cut = bisect_right(range(len(line)), room, key=lambda end: length(f"{line[:end]}…"))
    return f"{line[: max(0, cut - 1)].rstrip()}…"


def _thumb(picture: Picture) -> Picture:
    """Scale to a row's height; a tiny picture by a whole factor: its pixels stay squares."""
    from PIL.Image import Resampling

    width, height = picture.size
    if height <= _THUMB:
        factor = _THUMB // height
        return picture.resize((width * factor, height * factor), Resampling.NEAREST)
    size = (max(1, round(width * _THUMB / height)), _THUMB)
    return picture.resize(size, Resampling.LANCZOS)
