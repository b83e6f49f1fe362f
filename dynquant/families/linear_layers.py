"""The linear layers of a Hugging Face checkpoint as vLLM sees them, and what else the checkpoint holds.

Matrices are named by their GGUF names, under which statistics are kept, and hold the checkpoint's own orientation and
row order. Routed experts become one linear layer each, whether the checkpoint stores them one by one or fused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.checkpoints.tensor_roles import Role, gguf_name_of, layer_of, role_of
from dynquant.errors import ExportError, PlanError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats.vllm_schemes import GROUP_SIZES, SCHEMES, Scheme

_FUSED: dict[str, tuple[Role, ...]] = {
    "qkv": (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),
    "latents": (Role.MLA_Q_A, Role.MLA_KV_A),
    "gate_up": (Role.FFN_GATE, Role.FFN_UP),
    "shared_gate_up": (Role.SHARED_GATE, Role.SHARED_UP),
    "experts_gate_up": (Role.EXPERT_GATE, Role.EXPERT_UP),
}
"""Linear layers that vLLM fuses into one in each layer."""
_EXPERT_PARTS = {Role.EXPERT_GATE: "gate_proj", Role.EXPERT_UP: "up_proj", Role.EXPERT_DOWN: "down_proj"}
_CUT_ROLES = {
    **dict.fromkeys((Role.ATTN_OUT, Role.FFN_DOWN, Role.SHARED_DOWN, Role.EXPERT_DOWN), -1),
    **dict.fromkeys((Role.SSM_OUT, Role.SHORTCONV_OUT), -1),
    **dict.fromkeys((Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_QKV, Role.MLA_Q_B, Role.MLA_KV_B), -2),
    **dict.fromkeys((Role.FFN_GATE, Role.FFN_UP, Role.SHARED_GATE, Role.SHARED_UP), -2),
    **dict.fromkeys((Role.EXPERT_GATE, Role.EXPERT_UP, Role.ATTN_GATE, Role.SSM_IN, Role.SHORTCONV_IN), -2),
}
"""Dimension that vLLM shares out among the GPUs of `--tensor-parallel-size`; it keeps the others whole on each."""
_KEPT_ROLES = (
    Role.EMBEDDING, Role.PER_LAYER_EMBEDDING, Role.OUTPUT, Role.NORM, Role.ROUTER, Role.CONV, Role.MIXING,
    Role.SSM_STATE, Role.INDEXER, Role.MTP, Role.OTHER,
)  # fmt: skip


@dataclass(frozen=True)
class LinearLayer:
    """One matrix [R, C], or a stack of the routed experts' matrices [E, R, C]. `load(e)` gives float32 [R, C]."""

    name: str
    role: Role
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    sources: tuple[str, ...]
    """The checkpoint's tensors that it replaces."""
    load: Callable[[int], torch.Tensor]
    tensor_parallel: int = 1
    """GPUs among which vLLM shares it out."""

    @property
    def shard(self) -> tuple[int, int]:
        """The matrix [R, C], or an expert's, that each GPU has."""
        rows, columns = self.shape[-2:]
        is_cut_in_rows, count = _CUT_ROLES.get(self.role) == -2, self.tensor_parallel
        return (rows // count, columns) if is_cut_in_rows else (rows, columns // count)

    @property
    def is_expert(self) -> bool:
        return len(self.shape) == 3

    @property
    def num_experts(self) -> int:
        return self.shape[0] if self.is_expert else 1

    @property
    def fusion(self) -> str:
        """The matrix that vLLM makes of it and others; they share NVFP4's global scale."""
        fused = next((name for name, roles in _FUSED.items() if self.role in roles), None)
        return self.name.removesuffix(".weight") if fused is None else f"blk.{layer_of(self.name)}.{fused}"

    def stored_as(self, scheme: Scheme) -> list[StoredTensor]:
        """Return the tensors of the layer, or of each expert of the stack, in a scheme."""
        parts = scheme.parts(*self.shape[-2:])
        return [part._replace(key=f"{module}.{part.key}") for module in self.modules for part in parts]

    def unit(self, *, mixed_experts: bool) -> str:
        """Return what shares its scheme: its fusion, or all routed experts (of its layer, if `mixed_experts`)."""
        if self.is_expert:
            return f"blk.{layer_of(self.name)}.experts" if mixed_experts else "experts"
        return self.fusion


@dataclass(frozen=True)
class LinearCheckpoint:
    """A Hugging Face checkpoint as its linear layers and everything else."""

    directory: Path
    source: SafetensorsSource
    linears: tuple[LinearLayer, ...]
    others: tuple[StoredTensor, ...]
    """Stored as they are, but for matrices, which become BF16."""
    group_size: int = GROUP_SIZES[0]
    """The largest group of integers that is wanted."""

    def others_by_name(self, model: Model) -> dict[str, StoredTensor]:
        """Return the other tensors by their GGUF names; those that GGUF has in pieces, or not at all, by their own."""
        assert isinstance(model.source, ConvertedSource)
        names: dict[str, list[str]] = {}
        for name in model.source.names():
            for part in model.source.checkpoint_names(name):
                names.setdefault(part, []).append(name)
        return {
            names[tensor.key][0] if len(names.get(tensor.key, ())) == 1 else tensor.key: tensor
            for tensor in self.others
        }

    def scheme(self, name: str) -> Scheme:
        """Return a scheme with the group sizes that are wanted."""
        scheme = SCHEMES[name]
        sizes = tuple(size for size in scheme.group_sizes if size <= self.group_size)
        return replace(scheme, group_sizes=sizes) if scheme.group_sizes == GROUP_SIZES else scheme

    def units(self, *, mixed_experts: bool) -> dict[str, list[LinearLayer]]:
        """Return the linear layers that share a scheme, by the name of their unit."""
        units: dict[str, list[LinearLayer]] = {}
        for linear in self.linears:
            units.setdefault(linear.unit(mixed_experts=mixed_experts), []).append(linear)
        return units

    def candidates(self, schemes: Iterable[str], *, mixed_experts: bool) -> dict[str, list[Scheme]]:
        """Return the schemes among `schemes` that each linear layer may have, grouped; BF16 when there is none."""
        units = self.units(mixed_experts=mixed_experts).values()
        return {
            linear.name: _candidates(linears, map(self.scheme, schemes), mixed_experts=mixed_experts)
            for linears in units
            for linear in linears
        }


def _candidates(linears: Sequence[LinearLayer], schemes: Iterable[Scheme], *, mixed_experts: bool) -> list[Scheme]:
    candidates = list(schemes)
    if linears[0].is_expert:
        candidates = [scheme for scheme in candidates if scheme.holds_experts]
        if not mixed_experts:  # then only schemes that transformers merges
            candidates = [scheme for scheme in candidates if scheme.merges_experts and scheme.is_quantized]
    fitting = [scheme.for_shapes([linear.shard for linear in linears]) for scheme in candidates]
    return [scheme for scheme in fitting if scheme is not None] or [SCHEMES["BF16"]]


def linear_checkpoint(model: Model, tensor_parallel: int = 1, group_size: int = GROUP_SIZES[0]) -> LinearCheckpoint:
    """Return the linear layers of a model that vLLM can load from a Hugging Face directory.

    Raises:
        ExportError: the model is a GGUF file, or of a family whose linear layers are not known here.
        PlanError: one cannot be shared out among `tensor_parallel` GPUs; no scheme has such groups.
    """
    if group_size not in GROUP_SIZES:
        sizes = " or ".join(map(str, GROUP_SIZES))
        raise PlanError(f"--group-size {group_size} is no group that vLLM's kernels take; give {sizes}.")
    source, directory = model.source, model.hf_directory
    if directory is None or not isinstance(source, ConvertedSource):
        raise ExportError(
            f"{model.path} is not a Hugging Face directory of a family that dynquant converts itself, and a "
            "compressed-tensors checkpoint keeps the names and configuration of one. Start from the directory that "
            "the model was published as, without --base-gguf."
        )
    checkpoint = SafetensorsSource(directory)
    linears: dict[str, LinearLayer] = {}
    for name in source.names():
        shape, parts = source.info(name).shape, source.checkpoint_names(name)
        if not name.endswith(".weight") or len(shape) < 2 or model.roles[name] in _KEPT_ROLES or not parts:
            continue
        if role_of(name).is_routed_expert:
            linear = _experts(model, source, name)
        elif _moves_columns(source, name):  # statistics are of its columns in another order
            continue
        else:
            linear = _matrix(model, checkpoint, parts[0], name)
        linears[linear.name] = _shared_out(linear, model, tensor_parallel)
    replaced = {part for linear in linears.values() for part in linear.sources}
    infos = [checkpoint.info(name) for name in checkpoint.names() if name not in replaced]
    others = tuple(StoredTensor(i.name, "BF16" if len(i.shape) >= 2 else i.dtype, i.shape) for i in infos)
    return LinearCheckpoint(directory, checkpoint, tuple(linears.values()), others, group_size)


def _shared_out(linear: LinearLayer, model: Model, count: int) -> LinearLayer:
    """Return a layer that `count` GPUs share. Raises PlanError: heads, rows or columns do not divide."""
    cut = _CUT_ROLES.get(linear.role)
    if cut is None or count == 1:
        return linear
    what, size = ("rows", "columns")[cut], linear.shape[cut]
    if linear.role in (Role.ATTN_Q, Role.MLA_Q_B):
        what, size = "heads", model.hyper.n_head
    elif linear.role in (Role.ATTN_K, Role.ATTN_V):  # with fewer heads than GPUs, some have the same
        what, size = "heads of keys and values", model.hyper.n_head_kv
        count = size if count % size == 0 else count
    if size % count or linear.shape[cut] % count:
        raise PlanError(
            f"`{linear.name}` has {size:,} {what}, which vLLM cannot share out among the {count} GPUs of "
            f"--tensor-parallel {count}. Give a number that divides them."
        )
    return replace(linear, tensor_parallel=count)


def _moves_columns(source: ConvertedSource, name: str) -> bool:
    """Return whether GGUF has the columns of a matrix, as long as its rows are whole, in another order."""
    part = source.checkpoint_names(name)[0]
    stored = source.checkpoint.info(part).shape
    if len(stored) != 2 or source.info(name).shape[-1] != stored[1]:
        return False  # MLA's key part is transposed, and named as the whole
    try:
        row = source.entries(name, stored)
    except (NotImplementedError, ValueError):
        return True
    for dimension in range(len(row.shape) - 1):
        row = row.sliced(dimension, 0, 1)
    return len(row.pieces) != 1 or any(axis.stride != 1 for axis in row.pieces[0].axes)


def _matrix(model: Model, checkpoint: SafetensorsSource, stored: str, made: str) -> LinearLayer:
    """Return a layer as the checkpoint has it; GGUF may hold it in pieces, as `made`, or with other rows."""
    name = gguf_name_of(stored, model.arch, model.hyper.n_layer) or made
    shape = checkpoint.info(stored).shape
    modules = (stored.removesuffix(".weight"),)
    return LinearLayer(name, role_of(name), shape, modules, (stored,), lambda _expert: checkpoint.load(stored))


def _experts(model: Model, source: ConvertedSource, name: str) -> LinearLayer:
    if f"{name.removesuffix('.weight')}.bias" in source.names():
        raise ExportError(
            f"The experts of {model.name} have biases (`{name.removesuffix('.weight')}.bias`), and vLLM's loader takes "
            "those as one stack in MXFP4, as they are published, or in BF16, not one by one as a compressed-tensors "
            "checkpoint has experts. Let vLLM serve the published one, or export GGUF or packed safetensors."
        )
    shape, parts, role = source.info(name).shape, source.checkpoint_names(name), role_of(name)
    are_apart = len(parts) == shape[0] and all(len(source.checkpoint.info(part).shape) == 2 for part in parts)
    if are_apart:  # and no stack of one expert, nor one whose experts are rows of a matrix
        modules = tuple(part.removesuffix(".weight") for part in parts)
    elif stack := re.fullmatch(r"(.*)\.(gate_up_proj|down_proj)(\.weight)?", parts[0]):
        modules = tuple(f"{stack[1]}.{expert}.{_EXPERT_PARTS[role]}" for expert in range(shape[0]))
    else:
        raise ExportError(
            f"The experts of {model.name} are stored as the stack `{parts[0]}`, and it is not known under which names "
            "a loader of this architecture takes them one by one, as a compressed-tensors checkpoint has experts. Let "
            "vLLM serve the checkpoint as it is, or export GGUF or packed safetensors."
        )
    return LinearLayer(name, role, shape, modules, parts, lambda expert: source.load(name, expert))
