"""Types that no measured cost decides: of matrices that calibration cannot judge, and of what stays as it is stored.

    layers that predict tokens ahead (MTP)   Q6_K: no logit of the calibration text depends on them
    indexer of sparse attention              Q8_0: it chooses what is read in contexts longer than calibration's
    decay and gates of a state               as stored: small, and their error adds up along the sequence
    projections and mixers                   as stored: llama.cpp never quantizes them

Planner and presets keep to them; a recipe, or another file's types, may say otherwise.
"""

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.formats.quant_types import quant_type
from dynquant.formats.storage_format import Choice

MTP_TYPE = "Q6_K"
_KEPT_REASONS = {
    Role.OTHER: "of unknown purpose",
    Role.MIXING: "small and delicate, never quantized in llama.cpp",
    Role.SSM_STATE: "small, and its error adds up along the sequence",
}
_NO_MATRICES = (Role.NORM, Role.ROUTER, Role.CONV, Role.VISION_PATCH, Role.MIXING, Role.OTHER)
_INDEXER_SCALES = "indexer.proj.weight"  # F32 in files of llama.cpp's converter


def is_matrix(name: str, shape: tuple[int, ...], role: Role) -> bool:
    """Return whether a recipe may give a tensor a type: it is neither norm, router nor of unknown purpose.

    The rest stays precise, as in llama.cpp.
    """
    return len(shape) >= 2 and name.endswith(".weight") and role not in _NO_MATRICES


def matrices(model: Model) -> list[str]:
    """Return the names of a model's tensors that a recipe may give a type."""
    return [name for name, role in model.roles.items() if is_matrix(name, model.source.info(name).shape, role)]


def held_types(model: Model, mtp_type: str = MTP_TYPE) -> dict[str, Choice]:
    """Return type and reason of the matrices whose types no cost decides; `mtp_type` is that of MTP layers."""
    ahead = f"predicts tokens ahead, which no logit of calibration depends on: {quant_type(mtp_type).name}"
    held = {}
    for name in matrices(model):
        role = model.roles[name]
        if role is Role.MTP:
            held[name] = Choice(quant_type(mtp_type).name, ahead)
        elif name.endswith(_INDEXER_SCALES):
            held[name] = Choice("F32", "scales of the indexer: F32, as in llama.cpp")
        elif role is Role.INDEXER:
            reason = "indexer: chooses what is read in contexts longer than those of calibration: Q8_0"
            held[name] = Choice("Q8_0", reason)
        elif role is Role.SSM_STATE:
            held[name] = kept(model, name)
    return held


def planned_matrices(model: Model) -> list[str]:
    """Return the names of the matrices that are measured, and whose types costs decide."""
    held = held_types(model)
    return [name for name in matrices(model) if name not in held]


def kept(model: Model, name: str) -> Choice:
    """Return the float type that a tensor is stored in, and why it stays so."""
    stored = model.source.info(name).float_type
    return Choice(stored, f"{_KEPT_REASONS.get(model.roles[name], 'no type was asked for')}: kept {stored}")
