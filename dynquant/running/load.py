"""Loads what transformers has of a model: weights, configuration and tokenizer, from a directory or a GGUF file.

A GGUF file of the known families is decoded by dynquant, tensor by tensor on the device. transformers' own reader takes
what is left, a handful of dense architectures, and minutes. Code that comes with a checkpoint
is never run, and nothing is downloaded: `open_model` has fetched what there is.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.published.packed_parts import has_known_schemes
from dynquant.checkpoints.safetensors_source import SafetensorsSource, checkpoint_spans
from dynquant.checkpoints.tensor_roles import stored_ahead
from dynquant.checkpoints.tensor_source import is_finite
from dynquant.errors import CheckpointError, UnfitWeightsError
from dynquant.families.common.config import names_value, quantization_of, refused_value
from dynquant.families.common.conversion_book import some_of
from dynquant.families.from_gguf import NotUnderstoodError, config_from_gguf
from dynquant.families.tokenizers.files import read_tokenizer_files
from dynquant.families.vision.checkpoint import is_vision_checkpoint
from dynquant.resources import count_mapped_files
from dynquant.running.live_weights import fill_from_gguf
from dynquant.running.parameter_map import without_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFUSALS = (OSError, ValueError, KeyError, NotImplementedError, ImportError, RuntimeError, SafetensorError)
"""Exceptions that transformers raises for files that it cannot load."""
_LOADERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Loaders of models without and with a vision tower."""
_KINDS = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer"}
"""Loaders of something else."""
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*tiktoken*")
"""Names of a tokenizer's files; transformers speaks of packages where there is none."""
LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}
"""For transformers' `from_pretrained`, which would ask at the terminal whether to run a checkpoint's code."""


def load_hf(model: Model, *, dtype: torch.dtype | None = None, device: str = "cpu") -> "PreTrainedModel":
    """Load for inference. `dtype` None means float32 on a CPU and the checkpoint's own elsewhere.

    Raises:
        CheckpointError: transformers cannot load this checkpoint, with the way out.
    """
    if gguf_config(model) is not None:
        dtype = dtype or computing_type(model, device)
        empty = empty_hf(model, dtype=dtype, device=device)
        fill_from_gguf(model, empty, dtype, device)
        return _checked(empty, model)
    if model.hf_directory is not None and _is_decoded_here(model.hf_directory):
        dtype = dtype or computing_type(model, device)
        return _checked(_load_decoded(model.hf_directory, dtype).to(device).eval(), model)
    stated = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    loader = auto_class(load_config(model), model.has_vision) if model.hf_directory else _LOADERS[model.has_vision]
    loaded = _load(loader, model, dtype=stated, use_safetensors=True)
    count_mapped_files(model.hf_directory.glob("*.safetensors") if model.hf_directory else [model.gguf_file])
    return _checked(loaded.to(device).eval(), model)


def _checked(loaded: "PreTrainedModel", model: Model) -> "PreTrainedModel":
    """Return the model, whose weights are finite. Raises CheckpointError: NaN or infinite ones; the tensor is named."""
    for name, weight in loaded.named_parameters():
        if not is_finite(weight):
            raise CheckpointError(
                f"`{name}` of {model.name} holds NaN or infinite values: all that is computed with it is NaN. The "
                "checkpoint is damaged, or its training diverged; fetch it again."
            )
    return loaded


def load_directory(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a directory as it is, on the CPU: one of the original's, or one whose weights are packed or compressed.

    Raises CheckpointError when transformers cannot load it.
    """
    checkpoint_spans(directory)  # refuses weights that are incomplete or of two kinds
    if _is_decoded_here(directory):
        return _load_decoded(directory, dtype).eval()
    loader = auto_class(load_config(directory), is_vision_checkpoint(directory))
    loaded = _load(loader, directory, dtype=dtype, use_safetensors=True)
    count_mapped_files(directory.glob("*.safetensors"))
    return unpack_compressed(loaded, dtype)


def auto_class(config: Any, sees_pictures: bool) -> str:
    """Return the name of transformers' auto class for a configuration.

    A model that is fed text alone takes the class with a vision tower where transformers has no other for it.
    """
    import transformers

    of_text, of_pictures = _LOADERS
    mappings = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    has_text, has_pictures = (type(config) in mapping for mapping in mappings)
    return of_pictures if has_pictures and (sees_pictures or not has_text) else of_text


def _is_decoded_here(directory: Path) -> bool:
    """Return whether a directory is quantized in a layout that dynquant decodes.

    transformers takes rows // scale rows for the rows of a block of FP8, runs FP8 kernels on a GPU, which round
    activations, and needs packages for others; of compressed-tensors it does not read all (`transformers_problem`).
    """
    quantization = quantization_of(directory)
    method = quantization.get("quant_method")
    return method in ("fp8", "mxfp4", "gptq", "awq") or (
        method == "compressed-tensors" and has_known_schemes(quantization)
    )


@dataclass(frozen=True)
class _Decoded:
    """One tensor that is decoded when transformers reads it, as it reads slices of safetensors files."""

    source: SafetensorsSource
    name: str
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        stored = self.source.stored(self.name)
        return (stored.data if stored.scale is None else stored.to(self.dtype))[index]  # a few stay float32


def _load_decoded(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a quantized checkpoint through transformers' own places, from tensors that dynquant decodes."""
    import transformers

    source, config = SafetensorsSource(directory), load_config(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = getattr(transformers, auto_class(config, is_vision_checkpoint(directory)))
    mapping = loader._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(f"{directory}: transformers has no language model of type {config.model_type!r}.")
    model_class = mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    weights = {name: _Decoded(source, name, dtype) for name in source.names()}
    loaded = _load(model_class, directory, config=config, state_dict=weights, dtype=dtype)
    if (directory / "generation_config.json").is_file():
        loaded.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return loaded


def gguf_config(model: Model) -> Any:
    """Return transformers' configuration of a GGUF file, or None for another model, or one of an unknown family.

    Raises:
        CheckpointError: a value that the configuration needs is missing.
    """
    from transformers import AutoConfig

    if model.gguf_file is None or not isinstance(model.source, GGUFSource):
        return None
    try:
        return AutoConfig.for_model(**config_from_gguf(model.source).raw)
    except NotUnderstoodError:
        return None


def load_config(model: Model | Path) -> Any:
    """Load transformers' configuration of a model, or raise CheckpointError when it cannot be read."""
    if isinstance(model, Model) and (config := gguf_config(model)) is not None:
        return config
    config = _load("AutoConfig", model)
    if isinstance(model, Model) and model.has_own_output:
        config.tie_word_embeddings = False  # from_pretrained finds this out by itself
    return config


def computing_type(model: Model, device: str) -> torch.dtype:
    """Return the type that `load_hf` computes in by default: float32 on a CPU, that of config.json elsewhere."""
    if torch.device(device).type == "cpu":
        return torch.float32
    stated = load_config(model).dtype
    return stated if isinstance(stated, torch.dtype) else torch.bfloat16


@contextmanager
def tf32_products(device: torch.device | str) -> Iterator[None]:
    """Context manager: a GPU rounds the factors of float32 products to TF32's 11 bits, at several times the speed.

    Sums and all else stay float32. Only what runs the model may stand inside: encoders solve equations in float32.
    """
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def empty_hf(model: Model, *, dtype: torch.dtype, device: str = "cpu") -> "PreTrainedModel":
    """The model of a Hugging Face directory with parameters on the meta device; what follows from the configuration
    (rotary tables) is computed, on `device`.

    Raises:
        CheckpointError: no such directory, or transformers does not know the architecture.
    """
    import transformers

    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = getattr(transformers, auto_class(config, model.has_vision))
    with torch.device("meta"):
        empty = loader.from_config(config, dtype=dtype, trust_remote_code=False)
    owners = {"": empty}  # the models that initialize what is in them
    for path, module in empty.named_modules():
        owners[path] = module if isinstance(module, transformers.PreTrainedModel) else owners[path.rpartition(".")[0]]
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if module._non_persistent_buffers_set:
            owners[path]._init_weights(module)
    for owner in set(owners.values()):
        owner._init_weights(owner)  # Falcon-H1's model sets buffers of its layers
    return empty.eval()


def probing_type(model: Model, device: str) -> torch.dtype:
    """Return the type in which a backward pass measures: float32 where weights take at most half of a GPU's memory.

    In bfloat16 other labels are drawn, and sensitivities move by up to 18 % (textbook-moe-16m, 4,096 tokens).
    """
    if torch.device(device).type == "cpu" or 4 * model.num_weights <= torch.cuda.mem_get_info(device)[1] / 2:
        return torch.float32
    return computing_type(model, device)


def load_tokenizer(model: Model | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model, directory or GGUF file, or raise CheckpointError when there is none."""
    directory = model if isinstance(model, Path) else model.hf_directory
    if directory is not None and not is_gguf(directory):
        read_tokenizer_files(directory)  # transformers raises anything for what has another shape
        if directory.is_dir() and not any(next(directory.glob(name), None) for name in _TOKENIZERS):
            raise CheckpointError(
                f"{directory} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json). Put the files of the "
                "model's tokenizer beside its config.json."
            )
    return _load("AutoTokenizer", model, **(_tokenizer_type(model) if isinstance(model, Model) else {}))


def _tokenizer_type(model: Model) -> dict[str, str]:
    """Return the argument that names the tokenizer's class of a GGUF file, where transformers knows it by the model.

    It would parse the file's metadata in Python to find the class: 10 s for 150,000 tokens.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    config = gguf_config(model)
    if config is None:
        return {}
    name = "mistral" if config.model_type == "llama" else config.model_type  # Llama's is the plain class and unnamed
    return {"tokenizer_type": name} if TOKENIZER_MAPPING_NAMES.get(name) else {}


def unpack_compressed(model: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """Unpack a compressed-tensors model now instead of at its first forward pass, and bring all of it to one type.

    The library gives FP4 weights as bfloat16 whatever the type of the model. Other models are returned as they are.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None or not hasattr(compressor, "decompress_model"):
        return model
    compressor.decompress_model(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _load(loader: str | type, model: Model | Path, **options: Any) -> Any:
    """Call `from_pretrained` of a class, or of the class of transformers that is named. `state_dict` has the weights
    where they are not those of the files."""
    import transformers

    path = model if isinstance(model, Path) else model.hf_directory or model.gguf_file
    if path is None:
        raise CheckpointError(f"{model} is neither a Hugging Face directory nor a GGUF file that can be loaded.")
    directory, way_out = None if "state_dict" in options else path, "Fetch the files again."
    if is_gguf(path):
        directory, options = path.parent, options | {"gguf_file": path.name}
        way_out = (
            "Start from the Hugging Face checkpoint that it was made from, or import an importance matrix of "
            "llama-imatrix (`dynquant calibrate --imatrix FILE`)."
        )
    try:
        with without_progress_bars():
            options |= LOCAL_ONLY
            if loader in _KINDS:
                return getattr(transformers, str(loader)).from_pretrained(directory, **options)
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # named below
            load_class = getattr(transformers, loader) if isinstance(loader, str) else loader
            loaded, report = load_class.from_pretrained(directory, **options)
    except CheckpointError:  # of our own quantizer
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{path}: transformers lacks a package ({error.__cause__ or error}). Install it: pip install "
            "'dynquant-toolchain[models]', or the one that is named here."
        ) from error
    except Exception as error:  # transformers raises errors of many libraries
        if names_value(error) and path.is_dir():
            raise CheckpointError(refused_value(path, error)) from error
        kind = _KINDS.get(loader, "model") if isinstance(loader, str) else "model"
        raise CheckpointError(
            f"{path}: transformers cannot load the {kind} ({type(error).__name__}: {str(error)[:400]}). {way_out}"
        ) from error
    _check_complete(path, report, loaded.config.to_dict(), way_out)
    return loaded


def _check_complete(path: Path, report: dict[str, Any], config: dict[str, Any], way_out: str) -> None:
    """Refuse a model of which transformers made up weights, or left some of the checkpoint's out.

    Layers that predict tokens ahead take no part in what is computed; those that dynquant knows it adds.
    """
    if mismatched := report["mismatched_keys"]:
        name, stored, expected = min(mismatched)
        raise UnfitWeightsError(
            f"{path}: {len(mismatched)} tensors have other shapes than the configuration calls for: `{name}` is stored "
            f"as {list(stored)}, and should be {list(expected)}. Restore config.json, or fetch it with the weights."
        )
    if new := report["missing_keys"]:
        raise UnfitWeightsError(
            f"{path} lacks {len(new)} weights of the model ({some_of(new)}); transformers would fill them with random "
            f"numbers. {way_out}"
        )
    unread = report["unexpected_keys"]
    unread = [name for name in unread if not name.endswith(".inv_freq") and not stored_ahead(name, config)]
    if unread:
        warnings.warn(
            f"transformers does not use {len(unread)} tensors of {path} ({some_of(unread)}); what it computes may not "
            "be the model that was trained.",
            stacklevel=4,
        )
