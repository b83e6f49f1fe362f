"""`dynquant fetch-llama-cpp`."""

from typing import Annotated

import typer

from dynquant.cli.terminal import console
from dynquant.errors import OptionError


def fetch_llama_cpp(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
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
    if not yes:
        try:
            agreed = typer.confirm(f"Download llama-cpp-python's sources by pip, and unpack the converter to {target}?")
        except typer.Abort as error:
            raise OptionError("Nothing was fetched: nobody answered. Give --yes.") from error
        if not agreed:
            console.note("nothing was fetched")
            return
    console.say(f"unpacked to {fetch_tree()}")
