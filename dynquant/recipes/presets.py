"""Fixed recipes by name: types from rules instead of measurement.

    f32, f16, bf16        every matrix in that type
    uniform-TYPE          every matrix in TYPE; below Q2_K embeddings and output take Q2_K, as `llama-quantize` asks
    r1-...                Unsloth's original dynamic DeepSeek-R1 files: attention, shared experts and dense layers
                          precise, routed experts crushed, the down projections of the first MoE layers a step higher
    experts-TYPE          all routed experts in TYPE, the rest as in r1-iq1_s; for comparing types and encoders
    llama-FTYPE           llama.cpp's own mixture, tensor by tensor as `llama-quantize FTYPE` (llama_mixtures.py)

In all but the float types and llama.cpp's mixtures, what calibration cannot judge has types of its own (held_types.py).

The r1-iq1_s assignment reproduces the published histogram (F32 361, Q4_K 190, Q5_K 116, Q6_K 184, IQ2_XXS 6, IQ1_S 168;
gpustack issue 1107). Of the other three only sizes are published (158, 183, 212 GiB, Unsloth's R1 blog): their down
projections are the types that meet those sizes.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, fit_to_row, quant_type
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.held_types import MTP_TYPE, held_types, matrices
from dynquant.recipes.llama_mixtures import llama_tensor_types

_NUM_EARLY = 6  # MoE layers whose down projections are a step more precise


class _R1Recipe(NamedTuple):
    gate_up: str
    down: str
    early_down: str


R1_RECIPES = {
    "r1-iq1_s": _R1Recipe("IQ1_S", "IQ1_S", "IQ2_XXS"),
    "r1-iq1_m": _R1Recipe("IQ1_M", "IQ2_XS", "IQ2_XS"),
    "r1-iq2_xxs": _R1Recipe("IQ2_XXS", "Q2_K", "Q3_K"),
    "r1-q2_k_xl": _R1Recipe("Q2_K", "Q2_K", "Q3_K"),
}
_MLA = (Role.MLA_KV_A, Role.MLA_KV_B, Role.MLA_K_B, Role.MLA_V_B)
_RECURRENT_OUT = (Role.SSM_OUT, Role.SHORTCONV_OUT)
_RECURRENT_IN = (Role.SSM_IN, Role.SSM_X, Role.SSM_DT, Role.SSM_GATE, Role.SHORTCONV_IN, Role.TIME_MIX)
_R1_PRECISE = {
    **dict.fromkeys((*_MLA, *_RECURRENT_OUT, Role.SHARED_DOWN, Role.FFN_DOWN, Role.OUTPUT), "Q6_K"),
    **dict.fromkeys((Role.SHARED_GATE, Role.SHARED_UP, *_RECURRENT_IN), "Q5_K"),
}
_FLOATS = ("f32", "f16", "bf16")


def preset_types(
    preset: str, model: Model, *, mtp_type: str = MTP_TYPE, fallbacks: Collection[QuantType] = ()
) -> dict[str, Choice]:
    """Return wanted type and reason of every matrix. `mtp_type` is that of layers that predict tokens ahead.

    What does not fit its rows is replaced by the plan builder, or here where there are `fallbacks` to choose from.

    Raises:
        PlanError: unknown preset, or an R1 recipe for a model without routed experts.
    """
    name = preset.lower()
    if name.startswith("llama-"):
        tensors = [(tensor, model.source.info(tensor).shape) for tensor in model.source.names()]
        types = llama_tensor_types(name.removeprefix("llama-"), tensors, model.hyper, fallbacks=fallbacks)
        # llama-quantize refuses types that need statistics for layers that no calibration runs.
        ahead = [tensor for tensor, role in model.roles.items() if role is Role.MTP]
        unable = [tensor for tensor in ahead if QUANT_TYPES[types[tensor].type].needs_imatrix]
        held = held_types(model, mtp_type) if unable else {}
        return types | {tensor: held[tensor] for tensor in unable}
    return with_fallbacks(_wanted_types(preset, model, mtp_type), model, fallbacks)


def with_fallbacks(types: Mapping[str, Choice], model: Model, fallbacks: Collection[QuantType]) -> dict[str, Choice]:
    """Return the types with those that do not fit their rows replaced, if there are `fallbacks` to choose from."""

    def fitted(name: str, choice: Choice) -> Choice:
        stored, why = fit_to_row(quant_type(choice.type), model.source.info(name).shape[-1], fallbacks)
        return choice if why is None else Choice(stored.name, f"{choice.reason}; {why}")

    return {name: fitted(name, choice) for name, choice in types.items()} if fallbacks else dict(types)


def _wanted_types(preset: str, model: Model, mtp_type: str) -> dict[str, Choice]:
    name, names = preset.lower(), matrices(model)
    if name == "f32":
        names += [tensor for tensor, role in model.roles.items() if role is Role.VISION_PATCH]
    if name in _FLOATS:
        return dict.fromkeys(names, Choice(name.upper(), f"preset {name}"))
    held = held_types(model, mtp_type)
    roles = {tensor: model.roles[tensor] for tensor in names if tensor not in held}
    if name.startswith("uniform-"):
        if (scheme := name.removeprefix("uniform-").upper()) in SCHEMES and scheme not in QUANT_TYPES:
            raise PlanError(
                f"{scheme} is a scheme of compressed-tensors, no GGUF type: plan with --for vllm, or export with -f "
                "compressed-tensors."
            )
        return _uniform(quant_type(name.removeprefix("uniform-")).name, roles) | held
    if name.startswith("experts-"):
        crushed = quant_type(name.removeprefix("experts-")).name
        return _r1(_R1Recipe(crushed, crushed, crushed), roles, name) | held
    if name in R1_RECIPES:
        return _r1(R1_RECIPES[name], roles, name) | held
    raise PlanError(
        f"There is no preset `{preset}`. Presets are f32, f16, bf16, {', '.join(R1_RECIPES)}, uniform-TYPE (as "
        "uniform-iq2_xxs), experts-TYPE and llama-FTYPE (as llama-q4_k_m)."
    )


def _uniform(type_name: str, roles: Mapping[str, Role]) -> dict[str, Choice]:
    everywhere = Choice(type_name, f"uniform {type_name}")
    if QUANT_TYPES[type_name].bits_per_weight >= QUANT_TYPES["Q2_K"].bits_per_weight:
        return dict.fromkeys(roles, everywhere)
    at_the_ends = Choice("Q2_K", f"uniform {type_name}: embedding and output take Q2_K")
    ends = [name for name, role in roles.items() if role.is_embedding or role is Role.OUTPUT]
    return dict.fromkeys(roles, everywhere) | dict.fromkeys(ends, at_the_ends)


def _r1(recipe: _R1Recipe, roles: Mapping[str, Role], preset: str) -> dict[str, Choice]:
    down = sorted((layer_of(name) or 0, name) for name, role in roles.items() if role is Role.EXPERT_DOWN)
    if not down:
        raise PlanError(f"The preset {preset} crushes routed experts, and this model has none; use llama-q4_k_m.")
    early = {name for _, name in down[:_NUM_EARLY]}

    def choose(name: str, role: Role) -> Choice:
        if name in early:
            return Choice(recipe.early_down, f"{preset}: down projection of the first {_NUM_EARLY} MoE layers")
        if role.is_routed_expert:
            type_name = recipe.down if role == Role.EXPERT_DOWN else recipe.gate_up
            return Choice(type_name, f"{preset}: routed experts crushed")
        return Choice(_R1_PRECISE.get(role, "Q4_K"), f"{preset}: {role.value} kept precise")

    return {name: choose(name, role) for name, role in roles.items()}
