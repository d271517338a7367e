"""Harmonisation: ComBat's published numbers, fitted without the test part, and what it does to a planted site."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from brainfm.downstream.harmonisation import Harmoniser
from brainfm.downstream.plan import Plan
from brainfm.errors import BrainfmError
from brainfm.manifest import ScanRecord
from brainfm.table import Embeddings

pytestmark = pytest.mark.usefixtures("few_strengths")
PEOPLE, WIDTH = 240, 6


@pytest.fixture
def planted():
    """Two sites that shift and widen three dimensions; one dimension that says the label, of which a site has more."""
    draws = np.random.default_rng(0)
    site = draws.integers(0, 2, PEOPLE)
    label = (draws.random(PEOPLE) < np.array([0.4, 0.6])[site]).astype(int)
    vectors = draws.standard_normal((PEOPLE, WIDTH))
    vectors[:, 0] += 2 * label
    vectors[:, 1:4] = vectors[:, 1:4] * np.array([1, 2])[site][:, None] + 3 * site[:, None]
    return vectors.astype(np.float32), label, site


@pytest.fixture
def folder(planted, tmp_path):
    """A table of embeddings, and one of labels."""
    vectors, label, site = planted
    names = [f"sub-{n:03}" for n in range(PEOPLE)]
    Embeddings(vectors, [ScanRecord(f"{name}.nii", None, name) for name in names]).save(tmp_path / "vectors.npz")
    people = {"participant_id": names, "sex": np.array(["F", "M"])[label], "site": np.array(["here", "there"])[site]}
    pd.DataFrame(people).to_csv(tmp_path / "people.csv", index=False)
    return tmp_path


def probed(run, folder, output, *more):
    tables = ("--embeddings", folder / "vectors.npz", "--label", "sex", "--no-controls", "-o", output)
    return run("probe", folder / "people.csv", *tables, *more)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_combat_gives_neurocombats_numbers():
    """Those of neuroCombat 0.2.12 on the same rows, with a covariate; and each row for itself, as new rows are."""
    draws = np.random.default_rng(1)
    site, age = np.repeat([0, 1, 2], [8, 6, 6]), np.round(draws.normal(50, 10, 20))
    features = draws.normal(size=(20, 4)) * np.array([1, 2, 0.5])[site][:, None] + site[:, None] + 0.05 * age[:, None]
    rows = np.hstack([features, site[:, None], age[:, None]])
    fitted = Harmoniser("combat", 1).fit(rows)
    found = fitted.transform(rows)
    np.testing.assert_allclose(found[[0, 9, 19]], np.loadtxt(io.StringIO(NEUROCOMBAT)), atol=2e-4)
    np.testing.assert_allclose(np.concatenate([fitted.transform(row[None]) for row in rows]), found, rtol=1e-10)


NEUROCOMBAT = """
3.80466 3.11033 4.79344 4.73212
4.71648 3.42331 1.93350 3.00076
2.63273 3.56208 2.10519 3.81434
"""


def test_covbat_takes_away_a_sites_covariance_which_combat_leaves():
    draws = np.random.default_rng(2)
    site = np.repeat([0, 1], 400)
    common, own = draws.standard_normal((800, 1)), draws.standard_normal((800, 5))
    features = np.where(site[:, None] == 1, 0.8 * common + 0.6 * own, own)  # as wide, but the dimensions go together
    rows = np.hstack([features, site[:, None]])

    def between(found):
        pairs = [np.corrcoef(found[site == n], rowvar=False)[np.triu_indices(5, 1)].mean() for n in (0, 1)]
        return abs(pairs[0] - pairs[1])

    combat, covbat = (Harmoniser(how).fit(rows).transform(rows) for how in ("combat", "covbat"))
    assert between(combat) > 0.5
    assert between(covbat) < 0.25
    scores = PCA(1).fit_transform((combat - combat.mean(axis=0)) / combat.std(axis=0))[:, 0]
    assert scores[site == 1].std() > 1.5 * scores[site == 0].std()
    scores = PCA(1).fit(combat).transform(covbat)[:, 0]
    assert scores[site == 1].std() == pytest.approx(scores[site == 0].std(), rel=0.02)


def test_sites_that_were_not_fitted_stay_as_they_are(planted):
    vectors, _, site = planted
    rows = np.hstack([vectors, site[:, None]])
    strange = np.array([[*vectors[0], 7], [*vectors[0], -1], [*vectors[0], 0]])
    found = Harmoniser().fit(np.vstack([rows, strange[:1]])).transform(strange)
    np.testing.assert_array_equal(found[0], vectors[0])
    np.testing.assert_array_equal(found[1], vectors[0])
    assert np.abs(found[2] - vectors[0]).max() > 0.1


@pytest.mark.parametrize("method", ["combat", "covbat", "covbat-noeb"])
def test_planted_site_falls_to_chance_and_the_label_does_not(method, run, folder):
    result = probed(run, folder, folder / "out", "--harmonise", method, "--site", "site", "--seeds", 2)
    assert result.code == 0, result.said
    for row in rows_of(folder / "out" / "harmonisation.csv"):
        assert float(row["site_before"]) > 0.85
        assert float(row["site_after_ci_low"]) <= float(row["chance"]) == 0.5
        assert float(row["site_after"]) < 0.65
    auc = {}
    for row in rows_of(folder / "out" / "results.csv"):
        if row["metric"] == "auc":
            auc.setdefault(row["mode"], []).append(float(row["value"]))
    assert min(auc[f"probe+{method}"]) > 0.8
    evaluation = json.loads((folder / "out" / "grid.json").read_text())
    pair, over_splits = evaluation["tests"]
    assert over_splits["test"] == "corrected resampled t-test"
    assert (pair["first"].endswith(f"/probe+{method}"), pair["second"].endswith("/probe")) == (True, True)
    name = {"combat": "ComBat", "covbat": "CovBat", "covbat-noeb": "CovBat without empirical Bayes"}[method]
    page = (folder / "out" / "index.html").read_text()
    for text in (f"linear probe, after {name}", "<h2>Sites</h2>", f"{name} protects no covariate"):
        assert text in page


def test_harmonisation_is_fitted_on_training_rows_alone_in_every_fold(run, folder, planted, monkeypatch):
    """Every fit, of the inner folds too, is looked at: none has seen a row of validation or test."""
    seen = []
    fit = Harmoniser.fit
    monkeypatch.setattr(Harmoniser, "fit", lambda self, rows, labels=None: seen.append(rows) or fit(self, rows, labels))
    assert probed(run, folder, folder / "out", "--harmonise", "combat", "--site", "site", "--seeds", 1).code == 0
    split = [row["split"] for row in rows_of(folder / "out" / "splits" / "sex.0.csv")]
    part = {vector.tobytes(): name for vector, name in zip(planted[0].astype(np.float64), split, strict=True)}

    def parts_of(rows):
        return [part[row[:WIDTH].tobytes()] for row in np.ascontiguousarray(rows)]

    parts = [parts_of(rows) for rows in seen]
    assert {name for names in parts for name in names} == {"train"}
    assert len(seen) > 10
    assert min(map(len, parts)) < split.count("train") == max(map(len, parts))
    Harmoniser().fit(np.hstack([planted[0], planted[2][:, None]]).astype(np.float64))  # a leak, put in on purpose
    assert set(parts_of(seen[-1])) == {"train", "val", "test"}


def test_test_part_changes_nothing_of_what_is_fitted(run, folder, planted):
    """Other embeddings of the test part: the same harmonisation and probe, by the predictions of the other rows."""
    args = ("--harmonise", "combat", "--site", "site", "--seeds", 1)
    assert probed(run, folder, folder / "first", *args).code == 0
    split = np.array([row["split"] for row in rows_of(folder / "first" / "splits" / "sex.0.csv")])
    vectors = planted[0].copy()
    moved = np.flatnonzero(split == "test")[1:]
    vectors[moved] = 100 * vectors[moved][:, ::-1] + 7
    names = [f"sub-{n:03}" for n in range(PEOPLE)]
    Embeddings(vectors, [ScanRecord(f"{name}.nii", None, name) for name in names]).save(folder / "vectors.npz")
    assert probed(run, folder, folder / "second", *args).code == 0
    first, second = (
        [row["prediction"] for row in rows_of(folder / where / "predictions.csv") if row["mode"] == "probe+combat"]
        for where in ("first", "second")
    )
    assert first[0] == second[0]
    assert first[1:] != second[1:]


def test_site_that_training_does_not_have_is_left_and_counted(run, folder):
    people = pd.read_csv(folder / "people.csv", dtype=str)
    people.loc[:3, "site"] = ["elsewhere", "elsewhere", "", "n/a"]
    people["split"] = ["test"] * 4 + [("train", "train", "train", "val", "test")[n % 5] for n in range(PEOPLE - 4)]
    people.to_csv(folder / "people.csv", index=False)
    assert probed(run, folder, folder / "out", "--harmonise", "combat", "--site", "site", "--seeds", 1).code == 0
    [row] = rows_of(folder / "out" / "harmonisation.csv")
    assert (row["sites"], row["left_as_they_are_train"], row["left_as_they_are_test"]) == ("2", "0", "4")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--harmonise", "combat"), "by which column? Say --site COLUMN"),
        (("--site", "site"), "what for? Say --harmonise combat or covbat"),
        (("--harmonise", "combat", "--site", "scanner"), "--site scanner: there is no such column; it has"),
        (("--harmonise", "combat", "--site", "sex"), "is what is to be predicted"),
        (("--harmonise", "longcombat", "--site", "site"), "no patient has two training scans"),
        (("--harmonise", "zscore", "--site", "site"), "there are combat, covbat, longcombat, longcovbat"),
        (("--harmonise", "combat", "--site", "one"), "one has 1 values with 5 training scans or more"),
        (
            ("--harmonise", "combat", "--site", "site", "--covariates", "again"),
            "the covariates again tell site, or one another, exactly",
        ),
    ],
)
def test_what_cannot_be_harmonised_is_refused_by_name(more, message, run, folder):
    people = pd.read_csv(folder / "people.csv")
    people.assign(one="x", again=people["site"]).to_csv(folder / "people.csv", index=False)
    result = probed(run, folder, folder / "out", "--seeds", 1, *more)
    assert result.code == 1
    assert message in result.said


def test_site_that_is_held_out_and_fine_tuning_are_refused_by_name(run, folder):
    people = pd.read_csv(folder / "people.csv")
    people["split"] = np.where(people["site"] == "there", "test", np.where(np.arange(PEOPLE) % 4, "train", "val"))
    people["site"] = people["site"].where(people["site"] == "there", np.arange(PEOPLE) % 2)
    people.to_csv(folder / "people.csv", index=False)
    result = probed(run, folder, folder / "out", "--harmonise", "combat", "--site", "site")
    assert "no scan of the test part is of a site that is in training" in result.said
    with pytest.raises(BrainfmError, match="fine-tuned: learns from scans, and has no embeddings that stay as they"):
        Plan(models=("test_vit_3d",), modes=("finetune",), harmonise="combat", site="site")


def test_covariates_are_protected(planted):
    """A dimension that follows age, of which one site has more: unprotected, its slope is taken for the site's."""
    draws = np.random.default_rng(3)
    site = np.repeat([0, 1], 100)
    age = draws.normal(50, 5, 200) + 10 * site
    features = np.stack([0.1 * age, draws.standard_normal(200)], axis=1) + 0.1 * draws.standard_normal((200, 2))
    rows = np.hstack([features, site[:, None], age[:, None]])
    protected = Harmoniser("combat", 1).fit(rows).transform(rows)
    bare = Harmoniser("combat").fit(rows[:, :3]).transform(rows[:, :3])
    assert np.ptp([protected[site == n, 0].mean() for n in (0, 1)]) == pytest.approx(1, abs=0.15)
    assert np.ptp([bare[site == n, 0].mean() for n in (0, 1)]) < 0.05


# --- References, written from the publications a feature and a site at a time ---------------------


def drawn_towards(standard, site, rounds=200):
    """Empirical Bayes estimates of each site's shift and variance, of standardised features."""
    shift, scale = {}, {}
    for i in sorted(set(site)):
        part = standard[site == i]
        g, d, n = part.mean(axis=0), part.var(axis=0, ddof=1), len(part)
        gbar, tau2, dbar, s2 = g.mean(), g.var(ddof=1), d.mean(), d.var(ddof=1)
        lam, theta = (dbar**2 + 2 * s2) / s2, (dbar**3 + dbar * s2) / s2
        for v in range(standard.shape[1]):
            gs, ds = g[v], d[v]
            for _ in range(rounds):
                gs = (n * tau2 * g[v] + ds * gbar) / (n * tau2 + ds)
                ds = (theta + 0.5 * sum((z - gs) ** 2 for z in part[:, v])) / (n / 2 + lam - 1)
            shift[i, v], scale[i, v] = gs, ds
    return shift, scale


def without_sites(standard, site, eb=True):
    shift, scale = drawn_towards(standard, site, rounds=200 if eb else 0)
    return np.array(
        [
            [(z - shift[i, v]) / scale[i, v] ** 0.5 for v, z in enumerate(row)]
            for i, row in zip(site, standard, strict=True)
        ]
    )


def without_covariance(standard, site):
    """CovBat's second step: each site's scores on the components of 95 % get one mean and one variance."""
    width = standard.std(axis=0, ddof=1)
    scaled = (standard - standard.mean(axis=0)) / width
    values, vectors = np.linalg.eigh(np.corrcoef(standard, rowvar=False))
    values, vectors = values[::-1], vectors[:, ::-1]
    scores = scaled @ vectors
    for k in range(int(np.argmax(np.cumsum(values) / values.sum() >= 0.95)) + 1):
        own = scores[:, k].copy()
        pooled = np.sqrt(np.mean([(own[j] - own[site == site[j]].mean()) ** 2 for j in range(len(own))]))
        for i in set(site):
            its = own[site == i]
            scores[site == i, k] = (its - its.mean()) / its.std(ddof=1) * pooled + own.mean()
    return scores @ vectors.T * width + standard.mean(axis=0)


@pytest.mark.parametrize("method", ["combat", "covbat", "combat-noeb", "covbat-noeb"])
def test_harmonised_features_are_those_of_a_reference_written_from_the_publication(method):
    draws = np.random.default_rng(4)
    site, age = np.repeat([0, 1, 2], [30, 25, 20]), np.round(draws.normal(50, 10, 75))
    features = draws.normal(size=(75, 6)) @ draws.normal(size=(6, 6)) * np.array([1, 2, 0.5])[site][:, None]
    features += site[:, None] + 0.05 * age[:, None]
    design = np.column_stack([np.eye(3)[site], age])
    beta = np.linalg.inv(design.T @ design) @ design.T @ features
    expected = sum(np.mean(site == i) * beta[i] for i in range(3)) + np.outer(age, beta[3])
    sigma = np.sqrt(np.mean((features - design @ beta) ** 2, axis=0))
    standard = without_sites((features - expected) / sigma, site, eb="noeb" not in method)
    if "covbat" in method:
        standard = without_covariance(standard, site)
    rows = np.column_stack([features, site, age])
    found = Harmoniser(method, 1).fit(rows).transform(rows)
    np.testing.assert_allclose(found, standard * sigma + expected, atol=1e-3)


def test_site_that_empirical_bayes_leaves_in_features_that_go_together_is_gone_without_it():
    """A shift along a direction in which people hardly differ: of each feature little, of all together plain."""
    draws = np.random.default_rng(6)
    site = np.repeat([0, 1], 100)
    common, direction = draws.standard_normal((200, 1)), draws.standard_normal((1, 16))
    features = common @ direction + 0.05 * draws.standard_normal((200, 16))
    features += 0.15 * site[:, None] * draws.choice([-1, 1], 16)
    rows = np.hstack([features, site[:, None]])
    learn, look = np.arange(0, 200, 2), np.arange(1, 200, 2)

    def told(method):
        fitted = Harmoniser(method).fit(rows[learn])
        probe = LogisticRegression(C=100, max_iter=5000).fit(fitted.transform(rows[learn]), site[learn])
        return probe.score(fitted.transform(rows[look]), site[look])

    assert told("combat") > 0.7
    assert told("combat-noeb") < 0.6


@pytest.fixture
def visits():
    """Thirty patients with two to four scans, most of them at several of two sites."""
    draws = np.random.default_rng(5)
    patient = np.repeat(np.arange(30), draws.integers(2, 5, 30))
    site, years = draws.integers(0, 2, len(patient)), draws.uniform(0, 4, len(patient))
    features = draws.normal(0, 2, (30, 4))[patient] + draws.normal(size=(len(patient), 4)) * (1 + site[:, None])
    features[:, 3] = draws.normal(size=len(patient))  # nothing of it is a patient's
    features += 1.5 * site[:, None] + 0.3 * years[:, None]
    return features, site, patient, years


@pytest.mark.parametrize("method", ["longcombat", "longcovbat"])
def test_longitudinal_combat_is_that_of_a_reference_on_statsmodels_mixed_model(method, visits):
    from statsmodels.regression.mixed_linear_model import MixedLM

    features, site, patient, years = visits
    design = np.column_stack([np.ones(len(site)), years, site])
    expected, sigma = np.empty_like(features), np.empty(4)
    for v in range(4):
        fit = MixedLM(features[:, v], design, groups=patient).fit(reml=True)
        level = np.array([np.asarray(fit.random_effects[j])[0] for j in patient])
        batch = np.array([0, fit.fe_params[2]]) - np.mean(site) * fit.fe_params[2]  # Σ nᵢ γᵢ = 0
        expected[:, v] = design @ fit.fe_params + level - batch[site]
        sigma[v] = np.sqrt(fit.scale)
    standard = without_sites((features - expected) / sigma, site)
    if method == "longcovbat":
        standard = without_covariance(standard, site)
    rows = np.column_stack([features, site, patient, years])
    found = Harmoniser(method, 1).fit(rows).transform(rows)
    np.testing.assert_allclose(found, standard * sigma + expected, atol=0.01)


def test_level_of_a_patient_who_was_not_fitted_is_predicted_from_own_scans(visits):
    """So that what is between patients stays, though all of a patient's scans are of one site."""
    features, site, patient, years = visits
    rows = np.column_stack([features, site, patient, years])
    fitted = Harmoniser("longcombat", 1).fit(rows)
    new = np.tile(rows[0], (3, 1))
    new[:, :3] += 20
    new[:, 5] = 99
    apart = fitted.transform(new)[:, :3] - fitted.transform(np.delete(new, [1, 2], axis=0))[:, :3]
    assert np.abs(apart).min() > 0  # three scans say more of a level than one
    own = 20 * (3 * fitted.ratio_ / (1 + 3 * fitted.ratio_))[:3]
    other = new.copy()
    other[:, :3] -= 20
    moved = fitted.transform(new)[:, :3] - fitted.transform(other)[:, :3]
    scale = np.sqrt(fitted.scale_[int(site[0])][:3])
    np.testing.assert_allclose(moved, np.tile(own + (20 - own) / scale, (3, 1)), rtol=1e-6)


def test_longitudinal_combat_runs_in_the_cross_validation_of_probe(run, tmp_path, visits):
    features, site, patient, _ = visits
    names = [f"s{n}" for n in range(len(site))]
    records = [ScanRecord(f"{n}.nii", None, f"p{who:02}", n) for n, who in zip(names, patient, strict=True)]
    Embeddings(features.astype(np.float32), records).save(tmp_path / "v.npz")
    label = np.random.default_rng(6).integers(0, 2, 30)
    people = {"patient_id": [f"p{who:02}" for who in patient], "scan_id": names, "dx": label[patient], "scanner": site}
    pd.DataFrame(people).to_csv(tmp_path / "l.csv", index=False)
    given = ("--embeddings", tmp_path / "v.npz", "--label", "dx", "--no-controls", "--seeds", 1)
    more = ("--harmonise", "longcombat", "--site", "scanner", "-o", tmp_path / "o")
    result = run("probe", tmp_path / "l.csv", *given, *more)
    assert result.code == 0, result.said
    assert {row["mode"] for row in rows_of(tmp_path / "o" / "results.csv")} == {"probe", "probe+longcombat"}
    page = (tmp_path / "o" / "index.html").read_text()
    assert "linear probe, after longitudinal ComBat" in page
