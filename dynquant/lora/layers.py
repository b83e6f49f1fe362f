"""PEFT's LoRA layers for packed weights: y = W x + (alpha / rank) B A x, with W left as the bytes that it is.

Linear layers are PEFT's own `Linear`. Routed experts have one A and one B for each expert, stored as PEFT's
`ParamWrapper` stores them for a fused parameter [E, N, C] of transformers: `lora_A` [r E, C] with the rows of an expert
together, `lora_B` [N, r E] with the columns of an expert E apart. PEFT adds B A to the whole weight in every forward
pass; here the two products run on the slots that the router chose, so no weight is ever made. What needs the weight as
numbers (DoRA, PiSSA, merging in place) is refused.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional

from dynquant.errors import AdapterError
from dynquant.packed.layers import ExpertsProduct, PackedExperts

FUSED_PARTS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of transformers' fused experts, with and without a gate, in the order in which PEFT wraps them, the
innermost first."""
_STARTS = (True, False, "gaussian", "eva")


def fused_parts(experts: PackedExperts) -> tuple[str, ...]:
    """Return the parameters that transformers has where these packed experts are."""
    return tuple(part for part in FUSED_PARTS if part == "down_proj" or experts.has_gate == (part == "gate_up_proj"))


def check_config(config: LoraConfig) -> None:
    """Refuse what computes with the base weight as numbers. Raises AdapterError: naming the option."""
    if config.init_lora_weights not in _STARTS:
        raise AdapterError(
            f"`init_lora_weights` is {config.init_lora_weights!r}, which starts from the base weights as numbers; a "
            "packed model has them as bytes. Give True, False or 'gaussian'."
        )
    for name, field in type(config).__dataclass_fields__.items():
        if field.metadata.get("is_lora_variant") and getattr(config, name):
            raise AdapterError(
                f"Packed weights take plain LoRA, and rank-stabilised LoRA, but not `{name}`. Leave it out; an adapter "
                "that has it is merged into the original model, and that exported."
            )


class _Unmergeable:
    """Merging in place would have to round to the quant type; `dynquant.lora.merge` does that with statistics."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if set(adapter_names or self.active_adapters) <= set(self.merged_adapters):
            return
        raise AdapterError(
            "PEFT cannot merge an adapter into packed weights: they have to be encoded again, under the statistics of "
            "calibration. Call `dynquant.lora.merge(model, stats=...)`, keep the adapter beside the model, or export "
            "it with `dynquant export-adapter`."
        )


class PackedLoraLinear(_Unmergeable, lora.Linear):
    """LoRA on `PackedLinear`, `PackedRows` or `PackedLatentProjection`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own sum, in one pass over the result where the dtypes allow it.

        PEFT casts x to the dtype of A and, under autocast, back again; it scales and adds B A x in passes of their own.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        is_plain = all(
            isinstance(self.lora_dropout[name], nn.Identity) and self.lora_B[name].bias is None for name in names
        )
        if args or kwargs or self.disable_adapters or self.merged or not is_plain:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        dtypes = {x.dtype, result.dtype, *(self.lora_A[name].weight.dtype for name in names)}
        if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        rows, flat = x.flatten(0, -2), result.flatten(0, -2)
        for name in names:
            inner = functional.linear(rows, self.lora_A[name].weight)
            flat = torch.addmm(flat, inner, self.lora_B[name].weight.T, alpha=self.scaling[name])
        return flat.view(result.shape).to(result.dtype)


class PackedLoraEmbedding(_Unmergeable, lora.Embedding):
    """LoRA on `PackedEmbedding`."""


class PackedLoraExperts(_Unmergeable, lora.ParamWrapper):
    """LoRA on one fused parameter of `PackedExperts`, as `gate_up_proj`; the other is wrapped around it."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts = self.experts
        self.num_experts, self._param_ndim = experts.num_experts, 3
        # PEFT takes the dimensions as they lie in the parameter [E, N, C], and swaps them itself.
        if self.parameter_name != "down_proj":
            return (1 + experts.has_gate) * experts.intermediate_dim, experts.hidden_dim
        return experts.hidden_dim, experts.intermediate_dim

    @property
    def experts(self) -> PackedExperts:
        return self.get_base_layer()

    @property
    def part_names(self) -> tuple[str, ...]:
        """Packed weights that the parameter stands for, in the order of its rows."""
        return ("gate_proj", "up_proj") if self.parameter_name == "gate_up_proj" else (self.parameter_name,)

    def get_param(self) -> Tensor:
        """PEFT looks here for the device."""
        return getattr(self.experts, self.part_names[0])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [E, r, C] and B [E, N, r] of every expert."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return a.unflatten(0, (self.num_experts, -1)), b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)

    def forward(
        self, x: Tensor, *routing: Tensor, added: dict[str, ExpertsProduct] | None = None, **kwargs: Any
    ) -> Tensor:
        """Called like the experts that it wraps."""
        self._check_forward_args(x, *routing, **kwargs)
        active = [name for name in self.active_adapters if name in self.lora_A]
        if active and not self.disable_adapters:
            added = {**(added or {}), self.parameter_name: lambda x, ids: self._products(x, ids, active)}
        # An experts module that nothing is added to may be a bare one with transformers' signature.
        options = {"added": added} if added else {}
        return self.base_layer(x, *routing, **options)

    def _products(self, x: Tensor, ids: Tensor, adapters: list[str]) -> Tensor:
        products = [self.scaling[name] * grouped_low_rank(x, ids, *self.factors(name)) for name in adapters]
        return sum(products[1:], products[0]).to(x.dtype)


def grouped_low_rank(x: Tensor, ids: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B_e A_e x for the experts of every token.

    Slots are sorted by expert, so that each of the two products is one grouped matrix product.

    Args:
        x: [T, C], or [T, k, C] with a row for every slot.
        ids: experts [T, k]. An id outside 0 to E - 1 is held by another rank: its product is zero.
        a: [E, r, C].
        b: [E, N, r].

    Returns:
        [T, k, N] in the dtype of the factors, or in that of autocast.
    """
    # As transformers' experts do it: torch's grouped product where device, dtype and version have it, a loop elsewhere.
    from transformers.integrations.moe import _grouped_mm

    num_experts = a.shape[0]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else a.dtype
    if missing := -a.shape[1] % 8:
        # Grouped products want strides of 16 bytes, and zeros add nothing.
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    is_here = (ids >= 0) & (ids < num_experts)
    slots = ids.clamp(0, num_experts - 1).flatten()  # ids of other ranks count as some expert, and are zeroed below
    order = slots.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
    ends = counts.scatter_add(0, slots.long(), torch.ones_like(slots, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    rows = x[order // ids.shape[1]] if x.dim() == 2 else x.flatten(0, 1)[order]
    inner = _grouped_mm(rows.to(dtype), a.to(dtype).transpose(1, 2), ends)
    outer = _grouped_mm(inner, b.to(dtype).transpose(1, 2).contiguous(), ends)
    result = torch.empty_like(outer).index_copy_(0, order, outer).unflatten(0, ids.shape)
    return torch.where(is_here[..., None], result, 0)
