"""`BrainEncoder` among scikit-learn's own: pipelines, searches, checks; rows that stay beside their labels."""

import importlib
import pickle
import shutil
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import brainfm
from brainfm.errors import MissingExtraError, ScanError, WeightsError
from brainfm.parts import list_parts, read_part
from brainfm.phantom import make_cohort
from brainfm.sklearn import BrainEncoder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Eight phantoms, as a manifest's table with whole paths."""
    manifest = make_cohort(8, tmp_path_factory.mktemp("sklearn") / "phantoms", spacing=4.0)
    rows = pd.read_csv(manifest)
    for column in ("image_path", "mask_path"):
        rows[column] = [str(manifest.parent / path) for path in rows[column]]
    return rows


@pytest.fixture(scope="module")
def pairs(cohort):
    return list(zip(cohort["image_path"], cohort["mask_path"], strict=True))


@pytest.fixture(scope="module")
def expected(pairs):
    return brainfm.embed(pairs, "test_resnet_3d").vectors


def rows_kept(cache):
    """How many rows the cached parts of each model hold."""
    return {folder.name: sum(len(read_part(part).numbers) for part in list_parts(folder)) for folder in cache.iterdir()}


# --- What goes in and comes out -------------------------------------------------------------------


def test_features_are_those_of_embed_in_every_form_of_the_list(cohort, pairs, expected, tmp_path):
    encoder = BrainEncoder("test_resnet_3d", cache=tmp_path / "cache")
    features = encoder.fit_transform(pairs)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected)
    columns = cohort[["image_path", "mask_path"]]
    for same in (cohort, columns, columns.to_numpy(), cohort.drop(columns="patient_id")):
        np.testing.assert_array_equal(encoder.transform(same), expected)
    assert list(rows_kept(tmp_path / "cache").values()) == [8]  # embedded once, whatever the form


def test_rows_may_come_in_any_order_and_more_than_once(cohort, pairs, expected, tmp_path):
    encoder = BrainEncoder("test_resnet_3d", cache=tmp_path / "cache").fit(pairs)
    drawn = [3, 0, 3, 7, 0]  # as a bootstrap draws them
    np.testing.assert_array_equal(encoder.transform([pairs[n] for n in drawn]), expected[drawn])
    np.testing.assert_array_equal(encoder.transform(cohort.iloc[drawn]), expected[drawn])
    assert list(rows_kept(tmp_path / "cache").values()) == [3]


def test_fit_learns_nothing_and_transform_changes_nothing(pairs, expected):
    encoder = BrainEncoder("test_resnet_3d").fit(pairs[:1], [0])
    before = dict(vars(encoder))
    np.testing.assert_array_equal(encoder.transform(pairs[1:3]), expected[1:3])
    assert vars(encoder) == before
    assert encoder.fit(pairs[2:4]).origin_ == before["origin_"]


def test_columns_that_name_files_are_counted(cohort, pairs):
    encoder = BrainEncoder("test_resnet_3d").fit(cohort)
    assert encoder.n_features_in_ == 2
    assert list(encoder.feature_names_in_) == ["image_path", "mask_path"]
    encoder.fit([image for image, _ in pairs])
    assert encoder.n_features_in_ == 1
    assert not hasattr(encoder, "feature_names_in_")


def test_set_output_gives_a_data_frame_with_the_rows_own_index(cohort, expected):
    rows = cohort.iloc[:2].set_index("patient_id", drop=False)
    encoder = BrainEncoder("test_resnet_3d").set_output(transform="pandas")
    features = encoder.fit_transform(rows)
    assert list(features.index) == list(rows["patient_id"])
    assert list(features.columns[:2]) == ["e0", "e1"]
    assert list(features.columns) == list(encoder.get_feature_names_out())
    np.testing.assert_array_equal(features.to_numpy(), expected[:2])


def test_model_object_and_its_clone_give_the_features_of_the_name(small_model, pairs, expected):
    encoder = clone(BrainEncoder(small_model))
    np.testing.assert_array_equal(encoder.fit_transform(pairs[:1]), expected[:1])


# --- Bad scans and bad lists ----------------------------------------------------------------------


def test_bad_scan_raises_or_is_a_row_of_nan_in_its_place(cohort, expected, tmp_path, caplog):
    rows = cohort.iloc[[0, 1, 2, 3]].copy()
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    rows.loc[1, "image_path"] = str(tmp_path / "bad.nii.gz")
    rows.loc[2, "image_path"] = np.nan
    pairs = [tuple(pair) for pair in rows[["image_path", "mask_path"]].to_numpy()]
    with pytest.raises(ScanError, match=r"row \d: image_path is empty"):
        BrainEncoder("test_resnet_3d").fit(rows)
    with pytest.raises(ScanError, match=r"bad\.nii\.gz"):
        BrainEncoder("test_resnet_3d").fit_transform(pairs[:2])
    for scans in (rows, pairs):
        caplog.clear()
        features = BrainEncoder("test_resnet_3d", on_error="nan").fit_transform(scans)
        np.testing.assert_array_equal(features[[0, 3]], expected[[0, 3]])
        assert np.isnan(features[[1, 2]]).all()
        assert "2 of 4 scans are bad" in caplog.text


def test_list_that_is_none_of_scans_is_refused_by_fit(cohort, tmp_path):
    encoder = BrainEncoder("test_resnet_3d")
    for scans, said in (
        (np.zeros((3, 2)), "X holds numbers"),
        (cohort[["image_path", "mask_path", "site"]].to_numpy(), "X has 3 columns"),
        (cohort[["site"]], "no column image_path"),
        ([str(tmp_path / "absent.nii.gz")], "no such file"),
        ([], "empty"),
    ):
        with pytest.raises(ScanError, match=said):
            encoder.fit(scans)
    several = str(cohort["image_path"][0]).split("/sub-")[0]
    with pytest.raises(ScanError, match="holds several scans, and a row is one"):
        encoder.fit([several])
    with pytest.raises(ValueError, match='on_error must be "raise" or "nan"'):
        encoder.set_params(on_error="skip").fit(cohort)
    with pytest.raises(NotFittedError):
        encoder.transform(cohort)


def test_model_that_gives_no_embedding_is_refused_by_fit(pairs):
    classifier = brainfm.create_model("test_resnet_3d", num_classes=2)
    with pytest.raises(ValueError, match="reset_classifier"):
        BrainEncoder(classifier).fit(pairs)


# --- Pipelines ------------------------------------------------------------------------------------


def test_cross_validation_and_search_over_encoders_embed_each_scan_once(cohort, tmp_path):
    steps = [
        ("encoder", BrainEncoder("test_resnet_3d", cache=tmp_path / "cache")),
        ("scale", StandardScaler()),
        ("classifier", LogisticRegression()),
    ]
    labels = cohort["sex"]
    scores = cross_val_score(Pipeline(steps), cohort, labels, cv=2)
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
    assert list(rows_kept(tmp_path / "cache").values()) == [8]
    models = ["test_resnet_3d", "test_vit_3d"]
    search = GridSearchCV(Pipeline(steps), {"encoder__model": models}, cv=2, error_score="raise").fit(cohort, labels)
    assert search.best_params_["encoder__model"] in models
    assert sorted(name.split(".")[0] for name in rows_kept(tmp_path / "cache")) == models
    assert set(rows_kept(tmp_path / "cache").values()) == {8}


def test_scan_that_changed_is_embedded_again(cohort, expected, tmp_path):
    image = shutil.copy(cohort["image_path"][0], tmp_path / "normalized.nii.gz")
    scan = [(image, cohort["mask_path"][0])]
    encoder = BrainEncoder("test_resnet_3d", cache=tmp_path / "cache").fit(scan)
    np.testing.assert_array_equal(encoder.transform(scan), expected[:1])
    shutil.copy(cohort["image_path"][1], image)
    assert not np.array_equal(encoder.transform(scan), expected[:1])


def test_pickle_holds_no_published_weights_and_refuses_others_under_their_name(small_model, pairs, expected, tmp_path):
    folder = tmp_path / "model"
    brainfm.save_for_hub(small_model, folder)
    fitted = BrainEncoder(f"local-dir:{folder}").fit(pairs)
    kept = pickle.dumps(fitted)
    assert len(kept) < 20_000
    np.testing.assert_array_equal(pickle.loads(kept).transform(pairs[:1]), expected[:1])
    other = brainfm.create_model("test_resnet_3d", pretrained=True)
    next(other.parameters()).data.mul_(2)
    shutil.rmtree(folder)
    brainfm.save_for_hub(other, folder)
    with pytest.raises(WeightsError, match=r"differs in weights .* fit it again"):
        pickle.loads(kept).transform(pairs[:1])


def test_pickle_of_a_model_that_nobody_can_load_again_holds_it(pairs):
    for encoder in (
        BrainEncoder("test_resnet_3d", pretrained=False),
        BrainEncoder(brainfm.create_model("test_vit_3d")),
    ):
        features = encoder.fit_transform(pairs[:1])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(encoder)).transform(pairs[:1]), features)


# --- scikit-learn's own checks --------------------------------------------------------------------

OF_NUMBERS = "fits on rows of numbers, and BrainEncoder takes scans: it refuses them by name"
# In place of a check that needs numbers, the test above that holds the same of scans.
EXPECTED_FAILURES = dict.fromkeys(
    (
        "check_fit_score_takes_y",
        "check_estimators_overwrite_params",
        "check_dont_overwrite_parameters",
        "check_estimators_fit_returns_self",
        "check_readonly_memmap_input",
        "check_n_features_in_after_fitting",
        "check_positive_only_tag_during_fit",
        "check_estimators_dtypes",
        "check_pipeline_consistency",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_transformer_general",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_fit2d_1sample",
        "check_fit2d_1feature",
        "check_dict_unchanged",
        "check_fit_idempotent",
        "check_fit_check_is_fitted",
        "check_n_features_in",
        "check_fit1d",
        "check_fit2d_predict1d",
    ),
    OF_NUMBERS,
) | {
    "check_complex_data": "wants a ValueError about complex numbers; any numbers are refused, as ScanError",
    "check_dtype_object": "fits on an object array of ten columns of numbers; one or two columns of paths are taken",
    "check_estimators_empty_data_messages": "wants a ValueError about no rows of numbers; a ScanError refuses numbers",
    "check_estimators_nan_inf": "looks for NaN among numbers; numbers are refused before",
    "check_estimator_sparse_tag": "sparse matrices hold numbers",
    "check_estimator_sparse_array": "sparse matrices hold numbers",
    "check_estimator_sparse_matrix": "sparse matrices hold numbers",
    "check_transformer_data_not_an_array": "fits on a wrapper of numbers that is no list",
}


class ClaimedOfNumbers(BrainEncoder):
    """The estimator without the tag that it takes no numbers, for which scikit-learn would skip all checks."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def test_estimator_passes_every_check_of_scikit_learn_that_needs_no_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            ClaimedOfNumbers("test_resnet_3d"), expected_failed_checks=EXPECTED_FAILURES, on_fail=None
        )
    status = {}
    for result in results:
        status.setdefault(result["status"], set()).add(result["check_name"])
    assert "failed" not in status, status["failed"]
    assert status["xfail"] == set(EXPECTED_FAILURES) & set().union(*status.values())  # of those that this version has
    assert status["passed"] >= {
        *("check_estimator_cloneable", "check_estimator_repr", "check_no_attributes_set_in_init"),
        *("check_estimators_unfitted", "check_do_not_raise_errors_in_init_or_set_params", "check_mixin_order"),
        *("check_transformers_unfitted", "check_parameters_default_constructible", "check_set_params"),
        *("check_estimator_tags_renamed", "check_valid_tag_types", "check_get_params_invariance"),
    }


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "brainfm.sklearn")
    monkeypatch.delattr(brainfm, "sklearn", raising=False)
    with pytest.raises(MissingExtraError, match="scikit-learn is not installed; run: pip install"):
        importlib.import_module("brainfm.sklearn")


def test_module_is_a_public_name_that_is_imported_when_asked_for():
    assert brainfm.sklearn.BrainEncoder is BrainEncoder
    assert "sklearn" in dir(brainfm)
