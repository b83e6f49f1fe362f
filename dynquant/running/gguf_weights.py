"""Weights of a GGUF file in the transformers model of its configuration: tensor by tensor, decoded on the device.

The architectures are those of `families.from_gguf`. The way of a tensor into a parameter is the one of `live_weights`.
"""

from typing import Any

import torch

from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion_book import some_of
from dynquant.formats import decode
from dynquant.running.live_weights import gguf_places
from dynquant.running.weights import put


@torch.no_grad()
def fill_from_gguf(model: Model, hf_model: Any, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give every parameter and persistent buffer of a model on the meta device the values of the file.

    Raises:
        CheckpointError: tensors of the file have no place, or parameters no tensor, so that it is of another model.
    """
    tied = getattr(hf_model, "all_tied_weights_keys", None) or {}
    exact = hf_model._get_dtype_plan(dtype)
    for name, tensor in hf_model.state_dict().items():
        if name not in tied:
            exact_type = torch.float32 if any(pattern in name for pattern in exact) else dtype
            put(hf_model, name, torch.empty_like(tensor, dtype=exact_type, device=device))
    hf_model.tie_weights()
    places = gguf_places(model, hf_model)
    _check_names(model, set(places))
    for name, place in places.items():
        if place is not None:
            info = model.source.info(name)
            packed = model.source.load_packed(name).to(device)  # type: ignore[attr-defined]
            place.write(decode(info.dtype, packed, info.shape))


def _check_names(model: Model, names: set[str]) -> None:
    stored = set(model.source.names())
    if missing := names - stored:
        raise CheckpointError(
            f"{model.path} lacks {some_of(missing)}, which its metadata calls for. Fetch it again, or convert it again."
        )
    if unknown := stored - names:
        raise CheckpointError(
            f"{model.path} holds {some_of(unknown)}, which has no place in transformers' model. Leaving it out would "
            "change the model; run it in llama.cpp."
        )
