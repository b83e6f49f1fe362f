"""The kind of a model, by which two sides of a comparison are told apart before anything long runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import CheckpointError, DynquantError
from dynquant.families.common.config import read_json
from dynquant.families.common.settings import settings_of_metadata
from dynquant.families.converter.description import describe
from dynquant.families.converter.source_tree import find_tree
from dynquant.families.text.registry import FAMILIES
from dynquant.families.vision.checkpoint import has_tower


@dataclass(frozen=True)
class ModelKind:
    """Architecture and sizes of a model, as far as its small files state them."""

    path: Path
    model_type: str
    """By config.json; of a GGUF file its architecture."""
    architecture: str | None
    """As llama.cpp calls it; None where nothing here tells it."""
    layers: int | None
    width: int | None

    def __str__(self) -> str:
        known_as = "" if self.architecture in (None, self.model_type) else f" (`{self.architecture}` in GGUF)"
        sizes = [f"{self.layers} layers"] if self.layers else []
        sizes += [f"a width of {self.width}"] if self.width else []
        return f"{self.path} is a `{self.model_type}`{known_as}" + (f" with {' and '.join(sizes)}" if sizes else "")

    def differs(self, other: "ModelKind") -> bool:
        """Return whether anything that both sides state is not the same."""
        facts = zip(*((kind.architecture, kind.layers, kind.width) for kind in (self, other)), strict=True)
        return any(None not in pair and pair[0] != pair[1] for pair in facts)


def kind_of(path: Path) -> ModelKind:
    """Return the kind of a GGUF file or Hugging Face directory. Raises CheckpointError: it cannot be read."""
    if is_gguf(path):
        metadata = GGUFSource(path).metadata
        architecture = next((str(field.value) for field in metadata if field.key == "general.architecture"), "")
        settings = settings_of_metadata(metadata)
        numbers = (_number(settings.get(key)) for key in ("block_count", "embedding_length"))
        return ModelKind(path, architecture, architecture, *numbers)
    raw = read_json(path / "config.json")
    text = raw.get("text_config")
    numbers = (_number((text if isinstance(text, dict) else raw).get(k)) for k in ("num_hidden_layers", "hidden_size"))
    model_type = str(raw.get("model_type", "unknown type"))
    return ModelKind(path, model_type, _architecture(path, raw), *numbers)


def difference_of_kind(first: Path, second: Path) -> str:
    """Return in words that models are of different architectures or sizes, with both; empty for two of a kind."""
    kinds = kind_of(first), kind_of(second)
    return f"these are two different models: {kinds[0]}; {kinds[1]}" if kinds[0].differs(kinds[1]) else ""


def check_same_kind(first: Path, second: Path, way_out: str) -> None:
    """Raise CheckpointError for models of different architectures or sizes; the message names both."""
    if difference := difference_of_kind(first, second):
        raise CheckpointError(f"{difference[0].upper()}{difference[1:]}. {way_out}")


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _architecture(directory: Path, raw: Mapping[str, object]) -> str | None:
    if raw.get("model_type") in FAMILIES:
        return FAMILIES[str(raw["model_type"])].arch
    if has_tower(directory) or "quantization_config" in raw:
        return None
    try:
        tree = find_tree()
        keys = describe(directory, SafetensorsSource(directory), tree).keys if tree is not None else None
    except DynquantError:  # the sizes are compared alone where this converter does not know the architecture
        return None
    return keys and next(str(field.value) for field in keys.metadata if field.key == "general.architecture")
