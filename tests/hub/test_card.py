"""The model card: the Hub can read its front matter, and it says what the cfg says, whatever the cfg says."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import brainfm
from brainfm import Cohort, PretrainedCfg, Score
from brainfm.hub import save_for_hub
from brainfm.hub.card import model_card

SIMCLR = "simclr_resnet18_3d.kaczmarek2025"
PROVENANCE = {"source": "a.tar", "source_sha256": "0" * 64, "left_out": ["projector", "epoch"]}
GOLDEN = {"embedding": [0.5]}


def card(model, provenance=PROVENANCE, golden=GOLDEN, **changes):
    """The card of a model with some fields of its cfg changed."""
    model.pretrained_cfg = model.pretrained_cfg.overlay(changes)
    return model_card(model, {"provenance": provenance, "golden": golden})


@pytest.fixture
def model():
    return brainfm.create_model("test_resnet_3d")


@pytest.fixture(scope="module")
def released():
    """The card of the released encoder, without its weights."""
    return card(brainfm.create_model(SIMCLR), sha256="ab" * 32)


def front_matter(text):
    first, between, rest = text.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(between), rest


def section(text, name):
    """What is under a heading, without what is fenced there taken for a heading."""
    found = re.search(rf"^## {re.escape(name)}\n\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no section {name}"
    return found.group(1).strip()


def cells(line):
    """The cells of a table's row, as GitHub's markdown splits them."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def loaded(text, tmp_path):
    """The Hub client's own reading of a card."""
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)


# --- Front matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("licence", "licence_id", "name"),
    [
        ("MIT", "mit", None),
        ("Apache-2.0", "apache-2.0", None),
        ("CC-BY-4.0", "cc-by-4.0", None),
        ("CC-BY-NC-SA-4.0", "cc-by-nc-sa-4.0", None),  # the Hub knows it too
        ("Lab licence: ask #us", "other", "lab-licence-ask-us"),
        (None, None, None),
    ],
)
def test_hub_reads_the_licence(licence, licence_id, name, model, tmp_path):
    text = card(model, licence=licence)
    data = loaded(text, tmp_path).data.to_dict()
    assert data == front_matter(text)[0]
    assert data.get("license") == licence_id
    assert (data.get("license_name") or "").lower() == (name or "").lower()
    assert f"licence of the weights: {licence or 'not stated'}" in section(text, "Model")


def test_hub_reads_what_the_model_is(released, tmp_path):
    data = loaded(released, tmp_path).data.to_dict()
    assert data["library_name"] == "brainfm"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert {"medical", "mri", "brain", "3d", "simclr"} <= set(data["tags"])
    assert data["license"] == "mit"


@pytest.mark.parametrize("method", ["SimCLR: #1", "a\nb", "- x", "yes", "[MAE]", "'", "---"])
def test_any_name_of_a_method_is_one_tag(method, model, tmp_path):
    tags = loaded(card(model, ssl_method=method), tmp_path).data.tags
    assert tags[-1] == method.lower()
    assert all(isinstance(tag, str) for tag in tags)


# --- What it says ---------------------------------------------------------------------------------


def test_card_names_every_cohort_and_the_totals(released):
    lines = section(released, "Pretraining data").splitlines()
    cfg = brainfm.get_pretrained_cfg(SIMCLR)
    assert cells(lines[0]) == ["data set", "patients", "scans", "conditions"]
    assert len(lines) == 2 + len(cfg.cohorts) + 1
    for line, cohort in zip(lines[2:], cfg.cohorts, strict=False):
        assert cells(line) == [
            cohort.name,
            f"{cohort.patients:,}",
            f"{cohort.scans:,}",
            ", ".join(cohort.conditions),
        ]
    assert cells(lines[-1]) == ["**total**", "18,759", "44,958", ""]


def test_card_gives_every_score_with_its_source(released):
    cfg = brainfm.get_pretrained_cfg(SIMCLR)
    lines = section(released, "Published scores").splitlines()[2:]
    assert len(lines) == len(cfg.scores) == 8
    for line, score in zip(lines, cfg.scores, strict=True):
        assert cells(line) == [score.task, score.mode, f"{score.value:g} ± {score.sd:g}", score.metric, score.source]
        assert score.source.startswith("https://")


def test_card_has_the_contract_the_citation_and_the_intended_use(released):
    cfg = brainfm.get_pretrained_cfg(SIMCLR)
    assert section(released, "Input contract") == f"```\n{brainfm.describe(cfg.input_spec)}\n```"
    assert section(released, "Citation") == f"```bibtex\n{cfg.citation}\n```"
    limits = " ".join(section(released, "Intended use and limits").split())
    for said in ("Not a medical device", "not for decisions about a patient", "--overlap", "age, sex, site"):
        assert said in limits
    assert "- embedding: 512-d\n" in section(released, "Model")
    assert "[B, 1, D, H, W] float32" in section(released, "Model")


def test_card_has_the_facts_of_the_cfg_in_its_own_words(released):
    cfg = brainfm.get_pretrained_cfg(SIMCLR)
    facts = section(released, "Model").splitlines()
    for fact in (
        "architecture: simclr_resnet18_3d, 33.2 M parameters",
        "readout: average over the last feature map",
        "weights: model.safetensors, beside this card",
        "third-party facts: nobody here has opened the published file; its digest and container are as others report "
        "them",
        "pretraining: SimCLR",
        "licence of the weights: MIT",
        "licence of the code: MIT",
        f"publication: {cfg.title}",
        f"paper: {cfg.paper}",
        f"code: {cfg.repository}",
    ):
        assert f"- {fact}" in facts


def test_card_says_what_the_licence_asks(model):
    text = card(model, gated=True, redistribute=False, terms="Ask | sign\nfirst.", repository="https://x.org/y")
    facts = section(text.replace("\\|", "|"), "Model").splitlines()
    assert "- access: gated: ask for it where the weights are" in facts
    assert "- redistribution: not allowed" in facts
    assert "- terms: Ask | sign first." in facts
    assert "- access" not in section(card(model, gated=False), "Model")


def test_card_says_that_no_licence_of_the_code_is_stated(model):
    assert "- licence of the code: not stated\n" in card(model, code_licence=None, repository="https://x.org/y")


@pytest.mark.parametrize(("facts", "count"), [("seen", 0), ("third-party", 1)])
def test_only_what_nobody_here_checked_is_called_third_party(facts, count, model):
    assert section(card(model, facts=facts), "Model").count("third-party") == count


def test_card_says_how_features_are_read_out(model):
    window = brainfm.Window((32, 32, 32), overlap=0.25, average="brain")
    readout = brainfm.Readout("brain", window)
    assert f"- readout: {readout}\n" in card(model, readout=readout)
    assert "windows of 32×32×32 voxels that overlap by 25%" in card(model)


def test_card_speaks_of_a_golden_embedding_where_there_is_one(model):
    use = " ".join(section(card(model), "Use").split())
    assert "`brainfm verify hf-hub:ORG/NAME` compares a machine's embedding of the packaged scan with the golden" in use
    use = " ".join(section(card(model, golden=None), "Use").split())
    assert "hf-hub:ORG/NAME`" not in use
    assert "no golden embedding" in use


def test_card_names_no_place_of_the_machine_that_made_it(model, tmp_path):
    assert str(tmp_path) not in card(model, file=str(tmp_path / "model.safetensors"))


def test_card_says_where_the_weights_came_from(released):
    facts = section(released, "Provenance").splitlines()
    assert "- source: a.tar" in facts
    assert f"- source sha256: {'0' * 64}" in facts
    assert "- left out: projector, epoch" in facts
    assert f"- sha256 of model.safetensors: {'ab' * 32}" in facts


def test_lines_of_the_card_can_be_pasted_as_they_are(released):
    code = re.search(r"```python\n(.*?)```", section(released, "Use"), flags=re.DOTALL).group(1)
    assert "import brainfm" in code


def test_card_of_a_model_of_which_nothing_is_known_says_so(model, tmp_path):
    model.pretrained_cfg = PretrainedCfg(architecture="test_resnet_3d", num_features=128)
    text = card(model, provenance={})
    loaded(text, tmp_path)
    assert section(text, "Pretraining data").startswith("Not recorded")
    assert section(text, "Input contract") == "None was recorded."
    assert "licence of the weights: not stated" in section(text, "Model")
    assert "pretraining: not stated" in section(text, "Model")
    assert "## Published scores" not in text
    assert "## Citation" not in text
    assert "## Provenance" not in text
    assert ": None" not in text


def test_number_of_outputs_of_a_classifier_is_said_and_then_monai_is_not_offered():
    text = card(brainfm.create_model("resnet18_3d", num_classes=3), num_classes=3)
    assert "- embedding: 512-d; 3 outputs\n" in section(text, "Model")
    assert "monai" not in text


def test_monai_is_offered_for_its_own_network_with_the_models_arguments(model, released):
    assert 'ResNet("basic", [2, 2, 2, 2], [64, 128, 256, 512], spatial_dims=3, n_input_channels=1' in released
    assert 'ResNet("basic", [1, 1, 1, 1], [16, 32, 64, 128], spatial_dims=3, n_input_channels=1' in card(model)
    assert "n_input_channels=2" in card(brainfm.create_model("test_resnet_3d", in_chans=2))


def test_monai_is_offered_for_no_other_network(model):
    assert "monai" not in card(brainfm.create_model("test_vit_3d"))
    model.model_args = model.model_args | {"stem_stride": 2}  # which MONAI's lines would leave out
    assert "monai" not in card(model)


# --- What cannot break it -------------------------------------------------------------------------

NASTY = ["a|b", "a\nb", "a\r\nb", "---", "\n---\nlicense: mit\n---\n", "| x | y |", "# title", "```", "ä € 脳", "<!--"]


@pytest.mark.parametrize("text", NASTY)
def test_notes_cannot_break_the_card(text, model, tmp_path):
    made = card(model, notes=text, licence="Lab", cohorts=[Cohort("ADNI", 1, 2)])
    data = loaded(made, tmp_path).data.to_dict()
    assert data["license"] == "other"
    assert data == front_matter(made)[0]
    assert cells(section(made, "Pretraining data").splitlines()[-1]) == ["**total**", "1", "2", ""]


@pytest.mark.parametrize("text", NASTY)
def test_licence_cannot_break_the_front_matter(text, model, tmp_path):
    made = card(model, licence=text)
    data = loaded(made, tmp_path).data.to_dict()
    assert data["license"] == "other"
    assert data["library_name"] == "brainfm"
    assert data == front_matter(made)[0]


@pytest.mark.parametrize("text", ["a|b", "a\nb", "a\r\nb", "| x | y |", "\n---\n", "a\\|b", "a\\"])
def test_names_cannot_break_the_tables(text, model):
    made = card(
        model,
        cohorts=[Cohort(text, 1, 2, (text,)), Cohort("Lab", 3, 4)],
        scores=[Score(text, text, text, 0.5, source=text), Score("sex", "AUC", "probe", 0.6)],
    )
    cohorts = section(made, "Pretraining data").splitlines()
    assert [len(cells(line)) for line in cohorts] == [4] * 5
    scores = section(made, "Published scores").splitlines()
    assert [len(cells(line)) for line in scores] == [5] * 4


@pytest.mark.parametrize("text", ["@misc{a,\n```\n# x\n}", "```\n\n## Citation\n\nfake"])
def test_citation_cannot_leave_its_fence(text, model):
    made = card(model, citation=text)
    opening = re.search(r"^(`{3,}|~{3,}) ?bibtex$", made, flags=re.MULTILINE).group(1)
    assert made.rstrip().endswith(f"{text}\n{opening}")
    assert opening not in text


@pytest.mark.parametrize("text", ["<!--", "<script>", "a <b>c"])
def test_facts_and_names_open_no_html(text, model):
    made = card(model, licence=text, terms=text, cohorts=[Cohort(text, 1, 2)], notes="")
    assert text not in front_matter(made)[1]
    assert made.count(text.replace("<", "&lt;")) == 3


# --- The lines of plain MONAI ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet_3d", pytest.param("simclr_resnet18_3d", marks=pytest.mark.slow)])
def test_plain_monai_lines_of_the_card_give_the_models_embedding(name, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)  # ten seconds at full size
    torch.manual_seed(0)
    model = brainfm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
    folder = save_for_hub(model, tmp_path / "folder")
    text = (folder / "README.md").read_text(encoding="utf-8")
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "monai" in code]
    assert len(lines.split("\n\n")) == 2
    assert len(lines.replace("\n\n", "\n").splitlines()) == 4
    assert "brainfm" not in lines
    monkeypatch.chdir(folder)
    names = {}
    exec(lines, names)
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = brainfm.create_model(f"local-dir:{folder}")(x)
        assert torch.equal(names["net"](x), expected)
        assert torch.equal(expected, model(x))
