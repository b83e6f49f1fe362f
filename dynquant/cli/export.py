"""`dynquant export`, `tune`, `export-adapter` and `release`: the commands that write models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dynquant.cli.terminal import console
from dynquant.exporters.options import AdapterFileOptions, ExportOptions, TuneFileOptions
from dynquant.options import Only
from dynquant.publishing.options import CARD_NAME, ReleaseOptions
from dynquant.resources import human_bytes
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
    from dynquant.publishing.effort_time import with_estimate

    print_exported(stage.export(options, with_estimate(options, session)))


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
    """Tune scales and norms of any GGUF or compressed-tensors checkpoint on the KL to its original; its size stays.

    Example: dynquant tune model.gguf --reference ./model --calibration text.jsonl -o tuned.gguf

    Example: dynquant tune w4a16/ --reference ./model --calibration text.jsonl -o tuned/
    """
    from dynquant.exporters import stage

    print_files(stage.tune(options, session))


def export_adapter(options: AdapterFileOptions) -> None:
    """Write a LoRA adapter for llama.cpp: use it with any GGUF of its base, as --lora FILE or Llama(lora_path=...).

    Example: dynquant export-adapter adapter/ --base model.gguf -o adapter.gguf
    """
    from dynquant.exporters.adapter_gguf import export_adapter as write

    file = write(options.adapter, options.output, base=options.base)
    console.say(f"{file}\n{file.stat().st_size:,} bytes")


def release(options: ReleaseOptions, session: Annotated[Session, Only(("seed", "device", "threads"))]) -> None:
    """Make a family of files of one model with their card, and push it to the Hub.

    One calibration and one table serve all sizes, and every tensor is encoded once in each type. A run that was stopped
    goes on with the same command; more sizes are added by asking for them.

    Example: dynquant release ./model --calibration text.jsonl --sizes 1.8:5.0 -o release/

    Example: dynquant release ./model --calibration text.jsonl --bpw 2.1,3.0 --text held-out.txt --select -o release/

    Example: dynquant release ./model --calibration text.jsonl --fits 8GB,16GB -o release/ --push OWNER/REPO
    """
    from dynquant.publishing import stage
    from dynquant.publishing.effort_time import with_estimate

    released = stage.release(options, with_estimate(options, session))
    rows = [
        (row.name, human_bytes(row.bytes), f"{row.bits_per_weight:.2f}")
        for row in released.record.files
        if row.is_released
    ]
    console.print_table(released.record.model, ("file", "size", "bits per weight"), rows)
    console.say(f"card: {options.output / CARD_NAME}")
    if options.push is None:
        return
    waiting = [upload for upload in released.uploads if not upload.is_there]
    size = human_bytes(sum(upload.num_bytes for upload in waiting))
    states = {True: "is there", False: "sent" if options.yes else "would go"}
    table = [(upload.name, human_bytes(upload.num_bytes), states[upload.is_there]) for upload in released.uploads]
    console.print_table(f"https://huggingface.co/{options.push}", ("file", "size", ""), table)
    console.say(f"{len(waiting)} files, {size}" + (" sent." if options.yes else " would go: repeat this with --yes."))
