"""LoRA adapters on packed models, in PEFT's own format.

`get_peft_model(model, LoraConfig(...))` and `PeftModel.from_pretrained(model, directory)` work as they are after
`import dynquant`. `add_adapter` chooses the targets; `load_adapter` checks first that an adapter fits; `merge` encodes
the packed weights again. `start_from_residual` starts an adapter from what quantization took; `AdapterStart` blends
what training made of it with that start. `save_adapter` writes it in a type of choice, to which `round_adapter` rounds.
"""

from typing import TYPE_CHECKING, Any

from dynquant.errors import AdapterError

if TYPE_CHECKING:
    from dynquant.lora.adapters import add_adapter, load_adapter
    from dynquant.lora.merging import merge
    from dynquant.lora.residual import start_from_residual
    from dynquant.lora.start import AdapterStart, round_adapter, save_adapter

__all__ = [
    "AdapterStart", "add_adapter", "load_adapter", "merge", "round_adapter", "save_adapter", "start_from_residual",
]  # fmt: skip
_MODULES = {
    "AdapterStart": "start", "add_adapter": "adapters", "load_adapter": "adapters", "merge": "merging",
    "round_adapter": "start", "save_adapter": "start", "start_from_residual": "residual",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: reading a saved adapter needs no PEFT."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"dynquant.lora.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        raise AdapterError(f"Adapters need PEFT ({error}): pip install 'dynquant-toolchain[train]'.") from error
