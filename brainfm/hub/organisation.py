"""Fill an organisation of the Hub with every weight that may be passed on, as `BRAINFM_HUB_ORG` reads it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from brainfm.errors import BrainfmError, ModelNameError, WeightsError, WeightsNotFoundError
from brainfm.factory import create_model
from brainfm.files import one_line
from brainfm.hub.folder import convert, save_for_hub
from brainfm.hub.publish import push_to_hub
from brainfm.names import CARD_FIELDS, ResolvedModel, resolve
from brainfm.pretrained import PretrainedCfg
from brainfm.registry import get_pretrained_cfg, list_pretrained
from brainfm.weights import HUB_WEIGHTS, cached_weights, hub_reason

logger = logging.getLogger("brainfm")

State = Literal["pushed", "there", "ready", "left out", "failed"]


@dataclass(frozen=True)
class Published:
    """What became of one set of weights.

    Attributes:
        name: `architecture.tag`.
        state: "pushed"; "there" already, with an equal digest and card; "ready" to be pushed, of a dry run; "left out"
            or "failed", for the reason that `why` gives.
        repository: On the Hub, "org/architecture.tag".
        revision: Its commit; "" where nothing is there.
        sha256: Of the `model.safetensors` in it.
        why: Why it was left out or failed; of a dry run, the file that would be converted.

    Example:
        >>> from brainfm.hub import Published
        >>> Published("a.b", "pushed", "lab/a.b", revision="8b1c7ad", sha256="f046").pin
        {'source': {'hub': 'lab/a.b', 'revision': '8b1c7ad'}, 'digest': 'sha256:f046'}
    """

    name: str
    state: State
    repository: str = ""
    revision: str = ""
    sha256: str = ""
    why: str = ""

    @property
    def pin(self) -> dict[str, Any]:
        """What the weights' card has to say, to take them from here and no others: `source` and `digest`."""
        return {"source": {"hub": self.repository, "revision": self.revision}, "digest": f"sha256:{self.sha256}"}


def publish_all(
    organisation: str,
    patterns: str | Sequence[str] = "",
    *,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    private: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
) -> Iterator[Published]:
    """Convert and push every weight that is at hand and may be passed on, a repository each: `org/architecture.tag`.

    Each repository holds what `save_for_hub` writes: weights, contract, golden embedding, model card. What is there
    with an equal digest and card is not pushed again, so that the same call goes on after one that was cut off. A
    weight that fails stops none of the others. The token is `HF_TOKEN`, or that of `hf auth login`.

    Args:
        organisation: Or user, on the Hub.
        patterns: Only the models that match, as of `list_models`.
        files: Weight files that are not in the cache, by the names of the weights; each must be the published file.
        private: Make new repositories private.
        cache_dir: Where the weights are, as for `create_model`.
        dry_run: Only say what would go; nothing is converted, and the Hub is not asked.

    Returns:
        What became of each set of weights, one at a time as it is done.

    Raises:
        BrainfmError: The organisation's name is not one.
        ModelNameError: No model matches, or `files` names one that there is not.

    Example:
        >>> from brainfm.hub import publish_all
        >>> [(one.name, one.state) for one in publish_all("my-lab", "test_*", dry_run=True)]
        [('test_resnet_3d.phantoms', 'ready'), ('test_vit_3d.phantoms', 'ready')]
    """
    if not organisation or "/" in organisation:
        raise BrainfmError(f"{organisation!r} is not the name of an organisation or user on the Hub; write it alone")
    given = {get_pretrained_cfg(name).name: Path(file) for name, file in (files or {}).items()}
    names = list_pretrained(patterns)
    if not names:
        raise ModelNameError(f"no model with weights matches {patterns!r}; 'brainfm list --pretrained' names them all")
    if unasked := sorted(given.keys() - names):
        raise BrainfmError(f"a file is given of {unasked[0]}, which is not among the models asked for")
    return (_publish(organisation, name, given.get(name), private, cache_dir, dry_run) for name in names)


def _publish(
    organisation: str,
    name: str,
    file: Path | None,
    private: bool,
    cache_dir: str | os.PathLike[str] | None,
    dry_run: bool,
) -> Published:
    cfg = get_pretrained_cfg(name)
    if why := _forbidden(cfg):
        return Published(name, "left out", why=why)
    at_hand = file or cached_weights(cfg, cache_dir)
    if at_hand is None:
        get = f"take them from {cfg.page}" if cfg.page else f"'brainfm fetch {name}'"
        return Published(name, "left out", why=f"its weights are not here: {get}, or give the file: --file {name}=FILE")
    repository = f"{organisation}/{name}"
    if dry_run:
        return Published(name, "ready", repository, why=str(at_hand))
    try:
        with tempfile.TemporaryDirectory(prefix="brainfm-") as temporary:
            folder = Path(temporary) / name
            if file:
                convert(file, folder, name)
            else:  # by its own cfg, from the cache, and not from the place that BRAINFM_HUB_ORG names
                model = create_model(
                    name, pretrained=True, pretrained_cfg=cfg, num_classes=cfg.num_classes, cache_dir=cache_dir
                )
                save_for_hub(model, folder)
            ours = resolve(f"local-dir:{folder}")
            if ours.cfg.name != name:
                raise WeightsError(f"{at_hand}: cannot be told to be the published file of {name}: {ours.cfg.notes}")
            state: State = "there"
            revision = _there(repository, ours)
            if not revision:
                state, revision = "pushed", push_to_hub(folder, repository, private=private).rpartition("@")[2]
    except Exception as error:  # whatever it is, the others are pushed
        logger.debug("%s: not published", name, exc_info=True)
        return Published(name, "failed", repository, why=f"{type(error).__name__}: {one_line(error)}")
    return Published(name, state, repository, revision, str(ours.cfg.sha256))


def _forbidden(cfg: PretrainedCfg) -> str:
    """Why weights may not or cannot be passed on, whoever has them; "" where they may."""
    if cfg.is_drawn:
        return f"there is no file: they are {cfg.source}"
    if not cfg.licence:
        return "no licence of its weights is stated, which leaves all rights to their authors"
    return "" if cfg.redistribute else f"its licence ({cfg.licence}) does not let it be passed on"


def _there(repository: str, ours: ResolvedModel) -> str:
    """The commit at which a repository holds these weights and this card already; "" where it does not."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        theirs = resolve(f"hf-hub:{repository}")
    except WeightsNotFoundError:
        return ""
    if _said(theirs) != _said(ours):
        return ""
    commit = str(theirs.cfg.hub_revision)
    try:
        announced = get_hf_file_metadata(hf_hub_url(repository, HUB_WEIGHTS, revision=commit)).etag
    except Exception as error:  # what breaks on the way is another class in each version of the client
        raise BrainfmError(f"hf-hub:{repository}: {hub_reason(error)}") from error
    return commit if announced == ours.cfg.sha256 else ""


def _said(model: ResolvedModel) -> dict[str, Any]:
    """What a config.json says of the weights, their digest included, without the versions that it was written with."""
    return {key: value for key, value in model.config.items() if key in CARD_FIELDS}
