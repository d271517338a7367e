"""Embeddings of patients over time, with reliabilities, slopes and events that were planted in them."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from click.testing import CliRunner

from brainfm.cli import main
from brainfm.downstream import progression
from brainfm.downstream.longitudinal import Visits, reliability
from brainfm.errors import TaskError
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings
from brainfm.table import read as read_table

PATIENTS, WIDTH = 80, 3
YEARS = (0.0, 0.1, 1.0, 2.0)  # the first two are a test and a retest


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Labels, and two tables of embeddings: one has the patients' slopes and hazards in it, the other is noise."""
    folder, draw = tmp_path_factory.mktemp("cohort"), np.random.default_rng(7)
    base, slope = draw.standard_normal((PATIENTS, WIDTH)), draw.standard_normal(PATIENTS)
    to_event = draw.exponential(10 / np.exp(3 * base[:, 0]))
    censored = draw.uniform(1, 20, PATIENTS)
    records, good, labels = [], [], [["participant_id", "scan_id", "years", "score", "age", "died", "followed"]]
    for patient in range(PATIENTS):
        for scan, years in enumerate(YEARS):
            moved = base[patient] + 0.5 * draw.standard_normal(WIDTH)  # ICC 1 / (1 + 0.25)
            moved[1] += 3 * slope[patient] * years
            good.append(moved)
            ids = [f"sub-{patient:02d}", f"ses-{scan}"]
            records.append(ScanRecord("", patient_id=ids[0], scan_id=ids[1]))
            outcome = [int(to_event[patient] < censored[patient]), min(to_event[patient], censored[patient])]
            score = 20 + 2 * slope[patient] * years + 0.1 * draw.standard_normal()
            labels.append([*ids, years, score, 60 + patient % 7, *(outcome if scan == 0 else ["", ""])])
    Embeddings(np.array(good, np.float32), records).save(folder / "good.csv")
    noise = draw.standard_normal((len(good), WIDTH)).astype(np.float32)
    Embeddings(noise, records).save(folder / "noise.csv")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(labels)
    return folder


@pytest.fixture(scope="module")
def results(cohort, tmp_path_factory):
    output = tmp_path_factory.mktemp("longitudinal")
    command = ["longitudinal", cohort / "labels.csv", "--embeddings", cohort / "good.csv", cohort / "noise.csv"]
    command += ["--time", "years", "--slope", "score", "--event", "died", "--duration", "followed"]
    command += ["--covariates", "age", "-o", output]
    with pytest.MonkeyPatch.context() as patch:  # one division and few resamples say the same, and faster
        patch.setattr(progression, "DIVISIONS", 1)
        patch.setattr(progression, "_RESAMPLES", 100)
        result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return output


def rows(folder, name):
    return list(csv.DictReader((folder / name).open(encoding="utf-8")))


def test_reliability_and_change_are_those_that_were_planted(results):
    good, noise = rows(results, "reliability.csv")
    assert (good["model"], good["patients"], good["pairs"], good["followed"]) == ("good", "80", "80", "80")
    assert float(good["icc_agreement"]) == pytest.approx(0.8, abs=0.08)
    assert float(good["icc_consistency"]) == pytest.approx(0.8, abs=0.08)
    assert float(good["within"]) == pytest.approx(0.5 / np.sqrt(1.25), abs=0.08)  # √0.5 of noise twice, of √2.5
    assert float(good["identified"]) > 0.06  # by chance one in 80
    assert float(noise["identified"]) < 0.06
    assert float(noise["icc_agreement"]) == pytest.approx(0, abs=0.15)
    assert float(good["years_to_floor"]) == pytest.approx(float(good["within"]) / float(good["change"]), rel=1e-2)


def test_change_tables_hold_the_slope_of_each_patient(cohort, results):
    change, scans = read_table(results / "change_good.csv"), read_table(cohort / "good.csv")
    assert [record.patient_id for record in change.records] == [f"sub-{n:02d}" for n in range(PATIENTS)]
    by_hand = np.polyfit(YEARS, scans.vectors[: len(YEARS)].astype(float), 1)[0]
    np.testing.assert_allclose(change.vectors[0], by_hand, rtol=1e-4)
    assert change.records[0].extra["years"] == "2"


def test_slopes_and_events_are_foretold_by_the_table_that_knows_them_alone(results):
    scores = {(s["task"], s["model"], s["features"], s["metric"]): s for s in rows(results, "scores.csv")}

    def value(*key):
        return float(scores[key]["value"])

    assert value("slope of score", "good", "change", "r2") > 0.8
    assert value("slope of score", "good", "baseline", "r2") < 0.3  # it is not in the first scan
    assert value("slope of score", "noise", "baseline + change", "r2") < 0.2
    assert value("slope of score", progression.CONTROL, "covariates", "r2") < 0.2
    told = value("time to died", "good", "baseline", "concordance")
    assert told > 0.7
    assert value("time to died", "noise", "baseline", "concordance") < told - 0.1
    assert value("time to died", progression.CONTROL, "covariates", "concordance") < told - 0.1
    one = scores["time to died", "good", "baseline", "concordance"]
    assert float(one["low"]) < float(one["value"]) < float(one["high"])
    assert int(one["events"]) > 20


def test_models_are_compared_by_a_mixed_model(results):
    found = {row["features"]: row for row in rows(results, "comparisons.csv")}
    assert set(found) == {"baseline", "change", "baseline + change"}
    change = found["change"]
    assert (change["first"], change["second"], change["patients"]) == ("good", "noise", "80")
    assert float(change["low"]) > 0
    assert float(change["p_holm"]) < 1e-4
    assert float(found["baseline"]["p_holm"]) > 0.01
    page = (results / "longitudinal.md").read_text(encoding="utf-8")
    assert "## Models against each other" in page
    assert "| good | 80 |" in page


def test_mixed_difference_is_that_of_the_paired_t_test():
    """With two errors a patient the model is the paired design, whose standard error is that of the differences."""
    draw = np.random.default_rng(0)
    patient = draw.standard_normal(60)
    first, second = patient + 0.3 * draw.standard_normal(60), patient + 0.2 + 0.3 * draw.standard_normal(60)
    difference, low, high, p_value = progression.mixed_difference(first, second)
    gaps = second - first
    assert difference == pytest.approx(gaps.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * gaps.std(ddof=1) / np.sqrt(60), rel=1e-2)
    assert 0 < p_value < 0.05
    assert progression.mixed_difference(first, first) == (0, 0, 0, 1)


def test_what_is_fitted_never_sees_whom_it_predicts():
    """Labels that are noise are not foretold, though there are more numbers than patients."""
    draw = np.random.default_rng(1)
    features, truth = draw.standard_normal((40, 200)), draw.standard_normal(40)
    guess = progression._out_of_fold(features, truth, 0)
    assert np.corrcoef(guess, truth)[0, 1] < 0.4
    risk = progression._risks(features, np.empty((40, 0)), draw.exponential(1, 40), np.ones(40), 0)
    assert progression._concordance(draw.exponential(1, 40), risk, np.ones(40), 0)[0] < 0.7


def test_concordance_is_that_of_every_pair_that_can_be_ordered():
    draw = np.random.default_rng(0)
    time, risk = draw.integers(1, 9, 60).astype(float), draw.integers(0, 5, 60).astype(float)
    event = (draw.random(60) < 0.6).astype(float)
    pairs = [(a, b) for a in range(60) for b in range(60) if event[a] and (time[a], -event[a]) < (time[b], -event[b])]
    right = np.mean([0.5 * (risk[a] == risk[b]) + (risk[a] > risk[b]) for a, b in pairs])
    value, low, high = progression._concordance(time, risk, event, 0)
    assert value == pytest.approx(right)
    assert low < value < high


def test_a_table_without_retests_says_so_and_patients_of_one_time_have_no_change():
    seen = Visits(["a", "b", "c"], [np.array([0, 1]), np.array([2]), np.array([3, 4])], np.array([0, 2, 0, 1, 1.0]))
    assert seen.followed == [0]
    found = reliability("m", np.random.default_rng(0).standard_normal((5, 3)), seen)
    assert (found.pairs, found.followed) == (1, 1)  # c was scanned twice in one day
    assert np.isnan(found.icc_agreement)
    assert found.change > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--time", "when"], "there is no column 'when'"),
        (["--time", "years", "--slope", "iq"], "there is no column 'iq'"),
        (["--time", "years", "--event", "died"], "--duration"),
        (["--time", "years", "--event", "score", "--duration", "followed"], "it is one a patient"),
        (["--time", "years", "--event", "age", "--duration", "followed"], "1 (it happened) or 0 (not yet)"),
    ],
)
def test_longitudinal_refuses_what_it_cannot_use(cohort, tmp_path, options, said):
    command = ["longitudinal", cohort / "labels.csv", "--embeddings", cohort / "good.csv", *options, "-o", tmp_path]
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 1
    assert said in result.output


def test_too_few_events_are_refused():
    nothing = progression.Known(Visits([], [], np.empty(0)), {"m": np.ones((30, 2))}, {}, np.empty((30, 0)))
    with pytest.raises(TaskError, match="5 patients had it; 10 are needed"):
        progression.predict_event("t", nothing, np.repeat([1.0, 0.0], [5, 25]), np.ones(30))
