"""A directory of safetensors files as a tensor source, and its weights as stored: floats, or FP8 with block scales.

FP8 checkpoints (DeepSeek V3, R1, Qwen3) store a matrix as F8_E4M3 beside `NAME_scale_inv`, float32 or bfloat16
[rows / b, columns / b] rounded up, or one number (Mistral); a weight is its value times the scale of its block. Kept as
stored, a layer takes a quarter of its float32. What is stored in integers is decoded when it is read (`packed_parts`).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.checkpoints.published.packed_parts import CompressedMatrix, Mxfp4Experts, packed_tensors
from dynquant.checkpoints.safetensors_format import TORCH_DTYPES, FileSpan, spans_of
from dynquant.checkpoints.tensor_source import GGML_NAMES, TensorInfo
from dynquant.errors import CheckpointError, unreadable
from dynquant.formats.plain_quants import DTYPE_BYTES
from dynquant.storage.file_kinds import folder_content
from dynquant.storage.strict_json import parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = ("*model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WRAPPERS = {
    r"\.lora_[AB]\.|\.base_layer\.": "it was saved with an adapter that is not merged. Call `merge_and_unload` before "
    "`save_pretrained`, or start from the base model",
    r"^base_model\.model\.": "it was saved with PEFT's wrapper around it. Save `model.merge_and_unload()`, or take "
    "`base_model.model.` off the names",
    r"(^|\.)_orig_mod\.": "it was saved with torch.compile's wrapper around it. Save `model._orig_mod`, or take "
    "`_orig_mod.` out of the names",
    r"(^|\.)_fsdp_wrapped_module\.|^module\.": "it was saved with the wrapper of distributed training around it. Save "
    "`model.module`, or take the prefix off the names",
}
"""Parts of tensor names that no model has, for none of which transformers finds a parameter -> where they come from."""
_FLOAT_DTYPES = {"F32", "F16", "BF16"}
_FP8 = "F8_E4M3"
_SCALE_SUFFIX = "_scale_inv"
_ACTIVATION_SCALES = ("activation_scale", "input_scale")
"""Ends of names of tensors by which some FP8 kernels round activations; weights do not depend on them."""
_READ_AS_INPUT = {"fp8": _FP8, "mxfp4": "U8"}
"""`quant_method` of checkpoints that are quantized again -> type of their quantized tensors."""
_SAMPLED = 64


@dataclass(frozen=True)
class StoredValues:
    """`data` [..., rows, columns]; FP8 comes with `scale` [..., block rows, block columns], `block` (rows, columns)."""

    data: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (128, 128)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values; FP8 is scaled in float32 and rounded once."""
        if self.scale is None:
            return self.data.to(dtype)
        return self._scaled(self.data.to(torch.float32)).to(dtype)

    def write_to(self, out: Tensor) -> None:
        """Give a tensor of the same shape the values, as `to` its type."""
        if self.scale is None:
            out.copy_(self.data)
        elif out.dtype == torch.float32:
            self._scaled(out.copy_(self.data))
        else:
            out.copy_(self.to(out.dtype))

    def _scaled(self, values: Tensor) -> Tensor:
        """Multiplies float32 values of `data` with their scales, in place."""
        assert self.scale is not None
        block_rows, block_columns = self.block
        columns = values.shape[-1]
        for number in range(self.scale.shape[-2]):
            scales = self.scale[..., number, :].repeat_interleave(block_columns, -1)[..., :columns]
            values.narrow(-2, number * block_rows, min(block_rows, values.shape[-2] - number * block_rows)).mul_(
                scales.unsqueeze(-2)
            )
        return values

    def moved(self, device: torch.device | str) -> "StoredValues":
        """The same on another device."""
        return StoredValues(self.data.to(device), None if self.scale is None else self.scale.to(device), self.block)


class SafetensorsSource:
    """One `model.safetensors`, or the shards of `model.safetensors.index.json`, in a directory.

    FP8 matrices with scales, and tensors in integer parts, appear as one tensor of the float type that config.json
    states; scales and parts are not listed.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, the index names a file outside the directory, a tensor
            has a dtype that is not F32, F16, BF16 or FP8 with scales, or scales do not fit their matrix.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._spans = checkpoint_spans(directory)
        stated = _config_of(directory) if any(s.dtype not in _FLOAT_DTYPES for s in self._spans.values()) else {}
        quantization = stated.get("quantization_config") or {}
        self._packed = packed_tensors(self._spans, quantization)
        parts = {part for tensor in self._packed.values() for part in tensor.parts}
        fp8 = (name for name, span in self._spans.items() if span.dtype == _FP8 and name not in parts)
        self._scale_of = {name: f"{name}{_SCALE_SUFFIX}" for name in fp8}
        self._block, self._float = _fp8_layout(directory, stated)
        hidden = {*self._scale_of.values(), *parts}
        if self._scale_of:
            hidden |= {name for name in self._spans if name.endswith(_ACTIVATION_SCALES)}
        infos = {name: TensorInfo(name, tensor.shape, self._float) for name, tensor in self._packed.items()}
        infos |= {name: self._read_info(name) for name in self._spans if name not in hidden}
        self._info = dict(sorted(infos.items()))

    @property
    def is_quantized(self) -> bool:
        """True when a tensor is stored as FP8 or in integers."""
        return bool(self._scale_of or self._packed)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every stored tensor's name, dtype, shape and two samples of 64 values."""
        digest = hashlib.sha256()
        for name, span in sorted(self._spans.items()):
            digest.update(f"{name}{span.dtype}{span.shape}".encode())
            for row in (0, span.shape[0] // 2) if span.shape and prod(span.shape) else ():
                sample = span.read(row, count=min(_SAMPLED, span.row_values)).to(torch.float32)
                digest.update(sample.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._info)

    def info(self, name: str) -> TensorInfo:
        return self._info[name]

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        if not isinstance(index, slice) or name not in self._scale_of or len(self._info[name].shape) > 2:
            return self.stored(name, index).to(torch.float32)
        block_rows = self._block_of(name)[0]
        first = index.start // block_rows * block_rows  # the rows of a block share scales
        return self.stored(name, slice(first, index.stop)).to(torch.float32)[index.start - first :]

    def stored(self, name: str, index: int | slice | None = None) -> StoredValues:
        """The tensor, or a slice or range of its first dimension, in the types of the file.

        A range of the rows of an FP8 matrix starts with a block.
        """
        scale = self._scale_of.get(name)
        try:
            if name in self._packed:
                return StoredValues(self._packed[name].values(self._read_part, index))
            data = self._spans[name].read(index)
            if scale is None:
                return StoredValues(data)
            if isinstance(index, int) and data.dim() < 2:
                raise ValueError(f"`{name}` is one FP8 matrix; its rows share scales and are not read alone")
            block = self._block_of(name)
            if prod(self._spans[scale].shape) == 1:
                return StoredValues(data, self._spans[scale].read().float().reshape(1, 1), block)
            if isinstance(index, slice) and data.dim() == 2:
                index = slice(index.start // block[0], -(-index.stop // block[0]))
            return StoredValues(data, self._spans[scale].read(index).float(), block)
        except OSError as error:
            raise CheckpointError(f"`{name}` cannot be read ({error}). Fetch the file again.") from error

    def mxfp4_codes(self, name: str, index: int | slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and powers of experts that `is_mxfp4`, as `Mxfp4Experts.codes` does."""
        packed = self._packed[name]
        assert isinstance(packed, Mxfp4Experts)
        return packed.codes(self._read_part, index)

    def is_mxfp4(self, name: str) -> bool:
        """Return whether `mxfp4_codes` has this tensor."""
        return isinstance(self._packed.get(name), Mxfp4Experts)

    def compressed_scheme(self, name: str) -> str | None:
        """Return the scheme of a matrix of compressed-tensors, or None."""
        packed = self._packed.get(name)
        return packed.scheme if isinstance(packed, CompressedMatrix) else None

    def compressed_parts(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a matrix that has a `compressed_scheme`, by suffix."""
        packed = self._packed[name]
        assert isinstance(packed, CompressedMatrix)
        return {suffix: self._spans[f"{packed.prefix}.{suffix}"].read() for suffix in packed.suffixes}

    def compressed_scale_type(self, name: str) -> torch.dtype:
        """Return the type of the scales of a matrix that has a `compressed_scheme`."""
        packed = self._packed[name]
        assert isinstance(packed, CompressedMatrix)
        return TORCH_DTYPES[self._spans[f"{packed.prefix}.weight_scale"].dtype]

    def stored_bytes(self, name: str) -> int:
        """Return the bytes that `stored` takes in memory."""
        if name in self._packed:  # decoded
            return prod(self._info[name].shape) * DTYPE_BYTES["BF16" if self.is_mxfp4(name) else "F32"]
        parts = [self._spans[part] for part in (name, self._scale_of.get(name)) if part is not None]
        return sum(prod(span.shape) * DTYPE_BYTES[span.dtype] for span in parts)

    def _read_part(self, name: str, index: int | slice | None) -> torch.Tensor:
        return self._spans[name].read(index)

    def _block_of(self, name: str) -> tuple[int, int]:
        """Return rows and columns of a block: the whole matrix under one scale."""
        rows, columns = self._spans[name].shape[-2:]
        return (rows, columns) if prod(self._spans[self._scale_of[name]].shape) == 1 else self._block

    def _read_info(self, name: str) -> TensorInfo:
        span = self._spans[name]
        if span.dtype == _FP8:
            self._check_scales(name)
            return TensorInfo(name, span.shape, self._float)
        if span.dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{span.path} stores `{name}` as {span.dtype}; only F32, F16 and BF16 checkpoints, and FP8 (F8_E4M3) "
                "with block scales, can be read. Convert the checkpoint to bfloat16 first; tables of whole numbers "
                "have no place here."
            )
        return TensorInfo(name, span.shape, span.dtype)

    def _check_scales(self, name: str) -> None:
        span, scale = self._spans[name], self._spans.get(self._scale_of[name])
        if scale is None:
            raise CheckpointError(
                f"{span.path} stores `{name}` as {_FP8}, but the checkpoint has no `{self._scale_of[name]}`, so its "
                "values are unknown. The download is incomplete, or the scales are of a kind that dynquant does not "
                "read; convert the checkpoint to bfloat16."
            )
        blocks = tuple(-(-size // block) for size, block in zip(span.shape[-2:], self._block, strict=False))
        expected = (*span.shape[:-2], *blocks)
        fits = scale.shape == expected or (prod(scale.shape) == 1 and len(span.shape) == 2)
        if len(span.shape) < 2 or not fits or scale.dtype not in ("F32", "BF16"):
            raise CheckpointError(
                f"{scale.path} stores `{self._scale_of[name]}` as {scale.dtype} {list(scale.shape)}, but `{name}` "
                f"{list(span.shape)} in blocks of {self._block[0]} x {self._block[1]} needs F32 or BF16 "
                f"{list(expected)}, or one number. "
                "Check `weight_block_size` in config.json, or convert the checkpoint to bfloat16."
            )


def _config_of(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = parse_json(path.read_bytes()) if path.is_file() else {}
        quantization = config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise ValueError(f"`quantization_config` is a {type(quantization).__name__}")
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            unreadable(path, error) or f"{path} does not describe quantized weights ({error}). Fetch the file again."
        ) from error
    return config


def _fp8_layout(directory: Path, config: Mapping[str, Any]) -> tuple[tuple[int, int], str]:
    """Rows and columns of a block, and the float type that the model computes in."""
    size = (config.get("quantization_config") or {}).get("weight_block_size")
    block = (128, 128) if size is None else tuple(size) if isinstance(size, list) else ()
    if len(block) != 2 or not all(isinstance(count, int) and count > 0 for count in block):
        raise CheckpointError(
            f"{directory / 'config.json'} does not describe FP8 weights: `weight_block_size` is {size!r:.80}, and "
            "is to be two positive numbers, as [128, 128]. Fetch the file again."
        )
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
    return (block[0], block[1]), GGML_NAMES.get(dtype, "BF16")


def checkpoint_spans(directory: Path) -> dict[str, FileSpan]:
    """Return the places of a checkpoint's tensors, in order of names: all that transformers reads, from headers alone.

    Names are those of `names_with_output`.

    Raises:
        CheckpointError: no weights; a file that is missing, truncated, corrupt or not that of the index; weights of
            which programs read different ones; or names that a training wrapper left.
    """
    single, files = directory / SINGLE_NAME, {}
    if (directory / INDEX_NAME).is_file():
        files = read_weight_map(directory)
    elif not single.is_file():
        raise no_weights(directory)
    paths = sorted(set(files.values())) or [single]
    if single.is_file() and paths != [single]:
        raise CheckpointError(
            f"{directory} holds two sets of weights: {SINGLE_NAME}, which transformers reads, and the {len(paths)} "
            f"files of {INDEX_NAME}, which vLLM reads. Move the one that is not meant out of the directory."
        )
    spans: dict[str, FileSpan] = {}
    for path, held in ((path, spans_of(path)) for path in paths):
        lost = [name for name, place in files.items() if place == path and name not in held]
        if lost:
            raise CheckpointError(
                f"{path} does not hold `{lost[0]}`, which {INDEX_NAME} places there: the two are of different "
                "versions. Fetch both again, or, if no tensor is missing, write both anew by `save_pretrained` of "
                "transformers."
            )
        if twice := spans.keys() & held.keys():
            raise CheckpointError(
                f"`{min(twice)}` is stored twice, in {spans[min(twice)].path} and in {path}. The directory mixes two "
                "checkpoints; fetch it again."
            )
        spans |= held
    for pattern, origin in _WRAPPERS.items():
        if wrapped := next((name for name in spans if re.search(pattern, name)), None):
            raise CheckpointError(f"{directory} holds `{wrapped}`: {origin}.")
    called = names_with_output(spans)
    return dict(sorted((called[name], span) for name, span in spans.items()))


def names_with_output(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a checkpoint's tensors in the model that has an output, by the stored names.

    Checkpoints saved without the output (of `AutoModel`, as many that embed texts are) lack `model.` before all names,
    which transformers adds.
    """
    stored = list(names)
    if "embed_tokens.weight" not in stored or any(name.startswith("model.") for name in stored):
        return {name: name for name in stored}
    return {name: name if name.startswith("lm_head.") else f"model.{name}" for name in stored}


def weight_files(directory: Path) -> list[Path]:
    """Return the files that `checkpoint_spans` reads."""
    return sorted({span.path for span in checkpoint_spans(directory).values()})


def refuse_quantized(directory: Path, quantization: object) -> None:
    """Raise CheckpointError for what config.json says of quantized weights, but for FP8 with scales and gpt-oss' MXFP4.

    `quantization` is the entry `quantization_config`; "already quantized" is said only of tensors that are.
    """
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    stored = [
        (name, span.dtype) for name, span in checkpoint_spans(directory).items() if span.dtype not in _FLOAT_DTYPES
    ]
    if not stored:
        raise CheckpointError(
            f"{directory}/config.json says that the weights are quantized ({method!r:.80}), but all are stored as "
            "floats. If that is what they should be, take `quantization_config` out of config.json."
        )
    if _READ_AS_INPUT.get(str(method)) not in dict(stored).values():
        raise CheckpointError(
            f"The weights of {directory} are already quantized ({method!r:.80}; `{stored[0][0]}` is stored as "
            f"{stored[0][1]}), and neither as FP8 matrices with scales nor as MXFP4 experts. Start from the BF16, F16 "
            "or FP8 checkpoint; `dynquant eval` takes this one as it is."
        )


def read_weight_map(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, of model.safetensors.index.json, in order of names.

    Raises:
        CheckpointError: damaged, or it names a file outside the directory or one that is not safetensors.
    """
    index = directory / INDEX_NAME
    try:
        weight_map = dict(parse_json(index.read_bytes(), unique_names=True)["weight_map"])
        files = {name: Path(weight_map[name]) for name in sorted(weight_map)}
        if not files:
            raise ValueError("it places no tensor")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            unreadable(index, error) or f"{index} is not a safetensors index ({error}). Fetch it again."
        ) from error
    for name, path in files.items():
        if path.name != weight_map[name] or path.name == ".." or "\\" in path.name:
            raise CheckpointError(f"{index} points outside its directory for `{name}`: {weight_map[name]!r}.")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{index} places {name!r} in {path.name!r}, which is no .safetensors file.")
    return {name: directory / path for name, path in files.items()}


def no_weights(directory: Path) -> CheckpointError:
    """The refusal of a directory without safetensors files. Pickled weights are named, and why they stay unopened."""
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        return CheckpointError(
            f"{directory} holds its weights as {pickled[0]}, a pickle. Opening one can run any code that its author "
            "put in, so dynquant opens none. Fetch the safetensors files, which most hubs have; or, if you trust the "
            "author, load it in transformers, call `save_pretrained`, and give the directory that it writes."
        )
    if content := folder_content(directory):
        return CheckpointError(
            f"{directory} is {content}, not a model. Give the directory of a Hugging Face checkpoint in safetensors "
            "format, or a .gguf file."
        )
    others = ", ".join(sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())[:3])
    return CheckpointError(
        f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; there are no weights to read"
        f"{others and f' (but {others}, which is an adapter, or lacks its index)'}. Give the directory of a Hugging "
        "Face checkpoint in safetensors format, or a .gguf file."
    )
