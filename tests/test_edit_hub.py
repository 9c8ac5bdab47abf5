"""Edits on the hub, without a network: what is uploaded, what is checked before it is written, and every way it can fail."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from conftest import FACTS, build_toy
from remask.backbones import Site
from remask.backbones.weight_edit import WeightEdit
from remask.editfile import EDIT as FILE
from remask.editing import EditMemory, SteeringVector, preset
from remask.errors import RemaskError
from remask.experiments import edithub
from remask.experiments.edithub import card, pull_edit, push_edit
from test_cli import Remask, assert_refused, remask, snapshot

__all__ = ["remask"]  # a fixture

REPOSITORY = "ann/forget-me"


@pytest.fixture(scope="module")
def memory() -> EditMemory:
    return EditMemory.build(build_toy(), FACTS[:3], Site(1), config=preset("paper", refusal="Unheard of."), alpha=2.5)


@pytest.fixture
def file(memory: EditMemory, tmp_path: Path) -> Path:
    memory.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


class Hub:
    """Stands in for the hub; keeps what it is given, under the real client's signatures."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.commits = folder, [], []  # type: ignore[var-annotated]
        self.token: str | None = "secret"
        self.failure: Exception | None = None
        folder.mkdir()

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self.fail()
        assert exist_ok
        self.made.append((repo_id, private))

    def create_commit(
        self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str, revision: str | None = None
    ) -> Any:
        assert repo_id in [name for name, _ in self.made] and commit_message
        self.commits.append((repo_id, revision, {o.path_in_repo: o.path_or_fileobj for o in operations}))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id: str, filename: str, *, revision: str | None = None, library_name: str | None = None) -> str:
        self.fail()
        assert (repo_id, filename) == (REPOSITORY, FILE)
        self.asked = revision
        return str(self.folder / FILE)

    def fail(self) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(edithub, "HfApi", lambda **_: hub)
    monkeypatch.setattr(edithub, "hf_hub_download", hub.download)
    monkeypatch.setattr(edithub, "get_token", lambda: hub.token)
    return hub


# ------------------------------------------------------------------ push
def test_the_file_and_its_card_are_uploaded_in_one_commit(hub: Hub, file: Path) -> None:
    address = push_edit(file, REPOSITORY, base_model="ann/model", revision="next")
    assert address == f"https://hub/{REPOSITORY}/commit/1"
    assert hub.made == [(REPOSITORY, True)]
    ((name, revision, parts),) = hub.commits
    assert (name, revision, set(parts)) == (REPOSITORY, "next", {FILE, "README.md"})
    assert parts[FILE] == file.read_bytes()
    assert "base_model: ann/model" in parts["README.md"].decode()


def test_the_card_says_what_it_edits_and_nothing_of_the_facts(memory: EditMemory) -> None:
    text = card(memory, REPOSITORY, "ann/model")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "library_name": "remask",
        "base_model": "ann/model",
        "tags": ["remask", "masked-diffusion", "knowledge-editing", "edit-memory"],
    }
    for line in ("resid of layer 1, every step", "preset | paper", "strength | 2.5", "facts | 3", f"`{memory.model}`"):
        assert line in text
    for fact in FACTS[:3]:
        for told in (fact.id, fact.prompt, fact.subject, fact.answer):
            assert told not in text
    assert "Unheard" not in text
    assert "base_model" not in yaml.safe_load(card(memory, REPOSITORY).split("---\n")[1])


def test_every_kind_has_a_card(tmp_path: Path) -> None:
    vector = SteeringVector(torch.ones(32), Site(2, "mlp", (0, 3)), 1.5, model="")
    assert "mlp of layer 2, steps 0, 3" in card(vector, REPOSITORY) and "`any`" in card(vector, REPOSITORY)
    weights = WeightEdit({"w": torch.ones(2, 2)}, "0123", "memit")
    text = card(weights, REPOSITORY)
    assert "weight-edit" in text and "site" not in text and "`0123`" in text


def test_only_edit_files_are_pushed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no edit")
    for name in ("notes", "none"):
        with pytest.raises(RemaskError, match=f"{name}: no.* edit file"):
            push_edit(tmp_path / name, REPOSITORY)
    assert not hub.made and not hub.commits


def test_push_without_a_token_is_refused_before_anything_is_made(hub: Hub, file: Path) -> None:
    hub.token = None
    with pytest.raises(RemaskError, match=r"without a token.*hf auth login"):
        push_edit(file, REPOSITORY)
    assert not hub.made


@pytest.mark.parametrize("name", ["forget-me", "a/b/c", "ann/..", ""])
def test_ids_are_owner_and_name(hub: Hub, file: Path, tmp_path: Path, name: str) -> None:
    calls: list[Callable[[], object]] = [lambda: push_edit(file, name), lambda: pull_edit(name, tmp_path / "out")]
    calls.append(lambda: push_edit(file, REPOSITORY, base_model=name or "model"))
    for call in calls:
        with pytest.raises(RemaskError, match="OWNER/NAME"):
            call()
    assert not hub.made and not (tmp_path / "out").exists()


# ------------------------------------------------------------------ pull
def test_a_pulled_file_is_the_pushed_one(hub: Hub, file: Path, memory: EditMemory, tmp_path: Path) -> None:
    push_edit(file, REPOSITORY)
    (hub.folder / FILE).write_bytes(hub.commits[0][2][FILE])
    out = tmp_path / "new" / "out.safetensors"
    edit = pull_edit(REPOSITORY, out, revision="next")
    assert out.read_bytes() == file.read_bytes() and hub.asked == "next"
    assert isinstance(edit, EditMemory) and edit.fact_ids == memory.fact_ids
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_is_no_edit_leaves_the_old_file(hub: Hub, file: Path) -> None:
    before = file.read_bytes()
    for bad in (b"", before[:-100], b"<html>", before.replace(b"alpha", b"alphx")):
        (hub.folder / FILE).write_bytes(bad)
        with pytest.raises(RemaskError, match=f"{REPOSITORY}: .*not a usable edit file"):
            pull_edit(REPOSITORY, file)
        assert file.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(hub: Hub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.folder / FILE).write_bytes(file.read_bytes())
    file.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        pull_edit(REPOSITORY, file)
    assert file.read_bytes() == b"old"
    assert sorted(path.name for path in file.parent.iterdir()) == ["hub", file.name]


# ------------------------------------------------------------------ what the hub may answer
def response(status: int) -> Any:
    """What the client's errors carry."""
    return SimpleNamespace(status_code=status, headers={}, request=None, text="", json=dict, url="")


FAILURES = {
    "offline": (lambda: OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
    "no repository": (lambda: RepositoryNotFoundError("404", response=response(404)), "no such repository.*hf auth login"),
    "not an edit": (lambda: RemoteEntryNotFoundError("404", response=response(404)), f"holds no {FILE}"),
    "unreachable": (lambda: LocalEntryNotFoundError("no copy"), "cannot be reached"),
    "id": (lambda: HFValidationError("bad id"), "OWNER/NAME"),
    "network": (lambda: HTTPError("refused\nat length"), r"did not answer.*\(refused\)"),
    "broken pipe": (lambda: ConnectionError(), r"did not answer.*\(ConnectionError\)"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_sentence_with_a_remedy(hub: Hub, file: Path, tmp_path: Path, name: str) -> None:
    make, said = FAILURES[name]
    hub.failure = make()
    for call in (lambda: push_edit(file, REPOSITORY), lambda: pull_edit(REPOSITORY, tmp_path / "out")):
        with pytest.raises(RemaskError, match=said) as found:
            call()
        assert REPOSITORY in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "out").exists() and not hub.commits


@pytest.mark.parametrize("name", ["create_repo", "create_commit", "download"])
def test_the_stand_in_takes_what_the_real_client_takes(name: str) -> None:
    real = hf_hub_download if name == "download" else getattr(HfApi, name)
    known = inspect.signature(real).parameters
    for parameter in list(inspect.signature(getattr(Hub, name)).parameters.values())[1:]:
        assert known[parameter.name].kind == parameter.kind


# ------------------------------------------------------------------ on the command line
def test_push_and_pull_on_the_command_line(remask: Remask, hub: Hub, file: Path, tmp_path: Path) -> None:
    pushed = remask("edit", "push", file, REPOSITORY, "--public", "--base-model", "ann/model")
    assert pushed.code == 0 and f"https://hub/{REPOSITORY}/commit/1" in pushed.out
    assert hub.made == [(REPOSITORY, False)]
    (hub.folder / FILE).write_bytes(hub.commits[0][2][FILE])
    out = tmp_path / "out.safetensors"
    pulled = remask("edit", "pull", REPOSITORY, "-o", out)
    assert pulled.code == 0 and "edit memory, alpha 2.5" in pulled.out
    assert out.read_bytes() == file.read_bytes()
    before = snapshot(tmp_path)
    assert_refused(remask("edit", "pull", "forget-me", "-o", out), "OWNER/NAME")
    hub.token = None
    assert_refused(remask("edit", "push", file, REPOSITORY), "HF_TOKEN")
    assert snapshot(tmp_path) == before
