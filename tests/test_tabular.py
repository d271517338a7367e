"""Tables as programs and people write them: read as the text that is there, or refused by name and row."""

import os
import sys
import zipfile

import openpyxl
import pandas as pd
import pytest

from brainfm import ScanError
from brainfm.errors import MissingExtraError
from brainfm.tabular import read_rows

ROWS = [{"image_path": "Müller/a.nii", "id": "007", "note": "NA"}, {"image_path": "b.nii", "id": "7", "note": ""}]
PLAIN = "image_path,id,note\nMüller/a.nii,007,NA\nb.nii,7,\n"


def written(folder, text, name="table.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "name", "encoding"),
    [
        (PLAIN, "table.csv", "utf-8"),
        (PLAIN, "TABLE.CSV", "utf-8-sig"),
        (PLAIN, "table.csv", "utf-16"),
        (PLAIN, "table.csv", "utf-16-le"),
        (PLAIN, "table.csv", "utf-16-be"),
        (PLAIN, "table.csv", "latin-1"),
        (PLAIN, "table.csv", "cp1252"),
        (PLAIN.replace(",", ";"), "table.csv", "utf-8"),
        (PLAIN.replace(",", "\t"), "table.tsv", "utf-8"),
        (PLAIN.replace(",", "\t"), "table.txt", "utf-16"),
        (PLAIN.replace(",", "\t"), "table.csv", "utf-8"),
        (PLAIN.replace(",", ";"), "table.tsv", "utf-8"),
        ("sep=;\n" + PLAIN.replace(",", ";"), "table.csv", "cp1252"),
        (PLAIN.replace("\n", "\r\n"), "table.csv", "utf-8"),
        (PLAIN.replace("\n", "\r"), "table.csv", "utf-8"),
        (PLAIN.replace("\n", ",,,\n") + ",,,,,\n,,,,,\n", "table.csv", "utf-8"),
        ("\n" + PLAIN.replace("\n", "\n\n"), "table.csv", "utf-8"),
        (PLAIN.replace(",", " ,\xa0").replace("\n", "\u200b \n"), "table.csv", "utf-8"),
        ('"image_path", "id", "note"\n"Müller/a.nii ", "007", "NA"\nb.nii,\xa07\xa0\n', "table.csv", "utf-8"),
        ("'image_path',id,note\nMüller/a.nii,007,NA\nb.nii,7\n", "table.csv", "utf-8"),
        (",image_path,id,note\n0,Müller/a.nii,007,NA\n1,b.nii,7,\n", "table.csv", "utf-8"),
    ],
)
def test_text_is_read_as_it_is_written(text, name, encoding, tmp_path):
    assert read_rows(written(tmp_path, text, name, encoding)).to_dict("records") == ROWS


def test_excel_is_read_as_it_is_written_and_blank_columns_and_rows_are_not_there(tmp_path):
    book = openpyxl.Workbook()
    for row in (["image_path ", "id", "note", "age", None, None], [], ["Müller/a.nii", "007", "NA", 71], ["b.nii", 7]):
        book.active.append(row)
    book.active["J20"] = " "
    book.save(tmp_path / "Table.XLSX")
    rows = read_rows(tmp_path / "Table.XLSX")
    assert rows.drop(columns="age").to_dict("records") == ROWS
    assert rows["age"].tolist() == ["71", ""]
    assert rows.index.tolist() == [3, 4]


def test_parquet_is_read_as_it_is_written(tmp_path):
    columns = {
        "id": ["007", None],
        "age": pd.array([71, None], dtype="Int64"),
        "dose": [1.5, float("nan")],
        "n": [1, 2],
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "table.parquet")
    rows = read_rows(tmp_path / "table.parquet").to_dict("records")
    assert rows == [{"id": "007", "age": "71", "dose": "1.5", "n": "1"}, {"id": "", "age": "", "dose": "", "n": "2"}]


def test_a_field_may_hold_the_separator_and_lines(tmp_path):
    path = written(tmp_path, 'id,note\n1,"left, frontal\nand, more, of it"\n2,\n')
    rows = read_rows(path)
    assert rows["note"].tolist() == ["left, frontal\nand, more, of it", ""]
    assert rows.index.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the table is empty; it needs a header line"),
        ("a,b\n1,2\n3,4,5\n", r"row 3: more fields than the header has \('5'\); quote"),
        ("a,b\n1,2,3,4\n5,6\n", r"row 2: more fields than the header has \('3'\)"),
        ("a,b\n\n1,2,,x\n", r"row 3: more fields than the header has \('x'\)"),
        ("a;b;a\n1;2;3\n", "the column a twice"),
        ("a, a \n1,2\n", "the column a twice"),
        ('a,b\n"1,2\n3,4\n', "not a readable table.*EOF inside string"),
        (b"PK\x03\x04\xff\xfe\x00" * 50, r"by its content it is an Excel file.*name it \.xlsx"),
        (b"a,b\n1,\x00\n", "it holds null characters"),
        (b"\x00\xd8\x00\xd8\xff" * 9, "not a readable table"),
    ],
)
def test_damaged_table_is_refused_by_its_row(content, message, tmp_path):
    path = written(tmp_path, content)
    with pytest.raises(ScanError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["table.xlsx", "table.parquet"])
def test_damaged_binary_table_is_refused_in_one_line(name, tmp_path):
    path = written(tmp_path, b"nonsense" * 30, name)
    with pytest.raises(ScanError, match="not a readable table") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_reader_that_is_not_installed_is_named_with_what_installs_it(tmp_path, monkeypatch):
    for name, package in (("table.xlsx", "openpyxl"), ("table.parquet", "pyarrow")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"{package} is not installed; run: pip install .*{package}"):
            read_rows(written(tmp_path, b"", name))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(ScanError, match="not a file"):
        read_rows(tmp_path / "table.csv")


def test_file_of_more_text_than_a_table_has_is_refused_before_it_is_read(tmp_path):
    """A small Excel file that inflates to gigabytes, and a sparse CSV."""
    with (
        zipfile.ZipFile(tmp_path / "bomb.xlsx", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as part,
    ):
        for _ in range(2**7 + 1):
            part.write(b" " * 2**23)
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(2**31)
    for name in ("bomb.xlsx", "sparse.csv"):
        with pytest.raises(ScanError, match=rf"{name}: [12]\.0 GB of text, more than a table of scans has"):
            read_rows(tmp_path / name)
