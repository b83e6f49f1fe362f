"""A copy of a GGUF file with other bytes in some of its tensors; header and offsets stay where they are."""

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from dynquant.checkpoints.gguf_layout import ENCODER_KEY, PADDED_WIDTH, split_paths
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.storage.atomic import writing


def write_patched(source: GGUFSource, output: Path, replacements: Mapping[str, Tensor], *, encoder: str) -> list[Path]:
    """Write `source`, all of its files, under the name `output`; `encoder` is entered where dynquant keeps it.

    Raises:
        WriteError: no space or no permission; nothing is left behind.
    """
    paths = split_paths(output, len(source.files))
    with ExitStack() as stack:
        # The stack moves the first file last: loaders open it, and it must not appear before the others.
        partials = [stack.enter_context(writing(path)) for path in paths]
        for file, partial in zip(source.files, partials, strict=True):
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
    return paths
