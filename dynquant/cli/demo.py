"""Commands about the installation: `dynquant demo` and `dynquant fetch-llama-cpp`."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from dynquant.cli.terminal import console
from dynquant.errors import OptionError
from dynquant.options import Flag, Options, Writes
from dynquant.storage.atomic import write_atomically
from dynquant.storage.file_names import files_of_plan


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """The folder of a demonstration."""

    output: Annotated[
        Path,
        Flag("Directory for everything the demo makes.", ("-o", "--output")),
        Writes("folder", beside=lambda output, typed: [output / "eval.json", *files_of_plan(output / "plan")]),
    ] = Path("demo-out")


def demo(options: DemoOptions) -> None:
    """Plan, export and evaluate the bundled 16M mixture-of-experts model; about a minute and a half on two cores."""
    from dynquant.analysis.report.stage import write_plan_report
    from dynquant.analysis.report.tables import evaluation_table
    from dynquant.calibration.options import CalibrationOptions
    from dynquant.cli.evaluate import print_report, report_tree
    from dynquant.cli.export import print_exported
    from dynquant.cli.plan import print_plan
    from dynquant.evaluation.evaluate import evaluate
    from dynquant.evaluation.options import EvalOptions, TaskOptions
    from dynquant.exporters.options import ExportOptions
    from dynquant.exporters.stage import export
    from dynquant.planning.options import PlanOptions
    from dynquant.planning.stage import make_plan

    session, output = console.session(), options.output
    folder = output / "plan"
    with resources.as_file(resources.files("dynquant") / "data") as data:
        model = str(data / "textbook-moe-16m")
        plan = make_plan(PlanOptions(model=model, output=folder, calibration=CalibrationOptions(tokens=16384)), session)
        write_plan_report(model, folder, session)
        print_plan(plan, folder)
        file = output / f"textbook-moe-16m-{plan.bits_per_weight:.2f}bpw.gguf"
        print_exported(export(ExportOptions(model=model, output=file, plan=folder / "plan.json"), session))
        mmlu = {"mmlu_data": str(data / "demo_questions.jsonl"), "shots": str(data / "demo_shots.jsonl"), "limit": 108}
        asked = TaskOptions(
            tasks=("kl", "ppl", "mmlu"), text=(data / "demo_text.txt",), max_tokens=4096, scoring=("cloze",), **mmlu
        )
        report = evaluate(EvalOptions(candidate=str(file), reference=model, asked=asked), session)
        print_report(report)
        write_atomically(output / "eval.json", report.to_json())
        console.note(f"wrote {output / 'eval.json'}")
        write_plan_report(model, folder, session, measured=evaluation_table(report_tree(report)))
    console.say(f"\nllama.cpp continues: {continuation(file, Path(model))}")
    console.say(f"\nmodel:  {file}\nreport: {folder / 'report.html'}")


def fetch_llama_cpp(yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Fetch llama.cpp's converter once, for architectures that dynquant does not convert by itself.

    It comes from the source distribution of the installed llama-cpp-python, which pip downloads (some 70 MB), and is
    kept in dynquant's cache. Only the converter's files are unpacked. From then on its code runs, in a process of its
    own, on models of such architectures; code that comes with a model never does.

    Example: dynquant fetch-llama-cpp --yes
    """
    from dynquant.families.converter.source_tree import fetch_tree, fetched_tree, is_tree

    target = fetched_tree()
    if is_tree(target):
        console.say(f"{target} is there already.")
        return
    offer = f"Download llama-cpp-python's sources by pip (some 70 MB), and unpack the converter (3 MB) to {target}"
    if yes:
        console.note(offer)
    else:
        way_out = "Give --yes to fetch without a question, or llama.cpp's source tree by --llama-cpp DIR."
        try:
            agreed = typer.confirm(f"{offer}?")
        except typer.Abort as error:
            raise OptionError(f"Nothing was fetched: nobody answered. {way_out}") from error
        if not agreed:
            raise OptionError(f"Nothing was fetched: the answer was no. {way_out}")
    console.say(f"unpacked to {fetch_tree()}")


def continuation(file: Path, directory: Path) -> str:
    """Return how stock llama.cpp, running a GGUF file of a Hugging Face directory, goes on with a sentence."""
    from dynquant.evaluation.llama_cpp import LlamaCppRunner
    from dynquant.running.load import load_tokenizer

    runner, tokenizer = LlamaCppRunner(file), load_tokenizer(directory)
    prompt = tokenizer("The purpose of a statistical test is to")["input_ids"]
    ((words,),) = runner.write([prompt], 40, frozenset())
    runner.close()
    return tokenizer.decode([*prompt, *words])
