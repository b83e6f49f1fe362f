"""LoRA adapters on packed models, in PEFT's own format.

`get_peft_model(model, LoraConfig(...))` and `PeftModel.from_pretrained(model, directory)` work as they are after
`import dynquant`. `add_adapter` chooses the targets; `load_adapter` checks first that an adapter fits.
"""

from dynquant.lora.adapters import add_adapter, load_adapter

__all__ = ["add_adapter", "load_adapter"]
