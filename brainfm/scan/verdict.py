"""What is known of a prepared scan's quality: the verdict of `brainfm prep`, and what a person decided after it."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from brainfm.errors import ScanError
from brainfm.files import file_sha256, held, write_json
from brainfm.scan.layout import RECORD

DECISIONS = "decisions.json"

Choice: TypeAlias = Literal["accept", "reject"]


@dataclass(frozen=True)
class Decision:
    """What a person decided of a prepared scan.

    Attributes:
        decision: "accept" or "reject".
        by: Who.
        why: In words.
        date: When, ISO 8601.
        record: The sha256 of the `prep.json` that it is about: a scan that is prepared anew has to be decided anew.
    """

    decision: Choice
    by: str
    why: str
    date: str
    record: str


def decide(folder: Path, decision: Choice, by: str, why: str, date: str | None = None) -> Decision:
    """Write a decision beside a scan's `prep.json`, after those that are there: the last one counts.

    Args:
        folder: The prepared scan's.
        decision: "accept" or "reject".
        by: Who decides.
        why: And why.
        date: When, ISO 8601; None is now.

    Raises:
        ScanError: What is there is damaged.
        BrainfmError: Another command is writing it.
    """
    date = date or datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    made = Decision(decision, by, why, date, file_sha256(folder / RECORD))
    with held(folder / DECISIONS):
        write_json(folder / DECISIONS, [asdict(one) for one in (*_decisions(folder), made)])
    return made


def decision_of(folder: Path) -> Decision | None:
    """The last decision on a scan as it is prepared now, or None. Raises ScanError where it cannot be read."""
    decisions = _decisions(folder)
    return decisions[-1] if decisions and decisions[-1].record == file_sha256(folder / RECORD) else None


def verdict_of(folder: Path) -> str:
    """A prepared scan's quality, by the person who decided or else by its figures.

    Returns:
        "accepted" or "rejected"; "pass", "look" or "fail"; "unreadable"; or "" where nobody judged it.
    """
    if not (folder / RECORD).exists():
        return ""
    try:
        if (decision := decision_of(folder)) is not None:
            return f"{decision.decision}ed"
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["verdict"])
    except (ScanError, OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def _decisions(folder: Path) -> list[Decision]:
    path = folder / DECISIONS
    try:
        content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        decisions = [Decision(**{key: str(value) for key, value in one.items()}) for one in content]  # type: ignore[arg-type]
        if any(one.decision not in ("accept", "reject") for one in decisions):
            raise ValueError("a decision is neither accept nor reject")
        return decisions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ScanError(f"{path}: not a list of decisions ({error}); mend it, or delete it and decide again") from error
