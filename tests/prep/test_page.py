"""The page of prepared scans, and what embed makes of their verdicts."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import brainfm
from brainfm.cli import main
from brainfm.errors import BrainfmError, ScanError
from brainfm.prep.quality import RANGES, Figure, _judged
from brainfm.prep.report import write_page
from brainfm.scan.verdict import verdict_of

MIDDLE = {name: sum(usual.passes) / 2 for name, usual in RANGES.items()}
DOUBTFUL_TURN = (RANGES["turn"].passes[1] + RANGES["turn"].looks[1]) / 2


def write_scan(folder, verdict="pass", **changed):
    """A scan's folder as `brainfm prep` leaves it, but for its images."""
    folder.mkdir(parents=True)
    figures = [_judged(name, value) for name, value in (MIDDLE | changed).items()]
    record = {
        "input": {"path": "scan.nii.gz", "sha256": "0", "found": "", "stripped": False},
        "settings": {"registration": "rigid", "mask": "extraction"},
        "tools": {"extraction": "deepbet 1.0.2"},
        "seconds": {"bias": 1.0},
        "peak_memory_gb": 1.0,
        "verdict": verdict,
        "quality": [vars(figure) for figure in figures],
    }
    (folder / "prep.json").write_text(json.dumps(record))
    Image.fromarray(np.full((200, 220, 3), 90, np.uint8)).save(folder / "qc.png")


@pytest.fixture
def folder(tmp_path):
    """Eight scans: one failed, one to look at, one unlike the others."""
    prep = tmp_path / "prep"
    for n in range(5):
        write_scan(prep / f"sub-{n}", litres=1.3 + n / 100)
    write_scan(prep / "unlike", litres=RANGES["litres"].passes[1])
    write_scan(prep / "doubtful", "look", turn=DOUBTFUL_TURN)
    write_scan(prep / "bad", "fail", cut=120)
    return prep


def rows(page):
    return re.findall(r'<tr><th scope="row">([^<]*)</th><td><img', page)


def test_failed_doubtful_and_unusual_scans_come_first(folder, tmp_path):
    assert write_page(folder, tmp_path / "qc.html")[:3] == ["fail", "look", "pass"]
    assert rows((tmp_path / "qc.html").read_text(encoding="utf-8"))[:3] == ["bad", "doubtful", "unlike"]


def test_page_is_one_file_with_pictures_figures_and_reasons(folder, tmp_path):
    write_page(folder, tmp_path / "qc.html")
    page = (tmp_path / "qc.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "the scan cuts off the brain" in page
    assert "1 fail, 1 look, 6 pass" in page
    for name, usual in RANGES.items():
        assert f'<th scope="col">{name}</th>' in page
        assert usual.title in html.unescape(page)


def test_names_are_text_and_nothing_else(tmp_path):
    write_scan(tmp_path / "prep" / "a<b>&c")
    write_page(tmp_path / "prep", tmp_path / "qc.html")
    page = (tmp_path / "qc.html").read_text(encoding="utf-8")
    assert "a&lt;b&gt;&amp;c" in page
    assert "a<b>" not in page


def test_command_counts_the_verdicts(folder, tmp_path):
    result = CliRunner().invoke(main, ["qc", str(folder), "-o", str(tmp_path / "qc.html")])
    assert result.exit_code == 0
    assert "8 scans (1 fail, 1 look, 6 pass)" in result.output


def test_folder_without_prepared_scans_is_refused(tmp_path):
    with pytest.raises(ScanError, match="brainfm prep"):
        write_page(tmp_path, tmp_path / "qc.html")


def test_page_that_is_no_html_is_refused(folder, tmp_path):
    with pytest.raises(BrainfmError, match=r"ends in \.html"):
        write_page(folder, tmp_path / "qc.pdf")


def test_figure_that_an_earlier_version_did_not_measure_is_a_dash(folder, tmp_path):
    path = folder / "sub-1" / "prep.json"
    record = json.loads(path.read_text())
    record["quality"] = [figure for figure in record["quality"] if figure["name"] != "turn"]
    path.write_text(json.dumps(record))
    assert decide(folder, "-o", str(tmp_path / "qc.html")).exit_code == 0
    page = (tmp_path / "qc.html").read_text(encoding="utf-8")
    assert re.findall(r'data-name="turn">([^<]*)<', page).count("–") == 1


def test_damaged_record_is_named(folder, tmp_path):
    (folder / "sub-1" / "prep.json").write_text("{")
    with pytest.raises(ScanError, match=r"sub-1/prep\.json"):
        write_page(folder, tmp_path / "qc.html")


@pytest.mark.parametrize("name", RANGES)
def test_figure_is_judged_by_its_ranges_and_says_which_limit_it_breaks(name):
    usual = RANGES[name]
    for value, verdict, limit in (
        (usual.passes[1], "pass", None),
        ((usual.passes[1] + usual.looks[1]) / 2, "look", usual.passes[1]),
        (usual.looks[1] + 1, "fail", usual.looks[1]),
        (usual.passes[0], "pass", None),
        ((usual.passes[0] + usual.looks[0]) / 2, "look", usual.passes[0]),
        (usual.looks[0] - 1, "fail", usual.looks[0]),
    ):
        if verdict == "look" and usual.passes == usual.looks:
            continue
        figure = _judged(name, value)
        if verdict == "look" and usual.passes[0] <= value <= usual.passes[1]:  # it has no limit on that side
            assert figure.verdict == "pass"
            continue
        assert isinstance(figure, Figure)
        assert figure.verdict == verdict
        assert figure.reason == "" if limit is None else f"{value:.3g} is " in figure.reason
        assert limit is None or f" {limit:.3g}" in figure.reason


# --- A person's decision --------------------------------------------------------------------------


def decide(folder, *options):
    return CliRunner().invoke(main, ["qc", str(folder), *options])


def test_decision_is_kept_with_who_why_and_when_and_shown(folder, tmp_path):
    said = decide(folder, "--accept", "bad", "--reject", "sub-0", "--by", "Ann <a>", "--why", "looked at it")
    assert said.exit_code == 0
    assert said.output == "bad: accepted by Ann <a>\nsub-0: rejected by Ann <a>\n"
    (kept,) = json.loads((folder / "bad" / "decisions.json").read_text(encoding="utf-8"))
    assert (kept["decision"], kept["by"], kept["why"]) == ("accept", "Ann <a>", "looked at it")
    assert kept["date"].startswith("20")
    assert json.loads((folder / "bad" / "prep.json").read_text())["verdict"] == "fail"
    assert decide(folder, "-o", str(tmp_path / "qc.html")).output.endswith(
        "8 scans (1 look, 5 pass, 1 rejected, 1 accepted)\n"
    )
    page = (tmp_path / "qc.html").read_text(encoding="utf-8")
    assert "<b>accepted</b> by Ann &lt;a&gt;" in page
    assert "looked at it (judged: fail)" in page


def test_last_decision_counts_until_the_scan_is_prepared_anew(folder):
    for choice in ("--reject", "--accept"):
        assert decide(folder, choice, "bad", "--by", "Ann", "--why", choice).exit_code == 0
    assert len(json.loads((folder / "bad" / "decisions.json").read_text())) == 2
    assert verdict_of(folder / "bad") == "accepted"
    record = folder / "bad" / "prep.json"
    record.write_text(record.read_text() + "\n")
    assert verdict_of(folder / "bad") == "fail"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--accept", "bda", "--by", "Ann", "--why", "x"], 1, "no prepared scan is called 'bda'; there are bad"),
        (["--accept", "bad", "--reject", "bad", "--by", "Ann", "--why", "x"], 1, "both accepted and rejected"),
        (["--accept", "bad", "--why", "x"], 2, "who decides, and why"),
        (["--accept", "bad"], 2, "who decides, and why"),
        (["--by", "Ann", "--why", "x", "-o", "qc.html"], 2, "who decides, and why"),
        ([], 2, "name the page"),
    ],
)
def test_half_a_decision_is_refused_and_nothing_is_written(options, code, words, folder):
    said = decide(folder, *options)
    assert said.exit_code == code
    assert words in said.output
    assert not [*folder.rglob("decisions.json")]


def saved(folder, **changed):
    record = hashlib.sha256((folder / "bad" / "prep.json").read_bytes()).hexdigest()
    one = {"scan": "bad", "decision": "accept", "by": "Ann", "why": "seen", "date": "2026-01-02T03:04:05+00:00"}
    return [one | {"record": record} | changed]


def test_decisions_saved_from_the_page_are_taken(folder, tmp_path):
    (tmp_path / "saved.json").write_text(json.dumps(saved(folder)))
    said = decide(folder, "--decisions", str(tmp_path / "saved.json"), "-o", str(tmp_path / "qc.html"))
    assert said.output.startswith("bad: accepted by Ann\n")
    assert "<b>accepted</b> by Ann, 2026-01-02: seen" in (tmp_path / "qc.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"record": "0" * 64}, "bad was prepared anew since the page was written"),
        ({"scan": "bda"}, "no prepared scan is called 'bda'"),
        ({"why": ""}, "not what the page of prepared scans saves"),
        ({"why": 3}, "not what the page of prepared scans saves"),
        ({"decision": "perhaps"}, "not what the page of prepared scans saves"),
        (None, "not what the page of prepared scans saves"),
    ],
)
def test_decisions_that_cannot_be_taken_are_refused_all_of_them(changed, words, folder, tmp_path):
    good = {"scan": "sub-0", "record": hashlib.sha256((folder / "sub-0" / "prep.json").read_bytes()).hexdigest()}
    content = [*saved(folder, **good), *saved(folder, **changed)] if changed else {"scan": "bad"}
    (tmp_path / "saved.json").write_text(json.dumps(content))
    said = decide(folder, "--decisions", str(tmp_path / "saved.json"))
    assert said.exit_code == 1
    assert words in said.output
    assert not [*folder.rglob("decisions.json")]


def test_damaged_decision_is_named(folder, tmp_path):
    (folder / "sub-1" / "decisions.json").write_text('[{"decision": "perhaps"}]')
    with pytest.raises(ScanError, match=r"sub-1/decisions\.json"):
        write_page(folder, tmp_path / "qc.html")
    assert verdict_of(folder / "sub-1") == "unreadable"


# --- embed ----------------------------------------------------------------------------------------


@pytest.fixture
def two(small_sample, tmp_path):
    """Two scans that can be embedded: one with a good verdict, one with a bad; and one without any."""
    for name, verdict in (("good", "pass"), ("bad", "fail"), ("plain", "")):
        if verdict:
            write_scan(tmp_path / "prep" / name, verdict)
        else:
            (tmp_path / "prep" / name).mkdir()
        for file, item in zip(("normalized.nii.gz", "mask.nii.gz"), small_sample, strict=True):
            (tmp_path / "prep" / name / file).write_bytes(item.read_bytes())
    return tmp_path / "prep"


def test_embed_copies_the_verdict(two, small_model, tmp_path):
    table = brainfm.embed(two, small_model, output=tmp_path / "table.csv")
    assert table.columns()["qc"] == ["fail", "pass", ""]
    with (tmp_path / "table.csv").open() as file:
        assert [row["qc"] for row in csv.DictReader(file)] == ["fail", "pass", ""]


def test_strict_qc_refuses_failed_scans_and_goes_on(two, small_model, tmp_path):
    table = brainfm.embed(two, small_model, output=tmp_path / "table.csv", strict_qc=True)
    assert [record.patient_id for record in table.records] == ["good", "plain"]
    ((record, reason),) = table.errors
    assert record.patient_id == "bad"
    assert "did not pass quality control" in reason
    with (tmp_path / "table.errors.csv").open() as file:
        assert next(csv.DictReader(file))["qc"] == "fail"


def test_strict_qc_refuses_a_verdict_that_cannot_be_read(two, small_model):
    (two / "good" / "prep.json").write_text("{")
    table = brainfm.embed(two, small_model, strict_qc=True)
    assert [record.patient_id for record in table.records] == ["plain"]


def test_strict_qc_on_the_command_line_is_exit_code_1(two, tmp_path):
    arguments = ["embed", str(two), "-o", str(tmp_path / "t.csv"), "--model", "test_resnet_3d", "--strict-qc"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "2 scans → " in result.output


def test_strict_qc_stops_where_errors_are_raised(two, small_model):
    with pytest.raises(ScanError, match="did not pass quality control"):
        brainfm.embed(two, small_model, strict_qc=True, on_error="raise")


def test_strict_qc_follows_a_persons_decision(two, small_model, tmp_path):
    assert decide(two, "--accept", "bad", "--reject", "good", "--by", "Ann", "--why", "seen").exit_code == 0
    table = brainfm.embed(two, small_model, output=tmp_path / "table.csv", strict_qc=True)
    assert [record.patient_id for record in table.records] == ["bad", "plain"]
    assert table.columns()["qc"] == ["accepted", ""]
    ((record, reason),) = table.errors
    assert record.patient_id == "good"
    assert "was rejected by a person" in reason
