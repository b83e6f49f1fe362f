"""A copy of a GGUF file with other bytes in some of its tensors; header and offsets stay where they are."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dynquant.checkpoints.gguf_layout import ENCODER_KEY, PADDED_WIDTH, split_paths
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import ExportError


def write_patched(source: GGUFSource, output: Path, replacements: Mapping[str, Tensor], *, encoder: str) -> list[Path]:
    """Write `source`, all of its files, under the name `output`; `encoder` is entered where dynquant keeps it.

    Raises:
        ExportError: no space or no permission; nothing is left behind.
    """
    paths = split_paths(output, len(source.files))
    partials = [path.with_name(f"{path.name}.partial") for path in paths]
    try:
        for file, partial in zip(source.files, partials, strict=True):
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial)
        patches = [
            (*source.location(name), packed.contiguous().numpy().tobytes()) for name, packed in replacements.items()
        ]
        name_place = source.text_location(ENCODER_KEY)
        if name_place is not None and name_place[1] == PADDED_WIDTH:
            patches.append((0, name_place[0], encoder.ljust(PADDED_WIDTH).encode()))
        for index, partial in enumerate(partials):
            with partial.open("r+b") as target:
                for file_index, offset, data in patches:
                    if file_index == index:
                        target.seek(offset)
                        target.write(data)
                target.flush()
                os.fsync(target.fileno())
        # The first file goes last: loaders open it, and it must not appear before the others.
        for partial, path in reversed(list(zip(partials, paths, strict=True))):
            os.replace(partial, path)
    except OSError as error:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise ExportError(
            f"{output} could not be written: {error.strerror or error}. Free some space or choose another place."
        ) from error
    return paths
