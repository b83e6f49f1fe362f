"""Modules that keep their weights packed: linear, embedding, routed experts, and MLA's latent projection.

A packed weight is the GGUF blocks of its tensor, uint8 [..., rows, row_bytes], in memory and in `state_dict`. On a GPU
the same bytes may lie as planes (`kernels.planes`); `state_dict` gives blocks whatever the layout, and loads blocks.
A part whose type is F32, F16 or BF16 is an ordinary parameter. All arithmetic on packed weights is `kernels.ops`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import ops, reference
from dynquant.kernels.dispatch import has_triton, prepare
from dynquant.kernels.planes import block_rows, is_packed, pack_planes, unpack_planes

BLOCKS, PLANES = "blocks", "planes"
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
LATENT_PARTS = ("k_b", "v_b")
ExpertsProduct = Callable[[Tensor, Tensor], Tensor]
"""x [T, C] or [T, k, C] and expert ids [T, k] -> [T, k, N]."""


class PackedModule(nn.Module):
    """Base of the packed modules. `types` names the quant type of each weight, `layout` how its bytes lie."""

    types: dict[str, str]
    packed_names: tuple[str, ...]
    """Weights that are stored as bytes; the others are ordinary parameters."""
    layout: str
    round_input: Callable[[Tensor, str], Tensor] | None = None
    """Applied to the input of each product with the weight's type; `packed.rounding` sets it."""

    def _start(self, types: Mapping[str, str]) -> None:
        nn.Module.__init__(self)
        quant_types = {name: quant_type(type_name) for name, type_name in types.items()}
        self.types = {name: stored.name for name, stored in quant_types.items()}
        self.packed_names = tuple(name for name, stored in quant_types.items() if is_packed(stored))
        self.layout = BLOCKS

    def _add_weight(self, name: str, *shape: int) -> None:
        if name in self.packed_names:
            row_bytes = quant_type(self.types[name]).row_bytes(shape[-1])
            weight = nn.Parameter(torch.empty(*shape[:-1], row_bytes, dtype=torch.uint8), requires_grad=False)
            # transformers draws random numbers for weights without this mark, also for those it leaves on the disk.
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            weight = nn.Parameter(torch.empty(shape))
        self.register_parameter(name, weight)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of the weight `name` as numbers."""
        weight, stored = getattr(self, name), quant_type(self.types[name])
        if name not in self.packed_names:
            return tuple(weight.shape)
        return (*weight.shape[:-1], weight.shape[-1] // stored.block_bytes * stored.block_size)

    def dense(self, name: str, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The weight `name` as numbers, [..., rows, columns], or one slice of its first dimension."""
        weight, has_blocks = getattr(self, name), name in self.packed_names
        if index is not None and has_blocks and self.layout == PLANES:
            rows = weight.shape[-2]
            blocks = block_rows(self.types[name], weight, slice(index * rows, (index + 1) * rows))
            return reference.dequantize(blocks, self.types[name], dtype=dtype)
        if index is not None:
            weight = weight[index]
        if not has_blocks:
            return weight.to(dtype)
        return ops.dequantize(weight, self.types[name], dtype=dtype, layout=self.layout)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == PLANES:
            for name in self.packed_names:
                destination[prefix + name] = unpack_planes(self.types[name], getattr(self, name).detach())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if self.layout == PLANES:
            names = [name for name in self.packed_names if prefix + name in state_dict]
            planar = {prefix + name: pack_planes(self.types[name], state_dict[prefix + name]) for name in names}
            state_dict = {**state_dict, **planar}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        types = (type_name if name == "weight" else f"{name}: {type_name}" for name, type_name in self.types.items())
        return ", ".join(filter(None, (super().extra_repr(), *types)))


class PackedLinear(PackedModule, nn.Linear):
    """y = x Wᵀ + b with W packed, uint8 [out_features, row_bytes]. PEFT takes it for the linear layer that it is.

    Raises:
        PlanError: no quant type has this name.
        ValueError: `in_features` does not divide into blocks.
    """

    def __init__(self, in_features: int, out_features: int, type_name: str, *, bias: bool = False) -> None:
        self._start({"weight": type_name})
        self.in_features, self.out_features = in_features, out_features
        self._add_weight("weight", out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        type_name = self.types["weight"]
        x = input if self.round_input is None else self.round_input(input, type_name)
        y = ops.linear(x, self.weight, type_name, layout=self.layout)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(PackedModule, nn.Embedding):
    """Rows of a packed table, uint8 [num_embeddings, row_bytes], times `scale` (Gemma's).

    Only the rows that are asked for are decoded. The result has the dtype that the module was cast to.
    """

    def __init__(
        self, count: int, width: int, type_name: str, *, padding_idx: int | None = None, scale: float | None = None
    ) -> None:
        self._start({"weight": type_name})
        self.num_embeddings, self.embedding_dim, self.padding_idx = count, width, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False  # nn.Embedding's
        self.scale = scale
        self._add_weight("weight", count, width)
        # Follows `module.to(dtype)`, which leaves the bytes alone.
        self.register_buffer("_result", torch.empty(0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        dtype = self._result.dtype
        rows = ops.embedding(input, self.weight, self.types["weight"], dtype=dtype, layout=self.layout)
        # Rounded to the dtype first, as transformers does.
        return rows if self.scale is None else rows * torch.full((), self.scale, dtype=dtype, device=rows.device)


class PackedExperts(PackedModule):
    """Routed experts as stacks: gate and up [E, width, row_bytes], down [E, hidden, row_bytes].

    Stands where transformers has a fused experts module and is called like it. GGUF keeps gate and up apart, and they
    may have different types; without `gate_proj` among the types, experts have no gate. `shape` is that of the down
    stack: experts, hidden size, width. `apply_gate` replaces act(gate) * up for models that combine them otherwise, of
    rows that alternate where they do in transformers (`is_concatenated`).
    """

    is_transposed = False

    def __init__(
        self,
        shape: tuple[int, int, int],
        types: Mapping[str, str],
        act_fn: Callable[[Tensor], Tensor] | None,
        *,
        config: Any = None,
        apply_gate: Callable[["PackedExperts", Tensor], Tensor] | None = None,
        has_bias: bool = False,
        is_concatenated: bool = True,
    ) -> None:
        self._start({name: types[name] for name in EXPERT_PARTS if name in types})
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden, width = shape
        self.act_fn, self.config, self._combine = act_fn, config, apply_gate
        self.has_gate, self.has_bias, self.is_concatenated = "gate_proj" in types, has_bias, is_concatenated
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        for name in self.types:
            self._add_weight(name, num_experts, *shapes[name])
        if has_bias:
            first = "gate_up_proj_bias" if self.has_gate else "up_proj_bias"
            self.register_parameter(first, nn.Parameter(torch.empty(num_experts, (1 + self.has_gate) * width)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        added: Mapping[str, ExpertsProduct] | None = None,
    ) -> Tensor:
        """hidden [T, hidden_dim], expert ids [T, k], their weights [T, k] -> [T, hidden_dim].

        `added` are products that an adapter adds, by transformers' names of the fused weights: `gate_up_proj` with
        2 intermediate_dim columns in transformers' order, and `down_proj`.
        """
        inner = self._inner(hidden_states, top_k_index, added or {})  # [T, k, width]
        down = self._multiply("down_proj", inner, top_k_index)  # [T, k, hidden_dim]
        if self.has_bias:
            down = down + self.down_proj_bias[top_k_index]
        if added and "down_proj" in added:
            down = down + added["down_proj"](inner, top_k_index)
        return (down * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)

    def _inner(self, hidden_states: Tensor, experts: Tensor, added: Mapping[str, ExpertsProduct]) -> Tensor:
        fused = "gate_up_proj" if self.has_gate else "up_proj"
        more = added[fused](hidden_states, experts) if fused in added else None
        if self.has_bias:
            bias = getattr(self, f"{fused}_bias")[experts]
            more = bias if more is None else more + bias
        up = self._multiply("up_proj", hidden_states, experts)
        if not self.has_gate:
            assert self.act_fn is not None
            return self.act_fn(up if more is None else up + more)
        gate = self._multiply("gate_proj", hidden_states, experts)
        if more is not None:
            more_gate, more_up = self.split(more)
            gate, up = gate + more_gate, up + more_up
        if self._combine is not None:
            return self._combine(self, self.joined(gate, up))
        assert self.act_fn is not None
        return self.act_fn(gate) * up

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._combine is not None:
            return self._combine(self, gate_up)
        assert self.act_fn is not None
        gate, up = self.split(gate_up)
        return self.act_fn(gate) * up

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of the gate and of the other part, of what has both as transformers orders them."""
        if not self.is_concatenated:
            return gate_up[..., 0::2], gate_up[..., 1::2]
        gate, up = gate_up.chunk(2, dim=-1)
        return gate, up

    def joined(self, gate: Tensor, up: Tensor) -> Tensor:
        """Both parts as transformers orders their columns."""
        if not self.is_concatenated:
            return torch.stack([gate, up], dim=-1).flatten(-2)
        return torch.cat([gate, up], dim=-1)

    def _multiply(self, name: str, x: Tensor, experts: Tensor) -> Tensor:
        weight, type_name = getattr(self, name), self.types[name]
        x = x if self.round_input is None else self.round_input(x, type_name)
        if name in self.packed_names:
            return ops.experts_linear(x, weight, experts, type_name, layout=self.layout)
        return _dense_experts(x, weight, experts)


class PackedSortedExperts(PackedExperts):
    """Routed experts that are called with all their tokens in order, weighed before, as Llama 4's."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *, added: Mapping[str, ExpertsProduct] | None = None
    ) -> Tensor:
        """hidden [E * T, hidden_dim], the rows of an expert together -> the same shape."""
        rows = hidden_states.reshape(-1, self.hidden_dim)
        experts = torch.arange(self.num_experts, device=rows.device)
        ids = experts.repeat_interleave(len(rows) // self.num_experts)[:, None]
        return super().forward(rows, ids, torch.ones_like(ids, dtype=rows.dtype), added=added)


class PackedLatentProjection(PackedModule, nn.Linear):
    """MLA's `kv_b_proj`, latent [..., rank] -> [..., heads * (nope + value)], from the tensors that GGUF makes of it.

    k_b [heads, rank, nope] is the key part transposed, v_b [heads, value, rank] the value part. Both are decoded in
    every call: they are small, and the key part cannot be multiplied row by row.
    """

    def __init__(self, rank: int, heads: int, nope: int, value: int, types: Mapping[str, str]) -> None:
        self._start({name: types[name] for name in LATENT_PARTS})
        self.in_features, self.out_features = rank, heads * (nope + value)
        self._add_weight("k_b", heads, rank, nope)
        self._add_weight("v_b", heads, value, rank)
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Bytes of the key part: PEFT and transformers look here for a linear layer's device."""
        return self.k_b

    def forward(self, input: Tensor) -> Tensor:
        k_b, v_b = (self.dense(name, input.dtype) for name in LATENT_PARTS)
        weight = torch.cat([k_b.transpose(1, 2), v_b], dim=1)  # [heads, nope + value, rank]
        return nn.functional.linear(input, weight.reshape(self.out_features, self.in_features))


def set_layout(model: nn.Module, layout: str) -> None:
    """Rearrange the bytes of every packed weight in place: "planes" for the GPU kernels, "blocks" as stored.

    Modules that share a weight (tied embeddings) are changed together.
    """
    if layout not in (BLOCKS, PLANES):
        raise ValueError(f"`layout` must be {BLOCKS!r} or {PLANES!r}, got {layout!r}")
    convert = pack_planes if layout == PLANES else unpack_planes
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedModule) and module.layout != layout:
            for name in module.packed_names:
                weight = getattr(module, name)
                if id(weight) not in done:
                    done.add(id(weight))
                    weight.data = convert(module.types[name], weight.data)
            module.layout = layout


def choose_layout(model: nn.Module) -> None:
    """Planes when every packed weight is on a GPU that Triton can use, blocks otherwise."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    weights = [getattr(module, name) for module in modules for name in module.packed_names]
    on_gpu = bool(weights) and all(weight.is_cuda for weight in weights)
    is_planar = on_gpu and has_triton()
    set_layout(model, PLANES if is_planar else BLOCKS)
    for module in modules if is_planar else ():
        for name in module.packed_names:
            prepare(module.types[name], getattr(module, name).device)


def _dense_experts(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Experts whose weights are plain floats: x [T, C] or [T, k, C], weight [E, N, C] -> [T, k, N]."""
    inputs = x[:, None].expand(*experts.shape, x.shape[-1]) if x.dim() == 2 else x
    result = x.new_zeros(*experts.shape, weight.shape[1])
    if torch.compiler.is_compiling():  # which expert is used by whom cannot decide shapes in a graph
        for number, matrix in enumerate(weight):
            result = torch.where((experts == number)[..., None], inputs @ matrix.to(x.dtype).T, result)
        return result
    for number in experts.unique().tolist():
        slots = experts == number
        result[slots] = inputs[slots] @ weight[number].to(x.dtype).T
    return result
