"""Sensitivity of the model's output distribution to each matrix: a closed-form Fisher estimate.

For a matrix with output y (one token), an encoding that changes y by dy moves the next-token distributions by about

    KL = 1/2 E[(g . dy)^2],   g = gradient of log p(token) with respect to y, token drawn from the model itself

(the second-order expansion of KL, whose Hessian is the Fisher information; the form of AURA and K-FAC). With dy
spread evenly over the d channels of y and |dy|^2 = e |y|^2, where e is the relative squared output error that the
error table holds as `weighted_error`,

    KL = e * s,   s = 1/2 E[|g|^2 |y|^2] / d      nats per unit of relative squared error

One backward pass over a few thousand tokens gives s for every matrix. Routed experts count the tokens that reach them.
Gate and up projections of fused experts have no output of their own in transformers; both take the s of the product
that enters the down projection, 1/2 E[sum_j (g_j h_j)^2], which is exact for `up` when errors are even over channels.
Left out: correlations between matrices, and routing flips, which add to small errors more than to large ones: on the
bundled model measured over predicted KL is 1.0 to 1.7 at e = 0.1 (tests/test_sensitivity.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.expert_hooks import ExpertCall, record_experts
from dynquant.running.linear_hooks import activation_gradients, observed_outputs, sampled_log_probability
from dynquant.running.streaming.staged_passes import StagedPasses
from dynquant.running.weight_inputs import LinearInput, WeightInputs
from dynquant.session import Progress, ignore_progress


class WindowSums:
    """Sums by GGUF name, float64 [windows], where the model computes: a GPU would wait for every number that is read.

    Squares of one token are summed in float32 whatever type the model computes in, and tokens in float64.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = torch.tensor(lengths)  # tokens of each window
        self._sums: dict[str, torch.Tensor] = {}
        self._windows = slice(0, 0)

    def start(self, first: int, count: int) -> None:
        """Name the windows that run together next."""
        self._windows = slice(first, first + count)

    def add_output(
        self, name: str, y: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> None:
        """Add s of an output y and its gradient, both [..., d], of all tokens, or of `tokens`."""
        products = gradient.float().square().sum(-1) * y.float().square().sum(-1)  # [...]
        for stored in _stored_names(name):
            self._add(stored, products, 0.5, y.shape[-1], tokens)

    def add_product(self, names: Iterable[str], h: torch.Tensor, gradient: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add 1/2 sum_j (g_j h_j)^2 of the product [T, F] that enters a down projection."""
        products = (gradient.float() * h.float()).square().sum(-1, dtype=torch.float64)
        for name in names:
            self._add(name, products, 0.5, 1, tokens)

    def means_and_errors(self, *, is_tied: bool) -> tuple[dict[str, float], dict[str, float]]:
        """Return nats per token and standard errors, by name; `is_tied` where the file has one tensor for both ends."""
        if is_tied and "output.weight" in self._sums:
            self._sums["token_embd.weight"] += self._sums.pop("output.weight")  # one tensor, read at both ends
        names, count = sorted(self._sums), len(self._lengths)
        if not names:
            return {}, {}
        means = torch.stack([self._sums[name] for name in names]).cpu() / self._lengths
        errors = means.std(1) / count**0.5 if count > 1 else torch.zeros(len(names))
        return dict(zip(names, means.mean(1).tolist(), strict=True)), dict(zip(names, errors.tolist(), strict=True))

    def _add(
        self, name: str, products: torch.Tensor, factor: float, channels: int, tokens: torch.Tensor | None
    ) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(len(self._lengths), dtype=torch.float64, device=products.device)
        sums = self._sums[name][self._windows]
        if len(sums) > 1 and tokens is not None:
            # Sums under masks, not `index_add_`: that adds in another order in each run on a GPU.
            window_of = tokens // int(self._lengths[self._windows.start])
            products = products * (window_of == torch.arange(len(sums), device=tokens.device).unsqueeze(1))
        sums += factor * products.reshape(len(sums), -1).sum(1, dtype=torch.float64) / channels


def output_sensitivity(
    hf_model: nn.Module,
    weights: WeightInputs,
    inputs: ModelInputs,
    *,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return GGUF weight name -> s in nats per token, and its standard error, from windows or samples.

    Labels are drawn from the model's own distribution with `seed`; the model's weights stay as they are. The embedding,
    every linear layer and every stack of routed experts gets an entry. With one window there is no standard error: 0.
    """
    generator, device = torch.Generator().manual_seed(seed), next(hf_model.parameters()).device
    lengths = [length for batch in inputs for length in [batch.is_text.shape[1]] * len(batch.is_text)]
    sums, first, done = WindowSums(lengths), 0, 0
    progress("measuring sensitivity", 0, sum(lengths), unit="tokens")
    with activation_gradients(hf_model, weights.embeddings.values()), _observed(hf_model, weights, sums):
        for batch in inputs:
            sums.start(first, len(batch.is_text))
            # Gradients reach a vision tower when its pixels ask for one.
            arguments = batch.with_gradients().on(device)
            sampled_log_probability(hf_model(**arguments, use_cache=False).logits, generator).backward()
            first, done = first + len(batch.is_text), done + batch.num_tokens
            progress("measuring sensitivity", done, sum(lengths), unit="tokens")
    return sums.means_and_errors(is_tied=bool(weights.aliases))


def streamed_sensitivity(
    passes: StagedPasses, weights: WeightInputs, *, seed: int = 0, progress: Progress = ignore_progress
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what `output_sensitivity` does, with one layer in memory, from the windows of `passes`."""
    generator = torch.Generator().manual_seed(seed)
    sums = WindowSums([len(window) for batch in passes.batches for window in batch])
    firsts = list(accumulate((len(batch) for batch in passes.batches), initial=0))
    stages = [*range(passes.head), *range(passes.head, -1, -1)]  # up to the head, and back down
    passes.states.check_space(len(stages) // 2 + 2)
    progress("measuring sensitivity", 0, len(stages), unit="layers")
    with _observed(passes.stream.hf_model, weights, sums):
        for done, stage in enumerate(stages, 1):
            if done <= passes.head:
                passes.forward(stage)
            else:
                passes.backward(
                    stage,
                    partial(sampled_log_probability, generator=generator),
                    lambda index: sums.start(firsts[index], len(passes.batches[index])),
                )
                passes.states.forget(stage)
                passes.gradients.forget(stage + 1)
            progress("measuring sensitivity", done, len(stages), unit="layers")
    return sums.means_and_errors(is_tied=bool(weights.aliases))


@contextmanager
def _observed(hf_model: nn.Module, weights: WeightInputs, sums: WindowSums) -> Iterator[None]:
    """Context manager: backward passes add to `sums`."""

    def observe_output(name: str, _x: torch.Tensor, y: torch.Tensor) -> Callable[[torch.Tensor], None]:
        return partial(sums.add_output, name, y)

    def observe_expert(call: ExpertCall) -> None:
        if not call.down_output.requires_grad:
            return
        inputs = weights.experts[call.module]
        add = partial(sums.add_product, inputs.inner, call.down_input.detach(), tokens=call.tokens)
        call.down_input.register_hook(add)
        add = partial(sums.add_output, inputs.down, call.down_output.detach(), tokens=call.tokens)
        call.down_output.register_hook(add)

    observed = {**{name: LinearInput((table,)) for name, table in weights.embeddings.items()}, **weights.linears}
    with observed_outputs(observed, observe_output), record_experts(hf_model, observe_expert):
        yield


def _stored_names(name: str) -> tuple[str, ...]:
    """Return the stored tensors of a module: GGUF holds `kv_b_proj` as two, which both get its sensitivity."""
    if role_of(name) is not Role.MLA_KV_B:
        return (name,)
    prefix = name.removesuffix("attn_kv_b.weight")
    return name, f"{prefix}attn_k_b.weight", f"{prefix}attn_v_b.weight"
