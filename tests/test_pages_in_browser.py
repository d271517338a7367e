"""Pages without a test file of their own, as Chromium shows them."""

from types import SimpleNamespace

import pytest
from seen import faults_of

from brainfm.prep.quality import RANGES
from brainfm.render import render_page

pytestmark = pytest.mark.browser


def reported():
    """What the page asks of a participant's report."""
    return SimpleNamespace(
        started="2026-11-26T10:00:00+00:00",
        machine={"name": "a-node-of-a-cluster.example"},
        state="failed",
        error="ScanError: " + "no " * 30,
        asked=3,
        done=2,
        of_an_earlier_run=0,
        failed=[None],
        seconds=61.2,
        peak_memory=1.1e9,
    )


def test_page_of_a_bids_data_set_is_read_in_both_themes_on_a_phone_and_on_a_desk(browser, tmp_path):
    figures = {name: sum(usual.passes) / 2 for name, usual in RANGES.items()}
    scans = [
        {"bids_name": f"sub-0{n}_ses-a-long-name-of-a-session_T1w", "picture": None, "verdict": verdict}
        | {"errors": errors, "reasons": ["snr 3 is low"] * (verdict == "look"), "figures": figures}
        for n, (verdict, errors) in enumerate(
            [("failed", ["prep: ScanError: " + "no " * 50]), ("look", []), ("pass", [])]
        )
    ]
    origin = SimpleNamespace(model="test_resnet_3d.phantoms", dtype="float32", weights="0123456789abcdef")
    page = render_page(
        "bids.html",
        title="A data set: 3 T1w scans",
        complete=False,
        summary="1 failed, 1 look, 1 pass",
        scans=scans,
        ranges=RANGES,
        group=SimpleNamespace(
            problems=["sub-09 is in two tables"], not_run=["sub-07"], left_out={"sub-08": "in pieces"}
        ),
        failures=[("no brain is left", 1)],
        calls=[reported()],
        steps={"embedding": (12.5, 4.2), "writing": (0.1, None)},
        tables={"group_desc-testresnet_embedding.parquet": (2, origin)},
        version="0",
    )
    (tmp_path / "bids.html").write_text(page, encoding="utf-8")
    assert faults_of(tmp_path / "bids.html", browser) == []
