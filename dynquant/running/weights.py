"""A running transformers model's weights in its checkpoint, found by a traced map, so that any can be read alone.

Most parameters are one checkpoint tensor. Matrices of fused experts are read one expert at a time: as rows that lie
together in one or two checkpoint tensors, which may stay FP8, or put together entry by entry from wherever they are.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource, StoredValues
from dynquant.checkpoints.tensor_source import checked_finite
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import Piece, StridedMap, whole
from dynquant.running.expert_hooks import expert_modules
from dynquant.running.layer_ahead import LayerAhead, places_ahead
from dynquant.running.parameter_map import parameter_map

_Slice = tuple[str, int | None]
"""A checkpoint tensor, or one slice of its first dimension."""


@dataclass(frozen=True)
class ExpertStack:
    """One fused parameter [E, rows, columns]: a checkpoint tensor of that shape, or matrices of each expert."""

    shape: tuple[int, ...]
    fused: str | None
    experts: tuple[StridedMap, ...] = ()


class CheckpointWeights:
    """Parameters and persistent buffers of `hf_model`, which may be on the meta device, in the files of `model`.

    With `path`, only those of the module of that name.

    Raises:
        CheckpointError: `model` is no safetensors checkpoint, or lacks a weight.
    """

    def __init__(self, model: Model, hf_model: nn.Module, path: str = "") -> None:
        self._model = model
        self.source = checkpoint_of(model)[1]
        traced = parameter_map(hf_model, self.source)
        tied = getattr(hf_model, "all_tied_weights_keys", None) or {}
        self.entries: dict[str, StridedMap] = {}
        """Parameters and buffers, but for stacks of experts, as entries of checkpoint tensors."""
        self.stacks: dict[str, ExpertStack] = {}
        """Fused parameters by their name in the model."""
        stacked = {
            f"{module_name}.{name}"
            for module_name, module in expert_modules(hf_model).items()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        }
        prefix = path and f"{path}."
        for name, tensor in hf_model.get_submodule(path).state_dict(prefix=prefix).items():
            held = traced.parameters.get(name) or traced.parameters.get(tied.get(name, name))
            if held is None or not held.fills(tensor):
                raise self._lacks(name, tuple(tensor.shape), traced.reasons.get(name))
            if name in stacked:
                self.stacks[name] = _stack_of(held, self.source)
            else:
                self.entries[name] = held

    def load(self, name: str) -> StoredValues:
        """A parameter or buffer that is not a stack of experts."""
        return self._joined(self.entries[name])

    def expert(self, name: str, expert: int) -> tuple[StoredValues, ...]:
        """The parts of one expert's matrix in the stack `name`; as rows one after the other they make it."""
        stack = self.stacks[name]
        if stack.fused is not None:
            return (self.source.stored(stack.fused, expert),)
        matrix = stack.experts[expert]
        rows = self._row_parts(matrix)
        return (self._joined(matrix),) if rows is None else tuple(self.source.stored(*part) for part in rows)

    def stack(self, name: str) -> tuple[StoredValues, ...]:
        """All experts of a stack, [E, rows, columns] in one piece, or in parts where FP8 scales do not join."""
        stack = self.stacks[name]
        if stack.fused is not None:
            return (self.source.stored(stack.fused),)
        first = self.expert(name, 0)
        if first[0].scale is not None:
            parts = zip(*(self.expert(name, expert) for expert in range(stack.shape[0])), strict=True)
            return tuple(_stacked_fp8(list(part)) for part in parts)
        # One block of memory for a layer's experts, which the system gets back whole.
        joined = torch.empty(stack.shape, dtype=first[0].data.dtype)
        for expert, matrix in enumerate(joined):
            torch.cat([part.data for part in self.expert(name, expert)], out=matrix)
        return (StoredValues(joined),)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a parameter as stored."""
        stack = self.stacks.get(name)
        if stack is not None and stack.fused is not None:
            return self.source.stored_bytes(stack.fused)
        pieces = [piece for held in (stack.experts if stack else (self.entries[name],)) for piece in held.pieces]
        used: dict[str, int] = {}
        for piece in pieces:
            used[piece.source] = used.get(piece.source, 0) + piece.numel
        return sum(
            self.source.stored_bytes(source) * count // prod(self.source.info(source).shape)
            for source, count in used.items()
        )

    def _joined(self, held: StridedMap) -> StoredValues:
        """Read the entries of a tensor, as stored where they are one checkpoint tensor."""
        source = held.pieces[0].source
        if held == whole(source, held.shape) and self.source.info(source).shape == held.shape:
            return self.source.stored(source)
        placed = [self._within(piece) for piece in held.pieces]
        parts = {str(part): part for part, _ in placed}
        values = {key: _plain(self.source.stored(*part)) for key, part in parts.items()}
        pieces = tuple(
            replace(piece, source=str(part), offset=offset)
            for piece, (part, offset) in zip(held.pieces, placed, strict=True)
        )
        return StoredValues(replace(held, pieces=pieces).gather(values.__getitem__).contiguous())

    def _within(self, piece: Piece) -> tuple[_Slice, int]:
        """Return what has to be read for a piece, one slice if that is enough, and where the piece starts in it."""
        shape = self.source.info(piece.source).shape
        size = prod(shape[1:])
        last = piece.offset + sum((axis.size - 1) * axis.stride for axis in piece.axes)
        if len(shape) < 3 or piece.offset // size != last // size:
            return (piece.source, None), piece.offset
        return (piece.source, piece.offset // size), piece.offset % size

    def _row_parts(self, matrix: StridedMap) -> list[_Slice] | None:
        """Return the checkpoint's matrices whose rows, one after the other, are a matrix; None where they are not."""
        parts, row = [], 0
        for piece in sorted(matrix.pieces, key=lambda piece: piece.starts):
            part, offset = self._within(piece)
            shape = self.source.info(part[0]).shape
            shape = shape if part[1] is None else shape[1:]
            expected = replace(whole(part[0], shape).pieces[0], offset=piece.offset, starts=(row, 0))
            if offset or len(shape) != 2 or piece != expected or shape[1] != matrix.shape[1]:
                return None
            parts.append(part)
            row += shape[0]
        return parts

    def _lacks(self, name: str, shape: tuple[int, ...], reason: str | None) -> CheckpointError:
        return CheckpointError(
            f"{self._model.path} stores nothing that could be `{name}` {list(shape)} of the running model"
            f"{f' ({reason:.200})' if reason else ''}; it cannot be read layer by layer. Load the model whole: leave "
            "out --max-memory."
        )


def _stack_of(held: StridedMap, checkpoint: SafetensorsSource) -> ExpertStack:
    source = held.pieces[0].source
    if held == whole(source, held.shape) and checkpoint.info(source).shape == held.shape:  # not a matrix
        return ExpertStack(held.shape, source)
    matrices = [held.sliced(0, expert, expert + 1).viewed(held.shape[1:]) for expert in range(held.shape[0])]
    return ExpertStack(held.shape, None, tuple(matrices))


def _plain(stored: StoredValues) -> torch.Tensor:
    """Return values of which each entry stands for itself; FP8 is scaled."""
    return stored.data.contiguous() if stored.scale is None else stored.to(torch.float32)


def add_layer_ahead(model: Model, hf_model: Any) -> None:
    """Add the layer that predicts a token ahead to a model that was loaded, with its weights."""
    if (ahead := add_empty_layer_ahead(model, hf_model)) is not None:
        _load_into(CheckpointWeights(model, hf_model, ahead.place.path), hf_model, ahead.place.path)


def add_empty_layer_ahead(model: Model, hf_model: Any) -> LayerAhead | None:
    """Add the layer that predicts a token ahead, on the meta device, and return it.

    Nothing is done where the model has none, where its order is not known, or its parts are not all explained.
    """
    if not model.mtp_tensors or not isinstance(model.source, ConvertedSource):
        return None
    source = checkpoint_of(model)[1]
    for place in places_ahead(hf_model, model.arch, source.names()):
        ahead = LayerAhead(hf_model, place)
        ahead.add()
        traced = parameter_map(hf_model, source)
        inside = {name for name in source.names() if name.startswith(f"{place.path}.")}
        parameters = ahead.root.state_dict(prefix=f"{place.path}.").items()
        held = all(name in traced.parameters and traced.parameters[name].fills(tensor) for name, tensor in parameters)
        if held and inside <= traced.stored.keys():
            return ahead
        ahead.remove()
    return None


@torch.no_grad()
def _load_into(weights: CheckpointWeights, hf_model: Any, path: str) -> None:
    device = hf_model.get_input_embeddings().weight.device
    for name, empty in hf_model.get_submodule(path).state_dict(prefix=f"{path}.").items():
        is_stack = name in weights.stacks
        # The parts of a stack are rows of all experts.
        parts = [part.to(empty.dtype) for part in (weights.stack(name) if is_stack else (weights.load(name),))]
        put(hf_model, name, checked_finite(name, parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(device))


def checkpoint_of(model: Model) -> tuple[ConvertedSource, SafetensorsSource]:
    """Return the conversions and files of a Hugging Face checkpoint, or raise CheckpointError for anything else."""
    if isinstance(model.source, ConvertedSource) and isinstance(model.source.checkpoint, SafetensorsSource):
        return model.source, model.source.checkpoint
    raise CheckpointError(
        f"{model.path} cannot be read layer by layer: that needs a Hugging Face checkpoint in safetensors format. Give "
        "it, or enough memory to load this model whole (leave out --max-memory)."
    )


def put(root: nn.Module, name: str, values: torch.Tensor) -> None:
    """Set a parameter, which then asks for no gradient, or a buffer, whatever device it was on."""
    owner_name, _, attribute = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(values, requires_grad=False)
    else:
        owner._buffers[attribute] = values


def _stacked_fp8(experts: list[StoredValues]) -> StoredValues:
    scales = [expert.scale for expert in experts if expert.scale is not None]
    data = torch.stack([expert.data.view(torch.uint8) for expert in experts]).view(experts[0].data.dtype)
    return StoredValues(data, torch.stack(scales), experts[0].block)
