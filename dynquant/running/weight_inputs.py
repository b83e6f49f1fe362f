"""Which module reads the input of each GGUF weight, and in which order the weight's columns are the input's channels.

A GGUF matrix may be some rows of a linear layer, several linear layers may be one matrix, and columns may be reordered
(the output projection of Qwen3.5's linear attention): statistics of an input belong to a weight only in its own order.
Traced maps say all of that. gguf-py's map of names is asked for weights that GGUF holds in another form (`attn_kv_b`),
and for GGUF files, whose columns are then compared with those of the running model.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, gguf_name_of, role_of
from dynquant.errors import StatsError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import StridedMap, contiguous_strides
from dynquant.running.equal_entries import EqualEntries
from dynquant.running.expert_hooks import expert_layout, expert_modules, expert_stack
from dynquant.running.parameter_map import parameter_map

_EXPERT_PARTS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class LinearInput:
    """Linear layers that hold a GGUF matrix; `rows` and `columns` of their weights, None where they are as stored.

    Several layers read the same input, and their rows are counted one after the other.
    """

    modules: tuple[nn.Module, ...]
    columns: Tensor | None = None
    rows: Tensor | None = None

    @property
    def module(self) -> nn.Module:
        """The layer, or the first of them."""
        return self.modules[0]

    @property
    def is_plain(self) -> bool:
        """True when the matrix is the weight of one layer as it is stored."""
        return len(self.modules) == 1 and self.columns is None and self.rows is None

    def channels(self, x: Tensor) -> Tensor:
        """The input [..., C] in the order of the matrix's columns."""
        return x if self.columns is None else x[..., self.columns.to(x.device)]

    def outputs(self, y: Tensor) -> Tensor:
        """The outputs [..., R] that the matrix makes, in its order of rows."""
        return y if self.rows is None else y[..., self.rows.to(y.device)]


@dataclass(frozen=True)
class ExpertInputs:
    """GGUF stacks of a module's routed experts: those that read the common input, then the down-projections."""

    inner: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class WeightInputs:
    """Modules of a running model by the GGUF weights that they hold."""

    linears: dict[str, LinearInput]
    experts: dict[nn.Module, ExpertInputs]
    embeddings: dict[str, nn.Module]


def named_inputs(hf_model: nn.Module, arch: str, n_layer: int) -> WeightInputs:
    """Return the linear layers and experts in gguf-py's map of an architecture. Raises StatsError: unnamed experts."""
    linears, experts = _named_linears(hf_model, arch, n_layer), {}
    for module_name, module in expert_modules(hf_model).items():
        names = [gguf_name_of(f"{module_name}.{part}", arch, n_layer) for part in _EXPERT_PARTS]
        experts[module] = _experts_of(module_name, [name for name in names[:-1] if name is not None], names[-1])
    return WeightInputs(linears, experts, _embeddings(hf_model, arch, n_layer))


def weight_inputs(model: Model, hf_model: Any) -> WeightInputs:
    """Return where a running model reads the inputs of a model's GGUF weights.

    Raises:
        StatsError: experts or columns that cannot be followed into the running model.
    """
    named = _named_linears(hf_model, model.arch, model.hyper.n_layer)
    if isinstance(model.source, ConvertedSource):
        traced = parameter_map(hf_model, model.source.checkpoint)
        entries = {name: traced.gguf(model.source, name) for name in model.source.names()}
    elif model.has_family:  # none moves columns
        entries = {}
    else:
        search = EqualEntries(model, hf_model)
        entries = {name: _entries_in_file(model, search, name, named) for name in model.source.names()}
    held = {name: parts for name, parts in entries.items() if parts is not None and name.endswith(".weight")}
    owners = {
        f"{module_name}.{part}": (module, part)
        for module_name, module in hf_model.named_modules()
        for part, _ in module.named_parameters(recurse=False)
    }
    linears = {name: linear for name, parts in held.items() if (linear := _linear_input(parts, owners)) is not None}
    # Where entries are known a name says nothing more, but for an output matrix that is stored as the embedding.
    is_traced = isinstance(model.source, ConvertedSource)
    decided = {name for name in entries if is_traced or name in held} - {"output.weight"}
    linears |= {name: linear for name, linear in named.items() if name not in decided}
    whole = {linear.module for name, linear in named.items() if role_of(name) is Role.MLA_KV_B}
    linears = {name: linear for name, linear in linears.items() if name in named or linear.module not in whole}
    embeddings = _embeddings(hf_model, model.arch, model.hyper.n_layer)
    return WeightInputs(linears, _expert_inputs(model, hf_model, held), embeddings)


def _named_linears(hf_model: nn.Module, arch: str, n_layer: int) -> dict[str, LinearInput]:
    return {
        name: LinearInput((module,))
        for module_name, module in hf_model.named_modules()
        if isinstance(module, nn.Linear) and (name := gguf_name_of(f"{module_name}.weight", arch, n_layer)) is not None
    }


def _embeddings(hf_model: nn.Module, arch: str, n_layer: int) -> dict[str, nn.Module]:
    """Return the tables whose rows are looked up: that of tokens, and that of each layer where there is one."""
    named = {
        gguf_name_of(f"{module_name}.weight", arch, n_layer): module
        for module_name, module in hf_model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    per_layer = {name: module for name, module in named.items() if name and role_of(name) is Role.PER_LAYER_EMBEDDING}
    return {"token_embd.weight": hf_model.get_input_embeddings(), **per_layer}  # type: ignore[operator]


def _linear_input(entries: StridedMap, owners: dict[str, tuple[nn.Module, str]]) -> LinearInput | None:
    """Return the linear layers that a GGUF matrix is made of, or None where it is made of others."""
    if not all(source in owners and _is_linear(owners[source][0]) for source in entries.sources):
        return None
    modules = {source: owners[source][0] for source in entries.sources}
    first, *others = modules.values()
    is_transposed = not isinstance(first, nn.Linear)
    shape = tuple(first.weight.shape)  # type: ignore[union-attr]
    strides = contiguous_strides(shape)
    inner = 0 if is_transposed else 1
    if others and (is_transposed or any(other.weight.shape[1:] != shape[1:] for other in others)):  # type: ignore
        return None
    last, num_rows = len(entries.shape) - 1, shape[1 - inner]
    columns = _order(entries, (last,), shape[inner], strides[inner])
    if columns is None or len(columns) != shape[inner]:
        return None
    if others:
        num_rows = sum(len(module.weight) for module in modules.values())  # type: ignore[arg-type]
        entries = _as_one_weight(entries, modules)
    rows = _order(entries, tuple(range(last)), num_rows, strides[1 - inner])
    return LinearInput((first, *others), _unless_sorted(columns, shape[inner]), _unless_sorted(rows, num_rows))


def _as_one_weight(entries: StridedMap, modules: dict[str, nn.Module]) -> StridedMap:
    """Return entries of several weights as those of one that has their rows one after the other."""
    sizes = [module.weight.numel() for module in modules.values()]  # type: ignore[operator, union-attr]
    starts = dict(zip(modules, accumulate(sizes, initial=0), strict=False))
    pieces = (replace(piece, offset=piece.offset + starts[piece.source]) for piece in entries.pieces)
    return replace(entries, pieces=tuple(pieces))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer, transposed


def _order(entries: StridedMap, dims: tuple[int, ...], size: int, stride: int) -> Tensor | None:
    """Return the index in a parameter's dimension for each index in `dims`; None where others move in it as well."""
    lengths = [entries.shape[dim] for dim in dims]
    order = torch.full(lengths, -1, dtype=torch.int64)
    for piece in entries.pieces:
        positions = torch.tensor(piece.offset // stride % size)
        indices = [torch.tensor(piece.starts[dim]) for dim in dims]
        for axis in piece.axes:
            if axis.dim not in dims:
                if axis.stride % (stride * size) and axis.stride * (axis.size - 1) >= stride:
                    return None
                continue
            if axis.stride % stride or axis.stride * (axis.size - 1) >= stride * size:
                return None
            steps = torch.arange(axis.size)
            positions = positions.unsqueeze(-1) + steps * (axis.stride // stride)
            indices = [
                index.unsqueeze(-1) + steps * (axis.step if dim == axis.dim else 0)
                for dim, index in zip(dims, indices, strict=True)
            ]
        before = order[tuple(indices)]
        if bool(((before >= 0) & (before != positions)).any()):
            return None
        order[tuple(indices)] = positions
    return order.flatten() if bool((order >= 0).all()) else None


def _unless_sorted(order: Tensor | None, size: int) -> Tensor | None:
    return None if order is None or torch.equal(order, torch.arange(size)) else order


def _expert_inputs(model: Model, hf_model: nn.Module, held: dict[str, StridedMap]) -> dict[nn.Module, ExpertInputs]:
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name, entries in held.items():
        for parameter in entries.sources:
            if len(entries.shape) == 3:
                stacks.setdefault(parameter, []).append((entries.pieces[0].offset, name))
    experts = {}
    for module_name, module in expert_modules(hf_model).items():
        layout, inner, downs = expert_layout(module), [], []
        for part in (*layout.inner, layout.down):
            names = [name for _, name in sorted(stacks.get(f"{module_name}.{part}", []))]
            for name in names:
                _check_expert_columns(name, held[name], module, part)
            (downs if part == layout.down else inner).extend(names)
        if not downs:
            parts = [gguf_name_of(f"{module_name}.{part}", model.arch, model.hyper.n_layer) for part in _EXPERT_PARTS]
            inner, downs = [name for name in parts[:-1] if name is not None], parts[-1:]
        experts[module] = _experts_of(module_name, inner, downs[0])
    return experts


def _experts_of(module_name: str, inner: list[str], down: str | None) -> ExpertInputs:
    if not inner or down is None:
        raise StatsError(
            f"The GGUF weights of the experts {module_name} are not found, so their inputs cannot be measured; "
            "calibrate with llama-imatrix and import the file instead (`dynquant calibrate MODEL --imatrix FILE`)."
        )
    return ExpertInputs(tuple(inner), down)


def _check_expert_columns(name: str, entries: StridedMap, module: nn.Module, part: str) -> None:
    shape, inner = tuple(expert_stack(module, part).shape), 1 if part in expert_layout(module).transposed else 2
    columns = _order(entries, (2,), shape[inner], contiguous_strides(shape)[inner])
    if columns is None or not torch.equal(columns, torch.arange(shape[inner])):
        raise StatsError(
            f"The columns of `{name}` are not the channels of its input in their order, which is not supported for "
            "experts; calibrate with llama-imatrix and import the file instead (`dynquant calibrate --imatrix FILE`)."
        )


def _entries_in_file(model: Model, search: EqualEntries, name: str, named: dict[str, LinearInput]) -> StridedMap | None:
    """Return where a running model holds a tensor of a GGUF file, unless the name says so and columns agree."""
    shape = model.source.info(name).shape
    if len(shape) < 2 or role_of(name) in (Role.EMBEDDING, Role.OUTPUT):
        return None
    if role_of(name).is_routed_expert and len(shape) == 3:
        return search.entries_of_stack(name)
    stored = model.source.load(name)
    if name in named:
        weight = named[name].module.weight.detach()  # type: ignore[union-attr]
        here, there = (values.double().abs().sum(0).cpu() for values in (weight, stored))
        if weight.shape != stored.shape or torch.allclose(here, there, rtol=1e-2):
            return None
    entries = search.entries(name, stored)
    if entries is None and name in named:
        raise StatsError(
            f"The columns of `{name}` in {model.base_gguf or model.path} are not those of the running model, in an "
            "order that dynquant cannot tell, so statistics would be those of other weights. Give the Hugging Face "
            "checkpoint without --base-gguf."
        )
    return entries
