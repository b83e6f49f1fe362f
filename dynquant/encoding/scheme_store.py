"""Linear layers in the schemes that vLLM reads, encoded once and kept on disk, for all plans that are tried.

    DIR/vllm-1f2e3d4c5b6a/blk.3.ffn_down_exps.weight.W3A16-128

A file is a safetensors file of what a checkpoint stores of each expert, as `2.weight_packed`; its name ends with the
group size. The folder's name holds a hash of what else decides the bytes, as that of `store`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.linears import encode_piece, fused_scales, pieces_of
from dynquant.encoding.store import folder_of
from dynquant.encoding.stream import Guidance, guidance_of
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.vllm_schemes import BF16, SCHEMES, Scheme, weights_of
from dynquant.resources import free_memory
from dynquant.running.live_weights import LiveWeights
from dynquant.session import Progress, ignore_progress
from dynquant.storage.atomic import read_tensors, save_tensors
from dynquant.workers import side_by_side


@dataclass(frozen=True)
class SchemeStore:
    """Encodes linear layers of a checkpoint on demand, as exports do: a `WeightStore`.

    `schemes` are those of every layer by name, with their groups; `directory` is this store's own.
    """

    model: Model
    checkpoint: LinearCheckpoint
    schemes: Mapping[str, Mapping[str, Scheme]]
    guidance: Guidance
    directory: Path
    device: torch.device
    threads: int | None = None

    @cached_property
    def _linears(self) -> dict[str, LinearLayer]:
        return {linear.name: linear for linear in self.checkpoint.linears}

    @cached_property
    def _others(self) -> dict[str, str]:
        """Keys in the checkpoint of what is no linear layer, by GGUF names."""
        return {name: tensor.key for name, tensor in self.checkpoint.others_by_name(self.model).items()}

    @cached_property
    def _global_scales(self) -> dict[str, float]:
        strategies = {name: {scheme.strategy for scheme in of.values()} for name, of in self.schemes.items()}
        return fused_scales(linear for name, linear in self._linears.items() if "tensor_group" in strategies[name])

    @cached_property
    def fixed(self) -> Mapping[str, str]:
        """Matrices beside the linear layers, which every checkpoint has in BF16 and this one has not."""
        others = self.checkpoint.others_by_name(self.model).items()
        rounded = (name for name, tensor in others if tensor.dtype == BF16.name)
        return {name: BF16.name for name in rounded if self._dtype(name) != BF16.name}

    def _dtype(self, name: str) -> str:
        return self.checkpoint.source.info(self._others[name]).dtype

    def live(self, hf_model: nn.Module) -> LiveWeights:
        """Return the places of layers in the running model, whose rows are in the checkpoint's order."""
        return LiveWeights(self.model, hf_model, self.checkpoint)

    def is_float(self, type_name: str) -> bool:
        """Return whether a scheme has no codes."""
        return not SCHEMES[type_name].is_quantized

    def original(self, name: str) -> Tensor:
        """Return the weights of the checkpoint, float32; of a stack all experts."""
        linear = self._linears.get(name)
        if linear is None:
            return self.checkpoint.source.load(self._others[name])
        weights = torch.stack([linear.load(expert) for expert in range(linear.num_experts)])
        return weights if linear.is_expert else weights[0]

    def fill(self, names_and_types: Iterable[tuple[str, str]], progress: Progress = ignore_progress) -> None:
        """Encode layers, side by side, in schemes in which they are not on disk.

        Raises:
            EncodeError: NaN or Inf weights; the layer is named.
            WriteError: the disk is full or cannot be written to.
        """
        pairs = [(name, type_name) for name, type_name in names_and_types if not self.is_float(type_name)]
        missing = [pair for pair in pairs if not self._file(*pair).is_file()]
        if not missing:
            return
        progress("encoding", 0, len(missing), unit="tensors")
        _ = self._global_scales  # once, before threads ask for it
        if self.device.type == "cpu":
            how = {"cost": self._needed_bytes, "budget": free_memory() // 2}
            encoded = side_by_side(self._encode, missing, self.threads, **how)
        else:
            encoded = map(self._encode, missing)
        for done, _ in enumerate(encoded, 1):
            progress("encoding", done, len(missing), unit="tensors", tensor=missing[done - 1][0])

    def decoded(self, name: str, type_name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return a layer, or all experts of a stack, as what is read of the checkpoint: float32, on `device`."""
        if self.is_float(type_name):
            return self.original(name).to(torch.bfloat16).to(device, torch.float32)
        self.fill([(name, type_name)])
        linear, stored = self._linears[name], self._stored(name, type_name)
        suffixes = [part.key for part in self.schemes[name][type_name].parts(*linear.shape[-2:])]
        layers = [
            weights_of({suffix: stored[f"{expert}.{suffix}"] for suffix in suffixes}).float()
            for expert in range(linear.num_experts)
        ]
        return (torch.stack(layers) if linear.is_expert else layers[0]).to(device)

    def _stored(self, name: str, type_name: str) -> dict[str, Tensor]:
        """Return what is on disk of a layer that was encoded; a damaged file is made anew."""
        file = self._file(name, type_name)
        try:
            return read_tensors(file)[1]
        except (OSError, SafetensorError, ValueError):
            self._encode((name, type_name))
            return read_tensors(file)[1]

    def _encode(self, pair: tuple[str, str]) -> None:
        name, type_name = pair
        tensors, how = {}, {"global_scales": self._global_scales, "device": self.device}
        for piece in pieces_of(self._linears[name], self.schemes[name][type_name], self.device):
            for expert, layer in zip(piece.experts, encode_piece(piece, self.guidance, **how), strict=True):
                tensors |= {f"{expert}.{suffix}": values for suffix, values in layer.stored().items()}
        save_tensors(self._file(name, type_name), tensors, {})

    def _needed_bytes(self, pair: tuple[str, str]) -> int:
        name, type_name = pair
        pieces = pieces_of(self._linears[name], self.schemes[name][type_name], self.device)
        return max(piece.needed_bytes for piece in pieces)

    def _file(self, name: str, type_name: str) -> Path:
        return self.directory / f"{name}.{type_name}-{self.schemes[name][type_name].group_size}"


def open_scheme_store(
    model: Model,
    checkpoint: LinearCheckpoint,
    schemes: Mapping[str, Iterable[Scheme]],
    stats: StatsFile,
    parent: Path,
    device: torch.device,
    threads: int | None = None,
) -> SchemeStore:
    """Return the store below `parent` of layers of a checkpoint in schemes, by layer, under these statistics.

    Raises:
        StatsError: the second moments are damaged, or of another calibration.
        WriteError: the directory cannot be made.
    """
    moments = stats.moments
    content = [model.fingerprint, stats.hash, torch.__version__, *([] if moments is None else [moments.identity])]
    by_name = {name: {scheme.name: scheme for scheme in of} for name, of in schemes.items()}
    how = (guidance_of(stats.stats, moments), folder_of(parent, "vllm", content), device, threads)
    return SchemeStore(model, checkpoint, by_name, *how)
