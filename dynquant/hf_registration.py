"""Makes transformers know `quant_method: "dynquant"` without importing it.

transformers already there: the quantizer is registered now. Otherwise a finder waits on `sys.meta_path` for the one
module that holds transformers' table of quantizers, registers right after that module has run, and goes away. It stands
aside for every other import. Only the standard library is imported here, so `import dynquant` stays light.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLE_MODULE = "transformers.quantizers.auto"
QUANT_METHOD = "dynquant"


def register_when_imported() -> None:
    """Register the quantizer with transformers, now or as soon as transformers is imported. May be called again."""
    table = sys.modules.get(TABLE_MODULE)
    if table is not None and hasattr(table, "get_hf_quantizer"):
        _register(table)
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _register(table: ModuleType) -> None:
    if QUANT_METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    from dynquant.hf_quantizer import DynquantConfig, DynquantHfQuantizer

    table.register_quantization_config(QUANT_METHOD)(DynquantConfig)
    table.register_quantizer(QUANT_METHOD)(DynquantHfQuantizer)


class _TableFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Another loader that registers once the module has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
