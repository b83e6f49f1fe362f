"""Opens a model from wherever its files are.

A Hugging Face directory is converted lazily by its family, a GGUF file is taken as it is. For any other architecture
`--base-gguf` names a float GGUF made by llama.cpp's converter: weights, metadata and tokenizer come from it, and the
directory serves to run the model.
"""

from pathlib import Path

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError, ExportError
from dynquant.families.text.registry import open_hf
from dynquant.families.vision.checkpoint import is_vision_checkpoint, open_vision
from dynquant.session import Session

CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is downloaded: neither code nor pickles."""
_OWN_KEYS = ("general.quantization_version", "general.file_type")
_OWN_PREFIXES = ("quantize.imatrix.", "dynquant.", "split.")


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
    return open_vision(directory) if is_vision_checkpoint(directory) else open_hf(directory)


def open_and_announce(path: str | Path, session: Session, *, base_gguf: Path | None = None) -> Model:
    """Open a model and say what it is."""
    model = open_model(path, base_gguf=base_gguf)
    experts = f", {model.hyper.n_expert} experts" if model.hyper.n_expert else ""
    session.note(
        f"{model.name}: {model.arch}, {model.hyper.n_layer} layers{experts}, {model.num_weights / 1e6:,.1f} M weights"
    )
    return model


def open_language_model(path: str | Path, session: Session) -> Model:
    """`open_and_announce` for steps that have no place for a vision tower.

    Raises:
        ExportError: the model has one.
    """
    model = open_and_announce(path, session)
    if model.has_vision:
        raise ExportError(
            f"{model.name} has a vision tower, for which this command has no place. Such models are calibrated, "
            "planned and evaluated on pictures (--data FILE) and exported as GGUF or packed safetensors."
        )
    return model


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
        return Path(snapshot_download(repo_id, allow_patterns=CHECKPOINT_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"There is no directory {repo_id} and the hub did not give a model of that name ({error}). Check the "
            "spelling, log in for gated models, or download it and give the directory."
        ) from error
