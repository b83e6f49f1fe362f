"""Makes transformers know `quant_method: "dynquant"`, and PEFT packed modules, without importing either.

Each library that is already there gets its entry now. For the others a finder waits on `sys.meta_path` for the module
that holds transformers' table of quantizers, or for PEFT, registers right after that module has run, and goes away. It
stands aside for every other import. Only the standard library is imported here, so `import dynquant` stays light.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

TABLE_MODULE = "transformers.quantizers.auto"
QUANT_METHOD = "dynquant"
PEFT_MODULE = "peft"


def register_when_imported() -> None:
    """Register with transformers and PEFT, now or as soon as each is imported. May be called again."""
    for name, (is_ready, register) in _TABLES.items():
        table = sys.modules.get(name)
        if table is not None and hasattr(table, is_ready):
            register(table)
        elif not any(isinstance(finder, _TableFinder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _TableFinder(name))


def _register_quantizer(table: ModuleType) -> None:
    if QUANT_METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    from dynquant.packed.quantizer import DynquantConfig, DynquantHfQuantizer

    table.register_quantization_config(QUANT_METHOD)(DynquantConfig)
    table.register_quantizer(QUANT_METHOD)(DynquantHfQuantizer)


def _register_tuner(peft: ModuleType) -> None:
    """Only models with packed modules are treated differently by our tuner; see `lora.tuner`."""
    from dynquant.lora.tuner import PackedLoraModel

    for table in (peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING):
        if table[peft.PeftType.LORA] is peft.LoraModel:
            table[peft.PeftType.LORA] = PackedLoraModel


_TABLES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    TABLE_MODULE: ("get_hf_quantizer", _register_quantizer),
    PEFT_MODULE: ("__version__", _register_tuner),
}
"""Module -> a name that it has once it has run, and what to do then."""


class _TableFinder(MetaPathFinder):
    """Gives the wanted module a loader that registers. Asking for its spec alone, as `find_spec` does, is no import."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    """Another loader that registers once the module has run."""

    def __init__(self, loader: Any, finder: _TableFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _TABLES[module.__name__][1](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
