"""`add_adapter` and `load_adapter`: adapters for a packed model with the right targets, and back from a directory."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from dynquant.checkpoints.vision_names import vision_name
from dynquant.errors import AdapterError
from dynquant.formats import decode
from dynquant.lora.layers import fused_parts
from dynquant.lora.places import gguf_names, takes_adapter
from dynquant.lora.saved import (
    WEIGHTS_NAME,
    check_copies,
    ends_in,
    finite_factor,
    read_adapter_config,
    stored_keys,
    whole_weights,
)
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import EXPERT_PARTS, PackedExperts, PackedLatentProjection, PackedLinear, PackedModule
from dynquant.patterns import compile_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Experts one by one, as before transformers 5: PEFT fuses their factors while it loads them."""


@dataclass(frozen=True)
class AdapterOptions:
    """Targets of an adapter and its form. Raises AdapterError: `rank` or `alpha` is not positive."""

    rank: int = 16
    """Columns of A and B; each expert has its own."""
    alpha: int = 32
    """The product B A is scaled by alpha / rank."""
    targets: Collection[str] | None = None
    """Last parts of the names of linear layers, as ("q_proj", "v_proj"). Default: all packed linear layers but the
    output head, and none of a vision tower or its projector."""
    experts: bool = True
    """Also adapt the routed experts, where the model has them."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dtype: torch.dtype | None = None
    """Type of A and B. Default: float32, which is what trainers with mixed precision expect."""
    train_norms: bool = False
    """Also train, and save, copies of all norms."""
    train_router: bool = False
    """Also train, and save, copies of the routers."""
    llama_cpp: bool = False
    """Adapt, of the default targets, only those to which llama.cpp applies adapters, so that `export_adapter` can write
    them all. That leaves out queries, keys and values of DeepSeek's attention, and little elsewhere."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise AdapterError(f"`rank` is {self.rank} and `alpha` {self.alpha}; both must be positive, as 16 and 32.")


def add_adapter(model: "PreTrainedModel", **options: Any) -> PeftModel:
    """Wrap a packed model with a fresh LoRA adapter; only what is added can be trained.

    The adapter starts as no change at all: A is random (`torch.manual_seed` decides it), B is zero. It is saved by
    `save_pretrained` and loads into the original model, or any other export of it, with stock PEFT.

    Args:
        model: loaded by `from_pretrained` or `dynquant.load`.
        options: fields of `AdapterOptions`, as `rank=8, experts=False`.

    Raises:
        AdapterError: no packed weights, a target that the model lacks, or nothing to train.
    """
    settings = AdapterOptions(**options)
    adapted = get_peft_model(model, _config(model, settings), autocast_adapter_dtype=settings.dtype is None)
    if settings.dtype is not None:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(settings.dtype)
    return adapted


def _config(model: "PreTrainedModel", options: AdapterOptions) -> LoraConfig:
    packed = _packed_linears(model)
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    has_experts = bool(experts)
    if not packed and not has_experts:
        raise AdapterError(
            f"{type(model).__name__} has no packed weights. Load the output of `dynquant export -f safetensors` with "
            "from_pretrained, or a GGUF file with dynquant.load; for float weights use peft.get_peft_model itself."
        )
    if options.targets is not None:
        names = _checked(options.targets, packed, model)
    else:
        named = gguf_names(model) if options.llama_cpp else ("", {})
        names = [name for name in packed if not options.llama_cpp or _is_applied_by_llama_cpp(*named, name)]
    parameters = [f"experts.{part}" for part in fused_parts(experts[0])] if options.experts and has_experts else []
    if has_experts:
        # PEFT takes these names for those of experts, which transformers has fused, wherever they occur.
        parameters += [f"{name}.weight" for name in names if name in EXPERT_PARTS]
        names = [name for name in names if name not in EXPERT_PARTS]
    if not names and not parameters:
        raise AdapterError("`targets` is empty and there are no experts to adapt; name a linear layer.")
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        use_rslora=options.rslora,
        target_modules=names,
        target_parameters=parameters or None,
        modules_to_save=_saved_modules(model, norms=options.train_norms, router=options.train_router) or None,
        task_type="CAUSAL_LM",
    )


def load_adapter(model: "PreTrainedModel", path: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a packed model: `PeftModel.from_pretrained`, with the directory checked before.

    Raises:
        AdapterError: no adapter in the directory, one of another method or model, or damaged files.
    """
    path = Path(path)
    config = read_adapter_config(path)
    stored = stored_keys(path)
    copies, whole = whole_weights(stored, config)
    _check_copies(model, path, copies)
    _unpack(model, path, whole)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some weights of PeftModel were not initialized")  # the copies
            warnings.filterwarnings("error", "Found missing adapter keys")  # PEFT goes on with factors it drew
            options = {"ignore_mismatched_sizes": bool(copies)}  # floats do not fit into packed bytes
            options |= {"config": _with_names(LoraConfig.from_pretrained(str(path)), model)}
            adapted = PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable, **options)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        raise AdapterError(
            f"The adapter in {path} does not load into {type(model).__name__} ({type(error).__name__}: {error}). "
            "It is damaged, or was trained on another model."
        ) from error
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            finite_factor(parameter, name, path)
    loaded = get_peft_model_state_dict(adapted)
    left = [key for key in stored if key not in {*loaded, *copies} and not _ONE_EXPERT.search(key)]
    if left:
        raise AdapterError(
            f"{path} holds `{left[0]}` and {len(left) - 1} more tensors that {type(model).__name__} has no place for: "
            "it was trained on another model."
        )
    return adapted


def _with_names(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """Replace patterns by the names that they match: PEFT's own matcher could work for years on one from a file."""
    modules = [path for path, _ in model.named_modules() if path]
    for field in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(config, field), str) and pattern != "all-linear":
            setattr(config, field, {name for name in modules if compile_pattern(pattern).fullmatch(name)})
    parameters = [f"{path}.{name}" for path in modules for name in config.target_parameters or ()]
    names = modules + parameters
    for field in ("rank_pattern", "alpha_pattern"):
        values: dict[str, float] = {}
        for pattern, value in (getattr(config, field) or {}).items():
            values |= {re.escape(n): value for n in names if ends_in(pattern, n) and re.escape(n) not in values}
        setattr(config, field, values)
    return config


def _check_copies(model: nn.Module, path: Path, copies: dict[str, str]) -> None:
    """Refuse a copy of a base weight that is not the model's own, as of a resized vocabulary."""
    modules = dict(model.named_modules())

    def is_same(name: str, copy: torch.Tensor) -> bool:
        base = modules.get(name)
        stored = None if base is None else base.state_dict().get("weight")
        if stored is None:
            return False
        if copy.dtype == torch.uint8:
            return torch.equal(copy, stored.cpu())
        if isinstance(base, PackedModule) and "weight" in base.packed_names:
            return base.shape_of("weight") == copy.shape and _is_near(copy, stored, base.types["weight"])
        return stored.shape == copy.shape and _is_near(copy, stored)

    check_copies(path, copies, type(model).__name__, is_same)


def _unpack(model: "PreTrainedModel", path: Path, whole: dict[str, str]) -> None:
    """Make ordinary layers of the packed ones for which the adapter has whole weights: PEFT puts these in their place.

    Raises:
        AdapterError: the weight has another shape, or the packed layer has no ordinary form.
    """
    modules = dict(model.named_modules())
    for key, name in whole.items():
        packed = modules.get(name)
        if not isinstance(packed, PackedModule) or "weight" not in packed.packed_names:
            continue
        with safe_open(path / WEIGHTS_NAME, "pt") as file:
            shape = tuple(file.get_slice(key).get_shape())
        rows, columns = packed.shape_of("weight")
        scale = getattr(packed, "scale", None)
        if shape != (rows, columns) or scale is not None:
            why = f"the model has {[rows, columns]} there" if scale is None else "the model scales what it looks up"
            raise AdapterError(
                f"{path / WEIGHTS_NAME} holds the whole weight `{key}` {list(shape)}, and {why}. Give the adapter to "
                "the model that it was trained on; of a resized vocabulary, merge it into the original and export that."
            )
        values = packed.dense("weight", model.dtype)
        if isinstance(packed, nn.Embedding):
            layer: nn.Module = nn.Embedding(rows, columns, packed.padding_idx, device="meta")
        else:
            layer = nn.Linear(columns, rows, bias=packed.bias is not None, device="meta")
            layer.bias = packed.bias
        layer.weight = nn.Parameter(values, requires_grad=False)
        model.set_submodule(name, layer)
        warnings.warn(
            f"{path} holds all of `{name}`, which runs in {model.dtype} in place of {packed.types['weight']}.",
            stacklevel=3,
        )


def _is_near(copy: torch.Tensor, stored: torch.Tensor, type_name: str = "") -> bool:
    """Return True for the same weights but for rounding: even 1.56 bits keep a cosine of 0.8."""
    copy, stored = copy[:1024], stored[:1024].cpu()  # rows enough to tell other weights, and little to decode of a head
    values = decode(type_name, stored, tuple(copy.shape)) if type_name else stored
    return bool(torch.cosine_similarity(copy.float().flatten(), values.float().flatten(), dim=0) > 0.7)


def _packed_linears(model: nn.Module) -> list[str]:
    """Return last parts of the names of packed linear layers, without the output head.

    Beside a vision tower, whose layers may be called alike, whole names of the language model's layers.
    """
    head = model.get_output_embeddings()
    kinds = PackedLinear | PackedRows | PackedLatentProjection
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds) and module is not head]
    if any(vision_name(path) for path, _ in model.named_modules()):
        return sorted(path for path in paths if vision_name(path) is None)
    return sorted({path.rpartition(".")[2] for path in paths})


def _is_applied_by_llama_cpp(arch: str, names: Mapping[str, str], name: str) -> bool:
    matrices = [matrix for key, matrix in names.items() if f".{key.rpartition('.')[0]}".endswith(f".{name}")]
    return bool(matrices) and all(takes_adapter(arch, matrix) for matrix in matrices)


def _checked(targets: Collection[str], packed: list[str], model: nn.Module) -> list[str]:
    linear = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | PackedModule) and not isinstance(module, PackedExperts)
    }
    unknown = sorted(set(targets) - linear)
    if unknown:
        raise AdapterError(
            f"{type(model).__name__} has no linear layer `{unknown[0]}` to put an adapter on; it has "
            f"{', '.join(packed)}. Routed experts are chosen by `experts`, not by name."
        )
    return sorted(set(targets))


def _saved_modules(model: nn.Module, *, norms: bool, router: bool) -> list[str]:
    """Return ends of the names of norms and routers. A router has its parent's name too: `gate` ends other names."""
    endings = set()
    for path, module in model.named_modules():
        parts = path.split(".")
        if norms and "norm" in parts[-1] and any(True for _ in module.parameters(recurse=False)):
            endings.add(parts[-1])
        if router and parts[-1] in ("gate", "router"):  # transformers' names for what stands beside routed experts
            siblings = dict(model.get_submodule(".".join(parts[:-1])).named_children())
            if isinstance(siblings.get("experts"), PackedExperts):
                endings.add(".".join(parts[-2:]))
    return sorted(endings)
