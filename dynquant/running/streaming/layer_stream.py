"""A transformers model whose weights are in memory one stage at a time: the embedding, a decoder layer, or the head.

The model itself is built on the meta device; norms and rotary tables outside the layers are loaded once. A stage is
loaded by `LayerStream.stage`, or by its own forward pass, so that `hf_model(input_ids=...)` works too and reads the
checkpoint from end to end. The next stage is read ahead on a thread. Linear layers are held in the type of computation,
experts as stored (`stored_experts`): what is computed is bit for bit what a model loaded whole computes.
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import StoredValues
from dynquant.checkpoints.tensor_source import checked_finite
from dynquant.errors import StatsError
from dynquant.running.expert_hooks import expert_layout, expert_stack, record_experts
from dynquant.running.load import empty_hf
from dynquant.running.stored_experts import StoredExperts
from dynquant.running.streaming.chained_layers import gives_tuples
from dynquant.running.weights import CheckpointWeights, add_empty_layer_ahead, checkpoint_of, put


@dataclass
class _Stage:
    """A module that is loaded at once: full name -> owner and attribute of its parameters and persistent buffers."""

    module: nn.Module
    dense: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    stacks: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    is_loaded: bool = False


class LayerStream:
    """The model of a checkpoint, ready to run on `device` in `dtype`.

    Stages are numbered: 0 the embedding, 1 to `num_layers` the decoder layers, `num_layers + 1` the head, and after it
    the layer that predicts a token ahead, where it is asked for and known.
    `keeps_experts` False reads every expert again whenever it is used; `reads_ahead` False saves the memory of the next
    stage.

    Raises:
        CheckpointError: not a safetensors checkpoint of a known family.
        StatsError: its decoder layers or experts cannot be told apart, or not run one after the other.
    """

    def __init__(
        self, model: Model, *, dtype: torch.dtype = torch.float32, device: str = "cpu", keeps_experts: bool = True,
        with_layer_ahead: bool = False,
    ) -> None:  # fmt: skip
        checkpoint_of(model)
        self.dtype, self.device = dtype, torch.device(device)
        self.keeps_experts, self.reads_ahead = keeps_experts, True
        self.hf_model: Any = empty_hf(model, dtype=dtype, device=device)
        self.layers = decoder_layers(self.hf_model)[:]  # without another that is added
        self.ahead = add_empty_layer_ahead(model, self.hf_model) if with_layer_ahead else None
        self._weights = CheckpointWeights(model, self.hf_model)
        self._exact_types = self.hf_model._get_dtype_plan(dtype)
        self._stages = self._find_stages()
        largest = max((prod(stack.shape[1:]) for stack in self._weights.stacks.values()), default=0)
        self._scratch = torch.empty(largest, dtype=dtype, device=device)
        self._ahead: tuple[int, Future] | None = None
        self._loads = True
        self._zeroed: list[tuple[str, int | None, int, int]] = []
        for owner, attribute in self._stages[0].dense.values():
            put(owner, attribute, self._stand_in(self._stages[0], getattr(owner, attribute)))
        staged = {name for stage in self._stages for name in (*stage.dense, *stage.stacks)}
        for name in self._weights.entries.keys() - staged:  # the final norm belongs to no stage
            put(self.hf_model, name, self._values(name))
        self.gives_tuples = gives_tuples(self.hf_model, self.layers, dtype, self.device)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_stages(self) -> int:
        return len(self._stages)

    @property
    def is_tied(self) -> bool:
        """True when the head multiplies with the embedding's weights."""
        return bool(self.hf_model.config.get_text_config().tie_word_embeddings)

    def dense_bytes(self, stage: int) -> int:
        """Memory of a loaded stage, without experts."""
        tensors = (getattr(owner, name) for owner, name in self._stages[stage].dense.values())
        return sum(tensor.numel() * self.dtype.itemsize for tensor in tensors)

    def largest_tensor_bytes(self, stage: int) -> int:
        """Memory of the largest weight of a loaded stage, or of one expert's matrices."""
        dense = (getattr(owner, name).numel() for owner, name in self._stages[stage].dense.values())
        experts = (2 * prod(self._weights.stacks[name].shape[1:]) for name in self._stages[stage].stacks)
        return max((*dense, *experts), default=0) * self.dtype.itemsize

    def expert_bytes(self, stage: int) -> int:
        """Memory of the experts of a loaded stage."""
        return sum(self._weights.stored_bytes(name) for name in self._stages[stage].stacks)

    def stored_bytes(self, stage: int) -> int:
        """Memory of a stage that is read ahead."""
        dense = sum(self._weights.stored_bytes(name) for name in self._stages[stage].dense)
        return dense + (self.expert_bytes(stage) if self.keeps_experts else 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager: reads layers ahead while the model runs; stops the reader on exit."""
        with ExitStack() as stack:
            self._reader = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="dynquant-read-ahead"))
            stack.callback(self._forget_ahead)
            for number, stage in enumerate(self._stages):
                stack.enter_context(stage.module.register_forward_pre_hook(self._loading_hook(number)))
            stack.enter_context(record_experts(self.hf_model, lambda _call: None))
            yield

    @contextmanager
    def stage(self, number: int, *, then: int | None = None) -> Iterator[None]:
        """Context manager: loads the weights of a stage; stage `then` is read meanwhile."""
        stage = self._stages[number]
        if stage.is_loaded:
            yield
            return
        self._install(stage, self._read_or_take(number))
        try:
            if then is not None and self.reads_ahead:
                self._ahead = (then, self._reader.submit(self._read, self._stages[then]))
            yield
        finally:
            self._remove(stage)

    def own_tensors(self, number: int) -> dict[str, torch.Tensor]:
        """Return copies of the weights of a loaded stage by their full names, experts as plain stacks, that stand in
        the model from now on and may be changed."""
        stage, tensors = self._stages[number], {}
        for name, (owner, attribute) in stage.stacks.items():
            experts = owner.__dict__[attribute]
            tensors[name] = owner.__dict__[attribute] = torch.stack([experts[e] for e in range(len(experts))])
        for name, (owner, attribute) in stage.dense.items():
            put(owner, attribute, getattr(owner, attribute).clone())
            tensors[name] = getattr(owner, attribute)
        return tensors

    @contextmanager
    def not_loading(self) -> Iterator[None]:
        """Context manager: forward passes use what `stage` has loaded and load nothing themselves."""
        before, self._loads = self._loads, False
        try:
            yield
        finally:
            self._loads = before

    @contextmanager
    def zeroed(self, module: str, expert: int | None, row: int, column: int) -> Iterator[float]:
        """Context manager: one weight of a linear layer or an expert's down-projection reads as zero; yields its
        value."""
        name = f"{module}.weight"
        if expert is not None:
            experts = self.hf_model.get_submodule(module)
            down = expert_layout(experts).down
            name = f"{module}.{down}"
            if down in expert_layout(experts).transposed:
                row, column = column, row
            if name not in self._weights.stacks:  # DBRX's experts are rows of one matrix
                row, expert = row + expert * expert_stack(experts, down).shape[1], None
        parts = (self._weights.load(name),) if expert is None else self._weights.expert(name, expert)
        stored = torch.cat([part.to(self.dtype) for part in parts])
        place = (name, expert, row, column)
        self._zeroed.append(place)
        try:
            yield float(stored[row, column])
        finally:
            self._zeroed.remove(place)

    def _find_stages(self) -> list[_Stage]:
        names = {module: name for name, module in self.hf_model.named_modules()}
        embedding, head = self.hf_model.get_input_embeddings(), self.hf_model.get_output_embeddings()
        if head is None:
            raise StatsError(f"{type(self.hf_model).__name__} has no output head, so it is no language model.")
        ahead = () if self.ahead is None else (self.ahead.root,)
        stages = [_Stage(module) for module in (embedding, *self.layers, head, *ahead)]
        for stage in stages:
            for part in stage.module.state_dict():
                owner_name, _, attribute = part.rpartition(".")
                name, owner = f"{names[stage.module]}.{part}", stage.module.get_submodule(owner_name)
                (stage.stacks if name in self._weights.stacks else stage.dense)[name] = (owner, attribute)
        return stages

    def _loading_hook(self, number: int) -> Callable[..., None]:
        """A forward pass of a module outside `stage` loads it, and lets go of it at the end."""

        def before(module: nn.Module, _args: Any) -> None:
            if self._stages[number].is_loaded or not self._loads:
                return
            loaded = self.stage(number, then=number + 1 if number + 1 < len(self._stages) else None)
            loaded.__enter__()

            def after(*_: Any) -> None:
                handle.remove()
                loaded.__exit__(None, None, None)

            handle = module.register_forward_hook(after, always_call=True)

        return before

    def _read_or_take(self, number: int) -> dict[str, tuple[StoredValues, ...]]:
        if self._ahead is not None and self._ahead[0] == number:
            future, self._ahead = self._ahead[1], None
            return future.result()
        self._forget_ahead()
        return self._read(self._stages[number])

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            future, self._ahead = self._ahead[1], None
            if not future.cancel():
                future.exception()

    def _read(self, stage: _Stage) -> dict[str, tuple[StoredValues, ...]]:
        stored = {name: (self._weights.load(name),) for name in stage.dense}
        return stored | {name: self._weights.stack(name) for name in stage.stacks if self.keeps_experts}

    def _install(self, stage: _Stage, stored: dict[str, tuple[StoredValues, ...]]) -> None:
        # Popped, so that what was read is not there beside what is made of it.
        for name, (owner, attribute) in stage.stacks.items():
            stacks = tuple(part.moved(self.device) for part in stored.pop(name, ())) or None
            shape, read = self._weights.stacks[name].shape, partial(self._weights.expert, name)
            experts = StoredExperts(shape, read, self._scratch, stacks)
            experts.zeroed = [(e, row, column) for of, e, row, column in self._zeroed if of == name and e is not None]
            # transformers' parameter of that name stays on the meta device, hidden by the instance's own attribute.
            owner.__dict__[attribute] = experts
        for name, (owner, attribute) in stage.dense.items():
            put(owner, attribute, self._values(name, *stored.pop(name)))
        stage.is_loaded = True

    def _remove(self, stage: _Stage) -> None:
        for owner, attribute in stage.stacks.values():
            owner.__dict__.pop(attribute, None)
        for owner, attribute in stage.dense.values():
            put(owner, attribute, self._stand_in(stage, getattr(owner, attribute)))
        stage.is_loaded = False
        # glibc keeps what was freed in small pieces; the next stage would come on top of it (0.9 GB on a 7B MoE).
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)

    def _stand_in(self, stage: _Stage, values: torch.Tensor) -> torch.Tensor:
        """Return what stands for a weight that is not in memory."""
        if stage is not self._stages[0]:
            return torch.empty_like(values, device="meta")
        # Llama 4 moves token ids to the device of the embedding before that is loaded.
        return torch.zeros(1, dtype=values.dtype, device=self.device).expand(values.shape)

    def _values(self, name: str, stored: StoredValues | None = None) -> torch.Tensor:
        dtype = torch.float32 if any(pattern in name for pattern in self._exact_types) else self.dtype
        values = (stored or self._weights.load(name)).moved(self.device).to(dtype)
        checked_finite(name, values)
        for row, column in [place[2:] for place in self._zeroed if place[:2] == (name, None)]:
            values = values.clone()
            values[row, column] = 0
        return values


def decoder_layers(hf_model: nn.Module) -> nn.ModuleList:
    """Return the list of a causal language model's decoder layers, or raise StatsError where there is none."""
    num_layers = hf_model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    candidates = [
        module
        for module in hf_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and any(True for _ in module[0].parameters())
    ]
    if not candidates:
        raise StatsError(
            f"{type(hf_model).__name__} has no list of {num_layers} decoder layers, so they cannot be measured one by "
            "one. Plan with --sensitivity closed-form."
        )
    return max(candidates, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
