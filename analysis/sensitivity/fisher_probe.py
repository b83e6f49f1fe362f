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

Gradients come one decoder layer at a time (`streamed_backward`). On a GPU forward passes are in float32, so that it
draws the tokens that a CPU draws, and backward passes in TF32.
"""

from collections.abc import Iterable
from math import exp, hypot, log
from statistics import fmean

import torch
from torch import Tensor, nn

from dynquant.analysis.errors.table import ErrorRow, ErrorTable, Price
from dynquant.analysis.sensitivity.streamed_backward import StreamedBackward
from dynquant.encoding.store import WeightStore
from dynquant.running.linear_hooks import sampled_log_probability
from dynquant.running.streaming.layer_replay import LayerReplay
from dynquant.session import Progress, ignore_progress

_PROBED_TYPES = 3
Costs = dict[str, dict[str, Price]]  # tensor -> type -> its price


def fisher_probe(
    hf_model: nn.Module,
    store: WeightStore,
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
    live, replay = store.live(hf_model), LayerReplay(hf_model, windows.split(1), is_exact=True)
    names = table.tensors().keys() & set(live.names())
    probed = {name: _probed_types(table.tensors()[name].values(), store) for name in sorted(names)}
    store.fill(((name, type_name) for name, types in probed.items() for type_name in types), progress)

    def differences(name: str) -> Tensor:
        original = store.original(name).to(replay.device).flatten()
        return torch.stack([original - store.decoded(name, t, replay.device).flatten() for t in probed[name]])

    for _ in replay.keep():  # the inputs of all layers
        pass
    backward = StreamedBackward(hf_model, live, replay, {name for name in names if probed[name]}, differences)
    backward.run(lambda logits: sampled_log_probability(logits, generator), "Fisher probe", progress)
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


def _probed_types(rows: Iterable[ErrorRow], store: WeightStore) -> list[str]:
    """Return types spread over the sizes of those that lose anything, `_PROBED_TYPES` of them."""
    by_size = sorted((row for row in rows if not store.is_float(row.type)), key=lambda row: row.bytes)
    places = ((2 * number + 1) * len(by_size) // (2 * _PROBED_TYPES) for number in range(_PROBED_TYPES))
    return list(dict.fromkeys(by_size[place].type for place in places if by_size))
