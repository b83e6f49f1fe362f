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
"""

from math import exp, log
from statistics import fmean

import torch
from torch import Tensor, nn

from dynquant.analysis.errors.table import ErrorTable, Price
from dynquant.analysis.sensitivity.streamed_backward import streamed_gradients
from dynquant.encoding.store import EncodedStore
from dynquant.running.linear_hooks import sampled_log_probability
from dynquant.running.live_weights import LiveWeights
from dynquant.session import Progress

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
        CheckpointError: the original's weights cannot be followed into the running model.
        StatsError: the model's decoder layers cannot be found.
    """
    generator = torch.Generator().manual_seed(seed)
    costs: Costs = {}

    def drawn(logits: Tensor) -> Tensor:
        return sampled_log_probability(logits, generator)

    def consume(name: str, gradients: Tensor) -> None:
        costs[name] = _costs_of(name, gradients, store, table, windows.shape[1])

    def report(done: int, total: int) -> None:
        if progress:
            progress("Fisher probe", done, total, unit="layers")

    live = LiveWeights(store.model, hf_model)
    streamed_gradients(hf_model, live, windows, drawn, table.tensors(), consume, report)
    return costs


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


def _costs_of(name: str, gradients: Tensor, store: EncodedStore, table: ErrorTable, tokens: int) -> dict[str, Price]:
    """gradients [probes, weights]."""
    original = store.model.source.load(name).flatten()
    found = {}
    for type_name in table.tensors()[name]:
        difference = original - store.decoded(name, type_name).flatten()
        squares = 0.5 * (gradients @ difference).double().square() / tokens  # [probes]
        error = float(squares.std()) / len(squares) ** 0.5 if len(squares) > 1 else 0.0
        found[type_name] = Price(kl=float(squares.mean()), se=error)
    return found
