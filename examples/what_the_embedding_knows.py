"""What does an embedding know beside what you ask it? Patients, sites, and scans that are like no other.

python examples/what_the_embedding_knows.py MANIFEST [--model simclr_resnet18_3d] [--column site] [--map map.png]

MANIFEST has image_path, patient_id (two scans of some patients) and the column, such as the site or the scanner.
"""

import argparse

import brainfm
from brainfm.downstream.knowledge import (
    OutOfDistribution,
    embedding_map,
    leakage_probe,
    plot_map,
    retrieval,
    same_patient_similarity,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("--model", default="simclr_resnet18_3d")
    parser.add_argument("--column", default="site")
    parser.add_argument("--map", default="map.png")
    arguments = parser.parse_args(argv)

    table = brainfm.embed(arguments.manifest, arguments.model, progress=True)
    patients = [record.patient_id for record in table.records]
    column = [record.extra[arguments.column] for record in table.records]

    found = retrieval(table.vectors, patients)
    print(f"nearest neighbour is the same patient: {found.fraction:.0%} (by chance {found.chance:.0%})")
    again = same_patient_similarity(table.vectors, patients)
    print(f"cosine within patients {again.within:.3f}, between {again.between:.3f}; median ICC {again.icc_median:.2f}")
    leak = leakage_probe(table.vectors, column, patients, folds=4)
    print(f"{arguments.column} is read at {leak.balanced_accuracy:.0%} balanced accuracy (chance {leak.chance:.0%})")
    strange = OutOfDistribution().fit(table.vectors, patients).score(table.vectors)
    print(f"the strangest scan: {table.records[strange.argmax()].image}")
    plot_map(embedding_map(table.vectors), column, arguments.map, title=arguments.column)
    print(f"map: {arguments.map}")
    return found, again, leak


if __name__ == "__main__":
    main()
