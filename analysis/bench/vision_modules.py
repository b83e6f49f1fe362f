"""KL of a plan's language model with vision tower and projector in one type after the other, on pictures.

    python -m dynquant.analysis.bench.vision_modules MODEL --plan plan/ --data unseen.jsonl --types q8_0,q6_k,q4_k

The first row is the language model alone quantized; each further one changes the type of the vision tower, of the
projector, or of both, and nothing else. Beside it stands what `--vision auto` goes by: the module's median output error
in that type over the language model's, from the plan's errors.json.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.stage import StatsFile
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
from dynquant.kernels.bench.harness import MarkdownTable, options
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
    infos = {name: model.source.info(name) for name in model.source.names() if role_of(name).is_vision}
    matrices = {name: info for name, info in infos.items() if len(info.shape) == 2}
    for module, type_name in [("both", None), *itertools.product(MODULES, types)]:
        changed, ratio = {}, None
        if type_name:
            stored, parts = quant_type(type_name), MODULES[module]
            fitting = {name: fit_to_row(stored, info.shape[-1])[0].name for name, info in matrices.items()}
            changed = {name: fitting[name] for name in matrices if part_of(name) in parts}
            ratio = _ratio(table, parts, stored.name) if table is not None and changed else None
        size = sum(
            quant_type(changed.get(name, info.dtype)).tensor_bytes(info.shape) for name, info in matrices.items()
        )
        rendered.install(language | changed)
        kl, top1 = (bootstrap_mean(values.numpy(), pictures.lengths) for values in pictures.score())
        yield ModuleScore(module, type_name or "as stored", size, kl, top1, ratio)


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, "model", plan=(Path, "Directory of `dynquant plan MODEL --data FILE`."),
        data=(Path, "Samples with images that calibration did not use, .jsonl."),
        types=("q8_0,q6_k,q4_k", "Quant types of the modules."), encoder=("dynquant", "dynquant or ggml."),
        limit=(int, "At most this many samples."), device=(str, "cpu or cuda."),
    )  # fmt: skip
    model, directory = open_model(asked.model), asked.plan
    plan = Plan.load(directory / "plan.json")
    plan.check_covers(model.source.names(), model)
    stats = StatsFile(directory / "stats.safetensors")
    store = open_store(model, stats, load_encoder(asked.encoder), directory / ENCODED_NAME)
    samples = picture_inputs(model, asked.data, tokens=1 << 40, seed=0)[: asked.limit]
    errors = ErrorTable.load(directory / "errors.json")
    print(f"{model.name}, language model as in `{plan.recipe}`, encoder {store.encoder.name}, {len(samples)} samples\n")
    table = MarkdownTable("module", "type", "bytes of both", "KL, nats per text token", "same top token", "error ratio")
    for score in measure_modules(plan, store, samples, asked.types.split(","), table=errors, device=asked.device):
        kl, ratio = score.kl, "" if score.ratio is None else f"{score.ratio:.2f}"
        table.add(score.module, score.type, f"{score.bytes:,}", kl.shown(".3g"), f"{score.top1.value:.2%}", ratio)


def _ratio(table: ErrorTable, parts: tuple[str, ...], type_name: str) -> float | None:
    of_module, of_language = (
        table.median_output_error(type_name, (name for name in table.tensors() if part_of(name) in of))
        for of in (parts, (LANGUAGE,))
    )
    return of_module / of_language if of_module is not None and of_language is not None else None


if __name__ == "__main__":
    main()
