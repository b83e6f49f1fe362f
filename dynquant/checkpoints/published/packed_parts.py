"""Weights that published checkpoints store in several integer tensors, and what these stand for.

MXFP4 (gpt-oss): experts NAME [E, columns, rows] are `NAME_blocks` [E, rows, columns / 32, 16], whose byte j holds the
columns 2j (low) and 2j + 1, and `NAME_scales` [E, rows, columns / 32], powers of two. ggml's blocks have the same codes
and powers, with column j beside column j + 16, so they are made without rounding.

GPTQ: NAME.weight [rows, columns] is `qweight` int32 [columns * bits / 32, rows], `qzeros` [groups, rows * bits / 32],
`scales` [groups, rows] and perhaps `g_idx` [columns], the group of a column. AWQ has `qweight` [columns, rows / 8] and
the same groups, each eight rows in the order 0, 2, 4, 6, 1, 3, 5, 7. A weight is (code - zero) * scale; GPTQ's first
format stores zero - 1.

compressed-tensors: the schemes of `formats.vllm_schemes`, without quantized activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dynquant.checkpoints.safetensors_format import FileSpan
from dynquant.errors import CheckpointError
from dynquant.formats.plain_quants import decode_mxfp4, pack_mxfp4
from dynquant.formats.vllm_schemes import SCHEMES, weights_of

ReadPart = Callable[[str, int | slice | None], Tensor]
"""Stored name, and slice or range of its first dimension -> the tensor as stored."""

MXFP4_BLOCK = 32
"""Weights of a block of MXFP4."""
_BLOCKS, _SCALES = "_blocks", "_scales"
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INTEGER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED_PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
)


class PackedTensor(Protocol):
    """One tensor of a model, stored as `parts`."""

    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Stored names."""

    def values(self, read: ReadPart, index: int | slice | None) -> Tensor:
        """Return the weights, or a slice or range of their first dimension, in a type that holds them exactly."""


@dataclass(frozen=True)
class Mxfp4Experts:
    """Experts [E, columns, rows] of gpt-oss."""

    name: str
    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return self.name + _BLOCKS, self.name + _SCALES

    def codes(self, read: ReadPart, index: int | slice | None) -> tuple[Tensor, Tensor]:
        """Return uint8 codes [..., rows, columns] and powers [..., rows, columns / 32]."""
        blocks, powers = (read(part, index) for part in self.parts)
        return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-3), powers

    def values(self, read: ReadPart, index: int | slice | None) -> Tensor:
        codes, powers = self.codes(read, index)
        values = decode_mxfp4(ggml_blocks(codes, powers).view(-1, 17)).to(torch.bfloat16)  # a bit of mantissa each
        return values.view(codes.shape).transpose(-1, -2)


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [rows, columns] of GPTQ or AWQ."""

    prefix: str
    shape: tuple[int, ...]
    bits: int
    is_awq: bool
    zero_offset: int
    """Added to a stored zero."""
    has_groups: bool
    """True when `g_idx` gives the group of each column."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}.{part}" for part in _INTEGER_PARTS[: 3 + self.has_groups])

    def values(self, read: ReadPart, index: int | slice | None) -> Tensor:
        codes, zeros, scales, *groups = (read(part, None) for part in self.parts)
        dimension = 1 if self.is_awq else 0
        codes, zeros = self._unpacked(codes, dimension), self._unpacked(zeros, 1)
        zeros = (zeros + self.zero_offset) & ((1 << self.bits) - 1)
        columns, num_groups = self.shape[1], len(scales)
        group = groups[0].long() if groups else torch.arange(columns) // -(-columns // num_groups)
        weights = ((codes - zeros[group]).float() * scales.float()[group]).T.contiguous()
        return weights if index is None else weights[index]

    def _unpacked(self, packed: Tensor, dimension: int) -> Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (packed.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)
        if self.is_awq:
            codes = codes[..., torch.tensor(_AWQ_ORDER).argsort()]
        return codes.movedim(-1, dimension + 1).flatten(dimension, dimension + 1)


@dataclass(frozen=True)
class CompressedMatrix:
    """A matrix [rows, columns] of compressed-tensors."""

    prefix: str
    shape: tuple[int, ...]
    suffixes: tuple[str, ...]
    scheme: str
    """Its name in `vllm_schemes`."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}.{suffix}" for suffix in self.suffixes)

    def values(self, read: ReadPart, index: int | slice | None) -> Tensor:
        weights = weights_of(dict(zip(self.suffixes, (read(part, None) for part in self.parts), strict=True)))
        return weights if index is None else weights[index]


def ggml_blocks(codes: Tensor, powers: Tensor) -> Tensor:
    """Return ggml's MXFP4 blocks, uint8 [..., columns / 32 * 17], of codes [..., columns] and powers of their 32s."""
    return pack_mxfp4(powers.reshape(-1), codes.reshape(-1, MXFP4_BLOCK)).view(*powers.shape[:-1], -1)


def packed_tensors(spans: Mapping[str, FileSpan], quantization: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """Return the tensors that are stored in parts, by their name in the model.

    Raises:
        CheckpointError: parts are missing or do not fit each other, or are of a layout that is not known.
    """
    packed: dict[str, PackedTensor] = {}
    method = quantization.get("quant_method")
    for name, span in spans.items():
        if name.endswith(_BLOCKS) and span.dtype == "U8" and method == "mxfp4":
            experts = _experts(spans, name.removesuffix(_BLOCKS))
            packed[experts.name] = experts
        elif name.endswith(".qweight") and method in ("gptq", "awq"):
            prefix = name.removesuffix(".qweight")
            packed[f"{prefix}.weight"] = _matrix(spans, prefix, quantization)
        elif name.endswith(".weight_scale") and method == "compressed-tensors" and has_known_schemes(quantization):
            prefix = name.removesuffix(".weight_scale")
            packed[f"{prefix}.weight"] = _compressed(spans, prefix, quantization)
    return packed


def has_known_schemes(quantization: Mapping[str, Any]) -> bool:
    """Return whether `quantization_config` of compressed-tensors has no schemes but those of `vllm_schemes`."""
    groups = quantization.get("config_groups")
    is_rotated = bool(quantization.get("transform_config"))  # weights of other activations than the model's own
    if not isinstance(groups, dict) or quantization.get("quantization_status") != "compressed" or is_rotated:
        return False
    stated = [group for group in groups.values() if isinstance(group, dict) and isinstance(group.get("weights"), dict)]
    formats = {scheme.format for scheme in SCHEMES.values() if scheme.is_quantized}
    return len(stated) == len(groups) and all(
        group.get("input_activations") is None
        and (group.get("format") or quantization.get("format")) in formats
        and group["weights"].get("strategy") in ("group", "tensor_group", "channel")
        for group in stated
    )


def _compressed(spans: Mapping[str, FileSpan], prefix: str, quantization: Mapping[str, Any]) -> CompressedMatrix:
    stated = {group["weights"].get("num_bits") for group in quantization["config_groups"].values()}
    stored = {part: spans[f"{prefix}.{part}"] for part in _COMPRESSED_PARTS if f"{prefix}.{part}" in spans}
    shapes = {part: span.shape for part, span in stored.items()}
    try:
        codes = stored.get("weight") or stored["weight_packed"]
        rows, columns = codes.shape
        bits: float = {"F8_E4M3": 8, "U8": 4, "I32": 0}[codes.dtype]
        if codes.dtype == "U8":
            columns *= 2
        elif codes.dtype == "I32":
            columns = int(stored["weight_shape"].read()[1])
            bits = codes.shape[1] * 32 / columns
        groups = shapes["weight_scale"][1]
        zeros = (-(-rows * bits // 32), groups)
        fits = shapes["weight_scale"] == (rows, groups) and shapes.get("weight_zero_point", zeros) == zeros
        # Numbers of 7 bits are four to a word in versions before 0.18, as those of 8 are.
        fits = fits and bits in range(1, 9) and columns % groups == 0 and (codes.dtype != "I32" or bits in stated)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"`{prefix}` is stored for compressed-tensors in {shapes!r:.300}, which do not fit each other, or are "
            "packed as its versions before 0.18 pack 3, 5, 6 and 7 bits. Fetch the checkpoint again, or make it with a "
            "newer version."
        )
    scheme = {"F8_E4M3": "FP8", "U8": "NVFP4A16" if "weight_global_scale" in stored else "MXFP4A16"}.get(codes.dtype)
    asymmetric = "_ASYM" * ("weight_zero_point" in stored)
    return CompressedMatrix(prefix, (rows, columns), tuple(stored), scheme or f"W{bits:.0f}A16{asymmetric}")


def _experts(spans: Mapping[str, FileSpan], name: str) -> Mxfp4Experts:
    blocks, powers = spans[name + _BLOCKS], spans.get(name + _SCALES)
    if powers is None or powers.dtype != "U8" or powers.shape != blocks.shape[:-1] or blocks.shape[3:] != (16,):
        stored = "nothing" if powers is None else f"{powers.dtype} {list(powers.shape)}"
        raise CheckpointError(
            f"{blocks.path} stores `{name}` as MXFP4 blocks {list(blocks.shape)} and, as `{name}{_SCALES}`, {stored}. "
            "Needed are U8 [experts, rows, blocks, 16] and U8 [experts, rows, blocks]. Fetch the checkpoint again."
        )
    experts, rows, num_blocks = powers.shape
    return Mxfp4Experts(name, (experts, MXFP4_BLOCK * num_blocks, rows))


def _matrix(spans: Mapping[str, FileSpan], prefix: str, quantization: Mapping[str, Any]) -> IntegerMatrix:
    stored = {part: spans[f"{prefix}.{part}"] for part in _INTEGER_PARTS if f"{prefix}.{part}" in spans}
    is_awq = quantization["quant_method"] == "awq"
    bits, version = quantization.get("bits", 4), str(quantization.get("version", "gemm")).lower()
    is_readable = version == "gemm" and bits == 4 if is_awq else bits in (2, 4, 8)
    shapes = {part: span.shape for part, span in stored.items()}
    try:
        values = 32 // bits
        packed = shapes["qweight"]
        rows, columns = (packed[1] * values, packed[0]) if is_awq else (packed[1], packed[0] * values)
        groups = shapes["scales"][0]
        fits = (
            shapes["scales"] == (groups, rows)
            and shapes["qzeros"] == (groups, -(-rows // values))
            and shapes.get("g_idx", (columns,)) == (columns,)
            and len(packed) == 2
        )
    except (KeyError, IndexError, TypeError, ZeroDivisionError):
        fits = False
    if not is_readable or not fits or {stored[part].dtype for part in ("qweight", "qzeros")} != {"I32"}:
        raise CheckpointError(
            f"`{prefix}` is stored as {quantization['quant_method']} of {bits!r:.20} bits (version {version:.20}) in "
            f"{ {part: list(shape) for part, shape in shapes.items()} }, a layout that dynquant does not read; it "
            "knows GPTQ of 2, 4 and 8 bits and AWQ's GEMM layout of 4. Take the BF16 or F16 checkpoint."
        )
    offset = 0 if is_awq or quantization.get("checkpoint_format") == "gptq_v2" else 1
    return IntegerMatrix(prefix, (rows, columns), bits, is_awq, offset, "g_idx" in stored)
