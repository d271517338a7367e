"""Clips as volumes: which frames, which part of them, and what is refused. All clips are made here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from clips import NTSC, make_clip, make_sound, truncate

from brainfm import MissingExtraError, ScanError
from brainfm.train.sources import read_source
from brainfm.train.video import read_clip, read_volume


def greys(volume):
    return volume[0, :, 5, 5].astype(int)


@pytest.mark.parametrize(
    ("name", "frames", "rate", "codec"),
    [
        ("a.mp4", 72, NTSC, "libx264"),
        ("b.webm", 28, Fraction(7), "libvpx"),
        ("c.avi", 90, Fraction(30), "mpeg4"),
        ("d.mp4", 180, Fraction(60), "libx264"),
    ],
)
def test_frames_are_those_on_the_screen_at_15_a_second_about_the_middle(tmp_path, name, frames, rate, codec):
    volume = read_clip(make_clip(tmp_path / name, frames, rate, codec=codec), (15, 24, 24))
    assert volume.shape == (1, 15, 24, 24)
    begin = (frames / rate - 1) / 2
    shown = [int((begin + Fraction(k, 15)) * rate) for k in range(15)]
    assert np.abs(greys(volume) - [255 * number / frames for number in shown]).max() <= 6  # of lossy coding


def test_short_clip_is_slowed_down_to_fill_the_volume(tmp_path):
    clip = make_clip(tmp_path / "a.mp4", 10, Fraction(30), codec="mpeg4")
    found = greys(read_clip(clip, (20, 16, 16)))
    assert np.abs(found - [255 * (k // 2) / 10 for k in range(20)]).max() <= 6


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_changes_nothing_even_where_it_is_longer(tmp_path, name):
    silent = make_clip(tmp_path / "silent.mp4", 45, Fraction(30), codec="mpeg4")
    loud = make_clip(tmp_path / name, 45, Fraction(30), codec="mpeg4", sound=4)
    assert np.array_equal(read_clip(loud, (15, 24, 24)), read_clip(silent, (15, 24, 24)))


def test_title_in_any_encoding_changes_nothing(tmp_path):
    clip = make_clip(tmp_path / "a.avi", 30, Fraction(30), codec="mpeg4", title="TITLE")
    plain, content = read_clip(clip, (15, 24, 24)), clip.read_bytes()
    assert b"TITLE" in content
    clip.write_bytes(content.replace(b"TITLE", "TITRÉ".encode("latin-1")))
    assert np.array_equal(read_clip(clip, (15, 24, 24)), plain)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (30, 22), (200, 50)])
def test_frames_of_any_size_cover_the_volume_and_are_cropped_about_the_centre(tmp_path, size):
    clip = make_clip(tmp_path / "a.mp4", 12, Fraction(15), size, "mpeg4", noise=1)
    volume = read_clip(clip, (4, 24, 20))
    assert volume.shape == (1, 4, 24, 20)
    assert volume.std(axis=(2, 3)).min() > 1  # nothing padded, nothing blank


def test_colours_are_the_channels_of_a_contract_that_names_them(tmp_path, small_spec):
    clip = make_clip(tmp_path / "a.mp4", 30, Fraction(15), codec="mpeg4", colour=(1, 0.5, 0.25))
    grey, mask = read_volume(clip, small_spec)
    assert (grey.shape, mask.shape, mask.all(), grey.dtype) == ((1, 40, 48, 48), (40, 48, 48), True, np.float32)
    coloured = replace(small_spec, channels=("red", "green", "blue"), output_shape=(3, 40, 48, 48))
    red, green, blue = read_volume(clip, coloured)[0].mean(axis=(1, 2, 3))
    assert abs(green / red - 0.5) < 0.05
    assert abs(blue / red - 0.25) < 0.05
    with pytest.raises(ScanError, match="a clip is grey, or red, green and blue; this contract takes T1w, FLAIR"):
        read_volume(clip, replace(small_spec, channels=("T1w", "FLAIR"), output_shape=(2, 40, 48, 48)))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")])
def test_truncated_clip_is_refused(tmp_path, name, codec):
    whole = make_clip(tmp_path / name, 60, Fraction(30), codec=codec, noise=3)
    half = truncate(tmp_path / f"half_{name}", whole)
    with pytest.raises(ScanError, match=f"half_{name}: .*truncated"):
        read_clip(half, (15, 24, 24))


def test_what_is_no_video_is_refused_and_ffmpeg_says_nothing_itself(tmp_path):
    make_sound(tmp_path / "sound.mp4")
    (tmp_path / "text.mp4").write_text("not a clip")
    (tmp_path / "empty.webm").touch()
    truncate(tmp_path / "half.avi", make_clip(tmp_path / "whole.avi", codec="mpeg4", noise=3))
    script = "import sys\nfrom brainfm.train.video import read_clip\nfor name in sys.argv[1:]:\n  try: read_clip(name, "
    script += "(8, 16, 16))\n  except Exception as error: print(type(error).__name__, error)\n"
    names = [str(tmp_path / name) for name in ("sound.mp4", "text.mp4", "empty.webm", "half.avi", "none.mp4")]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert done.stderr == ""
    assert [line.split(":")[0] for line in said] == [f"ScanError {name}" for name in names]
    assert "no video in this file" in said[0]
    assert "Errno" not in done.stdout
    assert "no such file" in said[4]


def test_without_the_reader_the_extra_is_named(tmp_path, monkeypatch):
    make_clip(tmp_path / "a.mp4", 5, codec="mpeg4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match="av is not installed; run: pip install"):
        read_source(tmp_path)


# --- Lists ----------------------------------------------------------------------------------------


def test_folder_of_clips_is_a_list_with_its_classes(tmp_path):
    for name in ("run/abcdefghij1_000000_000010.mp4", "run/abcdefghij1_000020_000030.mp4", "sit/b.webm", "c.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").touch()
    records, root = read_source(tmp_path)
    assert root == tmp_path
    assert [(r.patient_id, r.scan_id, r.extra.get("label")) for r in records] == [
        ("", "", None),
        ("abcdefghij1", "000000_000010", "run"),
        ("abcdefghij1", "000020_000030", "run"),
        ("", "", "sit"),
    ]
    assert {record.extra["source"] for record in records} == {"video"}
    (tmp_path / "none").mkdir()
    with pytest.raises(ScanError, match=r"no clips in this folder \(.mp4"):
        read_source(tmp_path / "none")


def test_list_of_kinetics_finds_its_clips_and_counts_those_that_are_gone(tmp_path, caplog):
    (tmp_path / "train" / "run").mkdir(parents=True)
    (tmp_path / "train" / "run" / "abcdefghij1_000004_000014.mp4").touch()
    (tmp_path / "train" / "-bcdefghij2_000130_000140.webm").touch()
    lines = [
        "label,youtube_id,time_start,time_end,split",
        "run,abcdefghij1,4,14,train",
        "sit,-bcdefghij2,130,140,train",
    ]
    table = tmp_path / "train.csv"
    table.write_text("\n".join([*lines, "run,gone_fghij3,1,11,train", ""]))
    records, root = read_source(table)
    assert root == tmp_path
    assert [(r.patient_id, r.extra) for r in records] == [
        ("abcdefghij1", {"source": "video", "label": "run", "split": "train"}),
        ("-bcdefghij2", {"source": "video", "label": "sit", "split": "train"}),
    ]
    assert f"{table}: 1 left out, such as {tmp_path / 'gone_fghij3_000001_000011'} (no such clip)" in caplog.text
    table.write_text("\n".join([lines[0], "run,gone_fghij3,1,11,train", ""]))
    with pytest.raises(ScanError, match="none of its 1 clips is there"):
        read_source(table)
    table.write_text("\n".join([*lines[:2], "run,abcdefghij4,one,11,train", ""]))
    with pytest.raises(ScanError, match="the time of abcdefghij4 is no number of seconds"):
        read_source(table)
