"""Places of a vision-language checkpoint's tensors in a packed file, which keeps the checkpoint's names.

Matrices of linear layers and the input embedding can be packed. What a plan leaves as floats is copied from the
checkpoint as a whole, so that a convolution over two frames, which GGUF splits, stays one tensor.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.checkpoints.vision_names import keys_of
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats.plain_quants import DTYPE_BYTES
from dynquant.packed.places import Place, order_of_rows
from dynquant.recipes.plan import Plan


@dataclass(frozen=True)
class VisionLayout:
    """Places by GGUF name; `copied` are the entries of those that are taken from the checkpoint as they are."""

    places: dict[str, Place]
    copied: dict[str, StoredTensor]
    parts: frozenset[str]
    """GGUF names that are parts of a copied tensor and have no place of their own."""


def build_meta_vision(model: Model) -> Any:
    """Build what transformers makes of the checkpoint's configuration, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model.hf_directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def lay_out_vision(model: Model, plan: Plan, hf_model: Any) -> VisionLayout:
    """Return the place of each tensor of the plan.

    Raises:
        CheckpointError: transformers' model has no parameter for a tensor of the checkpoint.
    """
    source = model.source
    assert isinstance(source, ConvertedSource)
    types = {entry.name: entry.quant_type for entry in plan.entries}
    stored_names = [source.checkpoint_names(name)[0] for name in types]
    key_of = keys_of(stored_names, hf_model.state_dict())
    places: dict[str, Place] = {}
    copied: dict[str, StoredTensor] = {}
    parts, seen = set(), set()
    for (name, planned), stored_name in zip(types.items(), stored_names, strict=True):
        if stored_name not in key_of:
            raise CheckpointError(
                f"{model.name} holds `{stored_name}`, but this transformers builds {type(hf_model).__name__} without "
                "such a parameter. Use the version of transformers that the checkpoint was made for."
            )
        if stored_name in seen:
            parts.add(name)
            continue
        seen.add(stored_name)
        if not planned.is_float:
            places[name] = _packed_place(source, name, stored_name, _packable(hf_model, key_of[stored_name]))
            continue
        info = source.checkpoint.info(stored_name)
        dtype = min(info.dtype, planned.name, key=DTYPE_BYTES.__getitem__)
        places[name] = Place(name, stored_name, tuple(info.shape), can_be_packed=False)
        copied[name] = StoredTensor(stored_name, dtype, tuple(info.shape))
    return VisionLayout(places, copied, frozenset(parts))


def _packable(hf_model: Any, key: str) -> bool:
    """Subclasses of linear layers are left alone: attention of PyTorch reads their weights itself."""
    path, _, part = key.rpartition(".")
    module = hf_model.get_submodule(path)
    return part == "weight" and (type(module) is nn.Linear or module is hf_model.get_input_embeddings())


def _packed_place(source: ConvertedSource, name: str, stored_name: str, packable: bool) -> Place:
    shape = tuple(source.info(name).shape)
    if source.transform(name) is torch.t:
        return Place(name, stored_name, shape, transposed=True, can_be_packed=False)
    order, _ = order_of_rows(source.transform(name), shape)
    return Place(name, stored_name, shape, order, can_be_packed=packable)
