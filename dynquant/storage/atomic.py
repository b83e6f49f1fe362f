"""Files that appear whole or not at all: each is written under a temporary name in its folder and then moved.

The temporary name is unique, so that two processes that write the same file never touch each other's half of it.
"""

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dynquant.errors import WriteError
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
        reason = getattr(error, "strerror", None) or error
        raise WriteError(f"{path} could not be written: {reason}. {way_out}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file in one step. Text is UTF-8.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, object]) -> None:
    """Write a safetensors file in one step, with `header` and a checksum of every tensor as JSON in its metadata.

    Raises:
        WriteError: no space, no permission, or a parent that is no directory.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    metadata = {"dynquant": json.dumps(header, sort_keys=True), "crc32": json.dumps(sums)}
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_saved_header(path: Path) -> dict[str, Any]:
    """Return the header of a file of `save_tensors`; raises as `read_tensors`."""
    with safe_open(path, framework="pt") as file:
        return parse_json((file.metadata() or {})["dynquant"])


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """Return the header and, by memory map, the tensors of a file of `save_tensors`.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: as they come, for callers that say what file it should be.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        header, sums = parse_json(metadata["dynquant"]), parse_json(metadata.get("crc32", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if sums and sums.get(name) != _checksum(tensor):  # files of earlier versions have no sums
            raise ValueError(f"`{name}` is not what was written: its checksum is another, so the file is damaged")
    return header, tensors


def _checksum(tensor: "Tensor") -> int:
    import torch

    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
