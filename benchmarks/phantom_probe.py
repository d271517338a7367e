"""What the pretrained tiny models know of phantoms they never saw, against the same encoders untrained.

A linear model on frozen embeddings reads the four labels of new phantoms (another seed than the pretraining's), a third
of the patients held out. Each seed is another split and another untrained encoder.

python benchmarks/phantom_probe.py [--models NAME ...] [--patients 300] [--seeds 5]
"""

import argparse
import csv
import statistics
import tempfile

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import brainfm
from brainfm.phantom import make_cohort

COHORT_SEED = 1  # the packaged weights saw seed 0
LABELS = {"age": "R²", "sex": "AUC", "disease": "AUC", "severity": "R²"}


def score(features: np.ndarray, labels: np.ndarray, metric: str, seed: int) -> float:
    """The metric of a linear model on a held-out third; its regularisation is chosen inside the other two."""
    stratify = labels if metric == "AUC" else None
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, random_state=seed, stratify=stratify)
    if metric == "AUC":
        strengths = {"logisticregression__C": np.logspace(-4, 2, 7)}
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        with threadpool_limits(1):  # many small fits: threads cost more than they bring
            probe = GridSearchCV(probe, strengths, cv=5, scoring="roc_auc").fit(features[train], labels[train])
        return float(roc_auc_score(labels[test], probe.decision_function(features[test])))
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15))).fit(features[train], labels[train])
    return float(r2_score(labels[test], probe.predict(features[test])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["test_resnet_3d", "test_vit_3d"])
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()

    print(
        f"{arguments.patients} phantoms at 4 mm, a third held out; {arguments.seeds} seeds, mean ± standard deviation\n"
    )
    print("| encoder | " + " | ".join(f"{label} ({metric})" for label, metric in LABELS.items()) + " |")
    print("|---" * (len(LABELS) + 1) + "|")
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_cohort(arguments.patients, folder, spacing=4.0, seed=COHORT_SEED)
        with manifest.open() as file:
            rows = list(csv.DictReader(file))
        columns = {label: np.array([float(row[label]) for row in rows]) for label in LABELS}
        for name in arguments.models:
            model = brainfm.create_model(name, pretrained=True)
            frozen = brainfm.embed(manifest, model).vectors
            architecture = model.pretrained_cfg.architecture
            results = {f"{name}": [frozen] * arguments.seeds, f"{architecture}, untrained": []}
            for seed in range(arguments.seeds):
                torch.manual_seed(seed)
                untrained = brainfm.create_model(architecture)
                results[f"{architecture}, untrained"].append(brainfm.embed(manifest, untrained).vectors)
            for title, features in results.items():
                cells = []
                for label, metric in LABELS.items():
                    scores = [score(x, columns[label], metric, seed) for seed, x in enumerate(features)]
                    cells.append(f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}")
                print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nbrainfm {brainfm.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
