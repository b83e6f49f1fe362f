"""Plans from drawn rows beside plans from the exact table: the KL of both on text that calibration did not see.

    python -m dynquant.analysis.bench.plans.sampled_plans MODEL -o DIR --bpw 2,2.5,3,3.5,4,5

The error table is measured once exactly and once from drawn rows, by the same encoder under the same statistics.
At every budget both plans are rendered, and scored on the same windows; the last column is the mean over tokens of the
difference between their KL, with a paired 95 % interval.
"""

from pathlib import Path

import torch

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import StatsFile
from dynquant.encoding.store import ENCODED_NAME, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.evaluation.rendered_model import RenderedModel, ScoredInputs
from dynquant.evaluation.statistics import bootstrap_mean, shown_kl
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.text import pack_windows, read_text
from dynquant.kernels.bench.harness import MarkdownTable, options
from dynquant.planning.options import PlanOptions
from dynquant.planning.stage import make_plan
from dynquant.planning.target import Target
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import Session
from dynquant.storage.file_names import ERRORS_NAME, STATS_NAME


def main() -> None:
    """Parse, measure, print two Markdown tables."""
    asked = options(
        __doc__, "model", output=(Path("sampled_plans"), "Directory of plans, statistics and blocks."),
        bpw=("2,2.5,3,3.5,4,5", "Budgets in bits per weight."), tokens=(16384, "Tokens of calibration."),
        text=(Path, "Text that plans are scored on."), score=(8192, "Tokens that plans are scored on."),
        types=("", "Candidate types; all of the default ones without any."),
        encoder=("dynquant", "dynquant or ggml."), device=(str, "cpu or cuda."),
    )  # fmt: skip
    session, budgets = Session(device=asked.device), [float(bits) for bits in asked.bpw.split(",")]
    types = tuple(name for name in asked.types.split(",") if name)
    plans: dict[bool, list[Plan]] = {}
    stats = None
    for is_exact in (False, True):
        folder = asked.output / ("exact" if is_exact else "drawn")
        calibration = CalibrationOptions(tokens=asked.tokens)
        plans[is_exact] = []
        for bits in budgets:
            how = {"calibration": calibration} if stats is None else {"stats": stats}
            how |= {"encoder": asked.encoder, "exact": is_exact}
            plan_options = PlanOptions(model=asked.model, output=folder, target=Target(bpw=bits, types=types), **how)
            plans[is_exact].append(make_plan(plan_options, session))
        stats = stats or folder / STATS_NAME
    print_tables(asked.output / "drawn" / ERRORS_NAME, asked.output / "exact" / ERRORS_NAME)
    model = open_model(asked.model)
    encoder = load_encoder(asked.encoder, chosen_device(asked.device))
    store = open_store(model, StatsFile(stats), encoder, asked.output / ENCODED_NAME)
    rendered = RenderedModel(load_hf(model, dtype=torch.float32, device=chosen_device(asked.device)), store)
    windows = pack_windows(read_text(asked.text), load_tokenizer(model), window=256, max_tokens=asked.score)
    inputs = ScoredInputs(rendered, ModelInputs(windows))
    table = MarkdownTable("bpw", "tensors of another type", "KL, exact", "KL, drawn rows", "difference")
    for bits, exact, drawn in zip(budgets, plans[True], plans[False], strict=True):
        scores = []
        for plan in (exact, drawn):
            rendered.install({entry.name: entry.type for entry in plan.entries if not entry.quant_type.is_float})
            scores.append(inputs.score()[0].numpy())
        kls = [bootstrap_mean(values, inputs.lengths) for values in (*scores, scores[1] - scores[0])]
        changed = sum(entry.type != twin.type for entry, twin in zip(exact.entries, drawn.entries, strict=True))
        table.add(f"{bits:g}", f"{changed} of {len(exact.entries)}", *(estimate.shown(shown_kl) for estimate in kls))


def print_tables(drawn: Path, exact: Path) -> None:
    """Say how far estimates are from exact errors, in percent and in standard errors, type by type."""
    estimates, of_all = ErrorTable.load(drawn), ErrorTable.load(exact)
    table = MarkdownTable("type", "tensors", "rms deviation", "median claimed", "rms in standard errors")
    for name in dict.fromkeys(row.type for row in estimates.rows if row.weighted_error_se):
        rows = [row for row in estimates.rows if row.type == name and row.weighted_error_se]
        errors, claimed = (
            torch.tensor([getattr(row, field) for row in rows], dtype=torch.float64)
            for field in ("weighted_error", "weighted_error_se")
        )
        truth = torch.tensor([of_all.row(row.name, name).weighted_error for row in rows], dtype=torch.float64)
        deviation, standardized = (errors / truth - 1).square().mean().sqrt(), (errors - truth) / claimed
        median = (claimed / errors).median()
        rms = standardized.square().mean().sqrt()
        table.add(name, len(rows), f"{deviation:.2%}", f"{median:.2%}", f"{rms:.2f}")
    print()


if __name__ == "__main__":
    main()
