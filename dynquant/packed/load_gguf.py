"""`load`: a GGUF file as a transformers model whose weights stay packed."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import CheckpointError
from dynquant.families.from_gguf import config_from_gguf
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.packed.places import Place, build_meta_model, find_places
from dynquant.running.parameter_map import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    file: str | Path, *, dtype: torch.dtype | None = None, device_map: Any = None, **options: Any
) -> "PreTrainedModel":
    """Return the transformers model of a GGUF file (of a split, the first part), with weights as the file's own blocks.

    Any type of the registry, in any mixture, of the families that dynquant exports. `dtype` is that of activations and
    of what is not packed: by default float32 on a CPU, bfloat16 with a `device_map`. `options` go to transformers'
    `from_pretrained`. Tensors are read one by one; `save_pretrained` writes a checkpoint that loads packed.

    Raises:
        CheckpointError: no such file, an architecture or key that is not known, or tensors that do not fit it.
    """
    source = GGUFSource(Path(file))
    config = config_from_gguf(source)
    meta = build_meta_model(config)
    places, computed = find_places(config, meta, whole_kv_b="blk.0.attn_kv_b.weight" in source.names())
    _check_tensors(source, places, computed)
    types = {
        place.key: place.stored_type(QUANT_TYPES[source.info(name).dtype]).name
        for name, place in places.items()
        if len(place.shape) > 1
    }
    provenance = {"gguf": source.path.name}
    recorded = {field.key: str(field.value) for field in source.metadata if field.key.startswith("dynquant.")}
    if "dynquant.stats_hash" in recorded:  # statistics that an export was encoded under, or "": merging asks for them
        provenance["stats_hash"] = recorded["dynquant.stats_hash"]
    meta.config.quantization_config = {
        "quant_method": "dynquant", "version": 1, "types": types, "provenance": provenance,
    }  # fmt: skip
    dtype = dtype or (torch.float32 if device_map is None else torch.bfloat16)
    state = {place.key: _LazyTensor(source, name, place) for name, place in places.items()}
    with without_progress_bars():
        model = type(meta).from_pretrained(
            None, config=meta.config, state_dict=state, dtype=dtype, device_map=device_map, **options
        )
    model.name_or_path = str(source.path)  # adapters record their base by it
    return model


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read when transformers asks for it, as it does of slices of a safetensors file."""

    source: GGUFSource
    name: str
    place: Place

    def __getitem__(self, index: Any) -> Tensor:
        values = self.place.from_gguf(self._type, self.source.load_packed(self.name))
        return values if index is Ellipsis else values[index]  # [...] asks for the whole tensor

    def get_dtype(self) -> str:
        return self.place.stored_as(self._type).dtype

    def get_shape(self) -> list[int]:
        return list(self.place.stored_as(self._type).shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.get_shape())

    @property
    def _type(self) -> Any:
        return QUANT_TYPES[self.source.info(self.name).dtype]


def _check_tensors(source: GGUFSource, places: dict[str, Place], computed: set[str]) -> None:
    names, where = set(source.names()), str(source.path)
    missing = sorted(places.keys() - names)
    if missing:
        raise CheckpointError(
            f"{where} lacks `{missing[0]}` and {len(missing) - 1} more tensors that its metadata calls for. It is "
            "incomplete, or of a variant that dynquant does not know; run it in llama.cpp."
        )
    unknown = sorted(names - places.keys() - computed)
    if unknown:
        raise CheckpointError(
            f"{where} holds `{unknown[0]}` and {len(unknown) - 1} more tensors that transformers' model has no place "
            "for. Leaving them out would change the model; run it in llama.cpp."
        )
    for name, place in places.items():
        shape = source.info(name).shape
        if prod(shape) != prod(place.shape) or shape[-1] != place.shape[-1]:
            raise CheckpointError(
                f"{where} stores `{name}` with the shape {list(shape)}, but its metadata calls for "
                f"{list(place.shape)}. Metadata and tensors are of different models."
            )
