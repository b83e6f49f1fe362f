"""Size that a file may have to run in a given memory: what llama.cpp allocates besides the weights.

    memory = file + KV cache + compute buffer + CUDA context

All of it on one device, one sequence, llama.cpp's defaults: micro-batches of 512, flash attention, no `--swa-full`.

KV cache (exact; llama.cpp logs the same figure, src/llama-kv-cache.cpp): the context rounded up to 256 cells, and in
every layer a row of key_length * head_count_kv for K and of value_length * head_count_kv for V. Absorbed MLA stores the
latent vector and the rotated key once, as K, and no V. Gemma 3's sliding-window layers hold the window and one
micro-batch, rounded up to 256 cells. Other models with windows, and hybrid models, are counted as if every layer
attended in full; states of recurrent layers are not counted.

Compute buffer (an upper bound; llama.cpp reuses parts that are summed here): per token of a micro-batch, in F32, the
logits, the residual stream twice, and the wider of attention (queries and outputs, each twice) and feed-forward (gate,
up, their product and, with experts, two copies of every used expert's output); the attention mask in F32 and F16; and,
for a quantized cache, one layer's K and V in F16. On the tiny models of the tests llama.cpp takes 60 to 95 % of it.

CUDA context: 512 MiB for the driver, cuBLAS and the kernels. llama.cpp does not count it (its memory breakdown calls it
unaccounted: 749 MiB on one Blackwell card, llama.cpp issue 27953); what the compute buffer is overestimated by is the
reserve for such cards.
"""

from dataclasses import dataclass

from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.resources import human_bytes

UBATCH = 512  # tokens of a micro-batch, llama.cpp's default
CUDA_CONTEXT_BYTES = 512 << 20
_CELLS = 256  # llama.cpp rounds contexts up to a multiple of this
_WINDOW_PERIODS = {"gemma3": 6}
"""Architecture -> every how many layers one attends in full, where the file does not say."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of device memory and what is taken from it before weights. Raises PlanError: nothing is left for
    weights."""

    memory: int
    kv_cache: int
    compute_buffer: int
    label: str  # the request, as `24.00 GB of memory with 8,192 tokens of f16 KV cache`

    def __post_init__(self) -> None:
        if self.weights <= 0:
            raise PlanError(
                f"{self.label} is too little: {self._overhead()} leave nothing for the weights. {self._way_out(1)}"
            )

    @property
    def weights(self) -> int:
        """Bytes left for the file."""
        return self.memory - self.kv_cache - self.compute_buffer - CUDA_CONTEXT_BYTES

    def file_budget(self, smallest: int, largest: int, fixed_words: str = "") -> int:
        """Bytes that a plan may take when its size can be between these two. Raises PlanError: not even the smallest
        fits; the message has every part, and what `fixed_words` say about the smallest."""
        if self.weights < smallest:
            raise PlanError(
                f"{self.label} is too little: {self._overhead()} leave {human_bytes(self.weights)} for the weights, "
                f"and the smallest plan with these candidate types takes {human_bytes(smallest)} ({smallest:,} bytes). "
                + self._way_out(smallest)
                + fixed_words
            )
        return min(self.weights, largest)

    def describe(self, file_bytes: int) -> str:
        """One line with the parts and their sum."""
        total = file_bytes + self.memory - self.weights
        return f"{self.label}: weights {human_bytes(file_bytes)}, {self._overhead()}, together {human_bytes(total)}"

    def _way_out(self, weights: int) -> str:
        needed = weights + self.memory - self.weights
        return f"Give at least {needed:,} bytes, a shorter --context, a smaller --kv-type or smaller --types."

    def _overhead(self) -> str:
        return (
            f"KV cache {human_bytes(self.kv_cache)}, compute buffer {human_bytes(self.compute_buffer)} (at most) and "
            f"CUDA context {human_bytes(CUDA_CONTEXT_BYTES)}"
        )


def memory_budget(model: Model, memory: int, *, context: int, kv_type: str) -> MemoryBudget:
    """Return the memory that a model needs besides its weights; only its metadata is read.

    `memory` is bytes of device memory, `context` tokens that the KV cache holds, `kv_type` one of KV_TYPES.

    Raises:
        PlanError: a context below 1, heads that the cache type's blocks do not divide, or
            too little memory for any weights.
        CheckpointError: a number is missing in the metadata.
    """
    label = f"{human_bytes(memory)} of memory with {context:,} tokens of {kv_type} KV cache"
    cache, buffer = kv_cache_bytes(model, context, kv_type), compute_buffer_bytes(model, context, kv_type)
    return MemoryBudget(memory, cache, buffer, label)


def kv_cache_bytes(model: Model, context: int, kv_type: str = "f16") -> int:
    """Bytes of K and V of all layers. Raises as `memory_budget`."""
    return sum(kv_cache_of_layers(model, context, kv_type))


def kv_cache_of_layers(model: Model, context: int, kv_type: str = "f16") -> list[int]:
    """Bytes of K and V of every layer. Raises as `memory_budget`."""
    shape, cache_type, sizes = _Shape(model), QUANT_TYPES[kv_type.upper()], []
    for layer in range(model.hyper.n_layer):
        token = sum(_row_bytes(row, shape.head_lengths, cache_type) for row in shape.rows(layer))
        sizes.append(shape.cells(layer, context) * token)
    return sizes


def compute_buffer_bytes(model: Model, context: int, kv_type: str = "f16") -> int:
    """An upper bound of llama.cpp's compute buffer in bytes. Raises as `memory_budget`."""
    shape, hyper = _Shape(model), model.hyper
    attention = 2 * hyper.n_head * sum(shape.head_lengths)  # queries and outputs, each twice
    dense = 3 * shape.number("feed_forward_length", 0)  # gate, up and their product
    experts = hyper.n_expert_used * (3 * shape.number("expert_feed_forward_length", dense // 3) + 2 * hyper.n_embd)
    shared = 3 * shape.number("expert_shared_count", 0) * shape.number("expert_feed_forward_length", 0)
    per_token = hyper.n_vocab + 2 * hyper.n_embd + max(attention, dense, experts + shared)
    cells = _rounded_up(context)
    mask = UBATCH * cells * (4 + 2)  # F32 and F16
    widest = max(sum(shape.rows(layer)) for layer in range(hyper.n_layer))
    scratch = 0 if kv_type == "f16" else 2 * cells * widest  # one layer's K and V in F16
    return 4 * UBATCH * per_token + mask + scratch  # F32


class _Shape:
    """The sizes of attention, from GGUF metadata."""

    def __init__(self, model: Model) -> None:
        self._values = {field.key: field.value for field in model.metadata}
        self._hyper = model.hyper
        head = self._hyper.n_embd // max(self._hyper.n_head, 1)
        key = self.number("attention.key_length", head)
        self.head_lengths = key, self.number("attention.value_length", head)
        self._is_absorbed = self.number("attention.key_length_mla", 0) > 0
        self._window = self.number("attention.sliding_window", 0)
        self._period = self.number("attention.sliding_window_pattern", _WINDOW_PERIODS.get(model.arch, 0))
        self._has_windows = model.arch in _WINDOW_PERIODS and self._window > 0 and self._period > 0

    def number(self, key: str, default: int) -> int:
        """A number of the architecture; the largest of an array."""
        value = self._values.get(f"{self._hyper.arch}.{key}", default)
        return int(max(value)) if isinstance(value, list | tuple) else int(value)  # type: ignore[call-overload]

    def rows(self, layer: int) -> tuple[int, int]:
        """Values that one token puts into the K and the V cache of a layer."""
        heads = self._values.get(f"{self._hyper.arch}.attention.head_count_kv")
        heads = int(heads[layer]) if isinstance(heads, list | tuple) else self._hyper.n_head_kv
        key, value = self.head_lengths
        return heads * key, 0 if self._is_absorbed else heads * value

    def cells(self, layer: int, context: int) -> int:
        """Tokens that the cache of a layer holds."""
        if self._has_windows and (layer + 1) % self._period != 0:
            return _rounded_up(min(_rounded_up(context), self._window + UBATCH))  # window and a micro-batch
        return _rounded_up(context)


def _row_bytes(row: int, head_lengths: tuple[int, int], cache_type: QuantType) -> int:
    odd = next((length for length in head_lengths if length % cache_type.block_size), None)
    if odd is not None:
        raise PlanError(
            f"A KV cache of type {cache_type.name} needs heads in blocks of {cache_type.block_size}, and this model's "
            f"have {odd}; give --kv-type f16."
        )
    return cache_type.row_bytes(row)


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS
