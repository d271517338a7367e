"""Download a file, going on where an earlier try stopped."""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path

from brainfm.errors import WeightsNotFoundError
from brainfm.files import one_line, progress_bar, sync

logger = logging.getLogger("brainfm")

_TRIES, _TIMEOUT_S = 5, 30  # tries without progress, seconds of silence


def download(url: str, target: Path, by_hand: Path) -> None:
    """Download to `target`, going on where an earlier call stopped; `by_hand` is where a user may put the file.

    Raises:
        WeightsNotFoundError: The network, the server, or HF_HUB_OFFLINE does not let it be.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    way_out = (
        f"On a machine with a network: curl -LO {url} ; then put the file at {by_hand}, or pass it as checkpoint_path="
    )
    if HF_HUB_OFFLINE:
        raise WeightsNotFoundError(f"{url} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it. {way_out}")
    try:
        _fetch(url, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if target.is_file() and target.stat().st_size == 0:
            target.unlink()
        raise WeightsNotFoundError(f"cannot download {url} ({one_line(error)}). {way_out}") from error


def _fetch(url: str, partial: Path) -> None:
    """Fetch what a partial file lacks, trying again after a fault that may pass, as long as there is some progress."""
    tries = 0
    while True:
        have = partial.stat().st_size if partial.is_file() else 0
        try:
            return _fetch_rest(url, partial, have)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing can be added to it
                if error.headers.get("Content-Range") == f"bytes */{have}":
                    return None  # because it is whole
                partial.unlink()
                continue
            if error.code < 500 and error.code not in (408, 429):
                raise
            fault: Exception = error
        except (OSError, http.client.HTTPException) as error:
            fault = error
        grown = partial.is_file() and partial.stat().st_size > have
        tries = 0 if grown else tries + 1
        if tries == _TRIES:
            raise fault
        logger.debug("%s: %s; trying again", url, one_line(fault))
        time.sleep(1)


def _fetch_rest(url: str, partial: Path, have: int) -> None:
    headers = {"User-Agent": "brainfm"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        have = have if response.status == 206 else 0  # a server that does not know ranges sends all of it again
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = progress_bar(total=total, unit="B", doing=partial.stem, shown=True, done=have)
        with partial.open("ab" if have else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        sync(partial)
    if total is not None and partial.stat().st_size != total:
        raise ConnectionError(f"the connection broke after {partial.stat().st_size} of {total} bytes")
