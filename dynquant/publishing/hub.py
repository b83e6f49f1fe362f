"""Hugging Face's Hub: recipes that come from it, and releases that go to it, one commit a file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from dynquant.checkpoints.gguf_source import is_gguf
from dynquant.errors import HubError, hub_failures
from dynquant.publishing.options import CARD_NAME, PLOT_NAME, RECORD_NAME, REPORTS_NAME
from dynquant.publishing.record import Release
from dynquant.session import Session
from dynquant.storage.atomic import file_hash

_HEADER_BYTES = 32 << 20
"""More than the largest headers, of a vocabulary of 260,000 tokens with its merges, have."""


class Upload(NamedTuple):
    """One file on its way: its name in folder and repository, its size, and whether the Hub has these very bytes."""

    name: str
    num_bytes: int
    is_there: bool


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Context manager: refusals of the Hub, and its absence, become one paragraph."""
    try:
        yield
    except hub_failures() as error:
        words = " ".join(str(error).split()) or "no words"
        raise HubError(
            f"{what} failed ({type(error).__name__}: {words:.400}). Check the name and the connection, log in with "
            "`hf auth login`, and run the same command again: what is there already is not sent again."
        ) from error


@contextmanager
def recipe_file(path: Path) -> Iterator[Path]:
    """Context manager: yields a local .gguf file or plan, or for OWNER/REPO/FILE.gguf of the Hub a file with its header
    and its size, and no weights.

    Raises:
        HubError: there is no such file, or the Hub does not answer.
    """
    if path.exists():
        yield path
        return
    if path.is_absolute() or len(path.parts) < 3 or not is_gguf(path):
        raise HubError(
            f"--like {path} is no file here, and of the Hub a file is needed as OWNER/REPO/FILE.gguf: a repository has "
            "many recipes."
        )
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    with TemporaryDirectory() as folder:
        recipe = Path(folder) / path.name
        with _asking(f"Fetching {path}"):
            url = hf_hub_url("/".join(path.parts[:2]), "/".join(path.parts[2:]))
            size = get_hf_file_metadata(url).size or 0
            asked = build_hf_headers() | {"Range": f"bytes=0-{min(size, _HEADER_BYTES) - 1}"}
            answer = http_backoff("GET", url, headers=asked)
            hf_raise_for_status(answer)
            recipe.write_bytes(answer.content)
            os.truncate(recipe, size)
        yield recipe


def released_names(folder: Path, record: Release) -> list[str]:
    """Return the names of all that is published, the card last, so that what it tells of is there."""
    rows = [row for row in record.files if row.is_released]
    names = [name for row in rows for name in row.files] + list(record.extra_files)
    names += [f"{REPORTS_NAME}/{row.name}.json" for row in record.files]
    names += [f"{PLOT_NAME}.png", f"{PLOT_NAME}.svg", RECORD_NAME, CARD_NAME]
    return [name for name in names if (folder / name).is_file()]


def push(folder: Path, record: Release, repo: str, session: Session, *, is_real: bool) -> list[Upload]:
    """Return what goes to a repository and what is there; with `is_real` make it and send the rest, a commit a file.

    Raises:
        HubError: the Hub refuses, or does not answer; what was sent stays there, and is not sent again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils.sha import git_hash

    api, present = HfApi(), {}
    try:
        with _asking(f"Reading {repo}"):
            siblings = api.model_info(repo, files_metadata=True).siblings or []
            present = {each.rfilename: (each.lfs and each.lfs.sha256, each.blob_id) for each in siblings}
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            session.note(f"{repo} is not there yet" + ("" if is_real else ", or not to be seen without a login"))
        elif is_real:
            raise
        else:
            session.note(f"what {repo} has already is not known, and all files are listed: {error}")
    uploads = []
    for name in released_names(folder, record):
        path = folder / name
        large, small = present.get(name, (None, None))
        is_there = name in present and (large == file_hash(path) if large else small == git_hash(path.read_bytes()))
        uploads.append(Upload(name, path.stat().st_size, is_there))
    if not is_real:
        return uploads
    waiting = [upload for upload in uploads if not upload.is_there]
    with session.stage("Files that were sent stay there, and are not sent again.") as progress:
        with _asking(f"Making {repo}"):
            api.create_repo(repo, exist_ok=True)
        for done, upload in enumerate(waiting):
            progress("uploading", done, len(waiting), unit="files")
            with _asking(f"Uploading {upload.name} to {repo}"):
                api.upload_file(
                    path_or_fileobj=folder / upload.name,
                    path_in_repo=upload.name,
                    repo_id=repo,
                    commit_message=f"Add {upload.name}",
                )
        progress("uploading", len(waiting), len(waiting), unit="files")
    return uploads
