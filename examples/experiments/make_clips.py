"""Clips of moving shapes, in a folder a class: a stand-in for Kinetics, to try pretraining on video.

python examples/experiments/make_clips.py FOLDER [--clips 200] [--seed 0]

A clip is 4 seconds of 96×96 pixels at 15 frames a second, of one bright shape that moves in its class's way: it slides,
circles, bounces, or grows and shrinks. Everything else of it (shape, size, place, speed, grey) is drawn. `brainfm
pretrain manifest=FOLDER` reads them, and each clip's folder is its label. Needs PyAV.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from brainfm.files import atomic_path, progress_bar

CLASSES = ("slides", "circles", "bounces", "grows")
SIZE, FRAMES, RATE = 96, 60, 15


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=200, help="of all classes together (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for number in progress_bar(range(options.clips), total=options.clips, unit="clip", doing="clips", shown=True):
        name = CLASSES[number % len(CLASSES)]
        path = options.folder / name / f"clip{number:05d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_clip(path, frames_of(name, np.random.default_rng([options.seed, number])))
    print(f"{options.folder}: {options.clips} clips of moving shapes, {len(CLASSES)} classes")


def frames_of(name, draw):
    """[frames, height, width] uint8."""
    across, down = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    size, grey, ground = draw.uniform(8, 18), draw.uniform(150, 255), draw.uniform(10, 90)
    angle, speed, start = draw.uniform(0, 2 * np.pi), draw.uniform(0.8, 2.5), draw.uniform(20, SIZE - 20, 2)
    is_round, noise = draw.random() < 0.5, draw.uniform(2, 8)
    frames = []
    for time in range(FRAMES):
        radius, place = size, start
        if name == "slides":
            place = (start + speed * time * np.array([np.cos(angle), np.sin(angle)])) % SIZE
        elif name == "circles":
            turned = angle + speed * time / 8
            place = SIZE / 2 + 22 * np.array([np.cos(turned), np.sin(turned)])
        elif name == "bounces":
            height = abs(np.sin(angle + speed * time / 10))
            place = np.array([start[0], SIZE - 15 - 60 * height])
        else:
            radius = size * (1 + 0.6 * np.sin(angle + speed * time / 8))
        x, y = np.abs(across - place[0]), np.abs(down - place[1])
        inside = np.hypot(x, y) < radius if is_round else np.maximum(x, y) < radius
        frames.append(np.where(inside, grey, ground) + draw.normal(0, noise, (SIZE, SIZE)))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def write_clip(path, frames):
    """A clip of grey frames, whole or not at all."""
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(RATE))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")))
        file.mux(stream.encode(None))


if __name__ == "__main__":
    main()
