"""`load`: a GGUF file as a transformers model whose weights stay packed."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import TORCH_DTYPES
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.from_gguf import NotUnderstoodError, config_from_gguf
from dynquant.families.open import check_original, open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.storage_format import StoredTensor
from dynquant.packed.places import Layout, Place, build_meta_model, find_places
from dynquant.packed.traced_places import TypedTensor, lay_out_traced, recorded
from dynquant.running.load import empty_hf
from dynquant.running.parameter_map import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    file: str | Path,
    *,
    base: str | Path | Model | None = None,
    dtype: torch.dtype | None = None,
    device_map: Any = None,
    **options: Any,
) -> "PreTrainedModel":
    """Return the transformers model of a GGUF file (of a split, the first part), with weights as the file's own blocks.

    Any type of the registry, in any mixture. `base` is the Hugging Face directory that the file was made from, which
    architectures without a family need. `dtype` is that of activations and of what is not packed: by default float32
    on a CPU, bfloat16 with a `device_map`. `options` go to transformers' `from_pretrained`. Tensors are read one by
    one; `save_pretrained` writes a checkpoint that loads packed.

    Raises:
        NotUnderstoodError: a file that needs its checkpoint, without `base`.
        CheckpointError: no such file, an architecture or key that is not known, or tensors that do not fit.
    """
    source = GGUFSource(Path(file))
    meta, layout = _of_family(source) if base is None else _of_checkpoint(source, base)
    stored_types = {name: QUANT_TYPES[source.info(name).dtype] for name in layout.places}
    types = {
        place.key: place.stored_type(stored_types[name]).name
        for name, place in layout.places.items()
        if len(place.shape) > 1
    }
    provenance = {"gguf": source.path.name}
    values = {field.key: field.value for field in source.metadata}
    if "dynquant.stats_hash" in values:  # statistics that an export was encoded under, or "": merging asks for them
        provenance["stats_hash"] = str(values["dynquant.stats_hash"])
    meta.config.quantization_config = {
        "quant_method": "dynquant", "version": 1, "types": types, "provenance": provenance,
        **recorded(layout, str(values["general.architecture"])),
    }  # fmt: skip
    dtype = dtype or (torch.float32 if device_map is None else torch.bfloat16)
    state = {
        place.key: _LazyTensor(place.stored_as(stored_types[name]), partial(_from_file, source, place))
        for name, place in layout.places.items()
    }
    state |= {key: _LazyTensor(stored, partial(_kept, layout, stored)) for key, stored in layout.kept.items()}
    with without_progress_bars():
        model = type(meta).from_pretrained(
            None, config=meta.config, state_dict=state, dtype=dtype, device_map=device_map, **options
        )
    model.name_or_path = str(source.path)  # adapters record their base by it
    return model


def config_to_load(source: GGUFSource) -> Config:
    """Return the configuration under which `load` loads a file without its checkpoint.

    Raises:
        NotUnderstoodError: the file needs its checkpoint; says how to give it.
    """
    try:
        return config_from_gguf(source)
    except NotUnderstoodError as error:
        raise NotUnderstoodError(
            f"{error} With that checkpoint the file can be loaded too: give it as --reference to eval and heal, as "
            "--base to finetune, or to `dynquant.load(file, base=DIRECTORY)`."
        ) from error


def _of_family(source: GGUFSource) -> tuple[Any, Layout]:
    """Return the model of a file's metadata on the meta device, and where the file's tensors go in it."""
    config = config_to_load(source)
    meta = build_meta_model(config)
    places, computed = find_places(config, meta, whole_kv_b="blk.0.attn_kv_b.weight" in source.names())
    _check_names(source, places.keys(), computed)
    for name, place in places.items():
        _check_shape(source, name, place.shape)
    return meta, Layout(places, frozenset(computed))


def _of_checkpoint(source: GGUFSource, base: str | Path | Model) -> tuple[Any, Layout]:
    """Return the same by the checkpoint that a file was made from, through traced maps.

    Raises:
        CheckpointError: no such checkpoint, or the file is of another.
    """
    model = base if isinstance(base, Model) else open_model(base)
    if not isinstance(model.source, ConvertedSource) or model.has_vision:
        raise CheckpointError(
            f"`base` is {model.path}, which is no Hugging Face directory of a language model. Give the checkpoint that "
            f"{source.path} was made from."
        )
    check_original(source.path, model, "base=")
    names = set(model.source.names())
    _check_names(source, names - model.mtp_tensors, names)
    for name in source.names():
        _check_shape(source, name, model.source.info(name).shape)
        if not model.checkpoint_names(name) and not torch.allclose(source.load(name), model.source.load(name)):
            raise CheckpointError(
                f"`{name}` of {source.path} has other values than {model.path} gives it. Give the checkpoint that the "
                "file was made from."
            )
    tensors = [TypedTensor(name, source.info(name).shape, source.info(name).dtype) for name in source.names()]
    meta = empty_hf(model, dtype=torch.float32)
    return meta, lay_out_traced(model, tensors, meta, source)


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read when transformers asks for it, as it does of slices of a safetensors file."""

    stored: StoredTensor
    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        values = self.read()
        return values if index is Ellipsis else values[index]  # [...] asks for the whole tensor

    def get_dtype(self) -> str:
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)


def _from_file(source: GGUFSource, place: Place) -> Tensor:
    return place.from_gguf(QUANT_TYPES[source.info(place.name).dtype], source.load_packed(place.name))


def _kept(layout: Layout, stored: StoredTensor) -> Tensor:
    assert layout.read is not None
    return layout.read(stored.key).to(TORCH_DTYPES[stored.dtype])


def _check_names(source: GGUFSource, needed: Set[str], others: Set[str]) -> None:
    names, where = set(source.names()), str(source.path)
    missing = sorted(needed - names)
    if missing:
        raise CheckpointError(
            f"{where} lacks `{missing[0]}` and {len(missing) - 1} more tensors that its metadata calls for. It is "
            "incomplete, or of a variant that dynquant does not know; run it in llama.cpp."
        )
    unknown = sorted(names - needed - others)
    if unknown:
        raise CheckpointError(
            f"{where} holds `{unknown[0]}` and {len(unknown) - 1} more tensors that transformers' model has no place "
            "for. Leaving them out would change the model; run it in llama.cpp."
        )


def _check_shape(source: GGUFSource, name: str, expected: tuple[int, ...]) -> None:
    shape = source.info(name).shape
    if prod(shape) != prod(expected) or shape[-1:] != tuple(expected[-1:]):
        raise CheckpointError(
            f"{source.path} stores `{name}` with the shape {list(shape)}, but its metadata calls for "
            f"{list(expected)}. Metadata and tensors are of different models."
        )
