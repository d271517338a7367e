"""The scripts of examples/cohorts, run on made-up files that have the cohorts' layout: empty images, small tables."""

import csv
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainfm.manifest import read_manifest

COHORTS = Path(__file__).parent.parent / "examples" / "cohorts"


def test_script_is_run_by_itself_from_any_folder(tmp_path):
    """The other tests run them in this process: another one takes seconds to import torch."""
    scans = prepared(tmp_path / "scans", [f"IXI{n:03d}-Guys-{700 + n:04d}-T1" for n in range(1, 41)])
    table = write_table(tmp_path / "IXI.csv", IXI_COLUMNS, [ixi_row(n, 1 + n % 2, 20 + n) for n in range(1, 41)])
    command = [sys.executable, str(COHORTS / "ixi.py"), str(table), str(scans), "-o"]
    done = subprocess.run([*command, "ixi.csv"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ixi.csv: 40 scans of 40 patients, of 40 scans found\n")
    assert len(read_manifest(tmp_path / "ixi.csv")) == 40


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process; gives its error, "" without one, and what it printed."""
    monkeypatch.syspath_prepend(str(COHORTS))

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        error = ""
        try:
            runpy.run_path(str(COHORTS / script), run_name="__main__")
        except SystemExit as stop:
            error = str(stop.code)
        return SimpleNamespace(error=error, said=capsys.readouterr().out)

    return call


def prepared(folder, names, mask=True):
    """What TurboPrep leaves, without content: the scripts read no image."""
    for name in names:
        place = folder / name
        place.mkdir(parents=True)
        (place / "normalized.nii.gz").touch()
        if mask:
            (place / "mask.nii.gz").touch()
    return folder


def write_table(path, header, rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def counts(records, *columns):
    """How many scans each split has, and where columns are named, each combination of their values."""
    return Counter(tuple(record.extra[name] for name in (*columns, "split")) for record in records)


# --- IXI ------------------------------------------------------------------------------------------

IXI_COLUMNS = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "WEIGHT", "ETHNIC_ID", "STUDY_DATE", "AGE"]


def ixi_row(number, sex, age):
    return [number, sex, 170, 70, 1, "2005-11-15", age]


@pytest.fixture
def ixi(tmp_path):
    """40 usable people, and one of each kind that is not: the folder, the rows of the table, and the output."""
    scans = prepared(tmp_path / "ixi", [f"IXI{n:03d}-Guys-{700 + n:04d}-T1" for n in range(1, 41)])
    prepared(scans, ["IXI002-HH-1999-T1"])  # a second scan of a patient
    prepared(scans, ["IXI100-Guys-0001-T1", "IXI101-HH-0002-T1", "IXI102-IOP-0003-T1", "IXI219-Guys-0894-T1"])
    prepared(scans, ["IXI103-HH-0004-T1"], mask=False)
    prepared(scans, ["phantom"])
    rows = [ixi_row(n, 1 + n % 2, 20 + n) for n in range(1, 41)]
    rows += [ixi_row(3, 0, 0), ixi_row(4, 1, 24)]  # a zeroed copy, and the same again
    rows += [ixi_row(100, 1, 0), ixi_row(101, 0, 30), ixi_row(103, 1, 30)]
    rows += [ixi_row(219, 1, 30), ixi_row(219, 1, 50), ixi_row(219, 1, 30)]
    rows += [ixi_row(500, 2, 60)]
    return scans, rows, tmp_path / "out" / "ixi.csv"


def test_ixi_joins_the_table_with_the_scans_and_says_what_was_left_out(ixi, tmp_path, run):
    scans, rows, output = ixi
    table = write_table(tmp_path / "IXI.csv", IXI_COLUMNS, rows)
    result = run("ixi.py", table, scans, "-o", output)
    assert result.error == ""

    records = read_manifest(output)
    assert output.read_text().splitlines()[:2] == [
        "image_path,mask_path,patient_id,scan_id,dataset,sex,age,split",
        "../ixi/IXI001-Guys-0701-T1/normalized.nii.gz,../ixi/IXI001-Guys-0701-T1/mask.nii.gz,"
        f"IXI001,Guys-0701,IXI,1,21,{records[0].extra['split']}",
    ]
    assert [record.patient_id for record in records] == [f"IXI{n:03d}" for n in range(1, 41)]
    assert all(Path(record.image).is_file() and Path(record.mask).is_file() for record in records)
    for n, record in enumerate(records, start=1):
        assert (record.extra["sex"], record.extra["age"]) == (str(n % 2), str(20 + n))
    assert counts(records, "sex") == {
        (sex, split): size for sex in "01" for split, size in (("train", 12), ("val", 4), ("test", 4))
    }

    said = result.said
    assert "40 scans of 40 patients, of 47 scans found" in said
    train_age = [int(record.extra["age"]) for record in records if record.extra["split"] == "train"]
    row = next(line.split() for line in said.splitlines() if line.startswith("train"))
    assert row == ["train", "24", "0.50", f"{sum(train_age) / 24:.2f}"]
    for line in (
        "left out 1: no IXI id in the folder's name (phantom)",
        "left out 1: no row in the table (IXI102-IOP-0003-T1)",
        "left out 1: age is missing, 0 or impossible (IXI100-Guys-0001-T1)",
        "left out 1: sex is missing or 0 (IXI101-HH-0002-T1)",
        "left out 1: several rows of the table that disagree (IXI219-Guys-0894-T1)",
        "left out 1: an earlier scan of the patient is used (IXI002-HH-1999-T1)",
        "left out 1: no mask.nii.gz (IXI103-HH-0004-T1)",
        "1 usable rows of the table have no scan (500)",
    ):
        assert line in said
    assert "warning" not in said  # IXI was not in the pretraining data


def test_ixi_split_follows_the_seed_and_what_it_is_stratified_by(ixi, tmp_path, run):
    scans, rows, output = ixi
    table = write_table(tmp_path / "IXI.csv", IXI_COLUMNS, rows)
    written = []
    for options in (["--stratify", "age"], ["--stratify", "age", "--seed", "1"]):
        assert run("ixi.py", table, scans, "-o", output, *options).error == ""
        written.append(read_manifest(output))
    first, second = ([record.extra["split"] for record in records] for records in written)
    assert first != second
    for splits in (first, second):  # people are numbered by age: fives of them are the bins
        assert [Counter(splits[n : n + 5]) for n in range(0, 40, 5)] == [{"train": 3, "val": 1, "test": 1}] * 8


def test_ixi_reads_the_table_as_excel(ixi, tmp_path, run):
    openpyxl = pytest.importorskip("openpyxl")
    scans, rows, output = ixi
    book = openpyxl.Workbook()
    for row in (IXI_COLUMNS, *rows):
        book.active.append(row)
    book.save(tmp_path / "IXI.xlsx")
    assert run("ixi.py", tmp_path / "IXI.xlsx", scans, "-o", output).error == ""
    from_excel = output.read_text()
    assert run("ixi.py", write_table(tmp_path / "IXI.csv", IXI_COLUMNS, rows), scans, "-o", output).error == ""
    assert output.read_text() == from_excel


def test_a_missing_reader_of_excel_is_named(ixi, tmp_path, run, monkeypatch):
    scans, _, output = ixi
    (tmp_path / "IXI.xls").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    monkeypatch.setitem(sys.modules, "xlrd", None)
    assert "xlrd is not installed; run: pip install xlrd; or save the table as CSV" in (
        run("ixi.py", tmp_path / "IXI.xls", scans, "-o", output).error
    )
    assert not output.exists()


def test_a_missing_column_is_named_beside_what_was_found(ixi, tmp_path, run):
    scans, rows, output = ixi
    table = write_table(tmp_path / "IXI.csv", ["IXI_ID", "SEX", "AGE"], [row[:3] for row in rows])
    result = run("ixi.py", table, scans, "-o", output)
    assert result.error == f"error: {table}: no column 'SEX_ID (1=m, 2=f)'; found: 'IXI_ID', 'SEX', 'AGE'"


# --- SOOP -----------------------------------------------------------------------------------------

SOOP_COLUMNS = ["participant_id", "sex", "age", "race", "acuteischaemicstroke", "priorstroke", "bmi", "nihss"]
SOOP_COLUMNS += ["gs_rankin_6isdeath", "etiology"]


def soop_row(number, nihss):
    return [f"sub-{number}", "F", "89+", "w", 1, 0, 22.1, nihss, "n/a", "2: Cardioembolism (e.g., recent MI)"]


def test_soop_keeps_patients_with_a_score_and_warns_of_the_pretraining(tmp_path, run):
    scans = prepared(tmp_path / "turboprep", [f"sub-{n}" for n in range(1, 31)])
    prepared(scans, ["sub-60/anat", "sub-61", "sub-62", "sub-63"])
    rows = [soop_row(n, n % 8) for n in range(1, 31)]
    rows += [soop_row(60, 42), soop_row(61, "n/a"), soop_row(62, 43), soop_row(70, 3), soop_row(71, "n/a")]
    table = write_table(tmp_path / "participants.tsv", SOOP_COLUMNS, rows, delimiter="\t")
    result = run("soop.py", table, scans, "-o", tmp_path / "soop.csv")
    assert result.error == ""

    records = read_manifest(tmp_path / "soop.csv")
    assert {record.patient_id: record.extra["nihss"] for record in records} == {
        f"sub-{n}": str(n % 8) for n in range(1, 31)
    } | {"sub-60": "42"}
    assert {(record.extra["age"], record.extra["sex"]) for record in records} == {("89", "F")}
    sizes = counts(records)
    assert sum(sizes.values()) == 31
    assert sizes[("train",)] in (18, 19)
    assert {sizes[("val",)], sizes[("test",)]} <= {6, 7}

    said = result.said
    assert "31 scans of 31 patients, of 34 scans found" in said
    for line in (
        "left out 1: no NIHSS (sub-61)",
        "left out 1: an NIHSS that is no whole number from 0 to 42 (sub-62)",
        "left out 1: no row in the table (sub-63)",
        "1 usable rows of the table have no scan (sub-70)",
        "SOOP: in the pretraining data (the same: SOOP, 1,102 patients",
        "may have been in pretraining",
    ):
        assert line in said


def test_a_folder_without_usable_scans_is_refused(tmp_path, run):
    table = write_table(tmp_path / "participants.tsv", SOOP_COLUMNS, [soop_row(1, "n/a")], delimiter="\t")
    scans = prepared(tmp_path / "turboprep", ["sub-1", "sub-2"])
    assert "none of 2 scans can be used (1: no NIHSS, such as sub-1; 1: no row in the table, such as sub-2)" in (
        run("soop.py", table, scans, "-o", tmp_path / "soop.csv").error
    )
    missing = tmp_path / "none"
    assert run("soop.py", table, missing, "-o", tmp_path / "soop.csv").error == f"error: {missing}: no such folder"
    assert (
        run("soop.py", missing, scans, "-o", tmp_path / "soop.csv").error
        == f"error: {missing}: no such file; check the path"
    )
    assert not (tmp_path / "soop.csv").exists()


# --- AIBL -----------------------------------------------------------------------------------------

AIBL_COLUMNS = ["RID", "SITEID", "VISCODE", "DXNORM", "DXCURREN"]


def aibl_row(rid, visit, diagnosis):
    return [rid, 2, visit, -4, diagnosis]


def test_aibl_has_the_split_of_the_paper_for_as_many_patients(tmp_path, run):
    healthy, ill = range(1, 485), range(501, 584)  # 53 + 215 + 216 and 53 + 15 + 15
    scans = prepared(tmp_path / "aibl", [f"sub-AIBL{rid}/ses-M000" for rid in (*healthy, *ill)])
    rows = [aibl_row(rid, "bl", 1) for rid in healthy] + [aibl_row(rid, "bl", 3) for rid in ill]
    write_table(tmp_path / "aibl_pdxconv_01-Jun-2018.csv", AIBL_COLUMNS, rows)
    assert run("aibl.py", tmp_path, scans, "-o", tmp_path / "aibl.csv").error == ""
    assert counts(read_manifest(tmp_path / "aibl.csv"), "ad") == {
        ("0", "train"): 53,
        ("1", "train"): 53,
        ("0", "val"): 215,
        ("1", "val"): 15,
        ("0", "test"): 216,
        ("1", "test"): 15,
    }


def test_aibl_takes_the_first_scan_with_a_diagnosis_at_its_visit(tmp_path, run):
    scans = prepared(tmp_path / "aibl", [f"sub-AIBL{rid}/ses-M{m:03d}" for rid in range(1, 13) for m in (0, 18)])
    prepared(scans, ["AIBL_20_bl", "AIBL_21_m36", "sub-AIBL22", "sub-AIBL23/ses-M054"])
    rows = [aibl_row(rid, visit, 1) for rid in range(1, 7) for visit in ("bl", "m18")]
    rows += [aibl_row(rid, visit, 3) for rid in range(7, 11) for visit in ("bl", "m18")]
    rows += [aibl_row(11, "bl", 2), aibl_row(11, "m18", 3)]  # MCI at first
    rows += [aibl_row(12, "bl", 1), aibl_row(12, "m18", 3)]  # healthy at first
    rows += [aibl_row(20, "bl", -4), aibl_row(21, "m36", 2), aibl_row(22, "bl", 1), aibl_row(23, "m72", 1)]
    table = write_table(tmp_path / "aibl_pdxconv_01-Jun-2018.csv", AIBL_COLUMNS, rows)
    people = [[rid, 2, 1 + rid % 2, f"/{1930 + rid}"] for rid in range(1, 11)] + [[11, 2, -4, -4]]
    write_table(tmp_path / "aibl_ptdemog_01-Jun-2018.csv", ["RID", "SITEID", "PTGENDER", "PTDOB"], people)
    result = run("aibl.py", table, scans, "-o", tmp_path / "aibl.csv", "--train-per-class", 3)
    assert result.error == ""

    records = {record.patient_id: record for record in read_manifest(tmp_path / "aibl.csv")}
    assert list(records) == [f"AIBL{rid}" for rid in range(1, 13)]
    assert (records["AIBL11"].scan_id, records["AIBL11"].extra["ad"]) == ("m18", "1")
    assert (records["AIBL12"].scan_id, records["AIBL12"].extra["ad"]) == ("bl", "0")
    about = {rid: (record.extra["birth_year"], record.extra["sex"]) for rid, record in records.items()}
    assert about["AIBL3"] == ("1933", "female")
    assert about["AIBL4"] == ("1934", "male")
    assert about["AIBL11"] == about["AIBL12"] == ("", "")
    assert Path(records["AIBL11"].image) == tmp_path / "aibl" / "sub-AIBL11" / "ses-M018" / "normalized.nii.gz"
    assert counts(records.values(), "ad") == {
        ("0", "train"): 3,
        ("0", "val"): 2,
        ("0", "test"): 2,
        ("1", "train"): 3,
        ("1", "val"): 1,
        ("1", "test"): 1,
    }
    for line in (
        "left out 11: an earlier scan of the patient is used",
        "left out 2: mild cognitive impairment at the scan's visit (AIBL_21_m36, sub-AIBL11/ses-M000)",
        "left out 1: no diagnosis at the scan's visit (AIBL_20_bl)",
        "left out 1: no AIBL id in the folder's name (sub-AIBL22)",
        "left out 1: no row in the table (sub-AIBL23/ses-M054)",
        "2 usable rows of the table have no scan (22 bl, 23 m72)",
    ):
        assert line in result.said

    before = (tmp_path / "aibl.csv").read_bytes()
    error = run("aibl.py", table, scans, "-o", tmp_path / "aibl.csv").error
    assert "7 healthy controls are too few for 53 in train" in error
    assert "--train-per-class" in error
    assert (tmp_path / "aibl.csv").read_bytes() == before
    assert not list(tmp_path.glob(".aibl*"))


# --- LDM 100k -------------------------------------------------------------------------------------

LDM_COLUMNS = ["participant_id", "age", "sex", "ventricular_volume", "brain_volume"]


@pytest.fixture
def ldm(tmp_path):
    """Six volumes without content, one of them without a number, and a row without a volume."""
    folder, names = tmp_path / "LDM_100k", [f"sub-{n:06d}" for n in range(6)]
    for name in names:
        place = folder / "rawdata" / name / "anat"
        place.mkdir(parents=True)
        (place / f"{name}_T1w.nii.gz").touch()
    rows = [[name, 0.1 * n, n % 2, 0.25, 0.5] for n, name in enumerate(names)]
    rows[5][3] = "n/a"
    write_table(folder / "participants.tsv", LDM_COLUMNS, [*rows, ["sub-000009", 0.5, 1, 0.5, 0.5]], delimiter="\t")
    return folder


def test_ldm100k_is_listed_as_synthetic(ldm, tmp_path, run):
    result = run("ldm100k.py", ldm, "-o", tmp_path / "lists" / "ldm100k.csv")
    assert result.error == ""
    records = read_manifest(tmp_path / "lists" / "ldm100k.csv")
    assert [record.patient_id for record in records] == [f"sub-{n:06d}" for n in range(5)]
    assert Path(records[3].image).resolve() == ldm / "rawdata" / "sub-000003" / "anat" / "sub-000003_T1w.nii.gz"
    assert records[1].extra == {
        **{"age": "0.1", "sex": "1", "ventricles": "0.25", "brain_volume": "0.5"},
        **{"dataset": "LDM 100k", "source": "synthetic"},
    }
    for line in (
        "5 synthetic volumes, drawn by a model and not of people",
        "left out 1: no volume of that name, such as sub-000009",
        "left out 1: a condition that is no number, such as sub-000005",
    ):
        assert line in result.said


def test_ldm100k_lists_prepared_scans_and_names_columns_it_does_not_know(ldm, tmp_path, run):
    for name in ("sub-000001", "sub-000002"):
        place = tmp_path / "prepared" / name
        place.mkdir(parents=True)
        for file in ("prep.json", "head.nii.gz"):
            (place / file).write_text("{}")
    output = tmp_path / "ldm100k.csv"
    assert run("ldm100k.py", ldm, "--prepared", tmp_path / "prepared", "-o", output).error == ""
    assert [Path(record.image).name for record in read_manifest(output)] == ["sub-000001", "sub-000002"]
    write_table(
        ldm / "participants.tsv", ["participant_id", "age", "sex", "brain_a", "brain_b"], [["a", 1, 1, 1, 1]], "\t"
    )
    error = run("ldm100k.py", ldm, "-o", output).error
    assert "no column of ventricles; found: participant_id, age, sex, brain_a, brain_b" in error
    assert len(read_manifest(output)) == 2


@pytest.mark.parametrize("name", ["ixi", "soop", "aibl", "ldm100k", "adni", "oasis"])
def test_each_page_names_its_script_and_says_what_it_was_tested_on(name):
    page = (COHORTS / f"{name}.md").read_text(encoding="utf-8")
    assert f"python examples/cohorts/{name}.py" in page
    assert f"-o {name}.csv" in page
    assert "made-up files" in page
    assert "never on the real cohort" in page


# --- ADNI -----------------------------------------------------------------------------------------

ADNI_COLUMNS = ["RID", "PTID", "VISCODE", "SITE", "EXAMDATE", "DX_bl", "AGE", "PTGENDER", "DX", "Years_bl"]


def adni_row(number, visit, diagnosis, years=0.0, date="2006-01-10"):
    sex = ("Male", "Female")[number % 2]
    return [number, f"011_S_{number:04d}", visit, number % 3, date, "CN", 60 + number, sex, diagnosis, years]


@pytest.fixture
def adni(tmp_path):
    """24 people, normal and demented in turn, and one of each kind that cannot be used."""
    rows = [adni_row(n, "bl", ("CN", "Dementia")[n % 2]) for n in range(24)]
    rows += [adni_row(0, "m06", "Dementia", 0.5, "2006-07-10"), adni_row(30, "bl", "MCI"), adni_row(31, "bl", "")]
    names = [f"sub-ADNI011S{n:04d}/ses-M000" for n in (*range(24), 30, 31)]
    scans = prepared(tmp_path / "scans", [*names, "sub-ADNI011S0000/ses-M006", "011_S_0040_m12", "phantom"])
    return scans, write_table(tmp_path / "ADNIMERGE.csv", ADNI_COLUMNS, rows), tmp_path / "adni.csv"


def test_adni_takes_the_first_diagnosis_of_each_and_says_what_was_left_out(adni, run):
    scans, table, output = adni
    result = run("adni.py", table, scans, "-o", output)
    assert result.error == ""
    records = read_manifest(output)
    assert [record.extra["ad"] for record in records] == ["0", "1"] * 12
    assert records[3].extra | {"split": ""} == {
        **{"dataset": "ADNI", "ad": "1", "age": "63.00", "sex": "female", "site": "0", "split": ""}
    }
    assert records[0].scan_id == "bl"
    sizes = counts(records, "ad")
    assert sizes["0", "train"] == sizes["1", "train"] == 7
    assert {sizes[label, split] for label in "01" for split in ("val", "test")} <= {2, 3}
    for line in (
        "left out 1: mild cognitive impairment at the scan's visit (sub-ADNI011S0030/ses-M000)",
        "left out 1: no diagnosis at the scan's visit (sub-ADNI011S0031/ses-M000)",
        "left out 1: an earlier scan of the patient is used (sub-ADNI011S0000/ses-M006)",
        "left out 1: no row in the table (011_S_0040_m12)",
        "left out 1: no ADNI id in the folder's name (phantom)",
    ):
        assert line in result.said
    assert "warning: for simclr_resnet18_3d.kaczmarek2025" in result.said  # ADNI was in its pretraining data


def test_adni_gives_the_age_of_the_normal_alone(adni, run):
    scans, table, output = adni
    assert run("adni.py", table, scans, "-o", output, "--label", "age").error == ""
    records = read_manifest(output)
    assert [float(record.extra["age"]) for record in records] == [60 + n for n in range(0, 24, 2)]
    assert set(records[0].extra) == {"dataset", "age", "sex", "site", "split"}


def test_adni_takes_diagnoses_of_dxsum_and_visits_of_mrilist(adni, tmp_path, run):
    scans, table, output = adni
    dxsum = write_table(
        tmp_path / "DXSUM.csv",
        ["RID", "PTID", "VISCODE", "VISCODE2", "DIAGNOSIS"],
        [[n, f"011_S_{n:04d}", "v01", "sc" if n == 0 else "bl", 3 - 2 * (n % 2)] for n in range(24)],
    )
    assert run("adni.py", table, scans, "-o", output, "--dxsum", dxsum).error == ""
    assert [record.extra["ad"] for record in read_manifest(output)] == ["1", "0"] * 12  # the other way round

    images = prepared(tmp_path / "images", [f"011_S_{n:04d}/MPRAGE/I{100 + n}" for n in range(24)])
    dates = ["7/1/2006" if n == 0 else "2009-01-01" if n == 1 else "1/20/2006" for n in range(24)]
    mrilist = write_table(
        tmp_path / "MRILIST.csv",
        ["TYPE", "SUBJECT", "VISIT", "SCANDATE", "IMAGEUID"],
        [["MRI", f"011_S_{n:04d}", "x", dates[n], 100 + n] for n in range(24)],
    )
    assert run("adni.py", table, images, "-o", output, "--mrilist", mrilist).error == ""
    records = {record.patient_id: record for record in read_manifest(output)}
    assert (records["011_S_0000"].scan_id, records["011_S_0000"].extra["ad"]) == ("m06-I100", "1")
    assert "011_S_0001" not in records  # three years from any visit
    assert len(records) == 23


# --- OASIS ----------------------------------------------------------------------------------------


def test_oasis_1_is_labelled_by_the_rating_and_leaves_out_who_has_none(tmp_path, run):
    names = [f"OAS1_{n:04d}_MR1" for n in range(1, 21)]
    scans = prepared(tmp_path / "scans", [*names, "OAS1_0001_MR2", "OAS1_0030_MR1"])
    header = ["ID", "M/F", "Hand", "Age", "Educ", "SES", "MMSE", "CDR", "eTIV", "nWBV", "ASF", "Delay"]
    ratings = ["0", "0.5", "0", "1"] * 5
    rows = [[name, "MF"[n % 2], "R", 60 + n, 2, 3, 29, ratings[n], 1500, 0.7, 1, "N/A"] for n, name in enumerate(names)]
    rows += [["OAS1_0001_MR2", "M", "R", 60, 2, 3, 29, "0", 1500, 0.7, 1, 3]]
    rows += [["OAS1_0030_MR1", "F", "R", 22, "", "", "", "", 1500, 0.8, 1, "N/A"]]
    table = write_table(tmp_path / "oasis_cross-sectional.csv", header, rows)
    result = run("oasis.py", table, scans, "-o", tmp_path / "oasis.csv")
    assert result.error == ""
    records = read_manifest(tmp_path / "oasis.csv")
    assert [record.patient_id for record in records] == [name[:9] for name in names]
    assert [record.extra["ad"] for record in records] == ["0", "1"] * 10
    assert records[1].extra | {"split": ""} == {
        **{"dataset": "OASIS-1", "ad": "1", "age": "61", "sex": "female", "split": ""}
    }
    assert "left out 1: no Clinical Dementia Rating (OAS1_0030_MR1)" in result.said
    assert "left out 1: an earlier scan of the patient is used (OAS1_0001_MR2)" in result.said


@pytest.mark.parametrize("earlier", [False, True])
def test_oasis_3_is_labelled_by_the_visit_nearest_to_the_scan(tmp_path, run, earlier):
    header = ["OASISID", "OASIS_session_label", "days_to_visit", "age at visit", "CDRTOT", "dx1"]
    if earlier:
        header = ["Subject", "ADRC_ADRCCLINICALDATA ID", "days", "ageAtEntry", "cdr", "dx1"]
    rows, names = [], []
    for n in range(20):
        patient, ill = f"OAS3{n:04d}", n % 2
        told = (1, "AD Dementia") if ill else (0, "Cognitively normal")
        rows += [[patient, f"{patient}_UDSb4_d0000", 0, 70, 0.5, "uncertain dementia"]]
        rows += [[patient, f"{patient}_UDSb4_d0731", 731, 70 if earlier else 72, *told]]
        names += [f"{patient}_MR_d0600" if n % 3 else f"sub-{patient}/ses-d0600"]
    rows += [["OAS31000", "OAS31000_UDSb4_d0000", 0, 70, 0, "Cognitively normal"]]
    names += ["OAS31000_MR_d2000", "OAS30003_MR_d0010"]
    table = write_table(tmp_path / "cdr.csv", header, rows)
    assert run("oasis.py", table, prepared(tmp_path / "scans", names), "-o", tmp_path / "oasis.csv").error == ""
    records = read_manifest(tmp_path / "oasis.csv")
    assert [record.extra["ad"] for record in records] == ["0", "1"] * 10
    assert {record.extra["age"] for record in records} == {"72.00"}
    assert {record.scan_id for record in records} == {"d0600"}


def test_oasis_refuses_a_table_that_is_neither(tmp_path, run):
    table = write_table(tmp_path / "other.csv", ["ID", "Age"], [["OAS1_0001_MR1", 60]])
    said = run("oasis.py", table, prepared(tmp_path / "scans", ["OAS1_0001_MR1"]), "-o", tmp_path / "o.csv").error
    assert "neither OASIS-1's table (ID, M/F, Age, CDR) nor OASIS-3's" in said


# --- ABIDE I, ADHD-200, OpenBHB, CNP, PPMI, HCP: hashed splits ---------------------------------------


def split_of(records):
    return {record.patient_id: record.extra["split"] for record in records}


def test_abide1_is_joined_by_padded_ids_and_its_split_hangs_on_the_patient_alone(tmp_path, run):
    header = ["SITE_ID", "SUB_ID", "DX_GROUP", "DSM_IV_TR", "AGE_AT_SCAN", "SEX", "HANDEDNESS_CATEGORY", "FIQ"]
    rows = [["PITT", 50002 + n, 1 + n % 2, 1, 10 + n, 1 + n % 2, "R", -9999] for n in range(60)]
    rows += [["PITT", 50900, 2, 0, -9999, 1, "R", 100], ["PITT", 50901, "", 0, 12, 1, "R", 100]]
    table = write_table(tmp_path / "Phenotypic_V1_0b.csv", header, rows)
    names = [f"Pitt/sub-{50002 + n:07d}/anat" for n in range(60)]
    scans = prepared(tmp_path / "scans", [*names, "Pitt/sub-0050900", "Pitt/sub-0050901", "Pitt/sub-0059999"])
    result = run("abide1.py", table, scans, "-o", tmp_path / "abide1.csv")
    assert result.error == ""
    records = read_manifest(tmp_path / "abide1.csv")
    assert len(records) == 61
    assert records[0].patient_id == "sub-0050002"
    wanted = {"dataset": "ABIDE I", "asd": "1", "age": "10.00", "sex": "male", "site": "PITT"}
    assert {name: records[0].extra[name] for name in wanted} == wanted
    assert records[-1].extra["age"] == ""
    assert "left out 1: no diagnostic group (Pitt/sub-0050901)" in result.said
    assert "left out 1: no row in the table (Pitt/sub-0059999)" in result.said
    whole = split_of(records)
    assert set(whole.values()) == {"train", "val", "test"}

    few = prepared(tmp_path / "few", names[::2])  # whoever has half of the scans has the same patients in test
    assert run("abide1.py", table, few, "-o", tmp_path / "few.csv").error == ""
    half = split_of(read_manifest(tmp_path / "few.csv"))
    assert half == {patient: whole[patient] for patient in half}
    assert run("abide1.py", table, scans, "-o", tmp_path / "abide1.csv", "--seed", "1").error == ""
    assert split_of(read_manifest(tmp_path / "abide1.csv")) != whole


def test_adhd200_keeps_the_holdout_of_the_competition(tmp_path, run):
    header = ["participant_id", "gender", "age", "handedness", "dx", "secondary_dx "]
    kinds = ["Typically Developing Children", "ADHD-Combined", "ADHD-Inattentive"]
    for site in ("NYU", "KKI"):
        (tmp_path / "raw" / site).mkdir(parents=True)
        first = 10001 + 1000 * (site == "KKI")
        rows = [[first + n, "Female", 9.5, "L", kinds[n % 3], ""] for n in range(30)]
        rows += [rows[0], [first + 40, "Male", -999, "R", "pending", ""]]
        write_table(tmp_path / "raw" / site / "participants.tsv", header, rows, delimiter="\t")
    (tmp_path / "raw" / "Brown").mkdir()
    write_table(
        tmp_path / "raw" / "Brown" / "participants.tsv", ["participant_id", "age"], [[26001, 9]], delimiter="\t"
    )
    names = [f"NYU/sub-{10001 + n:07d}/ses-1" for n in range(30)] + [
        f"KKI/sub-{11001 + n:07d}/ses-1" for n in range(30)
    ]
    scans = prepared(
        tmp_path / "scans", [*names, "NYU/sub-0010001/ses-2", "NYU/sub-0010041/ses-1", "Brown/sub-0026001"]
    )
    test = write_table(tmp_path / "test.csv", ["ID", "Site", "DX"], [[11001 + n, 3, 0] for n in range(10)])
    output = tmp_path / "adhd200.csv"
    assert run("adhd200.py", tmp_path / "raw", scans, "-o", output, "--test-set", test).error == ""
    records = read_manifest(output)
    assert len(records) == 60
    assert {p for p, split in split_of(records).items() if split == "test"} == {
        f"sub-{11001 + n:07d}" for n in range(10)
    }
    assert [record.extra["adhd"] for record in records[:3]] == ["0", "1", "1"]
    assert (records[0].extra["site"], records[0].extra["sex"], records[0].scan_id) == ("NYU", "female", "ses-1")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no site in it has a participants.tsv" in run("adhd200.py", empty, scans, "-o", output).error


def test_openbhb_keeps_the_challenge_s_test_sets(tmp_path, run):
    header = ["participant_id", "study", "sex", "age", "site", "diagnosis", "tiv", "magnetic_field_strength", "split"]
    parts = ["train"] * 3 + ["internal_test", "external_test"]
    rows = [
        [f"{100000000000 + n}", n % 10, ["male", "female"][n % 2], 20.5 + n, n % 7, "control", 1400, 3.0, parts[n % 5]]
        for n in range(60)
    ]
    rows.append(["200000000000", 1, "male", "", 1, "control", 1400, 3.0, "train"])
    table = write_table(tmp_path / "participants.tsv", header, rows, delimiter="\t")
    scans = prepared(tmp_path / "scans", [f"train/sub-{row[0]}/ses-1" for row in rows])
    assert run("openbhb.py", table, scans, "-o", tmp_path / "openbhb.csv").error == ""
    records = read_manifest(tmp_path / "openbhb.csv")
    assert len(records) == 60
    for record in records:
        assert (record.extra["split"] == "test") == record.extra["official"].endswith("test")
    assert {record.extra["split"] for record in records} == {"train", "val", "test"}
    assert (records[1].extra["age"], records[1].extra["sex"], records[1].extra["site"]) == ("21.5", "1", "1")


def test_cnp_has_four_diagnoses_or_one_against_the_controls(tmp_path, run):
    header = ["participant_id", "diagnosis", "age", "gender", "bart", "T1w", "ScannerSerialNumber", "ghost_NoGhost"]
    kinds = ["CONTROL", "SCHZ", "BIPOLAR", "ADHD"]
    rows = [[f"sub-{10159 + n}", kinds[n % 4], 30, "MF"[n % 2], 1, 1, "35343.0", "No_ghost"] for n in range(60)]
    table = write_table(tmp_path / "participants.tsv", header, rows, delimiter="\t")
    scans = prepared(tmp_path / "scans", [row[0] for row in rows])
    output = tmp_path / "cnp.csv"
    assert run("cnp.py", table, scans, "-o", output).error == ""
    records = read_manifest(output)
    assert [record.extra["diagnosis"] for record in records[:4]] == ["0", "3", "2", "1"]
    assert (records[0].extra["site"], records[0].extra["sex"]) == ("35343", "male")
    assert run("cnp.py", table, scans, "-o", output, "--label", "schz").error == ""
    assert [record.extra["schz"] for record in read_manifest(output)] == ["0", "1"] * 15


def test_ppmi_is_of_parkinsons_and_controls_and_takes_the_first_visit(tmp_path, run):
    header = ["PATNO", "COHORT", "COHORT_DEFINITION", "ENROLL_DATE", "ENROLL_STATUS", "ENROLL_AGE", "CONCOHORT"]
    kinds = ["Parkinson's Disease", "Healthy Control"]
    rows = [[3000 + n, 1 + n % 2, kinds[n % 2], "01/2011", "Enrolled", 61.25, 1] for n in range(60)]
    rows += [[40001, 4, "Prodromal", "01/2015", "Enrolled", 65, ""], [3900, 3, "SWEDD", "01/2011", "Enrolled", 60, ""]]
    table = write_table(tmp_path / "Participant_Status_01Jan2026.csv", header, rows)
    people = write_table(tmp_path / "Demographics.csv", ["PATNO", "SEX"], [[3000 + n, n % 2] for n in range(60)])
    names = [f"sub-{3000 + n}/ses-BL" for n in range(60)]
    scans = prepared(tmp_path / "scans", [*names, "sub-3000/ses-V04", "sub-40001/ses-BL", "sub-3900"])
    output = tmp_path / "ppmi.csv"
    assert run("ppmi.py", table, scans, "-o", output, "--demographics", people).error == ""
    records = read_manifest(output)
    assert [record.extra["pd"] for record in records] == ["1", "0"] * 30
    assert (records[0].scan_id, records[0].extra["age"], records[0].extra["sex"]) == ("ses-BL", "61.2", "female")


def test_hcp_keeps_families_together_and_says_when_it_cannot(tmp_path, run):
    rows = [[100206 + n, "S1200", "Q1", "MF"[n % 2], "26-30"] for n in range(90)]
    table = write_table(tmp_path / "unrestricted.csv", ["Subject", "Release", "Acquisition", "Gender", "Age"], rows)
    told = [[100206 + n, 22 + n % 14, f"F{n // 3}", ""] for n in range(90)]
    restricted = write_table(tmp_path / "RESTRICTED.csv", ["Subject", "Age_in_Yrs", "Family_ID", "ZygositySR"], told)
    scans = prepared(tmp_path / "scans", [str(row[0]) for row in rows])
    output = tmp_path / "hcp.csv"
    assert run("hcp.py", table, scans, "-o", output, "--restricted", restricted).error == ""
    splits = [record.extra["split"] for record in read_manifest(output)]
    assert all(len(set(splits[n : n + 3])) == 1 for n in range(0, 90, 3))
    assert set(splits) == {"train", "val", "test"}
    assert run("hcp.py", table, scans, "-o", output, "--restricted", restricted, "--label", "age").error == ""
    assert [record.extra["age"] for record in read_manifest(output)[:2]] == ["22", "23"]
    assert "is restricted data of HCP" in run("hcp.py", table, scans, "-o", output, "--label", "age").error
    result = run("hcp.py", table, scans, "-o", output)
    assert "brothers and sisters may be in different parts" in result.said
    alone = [record.extra["split"] for record in read_manifest(output)]
    assert any(len(set(alone[n : n + 3])) > 1 for n in range(0, 90, 3))


def test_hashed_parts_are_the_same_on_every_machine(monkeypatch):
    """Numbers that were written down once: a change of the hash would be another split under the same name."""
    monkeypatch.syspath_prepend(str(COHORTS))
    from _common import hashed_split, split_hash

    from brainfm.manifest import ScanRecord

    records = [ScanRecord(f"{n}.nii", patient_id=f"sub-{n:04d}") for n in range(1000)]
    splits = hashed_split("made up", records)
    assert split_hash(records, splits) == "151eeaf59767"
    shares = Counter(splits)
    assert shares["train"] == pytest.approx(600, abs=40)
    assert shares["test"] == pytest.approx(200, abs=35)


def test_each_page_says_which_weights_saw_the_cohort():
    """The list of each page in docs/cohorts is that of `pretraining_overlap`."""
    import re

    import brainfm

    pages = sorted((COHORTS.parent.parent / "docs" / "cohorts").glob("*.md"))
    names = [page.stem for page in pages if page.stem != "index"]
    assert names == sorted({"abide1", "adhd200", "cnp", "hcp", "openbhb", "ppmi"})
    for page in pages:
        if page.stem == "index":
            continue
        text = page.read_text(encoding="utf-8")
        (asked,) = re.findall(r'pretraining_overlap\(model, "(.+?)"\)', text)
        found = [name for name in brainfm.list_pretrained() if brainfm.pretraining_overlap(name, asked)]
        said = text.partition("## Which weights saw it")[2].partition("\n## ")[0]
        assert re.findall(r"`([a-z0-9_]+\.[a-z0-9_]+)`", said) == found, page.name
        assert "**Who may get it.**" in text
        assert "Licence" in text
