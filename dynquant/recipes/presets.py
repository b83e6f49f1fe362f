"""Fixed recipes by name: types from rules instead of measurement.

    f32, f16, bf16        every matrix in that type
    uniform-TYPE          every matrix in TYPE; below Q2_K the embedding and output take Q2_K, as `llama-quantize` asks
    r1-...                Unsloth's original dynamic DeepSeek-R1 files: attention, shared experts and dense layers
                          precise, routed experts crushed, the down projections of the first MoE layers a step higher
    experts-TYPE          all routed experts in TYPE, the rest as in r1-iq1_s; for comparing types and encoders
    llama-FTYPE           llama.cpp's own mixture, tensor by tensor as `llama-quantize FTYPE` (llama_mixtures.py)

The r1-iq1_s assignment reproduces the published histogram (F32 361, Q4_K 190, Q5_K 116, Q6_K 184, IQ2_XXS 6, IQ1_S 168;
gpustack issue 1107). Of the other three only sizes are published (158, 183, 212 GiB, Unsloth's R1 blog): their down
projections are the types that meet those sizes.
"""

from typing import NamedTuple

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, quant_type
from dynquant.formats.storage_format import Choice
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
_R1_PRECISE = {
    **dict.fromkeys((*_MLA, Role.SHARED_DOWN, Role.FFN_DOWN, Role.OUTPUT), "Q6_K"),
    **dict.fromkeys((Role.SHARED_GATE, Role.SHARED_UP), "Q5_K"),
}
_FLOATS = ("f32", "f16", "bf16")


def preset_types(preset: str, model: Model) -> dict[str, Choice]:
    """Return wanted type and reason of every quantizable tensor; row-length fallbacks are applied by the plan builder.
    Raises PlanError: unknown preset, or an R1 recipe for a model without routed experts."""
    name = preset.lower()
    names = [tensor for tensor in model.source.names() if is_quantizable(tensor, model.source.info(tensor).shape)]
    if name == "f32":
        names += [tensor for tensor in model.source.names() if role_of(tensor) is Role.VISION_PATCH]
    if name in _FLOATS:
        return dict.fromkeys(names, Choice(name.upper(), f"preset {name}"))
    if name.startswith("uniform-"):
        return _uniform(quant_type(name.removeprefix("uniform-")).name, names)
    if name.startswith("experts-"):
        crushed = quant_type(name.removeprefix("experts-")).name
        return _r1(_R1Recipe(crushed, crushed, crushed), names, name)
    if name in R1_RECIPES:
        return _r1(R1_RECIPES[name], names, name)
    if name.startswith("llama-"):
        tensors = [(tensor, model.source.info(tensor).shape) for tensor in model.source.names()]
        return llama_tensor_types(name.removeprefix("llama-"), tensors, model.hyper)
    raise PlanError(
        f"There is no preset `{preset}`. Presets are f32, f16, bf16, {', '.join(R1_RECIPES)}, uniform-TYPE (as "
        "uniform-iq2_xxs), experts-TYPE and llama-FTYPE (as llama-q4_k_m)."
    )


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a matrix that is neither norm, router nor of unknown purpose.

    The rest stays precise, as in llama.cpp.
    """
    kept = (Role.NORM, Role.ROUTER, Role.VISION_PATCH, Role.OTHER)
    return len(shape) >= 2 and name.endswith(".weight") and role_of(name) not in kept


def _uniform(type_name: str, names: list[str]) -> dict[str, Choice]:
    everywhere = Choice(type_name, f"uniform {type_name}")
    if QUANT_TYPES[type_name].bits_per_weight >= QUANT_TYPES["Q2_K"].bits_per_weight:
        return dict.fromkeys(names, everywhere)
    at_the_ends = Choice("Q2_K", f"uniform {type_name}: embedding and output take Q2_K")
    return {name: at_the_ends if role_of(name) in (Role.EMBEDDING, Role.OUTPUT) else everywhere for name in names}


def _r1(recipe: _R1Recipe, names: list[str], preset: str) -> dict[str, Choice]:
    down = sorted((layer_of(name) or 0, name) for name in names if role_of(name) == Role.EXPERT_DOWN)
    if not down:
        raise PlanError(f"The preset {preset} crushes routed experts, and this model has none; use llama-q4_k_m.")
    early = {name for _, name in down[:_NUM_EARLY]}

    def choose(name: str) -> Choice:
        role = role_of(name)
        if name in early:
            return Choice(recipe.early_down, f"{preset}: down projection of the first {_NUM_EARLY} MoE layers")
        if role.is_routed_expert:
            type_name = recipe.down if role == Role.EXPERT_DOWN else recipe.gate_up
            return Choice(type_name, f"{preset}: routed experts crushed")
        return Choice(_R1_PRECISE.get(role, "Q4_K"), f"{preset}: {role.value} kept precise")

    return {name: choose(name) for name in names}
