"""Effects of quantization on image tokens and on text tokens, apart: output errors of the language model's layers.

Every matrix is encoded once, in one type near 4 bits, under the statistics of all tokens, as `export` would; the output
error is then measured on held-back inputs of each kind. A layer that loses more on image tokens needs pictures in its
calibration, and bits.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats, InputStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.encoding.stream import load_encoder
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.recipes.held_types import planned_matrices
from dynquant.resources import chosen_device
from dynquant.session import Session
from dynquant.storage.documents import FrozenRecord, read_document
from dynquant.storage.file_names import KINDS, TOKEN_ERRORS_NAME, kind_path

_PREFERRED = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "Q5_K", "Q6_K", "Q8_0")


class TokenError(FrozenRecord):
    """Relative output error |x (W - Wq)ᵀ| / |x Wᵀ| of one matrix, None where no token of the kind was held back."""

    name: str
    role: Role
    layer: int | None
    type: str
    image: float | None
    text: float | None


class TokenErrors(FrozenRecord):
    """All matrices that see both kinds of tokens, and those that see one."""

    fingerprint: str
    type: str
    rows: tuple[TokenError, ...]

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "TokenErrors | None":
        """Read token_errors.json; None when there is none of this checkpoint. Raises PlanError: the file does not hold
        token errors."""
        if not path.is_file():
            return None
        errors = read_document(path, cls, "a table of token errors", "Delete it and plan again.")
        return errors if errors.fingerprint == fingerprint else None

    def sentence(self) -> str:
        """Write the medians over matrices that see both kinds, and the matrix that tells them apart most."""
        both = [row for row in self.rows if row.image and row.text]
        if not both:
            return f"output error in {self.type}: no matrix saw both image and text tokens"
        worst = max(both, key=lambda row: max(row.image / row.text, row.text / row.image))
        return (
            f"output error in {self.type}, median over {len(both)} matrices: image tokens "
            f"{median(row.image for row in both):.2%}, text tokens {median(row.text for row in both):.2%}; furthest "
            f"apart: {worst.name}, {worst.image:.2%} and {worst.text:.2%}"
        )


def write_token_errors(
    model: Model, stats_path: Path, directory: Path, types: Sequence[str], encoder_name: str, session: Session
) -> TokenErrors | None:
    """Measure every matrix (routed experts left out) in that one of `types` which is nearest to 4 bits.

    Returns None, and removes what an earlier run wrote, without statistics of image and text tokens apart.

    Raises:
        StatsError: the statistics belong to another checkpoint.
    """
    paths = {kind: kind_path(stats_path, kind) for kind in KINDS}
    output = directory / TOKEN_ERRORS_NAME
    if not all(path.is_file() for path in paths.values()):
        output.unlink(missing_ok=True)
        return None
    device = chosen_device(session.device)
    stats, encoder = CalibrationStats.load(stats_path), load_encoder(encoder_name, device)
    by_kind = {kind: CalibrationStats.load(path) for kind, path in paths.items()}
    stats.check_belongs_to(model.fingerprint, model.name, model.settings)
    type_name = next((name for name in _PREFERRED if name in types), types[0])
    rows = []
    for info in map(model.source.info, planned_matrices(model)):
        seen = {kind: of_kind.input_of(info.name) for kind, of_kind in by_kind.items()}
        inputs = {kind: _samples(of_kind, info.shape[-1], device) for kind, of_kind in seen.items()}
        if len(info.shape) != 2 or all(x is None for x in inputs.values()):
            continue
        stored, _ = fit_to_row(QUANT_TYPES[type_name], info.shape[-1])
        weights = model.source.load(info.name)
        scale = importance(stats, info.name, info.shape)
        packed = encoder.encode(stored, weights.unsqueeze(0), scale, name=info.name)
        weights = weights.to(device)
        difference = weights - decode(stored, packed.to(device), (1, *weights.shape))[0]
        errors = {kind: _error(x, weights, difference) for kind, x in inputs.items()}
        place = {"name": info.name, "role": role_of(info.name), "layer": layer_of(info.name)}
        rows.append(TokenError(**place, type=stored.name, **errors))
    measured = TokenErrors(fingerprint=model.fingerprint, type=type_name, rows=tuple(rows))
    measured.save(output)
    session.note(measured.sentence())
    return measured


def _samples(inputs: InputStats | None, columns: int, device: str) -> torch.Tensor | None:
    if inputs is None or inputs.samples is None or inputs.samples.shape[-1] != columns or len(inputs.samples) != 1:
        return None
    count = int(inputs.sample_counts[0])  # unfilled rows are no inputs
    return inputs.samples[0, :count].to(device).float() if count else None


def _error(x: torch.Tensor | None, weights: torch.Tensor, difference: torch.Tensor) -> float | None:
    if x is None:
        return None
    kept = float((x @ weights.T).square().sum(dtype=torch.float64))
    return (float((x @ difference.T).square().sum(dtype=torch.float64)) / kept) ** 0.5 if kept > 0 else 0.0
