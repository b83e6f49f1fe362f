"""Makes a plan from wanted types: what must stay F32, row-length fallbacks, roles, sizes and the exact file size.

Presets and the planner decide which type a matrix should have; everything that follows from the file format is decided
here, once, so that every plan states it in the same words.
"""

import re
from collections.abc import Mapping

from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import ImatrixInfo, Provenance, TensorSpec, padded, predicted_bytes
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.checkpoints.vision_names import TRANSPOSED
from dynquant.errors import PlanError
from dynquant.formats.quant_types import fit_to_row, quant_type
from dynquant.recipes.plan import Plan, PlanEntry

_STATS_NAME = "stats.safetensors"


def plan_from_types(
    model: Model,
    types: Mapping[str, tuple[str, str]],
    *,
    recipe: str,
    stats: CalibrationStats | None = None,
    stats_hash: str | None = None,
    errors_hash: str | None = None,
    candidates: tuple[str, ...] = (),
    weighted_errors: Mapping[tuple[str, str], float] | None = None,
    exact: bool = False,
) -> Plan:
    """A plan with one entry per tensor of the model.

    Args:
        model: What is planned.
        types: GGUF name -> wanted type and reason. Tensors that stay F32 (`stays_f32`) or whose role is unknown may be
            left out; F32 is taken for the former even when another type is wanted.
        recipe: What was asked for, as `preset r1-iq1_s`.
        stats: The statistics that the export will use; they are named in the file and so count in its size.
        stats_hash: SHA-256 of stats.safetensors; given exactly when `stats` is.
        errors_hash: SHA-256 of errors.json, if the types come from it.
        candidates: The types that the planner could choose from.
        weighted_errors: (GGUF name, type) -> importance-weighted relative squared error.
        exact: Take another type than F32 also for the tensors of `stays_f32`, as a plan like another file must.

    Raises:
        PlanError: an unknown tensor or type, or a matrix without a type.
    """
    if (stats is None) != (stats_hash is None):
        raise ValueError("`stats` and `stats_hash` must be given together or not at all")
    names = model.source.names()
    known = set(names)
    unknown = next((name for name in types if name not in known), None)
    if unknown is not None:
        raise PlanError(f"A type is given for `{unknown}`, a tensor that {model.name} does not have.")
    errors = weighted_errors or {}
    entries = tuple(_entry(model, name, types.get(name), errors, exact) for name in names)
    return Plan(
        model=model.name,
        arch=model.arch,
        fingerprint=model.fingerprint,
        stats_hash=stats_hash,
        errors_hash=errors_hash,
        recipe=recipe,
        types=candidates,
        predicted_bytes=_file_bytes(model, [_spec(entry) for entry in entries], recipe, stats, stats_hash),
        entries=entries,
    )


def fixed_bytes(
    model: Model,
    planned: Mapping[str, object],
    *,
    recipe: str,
    stats: CalibrationStats | None = None,
    stats_hash: str | None = None,
) -> int:
    """File bytes that do not depend on the types of the `planned` tensors: header and all other tensors.

    A file budget minus this is what a planner may spend on `padded` tensor bytes.
    """
    specs = [
        TensorSpec(name, model.source.info(name).shape, "F16" if _stays_f16(name) and name not in planned else "F32")
        for name in model.source.names()
    ]
    total = _file_bytes(model, specs, recipe, stats, stats_hash)
    return total - sum(padded(spec.num_bytes) for spec in specs if spec.name in planned)


def stays_f32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp keeps this tensor in F32: vectors, biases, norms and routers."""
    return len(shape) < 2 or not name.endswith(".weight") or role_of(name) in (Role.NORM, Role.ROUTER)


def _stays_f16(name: str) -> bool:
    """Whether a tensor that has no wanted type is stored as F16 rather than F32."""
    return role_of(name) == Role.VISION_PATCH


def _entry(
    model: Model, name: str, wanted: tuple[str, str] | None, errors: Mapping[tuple[str, str], float], exact: bool
) -> PlanEntry:
    shape = model.source.info(name).shape
    type_name, reason, wanted_type = _choose(model, name, shape, wanted, exact)
    return PlanEntry(
        name=name,
        shape=shape,
        role=role_of(name),
        type=type_name,
        reason=reason,
        bytes=quant_type(type_name).tensor_bytes(shape),
        wanted_type=wanted_type,
        sources=model.checkpoint_names(name),
        weighted_error=errors.get((name, type_name)),
    )


def _choose(
    model: Model, name: str, shape: tuple[int, ...], wanted: tuple[str, str] | None, exact: bool
) -> tuple[str, str, str | None]:
    """Type, reason, and the wanted type when the row length forced another one."""
    if _stays_f16(name):
        if wanted and wanted[0] == "F32":
            return "F32", wanted[1], None
        return "F16", "patch embedding: a convolution, which llama.cpp runs in F16 or F32", None
    if stays_f32(name, shape) and not (exact and wanted):
        return "F32", "vectors, norms and routers stay F32, as in llama.cpp", None
    if name == TRANSPOSED and not (wanted and quant_type(wanted[0]).is_float):
        return "F16", "llama.cpp transposes it when it runs: kept F16", quant_type(wanted[0]).name if wanted else None
    if wanted is None:
        if role_of(name) == Role.OTHER:
            return "F32", "of unknown purpose: kept F32", None
        raise PlanError(f"No type was chosen for `{name}` of {model.name}, a matrix of shape {shape}.")
    asked, reason = quant_type(wanted[0]), wanted[1]
    chosen, why = fit_to_row(asked, shape[-1])
    if why is None:
        return chosen.name, reason, None
    return chosen.name, f"{reason}; {why}", asked.name


def _spec(entry: PlanEntry) -> TensorSpec:
    return TensorSpec(entry.name, entry.shape, entry.type)


def _file_bytes(
    model: Model, specs: list[TensorSpec], recipe: str, stats: CalibrationStats | None, stats_hash: str | None
) -> int:
    provenance = Provenance(model.fingerprint, recipe, stats_hash=stats_hash or "")
    imatrix = imatrix_info(stats) if stats is not None else None
    if not model.parts or model.unwritten:
        return predicted_bytes(model, specs, provenance, imatrix)
    types = {spec.name: spec.type for spec in specs}
    return sum(predicted_bytes(part.model, _part_specs(part, types), provenance, imatrix) for part in model.parts)


def plan_of_part(part: ModelPart, plan: Plan, stats: CalibrationStats | None) -> Plan:
    """The plan of one file of a model that is written as several, with the types of the whole model's plan."""
    planned = {entry.name: entry for entry in plan.entries}
    entries = []
    for spec in _part_specs(part, {name: entry.type for name, entry in planned.items()}):
        whole = planned.get(part.plan_name(spec.name))
        entries.append(
            PlanEntry(
                name=spec.name, shape=spec.shape, role=role_of(spec.name), type=spec.type, bytes=spec.num_bytes,
                reason=whole.reason if whole is not None else "not in the plan of the whole model: kept F32",
                sources=part.model.checkpoint_names(spec.name),
            )
        )  # fmt: skip
    specs = [_spec(entry) for entry in entries]
    own = {
        "model": part.model.name, "arch": part.model.arch, "entries": tuple(entries),
        "predicted_bytes": _file_bytes(part.model, specs, plan.recipe, stats, plan.stats_hash),
    }  # fmt: skip
    return plan.model_copy(update=own)


def with_projector_type(model: Model, plan: Plan, type_name: str, stats: CalibrationStats | None) -> Plan:
    """The plan with one type for all matrices of the vision tower and the projector."""
    wanted = type_name, f"{type_name} for the vision part, as asked for"
    entries = tuple(
        _entry(model, entry.name, wanted, {}, False) if entry.role.is_vision else entry for entry in plan.entries
    )
    size = _file_bytes(model, [_spec(entry) for entry in entries], plan.recipe, stats, plan.stats_hash)
    return plan.model_copy(update={"entries": entries, "predicted_bytes": size})


def _part_specs(part: ModelPart, types: Mapping[str, str]) -> list[TensorSpec]:
    """Tensors of a file with the types of the whole model's tensors; what those do not hold is F32."""
    source = part.model.source
    return [
        TensorSpec(name, source.info(name).shape, types.get(part.plan_name(name), "F32")) for name in source.names()
    ]


def imatrix_info(stats: CalibrationStats) -> ImatrixInfo:
    """Return what the header of a file says of the statistics that it was made with."""
    provenance = stats.provenance
    return ImatrixInfo(
        file=_last_component(provenance.imported_from or _STATS_NAME),
        dataset=_last_component(provenance.text_name),
        num_entries=len(stats.inputs.keys() | stats.aliases.keys()),
        num_chunks=provenance.num_windows,
    )


def _last_component(name: str) -> str:
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
