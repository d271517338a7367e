"""From pretraining to predictions for a new cohort, unattended, on phantoms at 4 mm, by the commands that a user types.

Three cohorts, of other seeds: one to pretrain on, one with labels, and a new one whose ages are predicted, as it is and
with noise. Every command is printed, and goes on where an interrupted run of this script stopped. The page that is
printed, in Markdown, says whatever comes out.

python benchmarks/end_to_end.py FOLDER [--only finetune predict …] [--patients 80] [--labelled 80] … > page.md
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from _measure import first_table, machine, print_table
from scipy.stats import betabinom

from brainfm.downstream.corruptions import CORRUPTIONS
from brainfm.downstream.kept import read_kept

COHORTS = {"unlabelled": 0, "labelled": 1, "new": 2}  # and their seeds
NOISE = 0.5  # in units of the std of the brain's own intensities
COVERAGE = 0.9
STARTS = ("anew", "continued")
EFFICIENT = ("probe", "norm_bias", "adapter", "lora", "finetune")


class Chain:
    """The commands, one after another, each of them in the folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, Path(arguments.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.encoder = _export(arguments.starts[-1])
        self.seconds: list[tuple[str, float]] = []

    def brainfm(self, *words: object) -> str:
        """Run a command; print it, and return what it said on stdout. All that it says goes to `log.txt` too."""
        command = [str(word) for word in words]
        print(f"$ brainfm {' '.join(command)}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"$ brainfm {' '.join(command)}\n")
            log.flush()
            done = subprocess.run(
                [sys.executable, "-m", "brainfm", *command],
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            log.write(done.stdout)
        if done.returncode:
            sys.exit(f"brainfm {command[0]} ended with exit code {done.returncode}; see {self.folder / 'log.txt'}")
        self.seconds.append((" ".join(command), time.perf_counter() - started))
        return done.stdout

    # --- The parts, in their order ---

    def phantoms(self) -> None:
        """Three cohorts, and of the new one a copy with noise."""
        sizes = (self.arguments.patients, self.arguments.labelled, self.arguments.new)
        for (name, seed), size in zip(COHORTS.items(), sizes, strict=True):
            self.brainfm("phantom", "--n", size, "--spacing", 4, "--seed", seed, "--out", name)
        manifest = self.folder / "new" / "manifest.csv"
        for n, scan in pd.read_csv(manifest).iterrows():
            image, mask = (nib.load(manifest.parent / scan[name]) for name in ("image_path", "mask_path"))
            voxels, inside = image.get_fdata(dtype=np.float32), np.asarray(mask.dataobj) > 0
            noisy, _ = CORRUPTIONS["noise"](voxels, inside, image.affine, NOISE, np.random.default_rng(n))
            for name, array in (("image_path", noisy), ("mask_path", inside.astype(np.uint8))):
                path = self.folder / "noisy" / scan[name]
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, image.affine), path)
        shutil.copy(manifest, self.folder / "noisy")

    def pretrain(self) -> None:
        """An encoder that begins anew, and one that continues from the packaged weights."""
        for start in self.arguments.starts:
            more = [f"init={self.arguments.model}"] if start == "continued" else []
            self._pretrain(f"output=runs/{start}", *more)

    def finetune(self) -> None:
        """Each of them, to predict age; every run's model is kept."""
        self.brainfm(
            *("finetune", "labelled/manifest.csv", "--label", "age", "--kind", "regression", "--keep-models"),
            *("--models", *map(_export, self.arguments.starts), "-o", "finetuned", *self._trained()),
        )
        print(f"### Fine-tuning\n\n{first_table(self.folder / 'finetuned' / 'table.md')}\n")

    def predict(self) -> None:
        """The ages of the new cohort, as it is and with noise, by every kept model: do the intervals hold the truth?"""
        rows = []
        for model in sorted((self.folder / "finetuned" / "models").iterdir()):
            for cohort in ("new", "noisy"):
                found = f"predictions/{model.name}-{cohort}.csv"
                (self.folder / "predictions").mkdir(exist_ok=True)
                self.brainfm(
                    *("predict", model.relative_to(self.folder), f"{cohort}/manifest.csv", "-o", found),
                    *("--coverage", COVERAGE),
                )
                rows.append([f"`{model.name}`", cohort, *self._coverage(model, cohort, self.folder / found)])
        print(f"### `predict` on {self.arguments.new} new phantoms: intervals of {COVERAGE:.0%}\n")
        print_table(
            ["model", "cohort", "MAE, years", "width, years", "truth inside", "of 20 such runs 19 have", "unlike"], rows
        )
        print()

    def sites(self) -> None:
        """Age, tested on each site by what learned from the others; sites differ in contrast, noise and bias field."""
        task = {"label": "age", "kind": "regression", "metric": "mae", "unit": "years", "title": "Age"}
        task |= {"manifest": "labelled/manifest.csv", "leave_out": "site"}
        (self.folder / "age_by_site.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
        modes = ("probe", "knn", "finetune")
        self._benchmark("age_by_site.yaml", "--modes", *modes, "--models", self.encoder, "-o", "sites")
        print(f"### Leave-site-out\n\n{first_table(self.folder / 'sites' / 'table.md')}\n")

    def sweeps(self) -> None:
        """Augmentation, and scale of the data."""
        for name, sweep in (
            ("shift", "sweep=augmentation.shift:0,0.5,0.8"),
            ("patients", "patients=0.1,0.25,0.5,1.0"),
        ):
            evaluated = "evaluate=phantom_age:labelled/manifest.csv"
            self._pretrain(f"output=sweeps/{name}", sweep, evaluated, "--seeds", self.arguments.seeds)
            found = pd.read_csv(self.folder / "sweeps" / name / "sweep.csv")
            print(f"### `{sweep}`\n")
            print_table(
                ["variant", "patients", "steps", "loss", "age: MAE, years, of a linear probe", "interval"],
                [_sweep_row(row) for _, row in found.iterrows()],
            )
            print(f"\nFigure: `sweeps/{name}/sweep_phantom_age.svg`\n")

    def peft(self) -> None:
        """What is trained, and of how many parameters."""
        self._benchmark(
            "phantom_age",
            "--manifest",
            "labelled/manifest.csv",
            "--modes",
            *EFFICIENT,
            "--models",
            self.encoder,
            "-o",
            "peft",
        )
        print(f"### Parameter-efficient fine-tuning\n\n{first_table(self.folder / 'peft' / 'table.md')}\n")

    def compare(self) -> None:
        """What noise does to the embeddings, and to a probe of them."""
        for cohort in ("new", "noisy"):
            self.brainfm("embed", f"{cohort}/manifest.csv", "--model", self.encoder, "-o", f"{cohort}.csv")
        labels = ("--labels", "new/manifest.csv", "--label", "age", "--kind", "regression")
        said = self.brainfm("compare", "new.csv", "noisy.csv", *labels, "-o", "compared.csv")
        print(f"### `compare`: the new phantoms as they are, and with noise\n\n```\n{said.strip()}\n```\n")

    # --- What they share ---

    def _pretrain(self, *more: object) -> None:
        given = self.arguments
        self.brainfm(
            *("pretrain", "test_resnet_3d", f"model={given.model}", "manifest=unlabelled/manifest.csv"),
            *(f"epochs={given.epochs}", f"batch_size={max(2, given.patients // 10)}", "workers=0", *more),
        )

    def _benchmark(self, *words: object) -> None:
        self.brainfm("benchmark", *words, *self._trained())

    def _trained(self) -> list[object]:
        given = self.arguments
        scale = ("--epochs-scale", given.finetune_epochs / 100, "--seeds", given.seeds)
        return [*scale, "--no-controls", "--set", "lr=1e-3", "workers=0"]

    def _coverage(self, model: Path, cohort: str, path: Path) -> list[str]:
        """Mean error, mean width, how many hold the truth, how many should, and how many are unlike all."""
        truth = pd.read_csv(self.folder / cohort / "manifest.csv", dtype={"patient_id": str, "scan_id": str})
        found = pd.read_csv(path, dtype={"patient_id": str, "scan_id": str})
        both = found.merge(truth[["patient_id", "scan_id", "age"]], on=["patient_id", "scan_id"], validate="1:1")
        inside = both["age"].between(both["low"], both["high"])
        # Of n exchangeable validation scores the k-th smallest covers Beta(k, n + 1 - k) of the new scans.
        n = len(read_kept(model).arrays["val.scores"])
        k = min(int(np.ceil((n + 1) * COVERAGE - 1e-9)), n)
        low, high = betabinom(len(both), k, n + 1 - k).ppf([0.025, 0.975]) / len(both)
        return [
            f"{(both['age'] - both['prediction']).abs().mean():.1f}",
            f"{(both['high'] - both['low']).mean():.1f}",
            f"{inside.mean():.1%} ({inside.sum()} of {len(both)})",
            f"{low:.0%} to {high:.0%}",
            f"{(both['unlike'] == 100).sum()} of {len(both)}",
        ]


def _export(run: str) -> str:
    return f"local-dir:runs/{run}/export"


def _sweep_row(row: pd.Series) -> list[str]:
    """A variant, or a control, which has no pretraining."""
    trained = [f"{row['n_patients']:.0f}", f"{row['steps']:.0f}", f"{row['loss']:.3f}"]
    mean, std, low, high = (row[f"phantom_age mae{part}"] for part in ("", " sd", " low", " high"))
    return [
        str(row["variant"]),
        *(["", "", ""] if pd.isna(row["steps"]) else trained),
        *(f"{mean:.2f} ± {std:.2f}", f"{low:.2f} to {high:.2f}"),
    ]


PARTS = {
    part.__name__: part
    for part in (
        *(Chain.phantoms, Chain.pretrain, Chain.finetune, Chain.predict),
        *(Chain.sites, Chain.sweeps, Chain.peft, Chain.compare),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="keeps everything; an interrupted run goes on")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts whose earlier ones have ended")
    parser.add_argument("--model", default="test_vit_3d", help="at 4 mm; test_resnet_3d takes five times as long")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="of pretraining")
    parser.add_argument("--patients", type=int, default=80, help="to pretrain on")
    parser.add_argument("--labelled", type=int, default=80)
    parser.add_argument("--new", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=6, help="of pretraining")
    parser.add_argument("--finetune-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # at 4 mm several threads wait for each other
    chain = Chain(arguments)
    started = time.perf_counter()
    for name in PARTS:
        if name in arguments.only:
            PARTS[name](chain)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{arguments.patients} phantoms to pretrain {arguments.model} on for {arguments.epochs} epochs, "
        f"{arguments.labelled} with labels, {arguments.new} new; {arguments.finetune_epochs} epochs of fine-tuning, "
        f"{arguments.seeds} seeds: {time.perf_counter() - started:.0f} s, of processor time "
        f"{used.ru_utime + used.ru_stime:.0f} s\n\n{machine()}\n\n```bash"
    )
    for command, seconds in chain.seconds:
        print(f"brainfm {command}    # {seconds:.0f} s")
    print("```")


if __name__ == "__main__":
    main()
