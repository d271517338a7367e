"""Embed the scans of a manifest, and cross-validate a scikit-learn classifier on the embeddings.

python examples/embed_and_classify.py manifest.csv --label diagnosis

The manifest has the columns image_path, mask_path, patient_id and the label. Scans of one patient stay in one fold.
"""

import argparse

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import brainfm


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--label", default="label")
    parser.add_argument("--model", default="simclr_resnet18_3d")
    parser.add_argument("--output", default="embeddings.csv", help="the table; an interrupted run goes on from it")
    options = parser.parse_args(arguments)

    table = brainfm.embed(options.manifest, options.model, output=options.output, progress=True)
    columns = table.columns()
    labels, patients = np.array(columns[options.label]), np.array(columns["patient_id"])

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = StratifiedGroupKFold(n_splits=3, shuffle=True, random_state=0)
    scores = cross_val_score(classifier, table.vectors, labels, groups=patients, cv=folds, scoring="roc_auc")
    print(
        f"{len(table)} scans, {len(table.errors)} failed; ROC AUC {scores.mean():.3f} ± {scores.std():.3f} over 3 folds"
    )
    return float(scores.mean())


if __name__ == "__main__":
    main()
