"""GGUF tensors inside a running transformers model: written into its parameters, and their gradients read back.

An empty model is filled from a GGUF file the same way, for the architectures of `families.from_gguf`.

Tensors of a compressed-tensors checkpoint have the same names, and the order of rows of the original's files.

A GGUF tensor is a selection of a checkpoint tensor's entries, at most with a constant added (Gemma's norms), and a
checkpoint tensor one of parameters' entries; `parameter_map` joins the two, so that no family has to state an inverse.
When the weights come from a GGUF file, the family's conversions of the running model are taken, and for other
architectures places are found by their values (`equal_entries`). Every place is then checked against the file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.conversion_book import some_of
from dynquant.families.common.strided_maps import StridedMap
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.families.text.registry import conversions_of
from dynquant.formats import decode
from dynquant.running.equal_entries import EqualEntries, as_in_file
from dynquant.running.parameter_map import ParameterMap, parameter_map, unmapped
from dynquant.running.weights import put


class LivePlace:
    """Entries of parameters and buffers that are one GGUF tensor."""

    def __init__(self, entries: StridedMap, tensors: Mapping[str, Tensor]) -> None:
        self._entries = entries
        self._tensors = {name: tensors[name] for name in entries.sources}

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors of the model that hold it."""
        return tuple(self._tensors.values())

    def read(self) -> Tensor:
        """The tensor as GGUF has it; a view of the parameter where it can be one."""
        return self._entries.gather(lambda name: self._tensors[name].detach())

    def write(self, values: Tensor) -> None:
        """Set the entries that the tensor stands for; others stay."""
        self._entries.scatter(values.view(self._entries.shape), self._tensors.__getitem__)

    def gradient(self) -> Tensor:
        """The gradient with respect to the GGUF tensor."""
        return replace(self._entries, added=0.0).gather(self._gradient_of)

    def _gradient_of(self, name: str) -> Tensor:
        gradient = self._tensors[name].grad
        assert gradient is not None
        return gradient.float()


class LiveWeights:
    """The GGUF tensors of `model` that have a place in `hf_model`, loaded by transformers from the same checkpoint.

    With `checkpoint`, the model's linear layers and other tensors are as that has them.
    """

    def __init__(self, model: Model, hf_model: Any, checkpoint: LinearCheckpoint | None = None) -> None:
        self._num_layers = hf_model.config.get_text_config().num_hidden_layers
        head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
        is_stored_twice = checkpoint is None and "output.weight" in model.source.names()
        if is_stored_twice and head is not None and head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone())  # it may get two types
        if checkpoint is not None:
            self._places = _places_in_checkpoint(model, hf_model, checkpoint)
        elif isinstance(model.source, ConvertedSource):
            self._places = _places(parameter_map(hf_model, model.source.checkpoint), model.source, hf_model)
        else:
            self._places = places_of_a_file(model, hf_model)
        parameters = {id(parameter) for parameter in hf_model.parameters()}
        self.buffers = {
            name for name, place in self._places.items() if not parameters.issuperset(map(id, place.parameters))
        }
        """GGUF names of what gets no gradient and no type: corrections of routers."""

    def names(self) -> list[str]:
        """GGUF names of parameters, in no particular order."""
        return [name for name in self._places if name not in self.buffers]

    def check(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for a tensor without a place, unless it is of a layer that the model does not run."""
        ends = tuple(f"blk.{layer}." for layer in range(self._num_layers, self._num_layers + 8))  # predict tokens ahead
        lost = [name for name in names if name not in self._places and not name.startswith(ends)]
        if lost:
            raise CheckpointError(
                f"The running model has no place that dynquant knows for {some_of(lost)}, so it would be "
                "measured as if they were not quantized. Plan without --select (and --sensitivity closed-form)."
            )

    def parameters(self, name: str) -> tuple[Tensor, ...]:
        """The model's tensors that hold a GGUF tensor: one, unless transformers splits what the checkpoint joins."""
        return self._places[name].parameters

    def read(self, name: str) -> Tensor:
        """A copy of the tensor as GGUF has it."""
        return self._places[name].read().clone()

    def write(self, name: str, values: Tensor) -> None:
        """Set the entries that the tensor stands for; others stay."""
        self._places[name].write(values)

    def gradient(self, name: str) -> Tensor:
        """The gradient with respect to the GGUF tensor."""
        return self._places[name].gradient()


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
    places = _gguf_places(model, hf_model)
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


def _places(traced: ParameterMap, source: ConvertedSource, hf_model: Any) -> dict[str, LivePlace]:
    """Return the GGUF tensors that have a place, the output matrix in the model's own head."""
    tensors = hf_model.state_dict(keep_vars=True)
    head = hf_model.get_output_embeddings()
    head_name = next((name for name, tensor in tensors.items() if head is not None and tensor is head.weight), None)
    places = {}
    for name in source.names():
        entries = traced.gguf(source, name)
        if entries is None:
            continue
        if name == "output.weight" and head_name is not None:  # whatever the family makes it of
            entries = entries.renamed(head_name)
        places[name] = LivePlace(entries, tensors)
    return places


def _places_in_checkpoint(model: Model, hf_model: Any, checkpoint: LinearCheckpoint) -> dict[str, LivePlace]:
    """Return the tensors of a checkpoint that have a place, stacks of experts under one name."""
    source = model.source
    assert isinstance(source, ConvertedSource)
    traced, tensors = parameter_map(hf_model, source.checkpoint), hf_model.state_dict(keep_vars=True)
    entries = {name: traced.stored.get(tensor.key) for name, tensor in checkpoint.others_by_name(model).items()}
    for linear in checkpoint.linears:
        is_stack = linear.is_expert
        entries[linear.name] = traced.gguf(source, linear.name) if is_stack else traced.stored.get(linear.sources[0])
    return {
        name: LivePlace(place, tensors) for name, place in entries.items() if place is not None and place.is_complete
    }


def _gguf_places(model: Model, hf_model: Any) -> dict[str, LivePlace | None]:
    """Return all tensors of a GGUF file of a known family, with their places in a model of the file's configuration.

    Those without one are computed from the configuration. Nothing is compared with the file.

    Raises:
        CheckpointError: this transformers has parameters that the family does not know.
    """
    converted = _family_source(model, hf_model)
    places = _places(unmapped(hf_model), converted, hf_model)
    return {name: places[name] if converted.checkpoint_names(name) else None for name in converted.names()}


def _family_source(model: Model, hf_model: Any) -> ConvertedSource:
    """Return the conversions of the running model's family; none for a family without."""
    if not model.has_family:
        return ConvertedSource(model.source, [])
    values = hf_model.config.to_dict() | {"tie_word_embeddings": "output.weight" not in model.source.names()}
    config = Config(model.path, values, values)
    whole_kv_b = "blk.0.attn_kv_b.weight" in model.source.names()
    return ConvertedSource(model.source, conversions_of(config, hf_model.state_dict(), whole_kv_b=whole_kv_b))


def places_of_a_file(model: Model, hf_model: Any) -> dict[str, LivePlace]:
    """Return where a running model has the tensors of a GGUF file, of itself or of `--base-gguf`, checked by values.

    Raises:
        CheckpointError: a parameter is not the file's tensor of its name under any order of rows and columns.
    """
    tensors = hf_model.state_dict(keep_vars=True)
    family, places = _places(unmapped(hf_model), _family_source(model, hf_model), hf_model), {}
    search = EqualEntries(model, hf_model)
    for name in model.source.names():
        stored = model.source.load(name)
        place = family.get(name)
        if place is not None and not _is_equal(place, stored, model.source.info(name).dtype):
            raise _other_weights(model, name)
        entries = None if place is not None else search.entries(name, stored)
        if place is None and entries is None and search.is_expected(name, stored):
            raise _other_weights(model, name)
        if place is not None or entries is not None:
            places[name] = place or LivePlace(entries, tensors)
    return places


def _is_equal(place: LivePlace, stored: Tensor, stored_type: str) -> bool:
    seen = as_in_file(place.read().flatten(), stored_type)
    return torch.equal(seen, stored.flatten().to(seen.device, seen.dtype))


def _other_weights(model: Model, name: str) -> CheckpointError:
    return CheckpointError(
        f"The running model has other weights than `{name}` of {model.path}, or has them in an order that dynquant "
        "does not know, so they cannot be followed into it. Give the Hugging Face checkpoint that the file was made of."
    )
