"""Runs that begin with other weights, or change their network's arguments; and runs that have ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import brainfm
from brainfm.cli.main import main
from brainfm.files import file_sha256

FIELDS = ["epochs=1", "batch_size=6", "workers=0", "precision=float32", "augmentation.crop_min=[27,32,32]"]
SMALL = {"test_resnet_3d": ["input_size=[16,16,16]"], "test_vit_3d": ["decoder_depth=1", "warmup_epochs=0"]}


@pytest.fixture
def pretrain(cohort, tmp_path):
    """A function (recipe, arguments) → exit code, output and folder of `brainfm pretrain`."""

    def run(recipe, *arguments, folder="run"):
        named = [f"manifest={cohort}", f"output={tmp_path / folder}"]
        done = CliRunner().invoke(main, ["pretrain", recipe, *named, *FIELDS, *SMALL[recipe], *arguments])
        return done.exit_code, done.output, tmp_path / folder

    return run


def cfg_of(folder):
    return brainfm.create_model(f"local-dir:{folder / 'export'}").pretrained_cfg


def released(name):
    return Path(brainfm.get_pretrained_cfg(name).file)


# --- init -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["test_resnet_3d", "test_vit_3d"])
def test_run_begins_with_released_weights_and_its_folder_says_so(recipe, pretrain, tmp_path):
    code, said, run = pretrain(recipe, f"init={recipe}", "lr=1e-12")
    assert code == 0, said
    begun, ended = brainfm.create_model(recipe, pretrained=True), brainfm.create_model(f"local-dir:{run / 'export'}")
    for (name, first), last in zip(begun.named_parameters(), ended.parameters(), strict=True):
        assert torch.allclose(first, last, atol=1e-9), name
    cfg, digest = cfg_of(run), file_sha256(released(recipe))
    assert f"Pretrained from {recipe} (sha256 {digest})." in cfg.notes
    assert f"Pretrained from {recipe} (sha256 {digest})." in (run / "export" / "README.md").read_text()
    assert [cohort.name for cohort in cfg.cohorts] == ["brainfm phantoms of seed 0", "manifest"]
    assert cfg.licence == "Apache-2.0"
    known = json.loads(cfg.recipe)
    assert (known["init"], known["init_sha256"]) == (recipe, digest)


def test_run_begins_with_own_weights_wherever_they_are_and_with_no_others(pretrain, tmp_path):
    _, _, first = pretrain("test_resnet_3d")
    (tmp_path / "moved").mkdir()
    shutil.copytree(first / "export", tmp_path / "moved" / "export")
    code, said, second = pretrain("test_resnet_3d", f"init=local-dir:{first}/export", "epochs=2", folder="second")
    assert code == 0, said
    config = (second / "export" / "config.json").read_text()
    assert "Pretrained from local-dir:run (sha256 " in cfg_of(second).notes
    assert str(tmp_path) not in config
    assert [cohort.patients for cohort in cfg_of(second).cohorts] == [12]
    log = (second / "log.jsonl").read_bytes()
    again = pretrain("test_resnet_3d", f"init=local-dir:{tmp_path}/moved/export", "epochs=2", folder="second")
    assert again[0] == 0
    assert (second / "log.jsonl").read_bytes() == log
    code, said, _ = pretrain("test_resnet_3d", "init=test_resnet_3d", "epochs=2", folder="second")
    assert code == 1
    assert "init_sha256 was " in said
    code, said, _ = pretrain("test_resnet_3d", "epochs=2", folder="second")
    assert code == 1
    assert "init_sha256 was " in said


@pytest.mark.parametrize(
    ("recipe", "arguments", "reason"),
    [
        (
            "test_resnet_3d",
            ["init=test_vit_3d"],
            "init=test_vit_3d is a test_vit_3d, and the recipe's model a test_resn",
        ),
        ("test_vit_3d", ["init=test_vit_3d", "model_args.depth=2"], "blocks"),
        ("test_resnet_3d", ["init=test_resnet_3d", f"init_sha256={'ab' * 32}"], "other weights than the recipe's"),
        ("test_resnet_3d", [f"init_sha256={'ab' * 32}"], "give init too"),
        ("test_resnet_3d", ["init=nowhere_3d"], "unknown model"),
        ("test_resnet_3d", ["init=resnet18_3d", "model=resnet18_3d"], "resnet18_3d"),
    ],
)
def test_weights_that_the_run_cannot_begin_with_are_refused(recipe, arguments, reason, pretrain):
    for also in ([], ["--dry-run"]):
        code, said, run = pretrain(recipe, *arguments, *also)
        assert code == 1
        assert reason in said
        assert "Traceback" not in said
        assert not run.exists()


def test_weights_for_other_channels_are_refused(pretrain, tmp_path):
    model = brainfm.create_model("test_resnet_3d")
    spec = json.loads(json.dumps(model.pretrained_cfg.input_spec.to_dict())) | {"representation": "FLAIR"}
    brainfm.save_for_hub(model, tmp_path / "flair", pretrained_cfg_overlay={"input_spec": spec})
    code, said, _ = pretrain("test_resnet_3d", f"init=local-dir:{tmp_path / 'flair'}")
    assert code == 1
    assert "trained on other scans than test_resnet_3d takes: representation FLAIR, not T1w" in said


# --- model_args -----------------------------------------------------------------------------------


def test_patch_size_and_depth_are_keys_of_a_recipe_and_the_folder_has_them(pretrain, small_sample):
    code, said, run = pretrain("test_vit_3d", "model_args={depth: 2, patch_size: [10, 12, 16]}", "model_args.depth=3")
    assert code == 0, said
    model = brainfm.create_model(f"local-dir:{run / 'export'}")
    assert (len(model.blocks), model.patch_embed.patch_size, model.grid) == (3, (10, 12, 16), (4, 4, 3))
    assert model(brainfm.create_transform(model)(*small_sample)[None]).shape == (1, 96)
    config = json.loads((run / "export" / "config.json").read_text())
    assert json.loads(model.pretrained_cfg.recipe)["model_args"] == {"depth": 3, "patch_size": [10, 12, 16]}
    assert '"depth": 3' in json.dumps(config["models"])
    decoder = brainfm.weights.read_checkpoint(run / "decoder.safetensors").state
    assert decoder["decoder_pred.weight"].shape[0] == 10 * 12 * 16
    code, said, again = pretrain("test_vit_3d", f"init=local-dir:{run}/export", folder="again")
    assert code == 1
    assert "give model_args as it was made with" in said
    code, said, again = pretrain(
        "test_vit_3d", f"init=local-dir:{run}/export", "model_args={depth: 3, patch_size: [10,12,16]}", folder="again"
    )
    assert code == 0, said
    assert len(brainfm.create_model(f"local-dir:{again / 'export'}").blocks) == 3


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        (
            "model_args.patch_size=[7,8,8]",
            "test_vit_3d cannot be built with patch_size=(7, 8, 8): patches of (7, 8, 8)",
        ),
        ("model_args.depht=2", "test_vit_3d cannot be built with depht=2"),
        ("model_args.num_classes=2", "num_classes is no argument of a network that a recipe sets"),
        ("model_args.checkpoint_path=x", "checkpoint_path is no argument of a network that a recipe sets"),
        ("model_args=3", "model_args is 3"),
    ],
)
def test_arguments_that_the_network_does_not_take_are_refused(argument, reason, pretrain):
    code, said, run = pretrain("test_vit_3d", argument)
    assert code == 1
    assert reason in said
    assert not run.exists()


# --- Methods without a recipe ---------------------------------------------------------------------

METHODS = {
    "yaware": ["model=test_resnet_3d", "targets=age", "input_size=[16,16,16]"],
    "simmim": ["model=test_vit_3d", "mask_unit=[8,8,8]", "input_size=[16,24,24]"],
    "supervised": ["model=test_vit_3d", "targets=age,sex", "kinds.age=regression", "input_size=[16,24,24]"],
    "distill": ["model=test_vit_3d", "teacher=test_resnet_3d", "distill_loss=smooth_l1"],
}


@pytest.fixture
def by_method(cohort, tmp_path):
    """A function (method, arguments) → exit code, output and folder of `python -m brainfm.train method=…`."""

    def run(method, *arguments, manifest=cohort):
        named = [f"manifest={manifest}", f"output={tmp_path / 'run'}", *FIELDS, *arguments]
        done = CliRunner().invoke(main, ["pretrain", f"method={method}", *named])
        return done.exit_code, done.output, tmp_path / "run"

    return run


@pytest.mark.parametrize("method", METHODS)
def test_method_and_model_alone_make_a_folder_and_the_same_command_leaves_it(method, by_method, small_sample):
    code, said, run = by_method(method, *METHODS[method])
    assert code == 0, said
    model = brainfm.create_model(f"local-dir:{run / 'export'}")
    assert model(brainfm.create_transform(model)(*small_sample)[None]).isfinite().all()
    known = json.loads(cfg_of(run).recipe)
    assert known["method"] == method
    log = (run / "log.jsonl").read_bytes()
    assert by_method(method, *METHODS[method])[0] == 0
    assert (run / "log.jsonl").read_bytes() == log
    code, said, _ = by_method(method, *METHODS[method], "lr=1e-2")
    assert "lr was 0.0003" in said


def test_heads_say_what_they_predict_and_other_labels_are_another_run(by_method, cohort, tmp_path):
    _, _, run = by_method("supervised", *METHODS["supervised"])
    with safe_open(run / "heads.safetensors", "pt") as file:
        age, sex = json.loads(file.metadata()["provenance"])["targets"]
        assert [file.get_tensor(f"heads.{n}.weight").shape[0] for n in range(2)] == [1, 1]
    ages = [40 + 3 * (n % 12) for n in range(16) if n % 12 % 5]
    assert (age["kind"], age["mean"]) == ("regression", pytest.approx(sum(ages) / len(ages)))
    assert (sex["kind"], sex["classes"]) == ("binary", ["F", "M"])
    assert "Labels: age, sex." in cfg_of(run).notes
    other = cohort.with_name("relabelled.csv")
    other.write_text(cohort.read_text().replace(",43,", ",44,"))
    code, said, _ = by_method("supervised", *METHODS["supervised"], manifest=other)
    assert code == 1
    assert "other labels" in said


def test_run_does_not_go_on_with_another_teacher_and_its_folder_names_it(by_method, tmp_path):
    teacher = tmp_path / "teacher"
    model = brainfm.create_model("test_resnet_3d", pretrained=True)
    brainfm.save_for_hub(model, teacher)
    named = ["model=test_vit_3d", f"teacher=local-dir:{teacher}"]
    code, said, run = by_method("distill", *named)
    assert code == 0, said
    digest = file_sha256(teacher / "model.safetensors")
    assert f"Its teacher is local-dir:teacher (sha256 {digest})." in cfg_of(run).notes
    assert [cohort.name for cohort in cfg_of(run).cohorts] == ["brainfm phantoms of seed 0", "manifest"]
    assert str(tmp_path) not in (run / "export" / "config.json").read_text()
    with torch.no_grad():
        model.conv1.weight.add_(1)
    brainfm.save_for_hub(model, teacher)
    code, said, _ = by_method("distill", *named)
    assert code == 1
    assert f"teacher_sha256 was {digest}" in said


@pytest.mark.parametrize(
    ("method", "arguments", "reason"),
    [
        ("mae", ["model=densenet121_3d"], "an MAE needs a ViT, and densenet121_3d is a DenseNet"),
        (
            "mae",
            ["model=brainiac_vit", "contract=test_vit_3d", "input_size=[32,48,48]"],
            "brainiac_vit has no CLS token",
        ),
        ("simmim", ["model=test_resnet_3d"], "simmim needs a patch embedding"),
        ("simmim", ["model=test_vit_3d", "mask_unit=[8,8,12]"], "must be a multiple of the network's patch, (8, 8, 8)"),
        ("simmim", ["model=test_vit_3d", "mask_unit=[40,48,48]"], "give a smaller mask_unit"),
        ("simclr", ["model=nit_3d"], "contract=simclr_resnet18_3d"),
        ("simclr", ["model=nit_3d", "contract=test_vit_3d", "input_size=[20,24,24]"], "do not divide"),
        ("simclr", ["model=minit_3d", "contract=test_vit_3d"], "blocks of (16, 16, 16) voxels do not divide"),
        ("simclr", ["model=openmind_resencl", "contract=test_vit_3d"], "takes no views of 40×48×48 voxels (expected"),
        ("distill", ["model=test_vit_3d", "teacher=sfcn_age"], "teacher=sfcn_age takes other input than the views"),
        ("distill", ["model=test_vit_3d", "teacher=test_resnet_3d", "input_size=[16,24,24]"], "its operations is"),
        ("distill", ["model=test_vit_3d", "teacher=nobody_3d"], "unknown model"),
        ("supervised", ["model=test_vit_3d"], "targets=age,sex"),
        ("supervised", ["model=test_vit_3d", "targets=age", "mask_ratio=0.5"], "mask_ratio is of mae and simmim"),
        ("byol", ["model=test_vit_3d"], "method is 'byol'"),
    ],
)
def test_method_and_network_that_do_not_go_together_are_refused_in_a_line_before_anything_is_read(
    method, arguments, reason, by_method
):
    for also in ([], ["--dry-run"]):
        code, said, run = by_method(method, *arguments, *also, manifest="nowhere.csv")
        assert code == 1
        assert reason in said
        assert "nowhere.csv" not in said
        assert len(said.strip().splitlines()) == 1
        assert not run.exists()


def test_column_that_is_not_there_is_refused_before_a_folder_is_made(by_method):
    code, said, run = by_method("supervised", "model=test_vit_3d", "targets=Age")
    assert code == 1
    assert "no column 'Age'; it has age, sex, site" in said
    assert not run.exists()


@pytest.mark.parametrize(
    ("method", "own", "others"),
    [
        ("yaware", "kernel_sigma: 5.0", "mask_ratio"),
        ("simmim", "mask_unit: [8, 8, 8]", "targets"),
        ("supervised", "targets: [age, sex]", "temperature"),
        ("distill", "distill_loss: smooth_l1", "decoder_dim"),
    ],
)
def test_dry_run_says_the_fields_of_its_method_alone(method, own, others, by_method):
    code, said, run = by_method(method, *METHODS[method], "--dry-run")
    assert code == 0, said
    assert own in said
    assert f"{others}:" not in said
    assert "memory       about" in said
    assert not run.exists()


def test_weights_of_a_networks_own_contract_begin_a_run_on_that_of_another(by_method, tmp_path):
    """As video's Swin-T does on MRI."""
    model = brainfm.create_model("nit_3d")
    brainfm.save_for_hub(model, tmp_path / "nit")
    size = ["contract=test_vit_3d", "input_size=[16,24,24]"]
    code, said, run = by_method("simclr", "model=nit_3d", f"init=local-dir:{tmp_path / 'nit'}", *size)
    assert code == 0, said
    ended = brainfm.create_model(f"local-dir:{run / 'export'}")
    assert ended.pretrained_cfg.input_spec.output_shape == (1, 16, 24, 24)
    assert ended.pretrained_cfg.input_spec.space == "MNI152NLin2009cSym"
    assert ended.grid == (2, 3, 3)


# --- Runs that have ended -------------------------------------------------------------------------


def test_run_that_has_ended_is_left_as_it_is_and_what_is_lost_of_it_is_made_again(pretrain):
    _, _, run = pretrain("test_resnet_3d")
    config = run / "export" / "config.json"
    before, weights = config.stat().st_mtime_ns, file_sha256(run / "export" / "model.safetensors")
    code, said, _ = pretrain("test_resnet_3d")
    assert code == 0
    assert "load it with create_model" in said
    assert config.stat().st_mtime_ns == before
    shutil.rmtree(run / "export")
    assert pretrain("test_resnet_3d")[0] == 0
    assert file_sha256(run / "export" / "model.safetensors") == weights
    code, said, _ = pretrain("test_resnet_3d", "lr=1e-2")
    assert code == 1
    assert "lr was 0.001" in said


def test_run_reads_copies_on_a_local_disk_and_learns_the_same_of_them(pretrain, tmp_path):
    def losses(folder, *arguments):
        code, said, run = pretrain("test_resnet_3d", "workers=1", *arguments, folder=folder)
        assert code == 0, said
        return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()], run

    plain, _ = losses("plain")
    staged, run = losses("staged", "--stage", str(tmp_path / "stage"))
    assert staged == plain
    assert len(list((tmp_path / "stage").rglob("*.nii.gz"))) >= 2 * 12  # an image and a mask of each patient
    recipe = json.loads(cfg_of(run).recipe)
    assert (recipe["stage"], recipe["stage_size"]) == (None, 100.0)


def test_scan_that_fails_twice_is_passed_over_until_it_changes(cohort, pretrain, tmp_path, monkeypatch):
    from brainfm.manifest import read_manifest
    from brainfm.train import cache
    from brainfm.train.quarantine import Quarantine

    rows = cohort.read_text().replace("sub-11/ses-0/t1.nii.gz", str(tmp_path / "broken.nii.gz")).splitlines()
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing" * 100)
    manifest = cohort.parent / "broken.csv"
    manifest.write_text("\n".join(rows))
    read, load_scan = [], cache.load_scan

    def counted(image, *args, **kwargs):
        read.append(Path(image).name)
        return load_scan(image, *args, **kwargs)

    monkeypatch.setattr(cache, "load_scan", counted)
    report = tmp_path / "run.json"
    options = ["epochs=4", "max_bad_fraction=0.5", f"manifest={manifest}", "--report", str(report)]
    code, said, run = pretrain("test_resnet_3d", *options)
    assert code == 0, said
    assert read.count("broken.nii.gz") == 2
    broken = str(tmp_path / "broken.nii.gz")
    quarantined = json.loads(report.read_text())["quarantined"]
    assert list(quarantined) == [broken]
    assert broken in quarantined[broken]
    listed = Quarantine(run / "quarantine.csv", read_manifest(manifest))
    assert listed.listed() == quarantined
    (tmp_path / "broken.nii.gz").write_bytes(b"another" * 101)
    assert Quarantine(run / "quarantine.csv", read_manifest(manifest)).listed() == {}
