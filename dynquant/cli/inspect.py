"""`dynquant inspect`, `fit`, `recipe`, `diff` and `measure-machine`: the commands that look and make no model."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynquant.cli.terminal import console
from dynquant.cli.terminal.parameters import AsJson
from dynquant.options import MODEL_HELP, Flag, Options, Writes
from dynquant.planning.options import FitOptions
from dynquant.resources import human_bytes

if TYPE_CHECKING:
    from dynquant.planning.memory.placement import Placement
    from dynquant.recipes.diff import PlanDiff

PlanFile = Annotated[Path, typer.Argument(help="A plan.json, its folder or a .gguf file.", show_default=False)]


def inspect(
    path: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    lint: Annotated[bool, typer.Option("--lint", help="Say what is wrong with its chat template instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Types, sizes and bits per weight of a GGUF file or safetensors checkpoint, or faults of its chat template.

    Example: dynquant inspect model.gguf

    Example: dynquant inspect --lint ./model
    """
    if lint:
        _lint(Path(path), as_json)
        return
    from dynquant.checkpoints.inspect import inspect as read
    from dynquant.families.common.config import read_json
    from dynquant.families.open import fault_of

    if (config := Path(path) / "config.json").is_file():
        read_json(config)  # refuses words where numbers belong
    summary = read(path)
    fault = summary.fault or fault_of(Path(path))
    if as_json:
        names = ("format", "arch", "total_bytes", "bits_per_weight", "types", "roles", "metadata", "provenance")
        document = {name: getattr(summary, name) for name in names}
        document |= {name: list(map(asdict, document[name])) for name in ("types", "roles")}
        console.show_json(document | {"fault": fault or None})
        return
    for title, shares in (("by type", summary.types), ("by role", summary.roles)):
        rows = []
        for share in shares:
            size, of_all = human_bytes(share.num_bytes), f"{share.num_bytes / summary.total_bytes:.1%}"
            rows.append((share.label, share.num_tensors, f"{share.bits_per_weight:.3f}", size, of_all))
        console.print_table(f"{Path(path).name} {title}", ("", "tensors", "bpw", "size", "share"), rows)
    for key, value in (summary.metadata | summary.provenance).items():
        console.say(f"{key}: {value}")
    console.say(
        f"{summary.arch}, {human_bytes(summary.total_bytes)} ({summary.total_bytes:,} bytes), "
        f"{summary.bits_per_weight:.3f} bits per weight" + (" of what is there" if fault else "")
    )
    if fault:
        console.say(f"This is not a whole model. {fault}")


def _lint(path: Path, as_json: bool) -> None:
    from dynquant.families.tokenizers.chat_template import chat_format, lint

    findings = lint(chat_format(path))
    if as_json:
        console.show_json({"findings": list(map(asdict, findings))})
        return
    for finding in sorted(findings, key=lambda finding: not finding.is_fault):
        console.say(f"{'fault' if finding.is_fault else 'note'}: {finding.text}")
    num_faults = sum(finding.is_fault for finding in findings)
    console.say(f"{path.name}: {num_faults or 'no'} fault{'s' * (num_faults != 1)} in chat template and special tokens")


def fit(options: FitOptions, as_json: AsJson = False) -> None:
    """Print llama.cpp's options that put as much of a file on the GPU as fits, and the bytes of every buffer.

    Example: dynquant fit model.gguf

    Example: dynquant fit model.gguf --gpu 24GB --ram 64GB --context 16384
    """
    from dynquant.planning.memory.placement import fit as place

    if options.gpu is None and options.ram is None:
        _fit_common_cards(options, as_json)
        return
    placement = place(options)
    if as_json:
        console.show_json(_placed(placement, options))
        return
    _note_context(options, placement)
    rows = []
    for name in (*(field.name for field in fields(placement.gpu)), "total"):
        sizes = (getattr(side, name) for side in (placement.gpu, placement.host))
        rows.append((name.replace("_", " ").replace("kv", "KV").replace("cuda", "CUDA"), *map(human_bytes, sizes)))
    rows.append(("of", options.gpu or "none", options.ram or "no --ram given"))
    console.print_table(f"{options.file.name}, {placement.context:,} tokens", ("", "GPU", "host"), rows)
    on_gpu = placement.layers_on_gpu
    experts = f", the experts of the first {placement.cpu_moe} in host memory" if placement.cpu_moe else ""
    console.say(f"{on_gpu} of {placement.layers} layers on the GPU{experts}")
    console.say(f"llama-server -m {options.file} {placement.flags(options.kv_type)}")


def _fit_common_cards(options: FitOptions, as_json: bool) -> None:
    from dynquant.planning.memory.placement import fit_common_cards

    placements = fit_common_cards(options.file, options.context, options.kv_type)
    if as_json:
        console.show_json({card: _placed(placement, options) for card, placement in placements.items()})
        return
    first = next(iter(placements.values()))
    _note_context(options, first)
    rows = [
        (card, *map(human_bytes, (each.gpu.total, each.host.total)), each.flags(options.kv_type))
        for card, each in placements.items()
    ]
    title = f"{options.file.name}, {first.context:,} tokens"
    console.print_table(title, ("GPU of", "on the GPU", "in host memory", "llama-server -m FILE"), rows)


def _note_context(options: FitOptions, placement: "Placement") -> None:
    """Say so where a longer context is asked for than the model was trained on, which no memory mends."""
    if 0 < placement.trained_context < placement.context:
        console.note(
            f"{options.file.name} was trained for {placement.trained_context:,} tokens of context, and --context is "
            f"{placement.context:,}: give no more, or scale its positions with llama.cpp's --rope-scaling"
        )


def _placed(placement: "Placement", options: FitOptions) -> dict[str, object]:
    sides = {"gpu": placement.gpu, "host": placement.host}
    totals = {name: asdict(side) | {"total": side.total} for name, side in sides.items()}
    return asdict(placement) | totals | {"flags": placement.flags(options.kv_type)}


@dataclass(frozen=True, kw_only=True)
class MachineOptions(Options):
    """The file of what a machine does in a second."""

    output: Annotated[Path, Flag("Where the machine file goes.", ("-o", "--output")), Writes(ending=".json")] = Path(
        "machine.json"
    )


def measure_machine(options: MachineOptions) -> None:
    """Measure this machine's CPU and disk for `plan --config-only DIR --machine FILE`: some minutes.

    Example: dynquant measure-machine -o machine.json
    """
    from dynquant.analysis.costs.measure_machine import measure_machine as measure

    with console.stage_progress("Nothing is kept: the measurement begins anew.") as progress:
        machine = measure(progress)
    machine.save(options.output)
    console.note(f"wrote {options.output}: {machine.name}, {machine.threads} threads")


def recipe(
    plan: PlanFile,
    model: Annotated[str, typer.Option(help="The float GGUF to quantize, in the command.")] = "MODEL.gguf",
    imatrix: Annotated[str | None, typer.Option(help="The imatrix file, in the command.", show_default=False)] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="The file to write, in the command.")] = "OUT.gguf",
    as_json: AsJson = False,
) -> None:
    """Print the llama-quantize command line that gives the types of a plan or file.

    Example: dynquant recipe plan/plan.json --model model-f32.gguf --imatrix imatrix.gguf -o model.gguf
    """
    from dynquant.recipes.command_line import command_line, left_alone, recipe_of, uses_imatrix
    from dynquant.recipes.type_lists import read_types

    types = read_types(plan)
    llama_recipe = recipe_of(types)
    if imatrix is None and uses_imatrix(llama_recipe):
        imatrix = "IMATRIX.gguf"
    command = command_line(llama_recipe, model=model, imatrix=imatrix, output=output)
    alone = left_alone(types)
    if as_json:
        types_of_one = {"token_embedding_type": llama_recipe.token_embedding, "output_tensor_type": llama_recipe.output}
        patterns = [{"pattern": pattern, "type": name} for pattern, name in llama_recipe.patterns]
        rest = [{"name": tensor.name, "type": tensor.type, "why": why} for tensor, why in alone]
        lists = {"tensor_types": patterns, "left_alone": rest, "command": command}
        console.show_json({"base": str(llama_recipe.base).upper()} | types_of_one | lists)
        return
    console.say(command)
    if alone:
        listed = ", ".join(f"{tensor.name} ({tensor.type})" for tensor, _ in alone)
        console.note(f"llama-quantize copies these from its input, which must have them in the same type: {listed}")


def diff(before: PlanFile, after: PlanFile, as_json: AsJson = False) -> None:
    """Compare the types of two plans or files of one model: what changed in which layers, and the bytes.

    Example: dynquant diff plan/plan.json published.gguf
    """
    from dynquant.recipes.diff import compare_types
    from dynquant.recipes.type_lists import read_types

    difference = compare_types(read_types(before), read_types(after))
    sides = {"before": difference.before, "after": difference.after}
    if as_json:
        document: dict[str, object] = {}
        for key, side in sides.items():
            tensor_bytes = sum(tensor.num_bytes for tensor in side.tensors)
            document[key] = {"name": side.name, "file_bytes": side.file_bytes, "tensor_bytes": tensor_bytes}
        document["changes"] = [asdict(change) | {"layers": change.layers} for change in difference.changes]
        document["histogram"] = [asdict(share) for share in difference.histogram]
        console.show_json(document)
        return
    if difference.changes:
        _print_changes(difference)
    rows = []
    for share in difference.histogram:
        sizes = human_bytes(share.bytes_before), human_bytes(share.bytes_after)
        rows.append((share.type, share.tensors_before, share.tensors_after, *sizes))
    console.print_table("by type", ("type", "tensors before", "after", "bytes before", "after"), rows)
    for key, side in sides.items():
        console.say(f"{key}: {side.name}, {side.file_bytes:,} bytes")
    num_tensors = sum(len(change.tensors) for change in difference.changes)
    num_bytes = difference.after.file_bytes - difference.before.file_bytes
    console.say(f"{num_tensors} of {len(difference.before.tensors)} tensors have another type; {num_bytes:+,} bytes")


def _print_changes(difference: "PlanDiff") -> None:
    from dynquant.recipes.plan_notes import number_ranges

    rows = []
    for change in difference.changes:
        place = change.role.value, number_ranges(change.layers) or "-", len(change.tensors)
        sizes = human_bytes(change.bytes_before), human_bytes(change.bytes_after)
        rows.append((*place, f"{change.before} > {change.after}", *sizes))
    old, new = (sum(getattr(c, side) for c in difference.changes) for side in ("bytes_before", "bytes_after"))
    num_tensors = sum(len(change.tensors) for change in difference.changes)
    rows.append(("all", "", num_tensors, "", human_bytes(old), human_bytes(new)))
    columns = ("role", "layers", "tensors", "types", "before", "after")
    console.print_table(f"{difference.before.name} to {difference.after.name}", columns, rows)
