"""`dynquant export`, `tune` and `export-adapter`: the commands that write models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.cli.terminal import console
from dynquant.exporters.options import AdapterOptions, ExportOptions, TuneFileOptions
from dynquant.options import Only
from dynquant.session import Session

if TYPE_CHECKING:
    from dynquant.exporters.stage import Exported


def export(options: ExportOptions, session: Annotated[Session, Only(("device", "threads"))]) -> None:
    """Write the model in the types of a plan or preset.

    Example: dynquant export ./model --plan plan/plan.json -o model.gguf

    Example: dynquant export ./model --plan plan/plan.json -f compressed-tensors -o out/

    Example: dynquant export ./vision-model --plan plan/plan.json -f safetensors -o out/
    """
    from dynquant.exporters import stage

    print_exported(stage.export(options, session))


def print_exported(exported: "Exported") -> None:
    """Name the files, and say how large they are together."""
    print_files(exported.files)
    size = exported.num_bytes
    console.say(f"{size:,} bytes, {8 * size / exported.num_weights:.3f} bits per weight")


def print_files(files: list[Path]) -> None:
    """Name the files, one a line."""
    for file in files:
        console.say(str(file))


def tune(options: TuneFileOptions, session: Annotated[Session, Only(("seed", "device"))]) -> None:
    """Tune what has no codes in any quantized GGUF on the KL to its original; types and size stay.

    Example: dynquant tune model.gguf --reference ./model --calibration text.jsonl -o tuned.gguf
    """
    from dynquant.exporters import stage

    print_files(stage.tune(options, session))


def export_adapter(options: AdapterOptions) -> None:
    """Write a LoRA adapter for llama.cpp: use it with any GGUF of its base, as --lora FILE or Llama(lora_path=...).

    Example: dynquant export-adapter adapter/ --base model.gguf -o adapter.gguf
    """
    from dynquant.exporters.adapter_gguf import export_adapter as write

    file = write(options.adapter, options.output, base=options.base)
    console.say(f"{file}\n{file.stat().st_size:,} bytes")
