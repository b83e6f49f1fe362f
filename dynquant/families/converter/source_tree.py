"""Finds the tree of llama.cpp's sources whose converter is used, and fetches one where the user asked for it.

A tree is a folder with `conversion/` and `gguf-py/`, as in llama.cpp's repository since 2026 and in the source
distribution of llama-cpp-python (vendor/llama.cpp).
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from dynquant.errors import CheckpointError
from dynquant.storage.atomic import writing_folder

VARIABLE = "LLAMA_CPP_DIR"
_PACKAGE = "llama-cpp-python"
_KEPT = ("conversion", "gguf-py", "LICENSE")
"""Parts of the tree that a converter needs."""


def cache_directory() -> Path:
    """Return the folder for what is fetched or worked out once: DYNQUANT_CACHE, or dynquant in the user's cache."""
    if stated := os.environ.get("DYNQUANT_CACHE"):
        return Path(stated).absolute()  # a worker knows it by its whole name
    return (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynquant").absolute()


def find_tree() -> Path | None:
    """Return llama.cpp's source tree: of --llama-cpp or LLAMA_CPP_DIR, or the fetched one; None where there is none.

    Raises:
        CheckpointError: the stated folder is no such tree.
    """
    if stated := os.environ.get(VARIABLE):
        for folder in (Path(stated), Path(stated) / "vendor" / "llama.cpp"):
            if is_tree(folder):
                return folder.resolve()
        raise CheckpointError(
            f"{stated} (--llama-cpp, or {VARIABLE}) is no source tree of llama.cpp with its converter: a folder with "
            "`conversion` and `gguf-py` is needed, as in llama.cpp's repository and in the source distribution of "
            f"{_PACKAGE} (vendor/llama.cpp)."
        )
    fetched = [folder for folder in cache_directory().glob("llama.cpp-*") if is_tree(folder)]
    newest = max(fetched, key=lambda folder: (folder == fetched_tree(), folder.stat().st_mtime), default=None)
    if newest is not None and newest != fetched_tree() and _installed_version() is not None:
        warnings.warn(
            f"llama.cpp's converter is that of {newest}, and {_PACKAGE} {_installed_version()} is installed: "
            "`dynquant fetch-llama-cpp` fetches its own.",
            stacklevel=3,
        )
    return newest


def fetched_tree() -> Path:
    """Return where the tree of the installed llama-cpp-python is kept once it is fetched."""
    return cache_directory() / f"llama.cpp-{_installed_version() or 'unknown'}"


def fetch_tree() -> Path:
    """Download the source distribution of the installed llama-cpp-python by pip, and keep its converter.

    Raises:
        CheckpointError: it is not installed, or pip cannot fetch it.
    """
    installed = _installed_version()
    if installed is None:
        raise CheckpointError(
            f"{_PACKAGE} is not installed, so it is not known which llama.cpp to fetch. Install it (pip install "
            "'dynquant-toolchain[llama]'), or give llama.cpp's source tree by --llama-cpp DIR."
        )
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE, "--dest", folder]
        done = subprocess.run([*command, f"{_PACKAGE}=={installed}"], capture_output=True, text=True, check=False)
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            raise CheckpointError(
                f"pip could not fetch the source distribution of {_PACKAGE} {installed}: "
                f"{done.stderr.strip()[-400:] or 'no archive came'}. Download it in another way, unpack it, and give "
                f"it by --llama-cpp DIR or {VARIABLE}."
            )
        return unpack_tree(archives[0], fetched_tree())


def unpack_tree(archive: Path, target: Path) -> Path:
    """Unpack the converter of a source distribution into `target`, which appears whole or not at all.

    Raises:
        CheckpointError: the archive is damaged or holds no converter.
    """
    try:
        with writing_folder(target) as partial, tarfile.open(archive) as files:
            for member in files:
                place = _kept_place(member.name)
                if place is not None and member.isfile():
                    member.name = str(place)
                    files.extract(member, partial, filter="data")
            if not is_tree(partial):
                raise CheckpointError(f"{archive} holds no converter of llama.cpp (vendor/llama.cpp/conversion).")
    except (tarfile.TarError, EOFError) as error:
        raise CheckpointError(f"{archive} cannot be unpacked ({error}). Fetch it again.") from error
    return target


def missing_tree(directory: Path, model_type: str) -> CheckpointError:
    """Return the refusal of a model that only llama.cpp's converter may know, with every way to give it."""
    return CheckpointError(
        f"{directory / 'config.json'} has model_type {model_type!r}, which dynquant cannot convert by itself. "
        "llama.cpp's converter may: give its source tree by --llama-cpp DIR or the environment variable "
        f"{VARIABLE}, or let `dynquant fetch-llama-cpp` fetch that of the installed {_PACKAGE} once. Or convert the "
        "model with llama.cpp's own converter and pass the result with --base-gguf FILE."
    )


def _installed_version() -> str | None:
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        return None


def is_tree(folder: Path) -> bool:
    """Return whether a folder holds llama.cpp's converter and its gguf-py."""
    return (folder / "conversion" / "__init__.py").is_file() and (folder / "gguf-py" / "gguf" / "__init__.py").is_file()


def tree_version(tree: Path) -> str:
    """Return a digest of the names, sizes and times of a tree's converter, which says no version of its own."""
    digest = hashlib.sha256()
    for file in (*sorted((tree / "conversion").glob("*.py")), *sorted((tree / "gguf-py/gguf").glob("*.py"))):
        digest.update(f"{file}{file.stat().st_size}{file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _kept_place(name: str) -> PurePosixPath | None:
    """Return the place of an archive's member in the tree; None for what is left out."""
    parts = PurePosixPath(name).parts
    for start in range(len(parts)):
        if parts[start : start + 2] == ("vendor", "llama.cpp"):
            inner = parts[start + 2 :]
            return PurePosixPath(*inner) if inner and inner[0] in _KEPT and ".." not in inner else None
    return None
