"""Which type every tensor has: read from a plan.json or from any GGUF file, and taken over for a model.

Both kinds of file answer the same questions (names, shapes, types, bytes), so recipes and comparisons take either.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.gguf_source import is_gguf
from dynquant.checkpoints.inspect import TensorRecord, inspect
from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.families.open import fault_of
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.storage_format import Choice
from dynquant.recipes.build_plan import stays_f32
from dynquant.recipes.llama_mixtures import OUTPUT_NAME
from dynquant.recipes.plan import Plan, plan_file
from dynquant.storage.file_kinds import SAFETENSORS, content_of, kind_of

_EMBEDDING_NAME = "token_embd.weight"


@dataclass(frozen=True)
class TypeList:
    """The tensors of a plan or file. `file_bytes` is the whole GGUF, header and padding included."""

    name: str  # the file's name without its directory
    arch: str
    file_bytes: int
    tensors: tuple[TensorRecord, ...]


def read_types(path: Path) -> TypeList:
    """Read a plan.json, also by its folder, or a GGUF file (of a split, the first part); by what they hold.

    Raises:
        PlanError: not a plan.
        CheckpointError: a GGUF that is missing, damaged, or holds types of a fork of llama.cpp.
    """
    if is_gguf(path):
        summary = inspect(path)
        if fault := summary.fault or fault_of(path):
            about = f"{path} is not a whole model: what lacks is in no recipe and no difference. {fault}"
            warnings.warn(about, stacklevel=2)
        return TypeList(path.name, summary.arch, summary.total_bytes, summary.tensors)
    path = plan_file(path, "Give a plan, its folder or a .gguf file.")
    if kind_of(path) == SAFETENSORS:
        raise PlanError(
            f"{path} is {content_of(path)}, which has no GGUF types. Give a plan, its folder or a GGUF file."
        )
    plan = Plan.load(path)
    tensors = tuple(TensorRecord(e.name, e.shape, e.type, e.bytes, e.role) for e in plan.entries)
    return TypeList(path.name, plan.arch, plan.predicted_bytes, tensors)


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape as ggml counts dimensions: (1, 64) and (64,) are the same vector."""
    first = next((i for i, n in enumerate(shape[:-1]) if n != 1), len(shape) - 1)
    return shape[first:]


def like_types(path: Path, model: Model) -> dict[str, Choice]:
    """Return type and reason of the model's tensors, as another file or plan has them. F32 vectors are left out.

    Where only one of the two ties the output to the token embedding, the output of the other gets the embedding's type,
    or the embedding the more precise type of both.

    Raises:
        PlanError: a tensor that only one side has, another shape, or a type outside the registry; it is named.
        CheckpointError: as `read_types`.
    """
    like = read_types(path)
    stored = {tensor.name: tensor for tensor in like.tensors}
    shapes = {name: tuple(model.source.info(name).shape) for name in model.source.names()}
    types = {name: Choice(tensor.type, f"like {like.name}") for name, tensor in stored.items()}
    for name, tensor in stored.items():
        if tensor.type not in QUANT_TYPES:
            raise PlanError(
                f"{like.name} stores `{name}` as {tensor.type}, a type that dynquant does not write. Take another "
                f"file, or edit its recipe (`dynquant recipe {like.name}`) and plan with --recipe."
            )
    _tie(types, shapes, like.name, model.name)
    _check_names(types, shapes, like.name, model.name)
    for name, tensor in stored.items():
        if name in shapes and without_leading_ones(tensor.shape) != without_leading_ones(shapes[name]):
            raise PlanError(
                f"{like.name} has `{name}` in the shape {list(tensor.shape)}, {model.name} in {list(shapes[name])}. "
                "Only a file of the same model, or of one with the same shapes, can be followed."
            )
    return {
        name: types[name] for name, shape in shapes.items() if types[name].type != "F32" or not stays_f32(name, shape)
    }


def _tie(types: dict[str, Choice], shapes: dict[str, tuple[int, ...]], file: str, model: str) -> None:
    """Give both sides the same tensors when one of them has no output of its own."""
    if _EMBEDDING_NAME not in types:
        return
    embedding = types[_EMBEDDING_NAME].type
    if OUTPUT_NAME in types and OUTPUT_NAME not in shapes:
        output = types.pop(OUTPUT_NAME).type
        if QUANT_TYPES[output].bits_per_weight > QUANT_TYPES[embedding].bits_per_weight:
            reason = f"like {file}: the type of its output, which {model} ties to this tensor"
            types[_EMBEDDING_NAME] = Choice(output, reason)
    elif OUTPUT_NAME in shapes and OUTPUT_NAME not in types:
        types[OUTPUT_NAME] = Choice(embedding, f"like {file}, which ties its output to the token embedding")


def _check_names(types: dict[str, Choice], shapes: dict[str, tuple[int, ...]], file: str, model: str) -> None:
    for owner, other, names in (
        (model, file, [name for name in shapes if name not in types]),
        (file, model, [name for name in types if name not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PlanError(
                f"{owner} has the tensor `{names[0]}`{more}, which {other} does not have. Only a file of the same "
                "architecture and conversion can be followed; for others, edit what `dynquant recipe` prints and plan "
                "with --recipe."
            )
