"""Upload a model's folder to the Hugging Face Hub, with the Hub's own client."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch import nn

from brainfm.errors import BrainfmError
from brainfm.factory import create_model
from brainfm.hub.card import PLACE
from brainfm.hub.folder import CARD, HEAD_ARRAYS, save_for_hub
from brainfm.weights import HUB_CONFIG, HUB_WEIGHTS, hub_reason
from brainfm.weights.licence import check_passing_on


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model to the Hugging Face Hub, in one commit; the repository is made where there is none.

    The folder is loaded first, as a user would load it: what cannot be loaded is not uploaded.

    Args:
        model_or_folder: A folder of `save_for_hub` or `convert`, or an encoder, which is saved first.
        repo_id: "org/name".
        private: Make a new repository private. One that is there stays as it is.
        revision: The branch to commit to, made where there is none; None is the main one.
        token: With the right to write; by default `HF_TOKEN`, or that of `hf auth login`.

    Returns:
        The name under which `create_model` loads exactly this upload: "hf-hub:org/name@commit".

    Raises:
        BrainfmError: The name is not one, the weights' licence does not let them be passed on, or the Hub refused; the
            message says why.
        WeightsError: The folder's files do not fit together.

    Example:
        >>> import brainfm
        >>> model = brainfm.create_model("test_vit_3d", pretrained=True)
        >>> print(brainfm.push_to_hub(model, "my-lab/test_vit_3d", private=True))
        hf-hub:my-lab/test_vit_3d@...
    """
    if not isinstance(model_or_folder, str | os.PathLike):
        with tempfile.TemporaryDirectory() as temporary:
            folder = save_for_hub(model_or_folder, Path(temporary) / "model")
            return push_to_hub(folder, repo_id, private=private, revision=revision, token=token)
    if repo_id.count("/") != 1 or repo_id.startswith("/") or repo_id.endswith("/"):
        raise BrainfmError(f"{repo_id!r} is not the name of a repository; write 'org/name', or 'user/name'")
    folder = Path(model_or_folder)
    cfg = create_model(f"local-dir:{folder}").pretrained_cfg
    check_passing_on(cfg, f"{folder}: not uploaded")
    files: dict[str, Path | bytes] = {name: folder / name for name in (HUB_CONFIG, HUB_WEIGHTS)}
    if (folder / HEAD_ARRAYS).is_file():
        files[HEAD_ARRAYS] = folder / HEAD_ARRAYS
    if (folder / CARD).is_file():
        files[CARD] = (folder / CARD).read_text(encoding="utf-8").replace(PLACE, repo_id).encode()

    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, exist_ok=True, private=True if private else None)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"Upload {folder.resolve().name} with brainfm",
            revision=revision,
        )
    except Exception as error:  # what breaks on the way is another class in each version of the client
        raise BrainfmError(f"hf-hub:{repo_id}: not uploaded: {hub_reason(error)}") from error
    return f"hf-hub:{repo_id}@{commit.oid}"
