"""Edit files on the hub: pushed with a card that names no fact's text, pulled and checked before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..backbones.model import Site
from ..backbones.weight_edit import WeightEdit
from ..editfile import EDIT
from ..editing import Codebook, EditMemory, SteeringVector
from ..errors import RemaskError
from ..facts import write_atomically
from .edits import load_edit

Edit = EditMemory | SteeringVector | Codebook | WeightEdit
_CARD = """\
---
{front}---

# {kind} for a masked diffusion language model

For the library `remask`. Detaching it gives back the model bit for bit. It was built on the model with fingerprint `{model}`.

{table}

```
remask edit pull {repository} -o {file}
remask edit verify MODEL {file}
```

```python
from remask import load, load_edit

with load_edit("{file}").attached(load(MODEL)) as lm:
    ...
```
"""


def push_edit(
    path: str | Path, repository: str, *, base_model: str | None = None, private: bool = True, revision: str | None = None
) -> str:
    """Upload an edit file with a card to the hub, in one commit; the repository is made where there is none.

    Args:
        repository: `owner/name`.
        base_model: hub id of the model that the edit is of, for the card.
        private: of a repository that is made now; one that exists stays what it is.
        revision: branch; None = the main one.

    Returns:
        The commit's address.

    Raises:
        RemaskError: whatever `load_edit` refuses, a malformed id, no token, no right to write, or the hub cannot be reached.
    """
    edit, data = load_edit(path), Path(path).read_bytes()
    with _answering(repository):
        for name in (repository, *([base_model] if base_model else [])):
            _check(name)
        if get_token() is None:
            raise RemaskError(f"{repository}: the hub takes no files without a token; run `hf auth login`, or set HF_TOKEN")
        api = HfApi(library_name="remask")
        api.create_repo(repository, private=private, exist_ok=True)
        parts = {EDIT: data, "README.md": card(edit, repository, base_model).encode()}
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=part) for name, part in parts.items()]
        done = api.create_commit(repository, operations, commit_message=f"Upload {edit.kind}", revision=revision)
    return str(done.commit_url)


def pull_edit(repository: str, path: str | Path, *, revision: str | None = None) -> Edit:
    """Download an edit file from the hub, check it, and write it to `path`, atomically.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None = the newest.

    Raises:
        RemaskError: a malformed id, no such repository, none of an edit, the hub cannot be reached, or no edit file that
            `load_edit` takes; nothing is written then.
    """
    with _answering(repository):
        _check(repository)
        found = Path(hf_hub_download(repository, EDIT, revision=revision, library_name="remask"))
    try:
        edit = load_edit(found)
    except RemaskError as error:
        raise RemaskError(f"{repository}: what the hub gave is not a usable edit file ({error})") from None
    write_atomically(path, found.read_bytes())
    return edit


def card(edit: Edit, repository: str, base_model: str | None = None) -> str:
    """README.md of an edit's repository: what it edits and where, how many facts it holds; none of their ids or texts."""
    about = edit.describe()
    tags = ["remask", "masked-diffusion", "knowledge-editing", edit.kind.replace(" ", "-")]
    front = {"library_name": "remask", **({"base_model": base_model} if base_model else {}), "tags": tags}
    site = None if "site" not in about else Site.from_dict(about["site"])
    lines = {
        "kind": edit.kind,
        "base model": base_model or "not given",
        "site": None if site is None else f"{site.module} of layer {site.layer}, {_steps(site)}",
        "preset": about.get("preset"),
        "strength": f"{edit.alpha:.6g}",
        "facts": about.get("facts"),
        "keys": about.get("keys"),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items() if value is not None)]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        kind=edit.kind.capitalize(),
        model=edit.model or "any",
        table="\n".join(table),
        repository=repository,
        file=EDIT,
    )


def _steps(site: Site) -> str:
    return "every step" if site.steps is None else f"steps {', '.join(map(str, site.steps))}"


def _check(name: str) -> None:
    """Refuse what is no `owner/name`; a bare name would go to whoever is logged in."""
    validate_repo_id(name)
    if "/" not in name:
        raise RemaskError(f"{name!r} is not an id of the form OWNER/NAME")


@contextlib.contextmanager
def _answering(repository: str) -> Iterator[None]:
    """Errors of the hub's client in one sentence with a remedy."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise RemaskError(f"{repository}: offline mode is on; unset HF_HUB_OFFLINE to reach the hub") from None
    except RepositoryNotFoundError:
        raise RemaskError(
            f"{repository}: the hub has no such repository, or it is closed to you; check the name, or run `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise RemaskError(f"{repository}: the hub cannot be reached and no copy is in the cache; try again online") from None
    except EntryNotFoundError:
        raise RemaskError(f"{repository} holds no {EDIT}; name a repository of `remask edit push`") from None
    except HFValidationError as error:
        raise RemaskError(f"{repository!r} is not an id of the form OWNER/NAME ({_first_line(error)})") from None
    except (HTTPError, OSError) as error:
        raise RemaskError(
            f"{repository}: the hub did not answer as it should ({_first_line(error)}); check the connection and your rights"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
