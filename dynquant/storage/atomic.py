"""Files that appear whole or not at all: each is written under a temporary name in its folder and then moved.

The temporary name is unique, so that two processes that write the same file never touch each other's half of it.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dynquant.errors import DynquantError, WriteError, reason
from dynquant.resources import usable_cores
from dynquant.storage.strict_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

_WAY_OUT = "Free some space or choose another place."


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: yields the name of an empty file beside `path`, and moves that file to `path` on exit.

    An exception removes the temporary file and leaves an older `path` as it is.

    Raises:
        OSError: as it comes, for callers that have more to say about it than `writing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private; this one follows the umask
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path, way_out: str = _WAY_OUT) -> Iterator[Path]:
    """Context manager: `replacing`, where a file that cannot be written is refused in words that end in `way_out`.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise WriteError(f"{path} could not be written: {why}. {way_out}") from error


@contextmanager
def writing_folder(path: Path, way_out: str = _WAY_OUT, *, replace: bool = False) -> Iterator[Path]:
    """Context manager: yields an empty folder beside `path`, and moves it there on exit; one that is there stays, or is
    replaced.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if replace and path.exists():
            shutil.rmtree(path)
        if not path.exists():
            try:
                temporary.rename(path)
            except OSError as error:  # another process was faster
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    except OSError as error:
        raise WriteError(f"{path} could not be written: {reason(error)}. {way_out}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(folder: Path, num_bytes: int, refusal: type[WriteError] = WriteError) -> None:
    """Raise `refusal` where fewer bytes are free than are still to be written to a folder, or as `free_bytes` does."""
    if num_bytes > (free := free_bytes(folder, refusal)):
        raise refusal(
            f"{num_bytes:,} bytes are still to be written to {folder}, but only {free:,} are free there. Free some "
            "space, or choose an output on another disk."
        )


def free_bytes(folder: Path, refusal: type[DynquantError] = WriteError) -> int:
    """Return the bytes that are free for a folder, which need not be there. Raises `refusal`: the system does not let
    us look."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        return shutil.disk_usage(there).free
    except OSError as error:
        raise refusal(f"{folder} cannot be written to: {reason(error)}. Choose another place.") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file in one step. Text is UTF-8.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(
    path: Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, object], way_out: str = _WAY_OUT
) -> None:
    """Write a safetensors file in one step, with `header` and a checksum of every tensor as JSON in its metadata.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with writing(path, way_out) as temporary:
        save_file(tensors, temporary, metadata=tensors_metadata(header, checksums_of(tensors)))


def tensors_metadata(header: Mapping[str, object], sums: Mapping[str, int]) -> dict[str, str]:
    """Return the metadata of a file of `save_tensors`: one entry, because the library writes several in any order."""
    return {"dynquant": json.dumps({**header, "crc32": sums}, sort_keys=True)}


def checksums_of(tensors: Mapping[str, "Tensor"]) -> dict[str, int]:
    """Return a checksum of every tensor by name."""
    import torch

    flat = {name: tensor.contiguous().reshape(-1) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(usable_cores()) as threads:  # second moments are gigabytes, and zlib releases the GIL
        sums = threads.map(lambda values: zlib.crc32(values.view(torch.uint8).numpy()), flat.values())
        return dict(zip(flat, sums, strict=True))


def opened_tensors(path: Path) -> safe_open:
    """Open a safetensors file for PyTorch; safetensors itself says of every OSError that there is no such file."""
    path.open("rb").close()
    return safe_open(path, framework="pt")


def read_tensors_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of `save_tensors`, with the checksums; errors are those of `read_tensors`."""
    with opened_tensors(path) as file:
        metadata = file.metadata() or {}
    if "dynquant" not in metadata:
        raise ValueError("it has no header of dynquant")
    header = parse_json(metadata["dynquant"])
    if not isinstance(header, dict) or not isinstance(header.get("crc32", {}), dict):
        raise ValueError("its header is no object")
    return header


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """Return the header and, by memory map, the tensors of a file of `save_tensors`.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: as they come, for callers that say what file it should be.
    """
    header = read_tensors_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sums = header.pop("crc32", None)  # files of earlier versions have none
    for name, checksum in checksums_of(tensors).items() if sums is not None else ():
        if sums.get(name) != checksum:
            raise ValueError(f"`{name}` is not what was written: its checksum is another, so the file is damaged")
    return header, tensors


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
