"""The paper is cited by its DOI, in the repository's file and in every model's card."""

from __future__ import annotations

from pathlib import Path

import yaml

import brainfm

DOI = "10.1109/ICCVW69036.2025.00141"


def test_paper_is_cited_by_its_doi():
    file = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    cited = file["preferred-citation"]
    assert (file["cff-version"], cited["doi"], cited["year"]) == ("1.2.0", DOI, 2025)
    card = brainfm.get_pretrained_cfg("simclr_resnet18_3d")
    assert DOI in card.citation
    assert cited["title"].split()[:4] == ["Building", "a", "General", "SimCLR"]
