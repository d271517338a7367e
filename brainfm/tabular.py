"""Tables of scans, labels and phenotypes, as programs and people write them, read as text: CSV, TSV, Excel, Parquet."""

from __future__ import annotations

import io
import re
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

from brainfm.errors import MissingExtraError, ScanError
from brainfm.files import one_line

if TYPE_CHECKING:
    import pandas as pd

MOST_BYTES = 2**30  # of a table's text: some ten million scans
_EXCEL = {".xlsx": "openpyxl", ".xlsm": "openpyxl", ".xls": "xlrd"}
ENDINGS = (".csv", ".tsv", ".txt", *_EXCEL, ".parquet")  # in any case

_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_BLANKS = " \t\r\n\v\f\xa0\u2007\u202f\u200b\ufeff"  # no-break and zero-width ones too
_NO_VALUE = {"", "na", "n/a", "#n/a", "nan", "<na>", "none", "null", "-"}  # as programs write a field without a value


def is_missing(text: str) -> bool:
    """Whether a field says that there is no value, such as "" or BIDS's "n/a"."""
    return text.strip(_BLANKS).casefold() in _NO_VALUE


def is_table(path: Path) -> bool:
    """Whether a file is a table, by its ending."""
    return path.suffix.lower() in ENDINGS


def is_frame(table: Any) -> bool:
    """Whether something in memory is a pandas DataFrame; does not import pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(table, pandas.DataFrame)


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a table's file, every value as the text that is written there, without the blanks around it.

    A .csv, .tsv or .txt is divided by commas, semicolons or tabs, whichever its header has most of, and may be UTF-8,
    UTF-16 or Windows' Latin-1 (cp1252). Of an Excel file the first sheet is read. Blank rows, columns that are empty
    from the header on, and a first column without a name (row numbers) are not there. What is missing is "".

    Returns:
        Columns of str; the index says each row's number as a spreadsheet program counts them: the header's is 1.

    Raises:
        ScanError: There is no such file, it cannot be read, it has no header, a column twice, or a row with more fields
            than the header; the message says which.
        MissingExtraError: The package that reads Excel or Parquet is not installed.
    """
    if not path.is_file():
        raise ScanError(f"{path}: {'not a file' if path.exists() else 'no such file'}; check the path")
    try:
        cells = _cells(path)
    except (ScanError, MissingExtraError):
        raise
    except Exception as error:  # each reader has its own ways to say that a file is damaged
        raise ScanError(f"{path}: not a readable table ({one_line(error)}); save it as CSV in UTF-8") from error
    cells = _as_text(cells)
    cells = cells[(cells != "").any(axis=1)]
    if cells.empty:
        raise ScanError(f"{path}: the table is empty; it needs a header line, such as image_path,patient_id")
    names = [name.strip("'\"") for name in cells.iloc[0]]
    rows = cells.iloc[1:]
    for place, name in enumerate(names):
        filled = rows.iloc[:, place] != ""
        if not name and place > 0 and filled.any():
            row = rows.index[filled][0]
            raise ScanError(
                f"{path}, row {row}: more fields than the header has ({rows.at[row, place]!r}); quote fields that hold "
                "a separator, or name the column"
            )
    _refuse_twice(names, str(path))
    named = [place for place, name in enumerate(names) if name]
    return rows.iloc[:, named].set_axis([names[place] for place in named], axis=1)


def rows_of(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a DataFrame as those of a file; what is missing (None, NaN, NA) is "".

    Raises ScanError for a column that is there twice.
    """
    names = [str(name).strip(_BLANKS) for name in frame.columns]
    _refuse_twice(names, "the DataFrame")
    return _as_text(frame).set_axis(names, axis=1)


def _refuse_twice(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ScanError(f"{where}: the table has the column {', '.join(twice)} twice; rename or remove one")


def _cells(path: Path) -> pd.DataFrame:
    """Every cell of a file, its header's too; rows are numbered from 1."""
    import pandas as pd

    ending = path.suffix.lower()
    if ending == ".parquet":
        _need("pyarrow")
        table = pd.read_parquet(path, engine="pyarrow", dtype_backend="numpy_nullable").astype(object)
        header = pd.DataFrame([list(table.columns)], dtype=object)
        cells = pd.concat([header, table.set_axis(range(table.shape[1]), axis=1)], ignore_index=True)
    elif ending in _EXCEL:
        _need(_EXCEL[ending])
        _check_size(path)
        cells = pd.read_excel(path, header=None, dtype=object, na_filter=False, engine=_EXCEL[ending])
    else:
        cells = _delimited(_decoded(path), ending)
    cells.index += 1
    return cells


def _check_size(path: Path) -> None:
    """Raise ScanError for a file of more text than a table of scans has, before it takes that much memory."""
    with ZipFile(path) if is_zipfile(path) else nullcontext() as archive:
        parts = path.stat().st_size if archive is None else sum(part.file_size for part in archive.infolist())
    if parts > MOST_BYTES:
        raise ScanError(
            f"{path}: {parts / 2**30:.1f} GB of text, more than a table of scans has ({MOST_BYTES / 2**30:.0f} GB); "
            "keep the columns that say who and which, or save it as Parquet"
        )


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        if package == "xlrd":
            raise ScanError(
                "xlrd is not installed; run: pip install xlrd; or save the table as CSV in a spreadsheet program"
            ) from error
        raise MissingExtraError(package, "eval") from error


def _decoded(path: Path) -> str:
    """A file's text, by its byte order mark, or as UTF-8, or else in the Latin-1 that Windows programs write."""
    _check_size(path)
    content = path.read_bytes()
    if content[:4] == b"PK\x03\x04":
        raise ScanError(f"{path}: not a readable table: by its content it is an Excel file (or a zip); name it .xlsx")
    encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "")
    if not encoding and b"\0" in content[:2]:
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    for name in [encoding] if encoding else ["utf-8", "cp1252", "latin-1"]:
        try:
            text = content.decode(name)
            break
        except UnicodeDecodeError as error:
            if name == encoding:
                raise ScanError(f"{path}: not a readable table ({one_line(error)}); save it as CSV in UTF-8") from error
    if "\0" in text:
        raise ScanError(f"{path}: not a readable table: it holds null characters, as no text does; save it as CSV")
    return re.sub("\r\n?", "\n", text)


def _delimited(text: str, ending: str) -> pd.DataFrame:
    import pandas as pd

    said = re.match(r'\s*"?sep=(.)"?\n', text)  # as Excel has it
    if said:
        text = "\n" + text[said.end() :]
    header = next((line for line in text.split("\n") if line.strip(_BLANKS)), "")
    bare = re.sub(r'"[^"]*"', "", header)
    tab = "\t" in bare or (ending == ".tsv" and not re.search("[,;]", bare))
    separator = said[1] if said else "\t" if tab else max(",;", key=bare.count)
    width = 1 + max(line.count(separator) for line in text.split("\n"))  # of a damaged row, too
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            names=range(width),
            index_col=False,
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
            skipinitialspace=separator != "\t",
        )


def _as_text(cells: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text, in columns of Python's own str, whatever pandas would keep text in."""
    import pandas as pd

    columns = [[_text(value) for value in cells.iloc[:, place]] for place in range(cells.shape[1])]
    return pd.DataFrame(dict(enumerate(columns)), index=cells.index, dtype=object).set_axis(cells.columns, axis=1)


def _text(value: Any) -> str:
    """A cell as text: of a date without a time, as Excel has them, the date alone."""
    if isinstance(value, str):
        return value.strip(_BLANKS)
    if value is None or type(value).__name__ in ("NAType", "NaTType") or value != value:
        return ""
    return str(value).strip(_BLANKS).removesuffix(" 00:00:00")
