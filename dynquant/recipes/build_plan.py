"""Makes a plan from wanted types: what must stay F32, row-length fallbacks, fused layers, sizes and exact file sizes.

Presets and the planner decide which type a matrix should have; everything that follows from the file format, and from
the kernels of vLLM, is decided here, once, so that every plan states it in the same words.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import TensorSpec, padded
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.checkpoints.vision_names import TRANSPOSED
from dynquant.errors import PlanError
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.quant_types import fit_to_row, quant_type
from dynquant.formats.storage_format import Choice, StorageFormat
from dynquant.formats.vllm_schemes import SCHEMES, Scheme, fit_to_shapes, vllm_scheme
from dynquant.recipes.held_types import is_matrix, kept
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.recipes.plan_notes import notes_of
from dynquant.recipes.sizes import gguf_bytes, part_specs, safetensors_bytes, tensors_of_checkpoint

_F32_TABLES = re.compile(
    r"altup_(correct|predict)_coef|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)|hc_\w+_(fn|base|scale)|"
    r"output_hc_\w+|_compressor_ape|position_embd|token_types"
)
"""Small matrices that llama.cpp's converter stores as F32 whatever it is asked for."""
UNIFORM = "uniform-"  # presets for vLLM are this and a scheme


def plan_from_types(
    model: Model,
    types: Mapping[str, Choice],
    *,
    recipe: str,
    stats: CalibrationStats | None = None,
    stats_hash: str | None = None,
    weighted_errors: Mapping[tuple[str, str], float] | None = None,
    exact: bool = False,
) -> Plan:
    """Return a plan with one entry per tensor of the model, for GGUF.

    Args:
        model: The model that is planned.
        types: GGUF name -> wanted type and reason. Tensors that stay F32 (`stays_f32`) or that no recipe quantizes may
            be left out; F32 is taken for the former even when another type is wanted.
        recipe: The request, as `preset r1-iq1_s`.
        stats: The statistics that the export will use; they are named in the file and so count in its size.
        stats_hash: SHA-256 of stats.safetensors; given exactly when `stats` is.
        weighted_errors: (GGUF name, type) -> importance-weighted relative squared error.
        exact: Take another type than F32 also for the tensors of `stays_f32`, as a plan like another file must.

    Raises:
        PlanError: an unknown tensor or type, or a matrix without a type.
    """
    if (stats is None) != (stats_hash is None):
        raise ValueError("`stats` and `stats_hash` must be given together or not at all")
    names = dict.fromkeys(model.source.names())
    unknown = next((name for name in types if name not in names), None)
    if unknown is not None:
        raise PlanError(f"A type is given for `{unknown}`, a tensor that {model.name} does not have.")
    errors = weighted_errors or {}
    choices = {name: Choice(*choice) for name, choice in types.items()}
    entries = [_entry(model, name, choices.get(name), errors, exact) for name in names]
    size, notes = _gguf_bytes(model, entries, recipe, stats, stats_hash), notes_of(entries, stats)
    return _plan(model, entries, recipe=recipe, stats_hash=stats_hash, predicted_bytes=size, notes=notes)


def _plan(model: Model, entries: Sequence[PlanEntry], **fields: Any) -> Plan:
    identity = {"model": model.name, "arch": model.arch, "fingerprint": model.fingerprint}
    identity |= {"settings": dict(model.settings), "pruned": model.pruned}
    return Plan(**identity, entries=tuple(entries), **fields)


def fixed_bytes(
    model: Model,
    planned: Collection[str],
    held: Mapping[str, Choice],
    *,
    recipe: str,
    stats: CalibrationStats | None = None,
    stats_hash: str | None = None,
) -> int:
    """Return the file bytes that do not depend on the types of the `planned` tensors: header and all other tensors,
    which have the types of `held` or the file format's.

    A file budget minus this is what a planner may spend on `padded` tensor bytes.
    """
    fixed = _fixed_specs(model, planned, held)
    specs = [fixed.get(name) or TensorSpec(name, model.source.info(name).shape, "F32") for name in model.source.names()]
    total = gguf_bytes(model, specs, recipe, stats, stats_hash)
    return total - sum(padded(spec.num_bytes) for spec in specs if spec.name not in fixed)


def fixed_sizes(model: Model, planned: Collection[str], held: Mapping[str, Choice]) -> dict[Role, int]:
    """Return the bytes by role of the tensors that `fixed_bytes` counts."""
    sizes: dict[Role, int] = {}
    for name, spec in _fixed_specs(model, planned, held).items():
        # Biases, and vectors whose role the name does not tell, are as small as norms.
        role = model.roles[name] if len(spec.shape) > 1 and name.endswith(".weight") else Role.NORM
        sizes[role] = sizes.get(role, 0) + padded(spec.num_bytes)
    return sizes


def _fixed_specs(model: Model, planned: Collection[str], held: Mapping[str, Choice]) -> dict[str, TensorSpec]:
    """Return how tensors that are not `planned` are stored, by their names."""
    shapes = {name: model.source.info(name).shape for name in model.source.names() if name not in planned}
    return {
        name: TensorSpec(name, shape, _choose(model, name, shape, held.get(name), False)[0])
        for name, shape in shapes.items()
    }


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether llama.cpp keeps this tensor in F32: vectors, biases, norms, routers, convolutions of a few
    tokens, and tables that it adds or multiplies with."""
    if len(shape) < 2 or not name.endswith(".weight") or role_of(name) in (Role.NORM, Role.ROUTER, Role.CONV):
        return True
    return _F32_TABLES.search(name) is not None


def _entry(
    model: Model, name: str, wanted: Choice | None, errors: Mapping[tuple[str, str], float], exact: bool
) -> PlanEntry:
    shape = model.source.info(name).shape
    type_name, reason, wanted_type = _choose(model, name, shape, wanted, exact)
    fields = {"reason": reason, "wanted_type": wanted_type, "weighted_error": errors.get((name, type_name))}
    fields["sources"] = model.checkpoint_names(name)
    return _stored(name, shape, quant_type(type_name), role=model.roles[name], **fields)


def _stored(name: str, shape: tuple[int, ...], form: StorageFormat, **fields: Any) -> PlanEntry:
    """Return the entry of a tensor in a quant type or scheme."""
    return PlanEntry(name=name, shape=shape, type=form.name, bytes=form.tensor_bytes(shape), **fields)


def _choose(
    model: Model, name: str, shape: tuple[int, ...], wanted: Choice | None, exact: bool
) -> tuple[str, str, str | None]:
    """Return the type, the reason, and the wanted type when the row length forced another one."""
    if role_of(name) == Role.VISION_PATCH:
        if wanted and wanted.type == "F32":
            return "F32", wanted.reason, None
        return "F16", "patch embedding: a convolution, which llama.cpp runs in F16 or F32", None
    if stays_f32(name, shape) and not (exact and wanted):
        return "F32", "vectors, norms, routers and short convolutions stay F32, as in llama.cpp", None
    if name == TRANSPOSED and not (wanted and quant_type(wanted.type).is_float):
        return "F16", "llama.cpp transposes it when it runs: kept F16", quant_type(wanted.type).name if wanted else None
    if wanted is None:
        if not is_matrix(name, shape, model.roles[name]):
            return *kept(model, name), None
        raise PlanError(f"No type was stored for `{name}` of {model.name}, a matrix of shape {shape}.")
    asked = quant_type(wanted.type)
    stored, why = fit_to_row(asked, shape[-1])
    return stored.name, *_with_fallback(wanted.reason, why, asked.name)


def _with_fallback(reason: str, why: str | None, asked: str) -> tuple[str, str | None]:
    """Return the reason, and the name that was asked for, of an entry that takes another format because of `why`."""
    return (reason, None) if why is None else (f"{reason}; {why}", asked)


def _gguf_bytes(
    model: Model, entries: Iterable[PlanEntry], recipe: str, stats: CalibrationStats | None, stats_hash: str | None
) -> int:
    specs = [TensorSpec(entry.name, entry.shape, entry.type) for entry in entries]
    return gguf_bytes(model, specs, recipe, stats, stats_hash)


def plan_of_part(part: ModelPart, plan: Plan, stats: CalibrationStats | None) -> Plan:
    """Return the plan of one file of a model that is written as several, with the types of the whole model's plan."""
    planned, model = {entry.name: entry for entry in plan.entries}, part.model
    entries = []
    for name, shape, type_name in part_specs(part, {name: entry.type for name, entry in planned.items()}):
        whole = planned.get(part.plan_name(name))
        reason = whole.reason if whole is not None else "not in the plan of the whole model: kept F32"
        fields = {"role": model.roles[name], "reason": reason, "sources": model.checkpoint_names(name)}
        entries.append(_stored(name, shape, quant_type(type_name), **fields))
    size = _gguf_bytes(model, entries, plan.recipe, stats, plan.stats_hash)
    update = {"model": model.name, "arch": model.arch, "entries": tuple(entries), "predicted_bytes": size}
    return plan.model_copy(update=update)


def plan_of_rest(model: Model, plan: Plan, stats: CalibrationStats | None) -> Plan:
    """Return the plan of the tensors that are left of the model that it was made for."""
    entries = tuple(entry for entry in plan.entries if entry.name in model.roles)
    size = _gguf_bytes(model, entries, plan.recipe, stats, plan.stats_hash)
    return plan.model_copy(update={"entries": entries, "predicted_bytes": size})


def with_projector_type(model: Model, plan: Plan, type_name: str, stats: CalibrationStats | None) -> Plan:
    """Return the plan with one type for all matrices of the vision tower and the projector."""
    choice = Choice(type_name, f"{type_name} for the vision part, as asked for")
    entries = tuple(
        _entry(model, entry.name, choice, {}, False) if entry.role.is_vision else entry for entry in plan.entries
    )
    size = _gguf_bytes(model, entries, plan.recipe, stats, plan.stats_hash)
    return plan.model_copy(update={"entries": entries, "predicted_bytes": size})


def plan_for_vllm(
    model: Model,
    checkpoint: LinearCheckpoint,
    schemes: Mapping[str, Choice],
    *,
    recipe: str,
    mixed_experts: bool = False,
    stats_hash: str | None = None,
    weighted_errors: Mapping[tuple[str, str], float] | None = None,
) -> Plan:
    """Return a plan with one entry per linear layer or stack of experts.

    `schemes` are wanted schemes and reasons by GGUF name, the same for all layers of a unit; with `mixed_experts` each
    layer's routed experts are a unit, else those of all layers. The rest is as in `plan_from_types`.
    """
    errors = weighted_errors or {}
    entries: list[PlanEntry] = []
    for unit, linears in checkpoint.units(mixed_experts=mixed_experts).items():
        choice = schemes[linears[0].name]
        asked = checkpoint.scheme(choice.type)
        shards = [linear.shard for linear in linears]
        scheme, why = fit_to_shapes(asked, shards, is_expert=linears[0].is_expert)
        reason, wanted_type = _with_fallback(choice.reason, why, asked.name)
        of_unit = {"reason": reason, "wanted_type": wanted_type, "group_size": scheme.group_size, "unit": unit}
        for linear in linears:
            fields = {"role": linear.role, "sources": linear.sources, "modules": linear.modules}
            fields["weighted_error"] = errors.get((linear.name, scheme.name))
            entries.append(_stored(linear.name, linear.shape, scheme, **of_unit, **fields))
    fields = {"recipe": recipe, "stats_hash": stats_hash, "mixed_experts": mixed_experts, "predicted_bytes": 0}
    plan = _plan(model, entries, target="vllm", **fields)
    sizes = {
        "predicted_bytes": safetensors_bytes(tensors_of_checkpoint(checkpoint, schemes_of(plan))),
        "other_bytes": sum(tensor.num_bytes for tensor in checkpoint.others),
        "other_weights": model.num_weights - plan.num_weights,
    }
    return plan.model_copy(update=sizes)


def schemes_of(plan: Plan) -> dict[str, Scheme]:
    """Return the scheme of every linear layer, by GGUF name, in the order of the entries."""
    return {entry.name: entry.scheme for entry in plan.entries}


def uniform_schemes(preset: str, checkpoint: LinearCheckpoint) -> dict[str, Choice]:
    """Return the scheme of the preset `uniform-SCHEME` for every linear layer. Raises PlanError: another preset, or a
    scheme that vLLM does not serve."""
    if not preset.lower().startswith(UNIFORM):
        raise PlanError(
            f"`--preset {preset}` is no preset for vLLM. A compressed-tensors checkpoint takes "
            f"{', '.join(UNIFORM + name.lower() for name in SCHEMES)}, or a plan of `dynquant plan --for vllm`."
        )
    scheme = vllm_scheme(preset[len(UNIFORM) :])
    return {linear.name: Choice(scheme.name, f"uniform {scheme.name}") for linear in checkpoint.linears}


def check_linears(plan: Plan, checkpoint: LinearCheckpoint, model: Model) -> None:
    """Refuse a plan for vLLM that is not exactly of this checkpoint. Raises PlanError: another fingerprint, a missing
    or unknown layer, other shapes, or another size than it predicts."""
    linears = {linear.name: linear for linear in checkpoint.linears}
    plan.check_covers(list(linears), model)
    for entry in plan.entries:
        linear = linears[entry.name]
        unit = linear.unit(mixed_experts=plan.mixed_experts)
        if (entry.shape, entry.modules, entry.unit) != (linear.shape, linear.modules, unit):
            raise PlanError(
                f"The plan describes `{entry.name}` of {model.name} otherwise than it is stored. Plan again."
            )
        if not entry.scheme.fits(*linear.shard):
            rows, columns = linear.shard
            raise PlanError(
                f"`{entry.name}` is planned as {entry.type} in groups of {entry.group_size}, and of its matrices "
                f"{entry.shape[-2]} x {entry.shape[-1]} each GPU of --tensor-parallel {linear.tensor_parallel} has "
                f"{rows} x {columns}, which vLLM's kernel for that does not take. Plan with the same --tensor-parallel."
            )
    size = safetensors_bytes(tensors_of_checkpoint(checkpoint, schemes_of(plan)))
    if size != plan.predicted_bytes:
        raise PlanError(
            f"The plan predicts files of {plan.predicted_bytes:,} bytes, but its schemes give {size:,}. It was edited "
            "or made by another version of dynquant. Plan again."
        )
