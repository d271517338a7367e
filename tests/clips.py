"""Video clips made for tests, by PyAV: frames that brighten, so that a frame's grey says when it was shown."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

NTSC = Fraction(24000, 1001)  # 23.976 frames a second


def make_clip(
    path: Path, frames=48, rate=Fraction(30), size=(64, 48), codec="libx264", colour=(1, 1, 1), noise=0, sound=0, title=""
) -> Path:
    """A clip of `size` (width, height) whose frame k is 255 · k / frames bright, in the proportions of `colour`.

    With `sound`, so many seconds of a tone go with it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(noise)
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as file:
        file.metadata["title"] = title
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        tone = _tone_stream(file) if sound else None
        for number in range(frames):
            frame = np.full((*size[::-1], 3), 255 * number / frames) * np.array(colour)
            frame += draw.normal(0, 20, frame.shape) if noise else 0
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
        if tone is not None:
            _play(file, tone, sound)
    return path


def make_sound(path: Path) -> Path:
    """A second of a tone, and no video."""
    with av.open(str(path), "w") as file:
        _play(file, _tone_stream(file), 1)
    return path


def _tone_stream(file):
    stream = file.add_stream("aac", rate=16000)
    stream.layout = "mono"
    return stream


def _play(file, stream, seconds):
    for number in range(16 * seconds):
        tone = np.sin(np.arange(1024) / 5).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 1024 * number
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def truncate(path: Path, clip: Path) -> Path:
    """The first half of a clip's bytes."""
    content = clip.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path
