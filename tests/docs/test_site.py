"""The documentation does what it says: its code runs, its commands are there, its pages name every model and refusal.

`.ci/run` builds the site; here its sources are held against the program.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import costs
import encoders
import nibabel as nib
import offline
import pytest
import refusals
from click.testing import CliRunner

import brainfm
from brainfm import errors
from brainfm.cli import main

DOCS = Path(__file__).parents[2] / "docs"

PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
}
TEST_MODEL = "test_resnet_3d"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """The `brainfm` commands in the shell blocks of a page, each as its words."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(command)
                if "brainfm" in words:
                    yield words[words.index("brainfm") + 1 :]


# --- Code -----------------------------------------------------------------------------------------


@pytest.fixture
def reader(small_sample, tmp_path, monkeypatch):
    """A reader's folder, with the files that the pages name; published weights are stood in for by the test model's."""
    scan, mask = map(nib.load, small_sample)
    for folder in (tmp_path, tmp_path / "prep" / "sub-01"):
        folder.mkdir(parents=True, exist_ok=True)
        scan.to_filename(folder / "normalized.nii.gz")
        mask.to_filename(folder / "mask.nii.gz")
    manifest = "image_path,mask_path,patient_id\nnormalized.nii.gz,mask.nii.gz,p1\n"
    (tmp_path / "manifest.csv").write_text(manifest)
    monkeypatch.chdir(tmp_path)

    def at_hand(name):
        return TEST_MODEL if name == "simclr_resnet18_3d" else name

    create_model, create_transform = brainfm.create_model, brainfm.create_transform
    monkeypatch.setattr(brainfm, "create_model", lambda name, *args, **kw: create_model(at_hand(name), *args, **kw))
    monkeypatch.setattr(brainfm, "create_transform", lambda name: create_transform(at_hand(name)))
    return tmp_path


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_python_of_a_page_runs(page, reader, small_model, capsys):
    code = blocks(PAGES[page], "python")
    if any("embeddings.csv" in block for block in code):
        brainfm.embed("manifest.csv", small_model, output="embeddings.csv")
    names = {}
    for block in code:
        if block.startswith(("from monai", ">>>")):  # tests/test_readme.py holds these; the weights have 130 MB
            continue
        exec(compile(block, f"{page}.md", "exec"), names)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if any(commands(text))])
def test_commands_of_a_page_have_these_options(page):
    for words in commands(PAGES[page]):
        command, rest = main, words
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"brainfm {' '.join(words)}"
            command, rest = command.commands[rest[0]], rest[1:]
        try:
            command.make_parser(click.Context(command)).parse_args(list(rest))
        except click.UsageError as error:
            pytest.fail(f"brainfm {' '.join(words)}: {error.format_message()}")


def test_every_command_is_shown_somewhere():
    shown = {words[0] for text in PAGES.values() for words in commands(text)}
    mentioned = {name for name in main.commands if any(f"`brainfm {name}" in text for text in PAGES.values())}
    assert set(main.commands) - shown - mentioned == set()


def test_start_ends_with_a_table(tmp_path, monkeypatch):
    """The commands of Start that need neither a network nor scans of one's own."""
    monkeypatch.chdir(tmp_path)
    alone = [words for words in commands(PAGES["start"]) if words[0] == "phantom" or "test_resnet_3d" in words]
    assert [words[0] for words in alone] == ["phantom", "embed"]
    for words in alone:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    import brainfm.table

    assert brainfm.table.read("embeddings.csv").vectors.shape == (8, 128)


# --- Pages ----------------------------------------------------------------------------------------


def test_every_encoder_has_a_page_and_a_line(monkeypatch):
    monkeypatch.setattr(encoders.Page, "parameters", 1_000_000)  # counting them all takes seconds
    found = encoders.pages()
    assert {page.name for page in found} == set(brainfm.list_models())
    table = encoders.overview(found)
    for page in found:
        assert f"[`{page.name}`](generated/encoders/{page.name}.md)" in table
        text = encoders.page_of(page, "")
        (snippet,) = blocks(text, "python")
        compile(snippet, page.name, "exec")
        assert f'brainfm.create_model("{page.name}"' in snippet
        if page.cfg.input_spec:
            assert brainfm.describe(page.cfg.input_spec) in text
        for score in page.cfg.scores:
            assert score.source in table
        if page.cfg.citation:
            assert page.cfg.citation in text


# --- What it costs ----------------------------------------------------------------------------------


def zoo_result(folder, date, seconds):
    row = {"model": "sfcn_age", "shape": [1, 4, 4, 4], "upstream": "plain", "error": 1e-7}
    row |= {"processor_s": {"upstream": 6.0, "optimize": seconds}, "gb": {"upstream": 1.0, "optimize": 0.5}}
    found = {"machine": f"{date}: a machine", "rows": [row]}
    (folder / f"zoo_{date}.json").write_text(json.dumps(found))


def test_costs_are_those_of_the_newest_result(tmp_path):
    zoo_result(tmp_path, "2026-11-26", 3.0)
    zoo_result(tmp_path, "2026-11-25", 2.0)
    (cost,) = costs.measured(tmp_path).values()
    assert cost.cells == ("2.00×", "2.0×", "3.00", "0.50", "6.00", "1.00", "1×4×4×4", "1e-07")
    assert cost.machine.startswith("2026-11-26")


def test_page_of_costs_has_the_results_with_their_machines_and_ratios_first(tmp_path):
    zoo_result(tmp_path, "2026-11-26", 3.0)
    result = {"machine": "2026-11-24: another", "command": "python benchmarks/encoder.py --rounds 3"}
    result["tables"] = [{"header": ["one volume", "s", "peer / this"], "rows": [["ours", "3", "2.5×"]]}]
    (tmp_path / "encoder.json").write_text(json.dumps(result))
    text = "# B\n\n## `python benchmarks/encoder.py`\n\nWhat.\n\n| a | b |\n|---|---|\n| old | 1 |\n\nThen.\n\n"
    text += "## `python benchmarks/zoo.py`\n\n| a |\n|---|\n| old |\n\n## Other\n\n| a |\n|---|\n| kept |\n"
    page = costs.as_page(text, tmp_path)
    assert "old" not in page
    assert "What.\n\n*2026-11-24: another*\n\n| one volume | peer / this (s) | s |" in page
    assert "| ours | 2.5× | 3 |\n\nThen." in page
    assert "*2026-11-26: a machine*\n\n| encoder | faster |" in page
    assert "| kept |" in page


def test_results_of_the_benchmarks_are_of_models_and_scripts_that_there_are():
    assert set(costs.measured()) <= set(brainfm.list_models())
    page = costs.as_page((DOCS.parent / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    for path in costs.RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert re.match(r"\d{4}-\d\d-\d\d: ", result["machine"]), path.name
        assert result["machine"] in page, path.name


# --- Refusals -------------------------------------------------------------------------------------


def test_every_error_class_is_under_why_did_it_refuse():
    text = refusals.as_markdown()
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert {name for name in raised if f"### `{name}`" in text} == raised
    assert PAGES["refused"].count("generated/refusals.md") == 1
    assert ">>>" not in text  # examples are on the page of the API
    assert len(re.findall(r"^\*\*", PAGES["refused"], flags=re.MULTILINE)) == 15


@pytest.fixture(scope="module")
def messages():
    """The texts of each message of the page between its placeholders."""
    parts = [re.split("‹[^›]*›", refusal.text) for refusal in refusals.refusals()]
    return [each for each in parts if len("".join(each)) > 12]


def reads_as(said, parts):
    """Whether a message has these texts in this order, from its beginning to its end."""
    at = 0
    for part in parts:
        at = said.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return said.startswith(parts[0]) and said.endswith(parts[-1])


def _shifted(sample):
    image = nib.load(sample[0])
    image.affine[1, 3] += 40
    return nib.Nifti1Image(image.get_fdata(dtype="float32"), image.affine)


@pytest.mark.parametrize(
    "refused",
    [
        lambda sample, spec: brainfm.load_scan("missing.nii.gz", spec=spec),
        lambda sample, spec: brainfm.load_scan(__file__, spec=spec),
        lambda sample, spec: brainfm.load_scan(_shifted(sample), spec=spec),
        lambda sample, spec: brainfm.load_scan({"T1w": sample[0], "t1W": sample[0]}, spec=spec),
        lambda sample, spec: brainfm.load_scan(
            sample[0], nib.Nifti1Image(spec_mask(), nib.load(sample[0]).affine), spec=spec
        ),
        lambda sample, spec: brainfm.create_model("simclr_resnet81_3d"),
        lambda sample, spec: brainfm.create_model("mae_vit_tiny_3d", pretrained=True),
        lambda sample, spec: brainfm.create_model("neurojepa_vitb", pretrained=True),
        lambda sample, spec: brainfm.create_transform(brainfm.PretrainedCfg()),
        lambda sample, spec: brainfm.register_card("missing.yaml"),
    ],
)
def test_what_is_refused_stands_on_the_page(refused, messages, small_sample, small_spec):
    with pytest.raises(errors.BrainfmError) as caught:
        refused(small_sample, small_spec)
    said = " ".join(str(caught.value).split())
    assert any(reads_as(said, message) for message in messages), said


def spec_mask():
    import numpy as np

    return np.full((49, 58, 49), 0.5, np.float32)


# --- Links ----------------------------------------------------------------------------------------


def test_every_page_is_in_a_toctree_and_every_link_leads_somewhere():
    named = set()
    for page, text in PAGES.items():
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            named |= {line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")}
        here = DOCS.parent if page == "README" else DOCS
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert "generated" in target or (here / target).exists(), f"{page}: {target}"
        for role, target in re.findall(r"\{(doc|download)\}`(?:[^<`]*<)?([^>`]+)>?`", text):
            file = DOCS / (f"{target}.md" if role == "doc" else target)
            assert file.exists() or target == "examples/index" or "generated" in target, f"{page}: {target}"
    written = {name for name in PAGES if name not in ("README", "index")}
    assert {name for name in named if "/" not in name} == written


def test_a_page_that_loads_from_elsewhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="https://x.org/">x</a><script src="https://x.org/a.js"></script>')
    (tmp_path / "b.css").write_text('@import url("//x.org/font.css"); p {background: url(https://x.org/p.png)}')
    assert [address for _, address in offline.outside(tmp_path)] == [
        *("https://x.org/a.js", "//x.org/font.css", "https://x.org/p.png")
    ]
