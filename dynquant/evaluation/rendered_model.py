"""A running transformers model that takes on the weights of any plan, tensor by tensor, and its KL on text or pictures.

Weights come from a `WeightStore`, which encodes them once, so that a plan costs the decoding of the tensors in which it
differs from the one before, and a forward pass. Activations are float32, as in llama.cpp with F32 KV; what is scored is
what the file holds. A pass takes several sequences, and applies the head at the scored positions only. Its size is
bounded by the memory of the logits, which a vocabulary of 150,000 tokens makes the largest tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from dynquant.encoding.store import WeightStore
from dynquant.evaluation.distributions import Distributions
from dynquant.inputs.model_inputs import Batch, ModelInputs
from dynquant.packed.float32_products import use_tensor_cores
from dynquant.running.streaming.layer_replay import LayerReplay

DRAWN_TOGETHER = 1024  # tokens whose draws from the tails have one seed
_CPU_BYTES = 64 << 20  # a CPU gains nothing from more rows once its threads have work
_GPU_BYTES = 8 << 30


class RenderedModel:
    """`hf_model`, the original in float32, which ends up with the weights that were installed last.

    Raises CheckpointError when the original's weights cannot be followed into the running model.
    """

    def __init__(self, hf_model: nn.Module, store: WeightStore) -> None:
        self.hf_model = hf_model
        use_tensor_cores(hf_model, weights_stay=False)
        self.live = store.live(hf_model)
        self._store = store
        self._names = set(self.live.names())
        self.types: dict[str, str] = {}

    def install(self, types: Mapping[str, str]) -> None:
        """Give every named tensor these types' weights; others become the original's again, but for those that every
        file stores in another type.

        Raises:
            CheckpointError: a tensor in a quantized type has no place in the running model.
        """
        self.live.check(name for name, type_name in types.items() if not self._store.is_float(type_name))
        types = {**self._store.fixed, **types}
        placed = {name: type_name for name, type_name in types.items() if name in self._names}
        changed = {name for name in self.types.keys() | placed.keys() if placed.get(name) != self.types.get(name)}
        self._store.fill((name, placed[name]) for name in sorted(changed & placed.keys()))
        for name in sorted(changed):  # decoding is what a plan costs
            self.write(name, placed.get(name))
        self.types = placed

    def write(self, name: str, type_name: str | None) -> None:
        """One tensor's weights in a type, or the original's, without a change of `types`."""
        if name in self._names:
            self.live.write(name, self._weights(name, type_name))

    def error(self, name: str) -> Tensor:
        """Return the installed weights of a tensor less the original's."""
        return self._weights(name, self.types[name]) - self._weights(name, None)

    def _weights(self, name: str, type_name: str | None) -> Tensor:
        device = self.live.parameters(name)[0].device
        if type_name is None:
            return self._store.original(name).to(device)
        return self._store.decoded(name, type_name, device)


class ScoredInputs:
    """Text or samples with pictures, the original's distributions on them, and the KL of whatever is installed.

    The original is `rendered` as it is, or `original`: a running model with the experts that `rendered` lacks.

    Scored are all positions of text windows, and of pictures every text token that is followed by one.

    Raises:
        ValueError: a plan is installed already, so that the original cannot be run.
        StatsError: the decoder layers of a language model cannot be found.
    """

    def __init__(self, rendered: RenderedModel, inputs: ModelInputs, original: nn.Module | None = None) -> None:
        if rendered.types:
            raise ValueError("`rendered` holds a plan's weights; make its texts before anything is installed")
        self.rendered, self.name, self._inputs = rendered, inputs.name, inputs
        self.replay: LayerReplay | None = None
        """The layers of a model on text; `score` keeps what enters them."""
        if not inputs.has_pictures:
            # Windows that share a seed: on a GPU a forward pass takes several such groups, and draws the same tokens.
            group = max(1, DRAWN_TOGETHER // inputs.longest)
            vocab_size, device = rendered.hf_model.config.get_text_config().vocab_size, rendered.hf_model.device
            groups = max(1, windows_at_once(inputs.longest, vocab_size, device) // group)
            self._group_tokens = group * inputs.longest
            batches = inputs.windows.split(groups * group)
            self.replay = LayerReplay(original or rendered.hf_model, batches)
        self._targets = [Distributions.of(logits, seed=seed) for seed, logits in enumerate(self._logits())]
        if original is not None:
            self.replay = LayerReplay(rendered.hf_model, batches)
        is_text = self.replay is not None
        self.lengths = [inputs.longest] * len(inputs) if is_text else [len(target) for target in self._targets]
        """Scored positions of each window or sample."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def score(self) -> tuple[Tensor, Tensor]:
        """Return KL(original || rendered) in nats and whether the top token agrees, both [tokens]."""
        divergences, agreements = [], []
        for logits, target in zip(self._logits(), self._targets, strict=True):
            divergences.append(target.kl(logits).cpu())
            agreements.append(target.agreements(logits))
        return torch.cat(divergences), torch.cat(agreements)

    def loss(self) -> Callable[[Tensor], Tensor]:
        """Return a function of the logits of one batch of `replay` after another: the sum of their KL, to train on."""
        targets = iter(self._targets)
        return lambda logits: torch.cat(
            [next(targets).kl_lower_bound(part) for part in logits.split(self._group_tokens)]
        ).sum()

    def _logits(self) -> Iterator[Tensor]:
        if self.replay is not None:
            return (part for logits in self.replay.keep() for part in logits.split(self._group_tokens))
        return scored_logits(self.rendered.hf_model, self._inputs)


def bytes_at_once(device: torch.device | str, most: int = _GPU_BYTES) -> int:
    """Return how large the logits of one forward pass may be: on a GPU up to `most`, and an eighth of what is free."""
    device = torch.device(device)
    if device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return min(most, free // 8)


def windows_at_once(window: int, vocab_size: int, device: torch.device | str) -> int:
    """Return how many windows of `window` tokens go into one forward pass."""
    return max(1, bytes_at_once(device) // (window * vocab_size * 4))


@torch.inference_mode()
def scored_logits(hf_model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield logits float32 [scored positions, vocabulary] of batches of one sequence, in order, on the model's device.

    Consecutive windows of one length are run together; samples with pictures one by one.
    """
    vocab_size = hf_model.config.get_text_config().vocab_size
    for (is_plain, window), alike in groupby(
        batches, key=lambda batch: (len(batch.arguments) == 1, batch.ids.shape[1])
    ):
        at_once = windows_at_once(window, vocab_size, hf_model.device) if is_plain else 1
        for part in _parts(alike, at_once):
            arguments = {name: torch.cat([b.arguments[name] for b in part]) for name in part[0].arguments}
            places = [(row, column) for row, batch in enumerate(part) for column in batch.scored.tolist()]
            logits = logits_at(hf_model, places, **arguments)
            yield from logits.split([len(batch.scored) for batch in part])


def logits_at(hf_model: nn.Module, places: Sequence[tuple[int, int]], **arguments: object) -> Tensor:
    """Return logits float32 [places, vocabulary] at (row, column) of a batch; the head is applied to these alone.

    `arguments` are the model's; tensors are moved to its device.
    """
    device = hf_model.device
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    rows, columns = torch.tensor(places, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
    with _head_only_at(hf_model, rows, columns, on_device["input_ids"].shape) as taken:
        logits = hf_model(**{"use_cache": False} | on_device).logits
    # A model that has no head as a module, or gives it something of another shape, has computed all logits.
    return (logits[0] if taken else logits[rows, columns]).float()


@contextmanager
def _head_only_at(hf_model: nn.Module, rows: Tensor, columns: Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """Context manager: the head sees hidden states [1, places, channels]; the list is empty where it did not."""
    taken: list[bool] = []

    def pick(_module: nn.Module, inputs: tuple) -> tuple | None:
        if not inputs or inputs[0].shape[:-1] != shape:
            return None
        taken.append(True)
        return (inputs[0][rows, columns][None], *inputs[1:])

    head = hf_model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(pick)
    try:
        yield taken
    finally:
        if hook is not None:
            hook.remove()


def _parts(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    part: list[Batch] = []
    for batch in batches:
        part.append(batch)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
