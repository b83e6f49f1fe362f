"""Puts packed modules into a transformers model, and finds the place of every GGUF tensor in it.

One GGUF tensor is one entry of the packed model's `state_dict`:

    token_embd, output, attn_*, ffn_*      MODULE.weight
    ffn_{gate,up,down}_exps                MODULE.experts.{gate,up,down}_proj     (fused in transformers)
    attn_k_b, attn_v_b                     MODULE.kv_b_proj.{k_b,v_b}             (one matrix in transformers)

Rows are in transformers' order: llama.cpp interleaves those of rotary heads, which moves whole packed rows.

A packed vision-language file keeps the checkpoint's names. What a plan leaves as floats is copied from the checkpoint
as a whole, so that a convolution over two frames, which GGUF splits, stays one tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.checkpoints.vision_names import keys_of
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion import Conversion, ConvertedSource, Transform, unchanged
from dynquant.families.common.strided_maps import unless_sorted
from dynquant.families.text.registry import conversions_of
from dynquant.formats import decode
from dynquant.formats.plain_quants import DTYPE_BYTES, FLOAT_DTYPES
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, quant_type
from dynquant.kernels.planes import is_packed
from dynquant.packed.joined_rows import ROWS_PREFIX, PackedRows
from dynquant.packed.layers import (
    EXPERT_PARTS,
    LATENT_PARTS,
    PackedEmbedding,
    PackedExperts,
    PackedLatentProjection,
    PackedLinear,
    PackedSortedExperts,
)
from dynquant.recipes.plan import Plan
from dynquant.running.expert_hooks import expert_layout, is_fused_experts

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Place:
    """The place of the GGUF tensor `name` of `shape`: row i of it is row `order[i]` of `key`, plus `shift`."""

    name: str
    key: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    shift: float = 0.0
    can_be_packed: bool = True
    """False for what transformers computes with directly, as routers: such tensors are stored as F32."""
    transposed: bool = False
    """True when `key` stores the transpose; only for matrices that stay float."""

    def stored_type(self, gguf_type: QuantType) -> QuantType:
        """Return the type under which the packed model keeps a tensor that GGUF stores as `gguf_type`."""
        return gguf_type if self.can_be_packed or not is_packed(gguf_type) else QUANT_TYPES["F32"]

    def stored_as(self, gguf_type: QuantType) -> StoredTensor:
        """Return the entry of a safetensors file."""
        stored = self.stored_type(gguf_type)
        if not is_packed(stored):
            return StoredTensor(self.key, stored.name, self.shape[::-1] if self.transposed else self.shape)
        return StoredTensor(self.key, "U8", (*self.shape[:-1], stored.row_bytes(self.shape[-1])))

    def keeps_bytes(self, gguf_type: QuantType) -> bool:
        """Return True when the entry is the bytes of GGUF, in their order."""
        return self.order is None and not self.shift and self.stored_type(gguf_type) is gguf_type

    def from_gguf(self, gguf_type: QuantType, packed: Tensor) -> Tensor:
        """Return the entry of `state_dict`: bytes in transformers' order of rows, or floats of the GGUF tensor's dtype.

        `packed` are GGUF's bytes, uint8 [..., row_bytes].
        """
        if is_packed(gguf_type) and self.can_be_packed:
            values = packed
        elif is_packed(gguf_type):
            values = decode(gguf_type, packed, self.shape)
        else:
            values = packed.contiguous().view(FLOAT_DTYPES[gguf_type.name]).reshape(self.shape)
        if self.shift:
            values = (values.float() - self.shift).to(values.dtype)
        if self.transposed:
            return values.t()
        if self.order is None:
            return values
        ordered = torch.empty_like(values)
        ordered[self.order] = values
        return ordered


@dataclass(frozen=True)
class Layout:
    """Places by GGUF name, and what has none."""

    places: Mapping[str, Place]
    skipped: frozenset[str]
    """GGUF names of tensors that are computed, or parts of one that is copied."""
    copied: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Entries of places that hold a tensor of the original checkpoint as it is, by GGUF name."""
    kept: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Entries that are not made of GGUF tensors, by key."""
    read: Callable[[str], Tensor] | None = None
    """Gives the values of `kept`."""
    joined: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Arguments of `PackedRows` by module."""


def find_places(config: Config, hf_model: nn.Module, *, whole_kv_b: bool = False) -> tuple[dict[str, Place], set[str]]:
    """Return places by GGUF name, and the names of tensors that follow from the configuration and have none.

    `hf_model` is what transformers makes of the configuration, on any device, before modules are replaced.

    Raises:
        CheckpointError: this transformers has parameters that the family does not know.
    """
    conversions = conversions_of(config, hf_model.state_dict(), whole_kv_b=whole_kv_b)
    computed = {conversion.name for conversion in conversions if conversion.values is not None}
    stored = [conversion for conversion in conversions if conversion.name not in computed]
    return {conversion.name: _place_of(conversion, hf_model) for conversion in stored}, computed


def build_meta_model(config: Config) -> nn.Module:
    """Return the causal language model of a configuration, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


def build_meta_vision(model: Model) -> Any:
    """Return transformers' model of the checkpoint's configuration, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(model.hf_directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def lay_out_vision(model: Model, plan: Plan, hf_model: Any) -> Layout:
    """Return where each tensor of the plan goes.

    Raises:
        CheckpointError: transformers' model has no parameter for a tensor of the checkpoint.
    """
    source = model.source
    assert isinstance(source, ConvertedSource)
    types = {entry.name: entry.quant_type for entry in plan.entries}
    stored_names = [source.checkpoint_names(name)[0] for name in types]
    key_of = keys_of(stored_names, hf_model.state_dict())
    places: dict[str, Place] = {}
    copied: dict[str, StoredTensor] = {}
    skipped, seen = set(), set()
    for (name, planned), stored_name in zip(types.items(), stored_names, strict=True):
        if stored_name not in key_of:
            raise CheckpointError(
                f"{model.name} holds `{stored_name}`, but this transformers builds {type(hf_model).__name__} without "
                "such a parameter. Use the version of transformers that the checkpoint was made for."
            )
        if stored_name in seen:
            skipped.add(name)
            continue
        seen.add(stored_name)
        if not planned.is_float:
            places[name] = _packed_place(source, name, stored_name, hf_model, key_of[stored_name])
            continue
        info = source.checkpoint.info(stored_name)
        dtype = min(info.dtype, planned.name, key=DTYPE_BYTES.__getitem__)
        places[name] = Place(name, stored_name, tuple(info.shape), can_be_packed=False)
        copied[name] = StoredTensor(stored_name, dtype, tuple(info.shape))
    return Layout(places, frozenset(skipped), copied)


def pack_modules(
    model: nn.Module,
    types: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    joined: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Replace the modules of `model` that hold packed weights; `types` gives the quant type of each state_dict key.

    Weights are made on the meta device and wait to be loaded. `dtype` is that of the floats beside them; `joined` gives
    arguments of `PackedRows` by module.

    Raises:
        CheckpointError: an unknown type, or a key that the model has no place for; both are named.
    """
    packed = {key for key, type_name in types.items() if is_packed(_known_type(key, type_name))}
    # transformers will tie some weights to packed ones, as a head to its embedding: those are packed alike.
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied_types = {key: types[source] for key, source in tied.items() if source in packed and key not in types}
    groups: dict[str, dict[str, str]] = {}
    for key, type_name in {**types, **tied_types}.items():
        path, _, part = key.rpartition(".")
        groups.setdefault(path, {})[part] = type_name
    for path, parts in groups.items():
        if len(parts) == 1 and not any(is_packed(quant_type(type_name)) for type_name in parts.values()):
            continue
        parent_path, _, name = path.rpartition(".")
        try:
            parent, module = model.get_submodule(parent_path), model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(_no_place(model, path, parts)) from error
        with torch.device("meta"):
            packed_module = (
                _packed_rows(model, module, path, parts, joined[path])
                if joined and path in joined
                else _packed_module(model, parent, module, path, parts)
            )
            setattr(parent, name, packed_module.to(dtype=dtype))


def _place_of(conversion: Conversion, hf_model: nn.Module) -> Place:
    key, shape, transform = _key(conversion), conversion.shape, conversion.transform
    path, _, part = key.rpartition(".")
    is_part = part in EXPERT_PARTS + LATENT_PARTS
    is_moved = not is_part and transform is not unchanged
    order, shift = order_of_rows(transform, shape) if is_moved else (None, 0.0)
    packable = is_part or is_moved or isinstance(hf_model.get_submodule(path), nn.Linear | nn.Embedding)
    return Place(conversion.name, key, shape, order, shift, packable and len(shape) > 1)


def _packed_place(source: ConvertedSource, name: str, stored_name: str, hf_model: Any, key: str) -> Place:
    shape = tuple(source.info(name).shape)
    if source.transform(name) is torch.t:
        return Place(name, stored_name, shape, transposed=True, can_be_packed=False)
    path, _, part = key.rpartition(".")
    module = hf_model.get_submodule(path)
    # PyTorch's attention reads the weights of subclasses of nn.Linear itself.
    packable = part == "weight" and (type(module) is nn.Linear or module is hf_model.get_input_embeddings())
    order, _ = order_of_rows(source.transform(name), shape)
    return Place(name, stored_name, shape, order, can_be_packed=packable)


def order_of_rows(transform: Transform, shape: tuple[int, ...]) -> tuple[Tensor | None, float]:
    """Return `order` and `shift` of a `Place` whose tensor `transform` makes by moving rows and adding a constant."""
    if transform is unchanged:
        return None, 0.0
    rows = shape[0]
    column = (rows,) + (1,) * (len(shape) - 1)
    start = transform(torch.zeros(column, dtype=torch.float64)).flatten()  # what it adds to each row
    order = transform(torch.arange(rows, dtype=torch.float64).reshape(column)).flatten() - start  # where rows come from
    return unless_sorted(order.long(), rows), float(start[0])


def _key(conversion: Conversion) -> str:
    first = conversion.parts[0]
    if conversion.name == "output.weight":
        return _HEAD
    if conversion.name.endswith("_exps.weight"):
        kind = conversion.name.removesuffix("_exps.weight").rpartition("_")[2]
        return f"{first.partition('.experts.')[0]}.experts.{kind}_proj"
    if conversion.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        return f"{first.removesuffix('.weight')}.{conversion.name.split('attn_')[1].removesuffix('.weight')}"
    return first


def _known_type(key: str, type_name: object) -> QuantType:
    known_type = QUANT_TYPES.get(type_name) if isinstance(type_name, str) else None
    if known_type is None:
        raise CheckpointError(
            f"`quantization_config` gives `{key}` the quant type {type_name!r}, which this dynquant does not know. "
            f"Install the version that wrote the checkpoint, or export it again. Known: {', '.join(QUANT_TYPES)}."
        )
    return known_type


def _packed_module(model: Any, parent: Any, module: Any, path: str, parts: dict[str, str]) -> nn.Module:
    try:
        if isinstance(module, nn.Linear) and set(parts) == {"weight"}:
            has_bias = module.bias is not None
            return PackedLinear(module.in_features, module.out_features, parts["weight"], bias=has_bias)
        if isinstance(module, nn.Embedding) and set(parts) == {"weight"}:
            scale = getattr(module, "scalar_embed_scale", None)
            shape, padding = (module.num_embeddings, module.embedding_dim), module.padding_idx
            return PackedEmbedding(*shape, parts["weight"], padding_idx=padding, scale=scale)
        if isinstance(module, nn.Linear) and set(parts) == set(LATENT_PARTS):
            nope, value = parent.qk_nope_head_dim, parent.v_head_dim
            heads = module.out_features // (nope + value)
            return PackedLatentProjection(module.in_features, heads, nope, value, parts)
        if hasattr(module, "down_proj") and set(parts) in (set(EXPERT_PARTS), set(EXPERT_PARTS[1:])):
            return _packed_experts(module, path, parts)
    except ValueError as error:
        raise CheckpointError(f"`{path}` cannot hold {parts}: {error}. config.json is of another model.") from error
    raise CheckpointError(_no_place(model, path, parts))


def _packed_rows(
    model: nn.Module, module: Any, path: str, parts: dict[str, str], joined: Mapping[str, Any]
) -> PackedRows:
    try:
        rows = {f"{ROWS_PREFIX}{number}": int(count) for number, count in enumerate(joined["rows"])}
        orders = {name: bool(joined[name]) for name in ("has_row_order", "has_input_order")}
        if isinstance(module, nn.Linear) and set(parts) == set(rows) and sum(rows.values()) == module.out_features:
            return PackedRows(module.in_features, rows, parts, bias=module.bias is not None, **orders)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot hold {parts}: {error}. config.json is of another model.") from error
    raise CheckpointError(_no_place(model, path, parts))


def _packed_experts(module: Any, path: str, parts: dict[str, str]) -> PackedExperts:
    from transformers.integrations.moe import _default_apply_gate

    if not is_fused_experts(module) or (expert_layout(module).inner == ("up_proj",)) == ("gate_proj" in parts):
        raise CheckpointError(
            f"The experts of `{path}` ({type(module).__name__}) are called in a way that packed experts do not "
            "know. Load the GGUF in llama.cpp."
        )
    layout = expert_layout(module)
    experts, *sides = module.down_proj.shape
    hidden, width = reversed(sides) if layout.transposed else sides
    if layout.gets_all_tokens:
        return PackedSortedExperts((experts, hidden, width), parts, module.act_fn)
    combine = getattr(type(module), "_apply_gate", _default_apply_gate)
    packed = PackedExperts(
        (experts, hidden, width),
        parts,
        getattr(module, "act_fn", None),
        config=getattr(module, "config", None),
        apply_gate=None if combine is _default_apply_gate else combine,
        has_bias=layout.has_bias,
        is_concatenated=getattr(module, "is_concatenated", True),
    )
    for name, value in vars(module).items():  # limits and slopes that its gate reads
        if isinstance(value, int | float) and not hasattr(packed, name):
            setattr(packed, name, value)
    return packed


def _no_place(model: nn.Module, path: str, parts: Mapping[str, str]) -> str:
    names = ", ".join(f"`{path}.{part}` ({type_name})" for part, type_name in parts.items())
    return (
        f"`quantization_config` names {names}, but {type(model).__name__} has no module there that can be packed. "
        "config.json belongs to another model, or this version of transformers builds it differently."
    )
