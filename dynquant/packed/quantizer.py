"""`quantization_config` with `quant_method: "dynquant"`: transformers loads and saves packed models.

The configuration names the quant type of every matrix by its name in the files, which is that of the parameter in
language models, and the checkpoint's own in vision-language models; modules are replaced on the meta device,
and weights load as the bytes that they are. Registered by `import dynquant` (`registration`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynquant.checkpoints.safetensors_format import read_header
from dynquant.checkpoints.vision_names import keys_of
from dynquant.errors import CheckpointError
from dynquant.formats.quant_types import quant_type
from dynquant.kernels.planes import is_packed
from dynquant.packed.layers import PackedModule, choose_layout
from dynquant.packed.places import pack_modules

FORMAT_VERSION = 1


class DynquantConfig(QuantizationConfigMixin):
    """`types`: tensor name in the files -> quant type name. `provenance`: what made the weights, as strings. `joined`:
    layers that several tensors make, or whose rows or columns GGUF has in another order. `gguf`: the architecture, and
    GGUF names by those in the files, of models without a family.

    Raises:
        CheckpointError: written by a later version of the format, or without types.
    """

    def __init__(
        self,
        types: Mapping[str, str] | None = None,
        version: int = FORMAT_VERSION,
        provenance: Mapping[str, str] | None = None,
        joined: Mapping[str, Mapping[str, Any]] | None = None,
        gguf: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"`quantization_config` has the version {version!r}, but this dynquant reads version {FORMAT_VERSION}. "
                "Upgrade dynquant, or export the model again."
            )
        if not isinstance(types, Mapping):
            raise CheckpointError(
                "`quantization_config` has no `types`. dynquant cannot quantize while transformers loads a model: make "
                "the checkpoint with `dynquant export MODEL --plan PLAN -f safetensors -o DIR`."
            )
        self.quant_method = "dynquant"
        self.version = version
        self.types = dict(types)
        self.provenance = dict(provenance or {})
        if joined:
            self.joined = dict(joined)
        if gguf:
            self.gguf = dict(gguf)


class DynquantHfQuantizer(HfQuantizer):
    """Loads packed weights as they are stored; quantizes nothing itself."""

    requires_calibration = True
    quantization_config: DynquantConfig

    @property
    def is_trainable(self) -> bool:
        """Packed weights stay frozen; adapters and the floats beside them can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of the floats as it is; transformers 5.17 tells it here alone."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        types, joined = self.quantization_config.types, getattr(self.quantization_config, "joined", None)
        key_of = keys_of(types, model.state_dict())
        by_key = {key_of.get(name, name): given for name, given in types.items()}
        pack_modules(model, by_key, dtype=self._dtype, joined=joined)
        files = kwargs.get("checkpoint_files") or ()
        check_files(model, [Path(file) for file in files if str(file).endswith(".safetensors")])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # transformers 5.17 leaves floats whose names it changes (towers) in the type of the file.
        precise = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not any(part in name for part in precise):
                weight.data = weight.data.to(self._dtype)
        choose_layout(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise NotImplementedError("dynquant does not turn a packed model back into a float one; load the original.")


def check_files(model: nn.Module, files: list[Path]) -> None:
    """Refuse safetensors files that are cut short or lack the bytes of a packed weight; reads headers only.

    transformers would fill what is missing with random numbers.

    Raises:
        CheckpointError: naming the tensor and its file.
    """
    if not files:
        return
    entries = {name: (file, entry) for file in files for name, entry in read_header(file).items()}
    key_of = keys_of(entries, model.state_dict())
    stored = {key_of.get(name, name): place for name, place in entries.items()}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for path, module in model.named_modules():
        for name in module.types if isinstance(module, PackedModule) else ():
            key = f"{path}.{name}"
            if key not in stored:
                if tied.get(key) in stored:
                    continue
                raise CheckpointError(
                    f"{files[0].parent} does not hold `{key}` ({module.types[name]}), which its config.json lists. "
                    "The download is incomplete; fetch it again."
                )
            file, entry = stored[key]
            expected = getattr(module, name)
            is_bytes = is_packed(quant_type(module.types[name]))
            if tuple(entry["shape"]) != tuple(expected.shape) or is_bytes != (entry["dtype"] == "U8"):
                raise CheckpointError(
                    f"{file} stores `{key}` as {entry['dtype']} {entry['shape']}, but {module.types[name]} calls for "
                    f"{'U8' if is_bytes else 'floats'} {list(expected.shape)}. It is corrupt or of another export."
                )
