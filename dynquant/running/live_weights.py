"""GGUF tensors inside a running transformers model: written into its parameters, and their gradients read back.

A GGUF tensor is a selection of a checkpoint tensor's entries: some rows, another order, a transposition, at most with a
constant added (Gemma's norms). `Conversion.transform` makes it; the way back is the transform's adjoint, which
automatic differentiation gives, so no family has to state an inverse. When the original is a GGUF file there are no
conversions: parameters are found by name, rows of rotary heads are reordered where that makes them equal, and every
place is checked against the file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.errors import CheckpointError
from dynquant.families.common.conversion import ConvertedSource, Transform, unchanged
from dynquant.families.text.llama import interleave_halves
from dynquant.running.expert_hooks import expert_modules


@dataclass(frozen=True)
class _Place:
    """Place of a GGUF tensor: `rows` of dimension 1 of a stack, or a transform of a whole parameter."""

    parameter: nn.Parameter
    rows: slice | None = None
    transform: Transform = unchanged


class LiveWeights:
    """The GGUF tensors of `model` that have a place in `hf_model`, loaded by transformers from the same checkpoint."""

    def __init__(self, model: Model, hf_model: nn.Module) -> None:
        if isinstance(model.source, ConvertedSource):
            self._places = _stack_places(model, hf_model) | _single_places(model, model.source, hf_model)
        else:
            self._places = _places_of_a_file(model, hf_model)

    def names(self) -> list[str]:
        """GGUF names, in no particular order."""
        return list(self._places)

    def parameter(self, name: str) -> nn.Parameter:
        return self._places[name].parameter

    def read(self, name: str) -> Tensor:
        """The tensor as GGUF has it."""
        return self._seen(name, self._places[name].parameter.detach()).clone()

    def write(self, name: str, values: Tensor) -> None:
        """Set the parameter's entries that the tensor stands for; others stay."""
        place = self._places[name]
        values = values.to(place.parameter.device, place.parameter.dtype)
        with torch.no_grad():
            if place.transform is unchanged:
                self._seen(name, place.parameter).copy_(values.view_as(self._seen(name, place.parameter)))
                return
            back, covered = _adjoint(place.transform, place.parameter, values)  # entries of other tensors stay
            place.parameter.copy_(torch.where(covered, back, place.parameter))

    def gradient(self, name: str) -> Tensor:
        """The gradient with respect to the GGUF tensor."""
        place = self._places[name]
        gradient = place.parameter.grad
        assert gradient is not None
        return self._seen(name, gradient) - self._seen(name, torch.zeros_like(gradient))  # without added constants

    def _seen(self, name: str, stored: Tensor) -> Tensor:
        place = self._places[name]
        return stored[:, place.rows] if place.rows is not None else place.transform(stored)


def _stack_places(model: Model, hf_model: nn.Module) -> dict[str, _Place]:
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
                places[name] = _Place(parameter, rows)
    return places


def _single_places(model: Model, source: ConvertedSource, hf_model: nn.Module) -> dict[str, _Place]:
    """Tensors made of one checkpoint tensor, found under its own name or under the name that GGUF gives it.

    A tied embedding that GGUF stores twice has one place, that of the embedding.
    """
    parameters = dict(hf_model.named_parameters())
    by_gguf_name = {
        gguf_name_of(name, model.arch, model.hyper.n_layer): parameter for name, parameter in parameters.items()
    }
    places: dict[str, _Place] = {}
    for name in source.names():
        parts, transform = source.checkpoint_names(name), source.transform(name)
        parameter = parameters.get(parts[0], by_gguf_name.get(name)) if len(parts) == 1 else None
        is_copy = transform is unchanged and any(place.parameter is parameter for place in places.values())
        if parameter is not None and parameter.dim() < 3 and not is_copy:
            places[name] = _Place(parameter, transform=transform)
    return places


def _places_of_a_file(model: Model, hf_model: nn.Module) -> dict[str, _Place]:
    """Parameters that transformers loaded from the file itself; raise CheckpointError for an unknown order of rows."""
    counts = (model.hyper.n_head, model.hyper.n_head_kv)
    stored_names, places = set(model.source.names()), {}
    for parameter_name, parameter in hf_model.named_parameters():
        name = gguf_name_of(parameter_name, model.arch, model.hyper.n_layer)
        if name not in stored_names:
            continue
        stored = model.source.load(name).to(parameter.device, parameter.dtype)
        fitting = [interleave_halves(count) for count in counts if len(stored) % (2 * count) == 0]
        transforms = (unchanged, *fitting) if stored.shape == parameter.shape else ()
        transform = next(
            (candidate for candidate in transforms if torch.equal(candidate(parameter.detach()), stored)), None
        )
        if transform is None:
            raise CheckpointError(
                f"transformers loads `{name}` of {model.path} in an order that dynquant does not know, so its weights "
                "cannot be followed into the running model. Give the Hugging Face checkpoint that the file was made of."
            )
        places[name] = _Place(parameter, transform=transform)
    return places


def _adjoint(transform: Transform, like: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input from which `transform` makes `values`, and which entries of it that decides."""
    with torch.enable_grad():
        start = torch.zeros_like(like, requires_grad=True)
        constant = transform(start)
        (back,) = torch.autograd.grad(constant, start, values.view_as(constant) - constant.detach(), retain_graph=True)
        (covered,) = torch.autograd.grad(constant, start, torch.ones_like(constant))
    if not ((covered == 0) | (covered == 1)).all():
        raise ValueError("`transform` is not a selection of entries, so it cannot be undone")
    return back, covered == 1
