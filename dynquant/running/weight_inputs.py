"""Which module reads the input of each GGUF weight, and in which order the weight's columns are the input's channels.

A GGUF matrix may be some rows of a linear layer, several linear layers may be one matrix, and columns may be reordered
(the output projection of Qwen3.5's linear attention): statistics of an input belong to a weight only in its own order.
Traced maps say all of that. gguf-py's map of names is asked for weights that GGUF holds in another form (`attn_kv_b`),
and for GGUF files, whose columns are then compared with those of the running model.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, gguf_name_of, role_of
from dynquant.errors import StatsError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.strided_maps import StridedMap, row_blocks, unless_sorted
from dynquant.running.equal_entries import EqualEntries
from dynquant.running.expert_hooks import expert_layout, expert_modules, expert_stack
from dynquant.running.parameter_map import parameter_map

_TABLES = (Role.EMBEDDING, Role.OUTPUT, Role.PER_LAYER_EMBEDDING)
_ROUNDING = 0.02
"""Error of a row in a file of eight bits, as a part of its norm; columns that are all moved make one of 1.4."""
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
    """GGUF stacks of a module's routed experts: those that read the common input, then the down-projections.

    `rows` are the outputs of an expert's layer that the rows of a stack make, where that is known.
    """

    inner: tuple[str, ...]
    down: str
    rows: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightInputs:
    """Modules of a running model by the GGUF weights that they hold."""

    linears: dict[str, LinearInput]
    experts: dict[nn.Module, ExpertInputs]
    embeddings: dict[str, nn.Module]
    aliases: dict[str, str] = field(default_factory=dict)
    """The embedding, where it is the output matrix too and so has the input of that."""


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
    head, aliases = hf_model.get_output_embeddings(), {}
    if "output.weight" not in model.source.names() and isinstance(head, nn.Linear):
        linears["output.weight"], aliases = LinearInput((head,)), {"token_embd.weight": "output.weight"}
    embeddings = _embeddings(hf_model, model.arch, model.hyper.n_layer)
    return WeightInputs(linears, _expert_inputs(model, hf_model, held), embeddings, aliases)


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
    are_transposed = {source: not isinstance(module, nn.Linear) for source, module in modules.items()}
    shapes = {source: tuple(module.weight.shape) for source, module in modules.items()}  # type: ignore[operator, union-attr]
    blocks = row_blocks(entries, lambda source, at: _row_and_column(at, shapes[source], are_transposed[source]))
    widths = {shape[0 if are_transposed[source] else 1] for source, shape in shapes.items()}
    if blocks is None or len(widths) > 1 or any(not torch.equal(b.columns, blocks[0].columns) for b in blocks):
        return None
    columns, width = blocks[0].columns, widths.pop()
    if not torch.equal(columns.sort().values, torch.arange(width)):
        return None
    counts = [prod(shape) // width for shape in shapes.values()]
    starts = dict(zip(modules, accumulate(counts, initial=0), strict=False))
    rows = torch.zeros(prod(entries.shape[:-1]), dtype=torch.int64)
    for block in blocks:
        rows[block.rows] = starts[block.source] + block.stored_rows
    return LinearInput(tuple(modules.values()), unless_sorted(columns, width), unless_sorted(rows, sum(counts)))


def _row_and_column(positions: Tensor, shape: tuple[int, ...], is_transposed: bool) -> tuple[Tensor, Tensor]:
    """Return rows and columns of positions in a weight of `shape`, [..., rows, columns] or the last two swapped."""
    if not is_transposed:
        return positions // shape[-1], positions % shape[-1]
    return positions // prod(shape[-2:]) * shape[-1] + positions % shape[-1], positions % prod(shape[-2:]) // shape[-1]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D"


def _expert_inputs(model: Model, hf_model: nn.Module, held: dict[str, StridedMap]) -> dict[nn.Module, ExpertInputs]:
    stacks: dict[str, list[tuple[int, str]]] = {}
    for name, entries in held.items():
        for parameter in entries.sources:
            if len(entries.shape) == 3:
                stacks.setdefault(parameter, []).append((entries.pieces[0].offset, name))
    experts = {}
    for module_name, module in expert_modules(hf_model).items():
        layout, inner, downs, rows, before = expert_layout(module), [], [], {}, 0
        for part in (*layout.inner, layout.down):
            names = [name for _, name in sorted(stacks.get(f"{module_name}.{part}", []))]
            for name in names:
                rows[name] = _expert_rows(name, held[name], module, part) + (0 if part == layout.down else before)
            before += expert_stack(module, part).shape[2 if part in layout.transposed else 1]
            (downs if part == layout.down else inner).extend(names)
        if not downs:
            parts = [gguf_name_of(f"{module_name}.{part}", model.arch, model.hyper.n_layer) for part in _EXPERT_PARTS]
            inner, downs = [name for name in parts[:-1] if name is not None], parts[-1:]
        experts[module] = _experts_of(module_name, inner, downs[0], rows)
    return experts


def _experts_of(module_name: str, inner: list[str], down: str | None, rows: dict[str, Tensor]) -> ExpertInputs:
    if not inner or down is None:
        raise StatsError(
            f"The GGUF weights of the experts {module_name} are not found, so their inputs cannot be measured; "
            "calibrate with llama-imatrix and import the file instead (`dynquant calibrate MODEL --imatrix FILE`)."
        )
    return ExpertInputs(tuple(inner), down, rows)


def _expert_rows(name: str, entries: StridedMap, module: nn.Module, part: str) -> Tensor:
    """Return which outputs its rows are, in the first expert; raise StatsError for columns in another order."""
    shape, is_transposed = tuple(expert_stack(module, part).shape), part in expert_layout(module).transposed
    blocks = row_blocks(entries, lambda _, positions: _row_and_column(positions, shape, is_transposed))
    if blocks is None or unless_sorted(blocks[0].columns, shape[1 if is_transposed else 2]) is not None:
        raise StatsError(
            f"The columns of `{name}` are not the channels of its input in their order, which is not supported for "
            "experts; calibrate with llama-imatrix and import the file instead (`dynquant calibrate --imatrix FILE`)."
        )
    return blocks[0].stored_rows[: entries.shape[1]]


def _entries_in_file(model: Model, search: EqualEntries, name: str, named: dict[str, LinearInput]) -> StridedMap | None:
    """Return where a running model holds a tensor of a GGUF file, unless the name says so and columns agree."""
    shape = model.source.info(name).shape
    if len(shape) < 2 or not name.endswith(".weight") or role_of(name) in _TABLES:
        return None
    if role_of(name).is_routed_expert and len(shape) == 3:
        return search.entries_of_stack(name)
    weight = named[name].module.weight.detach().cpu() if name in named else None  # type: ignore[operator, union-attr]
    if weight is not None and (weight.shape != shape or _begins_alike(weight, model, name)):
        return None
    stored = model.source.load(name)
    if weight is not None and torch.allclose(*(v.double().abs().sum(0) for v in (weight, stored)), rtol=1e-2):
        return None
    entries = search.entries(name, stored)
    if entries is None and name in named:
        raise StatsError(
            f"The columns of `{name}` in {model.base_gguf or model.path} are not those of the running model, in an "
            "order that dynquant cannot tell, so statistics would be those of other weights. Give the Hugging Face "
            "checkpoint without --base-gguf."
        )
    return entries


def _begins_alike(weight: Tensor, model: Model, name: str) -> bool:
    """Return whether the first and the last row are those of a GGUF tensor, as they are under most orders of rows."""
    ends = (0, len(weight) - 1)
    here, there = weight[[*ends]].float(), torch.stack([model.source.load(name, row) for row in ends])
    return bool((here - there).norm() < _ROUNDING * here.norm())
