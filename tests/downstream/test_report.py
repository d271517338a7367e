import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import brier_score_loss, mean_absolute_error, mean_squared_error, roc_auc_score

from brainfm.downstream import plots
from brainfm.downstream.report import short_report, write_report
from brainfm.downstream.results import Published, read_evaluation
from brainfm.errors import BrainfmError

RESULTS = ["task", "model", "mode", "fraction", "seed", "metric", "value", "ci_low", "ci_high", "n_train", "n_test"]
PREDICTIONS = ["task", "model", "mode", "fraction", "seed", "patient_id", "label", "prediction"]
SCRIPT = "<script>document.body.id='run'</script>"

TASKS = [
    {"name": "stroke", "title": "Stroke scale", "kind": "regression", "metric": "mae", "label": "NIHSS"},
    {"name": "ad", "title": "Alzheimer's & healthy", "kind": "binary", "metric": "auc"},
    {"name": "sex", "title": f"Sex {SCRIPT}", "kind": "binary", "metric": "auc"},
    {"name": "age", "title": "Age", "kind": "regression", "metric": "mae", "unit": "years", "label": "age"},
]
ROWS = [  # and how much each predicts of the label
    ({"model": "resnet18_3d", "mode": "scratch", "title": "ResNet-18 supervised"}, 1.5),
    ({"model": "vit_tiny_3d", "mode": "scratch", "title": "ViT-T supervised"}, 1.2),
    ({"model": "mae_vit_tiny_3d", "mode": "probe", "title": "MAE linear probe"}, 0.3),
    ({"model": "mae_vit_tiny_3d", "mode": "finetune", "title": "MAE fine-tuned"}, 1.0),
    ({"model": "simclr_resnet18_3d", "mode": "probe", "title": "SimCLR linear_probe | 50 % [ours]"}, 2.0),
    ({"model": "simclr_resnet18_3d", "mode": "finetune", "title": "SimCLR fine-tuned"}, 2.5),
]
CONTROLS = [
    ({"model": "simclr_resnet18_3d", "mode": "untrained", "title": "Untrained ResNet-18"}, 0.5),
    ({"model": "none", "mode": "covariates", "title": "Head size alone"}, 0.7),
]
FRACTIONS = [0.2, 0.4, 0.6, 0.8, 1.0]


def write_csv(path: Path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def benchmark(folder: Path, tasks=TASKS, patients=60, seeds=5) -> Path:
    """A made-up benchmark: every row on all labels with every seed, the last two also on fewer labels with two."""
    draw = np.random.default_rng(20250910)
    results, predictions = [], []
    plan = [(row, skill, 1.0, seed) for row, skill in ROWS + CONTROLS for seed in range(seeds)]
    plan += [(row, skill, part, seed) for row, skill in ROWS[-2:] for part in FRACTIONS[:-1] for seed in range(2)]
    for task in tasks:
        binary = task["kind"] == "binary"
        labels = draw.permutation(np.arange(patients) % 2) if binary else draw.uniform(20, 80, patients).round(1)
        for row, skill, fraction, seed in plan:
            evidence = skill * fraction * (labels - labels.mean()) / labels.std() + draw.normal(size=patients)
            if binary:
                guess = 1 / (1 + np.exp(-evidence))
                metrics = {"auc": roc_auc_score(labels, guess), "brier": brier_score_loss(labels, guess)}
            else:
                guess = labels.mean() + labels.std() * evidence / np.hypot(1, skill)
                metrics = {
                    "mae": mean_absolute_error(labels, guess),
                    "rmse": mean_squared_error(labels, guess) ** 0.5,
                    "r2": 1 - np.mean((labels - guess) ** 2) / labels.var(),
                }
            run = [task["name"], row["model"], row["mode"], fraction, seed]
            for name, value in metrics.items():
                width = draw.uniform(0.02, 0.05) * abs(value)
                results.append([*run, name, value, value - width, value + 1.5 * width, round(100 * fraction), patients])
            predictions += [[*run, f"sub-{n}", labels[n], guess[n]] for n in range(patients)]
    last = tasks[-1]["name"]
    published = {"simclr_resnet18_3d/probe": {"mean": 5.9, "sd": 0.16}, "vit_tiny_3d/scratch": {"mean": 7.53}}
    grid = {
        "title": f"A made-up benchmark {SCRIPT}",
        "made_by": "tests/downstream/test_report.py",
        "date": "2025-09-10",
        "command": "brainfm benchmark --name 'a & b' <folder>",
        "tasks": [*tasks[:-1], tasks[-1] | {"published": published, "published_source": "Kaczmarek et al. 2025"}],
        "rows": [row for row, _ in ROWS],
        "controls": [row for row, _ in CONTROLS],
        "notes": [
            {"task": last, "model": "simclr_resnet18_3d", "mode": None, "text": "Pretrained on 100 % of it."},
            {"task": last, "model": "resnet18_3d", "mode": "scratch", "text": "Three epochs_only."},
        ],
        "fractions": FRACTIONS,
        "seeds": seeds,
        "runs": len(plan) * len(tasks),
        "statements": ["Drawn numbers, not people.", f"No {SCRIPT} runs."],
        "tests": [
            {
                "task": last,
                "first": "simclr_resnet18_3d/finetune",
                "second": "resnet18_3d/scratch",
                "test": "paired bootstrap",
                "difference": -2.345,
                "ci_low": -3.1,
                "ci_high": -1.6,
                "p_value": 0.0004,
            }
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grid.json").write_text(json.dumps(grid))
    write_csv(folder / "results.csv", RESULTS, results)
    write_csv(folder / "predictions.csv", PREDICTIONS, predictions)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Figures are tested here."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """A folder of a whole benchmark with its report."""
    folder = benchmark(tmp_path_factory.mktemp("benchmark"))
    write_report(folder)
    return folder


@pytest.fixture
def age_only(tmp_path) -> Path:
    """A small benchmark: one regression task, two seeds."""
    return benchmark(tmp_path / "age", TASKS[3:], patients=12, seeds=2)


def tables(markdown: str) -> list[list[list[str]]]:
    """Cells of each table of a Markdown text, as a reader of it sees them."""
    found, lines = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            lines.append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
        elif lines:
            found.append([lines[0], *lines[2:]])
            lines = []
    return found


def expected(results: pd.DataFrame, task: str, row: dict, metric: str, decimals: int) -> str:
    rows = results[
        (results.task == task) & (results.model == row["model"]) & (results["mode"] == row["mode"])
        & (results.metric == metric) & (results.fraction == 1)
    ]  # fmt: skip
    values = rows["value"].to_numpy()
    sd = np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1))
    return f"{values.mean():.{decimals}f} ± {sd:.{decimals}f}".replace("-", "−")


def plain(cell: str) -> str:
    return re.sub(r"\*\*|\s*<sup>.*?</sup>", "", cell)


def test_every_number_of_the_main_table_is_the_mean_and_sd_over_seeds(reported):
    results = pd.read_csv(reported / "results.csv")
    head, *lines = tables((reported / "table.md").read_text())[0]
    assert head[0] == "Model"
    assert head[1::2] == [
        "Stroke scale: MAE ↓",
        "Alzheimer's &amp; healthy: AUC ↑",
        f"Sex {SCRIPT}: AUC ↑",
        "Age: MAE (years) ↓",
    ]
    assert head[2::2] == ["published"] * 4
    named = {line[0]: line for line in lines}
    for row, _ in ROWS + CONTROLS:
        cells = named[row["title"]]
        for task, cell in zip(TASKS, cells[1::2], strict=True):
            decimals = 3 if task["metric"] == "auc" else 2
            assert plain(cell) == expected(results, task["name"], row, task["metric"], decimals)


def test_console_has_the_main_tables_cells_under_their_titles_and_its_footnotes_without_markup(reported):
    cells = tables((reported / "table.md").read_text())[0][1:]
    progress, table, notes, page = short_report(reported).split("\n\n")
    assert progress == "All 224 runs are in."
    assert notes == "a: Pretrained on 100 % of it.\nb: Three epochs_only."
    assert page == f"{reported / 'index.html'}: the page with all tables and figures"
    lines = table.splitlines()
    under = next(n for n, line in enumerate(lines) if line.startswith("---"))
    ends = [match.span() for match in re.finditer("-+", lines[under])]
    columns = [[line[start:end].strip() for start, end in ends] for line in lines]
    titles = [" ".join(filter(None, words)) for words in zip(*columns[:under], strict=True)]
    assert titles[:3] == ["Model", "Stroke scale: MAE ↓", "published"]
    assert "".join(lines[under + 1 :]).count("\\") == 0
    bare = [[re.sub(r"</?sup>|\*\*|(?<!\w)\*|\*(?!\w)", "", cell) for cell in line] for line in cells]
    assert columns[under + 1 :] == bare


def test_a_table_beside_which_nothing_was_published_has_no_column_for_it(age_only):
    grid = json.loads((age_only / "grid.json").read_text())
    grid["tasks"][0]["published"] = {"another_model/probe": {"mean": 5.9}}
    (age_only / "grid.json").write_text(json.dumps(grid))
    write_report(age_only)
    assert tables((age_only / "table.md").read_text())[0][0] == ["Model", "Age: MAE (years) ↓"]
    assert r"& Age: MAE (years) $\downarrow$ \\" in (age_only / "table.tex").read_text()
    assert '<th scope="col">published' not in (age_only / "index.html").read_text()


def test_rows_keep_their_order_and_controls_stand_below_a_line(reported):
    lines = tables((reported / "table.md").read_text())[0][1:]
    titles = [row["title"] for row, _ in ROWS] + ["*Controls*"] + [row["title"] for row, _ in CONTROLS]
    assert [line[0] for line in lines] == titles


def test_best_row_of_a_task_is_bold_and_no_control_is(reported):
    lines = tables((reported / "table.md").read_text())[0][1:]
    for column, task in zip(range(1, 9, 2), TASKS, strict=True):
        means = {line[0]: float(plain(line[column]).split()[0]) for line in lines if line[column]}
        rows = {row["title"]: means[row["title"]] for row, _ in ROWS}
        best = (max if task["metric"] == "auc" else min)(rows, key=rows.get)
        assert [line[0] for line in lines if line[column].startswith("**")] == [best]


def test_published_numbers_stand_beside_ours_and_marks_are_footnotes(reported):
    text = (reported / "table.md").read_text()
    named = {line[0]: line for line in tables(text)[0]}
    assert named[ROWS[4][0]["title"]][8] == "5.90 ± 0.16"
    assert named["ViT-T supervised"][8] == "7.53"
    assert [line[2] for line in named.values() if line[0] != "Model"] == ["–"] * 6 + [""] + ["–"] * 2
    marked = {title: re.findall("<sup>(.*?)</sup>", line[7]) for title, line in named.items()}
    assert {title: marks for title, marks in marked.items() if marks} == {
        "ResNet-18 supervised": ["b"],
        ROWS[4][0]["title"]: ["a"],
        "SimCLR fine-tuned": ["a"],
        "Untrained ResNet-18": ["a"],
    }
    assert "- <sup>a</sup> Pretrained on 100 % of it.\n- <sup>b</sup> Three epochs\\_only." in text
    assert "Published numbers of Age: Kaczmarek et al. 2025" in text


def test_other_metrics_have_their_own_tables(reported):
    results = pd.read_csv(reported / "results.csv")
    found = tables((reported / "table.md").read_text())[1:5]
    assert [table[0] for table in found] == [
        ["Model", "RMSE ↓", "R² ↑"],
        ["Model", "Brier score ↓"],
        ["Model", "Brier score ↓"],
        ["Model", "RMSE (years) ↓", "R² ↑"],
    ]
    for task, table in zip(TASKS, found, strict=True):
        named = {line[0]: line[1:] for line in table}
        metrics = [("brier", 3)] if task["kind"] == "binary" else [("rmse", 2), ("r2", 3)]
        for row, _ in ROWS + CONTROLS:
            assert named[row["title"]] == [expected(results, task["name"], row, *metric) for metric in metrics]


def test_paired_tests_are_listed(reported):
    names = ["SimCLR fine-tuned", "ResNet-18 supervised"]
    listed = tables((reported / "table.md").read_text())[5]
    assert listed[1:] == [["*Age, paired bootstrap*", *[""] * 4], [*names, "−2.35", "−3.10 to −1.60", "< 0.001"]]


def test_no_row_is_bold_below_a_control_nor_of_too_few_patients(age_only, no_figures):
    def bold(**changes):
        grid = json.loads((age_only / "grid.json").read_text())
        (age_only / "grid.json").write_text(json.dumps(grid | changes))
        write_report(age_only)
        lines = tables((age_only / "table.md").read_text())[0][1:]
        return [line[0] for line in lines if line[1].startswith("**")]

    (best,) = bold()
    grid = json.loads((age_only / "grid.json").read_text())
    controls = grid["controls"] + [row for row in grid["rows"] if row["title"] == best]
    assert bold(tasks=[grid["tasks"][0] | {"too_small": "4 test patients, fewer than 20"}]) == []
    assert (
        "no gain is claimed of so few patients: 4 test patients, fewer than 20" in (age_only / "table.md").read_text()
    )
    rows = [row for row in grid["rows"] if row["title"] != best]
    assert bold(tasks=grid["tasks"], rows=rows, controls=controls) == []


WORKED = [  # the lowest and highest lead over the controls E and F, which have 0.80 and 0.70
    ("A", (0.01, 0.10), (0.10, 0.20), "above", "E"),
    ("B", (-0.01, 0.10), (0.10, 0.20), "not above", "E"),  # the interval holds 0
    ("C", (-0.06, -0.04), (0.04, 0.06), "not above", "E"),  # above one control only
    ("D", (0.02, 0.05), (-0.20, -0.10), "not above", "F"),
]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_gain_is_claimed_only_where_the_paired_test_of_every_control_says_so(tmp_path, no_figures, lower_is_better):
    """A worked example; for an error all values are mirrored about 0.5. The runs' own intervals say nothing here."""
    metric = "mae" if lower_is_better else "auc"
    lines, tests = [], []
    for name, value in [*((row[0], 0.85) for row in WORKED), ("E", 0.80), ("F", 0.70)]:
        for seed in range(2):
            number = 1 - value if lower_is_better else value
            lines.append(["task", name, "probe", 1.0, seed, metric, number, number - 0.3, number + 0.3, 10, 10])
    for name, *leads, _, _ in WORKED:
        for other, (low, high) in zip("EF", leads, strict=True):
            ends = [-high, -low] if lower_is_better else [low, high]
            one = {"task": "task", "first": f"{name}/probe", "second": f"{other}/probe", "test": "paired bootstrap"}
            tests.append(one | {"difference": sum(ends) / 2, "ci_low": ends[0], "ci_high": ends[1], "p_value": 0.5})
    write_csv(tmp_path / "results.csv", RESULTS, lines)
    kind = "regression" if lower_is_better else "binary"
    rows, grey = ([{"model": n, "mode": "probe", "title": n} for n in part] for part in ("ABCD", "EF"))
    task = {"name": "task", "title": "Task", "kind": kind, "metric": metric}
    grid = {"title": "Worked", "tasks": [task], "rows": rows, "controls": grey, "seeds": 2, "runs": 12, "tests": tests}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    claims = re.findall(r"^- (.): (above|not above) its controls: .* control, (.), has", text, re.MULTILINE)
    assert claims == [(name, verdict, closest) for name, _, _, verdict, closest in WORKED]


def with_tests(folder, controls, **numbers):
    """Gives every row a paired test against some of the controls."""
    grid = json.loads((folder / "grid.json").read_text())
    task = grid["tasks"][0]["name"]
    grid["tests"] = [
        {"task": task, "first": f"{row['model']}/{row['mode']}", "second": other, "test": "paired bootstrap"} | numbers
        for row in grid["rows"]
        for other in controls
    ]
    (folder / "grid.json").write_text(json.dumps(grid))
    return grid


BOTH = ("simclr_resnet18_3d/untrained", "none/covariates")


def test_nothing_is_claimed_without_a_test_or_its_interval(age_only, no_figures):
    with_tests(age_only, BOTH, difference=-1.0)
    write_report(age_only)
    claims = re.findall(r": (.*) its controls: .* without an interval", (age_only / "table.md").read_text())
    assert claims == ["not above"] * len(ROWS)
    with_tests(age_only, BOTH[:1], difference=-1.0, ci_low=-2.0, ci_high=-0.5)
    write_report(age_only)
    text = (age_only / "table.md").read_text()
    assert text.count("no gain is claimed without a paired test against Head size alone") == len(ROWS)


def test_nothing_is_claimed_before_every_control_is_in(age_only, no_figures):
    rows = list(csv.reader((age_only / "results.csv").open()))[1:]
    write_csv(age_only / "results.csv", RESULTS, [row for row in rows if row[2] != "covariates"])
    write_report(age_only)
    text = (age_only / "table.md").read_text()
    assert "above its controls:" not in text
    assert text.count("no gain is claimed before all controls are in; Head size alone: no result yet.") == len(ROWS)


def test_a_control_that_a_task_cannot_have_holds_back_no_claim(age_only, no_figures):
    rows = list(csv.reader((age_only / "results.csv").open()))[1:]
    write_csv(age_only / "results.csv", RESULTS, [row for row in rows if row[2] != "covariates"])
    grid = with_tests(age_only, BOTH[:1], difference=-1.0, ci_low=-2.0, ci_high=-0.5)
    grid["tasks"][0]["without"] = ["none/covariates"]
    (age_only / "grid.json").write_text(json.dumps(grid))
    write_report(age_only)
    assert (age_only / "table.md").read_text().count("the closest control, Untrained ResNet-18, has") == len(ROWS)


def test_data_of_a_task_warnings_and_what_is_left_out_are_on_every_page(age_only, no_figures):
    grid = json.loads((age_only / "grid.json").read_text())
    grid["tasks"][0] |= {
        "kind": "binary",
        "metric": "auc",
        "classes": ["F", "M"],
        "shares": [{"part": "train", "scans": [30, 31], "patients": [24, 24], "classes": [[12, 12], [11, 12]]}],
    }
    grid["warnings"] = ["test_resnet_3d: a test model."]
    grid["left_out"] = [{"task": "age", "scan": f"{n}.nii", "why": "no such file"} for n in range(25)]
    (age_only / "grid.json").write_text(json.dumps(grid))
    (age_only / "predictions.csv").unlink()
    write_report(age_only)
    head, line = tables((age_only / "table.md").read_text())[1]
    assert head == ["Part", "Scans", "Patients", "Patients: F (0)", "Patients: M (1)"]
    assert line == ["training", "30–31", "24", "12", "11–12"]
    page = Page((age_only / "index.html").read_text()).text
    for text in (
        "test_resnet_3d: a test model.",
        "11–12",
        "Left out: 25; the first 20, all are in left_out.csv",
        "19.nii",
    ):
        assert text in page
    assert "20.nii" not in page
    assert r"\textbf{Warning:} test\_resnet\_3d: a test model." in (age_only / "table.tex").read_text()


def test_figures_of_an_earlier_report_are_removed_and_others_kept(age_only):
    write_report(age_only)
    figures = age_only / "figures"
    for name in ("gone_roc.svg", "gone_label_efficiency.png", "my_own.png"):
        (figures / name).write_bytes(b"")
    write_report(age_only)
    assert (figures / "age_scores.svg").exists()
    assert {path.name for path in figures.iterdir() if path.name.startswith(("gone", "my"))} == {"my_own.png"}


def test_figures_are_written_as_png_and_svg(reported):
    binary = {"scores", "label_efficiency", "roc", "calibration"}
    regression = {"scores", "label_efficiency", "agreement"}
    names = {f"{t['name']}_{what}" for t in TASKS for what in (binary if t["kind"] == "binary" else regression)}
    assert {path.stem for path in (reported / "figures").iterdir()} == names
    for name in names:
        with Image.open(reported / "figures" / f"{name}.png") as image:
            assert min(image.size) > 400
            assert image.convert("L").getextrema() == (0, 255)
        assert "<svg" in (reported / "figures" / f"{name}.svg").read_text()[:600]


def test_roc_is_the_mean_curve_and_area_over_seeds():
    labels = np.array([0, 0, 1, 1.0])
    perfect, reversed_ = (labels, labels), (labels, 1 - labels)
    figure = plots.roc([(plots.looks(["row"])[0], [perfect, reversed_])], "task")
    line = figure.axes[0].lines[1]
    assert line.get_label() == "row (0.500)"
    np.testing.assert_allclose(line.get_ydata()[1:-1], 0.5)  # between 1 everywhere and 0 everywhere


def test_roc_curves_are_told_apart_without_their_colours():
    labels = np.array([0, 0, 1, 1.0])
    rows = plots.looks([str(n) for n in range(7)])
    curves = plots.roc([(look, [(labels, labels)]) for look in rows], "task").axes[0].lines[1:]
    assert len({(line.get_marker(), line.get_linestyle()) for line in curves}) == 7
    assert all(
        len(range(*slice(first, None, gap).indices(201))) > 5 for first, gap in (c.get_markevery() for c in curves)
    )


def test_label_efficiency_draws_means_and_bands(reported):
    look = plots.looks(["row"])[0]
    x, mean, sd = np.array([0.2, 1.0]), np.array([3.0, 2.0]), np.array([0.5, 0.25])
    axes = plots.label_efficiency([(look, x, mean, sd)], {0.2: "20 %\n20", 1.0: "100 %\n100"}, "task", "MAE").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), mean)
    band = axes.collections[0].get_paths()[0].vertices
    assert {(0.2, 2.5), (0.2, 3.5), (1.0, 1.75), (1.0, 2.25)} <= set(map(tuple, band))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["20 %\n20", "100 %\n100"]


def test_points_of_a_label_efficiency_curve_are_of_the_same_seeds(age_only, monkeypatch):
    """All labels were run with more seeds, and so with other splits, than the fractions of them."""
    rows = list(csv.reader((age_only / "results.csv").open()))[1:]
    rows = [row for row in rows if row[3] == "1.0" or row[4] == "0"]
    write_csv(age_only / "results.csv", RESULTS, rows)
    drawn, draw = [], plots.label_efficiency
    monkeypatch.setattr(plots, "label_efficiency", lambda curves, *a: drawn.extend(curves) or draw(curves, *a))
    write_report(age_only)
    assert len(drawn) == 2
    for (look, fractions, mean, _), (row, _) in zip(drawn, ROWS[-2:], strict=True):
        own = {float(r[3]): float(r[6]) for r in rows if [*r[1:3], *r[4:6]] == [row["model"], row["mode"], "0", "mae"]}
        assert (look.title, fractions.tolist()) == (row["title"], FRACTIONS)
        np.testing.assert_allclose(mean, [own[fraction] for fraction in FRACTIONS])


def test_rows_look_different_and_controls_are_grey():
    rows = plots.looks([str(n) for n in range(20)], ["control"])
    assert len({(look.colour, look.line) for look in rows}) == 21
    red, green, blue = (rows[-1].colour[n : n + 2] for n in (1, 3, 5))
    assert red == green == blue


class Page(HTMLParser):
    """Tags, their attributes and the text of an HTML page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + "\n"


def test_page_is_self_contained_and_escapes_everything(reported):
    page = Page((reported / "index.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1  # its own: those in titles are text
    assert page.text.count(SCRIPT) > 5
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(list((reported / "figures").glob("*.svg"))) == 14
    assert all(image["alt"] for image in images)


def test_page_shows_table_statements_command_and_progress(reported):
    page = Page((reported / "index.html").read_text()).text
    results = pd.read_csv(reported / "results.csv")
    for row, _ in ROWS + CONTROLS:
        for task in TASKS:
            assert expected(results, task["name"], row, task["metric"], 3 if task["metric"] == "auc" else 2) in page
    for text in ("Drawn numbers, not people.", "All 224 runs are in.", "brainfm benchmark --name 'a & b' <folder>"):
        assert text in page


def test_latex_is_one_tabular_with_escaped_text(reported):
    text = (reported / "table.tex").read_text()
    lines = text.splitlines()
    assert (lines[1], lines[-1]) == (r"\begin{tabular}{lcccccccc}", r"\end{tabular}")
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule")] == [1, 2, 1, 4]
    for line in lines[2:-1]:
        if not line.startswith(("\\toprule", "\\midrule", "\\bottomrule", "\\cmidrule")):
            assert line.endswith(r" \\")
            columns = len(re.findall(r"(?<!\\)&", line)) + 1
            columns += sum(int(n) - 1 for n in re.findall(r"\\multicolumn{(\d+)}", line))
            assert columns == 9, line
        bare = re.sub(r"\\[&%$#_{}]", "", line)
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert not re.search(r"(?<!\\)[%#_<>|]", line)
    assert r"SimCLR linear\_probe \textbar{} 50 \% {[}ours{]} & " in text
    assert r"Alzheimer's \& healthy: AUC $\uparrow$" in text
    assert "\N{PLUS-MINUS SIGN}" not in text
    results = pd.read_csv(reported / "results.csv")
    assert expected(results, "age", ROWS[1][0], "mae", 2).replace("±", r"$\pm$") + " & 7.53" in text


def test_half_a_run_has_dashes_and_says_so(age_only):
    head, *rows = csv.reader((age_only / "results.csv").open())
    kept = [
        row for row in rows if row[1] == "resnet18_3d" or (row[1:3] == ["vit_tiny_3d", "scratch"] and row[4] == "0")
    ]
    write_csv(age_only / "results.csv", head, kept)
    (age_only / "predictions.csv").unlink()
    write_report(age_only)
    text = (age_only / "table.md").read_text()
    assert "Not finished: 3 of 32 runs are in" in text
    named = {line[0]: line for line in tables(text)[0]}
    assert named["SimCLR fine-tuned"][1] == "– <sup>a</sup>"
    mean = float(next(row for row in kept if row[1] == "vit_tiny_3d" and row[5] == "mae")[6])
    assert plain(named["ViT-T supervised"][1]) == f"{mean:.2f} (n=1)"
    assert "SimCLR fine-tuned: no result yet." in text
    assert "Not finished: 3 of 32" in (age_only / "index.html").read_text()
    assert {path.name for path in (age_only / "figures").iterdir()} == {"age_scores.png", "age_scores.svg"}


def test_undefined_values_are_left_out_of_the_mean(age_only, no_figures):
    rows = list(csv.reader((age_only / "results.csv").open()))[1:]
    for row in rows:
        if row[5] == "r2" and row[4] == "1":
            row[6:9] = ["nan", "", ""]
    write_csv(age_only / "results.csv", RESULTS, rows)
    write_report(age_only)
    line = next(line for line in tables((age_only / "table.md").read_text())[1] if line[0] == "ViT-T supervised")
    value = float(next(row for row in rows if row[1] == "vit_tiny_3d" and row[5] == "r2" and row[4] == "0")[6])
    assert line[2] == f"{value:.3f} (n=1)".replace("-", "−")


def test_the_same_folder_gives_the_same_files(age_only):
    def files():
        return {path: path.read_bytes() for path in age_only.rglob("*") if path.is_file()}

    write_report(age_only)
    first = files()
    write_report(age_only)
    assert files() == first


def test_plan_is_read_as_it_was_written_and_what_is_not_ours_in_it_left_alone(age_only):
    planned = read_evaluation(age_only / "grid.json")
    assert planned.tasks[0].published == (
        Published("simclr_resnet18_3d/probe", 5.9, 0.16),
        Published("vit_tiny_3d/scratch", 7.53),
    )
    written = planned.to_dict()
    assert written["tasks"][0]["published"]["vit_tiny_3d/scratch"] == {"mean": 7.53, "sd": None}
    written["later"] = written["rows"][0]["later"] = written["tasks"][0]["later"] = "of another version"
    (age_only / "grid.json").write_text(json.dumps(written))
    assert read_evaluation(age_only / "grid.json") == planned


def test_a_refused_folder_keeps_its_last_report(age_only, no_figures):
    write_report(age_only)
    before = (age_only / "index.html").read_bytes()
    (age_only / "results.csv").write_text("")
    with pytest.raises(BrainfmError):
        write_report(age_only)
    assert (age_only / "index.html").read_bytes() == before


def cell(row: int, column: str, value: str):
    """A function that sets one cell of results.csv; row 2 is the first below the header, as editors count."""

    def change(folder: Path):
        rows = list(csv.reader((folder / "results.csv").open()))
        rows[row - 1][RESULTS.index(column)] = value
        write_csv(folder / "results.csv", rows[0], rows[1:])

    return change


def add(text: str):
    """A function that adds a line to results.csv."""

    def change(folder: Path):
        with (folder / "results.csv").open("a") as file:
            file.write(text + "\n")

    return change


def put(name: str, content: bytes | None):
    """A function that overwrites a file, or removes it."""

    def change(folder: Path):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    return change


def planned(old: str, new: str):
    """A function that replaces text of grid.json."""

    def change(folder: Path):
        text = (folder / "grid.json").read_text()
        assert old in text
        (folder / "grid.json").write_text(text.replace(old, new))

    return change


TWICE = "age,resnet18_3d,scratch,1.0,0,mae,3,2,4,100,12"

BAD = [
    (put("results.csv", b""), r"results\.csv: empty; it needs a header line with task"),
    (put("results.csv", ",".join(RESULTS).encode()), r"results\.csv: a header but no rows"),
    (put("results.csv", b"task,model\n1,2\n"), r"results\.csv, line 1: needs the column mode, metric, .* it has task"),
    (put("results.csv", b"\xff\xfe\x00"), r"results\.csv: not a readable CSV"),
    (put("results.csv", None), r"results\.csv: no such file; a report is made in the folder"),
    (add("age,none"), r"line \d+: 2 fields under a header of 11; correct or remove the line"),
    (add(TWICE), r"the same run and metric as line 2; remove one"),
    (cell(3, "value", "high"), r"line 3: value is 'high', and must be a finite number; correct the line"),
    (cell(3, "ci_low", "inf"), "line 3: ci_low is 'inf'"),
    (cell(4, "seed", ""), "line 4: seed is ''"),
    (cell(4, "seed", "0.5"), r"line 4: seed is 0\.5, and must be a count"),
    (cell(5, "fraction", "20"), r"line 5: fraction is 20\.0, and must be above 0 and at most 1"),
    (cell(2, "task", "iq"), r"line 2: task is 'iq', and must be of grid\.json: age"),
    (cell(2, "mode", "prob"), r"line 2: row is 'resnet18_3d/prob', and must be of grid\.json"),
    (put("grid.json", None), r"grid\.json: no such file"),
    (put("grid.json", b'{"title": '), r"grid\.json: not a readable JSON file"),
    (put("grid.json", b"[]"), r"grid\.json: Evaluation is made of named fields, not of \[\]"),
    (planned('"tasks"', '"works"'), r"grid\.json: Evaluation lacks tasks"),
    (planned('"mae"', '"maw"'), "Column: metric is 'maw', and must be one of auc"),
    (planned('"name": "age"', '"name": "../age"'), "name is '../age', and must be letters, digits"),
    (planned('"mean": 7.53', '"mean": "7.53"'), "Published: mean is '7.53', and must be float"),
    (planned('"vit_tiny_3d"', '"resnet18_3d"'), "the row resnet18_3d/scratch is there twice"),
    (planned('"regression"', '"multiclass"'), r"predictions\.csv, line 2: prediction is .* must be a probability"),
    (planned('"regression"', '"binary"'), r"predictions\.csv, line 2: label is .* must be 0 or 1 in a binary task"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_a_wrong_folder_is_refused_with_the_place(age_only, change, message):
    change(age_only)
    with pytest.raises(BrainfmError, match=message):
        write_report(age_only)
    assert not (age_only / "index.html").exists()


def test_titles_may_hold_what_matplotlib_and_markdown_take_for_markup(age_only):
    grid = json.loads((age_only / "grid.json").read_text())
    grid["rows"][0]["title"] = "$x_ ^ {*a* & `b`} _c_ \\d"
    (age_only / "grid.json").write_text(json.dumps(grid))
    write_report(age_only)
    assert r"| \$x\_ ^ {\*a\* &amp; \`b\`} \_c\_ \\d |" in (age_only / "table.md").read_text()
    assert (
        r"\$x\_ \textasciicircum{} \{{*}a{*} \& `b`\} \_c\_ \textbackslash{}d & "
        in (age_only / "table.tex").read_text()
    )
