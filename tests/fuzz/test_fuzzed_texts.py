"""Manifests, config.json, cards: a list, a model or a card as it is written, or a refusal."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml
from fuzzing import ODD, bounded, damaged, examples, mutated, outcome
from hypothesis import example, given
from hypothesis import strategies as st

import brainfm
from brainfm import BrainfmError, ScanError
from brainfm.contract.spec import InputSpec
from brainfm.manifest import list_scans
from brainfm.tabular import read_rows
from brainfm.train.recipe import recipe_from_dict
from brainfm.zoo.cards import Card, read_card, zoo_cards

# --- Manifests ------------------------------------------------------------------------------------

HEADERS = st.sampled_from(
    ["image_path", "mask_path", "patient_id", "scan_id", "t1w_path", "age", "", " image_path ", "#"]
)
FIELDS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "a.nii",
        "~",
        "~root/a.nii",
        "~nobody/a.nii",
        "../a.nii.gz",
        "n/a",
        '"',
        "'",
        "a\0b",
        "\ufeff",
        "x" * 200_000,
        "C:\\a.nii",
        "a,b",
        "\r",
        "\n",
    ]
)


@st.composite
def table_texts(draw):
    """A table as bytes: written by rules that a program could have, then perhaps damaged."""
    names = draw(st.lists(HEADERS | st.text(max_size=4), max_size=5))
    if draw(st.booleans()):
        names = ["image_path", *names]
    rows = draw(st.lists(st.lists(FIELDS, max_size=6), max_size=5))
    text = io.StringIO()
    end = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
    mark = draw(st.sampled_from([",", ",", ";", "\t", "|"]))
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    lines = [[field.replace("\0", "") for field in row] for row in [names, *rows]]  # Python 3.10 writes none
    csv.writer(text, delimiter=mark, lineterminator=end, quoting=quoting).writerows(lines)
    content = text.getvalue().encode(
        draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace"
    )
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(content)))
        content = (
            content[:cut] + draw(st.sampled_from([b"", b'"', b"\0", b"\xff", b"\r", b"'", b"\n\n"])) + content[cut:]
        )
    return content


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_manifest_of_any_content_is_a_list_of_scans_or_a_refusal(ending, small_spec, tmp_path):
    path = tmp_path / f"manifest{ending}"

    @examples(150)
    @given(
        table_texts()
        | st.binary(max_size=60)
        | st.text(max_size=60).map(lambda text: ("image_path\n" + text).encode("utf-8", "replace"))
    )
    @example(b"image_path\n~nobody-of-this-name/a.nii\n")
    @example(b"image_path\na.nii\0\n")
    @example(b'image_path\n"a.nii\n')
    def fuzz(content):
        path.write_bytes(content)
        records = outcome(list_scans, path)
        if not isinstance(records, BrainfmError):
            assert records
            assert all(record.images for record in records)
            for record in records:  # no such files
                assert isinstance(outcome(brainfm.load_scan, record.image, record.mask, spec=small_spec), ScanError)

    fuzz()


def test_manifest_that_a_program_wrote_is_read_as_it_was_meant(tmp_path):
    path = tmp_path / "manifest.csv"
    plain = st.text(
        st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/\\\\"), min_size=1, max_size=10
    )

    @examples(60)
    @given(
        st.lists(st.tuples(plain, plain), min_size=1, max_size=5, unique_by=(lambda r: r[0], lambda r: r[1])),
        st.booleans(),
        st.sampled_from(["\n", "\r\n"]),
    )
    def fuzz(rows, all_quoted, end):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL)
            writer.writerows([["image_path", "note"], *([f"scans/{name}.nii", note] for name, note in rows)])
        records = outcome(list_scans, path)
        assert not isinstance(records, BrainfmError), records
        assert [str(r.image) for r in records] == [str(tmp_path / "scans" / f"{name}.nii") for name, _ in rows]
        assert [r.extra["note"] for r in records] == [note.strip() for _, note in rows]

    fuzz()


# --- Tables ---------------------------------------------------------------------------------------


def workbook(rows):
    """The rows as an Excel file."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


TABLE = [["image_path", "age", "site"], ["a.nii", "61,5", "x;y"], ["b.nii", "n/a", "Zürich"], ["c.nii", "7", ""]]


def written(rows, mark, encoding, end):
    text = io.StringIO()
    csv.writer(text, delimiter=mark, lineterminator=end).writerows(rows)
    return text.getvalue().encode(encoding)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt", ".xlsx"])
def test_table_of_any_bytes_is_rows_of_text_or_a_refusal(ending, tmp_path):
    path = tmp_path / f"table{ending}"
    wholes = [workbook(TABLE)] if ending == ".xlsx" else []
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"):
        wholes += [written(TABLE, mark, encoding, end) for mark in ",;\t" for end in ("\n", "\r\n", "\r")]

    @examples(40)
    @given(st.sampled_from(wholes).flatmap(damaged) | table_texts())
    @example(b"sep=;\nimage_path;age\na.nii;1\n")
    @example(b"sep=\n")
    @example(b'"sep=\t"\na\tb')
    @example(b"\xff\xfe")
    @example(b"\xff\xfea")
    @example(b"\0a\0,\0b\0")
    @example(b"PK\x03\x04" + bytes(40))
    @example(b'a,b\n"' + b"x," * 100_000)
    def fuzz(content):
        path.write_bytes(content)
        rows = outcome(read_rows, path)
        if not isinstance(rows, BrainfmError):
            assert all(isinstance(name, str) and name for name in rows.columns)
            assert all(isinstance(value, str) for value in rows.to_numpy().ravel())

    fuzz()


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".txt", ".xlsx"])
def test_table_that_a_program_wrote_is_read_as_it_was_meant(ending, tmp_path):
    path = tmp_path / f"table{ending}"
    plain = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
    named = st.lists(plain.filter(lambda text: text.strip("'\"") == text), min_size=2, max_size=4, unique=True)

    @examples(40)
    @given(st.data())
    def fuzz(data):
        names = data.draw(named.filter(lambda names: not any(set(name) & set(",;\t=#") for name in names)))
        rows = data.draw(st.lists(st.lists(plain, min_size=len(names), max_size=len(names)), min_size=1, max_size=4))
        if ending == ".xlsx":
            rows = [[f"x{value}" for value in row] for row in rows]  # one that begins with "=" is a formula
            content = workbook([names, *rows])
        else:
            mark = data.draw(st.sampled_from("\t" if ending == ".tsv" else ",;\t"))
            encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
            content = written([names, *rows], mark, encoding, data.draw(st.sampled_from(["\n", "\r\n"])))
        path.write_bytes(content)
        read = outcome(read_rows, path)
        assert not isinstance(read, BrainfmError), read
        assert list(read.columns) == names
        assert read.to_numpy().tolist() == rows

    fuzz()


# --- config.json ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    """A model's folder."""
    return brainfm.save_for_hub(small_model, tmp_path_factory.mktemp("hub") / "model")


def test_config_with_other_parts_is_a_model_or_a_refusal(folder, small_sample):
    path = folder / "config.json"
    whole = path.read_text()

    @examples(60)
    @given(mutated(json.loads(whole)))
    def fuzz(config):
        path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
        model = outcome(brainfm.create_model, f"local-dir:{folder}", pretrained=True)
        if not isinstance(model, BrainfmError) and model.pretrained_cfg.input_spec is not None:
            outcome(brainfm.create_transform(model), *small_sample)

    try:
        fuzz()
    finally:
        path.write_text(whole)


def test_config_of_any_text_is_refused(folder):
    path = folder / "config.json"
    whole = path.read_bytes()

    @examples(60)
    @given(
        st.binary(max_size=40)
        | ODD.map(lambda value: json.dumps(value).encode())
        | st.integers(0, len(whole) - 3).map(lambda n: whole[:n])
    )
    @example(b"[" * 100_000)
    @example(b'{"format":' * 100_000)
    @example(b'{"format": ' + b"9" * 100_000 + b"}")
    def fuzz(content):
        path.write_bytes(content)
        assert isinstance(outcome(brainfm.create_model, f"local-dir:{folder}", pretrained=True), BrainfmError)

    try:
        fuzz()
    finally:
        path.write_bytes(whole)


# --- Cards and other checked data -----------------------------------------------------------------

ALIASES = "    a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)  # 9 to the 12th


def test_card_with_other_parts_is_a_card_or_a_refusal(tmp_path):
    path = tmp_path / "card.yaml"
    cards = [yaml.safe_load(card.read_text(encoding="utf-8")) for card in zoo_cards()]

    @examples(150)
    @given(st.sampled_from(cards).flatmap(mutated))
    def fuzz(data):
        path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        card = outcome(read_card, path)
        if isinstance(card, Card):
            assert Card.from_dict(card.to_dict()) == card

    fuzz()


def test_card_of_any_text_is_a_card_or_a_refusal(tmp_path):
    path = tmp_path / "card.yaml"
    whole = zoo_cards()[0].read_bytes()
    pieces = st.sampled_from(
        [
            "- ",
            ": ",
            "&a ",
            "*a ",
            "!!python/object:os.system ",
            "<<: ",
            "{",
            "]",
            "\n  ",
            "models",
            "? ",
            "|",
            "2020-01-01",
            "0x1",
            "1e400",
            ".inf",
            "\t",
            "%",
            "---\n",
            "'",
        ]
    )

    @examples(150)
    @given(
        st.binary(max_size=40)
        | st.lists(pieces, max_size=12).map("".join).map(str.encode)
        | st.integers(0, len(whole)).map(lambda n: whole[:n])
    )
    @example(f"inputs:\n  x:\n{ALIASES}".encode())
    @example(f"cohorts:\n  x:\n{ALIASES}".encode())
    @example(b"inputs: {x: &a {y: *a}}")
    @example(b"inputs: {x: {y: &a [*a]}}")
    @example(b"[" * 50_000)
    @example(b"models: &a {x: *a}")
    @example(b"publication: &a {title: *a}")
    @example(b"? [a, b]\n: c\n")
    @example(b"? {a: b}\n: c\n")
    @example(b"licence: {gated: 2020-13-45}")
    def fuzz(content):
        path.write_bytes(content)
        outcome(read_card, path)

    fuzz()


def test_contract_of_other_parts_is_a_contract_or_a_value_error():
    whole = brainfm.get_pretrained_cfg("simclr_resnet18_3d").input_spec.to_dict()

    @examples(150)
    @given(mutated(whole))
    def fuzz(data):
        with bounded():
            try:
                spec = InputSpec.from_dict(data)
            except (ValueError, BrainfmError):
                return
        assert InputSpec.from_dict(spec.to_dict()) == spec

    fuzz()


def test_recipe_of_other_parts_is_a_recipe_or_a_refusal():
    whole = {
        "method": "simclr",
        "model": "test_resnet_3d",
        "manifest": "a.csv",
        "output": "out",
        "epochs": 2,
        "batch_size": 6,
    }
    whole |= {"workers": 0, "input_size": [16, 16, 16], "augmentation": {"crop_min": [27, 32, 32]}}

    @examples(150)
    @given(mutated(whole))
    def fuzz(data):
        outcome(recipe_from_dict, data)

    fuzz()
