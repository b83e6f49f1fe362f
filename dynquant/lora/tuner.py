"""PEFT's LoRA model, with packed modules among what it can wrap.

`import dynquant` puts it into PEFT's table of tuners (`registration`), so that `get_peft_model`,
`PeftModel.from_pretrained` and trainers that call them work on packed models as on any other, and adapters need nothing
in their configuration that stock PEFT does not know. `LoraConfig._register_custom_module`, PEFT's own way, is not saved
with an adapter: whoever loads one would have to give the mapping again.
"""

from contextlib import nullcontext
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn

from dynquant.lora.layers import PackedLoraEmbedding, PackedLoraExperts, PackedLoraLinear, check_config, fused_parts
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import PackedEmbedding, PackedExperts, PackedLatentProjection, PackedLinear, PackedModule

_LAYERS = {
    PackedLinear: PackedLoraLinear,
    PackedRows: PackedLoraLinear,
    PackedLatentProjection: PackedLoraLinear,
    PackedEmbedding: PackedLoraEmbedding,
}


class PackedLoraModel(LoraModel):
    """`LoraModel` for models with and without packed modules."""

    @staticmethod
    def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if not isinstance(base, PackedModule):
            return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        check_config(lora_config)
        if isinstance(base, PackedExperts):
            return PackedLoraExperts(target, adapter_name, config=lora_config, **kwargs)
        kwargs.pop("parameter_name", None)  # a weight that is named as a parameter is the layer's only one
        return _LAYERS[type(base)](target, adapter_name, config=lora_config, **kwargs)

    def _inject_parameters(
        self, peft_config: LoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """PEFT's matching of `target_parameters`, over the names that transformers gives a packed module's weights."""
        if not any(isinstance(module, PackedModule) for module in model.modules()):
            return super()._inject_parameters(peft_config, model, adapter_name, low_cpu_mem_usage)
        endings = tuple(f".{name}" for name in peft_config.target_parameters)
        wrapped = []
        for path, module in list(model.named_modules()):
            bare = path.replace(".base_layer", "")
            for name in () if ".lora_" in path else _parameters_of(module):
                if f".{bare}.{name}".endswith(endings):
                    with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                        self._wrap_parameter(peft_config, model, adapter_name, bare, name)
                    wrapped.append(f"{bare}.{name}")
        return wrapped

    def _wrap_parameter(
        self, peft_config: LoraConfig, model: nn.Module, adapter_name: str, path: str, name: str
    ) -> None:
        parent_path, _, child = path.rpartition(".")
        target = wrapper = model.get_submodule(path)
        while isinstance(wrapper, LoraLayer):
            if getattr(wrapper, "parameter_name", name) == name:
                target = wrapper
                break
            wrapper = wrapper.base_layer
        options = {"current_key": f"{path}.{name}", "parameter_name": name}
        self._create_and_replace(peft_config, adapter_name, target, child, model.get_submodule(parent_path), **options)


def _parameters_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, PackedExperts):
        return fused_parts(module)
    if isinstance(module, PackedModule):
        return ("weight",)
    return tuple(name for name, _ in module.named_parameters(recurse=False))
