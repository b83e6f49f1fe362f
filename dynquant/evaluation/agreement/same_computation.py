"""Checks that a GGUF file computes in llama.cpp what its directory computes in transformers, before work goes into it.

Weights can be compared by their values. What a graph does with them cannot: llama.cpp's converter leaves out what the
graph has no place for, and both sides fill in what a configuration leaves open. So a few hundred tokens are run in
both. With F32 weights the two agree to a mean KL of 1e-9 and less. With other weights llama.cpp rounds activations to
16 or 8 bits, which moves single tokens of a mixture of experts to other experts; how far that leads is measured in
transformers, whose modules then round their inputs alike, and ten times as much is no difference.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dynquant.calibration.run import text_inputs
from dynquant.checkpoints.gguf_layout import write_float32
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import CheckpointError, DynquantError, OtherGraphError, UnfitWeightsError
from dynquant.evaluation.agreement.likely_causes import likely_causes
from dynquant.evaluation.llama_cpp_alone import separate_window_logits
from dynquant.evaluation.runners import HuggingFaceRunner
from dynquant.families.converter.source_tree import find_tree, tree_version
from dynquant.families.model_kind import check_same_kind
from dynquant.formats.quant_types import quant_type
from dynquant.packed.rounding import rounded
from dynquant.resources import chosen_device, human_bytes, parse_size
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from dynquant.running.streaming.stream_memory import COMFORTABLE_SHARE, free_memory_of
from dynquant.session import Session
from dynquant.storage.documents import FrozenRecord, read_document
from dynquant.storage.file_names import SAME_COMPUTATION_NAME

NUM_TOKENS = 512
REFUSED, TOLD = 1e-3, 1e-6
"""Mean KL in nats above which a file is refused, and above which the figure is told."""
ROUNDING_MARGIN = 10.0
"""The runtimes round on different sides of an edge: their KL is a few times that of rounding against not rounding."""
_OTHER_WEIGHTS = 0.05
"""Mean KL of which weights of 8 bits may be the reason."""
_FEWEST_BITS = 8
_MOST_BYTES = 4 << 30
"""Bytes of a temporary file that a comparison may take."""


class SameComputation(FrozenRecord):
    """Content of same_computation.json: a comparison that need not be made again."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # logits of a damaged file

    fingerprint: str
    """Weights of the file."""
    directory: str | None = None
    """Weights of the directory; None where dynquant cannot read them, and then nothing is remembered."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what ran, and of the converter's source tree where the file is made by it."""
    settings: dict[str, Any]
    """Settings of directory and file that decide the computation beside the weights."""
    kl: float
    """Mean KL of llama.cpp with the file from transformers with the directory, in nats per token."""
    rounding_kl: float
    """KL that rounded activations make in transformers; zero where llama.cpp rounds none."""
    weights_kl: float
    """KL that may come from other weights in the file, without a fault."""
    tokens: int

    def exceeds(self, limit: float) -> bool:
        """Return whether the two differ by more than a limit, beside what rounding explains."""
        return not self.kl <= max(limit, self.weights_kl) + ROUNDING_MARGIN * self.rounding_kl  # NaN exceeds it


def check_computation(
    model: Model,
    session: Session,
    *,
    folder: Path | None = None,
    allow_difference: bool = False,
    max_memory: str | None = None,
) -> SameComputation | None:
    """Compare llama.cpp with transformers before anything is measured, unless `folder` holds the result already.

    Compared is the base GGUF, or where llama.cpp's converter describes a directory, a file of all its weights as F32;
    families of dynquant refuse what their graphs do not compute. A difference is told. What cannot be run here is not
    compared, and that is told, too.

    Raises:
        CheckpointError: the two differ by more than `REFUSED`, llama.cpp has another graph and loads no such file, or
            the directory lacks weights of its model or has them in other shapes, and that is not allowed.
    """
    if model.hf_directory is None or not (model.base_gguf or model.is_converted):
        return None
    if model.base_gguf is not None and not allow_difference:
        check_same_kind(
            model.base_gguf,
            model.hf_directory,
            "Give the GGUF that llama.cpp's converter made of this directory as --base-gguf, or go on with "
            "--allow-difference.",
        )
    path = None if folder is None else folder / SAME_COMPUTATION_NAME
    compared = None if path is None else _remembered(path, model)
    if compared is None:
        try:
            with nullcontext(model.base_gguf) if model.base_gguf else _file_in_f32(model) as file:
                compared = compare(model, file, session, max_memory=max_memory)
        except DynquantError as error:
            if not allow_difference and (refusal := _refusal(model, error)):
                raise CheckpointError(refusal) from error
            session.note(f"{_subject(model)} was not compared with transformers: {error}")
            return None
    _judge(compared, _subject(model), model, session, allow_difference=allow_difference)
    return compared


def _refusal(model: Model, error: DynquantError) -> str:
    """Return why a model that could not be compared is refused; nothing where that says nothing against it."""
    if isinstance(error, UnfitWeightsError):
        return f"{error} With --allow-difference the run goes on with the weights as they are."
    return _refused_graph(model, error) if isinstance(error, OtherGraphError) else ""


def _refused_graph(model: Model, error: OtherGraphError) -> str:
    said = re.sub(r"^.*error loading model: |; llama_model_load.*$", "", str(error))
    return (
        f"llama.cpp would load no GGUF file of {model.name}: its graph of `{model.arch}` has other tensors ({said}). "
        "A setting of config.json asks for what the graph does not have; a newer llama-cpp-python may have it. With "
        "--allow-difference the run goes on, for packed safetensors, which need no llama.cpp."
    )


def check_written(
    model: Model, file: Path, session: Session, *, allow_difference: bool = False, max_memory: str | None = None
) -> None:
    """Compare a file that was written with transformers, which gets the file's weights; told as for all weights.

    Raises:
        CheckpointError: as `check_computation`. The file stays.
    """
    try:
        compared = compare(model, file, session, takes_weights=True, max_memory=max_memory)
    except DynquantError as error:
        if not allow_difference and (refusal := _refusal(model, error)):
            raise CheckpointError(f"{file} is written, but {refusal}") from error
        session.note(f"{file.name} was not compared with transformers: {error}")
        return
    try:
        _judge(compared, file.name, model, session, allow_difference=allow_difference)
    except CheckpointError as error:
        raise CheckpointError(
            f"{file} is written, but {error} The file stays: delete it, or use it as it is. With --allow-difference "
            "`export` only tells the difference."
        ) from error


def _subject(model: Model) -> str:
    return model.base_gguf.name if model.base_gguf else f"{model.name} as llama.cpp's converter describes it"


def compare(
    model: Model,
    file: Path,
    session: Session,
    *,
    takes_weights: bool = False,
    logits: Callable[[Path, Sequence[int], int | None], Tensor] | None = None,
    max_memory: str | None = None,
) -> SameComputation:
    """Run a few hundred tokens in transformers and then, with the file, in llama.cpp.

    With `takes_weights` transformers gets the weights of the file, so that these may have any type. llama.cpp runs in a
    process of its own, or by `logits`.

    Raises:
        DynquantError: one of them cannot be run here, or the file has too few bits to be compared.
    """
    source = GGUFSource(file)
    weights_type = _main_type(source)
    stored = quant_type(weights_type)
    if stored.bits_per_weight < _FEWEST_BITS and not takes_weights:
        raise CheckpointError(f"the error of its {weights_type} weights would hide any other difference.")
    length = min(NUM_TOKENS, model.hyper.n_ctx or NUM_TOKENS)
    tokens = text_inputs(model, None, tokens=length, window=length).windows[0].tolist()
    runner = HuggingFaceRunner(load_hf(model, dtype=torch.float32, device=_place_for(model, session, max_memory)))
    if takes_weights:
        _take_weights(runner.hf_model, model, source)
    reference, rounding = runner.window_logits(tokens), 0.0
    if weights_type != "F32":
        with rounded_inputs(runner.hf_model, weights_type):
            rounding = mean_kl(reference, runner.window_logits(tokens))
    runner.close()
    kl = mean_kl(reference, (logits or separate_window_logits)(file, tokens, session.threads))
    weights_kl = 0.0 if stored.is_float or takes_weights else _OTHER_WEIGHTS
    return SameComputation(**_sides(model), kl=kl, rounding_kl=rounding, weights_kl=weights_kl, tokens=len(tokens))


def _sides(model: Model) -> dict[str, Any]:
    """Return all that decides a comparison: weights and settings of both sides, and the programs that run them."""
    directory: str | None = model.fingerprint
    if model.base_gguf is not None:
        try:
            directory = SafetensorsSource(model.hf_directory).fingerprint
        except CheckpointError:  # a format that only transformers reads
            directory = None
    versions = {package: _version(package) for package in ("llama-cpp-python", "transformers")}
    if model.is_converted and (tree := find_tree()) is not None:
        versions["converter"] = tree_version(tree)
    sides = {"fingerprint": model.fingerprint, "directory": directory, "versions": versions}
    return sides | {"settings": dict(model.settings)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _take_weights(hf_model: nn.Module, model: Model, source: GGUFSource) -> None:
    """Give a running model the quantized tensors of a file, or raise CheckpointError for one without a place."""
    names = [name for name in source.names() if not quant_type(source.info(name).dtype).is_float]
    live = LiveWeights(model, hf_model)
    live.check(names)
    for name in set(live.names()).intersection(names):
        live.write(name, source.load(name))


@contextmanager
def _file_in_f32(model: Model) -> Iterator[Path]:
    """Context manager: a temporary file of a model that is not too large for it; raises CheckpointError for others."""
    needed, free = 4 * model.num_weights, shutil.disk_usage(gettempdir()).free
    if needed > min(_MOST_BYTES, free // 2):
        raise CheckpointError(
            f"that takes a temporary file of {human_bytes(needed)}. `export` compares what it writes."
        )
    with TemporaryDirectory() as folder:
        yield write_float32(model, Path(folder) / f"{model.name}.gguf")


def _judge(compared: SameComputation, subject: str, model: Model, session: Session, *, allow_difference: bool) -> None:
    """Tell a difference with its likely causes, or raise CheckpointError for one that is not allowed."""
    if not compared.exceeds(TOLD):
        return
    others = {"rounded activations make": compared.rounding_kl, "other weights may make": compared.weights_kl}
    parts = [f"{reason} {kl:.2g} of it" for reason, kl in others.items() if kl]
    beside = f" ({' and '.join(parts)})" if parts else ""
    difference = (
        f"{subject} in llama.cpp does not compute what {model.name} computes in transformers: their mean KL is "
        f"{compared.kl:.2g} nats over {compared.tokens} tokens{beside}."
    )
    causes = f"Likely causes: {'; '.join(likely_causes(model))}."
    if compared.exceeds(REFUSED) and not allow_difference:
        raise CheckpointError(
            f"{difference} What is measured in transformers would be of another model than what llama.cpp runs. "
            f"{causes} Correct config.json where that is the cause, or go on with --allow-difference."
        )
    allowed = "that is allowed" if compared.exceeds(REFUSED) else f"below {REFUSED:g} quantization changes far more"
    session.note(f"{difference} {causes} The run goes on: {allowed}.")


def _remembered(path: Path, model: Model) -> SameComputation | None:
    """Return the comparison of a folder, if the same programs made it of this file and directory."""
    if not path.is_file():
        return None
    compared = read_document(path, SameComputation, "a comparison of two runtimes", "Delete it; it is made again.")
    sides = _sides(model)
    is_same = sides["directory"] is not None and all(getattr(compared, name) == sides[name] for name in sides)
    return compared if is_same else None


def _main_type(source: GGUFSource) -> str:
    """Return the type of most weights."""
    weights: Counter[str] = Counter()
    for info in map(source.info, source.names()):
        weights[info.dtype] += info.numel
    return max(weights, key=weights.__getitem__)


def _place_for(model: Model, session: Session, max_memory: str | None) -> str:
    """Return the device on which the model fits in float32 within a limit, or raise CheckpointError."""
    needed = 4 * model.num_weights
    if max_memory is not None and needed > parse_size(max_memory):
        raise CheckpointError(f"that takes {human_bytes(needed)} in float32, more than --max-memory {max_memory}.")
    for device in dict.fromkeys((chosen_device(session.device), "cpu")):
        if needed <= COMFORTABLE_SHARE * free_memory_of(device):
            return device
    raise CheckpointError(f"that takes {human_bytes(needed)} in float32, more than there is free.")


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Return mean KL(reference || other) in nats over the rows of logits; padding of one vocabulary is left out."""
    columns = min(reference.shape[1], logits.shape[1])
    total = 0.0
    for chunks in zip(reference.split(32), logits.split(32), strict=True):
        p, q = (rows[:, :columns].double().log_softmax(-1) for rows in chunks)
        total += float((p.exp() * (p - q)).sum())
    return total / len(reference)


@contextmanager
def rounded_inputs(hf_model: nn.Module, type_name: str) -> Iterator[None]:
    """Context manager: linear layers and experts round their inputs as llama.cpp does before weights of a type."""

    def round_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or inputs[0].shape[-1] % quant_type(type_name).block_size:
            return None
        return rounded(inputs[0], type_name), *inputs[1:]

    modules = [module for name, module in hf_model.named_modules() if _multiplies(name, module)]
    hooks = [module.register_forward_pre_hook(round_first) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _multiplies(name: str, module: nn.Module) -> bool:
    has_stack = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return isinstance(module, nn.Linear) or (has_stack and "expert" in f"{name} {type(module).__name__}".lower())
