"""`dynquant release`, and the table of its files."""

from typing import Annotated

from dynquant.cli.terminal import console
from dynquant.options import Only
from dynquant.publishing.options import CARD_NAME, ReleaseOptions
from dynquant.resources import human_bytes
from dynquant.session import Session


def release(options: ReleaseOptions, session: Annotated[Session, Only(("seed", "device", "threads"))]) -> None:
    """Make a family of files of one model with their card, and push it to the Hub.

    One calibration and one table serve all sizes, and every tensor is encoded once in each type. A run that was stopped
    goes on with the same command; more sizes are added by asking for them.

    Example: dynquant release ./model --calibration text.jsonl --sizes 1.8:5.0 -o release/

    Example: dynquant release ./model --calibration text.jsonl --bpw 2.1,3.0 --text held-out.txt --select -o release/

    Example: dynquant release ./model --calibration text.jsonl --fits 8GB,16GB -o release/ --push OWNER/REPO
    """
    from dynquant.publishing import stage

    released = stage.release(options, session)
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
