"""GGUF tensors inside a running transformers model: written into its parameters, and their gradients read back.

An empty model is filled from a GGUF file the same way, for the architectures of `families.from_gguf`.

A GGUF tensor is a selection of a checkpoint tensor's entries: some rows, another order, a transposition, at most with a
constant added (Gemma's norms). `Conversion.transform` makes it; the way back is the transform's adjoint, which
automatic differentiation gives, so no family has to state an inverse. When the weights come from a GGUF file, the
family's conversions of the running model are taken; for other architectures parameters are found by name, and rows of
rotary heads are reordered where that makes them equal. Every place is then checked against the file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion import ConvertedSource, Transform, unchanged
from dynquant.families.common.conversion_book import ConversionBook, some_of
from dynquant.families.text.llama import interleave_halves
from dynquant.families.text.registry import FAMILIES
from dynquant.formats import decode
from dynquant.running.expert_hooks import expert_modules
from dynquant.running.weights import put


@dataclass(frozen=True)
class LivePlace:
    """Place of a GGUF tensor: `rows` of dimension 1 of a stack, or a transform of a whole parameter or buffer."""

    parameter: Tensor
    rows: slice | None = None
    transform: Transform = unchanged

    def seen(self, stored: Tensor) -> Tensor:
        """Return the GGUF tensor in values of the parameter."""
        return stored[:, self.rows] if self.rows is not None else self.transform(stored)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set the entries that the tensor stands for; others stay."""
        if self.transform is unchanged:
            entries = self.seen(self.parameter)
            entries.copy_(values.view_as(entries))
            return
        # In float32: a norm of Gemma is small beside the one that is taken off.
        values = values.to(self.parameter.device, torch.float32)
        back, covered = _adjoint(self.transform, torch.zeros_like(self.parameter, dtype=torch.float32), values)
        self.parameter.copy_(torch.where(covered, back.to(self.parameter.dtype), self.parameter))


class LiveWeights:
    """The GGUF tensors of `model` that have a place in `hf_model`, loaded by transformers from the same checkpoint."""

    def __init__(self, model: Model, hf_model: Any) -> None:
        self._num_layers = hf_model.config.get_text_config().num_hidden_layers
        head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
        if "output.weight" in model.source.names() and head is not None and head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone())  # stored twice, it may get two types
        if isinstance(model.source, ConvertedSource):
            parameters = dict(hf_model.named_parameters())
            self._places = _stack_places(model, hf_model) | _single_places(model, model.source, hf_model, parameters)
        else:
            self._places = _places_of_a_file(model, hf_model)

    def names(self) -> list[str]:
        """GGUF names, in no particular order."""
        return list(self._places)

    def check(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for a tensor without a place, unless it is of a layer that the model does not run."""
        ends = tuple(f"blk.{layer}." for layer in range(self._num_layers, self._num_layers + 8))  # predict tokens ahead
        lost = [name for name in names if name not in self._places and not name.startswith(ends)]
        if lost:
            raise CheckpointError(
                f"The running model has no place that dynquant knows for {some_of(lost)}, so it would be "
                "measured as if they were not quantized. Plan without --select (and --sensitivity closed-form)."
            )

    def parameter(self, name: str) -> Tensor:
        return self._places[name].parameter

    def read(self, name: str) -> Tensor:
        """The tensor as GGUF has it."""
        return self._seen(name, self._places[name].parameter.detach()).clone()

    def write(self, name: str, values: Tensor) -> None:
        """Set the parameter's entries that the tensor stands for; others stay."""
        self._places[name].write(values)

    def gradient(self, name: str) -> Tensor:
        """The gradient with respect to the GGUF tensor."""
        place = self._places[name]
        assert place.parameter.grad is not None
        gradient = place.parameter.grad.float()
        return self._seen(name, gradient) - self._seen(name, torch.zeros_like(gradient))  # without added constants

    def _seen(self, name: str, stored: Tensor) -> Tensor:
        return self._places[name].seen(stored)


@torch.no_grad()
def fill_from_gguf(model: Model, hf_model: Any, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give every parameter and persistent buffer of a model on the meta device the values of the file.

    Raises:
        CheckpointError: tensors of the file have no place, or parameters no tensor, so that it is of another model.
    """
    tied = getattr(hf_model, "all_tied_weights_keys", None) or {}
    exact = hf_model._get_dtype_plan(dtype)
    for name, tensor in hf_model.state_dict().items():
        if name not in tied:
            exact_type = torch.float32 if any(pattern in name for pattern in exact) else dtype
            put(hf_model, name, torch.empty_like(tensor, dtype=exact_type, device=device))
    hf_model.tie_weights()
    places = _gguf_places(model, hf_model)
    _check_names(model, set(places))
    for name, place in places.items():
        if place is not None:
            info = model.source.info(name)
            packed = model.source.load_packed(name).to(device)  # type: ignore[attr-defined]
            place.write(decode(info.dtype, packed, info.shape))


def _check_names(model: Model, names: set[str]) -> None:
    stored = set(model.source.names())
    if missing := names - stored:
        raise CheckpointError(
            f"{model.path} lacks {some_of(missing)}, which its metadata calls for. Fetch it again, or convert it again."
        )
    if unknown := stored - names:
        raise CheckpointError(
            f"{model.path} holds {some_of(unknown)}, which has no place in transformers' model. Leaving it out would "
            "change the model; run it in llama.cpp."
        )


def _stack_places(model: Model, hf_model: nn.Module) -> dict[str, LivePlace]:
    """Routed experts, which transformers keeps as fused parameters."""
    stored_names, places = set(model.source.names()), {}
    for module_name, module in expert_modules(hf_model).items():
        if module.is_transposed or not module.has_gate:
            continue
        width = module.down_proj.shape[-1]
        for part, parameter, rows in (
            ("gate_proj", module.gate_up_proj, slice(0, width)),
            ("up_proj", module.gate_up_proj, slice(width, 2 * width)),
            ("down_proj", module.down_proj, slice(None)),
        ):
            name = gguf_name_of(f"{module_name}.{part}", model.arch, model.hyper.n_layer)
            if name in stored_names:
                places[name] = LivePlace(parameter, rows)
    return places


def _single_places(
    model: Model, source: ConvertedSource, hf_model: nn.Module, parameters: Mapping[str, Tensor]
) -> dict[str, LivePlace]:
    """Tensors made of one checkpoint tensor, found under its own name or under the name that GGUF gives it."""
    by_gguf_name = {
        gguf_name_of(name, model.arch, model.hyper.n_layer): parameter for name, parameter in parameters.items()
    }
    places: dict[str, LivePlace] = {}
    for name in source.names():
        parts, transform = source.checkpoint_names(name), source.transform(name)
        parameter = parameters.get(parts[0], by_gguf_name.get(name)) if len(parts) == 1 else None
        if name == "output.weight" and parameter is not None:
            parameter = hf_model.get_output_embeddings().weight  # whatever the family makes it of
        if parameter is not None and parameter.dim() < 3:
            places[name] = LivePlace(parameter, transform=transform)
    return places


def _gguf_places(model: Model, hf_model: Any) -> dict[str, LivePlace | None]:
    """Return all tensors of a GGUF file of a known family, with their places in a model of the file's configuration.

    Those without one are computed from the configuration. Nothing is compared with the file.

    Raises:
        CheckpointError: this transformers has parameters that the family does not know.
    """
    converted = _family_source(model, hf_model)
    places = _stack_places(model, hf_model)
    places |= _single_places(model, converted, hf_model, hf_model.state_dict(keep_vars=True))
    return {name: places[name] if converted.checkpoint_names(name) else None for name in converted.names()}


def _places_of_a_file(model: Model, hf_model: Any) -> dict[str, LivePlace]:
    """Parameters of a running model whose weights come from a GGUF file, of itself or of `--base-gguf`.

    Raises:
        CheckpointError: a parameter is not the file's tensor of its name under any known order of rows.
    """
    candidates = {name: [place] for name, place in _stack_places(model, hf_model).items()}
    parameters = dict(hf_model.named_parameters())
    of_family = _single_places(model, _family_source(model, hf_model), hf_model, parameters)
    candidates |= {name: [place] for name, place in of_family.items()}
    for parameter_name, parameter in parameters.items():
        name = gguf_name_of(parameter_name, model.arch, model.hyper.n_layer)
        if name is not None and name not in candidates:
            counts = sorted({model.hyper.n_head, model.hyper.n_head_kv} - {0})
            fitting = [count for count in counts if parameter.shape[:1].numel() % (2 * count) == 0]
            orders = (unchanged, *map(interleave_halves, fitting))
            candidates[name] = [LivePlace(parameter, transform=order) for order in orders]
    return {name: _equal_place(model, name, candidates[name]) for name in model.source.names() if name in candidates}


def _family_source(model: Model, hf_model: Any) -> ConvertedSource:
    """Return the conversions of the running model's family; none for a family without."""
    values = hf_model.config.to_dict() | {"tie_word_embeddings": "output.weight" not in model.source.names()}
    config = Config(model.path, values, values)
    if config.model_type not in FAMILIES:
        return ConvertedSource(model.source, [])
    whole = "blk.0.attn_kv_b.weight" in model.source.names()
    book = ConversionBook(config, None, names=list(hf_model.state_dict()), whole_kv_b=whole)
    FAMILIES[config.model_type].add_tensors(book)
    return ConvertedSource(model.source, book.finish())


def _equal_place(model: Model, name: str, places: list[LivePlace]) -> LivePlace:
    """Return the place that holds the values of the file."""
    stored = model.source.load(name).flatten()
    for place in places:
        seen = place.seen(place.parameter.detach()).flatten()
        if torch.equal(seen, stored.to(seen.device, seen.dtype)):
            return place
    raise CheckpointError(
        f"The running model has other weights than `{name}` of {model.path}, or has them in an order that dynquant "
        "does not know, so they cannot be followed into it. Give the Hugging Face checkpoint that the file was made of."
    )


def _adjoint(transform: Transform, start: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input from which `transform` makes `values`, and which entries of it that decides; `start` is zero."""
    with torch.enable_grad():
        start.requires_grad_(True)
        constant = transform(start)
        (back,) = torch.autograd.grad(constant, start, values.view_as(constant) - constant.detach(), retain_graph=True)
        (covered,) = torch.autograd.grad(constant, start, torch.ones_like(constant))
    if not ((covered == 0) | (covered == 1)).all():
        raise ValueError("`transform` is not a selection of entries, so it cannot be undone")
    return back, covered == 1
