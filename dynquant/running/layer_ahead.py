"""The layer that predicts one more token ahead (multi-token prediction), which transformers' models leave out.

It is added to a running model under the names that the checkpoint has for its parts, so that traced maps, hooks and
statistics know it as any other layer. From the hidden state of token t and token t + 1 it predicts token t + 2:

    x = eh_proj(concat(enorm(embedding of token t + 1), hnorm(hidden state of token t)))
    logits = head(norm(decoder layer of the model's own class (x)))

The embedding comes first, and the hidden state is that after the model's final norm. So it is in vLLM, where a draft
gets what the model returns (deepseek_mtp.py for DeepSeek V3.2 and GLM-5, glm4_moe_mtp.py, glm4_moe_lite_mtp.py,
qwen3_next_mtp.py, qwen3_5_mtp.py), and in llama.cpp, as far as it runs such layers (src/models/qwen35.cpp: `t_h_nextn`
is taken after `output_norm`; its releases before that name took it before the norm). The first two of vLLM also zero
the embedding at position 0, one token of a text, which is not done here.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynquant.running.streaming.chained_layers import standing_in


@dataclass(frozen=True)
class _Names:
    """Names of the parts below the module that holds them."""

    projection: str
    token_norm: str
    state_norm: str
    final_norm: str
    layer: str = ""


_BEHIND = _Names("eh_proj", "enorm", "hnorm", "shared_head.norm")
"""Parts inside a decoder layer that follows the last one."""
_APART = _Names("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0")
"""Parts of a module `mtp`."""
_NAMES = {
    "glm4moe": _BEHIND, "deepseek2": _BEHIND, "deepseek32": _BEHIND, "glm-dsa": _BEHIND,
    "qwen3next": _APART, "qwen35": _APART, "qwen35moe": _APART,
}  # fmt: skip
"""Architectures of GGUF for which the order above has been looked up."""
_HEAD, _EMBEDDING = "shared_head.head", "embed_tokens"
_KEY = "_dynquant_layer_ahead"


@dataclass(frozen=True)
class PlaceAhead:
    """Which module of a model the layer is, and which decoder layer it is like."""

    path: str
    names: _Names
    like: int
    has_head: bool
    has_embedding: bool


def places_ahead(hf_model: Any, arch: str, stored: Collection[str]) -> Iterator[PlaceAhead]:
    """Yield where the layer can be in a model whose checkpoint has the tensors `stored`, one for each kind of layer."""
    names = _NAMES.get(arch)
    if names is None:
        return
    layers, path = hf_model.get_decoder().layers, "mtp"
    if names is _BEHIND:
        path = next(f"{name}.{len(layers)}" for name, module in hf_model.named_modules() if module is layers)
    if f"{path}.{names.projection}.weight" not in stored:
        return
    has_head, has_embedding = (f"{path}.{part}.weight" in stored for part in (_HEAD, _EMBEDDING))
    kinds = [tuple((name, tensor.shape) for name, tensor in layer.state_dict().items()) for layer in layers]
    for number in reversed(range(len(layers))):
        if kinds[number] not in kinds[number + 1 :]:
            yield PlaceAhead(path, names, number, has_head, has_embedding)


class LayerAhead:
    """The layer of a running model, to be run after it on the same tokens."""

    def __init__(self, hf_model: Any, place: PlaceAhead) -> None:
        self.place, self._model = place, hf_model
        self._decoder = hf_model.get_decoder()
        # Without the layer itself, which may be the last one of them.
        self._layers = list(self._decoder.layers)[: hf_model.config.get_text_config().num_hidden_layers]
        self._states: Tensor | None = None
        self._selection: tuple | None = None  # what GLM-5's layers give besides hidden states
        embedding, names = hf_model.get_input_embeddings(), place.names
        layer = _without_values(self._layers[place.like])
        self.root = layer if not names.layer else nn.Module()
        if names.layer:
            _add(self.root, names.layer, layer)
        for name in (names.token_norm, names.state_norm, names.final_norm):
            _add(self.root, name, _without_values(self._decoder.norm))
        channels, like = embedding.embedding_dim, {"device": "meta", "dtype": embedding.weight.dtype}
        _add(self.root, names.projection, nn.Linear(2 * channels, channels, bias=False, **like))
        if place.has_head:
            _add(self.root, _HEAD, nn.Linear(channels, embedding.num_embeddings, bias=False, **like))
        if place.has_embedding:
            _add(self.root, _EMBEDDING, nn.Embedding(embedding.num_embeddings, channels, **like))

    def add(self) -> None:
        """Make it part of its model, whose own forward pass does not run it."""
        _add(self._model, self.place.path, self.root)
        self._model.__dict__[_KEY] = self

    def remove(self) -> None:
        """Undo `add`."""
        owner, _, name = self.place.path.rpartition(".")
        del self._model.get_submodule(owner)._modules[name]
        del self._model.__dict__[_KEY]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Context manager: forward passes of the model leave the hidden states that `logits` goes on from."""

        def keep(_module: nn.Module, _args: Any, out: Any) -> None:
            self._states = out.last_hidden_state.detach()

        def keep_selection(_module: nn.Module, _args: Any, out: Any) -> None:
            self._selection = out[1:] if isinstance(out, tuple) else None

        layer = self._layers[self.place.like]
        with self._decoder.register_forward_hook(keep), layer.register_forward_hook(keep_selection):
            yield
        self._states = None

    def logits(self, ids: Tensor, states: Tensor | None = None) -> Tensor:
        """Return the logits of tokens 2, 3, ... of windows [n, T] as [n, T - 1, V].

        `states` [n, T, C] are hidden states of the model, by default those of the last forward pass. With gradients,
        they begin at the layer's first matrix; without, only the logits of the last token are computed.
        """
        states, names = self._states if states is None else states, self.place.names
        assert states is not None
        embedding = self._part(_EMBEDDING) if self.place.has_embedding else self._model.get_input_embeddings()
        parts = (self._part(names.token_norm)(embedding(ids[:, 1:])), self._part(names.state_norm)(states[:, :-1]))
        x = torch.cat(parts, -1).detach().requires_grad_(torch.is_grad_enabled())
        states = self._part(names.final_norm)(self._run_layer(self._part(names.projection)(x)))
        rows = slice(None if torch.is_grad_enabled() else -1, None)
        if self.place.has_head:
            # Registered after the hooks of observers, which therefore see all tokens.
            with self._part(_HEAD).register_forward_pre_hook(lambda _module, args: (args[0][:, rows],)):
                return self._part(_HEAD)(states)
        # Not called as a module: hooks of the model's head show the model's own hidden states.
        head = self._model.get_output_embeddings()
        return functional.linear(states[:, rows], head.weight, head.bias)

    def _part(self, name: str) -> Any:
        return self.root.get_submodule(name)

    def _run_layer(self, x: Tensor) -> Tensor:
        """Run the decoder layer by the model's own forward pass, which makes its masks and position embeddings."""
        numbers, results = count(), []

        selection = self._selection

        def stand_in(hidden: Tensor, others: dict[str, Any]) -> Any:
            if next(numbers) == self.place.like:
                results.append(self._part(self.place.names.layer)(hidden, **others))
            return hidden if selection is None else (hidden, *selection)

        with standing_in(self._layers, stand_in):
            self._decoder(inputs_embeds=x, use_cache=False)
        (result,) = results
        return result[0] if isinstance(result, tuple) else result


def layer_ahead_of(hf_model: nn.Module) -> LayerAhead | None:
    """Return the layer that was added to a model, if one was."""
    return hf_model.__dict__.get(_KEY)


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in root._modules:
            root.add_module(owner, nn.Module())
        root = root.get_submodule(owner)
    root.add_module(name, module)


def _without_values(module: nn.Module) -> Any:
    """Return a copy of a module, of one configuration with it, whose parameters and buffers are on the meta device."""
    kept: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    for tensor in module.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        kept[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, kept)
