"""Was a data set in the pretraining data? Known names are found however they are spelled, and others are not."""

from __future__ import annotations

import pytest
from torch import nn

import brainfm
from brainfm import Cohort, PretrainedCfg, pretraining_overlap
from brainfm.manifest import ScanRecord
from brainfm.overlap import _plain, overlap_of_scans
from brainfm.zoo.cards import cohort_names

SIMCLR = brainfm.get_pretrained_cfg("simclr_resnet18_3d.kaczmarek2025")
NAMES = cohort_names().names


def cohorts(*names, model=SIMCLR):
    """The cohorts that names are found in."""
    return [overlap.cohort.name for overlap in pretraining_overlap(model, names)]


# --- Found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [cohort.name for cohort in SIMCLR.cohorts])
def test_every_cohort_is_found_by_its_own_name(cohort):
    (overlap,) = pretraining_overlap(SIMCLR, cohort)
    assert (overlap.dataset, overlap.cohort.name, overlap.why) == (cohort, cohort, "the same")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NKI", ["CoRR"]),
        ("NKI-RS", ["CoRR"]),
        ("eNKI", ["CoRR"]),
        ("Nathan Kline Institute - Rockland Sample", ["CoRR"]),
        ("NKI Rockland Sample", ["CoRR"]),
        ("NKI_TRT", ["CoRR"]),
        ("IPCAS_8", ["CoRR"]),
        ("IACAS_1", ["CoRR"]),
        ("JHNU_1", ["CoRR"]),
        ("IBA_TRT", ["CoRR"]),
        ("SLIM", ["CoRR"]),
        ("ADNI1", ["ADNI"]),
        ("ADNI2", ["ADNI"]),
        ("ADNI3", ["ADNI"]),
        ("ADNI-GO", ["ADNI"]),
        ("ADNIGO", ["ADNI"]),
        ("Alzheimer’s Disease Neuroimaging Initiative", ["ADNI"]),
        ("TADPOLE", ["ADNI"]),
        ("HABLE", ["HABS-HD"]),
        ("HABS_HD", ["HABS-HD"]),
        ("HABSHD", ["HABS-HD"]),
        ("Health & Aging Brain Study – Health Disparities", ["HABS-HD"]),
        ("Health & Aging Brain among Latino Elders", ["HABS-HD"]),
        ("FTLDNI", ["NIFD"]),
        ("Frontotemporal Lobar Degeneration Neuroimaging Initiative", ["NIFD"]),
        ("OpenBHB", ["CoRR", "GSP"]),
        ("GSP1000", ["GSP"]),
        ("Brain Genomics Superstruct Project", ["GSP"]),
        ("ds004889", ["SOOP"]),
        ("Stroke Outcome Optimization Project", ["SOOP"]),
        ("ds004856", ["DLBS"]),
        ("Dallas Lifespan Brain Study", ["DLBS"]),
        ("ds003097", ["AOMIC"]),
        ("ds002785", ["AOMIC"]),
        ("ds002790", ["AOMIC"]),
        ("AOMIC-PIOP2", ["AOMIC"]),
        ("Amsterdam Open MRI Collection", ["AOMIC"]),
        ("Mayo Clinic Study of Aging", ["MCSA"]),
        ("Parkinson's Progression Markers Initiative", ["PPMI"]),
        ("Southwest University Adult Lifespan Dataset", ["SALD"]),
    ],
)
def test_other_names_of_a_cohort_are_found(name, found):
    assert cohorts(name) == found


@pytest.mark.parametrize(
    "name", ["adni", "ADNI", "Adni", " a-d_n.i ", "(ADNI)", "\tADNI\n", "A D N I", "AD-NI 1", "adni_2", "ADNI/3"]
)
def test_case_spaces_and_punctuation_do_not_matter(name):
    assert cohorts(name) == ["ADNI"]


def test_every_alias_is_found_in_every_spelling_and_belongs_to_a_cohort():
    cohorts = {one.name: one for name in brainfm.list_pretrained() for one in brainfm.get_pretrained_cfg(name).cohorts}
    assert set(NAMES) <= set(cohorts)
    everyone = PretrainedCfg(cohorts=tuple(cohorts.values()))
    for cohort, known in NAMES.items():
        for why, aliases in known.items():
            for alias in aliases:
                for spelled in (alias, alias.upper(), alias.lower(), alias.replace(" ", "_")):
                    found = {o.cohort.name: o.why for o in pretraining_overlap(everyone, spelled)}
                    assert found.get(cohort) == why, spelled


def test_aliases_are_long_enough_to_mean_something_and_not_given_twice():
    plain = [(cohort, _plain(a)) for cohort, known in NAMES.items() for names in known.values() for a in names]
    assert len(plain) == len(set(plain)) + sum(plain.count(p) - 1 for p in set(plain))
    assert min(len(alias) for _, alias in plain) >= 3
    shared = {alias for c, alias in plain for d, other in plain if alias == other and c != d}
    assert shared == {"openbhb", "bhb", "bhb10k", "abidei", "abideii"}  # OpenBHB holds ABIDE, and ABIDE is so called


def test_parts_of_a_collection_that_was_learned_from_are_found():
    found = [name for name in ("IXI", "abide_1", "ABIDE II", "AIBL") if pretraining_overlap("anatcl_resnet18", name)]
    assert found == ["IXI", "abide_1", "ABIDE II"]
    assert [str(o.cohort.name) for o in pretraining_overlap("yaware_densenet121", "HCP-YA")] == ["HCP"]


def test_answer_says_what_was_asked_and_why_in_one_line():
    (overlap,) = pretraining_overlap(SIMCLR, "adni_3")
    assert str(overlap) == ("adni_3: in the pretraining data (a phase of ADNI: ADNI, 3,028 patients, 21,778 scans)")
    assert overlap.cohort == SIMCLR.cohorts[0]


def test_answer_gives_no_numbers_that_nobody_says():
    (overlap,) = pretraining_overlap(PretrainedCfg(cohorts=(Cohort("Lab", scans=12),)), "lab")
    assert str(overlap).endswith(": Lab, 12 scans)")


def test_name_that_may_mean_another_study_says_so():
    (overlap,) = pretraining_overlap(SIMCLR, "HABS")
    assert "Harvard Aging Brain Study is another" in overlap.why


# --- Not found ------------------------------------------------------------------------------------


OTHERS = """IXI AIBL OASIS OASIS-3 UKB HCP HCP-Aging ABIDE ABIDE_II ADHD200 SUDMEX CamCAN BraTS NACC A4 ABCD PING COBRE
ISLES SRPBS MPI-Leipzig DOD-ADNI J-ADNI my_study dataset T1w derivatives sub-01 AD ADN PD NI CoR GS 1 - / ... ADNIx
notADNI ds00488 ds0048890"""


@pytest.mark.parametrize("name", [*OTHERS.split(), "UK Biobank", "Harvard Aging Brain Study", "ATLAS v2", "", "   "])
def test_other_data_sets_are_not_found(name):
    assert cohorts(name) == []


@pytest.mark.parametrize("name", ["北京", "Ω", "—"])
def test_names_in_other_scripts_are_not_taken_for_one_another(name):
    cfg = PretrainedCfg(cohorts=(Cohort("上海", 1, 1), Cohort("Étude", 1, 1)))
    assert cohorts(name, model=cfg) == []
    assert cohorts("上海", model=cfg) == ["上海"]
    assert cohorts("", "/", " - ", model=cfg) == []


def test_model_without_recorded_cohorts_finds_nothing(small_model):
    assert cohorts("ADNI", "", model=small_model) == []
    assert cohorts("ADNI", model="vit_tiny_3d") == []


# --- What may be given ----------------------------------------------------------------------------


def test_model_is_an_encoder_a_cfg_or_a_name():
    encoder = brainfm.create_model("simclr_resnet18_3d")
    for model in (SIMCLR, encoder, "simclr_resnet18_3d", SIMCLR.name):
        assert cohorts("ADNI", "IXI", model=model) == ["ADNI"]


def test_network_without_a_cfg_finds_nothing():
    assert pretraining_overlap(nn.Linear(1, 1), "ADNI") == []


def test_unknown_model_is_an_error():
    with pytest.raises(brainfm.ModelNameError, match="did you mean"):
        pretraining_overlap("simclr_resnet18", "ADNI")


def test_folder_says_what_its_config_says(tmp_path, monkeypatch):
    monkeypatch.setattr("brainfm.hub.golden.compute", lambda model: None)
    overlay = {"cohorts": [{"name": "ADNI", "patients": 1, "scans": 2}]}
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    folder = brainfm.save_for_hub(model, tmp_path / "folder", pretrained_cfg_overlay=overlay)
    assert cohorts("ADNI2", model=f"local-dir:{folder}") == ["ADNI"]


def test_names_are_one_string_or_any_iterable_and_keep_their_order():
    names = ["SOOP", "IXI", "ADNI"]
    for given in (names, tuple(names), iter(names), dict.fromkeys(names)):
        assert [overlap.dataset for overlap in pretraining_overlap(SIMCLR, given)] == ["SOOP", "ADNI"]
    assert [overlap.dataset for overlap in pretraining_overlap(SIMCLR, "ADNI")] == ["ADNI"]
    assert pretraining_overlap(SIMCLR, []) == []


# --- Lists of scans -------------------------------------------------------------------------------


class Network(nn.Module):
    pretrained_cfg = SIMCLR


def named(*records):
    return [(overlap.dataset, overlap.cohort.name) for overlap in overlap_of_scans(Network(), records)]


@pytest.mark.parametrize(
    "column", ["dataset", "Dataset", "DATASET_ID", "data_set", "dataset name", "cohort", "Study", "project", "source"]
)
def test_column_that_names_the_data_set_is_read(column):
    assert named(ScanRecord("a.nii", extra={column: "ADNI3"})) == [("ADNI3", "ADNI")]


@pytest.mark.parametrize("column", ["label", "site", "group", "diagnosis", "comment"])
def test_other_columns_are_not_read(column):
    assert named(ScanRecord("a.nii", extra={column: "ADNI"})) == []


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/data/ADNI/sub-01/anat/a.nii.gz", ["ADNI"]),
        ("ds004889/sub-01/a.nii.gz", ["SOOP"]),
        ("/data/OpenBHB/a.nii", ["CoRR", "GSP"]),
        ("/data/IXI/ADNI.nii.gz", []),  # the file's own name is no data set
        ("/home/me/study/project/dataset/sub-01/anat/a.nii.gz", []),
        ("/data/IXI/derivatives/sub-ADNI01/a.nii.gz", []),
        ("a.nii", []),
        ("/a.nii", []),
        ("", []),
    ],
)
def test_folders_name_the_data_set(path, found):
    assert [cohort for _, cohort in named(ScanRecord(path))] == found


@pytest.mark.parametrize(
    "path",
    [
        "/data/mine/corr/sub-01.nii.gz",  # bias-corrected images
        "/mnt/dc1/mine/sub-01.nii.gz",  # the first data centre
        "/home/slim/mine/sub-01.nii.gz",  # a user
        "/data/ABIDE_II/NYU_1/sub-01.nii.gz",  # a site of another collection
    ],
)
def test_folder_whose_name_means_other_things_too_is_no_claim(path):
    """It may be asked for by name, but a folder is not a name that somebody gave to a data set."""
    assert named(ScanRecord(path)) == []


def test_each_data_set_is_found_once_whatever_the_number_of_scans():
    records = [ScanRecord(f"/data/ADNI/sub-{n}/a.nii", extra={"dataset": "ADNI"}) for n in range(50)]
    records += [ScanRecord(f"/data/SOOP/sub-{n}/a.nii", extra={"dataset": ""}) for n in range(50)]
    assert named(*records) == [("ADNI", "ADNI"), ("SOOP", "SOOP")]


def test_folders_of_every_channel_name_the_data_set():
    image = {"T1w": "/data/mine/a.nii", "FLAIR": "/data/ADNI/b.nii", "T2w": object()}
    assert named(ScanRecord(image)) == [("ADNI", "ADNI")]


def test_images_in_memory_have_no_folder():
    assert named(ScanRecord(object()), ScanRecord(object(), extra={"dataset": "ADNI"})) == [("ADNI", "ADNI")]
