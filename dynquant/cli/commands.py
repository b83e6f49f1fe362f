"""Commands that show rather than make: eval, inspect, super-weights and the demo."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from dynquant.analysis.errors.stage import DEFAULT_TYPES
from dynquant.analysis.outliers.super_weights import Ablation, SuperWeight, find_super_weights
from dynquant.analysis.report.stage import write_plan_report
from dynquant.calibration.stage import CalibrationOptions
from dynquant.cli.plan import print_plan
from dynquant.cli.terminal import console
from dynquant.evaluation.picture_evaluate import PictureReport
from dynquant.evaluation.picture_evaluate import evaluate_on_samples as run_on_samples
from dynquant.evaluation.report import EvalReport, summary_rows
from dynquant.exporters import stage as exporting
from dynquant.families.open import open_and_announce
from dynquant.planning import stage as planning
from dynquant.planning.target import Target
from dynquant.recipes.command_line import command_line, left_alone, recipe_of, uses_imatrix
from dynquant.recipes.diff import PlanDiff, compare_types, number_ranges
from dynquant.recipes.folder import PLAN_NAME
from dynquant.recipes.plan import Plan
from dynquant.recipes.type_lists import read_types
from dynquant.resources import human_bytes, parse_size
from dynquant.session import Session
from dynquant.storage.atomic import write_atomically

_NOTHING_KEPT = "Nothing is kept without --reference-cache: what the models said so far is lost."


def evaluate(candidate: str, reference: str, *, json_file: Path | None = None, **options) -> EvalReport:
    """Print the before/after table; `options` are those of `dynquant.evaluate.evaluate`."""
    from dynquant.evaluation.evaluate import evaluate as run

    kept = "What the original said is kept." if options.get("cache_dir") else _NOTHING_KEPT
    with console.stage_progress(kept) as progress:
        report = run(candidate, reference, progress=progress, **options)
    print_report(report)
    if json_file:
        write_atomically(json_file, report.to_json())
        console.note(f"wrote {json_file}")
    return report


def evaluate_on_samples(
    candidate: Path, reference: str, data: Path, *, json_file: Path | None = None, **options
) -> PictureReport:
    """Print the before/after table on pictures, and draw it into the report beside a plan."""
    with console.stage_progress("Nothing is kept.") as progress:
        report = run_on_samples(candidate, reference, data, progress=progress, **options)
    title = f"{candidate} against {report.reference}: {report.samples} samples of {report.data}"
    console.print_table(title, ("", "reference", "candidate", "comparison"), report.rows())
    for reason in report.skipped:
        console.note(f"skipped: {reason}")
    if json_file:
        write_atomically(json_file, report.model_dump_json(indent=1) + "\n")
        console.note(f"wrote {json_file}")
    directory = candidate if candidate.is_dir() else candidate.parent
    if (directory / "report.html").is_file() and (directory / "plan.json").is_file():
        _draw_pictures(report, reference, directory)
    return report


def _draw_pictures(report: PictureReport, reference: str, directory: Path) -> None:
    from dynquant.analysis.report.pictures import picture_section

    title = f"{report.samples} samples of {report.data}"
    answers = report.questions.answers if report.questions else ()
    write_plan_report(reference, directory, console.session(), pictures=picture_section(report.rows(), title, answers))


def print_report(report: EvalReport) -> None:
    """The before/after table, one block a text or question set."""
    rows = []
    section = None
    for row in summary_rows(report):
        if row.section != section:
            section = row.section
            rows.append((section, "", "", ""))
        rows.append((f"  {row.metric}", row.reference, row.candidate, row.comparison))
    title = f"{report.candidate.name} against {report.reference.name}"
    console.print_table(title, ("", "reference", "candidate", "comparison"), rows)
    for line in report.notes:
        console.note(line)


def report_tree(report: EvalReport) -> dict[str, dict[str, str]]:
    """Section -> metric -> what the table says, for report.html."""
    tree: dict[str, dict[str, str]] = {}
    for row in summary_rows(report):
        change = " to ".join(part for part in (row.reference, row.candidate) if part)
        tree.setdefault(row.section, {})[row.metric] = "; ".join(part for part in (change, row.comparison) if part)
    return tree


def export(path: str, output: Path, session: Session, **options) -> list[Path]:
    """Write the files and print them; `options` are those of `exporters.stage.export`."""
    done = exporting.export(path, output, session, **options)
    for file in done.files:
        console.out.print(str(file))
    size = done.num_bytes
    console.out.print(f"{size:,} bytes, {8 * size / done.num_weights:.3f} bits per weight")
    return done.files


def export_adapter(adapter: Path, output: Path, *, base: Path | None = None) -> None:
    """Write a LoRA file for llama.cpp and say how large it is."""
    from dynquant.exporters.adapter_gguf import export_adapter as run

    file = run(adapter, output, base=base)
    console.out.print(f"{file}\n{file.stat().st_size:,} bytes", markup=False)


def inspect(path: str, *, as_json: bool = False) -> None:
    """Types, roles, sizes and provenance of a file."""
    from dynquant.checkpoints.inspect import inspect as read

    summary = read(path)
    if as_json:
        document = {
            "format": summary.format,
            "arch": summary.arch,
            "total_bytes": summary.total_bytes,
            "bits_per_weight": summary.bits_per_weight,
            "types": [asdict(share) for share in summary.types],
            "roles": [asdict(share) for share in summary.roles],
            "metadata": summary.metadata,
            "provenance": summary.provenance,
        }
        print(json.dumps(document, indent=1, default=str))
        return
    for title, shares in (("by type", summary.types), ("by role", summary.roles)):
        rows = [
            (s.label, s.num_tensors, f"{s.bits_per_weight:.3f}", human_bytes(s.num_bytes),
             f"{s.num_bytes / summary.total_bytes:.1%}")
            for s in shares
        ]  # fmt: skip
        console.print_table(f"{Path(path).name} {title}", ("", "tensors", "bpw", "size", "share"), rows)
    for key, value in (summary.metadata | summary.provenance).items():
        console.out.print(f"{key}: {value}", markup=False)
    console.out.print(
        f"{summary.arch}, {human_bytes(summary.total_bytes)} ({summary.total_bytes:,} bytes), "
        f"{summary.bits_per_weight:.3f} bits per weight"
    )


def recipe(path: Path, *, model: str, imatrix: str | None, output: str, as_json: bool = False) -> None:
    """Print the llama-quantize command line of a plan or file; what it cannot give goes to stderr."""
    types = read_types(path)
    found = recipe_of(types)
    if imatrix is None and uses_imatrix(found):
        imatrix = "IMATRIX.gguf"
    command = command_line(found, model=model, imatrix=imatrix, output=output)
    alone = left_alone(types)
    if as_json:
        document = {
            "base": str(found.base).upper(),
            "token_embedding_type": found.token_embedding,
            "output_tensor_type": found.output,
            "tensor_types": [{"pattern": pattern, "type": name} for pattern, name in found.patterns],
            "left_alone": [{"name": tensor.name, "type": tensor.type, "why": why} for tensor, why in alone],
            "command": command,
        }
        print(json.dumps(document, indent=1))
        return
    print(command)
    if alone:
        listed = ", ".join(f"{tensor.name} ({tensor.type})" for tensor, _ in alone)
        console.note(f"llama-quantize copies these from its input, which must have them in the same type: {listed}")


def diff(before: Path, after: Path, *, as_json: bool = False) -> None:
    """Print what differs between the types of two plans or files of one model."""
    found = compare_types(read_types(before), read_types(after))
    sides = {"before": found.before, "after": found.after}
    if as_json:
        document: dict[str, object] = {
            key: {
                "name": side.name,
                "file_bytes": side.file_bytes,
                "tensor_bytes": sum(tensor.num_bytes for tensor in side.tensors),
            }
            for key, side in sides.items()
        }
        document["changes"] = [asdict(change) | {"layers": change.layers} for change in found.changes]
        document["histogram"] = [asdict(share) for share in found.histogram]
        print(json.dumps(document, indent=1))
        return
    if found.changes:
        _print_changes(found)
    rows = [
        (share.type, share.tensors_before, share.tensors_after, human_bytes(share.bytes_before),
         human_bytes(share.bytes_after))
        for share in found.histogram
    ]  # fmt: skip
    console.print_table("by type", ("type", "tensors before", "after", "bytes before", "after"), rows)
    for key, side in sides.items():
        console.out.print(f"{key}: {side.name}, {side.file_bytes:,} bytes", markup=False)
    changed = sum(len(change.tensors) for change in found.changes)
    change = found.after.file_bytes - found.before.file_bytes
    console.out.print(f"{changed} of {len(found.before.tensors)} tensors have another type; {change:+,} bytes")


def _print_changes(found: PlanDiff) -> None:
    rows = [
        (change.role.value, number_ranges(change.layers) or "-", len(change.tensors),
         f"{change.before} > {change.after}", human_bytes(change.bytes_before),
         human_bytes(change.bytes_after))
        for change in found.changes
    ]  # fmt: skip
    old, new = (sum(getattr(c, side) for c in found.changes) for side in ("bytes_before", "bytes_after"))
    tensors = sum(len(change.tensors) for change in found.changes)
    rows.append(("all", "", tensors, "", human_bytes(old), console.human_bytes(new)))
    columns = ("role", "layers", "tensors", "types", "before", "after")
    console.print_table(f"{found.before.name} to {found.after.name}", columns, rows)


def demo(output: Path) -> None:
    """plan -> export -> eval on the bundled model; everything lands in `output`."""
    with resources.as_file(resources.files("dynquant") / "data") as data:
        model = str(data / "textbook-moe-16m")
        session = console.session()
        made = planning.plan(model, Target(), CalibrationOptions(tokens=16384), output / "plan", session)
        write_plan_report(model, output / "plan", session)
        print_plan(made, output / "plan")
        file = output / f"textbook-moe-16m-{made.bits_per_weight:.2f}bpw.gguf"
        export(model, file, session, plan_path=output / "plan" / PLAN_NAME)
        report = evaluate(
            str(file),
            model,
            tasks=("kl", "ppl", "mmlu"),
            text=[data / "demo_text.txt"],
            max_tokens=4096,
            mmlu_data=data / "demo_questions.jsonl",
            shots=data / "demo_shots.jsonl",
            limit=108,
            scoring=("cloze",),
            json_file=output / "eval.json",
        )
        write_plan_report(model, output / "plan", session, evaluation=report_tree(report))
    _continue_text(file)
    console.out.print(f"\nmodel:  {file}\nreport: {output / 'plan' / 'report.html'}")


def _continue_text(file: Path, prompt: str = "The purpose of a statistical test is to") -> None:
    """Show that stock llama.cpp runs the file."""
    import llama_cpp

    llm = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, seed=0)
    words = llm(prompt, max_tokens=40, temperature=0.0)["choices"][0]["text"]
    console.out.print(f"\nllama.cpp continues: [italic]{prompt}[/]{words}", markup=True)


def super_weights(
    model: str, *, text: str | None = None, tokens: int = 512, ablation: bool = True, as_json: bool = False
) -> list[SuperWeight]:
    """Print what was found and what happens to the text's perplexity without it."""
    from dynquant.analysis.outliers.super_weights import ablation as ablate
    from dynquant.inputs.text import pack_windows, read_text
    from dynquant.running.load import load_hf, load_tokenizer

    opened = open_and_announce(model, console.session())
    tokenizer = load_tokenizer(opened)
    found_text = read_text(text, max_tokens=tokens)
    token_ids = pack_windows(found_text, tokenizer, window=tokens, max_tokens=tokens)[0]
    hf_model = load_hf(opened)
    found = find_super_weights(hf_model, opened.arch, opened.hyper.n_layer, token_ids)
    effects = [ablate(hf_model, one, token_ids) for one in found] if ablation else [None] * len(found)
    if as_json:
        print(
            json.dumps(
                [one.model_dump() | {"ablation": e and e.model_dump()} for one, e in zip(found, effects, strict=True)]
            )
        )
        return found
    rows = [
        (f"{one.name}{'' if one.expert is None else f' expert {one.expert}'} [{one.row},{one.col}]", f"{one.value:.4f}",
         f"{one.max_in:.1f}", f"{one.max_out:.1f}",
         *(_perplexities(e) if e else ("",) * 3))
        for one, e in zip(found, effects, strict=True)
    ]  # fmt: skip
    columns = ("super weight", "value", "max |in|", "max |out|", "perplexity", "zeroed", "1000 next-largest zeroed")
    console.print_table(f"{opened.name}: {len(found)} super weights on {len(token_ids)} tokens", columns, rows)
    return found


def _perplexities(effect: Ablation) -> tuple[str, str, str]:
    return f"{effect.perplexity:.2f}", f"{effect.without_super_weight:.2f}", f"{effect.without_next_largest:.2f}"


def measure(output: Path) -> None:
    """Measure this machine and write what was found."""
    from dynquant.analysis.costs.measure_machine import measure_machine

    with console.stage_progress("Nothing is kept: the measurement begins anew.") as progress:
        found = measure_machine(progress)
    found.save(output)
    console.note(f"wrote {output}: {found.name}, {found.threads} threads")


def print_costs(
    directory: Path,
    plan: Plan,
    machine_file: Path,
    options: CalibrationOptions,
    types: Sequence[str] | None,
) -> None:
    """Time and memory of each stage for a model that is known by its configuration only."""
    from dynquant.analysis.costs.machine import Machine
    from dynquant.analysis.costs.model import CostOptions, predict
    from dynquant.families.open import open_config

    machine = Machine.load(machine_file)
    limit = None if options.max_memory is None else parse_size(options.max_memory)
    work = CostOptions(
        tokens=options.tokens, window=options.window, hessians=options.hessians,
        hessian_bytes=parse_size(options.hessian_memory), types=tuple(types or DEFAULT_TYPES),
        limit_bytes=limit,
    )  # fmt: skip
    costs = predict(open_config(directory), plan, machine, work)
    rows = [
        (cost.stage, f"{cost.seconds:,.0f} s", human_bytes(cost.memory_bytes), human_bytes(cost.bytes_read))
        for cost in costs
    ]
    streamed = "" if limit is None else f", streamed within {human_bytes(limit)}"
    title = f"on {machine.name}, {machine.threads} threads, {work.tokens:,} calibration tokens{streamed} (estimated)"
    console.print_table(title, ("stage", "time", "memory", "reads"), rows)
    for cost in costs:
        if cost.memory_bytes > (limit or machine.memory_bytes):
            way_out = "give a higher --max-memory." if limit else "run it elsewhere, or streamed (--max-memory)."
            console.note(f"{cost.stage} does not fit in {human_bytes(limit or machine.memory_bytes)}: {way_out}")
