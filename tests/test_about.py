"""What is known of a weight, in words."""

from __future__ import annotations

import pytest

from brainfm import Cohort, PretrainedCfg, Score
from brainfm.about import about_weight, as_text

CFG = PretrainedCfg(architecture="net", num_features=8)


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({"url": "https://lab.org/a.pt", "sha256": "ab" * 32}, "sha256 " + "ab" * 32),
        ({"url": "https://lab.org/a.pt", "sha256": "ab" * 4}, "sha256 begins with " + "ab" * 4),
        ({"url": "https://lab.org/a.pt", "git_blob": "cd" * 20}, "git blob " + "cd" * 20),
        ({"url": "https://lab.org/a.pt"}, "none is known: later downloads are held to the first"),
        ({"file": "a.pt"}, None),
        ({}, None),
    ],
)
def test_digest_is_said_by_its_kind_or_that_none_is_known(fields, digest):
    cfg = CFG.overlay(fields)
    assert about_weight(cfg, cfg.source).facts.get("digest") == digest


def test_parameters_are_said_where_they_were_counted():
    assert about_weight(CFG, "", parameters=33_160_896).facts["architecture"] == "net, 33.2 M parameters"
    assert "architecture" not in about_weight(CFG, "").facts


def test_every_fact_has_a_value():
    assert all(about_weight(CFG, "").facts.values())
    assert all(about_weight(CFG, "a.pt").facts.values())


def test_columns_of_the_text_are_aligned_and_numbers_stand_to_the_right():
    cohorts = (Cohort("a long name of a cohort", 5, 1200, ("H", "AD")), Cohort("IXI", 581, 581))
    scores = (Score("sex", "ROC AUC", "linear probe", 0.9, 0.01, "here"), Score("age", "MAE", "probe", 4.0))
    text = as_text(about_weight(CFG.overlay({"cohorts": cohorts, "scores": scores}), "a.pt"))
    assert (
        """
Pretrained on 586 patients, 1,781 scans; testing on these is testing on training data
  data set                 patients  scans  conditions
  a long name of a cohort         5  1,200  H, AD
  IXI                           581    581

Published scores
  task  used as       value       metric   source
  sex   linear probe  0.9 ± 0.01  ROC AUC  here
  age   probe         4           MAE
""".strip()
        in text
    )


def test_notes_of_several_lines_stay_in_their_column():
    text = as_text(about_weight(CFG.overlay({"notes": "one\n\ntwo"}), ""))
    assert "notes      one two\n" in text


def test_cohorts_whose_numbers_nobody_says_are_not_counted_as_0():
    known = about_weight(CFG.overlay({"cohorts": (Cohort("A", 5, 1200), Cohort("B"))}), "a.pt")
    assert known.cohorts[1] == ("B", "?", "?", "")
    assert (known.patients, known.scans) == ("at least 5", "at least 1,200")
    assert "Pretrained on ? patients, ? scans" in as_text(
        about_weight(CFG.overlay({"cohorts": (Cohort("B"),)}), "a.pt")
    )
