"""Lets the worker describe a checkpoint, once: the description is kept in the cache until a file or the tree changes.

What it holds are llama.cpp's keys and selections of the checkpoint's tensors, some megabytes with the tokenizer.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.safetensors_format import FileSpan
from dynquant.checkpoints.safetensors_source import SafetensorsSource, checkpoint_spans
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.errors import CheckpointError
from dynquant.families.common import selection, strided_maps
from dynquant.families.common.config import WAY_OUT, read_json
from dynquant.families.converter import tracing, worker
from dynquant.families.converter.source_tree import cache_directory, tree_version
from dynquant.families.tokenizers.files import read_tokenizer_files
from dynquant.families.tokenizers.pre_tokenizers import pre_tokenizer_name
from dynquant.storage.atomic import writing_folder
from dynquant.storage.strict_json import parse_json
from dynquant.workers import run_module

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack")
_EXPERT, _LAYER = re.compile(r"\.experts\.(\d+)\."), re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_MOST_HASHED = 1 << 26
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "torch")
"""Packages that the converter calls."""
_READ_FAULTS = (OSError, ValueError, CheckpointError)
_KEPT = 64


@dataclass(frozen=True)
class Description:
    """The work of llama.cpp's converter on a checkpoint: entries of tensors, and keys with values."""

    about: Mapping[str, Any]
    keys: GGUFSource
    pre_tokenizer_notes: tuple[str, ...] = ()


def describe(directory: Path, source: SafetensorsSource, tree: Path, *, no_mtp: bool = False) -> Description:
    """Return what the converter of `tree` makes of a checkpoint, from the cache where it was asked before.

    Raises:
        CheckpointError: it does not know the architecture, fails, or computes a matrix instead of moving its entries.
    """
    spans = checkpoint_spans(directory)
    places = {path: str(path.resolve()) for path in sorted({span.path for span in spans.values()})}
    request = {"tree": str(tree), "directory": str(directory.resolve()), "no_mtp": no_mtp}
    request["tensors"] = [_tensor(info, spans.get(info.name), places) for info in map(source.info, source.names())]
    request["pre_tokenizer"], notes = _pre_tokenizer(directory)
    # Values that are computed are kept as well, so the weights' files must be those of the description.
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in places]
    folder = cache_directory() / "converted" / _key(directory, tree, [request, stamps])
    was_there = folder.exists()  # whole, or damaged: what comes after this is of another process
    try:
        description = _read(folder)
    except _READ_FAULTS:
        if was_there:
            shutil.rmtree(folder, ignore_errors=True)
        _forget_old(folder.parent)
        with writing_folder(folder, "Set DYNQUANT_CACHE to a folder that can be written.") as partial:
            _run(directory, tree, request, partial)
        description = _read(folder)
    return replace(description, pre_tokenizer_notes=notes)


@lru_cache(maxsize=4)
def _read(folder: Path) -> Description:
    about = parse_json((folder / worker.TENSORS).read_bytes())
    if not isinstance(about, dict) or not about.keys() >= worker.PARTS:
        raise ValueError(f"{folder / worker.TENSORS} is not what the worker writes")
    return Description(about, GGUFSource(folder / worker.METADATA))


def _tensor(info: TensorInfo, span: FileSpan | None, places: Mapping[Path, str]) -> tuple[Any, ...]:
    """Return what the worker is told of a tensor: name, type, shape, and where its plain values are in a file."""
    is_plain = span is not None and span.dtype == info.dtype
    place = (places[span.path], span.offset, span.num_bytes) if span is not None and is_plain else None
    return info.name, info.dtype, info.shape, place


def _pre_tokenizer(directory: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return llama.cpp's name for the splitting rules of tokenizer.json and notes on it; None where they have none."""
    tokenizer = read_tokenizer_files(directory).tokenizer
    if tokenizer is None:
        return None, ()
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            name = pre_tokenizer_name(tokenizer, str(directory / "tokenizer.json"))
        except (CheckpointError, KeyError, TypeError, AttributeError):
            return None, ()  # said where it matters, by `write_tokenizer`
    return name, tuple(str(note.message) for note in notes)


def _key(directory: Path, tree: Path, request: object) -> str:
    digest = hashlib.sha256(json.dumps(request).encode())
    for file in sorted(path for path in directory.iterdir() if path.is_file() and path.suffix not in _WEIGHTS):
        size = file.stat().st_size
        content = file.read_bytes() if size <= _MOST_HASHED else str(file.stat().st_mtime_ns).encode()
        digest.update(f"{file.name} {size}\n".encode() + content)
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            digest.update(f"{library} {version(library)}\n".encode())
    sources = [Path(module.__file__ or "") for module in (worker, tracing, selection, strided_maps)]
    for file in sources:
        digest.update(f"{file}{file.stat().st_size}{file.stat().st_mtime_ns}".encode())
    digest.update(tree_version(tree).encode())
    return digest.hexdigest()[:32]


def _forget_old(folder: Path) -> None:
    """Delete the oldest descriptions, so that there are never many."""
    ages = []
    for path in folder.glob("[!.]*"):  # a dot begins the name of what another process is writing
        with suppress(FileNotFoundError):  # it may delete some as well
            ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages, reverse=True)[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _run(directory: Path, tree: Path, request: dict[str, Any], folder: Path) -> None:
    (folder / "request.json").write_text(json.dumps(request))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = run_module(worker.__name__, [str(folder / "request.json"), str(folder)], **quiet)
    refusal = folder / worker.REFUSAL
    if refusal.is_file():
        shapes = {name: shape for name, _, shape, _ in request["tensors"]}
        raise _refused(directory, tree, shapes, **parse_json(refusal.read_bytes()))
    if done.returncode == -9:  # SIGKILL, of which Windows has no name
        raise CheckpointError(
            f"The system killed llama.cpp's converter on {directory}, as it does where memory runs out. Free memory, "
            f"or take a machine with more. {WAY_OUT}"
        )
    if done.returncode or not (folder / worker.TENSORS).is_file():
        last = done.stderr.strip().rpartition("\n")[2][:400]
        raise CheckpointError(
            f"llama.cpp's converter in {tree} ended with status {done.returncode} on {directory} "
            f"({last or 'no reason'}). Give the tree of another version of llama.cpp by --llama-cpp DIR. {WAY_OUT}"
        )


def _refused(
    directory: Path, tree: Path, shapes: Mapping[str, tuple[int, ...]], kind: str, reason: str
) -> CheckpointError:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = read_json(directory / "config.json")
    if kind == "unknown" and not config.get("architectures"):
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))
        value = f'["{names}"]' if isinstance(names, str) else "the name of transformers' class, in a list"
        return CheckpointError(
            f"{directory / 'config.json'} has no `architectures`, by which llama.cpp's converter finds the model. Set "
            f"it to {value}, or fetch the file again."
        )
    if kind == "failed" and (disagreement := _disagreement(config, shapes)):
        return CheckpointError(
            f"{directory / 'config.json'} and the tensors do not agree: {disagreement}. llama.cpp's converter refuses "
            f"them ({shorten(reason, 200)}). Restore config.json, or fetch it with the weights."
        )
    if kind == "unknown":
        said = f"llama.cpp's converter in {tree} does not know the architecture of {directory} ({reason})"
        return CheckpointError(f"{said}. Give a newer tree by --llama-cpp DIR, or wait until llama.cpp has it.")
    if kind == "tensor":
        said = f"llama.cpp's converter makes tensors of {directory} in a way that dynquant cannot follow: {reason}"
        return CheckpointError(f"{said}. {WAY_OUT}")
    if "Can not map tensor" in reason:
        return CheckpointError(
            f"llama.cpp's converter in {tree} has no place for a tensor of {directory} ({reason}): llama.cpp's graph "
            "of the architecture does not read it, and would compute something else. A newer tree, by --llama-cpp DIR, "
            "may have a place for it."
        )
    return CheckpointError(
        f"llama.cpp's converter in {tree} refuses {directory} ({shorten(reason, 300)}). config.json and the tensors "
        "may not be of one model: complete the files, or fetch them again. Or give another version of the tree by "
        "--llama-cpp DIR."
    )


def _disagreement(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words the numbers in config.json that the tensors contradict; empty where none is found."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    experts, layers = ({int(match[1]) for match in map(at.search, shapes) if match} for at in (_EXPERT, _LAYER))
    stacks = {shape[0] for name, shape in shapes.items() if ".experts." in name and len(shape) == 3}
    rows, width = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), (0, 0))
    exact = (*_EXPERT_COUNTS, "hidden_size")
    num_experts = len(experts) or max(stacks, default=0)
    numbers = {**dict.fromkeys(_EXPERT_COUNTS, num_experts), "hidden_size": width}
    numbers |= {"num_hidden_layers": len(layers), "vocab_size": rows}
    return ", ".join(
        f"`{key}` is {text[key]} and the tensors have {number}"
        for key, number in numbers.items()
        # There may be layers that predict tokens ahead, and rows that fill up the embedding.
        if number and isinstance(text.get(key), int) and (text[key] > number or (key in exact and text[key] != number))
    )
