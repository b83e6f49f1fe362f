"""Schemes of compressed-tensors checkpoints with weights alone quantized, as vLLM runs them, and their decoding.

    WnA16      weight_packed int32 [R, C n / 32]  weight_scale bf16 [R, C / group]  weight_shape int64 [2]
    WnA16_ASYM as well      weight_zero_point int32 [R n / 32, C / group]
    FP8        weight e4m3 [R, C]               weight_scale bf16 [R, 1]
    NVFP4A16   weight_packed uint8 [R, C / 2]   weight_scale e4m3 [R, C / 16]      weight_global_scale f32 [1]
    MXFP4A16   weight_packed uint8 [R, C / 2]   weight_scale uint8 [R, C / 32] (exponents)
    BF16       weight bf16 [R, C]

Integers are packed without gaps, zero points down their columns: bits of one number may be in two words. Names are
those of compressed-tensors' presets. Routed experts have no FP8: vLLM's fused experts take FP8 weights only together
with FP8 activations.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Literal

import torch
from torch import Tensor

from dynquant.errors import PlanError
from dynquant.formats.storage_format import StoredTensor


@dataclass(frozen=True)
class Scheme:
    """One way to store a linear layer; a `StorageFormat` once `for_shapes` has settled its group size."""

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
    has_zero_points: bool = False
    """A group has the integer that stands for 0 beside its scale. transformers (5.24) cannot load these."""
    read_since: tuple[tuple[str, str], ...] = ()
    """First versions of vLLM, experts included, and of the library that read it, where these are recent."""
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

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether groups divide the columns, and zero points, packed down the rows, end with a word."""
        return columns % self.block_size == 0 and (not self.has_zero_points or rows * self.num_bits % 32 == 0)

    def for_shapes(self, shapes: Collection[tuple[int, int]]) -> "Scheme | None":
        """Return the scheme with the first group size that fits all matrices [R, C], or None when none does."""
        grouped = map(self.grouped, self.group_sizes)
        return next((scheme for scheme in grouped if all(scheme.fits(*shape) for shape in shapes)), None)

    def parts(self, rows: int, columns: int) -> tuple[StoredTensor, ...]:
        """Return what a weight [rows, columns] is stored as; keys follow the name of the layer."""
        scale = StoredTensor("weight_scale", "BF16", (rows, columns // self.group_size if self.group_size else 1))
        if self.strategy == "none":
            return (StoredTensor("weight", "BF16", (rows, columns)),)
        if self.kind == "int":
            packed = StoredTensor("weight_packed", "I32", (rows, columns * self.num_bits // 32))
            zeros = StoredTensor("weight_zero_point", "I32", (-(-rows * self.num_bits // 32), scale.shape[1]))
            return packed, scale, StoredTensor("weight_shape", "I64", (2,)), *[zeros] * self.has_zero_points
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
        weights: dict[str, object] = {"num_bits": self.num_bits, "type": self.kind}
        weights |= {
            "symmetric": not self.has_zero_points,
            "strategy": self.strategy,
            "group_size": self.group_size or None,
            "dynamic": False,
        }
        if self.is_fp4:
            weights["scale_dtype"] = "torch.uint8" if self.strategy == "group" else "torch.float8_e4m3fn"
        unchanged = {"input_activations": None, "output_activations": None}
        return {"targets": targets, "weights": weights, **unchanged, "format": self.format}


GROUP_SIZES = (128, 64, 32)
"""Possible groups of integers, the most wanted first."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BF16 = Scheme("BF16", "dense", 16, "float", "none")


def _integers(num_bits: int, *, has_zero_points: bool = False) -> Scheme:
    name = f"W{num_bits}A16{'_ASYM' * has_zero_points}"
    versions = {8: (), 4: (("vllm", "0.23.0"),) * has_zero_points}
    recent = ("vllm", "0.31.0" if has_zero_points else "0.29.0"), ("compressed-tensors", "0.18.0")
    return Scheme(
        name, "pack-quantized", num_bits, "int", "group", GROUP_SIZES, merges_experts=not has_zero_points,
        has_zero_points=has_zero_points, read_since=versions.get(num_bits, recent),
    )  # fmt: skip


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        BF16,
        _integers(8),
        Scheme("FP8", "float-quantized", 8, "float", "channel", holds_experts=False),
        *(_integers(bits, has_zero_points=zeros) for bits in (7, 6, 5) for zeros in (True, False)),
        _integers(4, has_zero_points=True),
        _integers(4),
        Scheme("NVFP4A16", "nvfp4-pack-quantized", 4, "float", "tensor_group", (16,), merges_experts=False),
        Scheme("MXFP4A16", "mxfp4-pack-quantized", 4, "float", "group", (32,)),
        _integers(3, has_zero_points=True),
        _integers(3),
        _integers(2, has_zero_points=True),
        _integers(2),
    )
}
"""Schemes by name, the most precise first."""
DEFAULT_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if not scheme.has_zero_points)
"""Candidates of a plan that names none; transformers loads all of them."""


def vllm_scheme(name: str) -> Scheme:
    """Look up a scheme by name, in any case.

    Raises:
        PlanError: vLLM serves nothing of that name from compressed-tensors, or the installed one is too old.
    """
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        near = difflib.get_close_matches(name.upper(), SCHEMES, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PlanError(
            f"`{name}` is not a scheme that vLLM serves from a compressed-tensors checkpoint.{hint} Give any of "
            f"{', '.join(SCHEMES)}; for llama.cpp's types plan without --for vllm, or export with -f gguf."
        )
    if unread := unread_scheme(scheme):
        raise PlanError(f"{unread}. Install that version (pip install -U), or ask for other schemes.")
    return scheme


def unread_scheme(scheme: Scheme) -> str | None:
    """Return that the installed vLLM, or without one the installed library, is too old to read the scheme."""
    for package, since in scheme.read_since:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        is_recent = [int(number) for number in re.findall(r"\d+", installed)[:3]] >= [*map(int, since.split("."))]
        return None if is_recent else f"{scheme.name} takes {package} {since}, and {installed} is installed"
    return None


def fit_to_shapes(wanted: Scheme, shapes: Collection[tuple[int, int]], *, is_expert: bool) -> tuple[Scheme, str | None]:
    """Return the scheme, grouped, to take for `wanted` in matrices of these shapes, and why it is another one."""
    if is_expert and not wanted.holds_experts:
        instead, why = fit_to_shapes(SCHEMES["W8A16"], shapes, is_expert=True)
        kernels = f"vLLM's experts take no {wanted.name} weights without {wanted.name} activations: {instead.name}"
        return instead, f"{kernels}; {why}" if why else kernels
    fitting = wanted.for_shapes(shapes)
    if fitting is not None:
        return fitting, None
    if wanted.has_zero_points and (fitting := _integers(wanted.num_bits).for_shapes(shapes)):
        return fitting, f"{wanted.num_bits}-bit zero points of its rows do not fill words of 32 bits: {fitting.name}"
    instead = BF16 if is_expert else SCHEMES["FP8"]
    rows = " and ".join(map(str, sorted({columns for _, columns in shapes})))
    return instead, f"rows of {rows} do not divide into groups of {wanted.group_sizes[-1]}: {instead.name}"


def scaled(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """Return weights [R, C] of codes [R, C], stored scales and zero points [R, G], in float32 unless they are FP4's.

    The library unpacks E2M1 numbers in bfloat16, whatever the model's type is.
    """
    is_fp4 = scales.dtype == torch.uint8 or global_scale is not None
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.to(torch.float32) - 127)
    scales, group = scales.to(torch.float32), codes.shape[-1] // scales.shape[-1]
    if global_scale is not None:
        scales = scales / global_scale
    if zero_points is not None:
        codes = codes - zero_points.repeat_interleave(group, dim=-1)
    weights = codes * scales.repeat_interleave(group, dim=-1)
    return weights.to(torch.bfloat16) if is_fp4 else weights


def weights_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weights [R, C] of a layer, from its tensors by suffix."""
    scales, global_scale = parts["weight_scale"], parts.get("weight_global_scale")
    return scaled(codes_of(parts), scales, zero_points_of(parts), global_scale)


def codes_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the codes [R, C] of a layer as float32: integers, E4M3 or E2M1 numbers."""
    if "weight" in parts:
        return parts["weight"].to(torch.float32)
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int64)
        magnitudes = torch.tensor(E2M1)[nibbles & 7]
        return torch.where(nibbles >= 8, -magnitudes, magnitudes)
    columns = int(parts["weight_shape"][1])
    return _unpacked(packed, packed.shape[-1] * 32 // columns, columns)


def zero_points_of(parts: Mapping[str, Tensor]) -> Tensor | None:
    """Return the zero points [R, G] of a layer in the scale of its codes, or None."""
    packed = parts.get("weight_zero_point")
    if packed is None:
        return None
    rows, columns = parts["weight_shape"].tolist()
    return _unpacked(packed.T, parts["weight_packed"].shape[-1] * 32 // columns, rows).T


def _unpacked(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Return `count` signed integers of each row of int32, packed from the low bits up without gaps."""
    bytes_ = packed.contiguous().view(torch.uint8)
    eights = torch.nn.functional.pad(bytes_, (0, -bytes_.shape[-1] % num_bits)).unflatten(-1, (-1, num_bits))
    words = sum(eights[..., i].to(torch.int64) << (8 * i) for i in range(num_bits))
    numbers = torch.stack([(words >> (i * num_bits)) & ((1 << num_bits) - 1) for i in range(8)], dim=-1).flatten(-2)
    return numbers[:, :count].to(torch.float32) - (1 << (num_bits - 1))
