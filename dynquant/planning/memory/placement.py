"""Places of the parts of a GGUF file when a GPU does not hold all of it, and llama.cpp's options that put them there.

Routed experts are most of the weights and do little of the work, so that they are the first to stay in host memory,
those of the first layers first (`--n-cpu-moe`); attention, shared experts, routers and the KV cache stay on the GPU.
Where even they do not fit, and in dense models, the first layers stay in host memory with their caches (`-ngl`).

KV cache and compute buffer are what llama.cpp itself lays out for the file, where one is installed; else those of
`budget`, of which the latter is an upper bound. Two things are added. A model whose output is its embedding has
it on the GPU a second time, since the embedding stays in host memory. And for prompts llama.cpp multiplies on the GPU
with weights from host memory, for which its compute buffer there holds the largest of their tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.gguf_source import is_gguf
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.tensor_roles import Role, layer_of, mtp_layers
from dynquant.errors import PlanError
from dynquant.evaluation.llama_cpp_memory import reserved_bytes
from dynquant.families.open import open_model
from dynquant.planning.memory.budget import (
    CUDA_CONTEXT_BYTES,
    UBATCH,
    compute_buffer_bytes,
    kv_cache_of_layers,
)
from dynquant.planning.options import FitOptions
from dynquant.resources import human_bytes, parse_size
from dynquant.storage.file_kinds import but_is

_CONTEXT = 8192  # tokens, where the model was trained for as many
COMMON_CARDS = ("8 GB", "12 GB", "16 GB", "24 GB")
"""Memories of graphics cards that most people have."""


@dataclass(frozen=True)
class Buffers:
    """Bytes on one side: in the GPU's memory, or in the host's."""

    weights: int = 0
    kv_cache: int = 0
    compute_buffer: int = 0
    cuda_context: int = 0

    @property
    def total(self) -> int:
        """Sum of all buffers."""
        return self.weights + self.kv_cache + self.compute_buffer + self.cuda_context


@dataclass(frozen=True)
class Placement:
    """Layers and experts on the GPU, and the buffers on both sides."""

    gpu: Buffers
    host: Buffers
    layers: int
    layers_on_gpu: int
    """Those behind the others."""
    cpu_moe: int
    """Experts of so many layers, from the first, stay in host memory; 0 where all layers are treated alike."""
    trained_context: int
    """Tokens of context that the model was trained for; 0 where the file does not say."""
    context: int
    """Tokens of the KV cache."""

    @property
    def offload_flags(self) -> str:
        """llama.cpp's options that say what goes to the GPU."""
        words = f"-ngl {self.layers_on_gpu + bool(self.gpu.total)}"  # the output counts as a layer
        return f"{words} --n-cpu-moe {self.cpu_moe}" if self.cpu_moe else words

    def flags(self, kv_type: str) -> str:
        """Return what llama.cpp's programs are started with."""
        words = f"{self.offload_flags} -c {self.context}"
        return words if kv_type == "f16" else f"{words} -ctk {kv_type} -ctv {kv_type} -fa on"


def fit(options: FitOptions) -> Placement:
    """Return the placement that has as much on the GPU as fits; without `ram` the host has room for the rest.

    Raises:
        PlanError: the file and what runs it take more than both memories; the message says what would do.
        CheckpointError: the file is no whole GGUF model.
    """
    file, context, reserved = _opened(options.file, options.context, options.kv_type)
    gpu = parse_size(options.gpu) if options.gpu else 0
    placement = file.placement(gpu, context, options.kv_type, reserved)
    host, ram = placement.host, options.ram and parse_size(options.ram)
    if ram is None or host.total <= ram:
        return placement
    less = context // 2
    while less >= UBATCH and file.placement(gpu, less, options.kv_type).host.total > ram:
        less //= 2
    raise PlanError(
        f"{options.file.name} with {context:,} tokens of {options.kv_type} KV cache does not fit: weights of "
        f"{human_bytes(host.weights)}, a cache of {human_bytes(host.kv_cache)} and a compute buffer of "
        f"{human_bytes(host.compute_buffer)} stay in host memory, and --ram is {options.ram}. Give --ram of at least "
        f"{host.total:,} bytes{f', --context {less}' if less >= UBATCH else ''}, a larger --gpu, a smaller "
        "--kv-type or a smaller file."
    )


def fit_common_cards(
    path: Path, context: int | None, kv_type: str, *, asks_llama_cpp: bool = True
) -> dict[str, Placement]:
    """Return the placement on each of COMMON_CARDS, with all that is left in host memory.

    Without `asks_llama_cpp`, cache and buffers are those of `plan --fits`. Raises as `fit`.
    """
    file, context, reserved = _opened(path, context, kv_type, asks_llama_cpp=asks_llama_cpp)
    return {card: file.placement(parse_size(card), context, kv_type, reserved) for card in COMMON_CARDS}


def _opened(
    path: Path, context: int | None, kv_type: str, *, asks_llama_cpp: bool = True
) -> tuple["_File", int, tuple[int, int] | None]:
    """Return a file, the context, of its own where none is asked for, and what an installed llama.cpp reserves."""
    if not is_gguf(path):
        raise PlanError(f"{path} is no GGUF file, which llama.cpp runs{but_is(path)}. Export the model first.")
    file = _File(path)
    context = context or min(_CONTEXT, file.trained_context or _CONTEXT)
    return file, context, reserved_bytes(path, context, kv_type) if asks_llama_cpp else None


class _File:
    """A GGUF file by its parts: the embedding, layers with and without their experts, the output."""

    def __init__(self, path: Path) -> None:
        self._model = open_model(path)
        self.trained_context = self._model.hyper.n_ctx
        # llama.cpp does not load layers that predict tokens ahead.
        self._layers = self._model.hyper.n_layer - len(mtp_layers(self._model.roles))
        self._shared, self._experts, self._largest = ([0] * self._layers for _ in range(3))
        self._embedding = self._output = 0
        tensors = [tensor for tensor in inspect(path).tensors if tensor.name not in self._model.mtp_tensors]
        for tensor in tensors:
            layer, size = layer_of(tensor.name), tensor.num_bytes
            if layer is not None:
                (self._experts if "_exps" in tensor.name else self._shared)[layer] += size
                self._largest[layer] = max(self._largest[layer], size)
            elif tensor.role.is_embedding:
                self._embedding += size
            else:
                self._output += size
        self._is_tied = all(tensor.role is not Role.OUTPUT for tensor in tensors)

    def placement(self, gpu: int, context: int, kv_type: str, reserved: tuple[int, int] | None = None) -> Placement:
        """Return the first placement that fits the GPU; `reserved` is what llama.cpp says of cache and buffer."""
        caches = kv_cache_of_layers(self._model, context, kv_type)[: self._layers]
        compute = compute_buffer_bytes(self._model, context, kv_type)
        if reserved is not None:
            caches = [round(size * reserved[0] / max(sum(caches), 1)) for size in caches]
            compute = reserved[1]
        split = (self._split(*where, caches, compute, context) for where in self._choices())
        whole = self._embedding + sum(self._shared) + sum(self._experts) + self._output
        sides, contexts = (Buffers(), Buffers(whole, sum(caches), compute)), (self.trained_context, context)
        on_host = Placement(*sides, self._layers, 0, 0, *contexts)
        return next((placement for placement in split if placement.gpu.total <= gpu), on_host)

    def _choices(self) -> Iterator[tuple[int, int]]:
        """Yield numbers of layers on the GPU and of layers whose experts are in host memory, the best first."""
        last = max((layer + 1 for layer, size in enumerate(self._experts) if size), default=0)
        yield from ((self._layers, count) for count in range(last + 1) if count == 0 or self._experts[count - 1])
        yield from ((count, last) for count in range(self._layers - 1, -1, -1))

    def _split(self, on_gpu: int, cpu_moe: int, caches: Sequence[int], compute: int, context: int) -> Placement:
        """Return the buffers of a placement; those of the host's computations are at most the whole compute buffer."""
        first = self._layers - on_gpu
        weights = sum(self._shared[first:]) + sum(self._experts[max(first, cpu_moe) :])
        rest = sum(self._shared) + sum(self._experts) - weights
        output = self._output + (self._embedding if self._is_tied else 0)
        copied = max((size for layer, size in enumerate(self._largest) if layer < max(first, cpu_moe)), default=0)
        inputs = 4 * UBATCH * (self._model.hyper.n_embd + context)  # and the mask
        return Placement(
            Buffers(weights + output, sum(caches[first:]), compute + copied, CUDA_CONTEXT_BYTES),
            Buffers(self._embedding + rest, sum(caches[:first]), compute if rest else min(compute, inputs)),
            self._layers,
            on_gpu,
            cpu_moe,
            self.trained_context,
            context,
        )
