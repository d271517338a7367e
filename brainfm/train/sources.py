"""Where a run's volumes come from, behind one interface, and how several sources are mixed in stated fractions.

A source is a manifest of scans (of people, phantoms, or synthetic ones), a folder of video clips, or one of Kinetics'
lists of them. Whatever it is, it is a list of records, and the cache and the loader read each by `cache.read_whole`.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from brainfm.errors import RecipeError
from brainfm.manifest import Listing, ScanRecord, read_manifest
from brainfm.scan.load import image_of
from brainfm.sources import SAID, Kind, kind_of_all
from brainfm.system import expanded
from brainfm.train.cache import key_of
from brainfm.train.video import check_readers, is_kinetics, list_clips, read_kinetics
from brainfm.zoo.cards import Cohort

logger = logging.getLogger("brainfm")

_WHOLE = 1e-6  # how far fractions may be from adding up to 1


@dataclass(frozen=True, eq=False)
class Source:
    """The volumes of one source.

    Attributes:
        records: What it lists.
        root: The folder that the keys of a cache are relative to.
        cache: A folder of `build_cache`, or None to read the files themselves.
        fraction: Of an epoch's items.
        name: What it is called.
    """

    records: Sequence[ScanRecord]
    root: Path
    cache: str | None = None
    fraction: float = 1.0
    name: str = ""

    @property
    def kind(self) -> Kind:
        """What its volumes are of."""
        return kind_of_all(self.records)


class Mixture(list[ScanRecord]):
    """The records of several sources, one source after the other.

    Attributes:
        sources: In their order.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(record for source in sources for record in source.records)
        self.sources = tuple(sources)
        self._starts = [sum(len(source.records) for source in sources[:n]) for n in range(len(sources))]

    def number_of(self, scan: int) -> int:
        """Which source a record is of."""
        return bisect.bisect_right(self._starts, scan) - 1

    def key_of(self, scan: int) -> str:
        """A record's name in its source's cache."""
        return key_of(self[scan], self.sources[self.number_of(scan)].root)

    def split(self, scans: AbstractSet[int]) -> list[int]:
        """How many of some records are of each source."""
        counts = [0] * len(self.sources)
        for scan in scans:
            counts[self.number_of(scan)] += 1
        return counts


def read_source(place: str | Path) -> tuple[Listing, Path]:
    """The records of a source, and the folder that a cache's keys are relative to.

    Args:
        place: A manifest, a folder of clips, or a list of Kinetics.

    Raises:
        ScanError: It is none of these.
        MissingExtraError: It has clips, and PyAV is not installed.
    """
    path = expanded(place)
    if path.is_dir():
        listed, root = list_clips(path), path
    elif is_kinetics(path):
        listed, root = read_kinetics(path), path.parent
    else:
        listed, root = read_manifest(path), Path(place).parent
    check_readers(listed)
    if listed.left_out:
        first, why = next(iter(listed.left_out.items()))
        logger.warning("%s: %d left out, such as %s (%s)", place, len(listed.left_out), first, why)
    return listed, root


def read_sources(
    fractions: Mapping[str, float],
    cache: str | Mapping[str, str] | None,
    take: Callable[[Listing, Path], Sequence[ScanRecord]],
) -> Mixture:
    """The sources of a run.

    Args:
        fractions: Of an epoch, by the place of each source.
        cache: Of the only source, or by the place of each.
        take: What is trained on of a source's records and root.

    Raises:
        RecipeError: A cache is of no source.
        ScanError, MissingExtraError: As `read_source`.
    """
    if isinstance(cache, str):
        if len(fractions) > 1:
            raise RecipeError(
                f"of several sources each has a cache of its own: cache={{{next(iter(fractions))}: {cache}, …}}"
            )
        cache = dict.fromkeys(fractions, cache)
    if unknown := sorted(set(cache or {}) - set(fractions)):
        raise RecipeError(f"cache: {', '.join(unknown)} is no source; they are {', '.join(fractions)}")
    sources = []
    for (place, fraction), name in zip(fractions.items(), _names([*fractions]), strict=True):
        records, root = read_source(place)
        sources.append(Source(take(records, root), root, (cache or {}).get(place), fraction, name))
    return Mixture(sources)


def _names(places: Sequence[str]) -> list[str]:
    """What sources are called: by their own names, and where these are the same, with their folders' before it."""
    paths = [expanded(place).absolute() for place in places]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return [
        f"{path.parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]


def check_mixture(mixture: Mixture) -> None:
    """Raise RecipeError where two sources name the same file, which an epoch would show twice."""
    seen: dict[str, str] = {}
    for source in mixture.sources if len(mixture.sources) > 1 else ():
        files = {str(expanded(str(image_of(record.image))).resolve()): record for record in source.records}
        for file, record in files.items():
            if file in seen:
                raise RecipeError(f"{record.name}: is in two sources, {seen[file]} and {source.name}; list it in one")
        seen |= dict.fromkeys(files, source.name)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise ValueError where fractions are not above 0, or do not add up to 1."""
    if fractions and (min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > _WHOLE):
        said = " + ".join(f"{fraction:g}" for fraction in fractions.values())
        raise ValueError(f"the fractions of sources must be above 0 and add up to 1, and are {said}")


def items_taken(counts: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many items of each source an epoch takes: as many as go in these fractions with none twice.

    The source that is scarcest for its fraction is taken whole, up to rounding down.
    """
    whole = min(count / fraction for count, fraction in zip(counts, fractions, strict=True))
    return [min(count, int(fraction * whole + _WHOLE)) for count, fraction in zip(counts, fractions, strict=True)]


# --- What is said of them -------------------------------------------------------------------------


def cohorts(mixture: Mixture, patients: Sequence[int], bad: AbstractSet[int] = frozenset()) -> tuple[Cohort, ...]:
    """The sources as a card's cohorts: by their names, and what they are where that is no scans of people.

    Args:
        mixture: The records.
        patients: Of each source.
        bad: Records that could not be read, which are not counted.
    """
    made = []
    for source, people, lost in zip(mixture.sources, patients, mixture.split(bad), strict=True):
        scans, kind = len(source.records) - lost, source.kind
        if kind == "scans":
            made.append(Cohort(source.name, people, scans))
        elif kind == "phantom":
            made.append(Cohort(f"{source.name} ({SAID[kind]})", people, scans))
        else:
            made.append(Cohort(f"{source.name} ({scans:,} {SAID[kind]})"))
    return tuple(made)


def in_words(mixture: Mixture, patients: Sequence[int], bad: AbstractSet[int] = frozenset()) -> str:
    """The sources in a line: "20 scans of 12 patients (a)", and of several what fraction of an epoch each is."""
    said = []
    for source, people, lost in zip(mixture.sources, patients, mixture.split(bad), strict=True):
        scans, kind = len(source.records) - lost, source.kind
        of = f" of {people:,} patients" if kind == "scans" else ""
        part = f"{source.fraction:.0%} of an epoch: " if len(mixture.sources) > 1 else ""
        said.append(f"{part}{scans:,} {SAID[kind]}{of} ({source.name})")
    return "; ".join(said)
