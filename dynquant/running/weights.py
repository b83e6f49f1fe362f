"""Places of a running transformers model's weights in its checkpoint, so that any of them can be read alone.

Most parameters have the name of a checkpoint tensor. Routers and norms of a few families are named otherwise there, and
experts that transformers fuses are stored one by one; both are found through the GGUF names that they share.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource, StoredValues
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.running.expert_hooks import expert_modules

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class ExpertStack:
    """One fused parameter [E, rows, columns]: a checkpoint tensor of that shape, or E tensors of each part."""

    shape: tuple[int, ...]
    fused: str | None
    parts: tuple[tuple[str, ...], ...] = ()


class CheckpointWeights:
    """Parameters and persistent buffers of `hf_model`, which may be on the meta device, in the files of `model`.

    Raises:
        CheckpointError: `model` is no safetensors checkpoint of a known family, or lacks a weight.
    """

    def __init__(self, model: Model, hf_model: nn.Module) -> None:
        self._model = model
        self._converted, self.source = checkpoint_of(model)
        self._stored_names = set(self.source.names())
        self.stacks = dict(self._expert_stacks(hf_model))
        """Fused parameters by their name in the model."""
        tied = getattr(hf_model, "all_tied_weights_keys", None) or {}
        self.names = {
            name: self._place(tied.get(name, name), tuple(tensor.shape))
            for name, tensor in hf_model.state_dict().items()
            if name not in self.stacks
        }
        """Checkpoint tensor of every other parameter and buffer."""

    def load(self, name: str) -> StoredValues:
        """A parameter or buffer that is not a stack of experts."""
        return self.source.stored(self.names[name])

    def expert(self, name: str, expert: int) -> tuple[StoredValues, ...]:
        """The parts of one expert's matrix in the stack `name`; as rows one after the other they make it."""
        stack = self.stacks[name]
        if stack.fused is not None:
            return (self.source.stored(stack.fused, expert),)
        return tuple(self.source.stored(part[expert]) for part in stack.parts)

    def stack(self, name: str) -> tuple[StoredValues, ...]:
        """All experts of a stack, [E, rows, columns] in one piece, or in parts where FP8 scales do not join."""
        stack = self.stacks[name]
        if stack.fused is not None:
            return (self.source.stored(stack.fused),)
        if self.source.stored(stack.parts[0][0]).scale is not None:
            return tuple(_stacked_fp8([self.source.stored(name) for name in part]) for part in stack.parts)
        # One block of memory for a layer's experts, which the system gets back whole.
        whole = torch.empty(stack.shape, dtype=self.source.stored(stack.parts[0][0]).data.dtype)
        for matrix, names in zip(whole, zip(*stack.parts, strict=True), strict=True):
            torch.cat([self.source.stored(name).data for name in names], out=matrix)
        return (StoredValues(whole),)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a parameter as stored."""
        stack = self.stacks.get(name)
        if stack is None or stack.fused is not None:
            return self.source.stored_bytes(self.names[name] if stack is None else stack.fused)
        return sum(self.source.stored_bytes(name) for part in stack.parts for name in part)

    def _expert_stacks(self, hf_model: nn.Module) -> Iterator[tuple[str, ExpertStack]]:
        for module_name, module in expert_modules(hf_model).items():
            experts: Any = module
            if experts.is_transposed or not experts.has_gate or experts.has_bias:
                raise CheckpointError(
                    f"{module_name} ({type(module).__name__}) keeps its experts transposed, without a gate or with "
                    "biases, which cannot be read layer by layer. Load the model whole: leave out --max-memory."
                )
            for part in _PARTS:
                shape = tuple(getattr(experts, part).shape)
                yield f"{module_name}.{part}", self._stack_of(module_name, part, shape)

    def _stack_of(self, module_name: str, part: str, shape: tuple[int, ...]) -> ExpertStack:
        names = [
            gguf_name_of(f"{module_name}.{projection}", self._model.arch, self._model.hyper.n_layer)
            for projection in _PARTS[part]
        ]
        if not all(name is not None and name in self._converted.names() for name in names):
            raise self._lacks(f"{module_name}.{part}", shape)
        stored = tuple(self._converted.checkpoint_names(str(name)) for name in names)
        if len(stored[0]) == 1 and shape[0] > 1:
            return ExpertStack(shape, stored[0][0])
        return ExpertStack(shape, None, stored)

    def _place(self, name: str, shape: tuple[int, ...]) -> str:
        parts: tuple[str, ...] = (name,)
        if name not in self._stored_names:
            gguf_name = gguf_name_of(name, self._model.arch, self._model.hyper.n_layer)
            parts = self._converted.checkpoint_names(gguf_name) if gguf_name in self._converted.names() else ()
        if len(parts) != 1 or self.source.info(parts[0]).shape != shape:
            raise self._lacks(name, shape)
        return parts[0]

    def _lacks(self, name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self._model.path} stores nothing that could be `{name}` {list(shape)} of the running model; it cannot "
            "be read layer by layer. Load the model whole: leave out --max-memory."
        )


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
