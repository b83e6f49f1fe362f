"""Makes a serving plan from wanted schemes: fused layers, row-length fallbacks, sizes and the exact bytes of the files.

Presets and the planner decide which scheme a unit should have; everything that follows from vLLM and the format is
decided here, in the same words for every plan.
"""

from collections.abc import Mapping

from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.families.linear_layers import LinearLayer, ServedCheckpoint
from dynquant.formats.vllm_schemes import SCHEMES, fit_to_rows, serving_scheme
from dynquant.recipes.compressed_layout import file_bytes, tensors_of_checkpoint
from dynquant.recipes.serving_plan import ServingEntry, ServingPlan, entry_bytes

PRESET_PREFIX = "uniform-"


def units_of(checkpoint: ServedCheckpoint, *, mixed_experts: bool) -> dict[str, list[LinearLayer]]:
    """Unit -> the linear layers that share its scheme."""
    units: dict[str, list[LinearLayer]] = {}
    for linear in checkpoint.linears:
        units.setdefault(linear.unit(mixed_experts=mixed_experts), []).append(linear)
    return units


def serving_plan(
    model: Model,
    checkpoint: ServedCheckpoint,
    wanted: Mapping[str, tuple[str, str]],
    *,
    recipe: str,
    mixed_experts: bool = False,
    stats_hash: str | None = None,
    schemes: tuple[str, ...] = (),
    objective: str = "fixed recipe",
    predicted_kl: float | None = None,
    weighted_errors: Mapping[tuple[str, str], float] | None = None,
) -> ServingPlan:
    """A plan with one entry per linear layer or stack of experts.

    Args:
        model: What is planned.
        checkpoint: Its linear layers.
        wanted: Unit -> scheme and reason; see `units_of`.
        recipe: What was asked for.
        mixed_experts: Whether each layer's routed experts are a unit, or those of all layers.
        stats_hash: SHA-256 of the statistics that the export will use.
        schemes: What the planner could choose from.
        objective: What it minimised.
        predicted_kl: The minimum.
        weighted_errors: (GGUF name, scheme) -> importance-weighted relative squared error.
    """
    entries: list[ServingEntry] = []
    for unit, linears in units_of(checkpoint, mixed_experts=mixed_experts).items():
        name, reason = wanted[unit]
        asked = SCHEMES[name]
        is_expert = linears[0].is_expert
        chosen, group, why = fit_to_rows(asked, (linear.shape[-1] for linear in linears), is_expert=is_expert)
        entries += [
            ServingEntry(
                name=linear.name,
                unit=unit,
                role=linear.role,
                shape=linear.shape,
                modules=linear.modules,
                scheme=chosen.name,
                group_size=group,
                reason=f"{reason}; {why}" if why else reason,
                bytes=entry_bytes(chosen, linear.shape, group),
                wanted_scheme=asked.name if why else None,
                weighted_error=(weighted_errors or {}).get((linear.name, chosen.name)),
            )
            for linear in linears
        ]
    return ServingPlan(
        model=model.name,
        arch=model.arch,
        fingerprint=model.fingerprint,
        stats_hash=stats_hash,
        recipe=recipe,
        objective=objective,
        schemes=schemes,
        mixed_experts=mixed_experts,
        predicted_kl=predicted_kl,
        predicted_bytes=file_bytes(tensors_of_checkpoint(checkpoint, entries)),
        num_weights=model.num_weights,
        other_bytes=sum(tensor.num_bytes for tensor in checkpoint.others),
        entries=tuple(entries),
    )


def preset_schemes(preset: str, checkpoint: ServedCheckpoint) -> dict[str, tuple[str, str]]:
    """Unit -> scheme and reason of `uniform-SCHEME`.

    Raises:
        PlanError: another preset, or a scheme that vLLM does not serve.
    """
    if not preset.lower().startswith(PRESET_PREFIX):
        raise PlanError(
            f"`--preset {preset}` is a recipe of GGUF types. A compressed-tensors checkpoint takes "
            f"{', '.join(PRESET_PREFIX + name.lower() for name in SCHEMES)}, or a plan of `dynquant plan --for vllm`."
        )
    scheme = serving_scheme(preset[len(PRESET_PREFIX) :])
    units = units_of(checkpoint, mixed_experts=False)
    return dict.fromkeys(units, (scheme.name, f"uniform {scheme.name}"))


def check_serving_plan(plan: ServingPlan, checkpoint: ServedCheckpoint, fingerprint: str, model_name: str) -> None:
    """Refuse a plan that is not exactly of this checkpoint.

    Raises:
        PlanError: another fingerprint, a missing or unknown layer, other shapes, or another size than it predicts.
    """
    if plan.fingerprint != fingerprint:
        raise PlanError(
            f"The plan was made for checkpoint {plan.fingerprint[:12]} ({plan.model}), but {model_name} has "
            f"fingerprint {fingerprint[:12]}. Run `dynquant plan --for vllm` on {model_name}."
        )
    linears = {linear.name: linear for linear in checkpoint.linears}
    planned = {entry.name: entry for entry in plan.entries}
    for name in sorted(linears.keys() ^ planned.keys()):
        where = f"{model_name} has it, the plan does not" if name in linears else f"{model_name} does not have it"
        raise PlanError(f"The plan and {model_name} disagree about the layer `{name}`: {where}. Plan again.")
    for name, entry in planned.items():
        linear = linears[name]
        unit = linear.unit(mixed_experts=plan.mixed_experts)
        if (entry.shape, entry.modules, entry.unit) != (linear.shape, linear.modules, unit):
            raise PlanError(f"The plan describes `{name}` of {model_name} otherwise than it is stored. Plan again.")
    found = file_bytes(tensors_of_checkpoint(checkpoint, plan.entries))
    if found != plan.predicted_bytes:
        raise PlanError(
            f"The plan predicts files of {plan.predicted_bytes:,} bytes, but its schemes give {found:,}. It was edited "
            "or made by another version of dynquant. Plan again."
        )
