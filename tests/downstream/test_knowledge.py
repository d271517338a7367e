"""What embeddings know, on synthetic vectors whose answer is known, and on phantoms."""

from __future__ import annotations

import builtins
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

import brainfm
from brainfm.downstream import knowledge
from brainfm.downstream.knowledge import (
    OutOfDistribution,
    embedding_map,
    leakage_probe,
    plot_map,
    retrieval,
    same_patient_similarity,
)
from brainfm.downstream.statistics import icc
from brainfm.errors import BrainfmError, MissingExtraError
from brainfm.phantom import make_cohort
from brainfm.system import torch_threads


def two_scans(patients: int = 40, width: int = 16, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """[2 × patients, width]: all first scans, then all second ones."""
    draw = np.random.default_rng(seed)
    people = np.tile(draw.standard_normal((patients, width)), (2, 1))
    vectors = people + noise * draw.standard_normal(people.shape)
    return vectors.astype(np.float32), [f"sub-{k}" for k in range(patients)] * 2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Embeddings of 8 phantoms at 4 mm, two scans each, by the packaged test ResNet."""
    manifest = make_cohort(8, tmp_path_factory.mktemp("phantoms") / "cohort", spacing=4.0, scans_per_patient=2)
    return brainfm.embed(manifest, "test_resnet_3d", on_error="raise")


# --- Who is scanned -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_retrieval_is_that_of_a_distance_matrix(noise, monkeypatch):
    vectors, patients = two_scans(noise=noise)
    vectors, patients = np.concatenate([vectors, vectors[:7] + 5]), [*patients, *(f"once-{k}" for k in range(7))]
    distances = cdist(vectors.astype(float), vectors.astype(float), "cosine")
    np.fill_diagonal(distances, np.inf)
    expected = np.mean([patients[distances[k].argmin()] == patients[k] for k in range(80)])
    monkeypatch.setattr(knowledge, "_ROWS", 13)
    found = retrieval(vectors, patients)
    assert found.fraction == pytest.approx(expected)
    assert found.chance == pytest.approx(1 / 86)
    assert (found.scans, found.patients) == (80, 40)


def test_retrieval_of_random_vectors_is_at_chance():
    vectors = np.random.default_rng(0).standard_normal((3000, 8))
    found = retrieval(vectors, np.arange(3000) % 10)
    assert found.chance == pytest.approx(299 / 2999)
    assert found.fraction == pytest.approx(found.chance, abs=0.02)


def test_an_embedding_that_is_always_the_same_retrieves_at_chance_whatever_the_order():
    found = retrieval(np.ones((20, 4)), np.repeat(np.arange(10), 2))
    assert found.fraction == pytest.approx(found.chance)
    assert found.chance == pytest.approx(1 / 19)


def test_retrieval_refuses_what_has_no_answer():
    vectors = np.eye(3)
    with pytest.raises(ValueError, match="no patient has two scans"):
        retrieval(vectors, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"unknown .* for 2 of 3"):
        retrieval(vectors, ["a", "", ""])
    with pytest.raises(ValueError, match="3 vectors"):
        retrieval(vectors, ["a", "a"])
    with pytest.raises(ValueError, match="1 of 3 vectors are 0"):
        retrieval(vectors * [[1], [0], [1]], ["a", "a", "b"])
    with pytest.raises(ValueError, match="1 of 3 rows are not finite"):
        retrieval(vectors * [[1], [np.nan], [1]], ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"expected \[n, d\]"):
        retrieval(np.ones(3), ["a", "a", "b"])


def test_similarity_within_and_between_patients_is_that_of_a_loop():
    vectors, patients = two_scans(patients=12, noise=0.8)
    vectors, patients = np.concatenate([vectors, 9 * vectors[:3]]), [*patients, *patients[:3]]  # third scans: not used
    found = same_patient_similarity(vectors, patients)

    def cosine(a: int, b: int) -> float:
        return 1 - cdist(vectors[[a]].astype(float), vectors[[b]].astype(float), "cosine").item()

    assert found.within == pytest.approx(np.mean([cosine(k, 12 + k) for k in range(12)]))
    assert found.between == pytest.approx(np.mean([cosine(k, 12 + m) for k in range(12) for m in range(12) if k != m]))
    assert found.icc[5] == pytest.approx(icc(np.stack([vectors[:12, 5], vectors[12:24, 5]], axis=1)).agreement)
    assert found.icc_median == pytest.approx(np.median(found.icc))
    assert found.patients == 12


def test_reliability_of_dimensions_is_the_variance_they_share():
    vectors, patients = two_scans(patients=3000, width=3)
    draw = np.random.default_rng(1)
    noise = draw.standard_normal(vectors.shape) * [0, 1, 2]  # ICC 1 / (1 + variance of the noise)
    found = same_patient_similarity(np.column_stack([vectors + noise, np.ones(6000)]), patients)
    assert found.icc[:3] == pytest.approx([1 / 1.01, 1 / 2.01, 1 / 5.01], abs=0.03)
    assert math.isnan(found.icc[3])
    assert found.icc_median == pytest.approx(found.icc[1])
    assert found.icc_good == 0.25


def test_similarity_needs_two_patients_with_two_scans():
    with pytest.raises(ValueError, match="1 patients have two scans"):
        same_patient_similarity(np.eye(3), ["a", "a", "b"])


# --- What leaks -----------------------------------------------------------------------------------


def test_site_that_is_in_the_vectors_is_read_and_one_that_is_not_is_at_chance():
    vectors, patients = two_scans(patients=150)
    site = np.tile(np.random.default_rng(3).choice(["north", "south", "west"], 150, p=[0.6, 0.2, 0.2]), 2)
    hidden = leakage_probe(vectors, site, patients)
    assert hidden.chance == pytest.approx(1 / 3)
    assert hidden.majority == pytest.approx((site == "north").mean())
    assert hidden.balanced_accuracy == pytest.approx(hidden.chance, abs=0.1)
    vectors[:, 2] += 8 * (site == "south")
    vectors[:, 3] += 8 * (site == "west")
    plain = leakage_probe(vectors, site, patients)
    assert plain.balanced_accuracy > 0.95
    assert plain.classes == ("north", "south", "west")
    assert (plain.scans, plain.patients) == (300, 150)


def test_patients_are_kept_together_so_that_knowing_them_is_no_leak():
    """Labels drawn a patient: vectors that only say who is scanned tell nothing of patients not seen."""
    vectors, patients = two_scans(patients=60, width=80, noise=0.01)
    sex = np.tile(np.random.default_rng(0).integers(0, 2, 60), 2)
    together = leakage_probe(vectors, sex, patients)
    apart = leakage_probe(vectors, sex, np.arange(120))
    assert together.balanced_accuracy < 0.65
    assert apart.balanced_accuracy > 0.75


def test_leakage_probe_refuses_what_cannot_be_probed():
    vectors, patients = two_scans(patients=10)
    with pytest.raises(ValueError, match="one value, 'x'"):
        leakage_probe(vectors, ["x"] * 20, patients)
    with pytest.raises(ValueError, match="has 1 patients for 5 folds"):
        leakage_probe(vectors, np.linspace(20, 90, 20), patients)
    with pytest.raises(ValueError, match=r"column is unknown .* for 1 of 20"):
        leakage_probe(vectors, ["", *"abcdefghijklmnopqrs"], patients)
    with pytest.raises(ValueError, match="folds is 1"):
        leakage_probe(vectors, [0, 1] * 10, patients, folds=1)


# --- A map ----------------------------------------------------------------------------------------


def test_pca_map_has_the_two_largest_variances():
    vectors, _ = two_scans()
    points = embedding_map(vectors)
    assert points.shape == (80, 2)
    assert points.dtype == np.float32
    largest = np.linalg.eigvalsh(np.cov(vectors.T.astype(float)))[::-1][:2]
    assert points.var(axis=0, ddof=1) == pytest.approx(largest, rel=1e-4)
    np.testing.assert_array_equal(points, embedding_map(vectors))


def test_map_refuses_too_few_scans_and_unknown_methods():
    with pytest.raises(ValueError, match="three scans"):
        embedding_map(np.eye(2))
    with pytest.raises(ValueError, match="no method 'tsne'"):
        embedding_map(np.eye(3), method="tsne")


@pytest.mark.slow
def test_umap_maps_or_says_what_to_install():
    vectors, _ = two_scans()
    try:
        import umap  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(BrainfmError, match="pip install umap-learn"):
            embedding_map(vectors, method="umap")
    else:
        with torch_threads(3):
            points = embedding_map(vectors, method="umap")
            assert torch.get_num_threads() == 3  # numba would leave another number
        assert points.shape == (80, 2)
        np.testing.assert_array_equal(points, embedding_map(vectors, method="umap"))


@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_missing_package_names_the_extra(package, monkeypatch, tmp_path):
    genuine = builtins.__import__

    def absent(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return genuine(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    vectors, patients = two_scans(patients=10)
    calls = [
        lambda: embedding_map(vectors),
        lambda: leakage_probe(vectors, [0, 1] * 10, patients),
        lambda: OutOfDistribution().fit(vectors),
    ]
    if package == "matplotlib":
        calls = [lambda: plot_map(vectors[:, :2], patients, tmp_path / "map.png")]
    for call in calls:
        with pytest.raises(MissingExtraError, match="pip install " + {"sklearn": "scikit-learn"}.get(package, package)):
            call()


def texts(path) -> str:
    """What an SVG picture says: matplotlib draws letters as shapes and leaves the text in comments."""
    return path.read_text(encoding="utf-8")


def test_map_of_categories_has_a_legend_and_of_numbers_a_scale(tmp_path):
    points = np.random.default_rng(0).standard_normal((40, 2))
    plot_map(points, ["north", "south", "", "west"] * 10, tmp_path / "site.svg", title="site of the scan")
    for name in ("north", "south", "west", "unknown", "site of the scan"):
        assert f"<!-- {name} -->" in texts(tmp_path / "site.svg")
    ages = [str(20 + k) for k in range(39)] + [""]  # as a manifest has them
    plot_map(points, ages, tmp_path / "age.svg", title="age")
    assert "<!-- age -->" in texts(tmp_path / "age.svg")
    assert "<!-- 37 -->" not in texts(tmp_path / "age.svg")  # no legend of numbers
    assert "colorbar" not in texts(tmp_path / "site.svg")
    many = [f"scanner {k}" for k in range(40)]
    plot_map(points, many, tmp_path / "many.svg")
    assert "scanner" not in texts(tmp_path / "many.svg")
    ElementTree.parse(tmp_path / "site.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["age.svg", "many.svg", "site.svg"]


def test_map_as_png_is_a_picture_with_the_colours_of_its_categories(tmp_path):
    from PIL import Image

    points = np.random.default_rng(0).standard_normal((60, 2))
    plot_map(points, [0, 1, None] * 20, tmp_path / "sex.png")
    pixels = {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "sex.png").convert("RGB")).reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14), (204, 204, 204)} <= pixels  # tab10's first two, and the unknown's grey


def test_map_refuses_other_files_and_columns(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot_map(np.eye(2), [0, 1], tmp_path / "map.gif")
    with pytest.raises(ValueError, match="column of 3 do not fit"):
        plot_map(np.eye(2), [0, 1, 2], tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


# --- What is unlike the rest ----------------------------------------------------------------------


def population(n: int, width: int = 40, seed: int = 0) -> np.ndarray:
    """Correlated normal vectors: one mixing, many draws."""
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return np.random.default_rng(seed).standard_normal((n, width)) @ mixing + 3


def test_new_scans_like_the_reference_have_uniform_percentiles_though_dimensions_are_many():
    scores = OutOfDistribution().fit(population(120)).score(population(2000, seed=1))
    assert stats.kstest(scores / 100, "uniform").statistic < 0.1
    assert (scores > 95).mean() == pytest.approx(0.05, abs=0.04)


def test_reference_fitted_without_folds_would_have_been_favoured():
    """What cross-fitting is for: distances from an estimate that has seen the reference are too short for new scans."""
    from sklearn.covariance import LedoitWolf

    reference, new = population(120), population(2000, seed=1)
    seen = LedoitWolf().fit(reference)
    naive = np.searchsorted(np.sort(seen.mahalanobis(reference)), seen.mahalanobis(new)) / 120
    assert (naive > 0.95).mean() > 0.15


def test_far_scans_have_the_highest_percentile_and_distances_that_tell_them_apart():
    detector = OutOfDistribution().fit(population(300))
    step = np.zeros((3, 40))
    step[:, 0] = [0, 100, 1000]
    new = np.repeat(population(1, seed=5), 3, axis=0) + step
    assert detector.score(new)[1:].tolist() == [100, 100]
    near, far, farther = detector.distance(new)
    assert near < far < farther
    assert farther / far == pytest.approx(10, rel=0.1)


def test_distance_is_mahalanobis_of_the_population_when_the_reference_is_large():
    reference, new = population(20000, width=5), population(50, width=5, seed=1)
    mixing = np.random.default_rng(99).standard_normal((5, 5))
    inverse = np.linalg.inv(mixing.T @ mixing)
    expected = [math.sqrt((row - 3) @ inverse @ (row - 3)) for row in new]
    found = OutOfDistribution().fit(reference)
    assert found.distance(new) == pytest.approx(expected, rel=0.1)
    assert found.score(new) == pytest.approx(100 * stats.chi2.cdf(np.square(expected), 5), abs=4)


def test_scans_of_a_patient_share_a_fold():
    """Two nearly equal scans a patient: with patients apart, held-out scans are no strangers and new ones seem far."""
    vectors, patients = two_scans(patients=40, width=30, noise=0.01)
    new = np.random.default_rng(7).standard_normal((1000, 30))
    apart = OutOfDistribution().fit(vectors).score(new)
    together = OutOfDistribution().fit(vectors, patients).score(new)
    assert together.mean() < apart.mean() - 5
    assert together.mean() == pytest.approx(50, abs=12)


def test_out_of_distribution_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="fit a reference first"):
        OutOfDistribution().score(np.eye(3))
    with pytest.raises(ValueError, match="3 patients are too few for 5 folds"):
        OutOfDistribution().fit(np.eye(3))
    with pytest.raises(ValueError, match="folds is 1"):
        OutOfDistribution(folds=1)
    with pytest.raises(ValueError, match="3 dimensions, and the reference 4"):
        OutOfDistribution().fit(population(20, width=4)).score(np.eye(3))


# --- Phantoms -------------------------------------------------------------------------------------


def test_embeddings_tell_phantoms_apart(cohort):
    patients = cohort.columns()["patient_id"]
    found = retrieval(cohort.vectors, patients)
    assert found.chance == pytest.approx(1 / 15)
    assert found.fraction > 3 * found.chance
    similarity = same_patient_similarity(cohort.vectors, patients)
    assert similarity.within > similarity.between
    assert similarity.icc.shape == (cohort.vectors.shape[1],)


def test_table_of_phantoms_goes_through_everything(cohort, tmp_path):
    columns = cohort.columns()
    probe = leakage_probe(cohort.vectors, columns["sex"], columns["patient_id"], folds=2)
    assert probe.classes == ("0", "1")
    assert (probe.chance, probe.patients, probe.scans) == (0.5, 8, 16)
    for name in ("site", "age"):
        plot_map(embedding_map(cohort.vectors), columns[name], tmp_path / f"{name}.png", title=name)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    detector = OutOfDistribution(folds=4).fit(cohort.vectors, columns["patient_id"])
    assert detector.score(cohort.vectors[:3] + 100 * cohort.vectors.std()).tolist() == [100, 100, 100]
