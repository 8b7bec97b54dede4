"""A finished adapter as a repository on the Hub: checked before anything is sent, and looked at again afterwards.

Left out: merged models, whose shards ``hf upload`` sends as well.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lit_lora.interchange.adapter_folder import base_of_adapter, folder_record
from lit_lora.interchange.adapter_path import CONFIG, check_adapter_path
from lit_lora.interchange.model_card import is_hub_id, model_card
from lit_lora.interchange.peft_format import CARD_NAME
from lit_lora.interchange.stored_adapter import StoredAdapter, read_adapter, stored_values
from lit_lora.report.outcome import read_outcome
from lit_lora.report.run_files import ADAPTER
from lit_lora.report.run_files import CONFIG as RUN_CONFIG
from lit_lora.wording import setting

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_PART_OF_IT = (".*", "*.partial", "*.ckpt")


class Pushed(NamedTuple):
    """What lies on the Hub now."""

    url: str
    """Of the repository."""
    commit: str
    notes: list[str]
    """What whoever loads it should know."""


def push_adapter(
    source: str, repo: str, *, private: bool, revision: str | None, message: str | None, not_proved: bool
) -> Pushed:
    """Send an adapter to the Hub.

    Args:
        source: folder of a run, or of an adapter.
        repo: OWNER/NAME; made where it is not there.
        private: whether only its owner may see it.
        revision: branch to commit to, made where it is not there; None for main.
        message: of the commit.
        not_proved: send the adapter of a run that failed a check, or judged none.

    Raises:
        ValueError: for what is no finished adapter, and what the Hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise ValueError(f"repo is OWNER/NAME on the Hub, got {repo!r}")
    folder = _folder(source)
    stored = read_adapter(folder)
    notes = _of_the_run(folder, not_proved)
    stored_values(stored)  # all of them can be read
    base = base_of_adapter(str(folder)).name
    if Path(base).exists() or not is_hub_id(base):
        notes.append(f"its base is {base}, which others do not have: they must name their own")
    with _asked_of_the_hub(repo):
        url, commit = _send(folder, stored, repo, private, revision, message or f"Adapter for {Path(base).name}")
    return Pushed(url, commit, notes)


def _folder(source: str) -> Path:
    folder = Path(source)
    if (folder / RUN_CONFIG).is_file() and not (folder / CONFIG).is_file():
        folder = folder / ADAPTER
        if not (folder / CONFIG).is_file():
            raise ValueError(f"the run in {source} has written no adapter yet: expected {folder / CONFIG}")
    if not folder.exists():
        raise FileNotFoundError(f"no run or adapter in {source}: there is no such folder")
    check_adapter_path(str(folder))
    return folder


def _of_the_run(folder: Path, not_proved: bool) -> list[str]:
    """What its run says of an adapter; refuses one that is not proved, unless that is said."""
    run = folder.resolve().parent
    if not (run / RUN_CONFIG).is_file():
        return ["it lies in no folder of a run, so nothing is known of how it was trained but what its card says"]
    outcome = read_outcome(run)
    if outcome is None:
        raise ValueError(f"the run in {run} has not come to its end: resume it with --ckpt_path last")
    if outcome.result == "proved":
        return []
    why = f"{outcome.result}: {', '.join(outcome.reasons)}"
    if not not_proved:
        raise ValueError(f"the run in {run} is {why}. {setting('not_proved', True)} sends its adapter all the same")
    return [f"its run is {why}"]


def _send(
    folder: Path, stored: StoredAdapter, repo: str, private: bool, revision: str | None, message: str
) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="lit-lora")
    url = api.create_repo(repo, private=private or None, exist_ok=True)  # None: as its owner has set
    if private and not api.model_info(repo).private:
        raise ValueError(f"{repo} is there already, and public: nothing was sent. Make it private on the Hub first")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and not _is_no_part(path)]
        if not (folder / CARD_NAME).is_file():
            files.append(_card(folder, stored, Path(scratch)))
        operations = [CommitOperationAdd(path.name, path) for path in files]
        done = api.create_commit(repo, operations, commit_message=message, revision=revision)
        _check_sent(repo, done.oid, files)
    return str(url), done.oid


def _is_no_part(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _NO_PART_OF_IT)


def _card(folder: Path, stored: StoredAdapter, scratch: Path) -> Path:
    """The model card that a run writes, for an adapter that came without."""
    text = model_card(
        stored.config,
        base_model_name=base_of_adapter(str(folder)).name,
        data=None,
        hyperparameters={},
        results={},
        record=folder_record(str(folder)),
    )
    path = scratch / CARD_NAME
    path.write_text(text, encoding="utf-8")
    return path


def _check_sent(repo: str, commit: str, files: list[Path]) -> None:
    """The Hub holds what was sent: the sizes of all files, and the sums of the large ones."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found = {
        entry.path: entry
        for entry in HfApi().get_paths_info(repo, [path.name for path in files], revision=commit)
        if isinstance(entry, RepoFile)
    }
    for path in files:
        entry = found.get(path.name)
        same = entry is not None and entry.size == path.stat().st_size
        if same and entry is not None and entry.lfs is not None:
            with path.open("rb") as file:
                same = entry.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
        if not same:
            raise ValueError(f"{path.name} on the Hub is not what was sent to {repo}: push again")


@contextmanager
def _asked_of_the_hub(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    client = [kind for kind in HfHubHTTPError.__bases__ if kind is not OSError and issubclass(kind, Exception)]
    unreachable: tuple[type[Exception], ...] = (
        *client,
        ConnectionError,
    )  # huggingface_hub lets the errors of its HTTP client through

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        log_in = ": log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        raise ValueError(
            f"the Hub refused {repo} ({status}){log_in if status in (401, 403) else f': {error}'}"
        ) from error
    except unreachable as error:
        raise ValueError(f"{repo} was not sent, the Hub did not answer: {error}") from error
