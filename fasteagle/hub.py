"""Where is a checkpoint? A folder or file here, or a hub id that is downloaded once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Named so that a repository's second copy of the weights (consolidated.*, original/) stays there.
CONFIGS = ["*.json", "tokenizer.model", "*.jinja"]
SAFETENSORS = ["model*.safetensors", "medusa_lm_head.safetensors"]
BIN = ["pytorch_model*.bin", "medusa_lm_head.pt"]
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".index.json")
# The bases of HfHubHTTPError are OSError and the HTTP client's own root, whichever client it is.
UNREACHABLE: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__


class TerminalBar(tqdm):
    """A progress bar that only a terminal shows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"disable": None, **kwargs})


def is_hub_id(source: str | Path) -> bool:
    """Whether a source that is not a path here reads like "owner/name"."""
    return not Path(source).exists() and HUB_ID.fullmatch(str(source)) is not None


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The local path of a checkpoint; a hub id is downloaded, but for files that came before."""
    path = Path(source)
    if not str(source):
        raise ValueError("the checkpoint path is empty; give a folder, a weight file or a hub id")
    if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS):
        raise ValueError(
            f"{source} is not a weight file ({', '.join(WEIGHT_ENDINGS)}); give one, a checkpoint "
            "folder or a hub id like owner/name"
        )
    if path.exists():
        return path
    if not is_hub_id(source):
        raise FileNotFoundError(
            f"{source} does not exist; expected a checkpoint folder, a weight file or a hub id "
            "like owner/name"
        )
    folder = _download(str(source), revision, CONFIGS + SAFETENSORS)
    if not any(found for pattern in SAFETENSORS for found in folder.glob(pattern)):
        folder = _download(str(source), revision, CONFIGS + BIN)
    return folder


def _download(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    at = f"{hub_id} at revision {revision}" if revision else hub_id
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, tqdm_class=TerminalBar
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{at} is gated: accept its licence on the hub and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{at} is neither a path here nor a model you can see on the hub; check the name, "
            "or log in if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{hub_id} has no revision {revision}; give a branch, tag or commit of it"
        ) from error
    except UNREACHABLE as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise FileNotFoundError(
            f"{at} is not a path here and cannot be downloaded ({reason}); try again (files that "
            "came whole are kept), or download it on a connected machine and give its folder"
        ) from error
    except json.JSONDecodeError as error:  # a login page of some network, for example
        raise ValueError(
            f"{at} is not a path here, and what answers in the hub's place is no hub ({error})"
        ) from error
    return Path(folder)
