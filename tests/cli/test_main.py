"""All commands: help, version, and that an error is one clear line and exit code 1."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import click
import pytest

import brainfm
from brainfm.cli import main


def in_a_process(*arguments):
    """Runs `brainfm …` in a process of its own."""
    command = [sys.executable, "-m", "brainfm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def test_debug_shows_the_traceback_and_nothing_else_does():
    plain, debug = (in_a_process(*flags, "info", "nothing_like_it") for flags in ((), ("--debug",)))
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "ModelNameError: unknown model 'nothing_like_it'" in debug.stderr


def test_version_is_the_packages(run):
    result = run("--version")
    assert result.code == 0
    assert brainfm.__version__ in result.out


STARTED = """
import sys
from brainfm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
loaded = {"torch", "monai", "numpy", "pandas"} & sys.modules.keys()
print(*sorted(loaded), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "loaded"),
    [
        (("--help",), ""),
        (("embed", "--help"), ""),
        (("list",), ""),
        (("list", "--json"), ""),
        (("info", "simclr_resnet18_3d"), "numpy"),
        (("info", "--json", "simclr_resnet18_3d"), "numpy"),
        (("info", "simclr_resnet18_3d", "--overlap", "ADNI"), "numpy"),
    ],
)
def test_what_needs_no_network_imports_none(arguments, loaded):
    command = [sys.executable, "-c", STARTED, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    assert ended.stdout
    assert ended.stderr.split() == loaded.split()


@pytest.mark.parametrize(
    "command", [(), ("list",), ("info",), ("demo",), ("embed",), ("fetch",), ("convert",), ("push",), ("verify",)]
)
def test_help_is_there_for_every_command(command, run):
    result = run(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out


# --- How much is said -------------------------------------------------------------------------------


def commands(group=main, above=()):
    """Every command, by the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*above, name))
        else:
            yield (*above, name)


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_takes_the_flags_of_verbosity(command, run):
    text = run(*command, "--help").out
    for flag in ("-q, --quiet", "-v, --verbose", "--debug"):
        assert flag in text


@pytest.mark.parametrize(("arguments", "said"), [((), True), (("-q",), False)])
def test_command_says_that_it_starts_before_what_it_imports(arguments, said, tmp_path):
    ended = in_a_process("embed", tmp_path / "none.csv", "-o", tmp_path / "out.csv", *arguments)
    lines = ended.stderr.splitlines()
    assert lines[:-1] == ["brainfm embed: starting"] * said
    assert lines[-1].startswith("ScanError: ")
    assert ended.stdout == ""


def test_flags_count_before_the_command_too(tmp_path):
    quiet = in_a_process("-q", "pretrain", "no_recipe")
    assert quiet.stderr.splitlines() == [line for line in quiet.stderr.splitlines() if line.startswith("RecipeError")]
    assert "Traceback" in in_a_process("list", "no_model", "--debug").stderr


def test_quiet_leaves_notes_out_and_verbose_says_more(sample, tmp_path, run, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    words = ("embed", sample[0], "--mask", sample[1], "--model", "test_resnet_3d", "-o", tmp_path / "one.csv")
    more, plain, quiet = (run(*words, *flags) for flags in (("-v",), (), ("--quiet",)))
    assert any("for inference" in line for line in more.err)
    assert not any("for inference" in line for line in plain.err)
    assert (quiet.code, quiet.err) == (0, [])
    assert os.environ["TQDM_DISABLE"] == "1"


# --- Ctrl-C -----------------------------------------------------------------------------------------

# An import that takes its time, and one that a KeyboardInterrupt would not end.
SLOW = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            print("here", flush=True)
            try:
                time.sleep(30)
            except KeyboardInterrupt:
                raise ImportError("swallowed") from None
sys.meta_path.insert(0, Slow())
from brainfm.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("module", ["brainfm.cli", "click", "brainfm.embed", "torch"])
def test_ctrl_c_in_an_import_is_one_line_and_exit_code_130(module, tmp_path):
    words = [module, "embed", str(tmp_path), "-o", str(tmp_path / "out.csv"), "--model", "test_resnet_3d"]
    started = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in started.stdout:
        if line == "here\n":
            break
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=900)
    assert (started.returncode, said.splitlines()[-1]) == (130, "interrupted")
    assert [line for line in said.splitlines()[:-1] if not line.endswith(": starting")] == []


@pytest.mark.parametrize("after", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("words", [("brainfm", "embed"), ("brainfm.train",)])
def test_ctrl_c_at_some_moment_after_the_first_line_is_one_line_and_exit_code_130(words, after, tmp_path):
    told = {"embed": [tmp_path, "-o", tmp_path / "o.csv"], "brainfm.train": ["test_resnet_3d", f"output={tmp_path}"]}
    started = subprocess.Popen(
        [sys.executable, "-m", *words, *map(str, told[words[-1]])], stderr=subprocess.PIPE, text=True
    )
    first = started.stderr.readline()
    time.sleep(after)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=900)
    assert re.fullmatch(r"brainfm (embed|pretrain): starting\n", first)
    if started.returncode == 130:
        assert said.startswith("interrupted")
        assert len(said.splitlines()) == 1
    else:  # it had ended by then, by itself: there is nothing to embed, and nothing to train on
        ended = (1, -signal.SIGINT)  # the latter where Python had given its signals back, at its very end
        assert started.returncode in ended
        assert "Traceback" not in said
