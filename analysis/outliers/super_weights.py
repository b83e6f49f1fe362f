"""Super weights: single scalars of a down-projection that a model cannot do without (arXiv 2411.07191).

One forward pass records, for every down-projection (dense, shared and each routed expert), the output of largest
magnitude. A spike makes its tensor a candidate when it is `threshold` times the median of the layers' maxima and when
it enlarges the residual stream; [row, col] is its output channel and the input channel that contributes most to it.
The candidate is zeroed and the model run again: it is a super weight when the log-probabilities of the text change by
`min_effect` on average. Then the search goes on without it, until no spike is left. All weights are restored.
The paper's fixed threshold (|output| > 50) fits 7B models; a ratio and a measured effect fit any size.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.recipes.folder import SuperWeight
from dynquant.running.expert_hooks import ExpertCall, expert_layout, expert_stack, record_experts
from dynquant.running.stored_experts import StoredExperts
from dynquant.running.weight_inputs import WeightInputs, is_conv1d
from dynquant.storage.documents import FrozenRecord

Zeroed = Callable[[str, int | None, int, int], AbstractContextManager[float]]
"""Makes one weight read as zero inside its context, and gives its value."""
_LAYER_MODULE = re.compile(r"^(.*?\.\d+)\.")


class Ablation(FrozenRecord):
    """Perplexity of a text: as it is, with the super weight zeroed, with the k next-largest weights zeroed instead."""

    perplexity: float
    without_super_weight: float
    without_next_largest: float
    num_next_largest: int
    num_tokens: int


@dataclass(frozen=True)
class DownSpike:
    """Largest output of one down-projection (of one expert) in one forward pass, and where it comes from."""

    name: str
    module: str
    expert: int | None
    max_in: float
    in_channel: int
    max_out: float
    position: int
    row: int
    col: int
    share: float
    is_growing: bool = False  # the residual stream is larger at this token and channel after the layer than before it

    @property
    def layer(self) -> int:
        return layer_of(self.name) or 0

    @property
    def tensor(self) -> tuple[str, int | None]:
        return self.name, self.expert

    @property
    def place(self) -> tuple[str, int | None, int, int]:
        return self.name, self.expert, self.row, self.col


@dataclass(frozen=True)
class Criteria:
    """Conditions under which a spike is tried, and a weight is found to be super."""

    threshold: float = 20.0  # least ratio of a spike to the median of the layers' maxima
    min_share: float = 0.25  # least part of the spike that one weight contributes
    min_effect: float = 0.1  # least mean change of a token's log-probability, in nats, when the weight is zeroed
    max_iterations: int = 6  # largest number of candidates that are tried; each costs one forward pass


def find_super_weights(
    hf_model: nn.Module,
    weights: WeightInputs,
    token_ids: torch.Tensor,
    *,
    criteria: Criteria = Criteria(),
    zeroed: Zeroed | None = None,
) -> list[SuperWeight]:
    """Search on one text, int64 [tokens] or [1, tokens]; a few hundred tokens are enough.

    `zeroed(module, expert, row, col)` replaces writing into the model's weights, for a model that has them in memory
    only while it uses them.
    """
    zero: Zeroed = zeroed or partial(_zeroed, hf_model)
    scan = DownScan(hf_model, weights, token_ids)
    spikes, log_probs = scan.run()
    # A tensor that spikes only once another weight is zeroed answers to damage, and is not super in the model as it is.
    eligible = {spike.tensor for spike in spikes if spike.is_growing and _ratio(spike, spikes) >= criteria.threshold}
    super_weights: list[SuperWeight] = []
    tried: set[tuple] = set()
    with ExitStack() as restore:
        while len(tried) < criteria.max_iterations:
            candidates = [
                spike
                for spike in spikes
                if spike.tensor in eligible and spike.place not in tried
                if spike.share >= criteria.min_share and _ratio(spike, spikes) >= criteria.threshold
            ]
            if not candidates:
                break
            first = candidates[0]
            tried.add(first.place)
            zeroing = ExitStack()
            value = zeroing.enter_context(zero(first.module, first.expert, first.row, first.col))
            spikes_without, log_probs_without = scan.run()
            effect = (log_probs_without - log_probs).abs().mean().item()
            if effect < criteria.min_effect:
                zeroing.close()
                continue
            restore.push(zeroing)  # it stays zero until the search ends
            same = {name: getattr(first, name) for name in SuperWeight.model_fields if hasattr(first, name)}
            super_weights.append(SuperWeight(**same, value=value, ratio=_ratio(first, spikes), effect=effect))
            spikes, log_probs = spikes_without, log_probs_without
    return super_weights


def ablation(hf_model: nn.Module, super_weight: SuperWeight, token_ids: torch.Tensor, *, k: int = 1000) -> Ablation:
    """Compare zeroing one super weight with zeroing the `k` next-largest weights of the same matrix.

    The matrix is that of one expert for routed experts. Weights are restored.
    """
    token_ids = token_ids.reshape(1, -1)
    matrix = _matrix(hf_model, super_weight.module, super_weight.expert)
    magnitudes = matrix.abs().float()
    magnitudes[super_weight.row, super_weight.col] = -1.0  # not among the next-largest
    k = min(k, magnitudes.numel() - 1)
    rows, cols = torch.unravel_index(magnitudes.flatten().topk(k).indices, magnitudes.shape)
    original = _perplexity(hf_model, token_ids)
    with _zeroed(hf_model, super_weight.module, super_weight.expert, super_weight.row, super_weight.col):
        without = _perplexity(hf_model, token_ids)
    kept = matrix[rows, cols].clone()
    matrix[rows, cols] = 0
    try:
        without_others = _perplexity(hf_model, token_ids)
    finally:
        matrix[rows, cols] = kept
    damaged = {"without_super_weight": without, "without_next_largest": without_others}
    return Ablation(perplexity=original, **damaged, num_next_largest=k, num_tokens=token_ids.numel())


def _ratio(spike: DownSpike, spikes: list[DownSpike]) -> float:
    maxima: dict[int, float] = {}
    for other in spikes:
        maxima[other.layer] = max(maxima.get(other.layer, 0.0), abs(other.max_out))
    return abs(spike.max_out) / max(median(maxima.values()), 1e-30)  # an untrained model has zeros


def _matrix(hf_model: nn.Module, module: str, expert: int | None) -> torch.Tensor:
    """Return a writable view of a down-projection's weights, [out, in]."""
    layer: Any = hf_model.get_submodule(module)
    if expert is None:
        return layer.weight.data.T if is_conv1d(layer) else layer.weight.data
    layout = expert_layout(layer)
    stack = expert_stack(layer, layout.down)
    matrix = stack[expert] if isinstance(stack, StoredExperts) else stack.data[expert]
    return matrix.T if layout.down in layout.transposed else matrix  # some experts are stored [in, out]


@contextmanager
def _zeroed(hf_model: nn.Module, module: str, expert: int | None, row: int, col: int) -> Iterator[float]:
    """Context manager: sets one weight to zero and restores it on exit; yields its value."""
    matrix = _matrix(hf_model, module, expert)
    value = matrix[row, col].clone()
    matrix[row, col] = 0
    try:
        yield value.item()
    finally:
        matrix[row, col] = value


def _device_of(hf_model: nn.Module) -> torch.device:
    """Return the device that the model computes on; weights that are not in memory say nothing of it."""
    return next(parameter.device for parameter in hf_model.parameters() if not parameter.is_meta)


def _token_losses(hf_model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = hf_model(input_ids=token_ids, use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), token_ids[0, 1:], reduction="none")


def _perplexity(hf_model: nn.Module, token_ids: torch.Tensor) -> float:
    return _token_losses(hf_model, token_ids.to(_device_of(hf_model))).mean().exp().item()


class DownScan:
    """Forward passes over one text that record spikes of all down-projections."""

    def __init__(self, hf_model: nn.Module, weights: WeightInputs, token_ids: torch.Tensor) -> None:
        self._model = hf_model
        self._tokens = token_ids.reshape(1, -1).to(_device_of(hf_model))
        module_names = {module: name for name, module in hf_model.named_modules()}
        self._linears = {
            linear.module: (name, module_names[linear.module])
            for name, linear in weights.linears.items()
            if role_of(name).is_down_projection and linear.is_plain
        }
        self._experts = {module: (inputs.down, module_names[module]) for module, inputs in weights.experts.items()}
        self._spikes: list[DownSpike] = []
        self._pending: list[tuple[str, str, int | None, torch.Tensor]] = []
        """Name, module, expert, and numbers of a `DownSpike` from `max_in` on, of the layer that runs."""

    def run(self) -> tuple[list[DownSpike], torch.Tensor]:
        """Return spikes in layer order, and log-probability of each token after the first."""
        self._spikes = []
        with ExitStack() as stack:
            for module in self._linears:
                stack.callback(module.register_forward_hook(self._linear_hook).remove)
            places = [place for _, place in (*self._linears.values(), *self._experts.values())]
            layers = {match.group(1) for place in places if (match := _LAYER_MODULE.match(place))}
            for layer in map(self._model.get_submodule, layers):
                stack.callback(layer.register_forward_hook(self._layer_hook, with_kwargs=True).remove)
            stack.enter_context(record_experts(self._model, self._observe_expert))
            losses = _token_losses(self._model, self._tokens)
        return sorted(self._spikes, key=lambda spike: spike.layer), -losses

    def _linear_hook(self, module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        x, out = args[0].flatten(0, -2), out.flatten(0, -2)
        name, place = self._linears[module]
        self._add(name, place, None, x, out, torch.arange(len(x), device=x.device))

    def _observe_expert(self, call: ExpertCall) -> None:
        name, place = self._experts[call.module]
        self._add(name, place, call.expert, call.down_input, call.down_output, call.tokens)

    def _add(
        self, name: str, place: str, expert: int | None, x: torch.Tensor, out: torch.Tensor, token_index: torch.Tensor
    ) -> None:
        """Note the largest output; its numbers stay where they are, as a GPU would wait for each that is read.

        Indices are tensors [1]: one without a dimension would be read.
        """
        at = out.abs().argmax().unsqueeze(0)
        token, row = at // out.shape[1], at % out.shape[1]
        value = out[token, row].double()
        contributions = (_matrix(self._model, place, expert)[row].float() * x[token].float())[0]
        col = torch.where(value > 0, contributions, -contributions).argmax().unsqueeze(0)
        share = torch.where(value == 0, 0.0, contributions[col].double() / value)
        strongest = x.abs().argmax().unsqueeze(0)
        in_token, in_channel = strongest // x.shape[1], strongest % x.shape[1]
        numbers = (x[in_token, in_channel], in_channel, value, token_index[token], row, col, share)
        # Whether it grows is known when the layer is done.
        self._pending.append((name, place, expert, torch.cat([number.double() for number in numbers])))

    def _layer_hook(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if not self._pending:
            return
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        # Gemma 3n has several streams of hidden states, of which the first is that of the text.
        before, after = before.flatten(0, -3), after.flatten(0, -3)
        places = [(name, place, expert) for name, place, expert, _ in self._pending]
        numbers = torch.stack([numbers for *_, numbers in self._pending])
        position, row = numbers[:, 3].long(), numbers[:, 4].long()
        grows = after[0, position, row].abs() > before[0, position, row].abs()
        for place, spike, is_growing in zip(places, numbers.tolist(), grows.tolist(), strict=True):
            max_in, in_channel, value, position, row, col, share = spike
            at = (max_in, int(in_channel), value, int(position), int(row), int(col), share)
            self._spikes.append(DownSpike(*place, *at, is_growing))
        self._pending.clear()
