"""The Fisher probe: what the KL makes of the very bytes that would ship, tensor by tensor and type by type.

To second order KL(original || quantized) = 1/2 dWᵀ F dW, with F the Fisher information of the original. A probe draws a
token from the model's own distribution at every position of a window; the gradient g of their summed log-probabilities
has E[g gᵀ] = F summed over the window (r = onehot(label) - p has E[r rᵀ] = diag(p) - p pᵀ). So

    cost(tensor, type) = 1/2 mean over probes of <g, W - Wq>² / tokens of a window      nats per token

with Wq the decoded blocks (AURA's form). Unlike the closed form it assumes nothing about how errors spread over
channels and tokens; unlike it, each number is a mean of few squares: its standard error is about sqrt(2 / probes) of
itself. The price of a tensor in a type is therefore the closed-form cost times one factor for each tensor, the
geometric mean over types of probe over closed form; the errors of types are nearly independent directions, so that the
factor is known better than any one cost.

The backward pass is streamed: from the last layer to the first, each runs again from its kept input, takes the
gradients of its output for all probes, and leaves those of its input. Weight gradients of one layer are in memory at a
time, 4 bytes a weight and probe of the layer's largest tensor group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, log
from statistics import fmean

import torch
from torch import Tensor, nn

from dynquant.analysis.error_table import ErrorTable, Price
from dynquant.architecture import layer_of
from dynquant.encoded_store import EncodedStore
from dynquant.fisher import sampled_log_probability
from dynquant.layer_replay import LayerReplay
from dynquant.live_weights import LiveWeights

Progress = Callable[[str, int, int], None]
Costs = dict[str, dict[str, Price]]


def fisher_probe(
    hf_model: nn.Module,
    store: EncodedStore,
    table: ErrorTable,
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Costs:
    """Cost and standard error of every tensor in every type of the table, one probe for each of `windows` [n, window].

    `hf_model` is the original in float32. Tensors that have no place in the running model are left out.

    Raises:
        CheckpointError: the original is not a Hugging Face checkpoint.
        StatsError: the model's decoder layers cannot be found.
    """
    replay = LayerReplay(hf_model, windows.split(1))
    probe = _Probe(hf_model, LiveWeights(store.model, hf_model), store, table, windows.shape[1])
    generator = torch.Generator().manual_seed(seed)
    stages = replay.num_layers + 1
    with probe.no_trained_parameters():
        for _ in replay.keep():
            pass
        flowing = probe.head(replay, generator)
        for done, layer in enumerate(reversed(range(replay.num_layers)), start=1):
            flowing = probe.layer(replay, layer, flowing)
            if progress:
                progress("Fisher probe", done, stages)
        probe.embedding(replay, flowing)
        if progress:
            progress("Fisher probe", stages, stages)
    return probe.costs


def probe_prices(table: ErrorTable, costs: Costs) -> Costs:
    """Closed-form costs times each tensor's factor; tensors without a probe take the mean factor."""
    factors = {name: _factor(table, name, of_type) for name, of_type in costs.items()}
    known = [log(factor) for factor, _ in factors.values() if factor > 0]
    usual = exp(fmean(known)) if known else 1.0
    prices: Costs = {}
    for name, rows in table.tensors().items():
        factor, error = factors.get(name, (usual, usual))
        closed = {row.type: table.closed_form_cost(row) for row in rows.values()}
        prices[name] = {type_name: Price(kl=factor * c, se=error * c) for type_name, c in closed.items()}
    return prices


def _factor(table: ErrorTable, name: str, costs: dict[str, Price]) -> tuple[float, float]:
    """Geometric mean over types of probe over closed form, and its standard error."""
    rows = table.tensors()[name]
    logs = [
        log(price.kl / table.closed_form_cost(rows[type_name]))
        for type_name, price in costs.items()
        if price.kl > 0 and table.closed_form_cost(rows[type_name]) > 0
    ]
    if not logs:
        return 1.0, 1.0
    factor = exp(fmean(logs))
    spread = float(torch.tensor(logs).std()) if len(logs) > 1 else 1.0
    return factor, factor * spread / len(logs) ** 0.5


@dataclass
class _Probe:
    """The stages of the streamed backward pass, and what they have found."""

    hf_model: nn.Module
    live: LiveWeights
    store: EncodedStore
    table: ErrorTable
    window: int
    costs: Costs = field(default_factory=dict)
    _parts: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def no_trained_parameters(self) -> Iterator[None]:
        trained = [parameter for parameter in self.hf_model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def head(self, replay: LayerReplay, generator: torch.Generator) -> list[Tensor]:
        """The gradients of the last layer's output, one a probe. A tied embedding's part through the head is kept."""
        flowing: list[Tensor] = []
        is_tied = self.live.parameter("token_embd.weight") is self.hf_model.get_output_embeddings().weight
        with self._measured(["token_embd.weight" if is_tied else "output.weight"], is_whole=not is_tied) as taken:
            for index in range(len(replay.batches)):
                with torch.no_grad():
                    hidden = replay.layer(index, replay.num_layers - 1)
                hidden.requires_grad_(True)
                with torch.enable_grad():
                    sampled_log_probability(replay.head(index, hidden), generator).backward()
                flowing.append(hidden.grad)
                taken()
        return flowing

    def layer(self, replay: LayerReplay, layer: int, flowing: list[Tensor]) -> list[Tensor]:
        """The gradients of a layer's input from those of its output."""
        below = []
        with self._measured([name for name in self.live.names() if layer_of(name) == layer]) as taken:
            for index, gradient in enumerate(flowing):
                hidden = replay.layer_input(index, layer).detach().requires_grad_(True)
                with torch.enable_grad():
                    replay.layer(index, layer, hidden).backward(gradient)
                below.append(hidden.grad)
                taken()
        return below

    def embedding(self, replay: LayerReplay, flowing: list[Tensor]) -> None:
        """The last stage; a tied embedding's two parts are added here."""
        with self._measured(["token_embd.weight"]) as taken:
            for index, gradient in enumerate(flowing):
                with torch.enable_grad():
                    replay.embedded(index).backward(gradient)
                taken()

    @contextmanager
    def _measured(self, names: list[str], *, is_whole: bool = True) -> Iterator[Callable[[], None]]:
        """Inside, call the function after each probe's backward pass; the tensors' costs are there at the end, unless
        a later stage has the other part of their gradients."""
        wanted = [name for name in names if name in self.table.tensors() and name in set(self.live.names())]
        gradients: dict[str, list[Tensor]] = {name: [] for name in wanted}

        def take() -> None:
            for name in wanted:
                gradients[name].append(self.live.gradient(name).flatten().cpu())
            for parameter in parameters:
                parameter.grad = None

        parameters = [self.live.parameter(name) for name in wanted]
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield take
        for parameter in parameters:
            parameter.requires_grad_(False)
        for name in wanted:
            total = torch.stack(gradients.pop(name))
            total += self._parts.pop(name, torch.zeros(()))
            if is_whole:
                self.costs[name] = self._costs_of(name, total)
            else:
                self._parts[name] = total

    def _costs_of(self, name: str, gradients: Tensor) -> dict[str, Price]:
        """gradients [probes, weights]."""
        original = self.store.model.source.load(name).flatten()
        found = {}
        for type_name in self.table.tensors()[name]:
            difference = original - self.store.decoded(name, type_name).flatten()
            squares = 0.5 * (gradients @ difference).double().square() / self.window  # [probes]
            error = float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else 0.0
            found[type_name] = Price(kl=float(squares.mean()), se=error)
        return found
