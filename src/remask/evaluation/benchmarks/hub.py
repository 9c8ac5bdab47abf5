"""Where a benchmark's files are: a local folder, or a published data set that the user names by its hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ...errors import RemaskError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(name: str, data: str | Path | None, published: Mapping[str, str | None], patterns: Sequence[str]) -> Path:
    """The folder with the files of benchmark `name`.

    An existing folder is used as it is. Otherwise `data` may be one of the `published` ids, `owner/name` or
    `owner/name@commit`, which is downloaded (and cached) by huggingface_hub. Nothing else reaches the network, so that a
    mistyped folder does not.

    Args:
        published: hub id -> the commit that is taken where the user names none; None takes the newest.
        patterns: files to download, shell patterns.

    Raises:
        RemaskError: no data named, no such folder, or the hub refused.
    """
    ids = " or ".join(published)
    choice = f"a folder, or {ids} for a download" if ids else "a folder"
    if data is None:
        raise RemaskError(f"benchmark {name} needs its files; point --data at {choice}")
    folder = Path(data)
    if folder.is_dir():
        return folder
    repository, _, commit = str(data).partition("@")
    if repository not in published:
        raise RemaskError(f"{data}: no such folder; benchmark {name} needs its files, so point --data at {choice}")
    if commit and not _COMMIT.fullmatch(commit):
        raise RemaskError(f"{data}: a revision is a commit of 40 hexadecimal digits, so that the rows cannot change")
    revision = commit or published[repository]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RemaskError(f"{data} is no folder, and the hub gave no such data set ({reason})") from None
