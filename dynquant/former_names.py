"""Modules that the README showed under other names before the folders: those names import what is there now."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER_NAMES = {
    "dynquant.checkpoint": "dynquant.families.open",
    "dynquant.codecs": "dynquant.formats",
    "dynquant.codecs.ggml_encoder": "dynquant.encoding.ggml",
    "dynquant.quant_types": "dynquant.formats.quant_types",
    "dynquant.trl_support": "dynquant.training.trl_head",
}


class _FormerNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in FORMER_NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        # The import system takes what stands here afterwards, so both names are one module with its own spec.
        sys.modules[module.__name__] = import_module(FORMER_NAMES[module.__name__])


def import_former_names() -> None:
    """Let former names be imported. May be called again."""
    if not any(isinstance(finder, _FormerNames) for finder in sys.meta_path):
        # First: an empty folder that an older checkout left behind would count as a namespace package.
        sys.meta_path.insert(0, _FormerNames())
