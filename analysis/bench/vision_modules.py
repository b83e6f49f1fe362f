"""KL of a plan's language model with vision tower and projector in one type after the other, on pictures.

    python -m dynquant.analysis.bench.vision_modules MODEL --plan plan/ --data unseen.jsonl --types q8_0,q6_k,q4_k

The first row is the language model alone quantized; each further one changes the type of the vision tower, of the
projector, or of both, and nothing else. Beside it stands what `--vision auto` goes by: the module's median output error
in that type over the language model's, from the plan's errors.json.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.checkpoints.vision_names import LANGUAGE, PROJECTOR, VISION, part_of
from dynquant.encoding.store import ENCODED_NAME, EncodedStore, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.evaluation.rendered_model import RenderedModel, ScoredInputs
from dynquant.evaluation.statistics import Estimate, bootstrap_mean
from dynquant.families.open import open_model
from dynquant.formats.quant_types import fit_to_row, quant_type
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.pictures import picture_inputs
from dynquant.kernels.bench.harness import MarkdownTable, parser
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf

MODULES = {"vision tower": (VISION,), "projector": (PROJECTOR,), "both": (VISION, PROJECTOR)}


@dataclass(frozen=True)
class ModuleScore:
    """One row: `ratio` is None where the error table has no such type."""

    module: str
    type: str
    bytes: int
    kl: Estimate
    top1: Estimate
    ratio: float | None


def measure_modules(
    plan: Plan,
    store: EncodedStore,
    samples: ModelInputs,
    types: Sequence[str],
    *,
    table: ErrorTable | None = None,
    device: str | None = None,
) -> Iterator[ModuleScore]:
    """Score the plan's language model with each module in each type; bytes are those of both modules' matrices."""
    model = store.model
    rendered = RenderedModel(load_hf(model, dtype=torch.float32, device=chosen_device(device)), store)
    pictures = ScoredInputs(rendered, samples)
    language = {
        entry.name: entry.type
        for entry in plan.entries
        if part_of(entry.name) == LANGUAGE and not entry.quant_type.is_float
    }
    matrices = [name for name in model.source.names() if role_of(name).is_vision and _is_matrix(model, name)]
    for module, type_name, parts in _variants(types):
        changed = {name: _fitting(model, name, type_name) for name in matrices if part_of(name) in parts}
        rendered.install(language | changed)
        divergences, agreements = pictures.score()
        yield ModuleScore(
            module=module,
            type=type_name or "as stored",
            bytes=sum(_bytes(model, name, changed) for name in matrices),
            kl=bootstrap_mean(divergences.numpy(), pictures.lengths),
            top1=bootstrap_mean(agreements.numpy(), pictures.lengths),
            ratio=None if table is None or not changed else _ratio(table, parts, quant_type(type_name).name),
        )


def main() -> None:
    """Parse, measure, print a Markdown table."""
    options = _options()
    model, directory = open_model(options.model), Path(options.plan)
    plan = Plan.load(directory / "plan.json")
    plan.check_covers(model.source.names(), model.fingerprint, model.name)
    stats = StatsFile(directory / "stats.safetensors")
    store = open_store(model, stats, load_encoder(options.encoder), directory / ENCODED_NAME)
    samples = picture_inputs(model, Path(options.data), tokens=1 << 40, seed=0)[: options.limit]
    errors = ErrorTable.load(directory / "errors.json")
    print(f"{model.name}, language model as in `{plan.recipe}`, encoder {store.encoder.name}, {len(samples)} samples\n")
    table = MarkdownTable("module", "type", "bytes of both", "KL, nats per text token", "same top token", "error ratio")
    for score in measure_modules(plan, store, samples, options.types.split(","), table=errors, device=options.device):
        kl, ratio = score.kl, "" if score.ratio is None else f"{score.ratio:.2f}"
        interval = f"{kl.value:.3g} [{kl.low:.3g}, {kl.high:.3g}]"
        table.add(score.module, score.type, f"{score.bytes:,}", interval, f"{score.top1.value:.2%}", ratio)


def _options() -> argparse.Namespace:
    flags = parser(__doc__)
    flags.add_argument("model", help="Directory of a vision-language checkpoint.")
    flags.add_argument("--plan", required=True, help="Directory of `dynquant plan MODEL --data FILE`.")
    flags.add_argument("--data", required=True, help="Samples with images that calibration did not use, .jsonl.")
    flags.add_argument("--types", default="q8_0,q6_k,q4_k", help="Quant types of the modules.")
    flags.add_argument("--limit", type=int, help="At most this many samples.")
    flags.add_argument("--encoder", default="dynquant", help="dynquant or ggml.")
    flags.add_argument("--device", help="cpu or cuda.")
    return flags.parse_args()


def _variants(types: Sequence[str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Module, type and parts of names; the first changes nothing."""
    yield "both", "", ()
    for module, parts in MODULES.items():
        for type_name in types:
            yield module, type_name, parts


def _is_matrix(model: Model, name: str) -> bool:
    return len(model.source.info(name).shape) == 2


def _fitting(model: Model, name: str, type_name: str) -> str:
    return fit_to_row(quant_type(type_name), model.source.info(name).shape[-1])[0].name


def _bytes(model: Model, name: str, changed: Mapping[str, str]) -> int:
    info = model.source.info(name)
    return quant_type(changed.get(name, info.dtype)).tensor_bytes(info.shape)


def _ratio(table: ErrorTable, parts: tuple[str, ...], type_name: str) -> float | None:
    of_module, of_language = (
        table.median_output_error(type_name, (name for name in table.tensors() if part_of(name) in of))
        for of in (parts, (LANGUAGE,))
    )
    return of_module / of_language if of_module is not None and of_language is not None else None


if __name__ == "__main__":
    main()
