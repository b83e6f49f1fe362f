"""GGUF files for the closing pass: the fp16 numbers of super-blocks are trained, and what is stored in F32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.checkpoints.gguf_layout import TUNED
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import layer_of, mtp_layers
from dynquant.errors import ExportError
from dynquant.exporters.gguf import write_patched
from dynquant.exporters.tuning.interface import SCALES, ScaledParts, kind_of_values
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, read_scales, rounded_scales, with_scales
from dynquant.running.live_weights import LiveWeights


class QuantizedGGUF:
    """A GGUF file of `model`, which has its tensors in the same order."""

    pace = 1.0

    def __init__(self, source: GGUFSource, model: Model) -> None:
        self._source, self._model = source, model

    def live(self, hf_model: Any) -> LiveWeights:
        return LiveWeights(self._model, hf_model)

    def names(self) -> list[str]:
        return self._source.names()

    def is_quantized(self, name: str) -> bool:
        return bool(num_scales(self._type(name)))

    def kind(self, name: str) -> str:
        if self.is_quantized(name):
            return SCALES
        return kind_of_values(name) if self._type(name) == "F32" else ""

    def load(self, name: str) -> Tensor:
        return self._source.load(name)

    def scaled(self, name: str, device: torch.device) -> ScaledParts:
        type_name, blocks = self._type(name), self._blocks(name).to(device)
        scales = read_scales(type_name, blocks)
        alone = [scales * keep for keep in torch.eye(scales.shape[1], device=device)]
        parts = [decode(type_name, with_scales(type_name, blocks, scale)) for scale in alone]
        return ScaledParts(scales, torch.stack(parts, dim=1))

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        return rounded_scales(numbers) if self.is_quantized(name) else numbers

    def stored(self, name: str, numbers: Tensor) -> dict[str, Tensor]:
        if not self.is_quantized(name):
            return {name: numbers.cpu().view(torch.uint8)}
        packed = with_scales(self._type(name), self._blocks(name), numbers.cpu())
        return {name: packed.reshape(self._source.load_packed(name).shape)}

    def write(self, output: Path, replacements: Mapping[str, Tensor], *, encoder: str, outcome: str) -> list[Path]:
        encoder += TUNED * bool(replacements)
        return write_patched(self._source, output, replacements, encoder=encoder)

    def check_original(self) -> None:
        """Raise ExportError when layers or shapes are not the model's; the first tensor that differs is named."""
        sides = [
            {name: list(source.info(name).shape) for name in source.names()}
            for source in (self._source, self._model.source)
        ]
        ahead = mtp_layers(sides[1])
        layers = [max(({layer_of(name) or 0 for name in shapes} - ahead), default=0) for shapes in sides]
        difference = next(
            (
                f"`{name}` is {shape} and {sides[1][name]}"
                for name, shape in sides[0].items()
                if sides[1].get(name, shape) != shape
            ),
            f"there are {layers[0] + 1} and {layers[1] + 1} layers" if layers[0] != layers[1] else "",
        )
        if difference or not sides[0].keys() & sides[1].keys():
            raise ExportError(
                f"{self._source.path} is not of {self._model.name}: {difference or 'no tensor is in both'}. Give the "
                "model that it was made from as --reference."
            )

    def _type(self, name: str) -> str:
        return self._source.info(name).dtype

    def _blocks(self, name: str) -> Tensor:
        return self._source.load_packed(name).reshape(-1, QUANT_TYPES[self._type(name)].block_bytes)
