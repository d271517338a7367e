"""Video clips as volumes to pretrain on: a clip's frames are the planes of the first axis. Read by PyAV (`[video]`).

The rule is fixed, so that a clip is one volume, as a scan is; views are drawn from it as from a scan:

- in time, T frames at 15 a second, as torchvision's video Swin was trained on Kinetics (32 of them), from the middle of
  the clip; each is the frame that is on the screen at that moment, whatever the clip's own rate, or rates. A clip that
  is shorter than T / 15 seconds is slowed down to fill them;
- in space, each frame resized (by area) until it just covers height × width, and cropped about its centre;
- in intensity, 0 to 255: grey (luma), or red, green and blue where those are the contract's channels. All of it counts
  as inside the mask.

T, height and width are those of the model's input contract. What is decoded is the part of the clip that is shown,
frame by frame, and what is kept of it are the T frames, resized.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainfm.contract import InputSpec, Triple
from brainfm.errors import MissingExtraError, ScanError
from brainfm.files import one_line
from brainfm.manifest import Listing, ScanRecord
from brainfm.paths import walk_folder
from brainfm.sources import CLIPS, is_clip
from brainfm.tabular import read_rows

FRAMES_PER_SECOND = 15
LEAST_LENGTH = Fraction(9, 10)  # of what a clip's header states; what ends before is truncated
RGB = (("red", "green", "blue"), ("r", "g", "b"))  # names of a contract's channels that a clip's colours fill

_KINETICS = re.compile(r"(?P<id>.{11})_(?P<start>\d{6})_(?P<end>\d{6})")  # of a clip's file: <id>_<start:06d>_<end:06d>
_COLUMNS = ("youtube_id", "time_start", "time_end")  # of Kinetics' lists


# --- Lists of clips -------------------------------------------------------------------------------


def list_clips(folder: Path) -> Listing:
    """Every clip in a folder and below it; each is a patient of its own, and those of one Kinetics video are one.

    A clip in a folder of its own class, as Kinetics' archives have them, has that folder's name as `label`.

    Raises:
        ScanError: There is none.
    """
    files, _, closed = walk_folder(folder)
    clips = [path for path in files if is_clip(path)]
    if not clips:
        raise ScanError(f"{folder}: no clips in this folder ({', '.join(CLIPS)}); of scans, give their manifest")
    return Listing(
        (_record(path, {} if path.parent == folder else {"label": path.parent.name}) for path in clips), closed
    )


def is_kinetics(path: Path) -> bool:
    """Whether a file is one of Kinetics' lists, by its header."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return set(_COLUMNS) <= {name.strip("\"' ") for name in file.readline(1000).strip().split(",")}


def read_kinetics(path: Path) -> Listing:
    """The clips of one of Kinetics' lists: a CSV of label, youtube_id, time_start, time_end and split.

    Each is looked for as `<youtube_id>_<time_start:06d>_<time_end:06d>` with the end of a clip, beside the list and in
    all folders below; those that are not there, as videos that were taken off the net, are in `left_out`.

    Raises:
        ScanError: A time is no number of seconds, or not one of the clips is there.
    """
    there = {clip.stem: clip for clip in walk_folder(path.parent)[0] if is_clip(clip)}
    found, missing = [], {}
    for row in read_rows(path).to_dict("records"):
        try:
            times = [int(float(row[name])) for name in _COLUMNS[1:]]
        except ValueError:
            raise ScanError(f"{path}: the time of {row['youtube_id']} is no number of seconds") from None
        name = f"{row['youtube_id']}_{times[0]:06d}_{times[1]:06d}"
        if name in there:
            labels = {key: row[key] for key in ("label", "split") if row.get(key)}
            found.append(_record(there[name], labels))
        else:
            missing[str(path.parent / name)] = "no such clip"
    if not found:
        first = next(iter(missing), "")
        raise ScanError(
            f"{path}: none of its {len(missing)} clips is there, such as {first}.mp4; put the list above them"
        )
    return Listing(found, missing)


def _record(path: Path, labels: dict[str, str]) -> ScanRecord:
    named = _KINETICS.fullmatch(path.stem)
    ids = (named["id"], f"{named['start']}_{named['end']}") if named else ("", "")
    return ScanRecord(path, None, *ids, {"source": "video", **labels})


# --- Reading --------------------------------------------------------------------------------------


def check_readers(records: Iterable[ScanRecord]) -> None:
    """Raise MissingExtraError where a record is a clip and PyAV is not installed: that is no fault of each clip."""
    if any(is_clip(record.image) for record in records):
        _av()


def read_volume(path: str | os.PathLike[str], spec: InputSpec) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A clip as a contract's volume [C, T, y, x], from 0 to 255, and a mask [T, y, x] that is True all over.

    Raises:
        ScanError: There is no such clip, it has no video, is truncated or damaged, or the contract takes other channels
            than one or red, green and blue.
        MissingExtraError: PyAV is not installed.
    """
    channels = tuple(channel.casefold() for channel in spec.channels)
    if len(channels) > 1 and channels not in RGB:
        raise ScanError(
            f"{path}: a clip is grey, or red, green and blue; this contract takes {', '.join(spec.channels)}"
        )
    assert spec.output_shape is not None
    shape = spec.output_shape[1:]
    return read_clip(path, shape, rgb=len(channels) > 1).astype(np.float32), np.ones(shape, np.bool_)


def read_clip(path: str | os.PathLike[str], shape: Triple, *, rgb: bool = False) -> NDArray[np.uint8]:
    """The frames of a clip by this module's rule, [1 or 3, T, height, width]. Raises ScanError as `read_volume`."""
    av = _av()
    if not Path(path).is_file():
        raise ScanError(f"{path}: no such file; check the path")
    try:
        first, last = _shown(av, path)
        return _decoded(av, path, _moments(first, last, shape[0]), shape, rgb)
    except (av.FFmpegError, EOFError) as error:
        raise ScanError(f"{path}: not a readable clip, or a truncated one ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return one_line(Exception(getattr(error, "strerror", None) or error))  # without ffmpeg's number and the path


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "video") from error
    av.logging.set_level(None)  # ffmpeg's own lines of each damaged packet; what is wrong is raised
    return av


def _opened(av: Any, path: str | os.PathLike[str]) -> Any:
    """A clip whose title may be in any encoding: PyAV takes each from 19 on, and has no argument for it any more."""
    return av.open(str(path), **({"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}))


def _stream(container: Any, path: str | os.PathLike[str]) -> Any:
    """The first video of a file, and not the cover of a piece of music. Decoded by one thread: the loader has many."""
    streams = [one for one in container.streams.video if not _is_cover(one)]
    if not streams:
        raise ScanError(f"{path}: no video in this file")
    streams[0].thread_count = 1
    return streams[0]


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _shown(av: Any, path: str | os.PathLike[str]) -> tuple[Fraction, Fraction]:
    """When the first frame appears and the last one ends, in seconds; read of the packets, none is decoded."""
    with _opened(av, path) as container:
        stream = _stream(container, path)
        stamps, end = set(), Fraction(0)
        for packet in container.demux():
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and stamp is not None and packet.time_base:
                end = max(end, stamp * packet.time_base)
                if packet.stream is stream:
                    stamps.add(stamp)
        if not stamps:
            raise ScanError(f"{path}: no frame in this clip; it may be truncated")
        times = [stamp * stream.time_base for stamp in sorted(stamps)]
        rate = stream.average_rate or stream.guessed_rate
        frame = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / Fraction(rate or FRAMES_PER_SECOND)
        first, last = times[0], times[-1] + frame
        stated, there = _stated_length(stream), last - first
        if stated is None:  # the file's own, which its sound may be longer than its video by
            stated, there = Fraction(container.duration or 0, av.time_base), max(end, last)
    if there < LEAST_LENGTH * stated:
        raise ScanError(
            f"{path}: truncated: its header states {float(stated):.1f} seconds, and there are {float(there):.1f}"
        )
    return first, last


def _stated_length(stream: Any) -> Fraction | None:
    """Seconds of a video by its header, as Matroska has them in a tag; None where it does not say."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 3600 * int(tag[1]) + 60 * int(tag[2]) + Fraction(tag[3]) if tag else None


def _moments(first: Fraction, last: Fraction, frames: int) -> list[Fraction]:
    """The moments whose frames are taken; exact fractions, for at many rates they fall where one frame ends."""
    window = min(Fraction(frames, FRAMES_PER_SECOND), last - first)
    begin = first + (last - first - window) / 2
    return [begin + n * window / frames for n in range(frames)]


def _decoded(
    av: Any, path: str | os.PathLike[str], moments: list[Fraction], shape: Triple, rgb: bool
) -> NDArray[np.uint8]:
    volume = np.empty((3 if rgb else 1, *shape), np.uint8)
    taken = 0
    with _opened(av, path) as container:
        stream = _stream(container, path)
        container.seek(int(moments[0] / stream.time_base), stream=stream)  # to the key frame before
        before: Any = None
        for frame, time in _frames(container, stream):
            if frame.is_corrupt:
                raise ScanError(f"{path}: damaged: a frame at {float(time):.1f} seconds cannot be decoded")
            end = taken
            while end < len(moments) and moments[end] < time:
                end += 1
            if end > taken:
                volume[:, taken:end] = _covering(frame if before is None else before, shape[1:], rgb)[:, None]
                taken = end
            if taken == len(moments):
                return volume
            before = frame
        if before is None:
            raise ScanError(f"{path}: no frame can be decoded; the clip may be truncated")
        volume[:, taken:] = _covering(before, shape[1:], rgb)[:, None]
    return volume


def _frames(container: Any, stream: Any) -> Iterator[tuple[Any, Fraction]]:
    """The frames in their order, and when each appears."""
    last = None
    for frame in container.decode(stream):
        stamp = frame.pts if frame.pts is not None else frame.dts
        if stamp is None or (last is not None and stamp <= last):
            continue
        last = stamp
        yield frame, stamp * stream.time_base


def _covering(frame: Any, size: tuple[int, int], rgb: bool) -> NDArray[np.uint8]:
    """[1 or 3, height, width]: resized to cover the size, and cropped about the centre."""
    factor = max(Fraction(size[0], frame.height), Fraction(size[1], frame.width))
    height, width = max(size[0], round(frame.height * factor)), max(size[1], round(frame.width * factor))
    resized = frame.to_ndarray(width=width, height=height, format="rgb24" if rgb else "gray", interpolation="AREA")
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    cropped: NDArray[np.uint8] = resized[top : top + size[0], left : left + size[1]]
    return np.moveaxis(cropped, 2, 0) if rgb else cropped[None]
