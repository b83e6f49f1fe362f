"""A model as GGUF sees it, wherever its files come from.

`open_model` gives every stage the same view: GGUF tensor names, shapes and float32 values, GGUF metadata, and the
numbers that planning rules need. A Hugging Face directory is converted lazily by its family; a GGUF file is taken as
it is; any other architecture borrows metadata, tokenizer and weights from `--base-gguf`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynquant.architecture import HyperParams
from dynquant.errors import CheckpointError
from dynquant.gguf_source import GGUFSource, MetadataField
from dynquant.tensor_source import TensorSource

_OWN_KEYS = ("general.quantization_version", "general.file_type")
_OWN_PREFIXES = ("quantize.imatrix.", "dynquant.", "split.")


@dataclass(frozen=True)
class Model:
    """One checkpoint in GGUF terms.

    `hf_directory` is set when transformers can load the model from a directory; `gguf_file` when it is a GGUF.
    `checkpoint_names(name)` lists the checkpoint's own tensors that a GGUF tensor is made of.
    """

    path: Path
    source: TensorSource
    metadata: tuple[MetadataField, ...]
    checkpoint_names: Callable[[str], tuple[str, ...]]
    hf_directory: Path | None = None
    gguf_file: Path | None = None

    @cached_property
    def hyper(self) -> HyperParams:
        return HyperParams.from_metadata({field.key: field.value for field in self.metadata})

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def arch(self) -> str:
        return self.hyper.arch

    @property
    def name(self) -> str:
        return self.path.stem if self.gguf_file and self.path.is_file() else self.path.resolve().name


def open_model(path: str | Path, *, base_gguf: str | Path | None = None) -> Model:
    """Open a Hugging Face directory or hub id, or a GGUF file.

    Raises:
        CheckpointError: nothing is there, it is damaged, or its architecture has no converter here.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    directory = path if path.is_dir() else _download(str(path))
    if base_gguf is not None:
        model = _open_gguf(Path(base_gguf))
        return Model(directory, model.source, model.metadata, model.checkpoint_names, hf_directory=directory)
    from dynquant.families import open_hf

    return open_hf(directory)


def _open_gguf(path: Path) -> Model:
    source = GGUFSource(path)
    metadata = tuple(
        field for field in source.metadata if field.key not in _OWN_KEYS and not field.key.startswith(_OWN_PREFIXES)
    )
    return Model(path, source, metadata, lambda name: (name,), gguf_file=path)


def _download(repo_id: str) -> Path:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/")):
        raise CheckpointError(
            f"There is no directory {repo_id}, and it is not a hub id of the form owner/name. Give the directory of a "
            "Hugging Face checkpoint, a hub id, or a .gguf file."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"There is no directory {repo_id} and the hub did not give a model of that name ({error}). Check the "
            "spelling, log in for gated models, or download it and give the directory."
        ) from error
