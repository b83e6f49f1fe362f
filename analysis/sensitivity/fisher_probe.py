"""The Fisher probe: what the KL makes of the very bytes of the table's encoder, tensor by tensor and type by type.

To second order KL(original || quantized) = 1/2 dWᵀ F dW, with F the Fisher information of the original. A probe draws a
token from the model's own distribution at every position of a window; the gradient g of their summed log-probabilities
has E[g gᵀ] = F summed over the window (r = onehot(label) - p has E[r rᵀ] = diag(p) - p pᵀ). So

    cost(tensor, type) = 1/2 mean over probes of <g, W - Wq>² / tokens of a window      nats per token

with Wq the decoded blocks (AURA's form). Unlike the closed form it assumes nothing about how errors spread over
channels and tokens; unlike it, each number is a mean of few squares: its standard error is about sqrt(2 / probes) of
itself. The price of a tensor in a type is therefore the closed-form cost times one factor for each tensor, the
geometric mean over three types, of small, middle and large size, of probe over closed form; the errors of types are
nearly independent directions, so that the factor is known better than any one cost. Only these are encoded whole.

Gradients come one decoder layer at a time: from the last to the first, each layer runs again from its kept input, gets
the gradients of its output for all windows, and leaves those of its input; the gradients of its weights are multiplied
with W - Wq and forgotten. In memory at a time: 4 bytes a weight of one layer, for each type and for the gradient. On a
GPU forward passes are in float32, so that it draws the tokens that a CPU draws, and backward passes in TF32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, hypot, log
from statistics import fmean

import torch
from torch import Tensor, nn

from dynquant.analysis.errors.table import ErrorRow, ErrorTable, Price
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.encoding.store import EncodedStore
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.running.linear_hooks import frozen_weights, sampled_log_probability
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import tf32_products
from dynquant.running.streaming.layer_replay import LayerReplay
from dynquant.session import Progress, ignore_progress

_PROBED_TYPES = 3
Costs = dict[str, dict[str, Price]]  # tensor -> type -> its price


def fisher_probe(
    hf_model: nn.Module,
    store: EncodedStore,
    table: ErrorTable,
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Costs:
    """Measure cost and standard error of every tensor, in three types of the table.

    `hf_model` is the original; each of `windows` [n, window] is one probe. Tensors that have no place in the
    running model are left out.

    Raises:
        CheckpointError: the original's weights cannot be followed into the running model.
        StatsError: the model's decoder layers cannot be found.
    """
    generator = torch.Generator().manual_seed(seed)
    live, replay = LiveWeights(store.model, hf_model), LayerReplay(hf_model, windows.split(1), is_exact=True)
    names = table.tensors().keys() & set(live.names())
    probed = {name: _probed_types(table.tensors()[name].values()) for name in names}

    def differences(name: str) -> Tensor:
        original = store.model.source.load(name).to(replay.device).flatten()
        return torch.stack([original - store.decoded(name, t, replay.device).flatten() for t in probed[name]])

    backward = _StreamedBackward(hf_model, live, replay, {name for name in names if probed[name]}, differences)
    backward.run(lambda logits: sampled_log_probability(logits, generator), progress)
    return {
        name: dict(zip(probed[name], map(_price, products.cpu() / windows.shape[1] ** 0.5), strict=True))
        for name, products in backward.products.items()
    }


def probe_prices(table: ErrorTable, costs: Costs) -> Costs:
    """Return closed-form costs times each tensor's factor; tensors without a probe take the mean factor."""
    factors = {name: _factor(table, name, of_type) for name, of_type in costs.items()}
    logs = [log(factor) for factor, _ in factors.values() if factor > 0]
    usual = exp(fmean(logs)) if logs else 1.0
    prices: Costs = {}
    for name, rows in table.tensors().items():
        factor, error = factors.get(name, (usual, usual))
        closed = {row.type: table.closed_form_cost(row) for row in rows.values()}
        sampling = {row.type: factor * table.sampling_se(row) for row in rows.values()}
        prices[name] = {t: Price(kl=factor * c, se=hypot(error * c, sampling[t])) for t, c in closed.items()}
    return prices


def _factor(table: ErrorTable, name: str, costs: dict[str, Price]) -> tuple[float, float]:
    """Return the geometric mean over types of probe over closed form, and its standard error."""
    rows = table.tensors()[name]
    pairs = [(price.kl, table.closed_form_cost(rows[type_name])) for type_name, price in costs.items()]
    logs = [log(kl / closed) for kl, closed in pairs if kl > 0 and closed > 0]
    if not logs:
        return 1.0, 1.0
    factor = exp(fmean(logs))
    spread = float(torch.tensor(logs).std()) if len(logs) > 1 else 1.0
    return factor, factor * spread / len(logs) ** 0.5


def _price(products: Tensor) -> Price:
    """Return the cost of an encoding whose difference has these products with gradients, [probes]."""
    squares = 0.5 * products.square()
    error = float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else 0.0
    return Price(kl=float(squares.mean()), se=error)


def _probed_types(rows: Iterable[ErrorRow]) -> list[str]:
    """Return types spread over the sizes of those that lose anything, `_PROBED_TYPES` of them."""
    by_size = sorted((row for row in rows if not QUANT_TYPES[row.type].is_float), key=lambda row: row.bytes)
    places = ((2 * number + 1) * len(by_size) // (2 * _PROBED_TYPES) for number in range(_PROBED_TYPES))
    return list(dict.fromkeys(by_size[place].type for place in places if by_size))


@dataclass
class _StreamedBackward:
    """A backward pass on many windows, from layer to layer."""

    hf_model: nn.Module
    live: LiveWeights
    replay: LayerReplay  # windows that each run alone
    names: set[str]  # GGUF tensors that have a place in the running model
    differences: Callable[[str], Tensor]  # what the gradients of a tensor are multiplied with, [types, weights]
    products: dict[str, Tensor] = field(default_factory=dict)  # by tensor, float64 [types, windows]
    _flowing: list[Tensor] = field(default_factory=list)  # gradients between two layers, one a window

    def run(self, loss: Callable[[Tensor], Tensor], progress: Progress) -> None:
        """Run it; `loss` maps logits [tokens, vocabulary] of a window to a scalar."""
        total = self.replay.num_layers + 1  # the embedding counts as a layer
        progress("Fisher probe", 0, total, unit="layers")
        with frozen_weights(self.hf_model):
            for _ in self.replay.keep():  # the inputs of all layers
                pass
            self._head(loss)
            for done, layer in enumerate(reversed(range(self.replay.num_layers)), start=1):
                self._layer(layer)
                progress("Fisher probe", done, total, unit="layers")
            self._embedding()
            progress("Fisher probe", total, total, unit="layers")

    def _head(self, loss: Callable[[Tensor], Tensor]) -> None:
        is_tied = self.live.parameters("token_embd.weight")[0] is self.hf_model.get_output_embeddings().weight
        with self._measured(["token_embd.weight" if is_tied else "output.weight"]) as collect:
            for index in range(len(self.replay.batches)):
                with torch.no_grad():
                    hidden = self.replay.layer(index, self.replay.num_layers - 1)
                hidden.requires_grad_(True)
                with torch.enable_grad():
                    total = loss(self.replay.head(index, hidden))
                self._run_backward(total)
                self._flowing.append(hidden.grad)
                collect()

    def _layer(self, layer: int) -> None:
        below = []
        with self._measured([name for name in self.names if layer_of(name) == layer]) as collect:
            for index, gradient in enumerate(self._flowing):
                hidden = self.replay.layer_input(index, layer).detach().requires_grad_(True)
                with torch.enable_grad():
                    out = self.replay.layer(index, layer, hidden)
                self._run_backward(out, gradient)
                below.append(hidden.grad)  # flows into the layer below
                collect()
        self._flowing = below

    def _embedding(self) -> None:
        with self._measured(["token_embd.weight"]) as collect:
            for index, gradient in enumerate(self._flowing):
                with torch.enable_grad():
                    embedded = self.replay.embedded(index)
                self._run_backward(embedded, gradient)
                collect()

    def _run_backward(self, out: Tensor, gradient: Tensor | None = None) -> None:
        with tf32_products(self.replay.device):
            out.backward(gradient)

    @contextmanager
    def _measured(self, names: list[str]) -> Iterator[Callable[[], None]]:
        """Context manager: yields a function to call after each window's backward pass, which adds to `products`.

        A tied embedding gets its products in two parts, through the head and at last.
        """
        names = sorted(self.names & set(names))
        parameters = [parameter for name in names for parameter in self.live.parameters(name)]
        differences = {name: self.differences(name) for name in names}
        windows = iter(range(len(self.replay.batches)))

        def collect() -> None:
            window = next(windows)
            for name, by_type in differences.items():
                shape = len(by_type), len(self.replay.batches)
                products = self.products.setdefault(name, by_type.new_zeros(shape, dtype=torch.float64))
                products[:, window] += by_type @ self.live.gradient(name).flatten()
            for parameter in parameters:
                parameter.grad = None

        for parameter in parameters:
            parameter.requires_grad_(True)
        yield collect
        for parameter in parameters:
            parameter.requires_grad_(False)
