"""Everything of an evaluation on phantoms at 4 mm, unattended, by the commands that a user types, and one page with it.

Planted is: a site (every second pair of patients is scanned by a scanner of less resolution), a disparity (ages of
one clinic are recorded 15 years off), and in follow-up scans an atrophy of known size, which a measure and an event
follow. Every command is printed; an interrupted run of this script goes on where it stopped. What is printed at the
end, in Markdown, says whatever came out: what harmonisation leaves of the site, the largest disparity, coverage, from
which size on a change is seen, and how many corrupted scans are said to be unlike the rest.

python benchmarks/evaluation.py FOLDER [--patients 200] [--models test_resnet_3d test_vit_3d] > page.md
"""

import argparse
import json
import resource
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from _measure import machine, print_table

from brainfm.cli import main
from brainfm.downstream import predict
from brainfm.downstream.corruptions import CORRUPTIONS, corrupted
from brainfm.downstream.recovery import atrophy
from brainfm.files import write_text
from brainfm.manifest import read_manifest
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg

SMOOTH_MM = 4.0  # std of the Gaussian that scanner "b" blurs by
YEARS = (0.0, 0.1, 2.0)  # of a patient's visits: the second is a retest
CORRUPTED = {"noise": 1.0, "bias_field": 0.8, "ghosting": 1.0, "blur": 4.0, "residual_skull": 4.0, "intensity": 0.7}


class Evaluation:
    """The commands, one after another, each of them in the folder; `done.json` has the seconds of those that ended."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, Path(arguments.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.models = arguments.models
        self.done = self.folder / "done.json"
        self.seconds: dict[str, float] = json.loads(self.done.read_text()) if self.done.exists() else {}
        self.log = (self.folder / "log.txt").open("a", encoding="utf-8")  # open to the end: loggers keep it

    def brainfm(self, *words: object) -> None:
        """Run a command, in this process, which imports all of it once; print it, and all that it says to `log.txt`."""
        command = [str(word) for word in words]
        name, started, code = " ".join(command), time.perf_counter(), 0
        print(f"$ brainfm {name}{' (is done)' if name in self.seconds else ''}", file=sys.stderr, flush=True)
        if name in self.seconds:
            return
        self.log.write(f"$ brainfm {name}\n")
        with chdir(self.folder), redirect_stdout(self.log), redirect_stderr(self.log):
            try:
                main.main(command, prog_name="brainfm", standalone_mode=True)
            except SystemExit as ended:
                code = int(ended.code or 0)
        self.log.flush()
        if code:
            sys.exit(f"brainfm {command[0]} ended with exit code {code}; see {self.folder / 'log.txt'}")
        self.seconds[name] = time.perf_counter() - started
        write_text(self.done, json.dumps(self.seconds))

    # --- The parts, in their order ---

    def phantoms(self) -> None:
        """A cohort whose labels are learned, patients with visits, and a new cohort of healthy phantoms."""
        self.brainfm("phantom", "--n", self.arguments.patients, "--spacing", 4, "--seed", 1, "--out", "cohort")
        self.brainfm("phantom", "--n", 24, "--spacing", 4, "--seed", 2, "--scans-per-patient", 3, "--out", "visits")
        self.brainfm("phantom", "--n", 16, "--spacing", 4, "--seed", 3, "--out", "new")
        if not (self.folder / "visits" / "people.csv").exists():
            self._plant_site_and_disparity()
            self._plant_atrophy()

    def _plant_site_and_disparity(self) -> None:
        """Scanner "b" blurs; of every second patient, of clinic "b", the age is recorded wrongly."""
        cohort, draws = self.folder / "cohort", np.random.default_rng(0)
        table = pd.read_csv(cohort / "manifest.csv")
        table["scanner"] = np.where(np.arange(len(table)) // 2 % 2, "b", "a")
        for row in np.flatnonzero(table["scanner"] == "b"):
            image, mask = (nib.load(cohort / table[name][row]) for name in ("image_path", "mask_path"))
            brain = np.asarray(mask.dataobj) > 0
            found, _ = CORRUPTIONS["blur"](image.get_fdata(dtype=np.float32), brain, image.affine, SMOOTH_MM, draws)
            path = cohort / table["image_path"][row].replace("normalized", "smooth")
            nib.save(nib.Nifti1Image(found, image.affine), path)
            table.loc[row, "image_path"] = str(path.relative_to(cohort))
        table["clinic"] = np.where(np.arange(len(table)) % 2, "b", "a")
        off = 15 * draws.choice([-1, 1], len(table)) * (table["clinic"] == "b")
        table["age"] = (table["age"] + off).round(1)
        table.to_csv(cohort / "people.csv", index=False)
        task = {"label": "age", "kind": "regression", "metric": "mae", "unit": "years", "covariates": ["sex"]}
        task |= {"title": "Age, of one clinic recorded wrongly", "manifest": "cohort/people.csv"}
        (self.folder / "planted_age.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")

    def _plant_atrophy(self) -> None:
        """At the last visit a patient's brain has lost 0 to 6 % of its tissue; a measure and an event say so too."""
        manifest, draws = self.folder / "visits" / "manifest.csv", np.random.default_rng(0)
        table = pd.read_csv(manifest)
        visit = table.groupby("patient_id").cumcount().to_numpy()
        table["years"] = np.array(YEARS)[visit]
        loss = dict(zip(table["patient_id"].unique(), draws.uniform(0, 6, table["patient_id"].nunique()), strict=True))
        lost = table["patient_id"].map(loss).to_numpy()
        for row in np.flatnonzero(visit == len(YEARS) - 1):
            path = self.folder / "visits" / table["image_path"][row].replace("normalized", "atrophied")
            image = nib.load(self.folder / "visits" / table["image_path"][row])
            mask = np.asarray(nib.load(self.folder / "visits" / table["mask_path"][row]).dataobj) > 0
            plant = atrophy(image.get_fdata(dtype=np.float32), mask, image.affine, draws)
            nib.save(nib.Nifti1Image(plant(lost[row]), image.affine), path)
            table.loc[row, "image_path"] = str(path.relative_to(manifest.parent))
        table["memory"] = (30 - lost * table["years"] / YEARS[-1] + draws.normal(0, 0.3, len(table))).round(2)
        table["converted"] = (lost > 3).astype(int)
        table["known_years"] = np.where(lost > 3, 9 / np.maximum(lost, 1), 3.0).round(2)
        table.to_csv(manifest.with_name("people.csv"), index=False)

    def benchmark(self) -> None:
        """Two tasks in nested folds: harmonised, by groups of people, and with certainty."""
        self.brainfm(
            *("benchmark", "planted_age.yaml", "phantom_sex", "--manifest", "cohort/people.csv", "-o", "results"),
            *("--models", *self.models, "--modes", "probe", "--set", "device=cpu"),
            *("--folds", 5, "--seeds", self.arguments.seeds),
            *("--harmonise", "covbat-noeb", "--site", "scanner", "--fairness", "clinic", "sex", "--least-group", 10),
        )

    def beside(self) -> None:
        """Planted changes, patients over time and dense features, on the same page."""
        models = [word for name in self.models for word in ("--model", name)]
        self.brainfm("recovery", "--phantoms", 8, *models, "-o", "results/recovery")
        tables = [f"{name}.npz" for name in self.models]
        for name, table in zip(self.models, tables, strict=True):
            self.brainfm("embed", "visits/people.csv", "--model", name, "-o", table)
        self.brainfm(
            *("longitudinal", "visits/people.csv", "--embeddings", *tables, "--time", "years", "--slope", "memory"),
            *("--event", "converted", "--duration", "known_years", "--covariates", "age", "-o", "results/longitudinal"),
        )
        self.brainfm("segment", "--phantoms", 6, *models, "-o", "results/segmentation")
        for name in ("longcombat", "longcovbat"):
            self.brainfm(
                *("probe", "visits/people.csv", "--embeddings", tables[0], "--label", "sex", "-o", name),
                *("--harmonise", name, "--site", "site", "--seeds", 2),
            )
        self._write_atlas()
        self.brainfm("regions", "new/manifest.csv", "--model", self.models[0], "--atlas", "atlas.nii.gz", "-o", "r.npz")

    def _write_atlas(self) -> None:
        """The brain's four quarters, in MNI."""
        first = pd.read_csv(self.folder / "new" / "manifest.csv").iloc[0]
        mask = nib.load(self.folder / "new" / first["mask_path"])
        inside = np.asarray(mask.dataobj) > 0
        places = nib.affines.apply_affine(mask.affine, np.moveaxis(np.indices(inside.shape), 0, -1))
        quarter = 1 + (places[..., 0] > 0) + 2 * (places[..., 1] > 0)
        nib.save(nib.Nifti1Image((quarter * inside).astype(np.int16), mask.affine), self.folder / "atlas.nii.gz")

    def encoders(self) -> None:
        """Encoders alike on the same scans, and the folders by which leaderboards of others take one."""
        self.brainfm(
            *("compare-encoders", "cohort/people.csv", "--label", "sex", "--models", *self.models, "-o", "compared"),
            *("--harmonise", "combat", "--site", "scanner", "--fairness", "clinic", "--least-group", 10),
            *("--folds", 5, "--seeds", 1, "--device", "cpu", "--no-controls"),  # the zoo's are of full size
        )
        for leaderboard in ("brainfmbench", "fomo26", "brainmarks"):
            self.brainfm("export-extractor", self.models[0], "--for", leaderboard, "-o", leaderboard)

    def certainty(self) -> None:
        """A model that is kept, and which new phantoms, healthy and corrupted, it says are unlike its own."""
        self.brainfm(
            *("finetune", "cohort/manifest.csv", "--label", "sex", "--kind", "binary", "--models", self.models[0]),
            *("--keep-models", "--no-controls", "--seeds", 1, "--epochs-scale", 0.02, "-o", "kept"),
        )
        (model,) = (self.folder / "kept" / "models").iterdir()
        new = read_manifest(self.folder / "new" / "manifest.csv")
        spec = self._cfg().input_spec
        assert spec is not None
        rows = []
        for name, strength in {"healthy": 0.0, **CORRUPTED}.items():
            scans = new if name == "healthy" else corrupted(new, name, strength, spec=spec)
            found = predict(model, scans, device="cpu")
            flags = found.table["out_of_distribution"]
            unit = "" if name == "healthy" else CORRUPTIONS[name].unit
            rows.append(
                [name, f"{strength:g} {unit}".strip(), f"{flags.sum()} of {len(flags)}", str(len(found.errors))]
            )
        print("### Said to be unlike the training scans, of 16 new phantoms\n")
        print_table(["scans", "strength", "said to be unlike", "refused before"], rows)
        print()

    def _cfg(self) -> PretrainedCfg:
        return get_pretrained_cfg(self.models[0])

    def again(self) -> None:
        """All of the benchmark once more, by its data sheet: the same results.csv to the byte."""
        self.brainfm("benchmark", "--from", "results/run.json", "-o", "again")
        same = (self.folder / "again" / "results.csv").read_bytes() == (
            self.folder / "results" / "results.csv"
        ).read_bytes()
        print(f"`brainfm benchmark --from`: results.csv is {'the same to the byte' if same else 'ANOTHER'}.\n")

    def summary(self) -> None:
        """What was planted, and what was found of it."""
        results = self.folder / "results"
        sites = [self._read(f"{folder}/harmonisation.csv") for folder in ("results", "compared", *LONGITUDINAL)]
        mean = pd.concat(sites).groupby(["task", "model", "mode"], sort=False)
        _print("Sites read from the embeddings, balanced accuracy", mean[list(SITES)].mean().reset_index())
        worst = self._read("results/disparities.csv").query("metric == 'mae' and column == 'clinic'")
        _print("The largest disparities of the mean absolute error, years", worst[list(WORST)])
        sure = self._read("results/certainty.csv")
        _print("Coverage", sure[sure["nominal"] == 0.9][list(SURE)])
        groups = self._read("results/fairness.csv").query("metric == 'coverage' and column == 'clinic'")
        _print("Coverage by group", groups[["task", "model", "mode", "group", "value", "ci_low", "ci_high"]])
        scores = self._read("results/results.csv").groupby(["task", "model", "mode", "metric"], sort=False)["value"]
        table = scores.mean().unstack("metric").reset_index()
        _print("Scores and calibration", table[["task", "model", "mode", "mae", "auc", "brier", "ece"]])
        tests = pd.DataFrame(json.loads((results / "grid.json").read_text())["tests"])
        _print("Paired tests", tests[list(TESTS)])
        _print("Planted changes", self._read("results/recovery/verdicts.csv")[list(SEEN)])
        _print("Test and retest", self._read("results/longitudinal/reliability.csv"))
        _print("Progression", self._read("results/longitudinal/scores.csv"))
        _print("Models by mixed-effects models", self._read("results/longitudinal/comparisons.csv"))
        _print("Segmentation, Dice", self._read("results/segmentation/dice.csv"))

    def _read(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)


LONGITUDINAL = ("longcombat", "longcovbat")
SITES = ("chance", "site_before", "site_after")
WORST = ("model", "mode", "lowest", "highest", "difference", "ci_low", "ci_high", "p_value", "p_holm")
SURE = ("task", "model", "mode", "nominal", "coverage", "expected", "expected_sd", "out_of_distribution")
TESTS = ("task", "first", "second", "test", "difference", "p_value", "p_holm", "patients_needed")
SEEN = ("model", "change", "unit", "rising", "distance_rank", "seen_from", "probe_rank", "read_from")


def _print(title: str, table: pd.DataFrame) -> None:
    print(f"### {title}\n")
    print_table(list(table.columns), [[_short(value) for value in row] for row in table.to_numpy(dtype=object)])
    print(flush=True)


def _short(value: object) -> str:
    return str(value) if not isinstance(value, float) else "–" if np.isnan(value) else f"{value:.3g}"


PARTS = ("phantoms", "benchmark", "beside", "encoders", "certainty", "again", "summary")


def evaluate() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=["test_resnet_3d", "test_vit_3d"])
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="times the five folds")
    arguments = parser.parse_args()
    started, everything = time.perf_counter(), Evaluation(arguments)
    for part in PARTS:
        if part in arguments.only:
            getattr(everything, part)()
    wall = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(one.ru_utime + one.ru_stime for one in used)
    print(f"\n### Time\n\n{wall / 60:.1f} minutes, {processor / 60:.1f} of a processor, in this run\n")
    print_table(
        ["command", "s"], [[f"`brainfm {name}`", f"{seconds:.0f}"] for name, seconds in everything.seconds.items()]
    )
    print(f"\n{machine()}")


if __name__ == "__main__":
    evaluate()
