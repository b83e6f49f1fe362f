"""Which entries of a checkpoint's tensors each parameter of transformers' model holds, and each GGUF tensor.

Learnt by letting transformers load a model on the meta device from tensors that trace what is done to them, through the
conversions that `from_pretrained` uses: tensors that are renamed, stacked, joined, transposed, interleaved or split are
followed without a name map, memory or values. Joined with the conversions of a `ConvertedSource`, every GGUF tensor
becomes entries of parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import StridedMap, by_source, whole
from dynquant.families.common.traced_tensor import TracedTensor
from dynquant.running.layer_ahead import LayerAhead, PlaceAhead, layer_ahead_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterMap:
    """Parameters and persistent buffers of a model as entries of checkpoint tensors."""

    parameters: Mapping[str, StridedMap]
    """By their names in the model; those that are tied to others, or that the checkpoint lacks, are left out."""
    stored_shapes: Mapping[str, Shape]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Parameters that are more than moved entries of the checkpoint -> what transformers does."""

    @cached_property
    def stored(self) -> dict[str, StridedMap]:
        """Checkpoint tensors as entries of parameters."""
        return by_source(self.parameters, self.stored_shapes)

    def gguf(self, source: ConvertedSource, name: str) -> StridedMap | None:
        """Return a GGUF tensor as entries of parameters, or None: it is computed, or has no place in the model."""
        parts = source.checkpoint_names(name)
        if not parts or not all(part in self.stored and self.stored[part].is_complete for part in parts):
            return None
        try:
            return source.entries(name, self.stored_shapes[parts[0]]).through(self.stored)
        except (NotImplementedError, ValueError):
            return None


def parameter_map(hf_model: Any, checkpoint: TensorSource) -> ParameterMap:
    """Trace transformers' loading of a checkpoint into a model of the class and configuration of `hf_model`, and into
    the layer that predicts a token ahead, if it was added.

    `hf_model` itself is not touched. The latest maps are kept: one plan asks several times for that of its model.
    """
    shapes = tuple((name, tuple(checkpoint.info(name).shape)) for name in checkpoint.names())
    config, ahead = hf_model.config, layer_ahead_of(hf_model)
    place = None if ahead is None else ahead.place
    return _traced(_Request(type(hf_model), config.to_json_string(use_diff=False), shapes, place, config))


@dataclass(frozen=True)
class _Request:
    """A model and a checkpoint, as far as they decide a map."""

    model_class: Any
    settings: str
    shapes: tuple[tuple[str, Shape], ...]
    place: PlaceAhead | None
    config: Any = field(compare=False)


@lru_cache(maxsize=2)
def _traced(request: _Request) -> ParameterMap:
    shapes = dict(request.shapes)
    with torch.device("meta"):
        empty = request.model_class(request.config)
    if request.place is not None:
        LayerAhead(empty, request.place).add()
    reasons = _load_traced(empty, shapes)
    loaded = {
        name: tensor.map
        for name, tensor in empty.state_dict(keep_vars=True).items()
        if isinstance(tensor, TracedTensor)
    }
    return ParameterMap(loaded, shapes, reasons)


def unmapped(hf_model: nn.Module) -> ParameterMap:
    """Return the map of a checkpoint that has the tensors of the model's state under their names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in hf_model.state_dict().items()}
    return ParameterMap({name: whole(name, shape) for name, shape in shapes.items()}, shapes)


def _load_traced(empty: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Give the parameters of a model on the meta device traced values; return what could not be traced."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    tensors = {name: TracedTensor(whole(name, shape)) for name, shape in shapes.items()}
    config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=get_model_conversion_mapping(empty))
    with without_progress_bars():
        report, _ = convert_and_load_state_dict_in_model(empty, tensors, config)
    return dict(report.conversion_errors)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws a bar of its own while it loads, and reports in tables; ours would be torn by them."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
