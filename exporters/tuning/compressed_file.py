"""compressed-tensors checkpoints for the closing pass: scales of groups and rows, norms, biases and routers as stored.

Codes and zero points stay. So do scales that have few values: exponents of MXFP4 move by factors of 2, and E4M3 scales
of NVFP4 by an eighth, beside a global one that vLLM shares between layers that it fuses; training moves a scale by a
few percent.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import ExportError
from dynquant.exporters.compressed_tensors import write_patched
from dynquant.exporters.tuning.interface import SCALES, ScaledParts, kind_of_values
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.plain_quants import FLOAT_DTYPES
from dynquant.formats.vllm_schemes import SCHEMES, codes_of, zero_points_of
from dynquant.running.live_weights import LiveWeights


class QuantizedCheckpoint:
    """A compressed-tensors directory of `model`, whose layers are those of `layers`; experts count as one tensor."""

    pace = 0.5  # chosen by uniform W2A16's KL (reports/serving.md)

    def __init__(self, directory: Path, model: Model, layers: LinearCheckpoint) -> None:
        self._directory, self._model, self._layers = directory, model, layers
        self._source = SafetensorsSource(directory)
        self._linears = {linear.name: linear for linear in layers.linears}
        self._others = layers.others_by_name(model)

    def live(self, hf_model: Any) -> LiveWeights:
        return LiveWeights(self._model, hf_model, self._layers)

    def names(self) -> list[str]:
        return [*self._others, *self._linears]

    def is_quantized(self, name: str) -> bool:
        return self._scheme(name) is not None

    def kind(self, name: str) -> str:
        if name in self._others:
            return kind_of_values(name)
        scheme = self._scheme(name)
        return SCALES if scheme is not None and not SCHEMES[scheme].is_fp4 else ""

    def load(self, name: str) -> Tensor:
        if name in self._others:
            return self._source.load(self._others[name].key)
        weights = [self._source.load(f"{module}.weight") for module in self._modules(name)]
        return torch.stack(weights).view(self._linears[name].shape)

    def scaled(self, name: str, device: torch.device) -> ScaledParts:
        scales, weights = [], []
        for module in self._modules(name):
            parts = self._source.compressed_parts(f"{module}.weight")
            of_groups = parts["weight_scale"].to(device, torch.float32).view(-1, 1)
            codes, zeros = codes_of(parts), zero_points_of(parts)
            groups = codes.to(device).view(len(of_groups), -1)
            if zeros is not None:
                groups -= zeros.to(device).reshape(-1, 1)
            scales.append(of_groups)
            weights.append(groups.mul_(of_groups).unsqueeze(1))
        return ScaledParts(torch.cat(scales), torch.cat(weights))

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        dtype = self._dtype(name)
        largest = torch.finfo(dtype).max  # beyond, rounding gives Inf
        return numbers.clamp(-largest, largest).to(dtype).to(torch.float32)

    def stored(self, name: str, numbers: Tensor) -> dict[str, Tensor]:
        values = self.rounded(name, numbers).to(self._dtype(name)).cpu()
        if name in self._others:
            return {self._others[name].key: values}
        modules = self._modules(name)
        shape = (len(modules), self._linears[name].shape[-2], -1)
        return {f"{module}.weight_scale": scales for module, scales in zip(modules, values.view(shape), strict=True)}

    def write(self, output: Path, replacements: Mapping[str, Tensor], *, encoder: str, outcome: str) -> list[Path]:
        return write_patched(self._directory, output, replacements, outcome=outcome)

    def check_original(self) -> None:
        """Raise ExportError when the checkpoint is not of the model; the first tensor that differs is named."""
        expected = {
            f"{module}.weight": linear.shape[-2:] for linear in self._layers.linears for module in linear.modules
        }
        expected |= {tensor.key: tensor.shape for tensor in self._layers.others}
        stored = {name: tuple(self._source.info(name).shape) for name in self._source.names()}
        for name, shape in expected.items():
            if stored.get(name) != shape:
                held = list(stored[name]) if name in stored else "missing"
                raise ExportError(
                    f"{self._directory} is not of {self._model.name}: `{name}` is {held}, and {list(shape)} there. "
                    "Give the model that it was made from as --reference."
                )

    @cached_property
    def untrained(self) -> list[str]:
        """The schemes whose scales stay as they are."""
        schemes = {self._scheme(name) for name in self._linears}
        return [name for name, scheme in SCHEMES.items() if name in schemes and scheme.is_fp4]

    def _modules(self, name: str) -> tuple[str, ...]:
        return self._linears[name].modules

    def _scheme(self, name: str) -> str | None:
        """Return the scheme of a linear layer, None for one that is stored in floats, or another tensor."""
        return self._source.compressed_scheme(f"{self._modules(name)[0]}.weight") if name in self._linears else None

    def _dtype(self, name: str) -> torch.dtype:
        if name in self._others:
            return FLOAT_DTYPES[self._source.info(self._others[name].key).dtype]
        return self._source.compressed_scale_type(f"{self._modules(name)[0]}.weight")
