"""The papers are cited by their DOIs, in the repository's file and in every model's card."""

from __future__ import annotations

import re
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


def test_both_papers_have_the_doi_of_their_preprint():
    file = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    papers = [file["preferred-citation"], *file["references"]]
    preprints = [one["value"] for paper in papers for one in paper["identifiers"] if one["type"] == "doi"]
    assert preprints == ["10.48550/arXiv.2509.10620", "10.48550/arXiv.2309.04651"]
    assert all(re.fullmatch(r"10\.\d{4,}/\S+", doi) for doi in [*preprints, *(paper["doi"] for paper in papers)])
    for paper in papers:
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])


def test_software_is_cited_in_its_version():
    file = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(file["version"]) == brainfm.__version__
    assert file["type"] == "software"
