"""Hooks on linear layers: which GGUF weights read the same input.

Weights that read one input (q/k/v, gate/up, q_a/kv_a) are found by the tensor object that they are called with during
the first forward pass and share one key. Multi-head latent attention is special because GGUF stores `kv_b_proj` as
`attn_k_b` (rows of qk_nope, multiplied with q_nope of its head) and `attn_v_b` (rows of kv_lora):

    attn_k_b   E[q_nope^2] per head, from the output of q_b_proj or q_proj           [n_head, qk_nope]
    attn_v_b   the input of kv_b_proj, for all heads alike                           [1, kv_lora]

The exact input of `attn_v_b` is the attention-weighted mean of that input; it is not seen by a linear layer.

Hooks see gradients too. Backward passes here start from labels drawn from the model's own distribution: E[g gᵀ] over
such gradients g is the Fisher information, the Hessian of the KL to the model itself (K-FAC, arXiv:1503.05671).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.running.weight_inputs import LinearInput

LinearObserver = Callable[[str, torch.Tensor, torch.Tensor | None], None]
"""Called with a key, its input [T, C] (or [T, heads, C]), and for down-projections the output [T, rows]."""
OutputObserver = Callable[[str, torch.Tensor, torch.Tensor], Callable[[torch.Tensor], None]]
"""Called with a weight's name, the input of its layer and its outputs; its result is called with their gradient."""


class LinearHooks:
    """Calls `observer` once per distinct input of a forward pass, and learns `aliases` (weight -> key)."""

    def __init__(self, hf_model: nn.Module, linears: Mapping[str, LinearInput], observer: LinearObserver) -> None:
        self.aliases: dict[str, str] = {}
        self._model = hf_model
        self._linears = linears
        self._observer = observer
        self._key_of: dict[str, str] = {}
        self._layer: int | None = None
        self._layer_inputs: list[tuple[torch.Tensor, int, str]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context manager: the hooks are in place."""
        with ExitStack() as stack:
            stack.callback(self._layer_inputs.clear)
            for name, linear in self._linears.items():
                is_down = role_of(name).is_down_projection
                register = linear.module.register_forward_hook if is_down else linear.module.register_forward_pre_hook
                stack.enter_context(register(partial(self._observe, name), with_kwargs=True))
            for module, hook in self._latent_attention_hooks():
                stack.enter_context(module.register_forward_hook(hook))
            yield

    def _observe(
        self, name: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any], out: torch.Tensor | None = None
    ) -> None:
        x, linear = args[0] if args else kwargs["input"], self._linears[name]
        if self._key(name, x) == name:
            y = None if out is None or len(linear.modules) > 1 else linear.outputs(out.flatten(0, -2))
            self._observer(name, linear.channels(x.flatten(0, -2)), y)

    def _key(self, name: str, x: torch.Tensor) -> str:
        if name in self._key_of:
            return self._key_of[name]
        if layer_of(name) != self._layer:
            self._layer, self._layer_inputs = layer_of(name), []
        # The list keeps the tensors alive, so an equal object is the same input; the version catches in-place writes.
        same = (key for seen, version, key in self._layer_inputs if seen is x and version == x._version)
        key = next((key for key in same if self._have_one_order(key, name)), name)
        if key == name:
            self._layer_inputs.append((x, x._version, name))
        else:
            self.aliases[name] = key
        self._key_of[name] = key
        return key

    def _have_one_order(self, *names: str) -> bool:
        first, second = (self._linears[name].columns for name in names)
        return first is second or (first is not None and second is not None and torch.equal(first, second))

    def _latent_attention_hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        modules = dict(self._model.named_modules())
        names = {module: name for name, module in modules.items()}
        for name, linear in self._linears.items():
            if role_of(name) is not Role.MLA_KV_B:
                continue
            attention: Any = modules[names[linear.module].rpartition(".")[0]]
            query = getattr(attention, "q_b_proj", None) or getattr(attention, "q_proj", None)
            if query is None:
                continue
            prefix = name.removesuffix("attn_kv_b.weight")
            self.aliases[f"{prefix}attn_v_b.weight"] = name
            yield query, partial(self._observe_query, f"{prefix}attn_k_b.weight", attention)

    def _observe_query(self, key: str, attention: Any, _module: nn.Module, _args: tuple, out: torch.Tensor) -> None:
        heads = out.reshape(-1, attention.num_heads, attention.qk_head_dim)
        self._observer(key, heads[..., : attention.qk_nope_head_dim], None)


@contextmanager
def observed_outputs(linears: Mapping[str, LinearInput], observer: OutputObserver) -> Iterator[None]:
    """Context manager: shows outputs of matrices to `observer`, and their gradients to what it returns.

    Outputs of several layers that are one matrix are joined, so that they are seen as those of a single layer.
    """
    with ExitStack() as hooks:
        for name, linear in linears.items():
            outputs = _MatrixOutputs(name, linear, observer)
            for number, module in enumerate(linear.modules):
                hooks.enter_context(module.register_forward_hook(partial(outputs.see, number), with_kwargs=True))
        yield


class _MatrixOutputs:
    """Outputs of the layers of one matrix, which are observed when all layers have run."""

    def __init__(self, name: str, linear: LinearInput, observer: OutputObserver) -> None:
        self._name, self._linear, self._observer = name, linear, observer
        self._outputs: dict[int, torch.Tensor] = {}

    def see(self, number: int, _module: nn.Module, args: tuple, kwargs: dict[str, Any], out: torch.Tensor) -> None:
        if not isinstance(out, torch.Tensor) or not out.requires_grad:  # Llama 4's router gives a tuple
            return
        self._outputs[number] = out
        if len(self._outputs) < len(self._linear.modules):
            return
        outputs = [self._outputs[number] for number in sorted(self._outputs)]
        self._outputs.clear()
        x = (args[0] if args else kwargs["input"]).detach()
        add = self._observer(self._name, x, self._joined([output.detach() for output in outputs]))
        gradients: dict[int, torch.Tensor] = {}

        def take(number: int, gradient: torch.Tensor) -> None:
            gradients[number] = gradient
            if len(gradients) == len(self._linear.modules):
                add(self._joined([gradients[number] for number in sorted(gradients)]))
                gradients.clear()

        for number, output in enumerate(outputs):
            output.register_hook(partial(take, number))

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self._linear.outputs(parts[0] if len(parts) == 1 else torch.cat(parts, -1))


@contextmanager
def activation_gradients(hf_model: nn.Module, embeddings: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Context manager: gradients flow through activations and not into weights, whatever the caller's grad mode was.

    They begin at the embedding of tokens, and at others that are given.
    """
    with ExitStack() as hooks, frozen_weights(hf_model), torch.enable_grad():
        for module in {hf_model.get_input_embeddings(), *embeddings}:  # type: ignore[operator]
            hooks.enter_context(module.register_forward_hook(lambda _module, _args, out: out.requires_grad_(True)))
        yield


@contextmanager
def last_logits(hf_model: nn.Module) -> Iterator[None]:
    """Context manager: computes the logits of the last token only; over a window they can be larger than the model."""
    head = hf_model.get_output_embeddings() if hasattr(hf_model, "get_output_embeddings") else None
    # Registered after the hooks of observers, which therefore see all tokens.
    with head.register_forward_pre_hook(lambda _module, args: (args[0][:, -1:], *args[1:])) if head else nullcontext():
        yield


@contextmanager
def frozen_weights(hf_model: nn.Module) -> Iterator[None]:
    """Context manager: freezes all weights, and restores `requires_grad` on exit."""
    trained = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def sampled_log_probability(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Summed log-probability of one token drawn at every position of `logits` [..., vocabulary], a scalar."""
    log_probs = logits.float().log_softmax(-1).flatten(0, -2)
    cumulative = log_probs.detach().exp().cumsum(-1)
    points = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, points).clamp_(max=cumulative.shape[1] - 1)  # inverse transform sampling
    return log_probs.gather(1, drawn).sum()
