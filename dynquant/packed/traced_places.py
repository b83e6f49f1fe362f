"""Places of a packed model of any architecture, from the traced maps between GGUF, checkpoint and transformers' model.

A matrix that is quantized has its GGUF bytes in the packed model; rows of a layer that one matrix makes are moved into
transformers' order, and layers that several make, or whose columns GGUF has in another order, become `PackedRows`. All
other parameters are the checkpoint's, under the names of transformers' model.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.checkpoints.tensor_source import TensorSource, checked_finite
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import StridedMap, by_source, row_blocks, unless_sorted, whole
from dynquant.formats.plain_quants import DTYPE_BYTES, FLOAT_DTYPES
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.packed.joined_rows import ROWS_PREFIX
from dynquant.packed.places import Layout, Place
from dynquant.recipes.plan import PlanEntry
from dynquant.running.expert_hooks import expert_layout, is_fused_experts
from dynquant.running.parameter_map import ParameterMap, parameter_map

_LATENT = {"attn_k_b.weight": "k_b", "attn_v_b.weight": "v_b"}
_EXPERTS = {f"ffn_{kind}_exps.weight": f"{kind}_proj" for kind in ("gate", "up", "down")}


class TypedTensor(NamedTuple):
    """The part of an entry of a plan that a place needs."""

    name: str
    shape: tuple[int, ...]
    type: str = "F32"

    @property
    def quant_type(self) -> QuantType:
        return QUANT_TYPES[self.type]


def lay_out_traced(
    model: Model, tensors: Iterable[PlanEntry | TypedTensor], hf_model: Any, stored: GGUFSource | None = None
) -> Layout:
    """Return where each tensor goes in a model on the meta device, and what is not made of quantized ones.

    `Layout.read` gives the latter from the checkpoint, or as far as it has them from the GGUF file `stored`.

    Raises:
        CheckpointError: a quantized matrix is in the model in a way that packed modules cannot hold; it is named.
    """
    source = model.source
    assert isinstance(source, ConvertedSource)
    traced = parameter_map(hf_model, source.checkpoint)
    builder = _Builder(model, hf_model, traced)
    by_parameter: dict[str, list[tuple[PlanEntry | TypedTensor, StridedMap]]] = {}
    tensors, tied = list(tensors), _embedding_and_copy(source)
    copied = [entry for entry in tensors if entry.name in tied]
    # Transformers has one matrix: the one of more bits.
    skipped = {entry.name for entry in sorted(copied, key=lambda entry: entry.quant_type.bits_per_weight)[:-1]}
    for entry in tensors:
        if entry.name in skipped:
            continue
        entries = traced.gguf(source, entry.name)
        if entries is not None:
            for parameter in entries.sources:
                by_parameter.setdefault(parameter, []).append((entry, entries))
        elif not entry.quant_type.is_float and any(
            name in traced.stored for name in source.checkpoint_names(entry.name)
        ):
            builder.refuse(entry.name, "is no selection of its parameters")
        skipped.add(entry.name)
    for parameter, parts in by_parameter.items():
        if any(not entry.quant_type.is_float for entry, _ in parts):
            builder.add(parameter, parts)
    builder.complete_experts(by_parameter)
    if stored is not None:
        builder.take_values(stored, {entry.name: of for parts in by_parameter.values() for entry, of in parts})
    kept = builder.kept({name: [entry.type for entry, _ in parts] for name, parts in by_parameter.items()})
    return Layout(
        builder.places, frozenset(skipped - builder.places.keys()), kept=kept, read=builder.read, joined=builder.joined
    )


def recorded(layout: Layout, arch: str) -> dict[str, Any]:
    """Return what `quantization_config` says of a traced layout beside types; nothing of another."""
    if layout.read is None:
        return {}
    names = {place.key: place.name for place in layout.places.values()}
    return {"gguf": {"architecture": arch, "names": names}} | ({"joined": layout.joined} if layout.joined else {})


def traced_places(model: Model, hf_model: Any) -> dict[str, Place]:
    """Return the place that each matrix of a model would have if it were quantized, where it could be, by GGUF name."""
    source = model.source
    assert isinstance(source, ConvertedSource)
    traced = parameter_map(hf_model, source.checkpoint)
    builder = _Builder(model, hf_model, traced)
    by_parameter: dict[str, list[tuple[TypedTensor, StridedMap]]] = {}
    skipped = _embedding_and_copy(source)[:1]
    for name in source.names():
        shape = tuple(source.info(name).shape)
        entries = traced.gguf(source, name) if len(shape) > 1 and name not in skipped else None
        for parameter in () if entries is None else entries.sources:
            by_parameter.setdefault(parameter, []).append((TypedTensor(name, shape), entries))
    for parameter, tensors in by_parameter.items():
        with suppress(CheckpointError):
            builder.add(parameter, tensors)
    return builder.places


def _embedding_and_copy(source: ConvertedSource) -> tuple[str, ...]:
    """Return embedding and output where both are made of the same tensor, which transformers ties; else nothing."""
    names = ("token_embd.weight", "output.weight")
    if not set(names) <= set(source.names()) or len({source.checkpoint_names(name) for name in names}) > 1:
        return ()
    return names


_Tensors = Sequence[tuple[PlanEntry | TypedTensor, StridedMap]]


class _Builder:
    """Places so far, and the parameters whose values they have."""

    def __init__(self, model: Model, hf_model: Any, traced: ParameterMap) -> None:
        self.places: dict[str, Place] = {}
        self.joined: dict[str, dict[str, Any]] = {}
        self._model, self._hf_model, self._traced = model, hf_model, traced
        self._shapes = {name: tuple(tensor.shape) for name, tensor in hf_model.state_dict().items()}
        self._replaced: set[str] = set()
        self._orders: dict[str, Tensor] = {}
        self._file: GGUFSource | None = None
        self._changed: Mapping[str, StridedMap] = {}

    def take_values(self, stored: GGUFSource, tensors: Mapping[str, StridedMap]) -> None:
        """Let a GGUF file give what it has of parameters, of which its `tensors` are entries."""
        self._file, self._changed = stored, by_source(tensors, self._shapes)

    def add(self, parameter: str, tensors: _Tensors) -> None:
        """Place the GGUF tensors of a parameter, of which one at least is quantized."""
        path, _, attribute = parameter.rpartition(".")
        module, names = self._hf_model.get_submodule(path), [entry.name for entry, _ in tensors]
        for entry, entries in tensors:
            if len(entries.sources) > 1:
                self.refuse(entry.name, f"joins {' and '.join(entries.sources[:4])}")
        if len(self._shapes[parameter]) == 3:
            self._add_experts(parameter, tensors)
        elif {_kind(name) for name in names} == set(_LATENT) and isinstance(module, nn.Linear):
            for entry, _ in tensors:
                self._place(entry, f"{path}.{_LATENT[_kind(entry.name)]}")
        elif attribute == "weight" and _is_linear(module) and not self._is_read_directly(path):
            self._add_linear(path, parameter, tensors)
        else:
            is_table = isinstance(module, nn.Embedding) and attribute == "weight"
            self._add_single(parameter, tensors, is_table and not self._has_head_read_directly(parameter))
        self._replaced.add(parameter)

    def complete_experts(self, by_parameter: Mapping[str, _Tensors]) -> None:
        """Place stacks of experts that stay float beside others of their module, which are packed."""
        packed = {place.key.rpartition(".")[0] for place in self.places.values()}
        for parameter, tensors in by_parameter.items():
            path = parameter.rpartition(".")[0]
            if path in packed and parameter not in self._replaced and len(self._shapes[parameter]) == 3:
                self._add_experts(parameter, tensors)
                self._replaced.add(parameter)

    def kept(self, planned: Mapping[str, list[str]]) -> dict[str, StoredTensor]:
        """Return the entries whose values `read` gives: parameters without a place, and orders.

        A parameter has its own type or the plan's (`planned`, by parameter), whichever takes fewer bytes; of a file
        that may have changed its values, the plan's.

        Raises:
            CheckpointError: transformers makes a parameter of the checkpoint in a way that is not followed.
        """
        kept = {}
        for name, entries in self._traced.parameters.items():
            if name not in self._replaced:
                stored = self._checkpoint.info(entries.sources[0]).dtype
                of_plan = max(planned.get(name, ["F32"]), key=DTYPE_BYTES.__getitem__)
                dtype = min(stored if stored in FLOAT_DTYPES else "F32", of_plan, key=DTYPE_BYTES.__getitem__)
                kept[name] = StoredTensor(name, of_plan if name in self._changed else dtype, self._shapes[name])
        if self._traced.reasons:
            name, reason = next(iter(self._traced.reasons.items()))
            self.refuse(name, f"is made by transformers in a way that cannot be followed ({reason:.200})")
        kept |= {key: StoredTensor(key, "I32", tuple(order.shape)) for key, order in self._orders.items()}
        return kept

    def read(self, key: str) -> Tensor:
        """Return the values of one entry of `kept`."""
        if key in self._orders:
            return self._orders[key].to(torch.int32)
        changed = self._changed.get(key)
        if changed is not None and changed.is_complete:
            values = torch.empty(self._shapes[key])
        else:
            values = self._traced.parameters[key].gather(partial(_loaded, self._checkpoint)).reshape(self._shapes[key])
            values = values.clone(memory_format=torch.contiguous_format)
        for piece in () if changed is None else changed.pieces:
            piece.of_target(values).copy_(piece.of_source(self._file.load(piece.source)) + changed.added)
        return checked_finite(key, values)

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise the CheckpointError for a tensor that packed modules cannot hold."""
        raise CheckpointError(
            f"`{name}` of {self._model.name} {reason} in {type(self._hf_model).__name__}, so it cannot be loaded "
            "packed by transformers. Export the plan as GGUF, and run that in llama.cpp."
        )

    @property
    def _checkpoint(self) -> TensorSource:
        assert isinstance(self._model.source, ConvertedSource)
        return self._model.source.checkpoint

    def _is_read_directly(self, path: str) -> bool:
        """Return whether the code of the module above reads the weight of a layer itself, or its type."""
        parent, _, name = path.rpartition(".")
        try:
            code = inspect.getsource(type(self._hf_model.get_submodule(parent)))
        except (OSError, TypeError):
            return False
        return f"self.{name}.weight" in code

    def _has_head_read_directly(self, parameter: str) -> bool:
        """Return whether a layer that is tied to this parameter, and packed with it, has its weight read directly."""
        tied: Mapping[str, str] = getattr(self._hf_model, "all_tied_weights_keys", None) or {}
        return any(self._is_read_directly(key.rpartition(".")[0]) for key, of in tied.items() if of == parameter)

    def _place(self, entry: PlanEntry | TypedTensor, key: str, order: Tensor | None = None, **options: Any) -> None:
        self.places[entry.name] = Place(entry.name, key, tuple(entry.shape), order, **options)

    def _add_linear(self, path: str, parameter: str, tensors: _Tensors) -> None:
        rows, orders = [], []
        width = self._shapes[parameter][1]
        for entry, entries in tensors:
            order, columns = self._rows_and_columns(entry, entries, width)
            rows.append(order)
            orders.append(columns)
        covered = torch.cat(rows)
        if not torch.equal(covered.sort().values, torch.arange(self._shapes[parameter][0])):
            self.refuse(tensors[0][0].name, f"and others are not all rows of `{parameter}`")
        input_order = unless_sorted(orders[0], width)
        if any(not torch.equal(columns, orders[0]) for columns in orders):
            self.refuse(tensors[0][0].name, f"has columns in another order than other rows of `{parameter}`")
        if len(tensors) == 1 and input_order is None:
            self._place(tensors[0][0], parameter, unless_sorted(covered, len(covered)))
            return
        for number, (entry, _) in enumerate(tensors):
            self._place(entry, f"{path}.{ROWS_PREFIX}{number}")
        row_order = unless_sorted(covered.argsort(), len(covered))
        if row_order is not None:
            self._orders[f"{path}.row_order"] = row_order
        if input_order is not None:
            self._orders[f"{path}.input_order"] = input_order
        self.joined[path] = {
            "rows": [len(order) for order in rows], "has_row_order": row_order is not None,
            "has_input_order": input_order is not None,
        }  # fmt: skip

    def _add_single(self, parameter: str, tensors: _Tensors, can_be_packed: bool) -> None:
        (entry, entries), *others = tensors
        shape = self._shapes[parameter]
        if others or len(shape) != 2 or len(entry.shape) != 2:
            self.refuse(entry.name, f"is only a part of `{parameter}`, or of another shape")
        rows, columns = self._rows_and_columns(entry, entries, shape[1])
        if len(rows) != shape[0] or unless_sorted(columns, shape[1]) is not None:
            self.refuse(entry.name, f"has other rows or columns than `{parameter}`")
        self._place(entry, parameter, unless_sorted(rows, shape[0]), can_be_packed=can_be_packed)

    def _add_experts(self, parameter: str, tensors: _Tensors) -> None:
        path = parameter.rpartition(".")[0]
        are_experts = is_fused_experts(self._hf_model.get_submodule(path))
        for entry, entries in tensors:
            part = _EXPERTS.get(_kind(entry.name))
            if part is None or len(entry.shape) != 3 or not are_experts:
                self.refuse(entry.name, f"has no place among the experts of `{path}`")
            expected = self._entries_of_experts(parameter, part)
            samples = zip(_samples(expected), _samples(entries), strict=True)
            if expected.shape != entries.shape or not all(
                torch.equal(there.positions({parameter: 0}), here.positions({parameter: 0})) for there, here in samples
            ):
                self.refuse(entry.name, f"has its experts, rows or columns in another order than `{parameter}`")
            self._place(entry, f"{path}.{part}")

    def _entries_of_experts(self, parameter: str, part: str) -> StridedMap:
        """Return which entries of a parameter are a part [E, rows, columns] of its experts for the packed module."""
        path, _, attribute = parameter.rpartition(".")
        module = self._hf_model.get_submodule(path)
        entries = whole(parameter, self._shapes[parameter])
        if attribute in expert_layout(module).transposed:
            entries = entries.permuted((0, 2, 1))
        if attribute != "gate_up_proj" or part == "down_proj":
            return entries
        length, is_up = entries.shape[1], part == "up_proj"
        if not getattr(module, "is_concatenated", True):
            return entries.sliced(1, int(is_up), length, 2)
        return entries.sliced(1, length // 2, length) if is_up else entries.sliced(1, 0, length // 2)

    def _rows_and_columns(
        self, entry: PlanEntry | TypedTensor, entries: StridedMap, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return which row of a matrix [R, width] each row of a GGUF tensor is, and the same of columns."""
        blocks = row_blocks(entries, lambda _, positions: (positions // width, positions % width))
        if blocks is None or not torch.equal(blocks[0].columns.sort().values, torch.arange(width)):
            self.refuse(entry.name, "has rows that are no rows of its parameter")
        return blocks[0].stored_rows, blocks[0].columns


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _kind(name: str) -> str:
    return name.split(".", 2)[-1]


def _samples(experts: StridedMap) -> list[StridedMap]:
    """Return the first and the last expert of a stack, and the first entry of all."""
    count = experts.shape[0]
    ends = [experts.sliced(0, expert, expert + 1) for expert in (0, count - 1)]
    return [*ends, experts.sliced(1, 0, 1).sliced(2, 0, 1)]


def _loaded(checkpoint: Any, name: str) -> Tensor:
    """Return a checkpoint tensor in its own float type."""
    values: Tensor = checkpoint.load(name)
    return values.to(FLOAT_DTYPES.get(checkpoint.info(name).dtype, torch.float32)).contiguous()
