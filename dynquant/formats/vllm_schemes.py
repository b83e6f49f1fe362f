"""Schemes of compressed-tensors checkpoints with weights alone quantized, as vLLM runs them: plain data.

    W4A16      weight_packed int32 [R, C / 8]   weight_scale bf16 [R, C / group]   weight_shape int64 [2]
    W8A16      weight_packed int32 [R, C / 4]   weight_scale bf16 [R, C / group]   weight_shape int64 [2]
    FP8        weight e4m3 [R, C]               weight_scale bf16 [R, 1]
    NVFP4A16   weight_packed uint8 [R, C / 2]   weight_scale e4m3 [R, C / 16]      weight_global_scale f32 [1]
    MXFP4A16   weight_packed uint8 [R, C / 2]   weight_scale uint8 [R, C / 32] (exponents)
    BF16       weight bf16 [R, C]

Names are those of compressed-tensors' presets. Routed experts have no FP8: vLLM's fused experts take FP8 weights only
together with FP8 activations.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from dynquant.errors import PlanError
from dynquant.formats.storage_format import StoredTensor


@dataclass(frozen=True)
class Scheme:
    """One way to store a linear layer; a `StorageFormat` once `for_rows` has settled its group size."""

    name: str
    format: str
    num_bits: int
    kind: Literal["int", "float"]
    strategy: Literal["group", "tensor_group", "channel", "none"]
    group_sizes: tuple[int, ...] = (0,)
    """Possible group sizes, the most wanted first; (0,) is one scale for a row."""
    holds_experts: bool = True
    """vLLM has fused-experts kernels for it."""
    merges_experts: bool = True
    """transformers merges such experts into its fused tensors when it loads them."""
    group_size: int = 0
    """Weights of a row that share a scale; 0 for the whole row."""

    @property
    def is_quantized(self) -> bool:
        return self.strategy != "none"

    @property
    def is_fp4(self) -> bool:
        return self.kind == "float" and self.num_bits == 4

    @property
    def block_size(self) -> int:
        return self.group_size or 1

    def grouped(self, group_size: int) -> "Scheme":
        """Return the scheme with this group size."""
        return replace(self, group_size=group_size)

    def for_rows(self, row_lengths: Collection[int]) -> "Scheme | None":
        """Return the scheme with the first group size that divides all rows, or None when none does."""
        fitting = (g for g in self.group_sizes if g == 0 or all(length % g == 0 for length in row_lengths))
        return next(map(self.grouped, fitting), None)

    def parts(self, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        """Return what a weight [rows, columns] is stored as; keys follow the name of the layer."""
        scale = StoredTensor("weight_scale", "BF16", (rows, columns // self.group_size if self.group_size else 1))
        if self.strategy == "none":
            return (StoredTensor("weight", "BF16", (rows, columns)),)
        if self.kind == "int":
            packed = StoredTensor("weight_packed", "I32", (rows, columns * self.num_bits // 32))
            return packed, scale, StoredTensor("weight_shape", "I64", (2,))
        if self.num_bits == 8:
            return StoredTensor("weight", "F8_E4M3", (rows, columns)), scale
        packed = StoredTensor("weight_packed", "U8", (rows, columns // 2))
        if self.strategy == "group":
            return packed, scale._replace(dtype="U8")  # exponents of E8M0
        return packed, scale._replace(dtype="F8_E4M3"), StoredTensor("weight_global_scale", "F32", (1,))

    def tensor_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of one matrix [R, C] or of a stack [E, R, C]."""
        return prod(shape[:-2]) * sum(part.num_bytes for part in self.parts(shape[-2], shape[-1]))

    def config_group(self, targets: list[str]) -> dict[str, object]:
        """Return an entry of `config_groups` in config.json."""
        weights: dict[str, object] = {"num_bits": self.num_bits, "type": self.kind, "symmetric": True}
        weights |= {"strategy": self.strategy, "group_size": self.group_size or None, "dynamic": False}
        if self.is_fp4:
            weights["scale_dtype"] = "torch.uint8" if self.strategy == "group" else "torch.float8_e4m3fn"
        unchanged = {"input_activations": None, "output_activations": None}
        return {"targets": targets, "weights": weights, **unchanged, "format": self.format}


BF16 = Scheme("BF16", "dense", 16, "float", "none")
_GROUPS = (128, 64, 32)
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        BF16,
        Scheme("W8A16", "pack-quantized", 8, "int", "group", _GROUPS),
        Scheme("FP8", "float-quantized", 8, "float", "channel", holds_experts=False),
        Scheme("W4A16", "pack-quantized", 4, "int", "group", _GROUPS),
        Scheme("NVFP4A16", "nvfp4-pack-quantized", 4, "float", "tensor_group", (16,), merges_experts=False),
        Scheme("MXFP4A16", "mxfp4-pack-quantized", 4, "float", "group", (32,)),
    )
}
"""Schemes by name, the most precise first."""


def vllm_scheme(name: str) -> Scheme:
    """Look up a scheme by name, in any case.

    Raises:
        PlanError: vLLM serves nothing of that name from compressed-tensors.
    """
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        near = difflib.get_close_matches(name.upper(), SCHEMES, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PlanError(
            f"`{name}` is not a scheme that vLLM serves from a compressed-tensors checkpoint.{hint} Give any of "
            f"{', '.join(SCHEMES)}; for llama.cpp's types export with -f gguf."
        )
    return scheme


def fit_to_rows(wanted: Scheme, row_lengths: Collection[int], *, is_expert: bool) -> tuple[Scheme, str | None]:
    """Return the scheme, grouped, to take for `wanted` in rows of these lengths, and why it is another one."""
    if is_expert and not wanted.holds_experts:
        instead, why = fit_to_rows(SCHEMES["W8A16"], row_lengths, is_expert=True)
        kernels = f"vLLM's experts take no {wanted.name} weights without {wanted.name} activations: {instead.name}"
        return instead, f"{kernels}; {why}" if why else kernels
    fitting = wanted.for_rows(row_lengths)
    if fitting is not None:
        return fitting, None
    instead = BF16 if is_expert else SCHEMES["FP8"]
    rows = " and ".join(map(str, sorted(set(row_lengths))))
    return instead, f"rows of {rows} do not divide into groups of {wanted.group_sizes[-1]}: {instead.name}"
