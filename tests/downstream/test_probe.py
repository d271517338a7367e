"""Linear probes against scikit-learn and torch done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from brainfm.downstream.probe import AdamProbe, LinearHead, _log_likelihood, draw_head, fit_probe, predict_probe
from brainfm.downstream.statistics import metrics
from brainfm.train.data import EpochSampler


@pytest.fixture
def draws():
    return np.random.default_rng(0)


def made(draws, kind, n=120, d=8):
    features = draws.normal(3, 5, (n, d)).astype(np.float32)
    signal = features @ draws.normal(size=d) / 10
    if kind == "regression":
        return features, 40 + 8 * signal + draws.normal(0, 0.5, n)
    if kind == "binary":
        return features, (signal > np.median(signal)).astype(np.int64)
    return features, np.digitize(signal, np.quantile(signal, [1 / 3, 2 / 3]))


@pytest.mark.parametrize(
    ("kind", "metric", "least"), [("binary", "auc", 0.95), ("regression", "r2", 0.9), ("multiclass", "accuracy", 0.7)]
)
def test_probe_reads_what_is_linear_in_the_features(kind, metric, least, draws):
    features, labels = made(draws, kind)
    probe = fit_probe(features[:80], labels[:80], kind)
    predictions = predict_probe(probe, features[80:], kind)
    assert metrics(labels[80:], predictions, kind)[metric] > least


def test_probe_does_not_see_the_scale_of_a_feature(draws):
    features, labels = made(draws, "binary")
    scaled = features * np.logspace(-3, 3, 8)
    first, second = (
        predict_probe(fit_probe(x[:80], labels[:80], "binary"), x[80:], "binary") for x in (features, scaled)
    )
    np.testing.assert_allclose(first, second, atol=1e-3)


def test_strength_is_chosen_with_patients_kept_together(draws):
    """Twenty scans a patient, and labels at random: only folds by patient see that there is nothing to learn."""
    patients = np.repeat(np.arange(10), 20)
    own, labels = draws.normal(size=(10, 8)), draws.permutation([0, 1] * 5)[patients]
    features = own[patients] + 0.01 * draws.normal(size=(200, 8))
    together = fit_probe(features, labels, "binary", patients=[f"p{n}" for n in patients])
    apart = fit_probe(features, labels, "binary")
    assert together["logisticregression"].C < apart["logisticregression"].C


@pytest.mark.parametrize("kind", ["binary", "multiclass", "regression"])
def test_few_patients_with_scans_of_several_classes_are_no_error(kind):
    """A fold then lacks a class, to learn from or to look at."""
    for seed in range(4):
        draw = np.random.default_rng(seed)
        labels = np.concatenate([np.arange(4), draw.integers(0, 4, 8)]) % (2 if kind == "binary" else 4)
        features, patients = draw.normal(size=(12, 3)), [f"p{n}" for n in draw.integers(0, 1 + seed % 4, 12)]
        probe = fit_probe(features, labels, kind, patients=patients)
        assert np.isfinite(predict_probe(probe, features, kind)).all()


def test_strength_is_chosen_by_the_log_loss(draws):
    features, labels = made(draws, "multiclass")
    probe = fit_probe(features, labels, "multiclass")
    assert _log_likelihood(probe, features, labels) == pytest.approx(-log_loss(labels, probe.predict_proba(features)))


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_adam_probe_is_the_released_codes_on_embeddings(kind, draws):
    """`main_eval.py`: torch's own initial weights, raw labels, and no batch that is not full."""
    features, labels = made(draws, kind)
    train, val = (features[:80], labels[:80]), (features[80:], labels[80:])
    fitted = AdamProbe(epochs=3, lr=1e-2, batch_size=12).fit(train, val, kind, seed=4)
    x, y = torch.from_numpy(features), torch.from_numpy(labels).float()[:, None]
    torch.manual_seed(4)
    head = torch.nn.Linear(8, 1)
    criterion = torch.nn.MSELoss() if kind == "regression" else torch.nn.BCEWithLogitsLoss()
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    order, best = EpochSampler(80, 12, seed=4), float("inf")
    for epoch in range(3):
        order.epoch = epoch
        batches = torch.tensor([item for _, item in order]).split(12)
        assert [len(rows) for rows in batches] == [12] * 6
        for rows in batches:
            optimiser.zero_grad()
            criterion(head(x[rows]), y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            outputs = head(x[80:])
        losses = [criterion(*batch).item() for batch in zip(outputs.split(12), y[80:].split(12), strict=True)]
        if sum(losses) / 4 < best:
            best, kept = sum(losses) / 4, outputs[:, 0]
    wanted = kept if kind == "regression" else kept.sigmoid()
    np.testing.assert_allclose(predict_probe(fitted, features[80:], kind), wanted, rtol=1e-6, atol=1e-6)


def test_raw_and_standardised_targets_are_two_probes(draws):
    """With a rate of 1e-4 the raw one has hardly left 0, where labels are large."""
    features, labels = made(draws, "regression")
    features = features / 50  # as small as embeddings are
    train, val = (features[:80], labels[:80]), (features[80:], labels[80:])
    guesses = {
        target: predict_probe(AdamProbe(epochs=20, target=target).fit(train, val, "regression"), val[0], "regression")
        for target in ("raw", "standardised")
    }
    assert guesses["raw"].mean() < 2
    assert guesses["standardised"].mean() == pytest.approx(train[1].mean(), abs=5)


def test_loss_by_batches_is_the_mean_of_their_means():
    head = LinearHead("regression", np.zeros(3), "raw")
    outputs, labels = torch.tensor([[1.0], [1.0], [4.0]]), np.zeros(3)
    assert head.score(outputs, labels, "loss")["loss"] == pytest.approx(18 / 3)
    assert head.score(outputs, labels, "loss", 2)["loss"] == pytest.approx((1 + 16) / 2)


def test_drawing_a_head_leaves_torchs_generator_alone():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    layer = torch.nn.Linear(400, 1)
    torch.manual_seed(0)
    draw_head(layer, 2e-5, 3)
    assert torch.equal(torch.rand(1), wanted)
    assert float(layer.weight.detach().std()) == pytest.approx(2e-5, rel=0.2)
    assert float(layer.bias.detach()) == 0


@pytest.mark.parametrize(("selection", "scores"), [("auc", [-0.6, -0.9, -0.7]), ("loss", [0.5, 0.4, 0.6])])
def test_adam_probe_keeps_the_epoch_that_is_best_on_val(selection, scores, draws, monkeypatch):
    features, labels = made(draws, "binary")
    seen, score = [], LinearHead.score

    def watched(self, outputs, truth, by, _):
        assert score(self, outputs, truth, by)["score"] == pytest.approx(
            -roc_auc_score(truth, outputs[:, 0]) if by == "auc" else log_loss(truth, self.predictions(outputs)),
            abs=1e-5,
        )
        assert by == selection
        seen.append(self.predictions(outputs))
        return {"score": scores[len(seen) - 1]}

    monkeypatch.setattr(LinearHead, "score", watched)
    fitted = AdamProbe(epochs=3, lr=0.1).fit((features, labels), (features[:9], labels[:9]), "binary", selection)
    assert np.array_equal(predict_probe(fitted, features[:9], "binary"), seen[1])
    assert not np.array_equal(seen[1], seen[2])


def test_adam_probe_is_trained_where_val_has_no_score(draws):
    """One class is left of val: its AUC is undefined, and the last epoch is kept, not the layer of the beginning."""
    features, labels = made(draws, "binary")
    one = labels == 1
    fitted = AdamProbe(epochs=20, lr=0.1).fit((features, labels), (features[one], labels[one]), "binary", "auc")
    assert roc_auc_score(labels, predict_probe(fitted, features, "binary")) > 0.9


@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass"])
def test_head_turns_outputs_into_predictions_of_the_labels_own_scale(kind, draws):
    _, labels = made(draws, kind)
    head = LinearHead(kind, labels)
    targets = head.targets(labels)
    if kind == "regression":
        assert torch.equal(LinearHead(kind, labels, "raw").targets(labels), torch.from_numpy(labels).float())
        np.testing.assert_allclose(head.predictions(targets[:, None]), labels, rtol=1e-5)
        assert float(head.loss(torch.zeros(len(labels), 1), targets)) == pytest.approx(1, abs=1e-5)
    elif kind == "binary":
        outputs = torch.randn(len(labels), 1)
        assert roc_auc_score(labels, head.predictions(outputs)) == roc_auc_score(labels, outputs[:, 0])
        assert float(head.loss(torch.zeros(len(labels), 1), targets)) == pytest.approx(np.log(2))
    else:
        assert head.outputs == 3
        np.testing.assert_allclose(head.predictions(torch.randn(5, 3)).sum(axis=1), 1)
