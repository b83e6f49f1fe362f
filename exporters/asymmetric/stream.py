"""Asymmetric calibration: every matrix makes up for what was lost before it.

A matrix of the original reads x, in the quantized model what quantized layers, and the matrices before it in its own
layer, left of x. What is encoded in place of W is nearer to a matrix that makes W x of that (`cross_moments`). Experts
see the tokens that the quantized router sends them, and x is what the original has for the same tokens.

A layer's matrices are taken in the steps in which they run, each after those before it are encoded: corrected all at
once, each would make up for the same loss (textbook-moe-16m as IQ2_XXS, all of the way: KL 0.67 without, 0.89 at once,
0.58 in steps). Both models run a layer at a time. Blocks lie in a store, so that an interrupted export runs the models
again, but encodes nothing twice.
"""

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, starmap
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.encoding.parts import TensorPart
from dynquant.encoding.store import EncodedStore, make_directory
from dynquant.encoding.stream import guidance_of
from dynquant.errors import DynquantError, ExportError, WriteError
from dynquant.exporters.asymmetric.cross_moments import CrossMoments
from dynquant.exporters.closing_pass import obstacle
from dynquant.exporters.output import Encoding
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats.quant_types import QuantType
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device
from dynquant.running.expert_hooks import ExpertCall, call_expert, expert_layout, expert_stack, record_experts
from dynquant.running.linear_hooks import LinearHooks
from dynquant.running.live_weights import LivePlace
from dynquant.running.parameter_map import parameter_map
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.streaming.staged_passes import StagedPasses
from dynquant.running.streaming.stream_memory import MOST_TOKENS_AT_ONCE
from dynquant.running.weight_inputs import weight_inputs
from dynquant.storage.work_files import work_path

_STEPS = (
    (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_QKV, Role.ATTN_GATE, Role.MLA_Q_A, Role.MLA_KV_A, Role.SSM_IN,
     Role.SHORTCONV_IN),
    (Role.MLA_Q_B, Role.MLA_KV_B, Role.MLA_V_B),
    (Role.ATTN_OUT, Role.SSM_OUT, Role.SHORTCONV_OUT),
    (Role.ROUTER, Role.FFN_GATE, Role.FFN_UP, Role.SHARED_GATE, Role.SHARED_UP, Role.EXPERT_GATE, Role.EXPERT_UP),
    (Role.FFN_DOWN, Role.SHARED_DOWN, Role.EXPERT_DOWN),
    (Role.OUTPUT,),
)  # fmt: skip
"""Roles in the order in which they run. Others are encoded first, as they are: corrected in another order than that in
which they run, they would make up for the same loss as those that they feed."""
_STEP_OF = {role: step for step, roles in enumerate(_STEPS) for role in roles}


@dataclass(frozen=True)
class AsymmetricEncoding:
    """Encodes parts in the order in which their tensors run: a `PartStream`.

    `store` keeps the blocks and says what encodes them; hidden states of `windows` (token ids [n, window]) are in its
    directory too.
    """

    store: EncodedStore
    plan: Plan
    provenance: StatsProvenance
    windows: Tensor
    device: str

    def __call__(self, parts: Iterable[TensorPart]) -> Iterator[tuple[TensorPart, Tensor]]:
        missing = {name: list(of_tensor) for name, of_tensor in groupby(parts, key=attrgetter("name"))}
        types = {entry.name: entry.quant_type for entry in self.plan.entries}
        pair = _Pair(self.store.model, self.windows, self.store.directory, self.device)
        stages = pair.stages([name for name, stored in types.items() if not stored.is_float])
        in_stages = {name for names in stages.values() for name in names}
        with torch.no_grad(), pair.running():
            for stage, names in stages.items():
                with pair.loaded(stage):
                    for step, of_step in groupby(sorted(names, key=_step), key=_step):
                        step_names = list(of_step)
                        store = self._store(pair, stage, step, {name: types[name] for name in step_names})
                        yield from store.parts(part for name in step_names for part in missing.get(name, ()))
                        for name in step_names:
                            pair.write(name, store.decoded(name, types[name].name, self.device))
                    pair.forward(stage)
        yield from self.store.parts(part for name, of in missing.items() if name not in in_stages for part in of)

    def _store(self, pair: "_Pair", stage: int, step: int, types: dict[str, QuantType]) -> EncodedStore:
        """Return the store that encodes the tensors of a step, unless all of their blocks are there."""
        if step < 0 or all(starmap(self.store.is_there, types.items())):
            return self.store
        cross, aliases = pair.moments(stage, step)
        stats, moments = cross.of_quantized(self.provenance, aliases)
        corrections, before = cross.corrections(stats, moments), self.store.guidance
        of_step = guidance_of(stats, moments, before.protected)

        def importance(name: str, shape: tuple[int, ...]) -> Tensor | None:
            return (of_step if moments.key_of(name) else before).importance(name, shape)

        def hessian(name: str, shape: tuple[int, ...], experts: slice) -> Tensor | None:
            return (of_step if moments.key_of(name) else before).hessian(name, shape, experts)

        def target(name: str, weights: Tensor, experts: slice) -> Tensor:
            key = moments.key_of(name)
            if key is None:
                return weights
            correction = corrections[key]
            return weights + weights @ (correction[experts] if len(correction) > 1 else correction[0])

        guidance = replace(before, importance=importance, hessian=hessian, target=target)
        return replace(self.store, guidance=guidance)


@contextmanager
def asymmetric(encoding: Encoding, tokens: int, output: Path) -> Iterator[Encoding]:
    """Context manager: yields an encoding whose blocks `AsymmetricEncoding` makes in a directory beside the output,
    which stays only where the same call can go on. With no tokens it is the given one.

    Raises:
        ExportError: the original cannot run beside what is encoded.
        WriteError: the directory cannot be made.
    """
    if not tokens:
        yield encoding
        return
    reason = obstacle(encoding.model, encoding.encoder, has_moments=encoding.moments is not None)
    if reason is None and not isinstance(encoding.model.source, ConvertedSource):
        reason = "the original is a GGUF file; give the checkpoint that it was made from"
    if reason is not None:
        raise ExportError(f"Asymmetric calibration (--asymmetric {tokens}) cannot run: {reason}. Leave it out.")
    assert encoding.moments is not None
    encoding, windows = replace(encoding, asymmetric=tokens), encoding.moments.tokens
    count = min(len(windows), -(-tokens // windows.shape[1]))
    digest = hashlib.sha256(json.dumps(encoding.identity("any")).encode()).hexdigest()[:12]
    directory = work_path(output, f"asymmetric-{digest}")
    for other in output.parent.glob(f".{glob.escape(output.name)}.asymmetric-{'[0-9a-f]' * 12}"):  # with other options
        if other != directory or not encoding.resume:
            shutil.rmtree(other, ignore_errors=True)
    make_directory(directory)
    how = {"threads": encoding.session.threads, "checks": encoding.checks, "limits": encoding.limits}
    store = EncodedStore(encoding.model, encoding.guidance, encoding.encoder, directory, **how)
    spread = windows[torch.linspace(0, len(windows) - 1, count).long()]
    device = chosen_device(encoding.session.device)
    elsewhere = AsymmetricEncoding(store, encoding.plan, encoding.moments.provenance, spread, device)
    try:
        yield replace(encoding, elsewhere=elsewhere)
    except WriteError:  # the same call can go on
        raise
    except DynquantError:
        shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)


class _Pair:
    """A model as it is and as far as it is quantized, of which the same stage is in memory."""

    def __init__(self, model: Model, windows: Tensor, directory: Path, device: str) -> None:
        assert isinstance(model.source, ConvertedSource)
        streams = [LayerStream(model, device=device) for _ in range(2)]
        folders = [directory / name for name in ("original", "quantized")]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        batches = windows.long().split(max(1, MOST_TOKENS_AT_ONCE // windows.shape[1]))
        self._original, self._quantized = (
            StagedPasses(stream, batches, folder) for stream, folder in zip(streams, folders, strict=True)
        )
        self._original.states.check_space(2)
        self._quantized.states.check_space(2)
        self._inputs, inputs = (weight_inputs(model, stream.hf_model) for stream in streams)
        self._linears = inputs.linears
        self._experts = dict(zip(inputs.experts, self._inputs.experts, strict=True))
        self._traced, self._source = parameter_map(streams[1].hf_model, model.source.checkpoint), model.source
        self._tensors: dict[str, Tensor] = {}

    def stages(self, names: list[str]) -> dict[int, list[str]]:
        """Return the names of tensors by the stage that they are in; those of none are left out."""
        stages: dict[int, list[str]] = {stage: [] for stage in range(self._original.head + 1)}
        for name in names:
            layer = layer_of(name)
            if layer is not None and layer < self._original.stream.num_layers:
                stages[layer + 1].append(name)
            elif name == "token_embd.weight":
                stages[0].append(name)
            elif name == "output.weight" and not self._original.stream.is_tied:
                stages[self._original.head].append(name)
        return stages

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context manager: layers can be loaded."""
        with self._original.stream.running(), self._quantized.stream.running():
            yield

    @contextmanager
    def loaded(self, stage: int) -> Iterator[None]:
        """Context manager: a stage of both models is in memory."""
        with ExitStack() as stages:
            for passes in (self._original, self._quantized):
                stages.enter_context(passes.stream.stage(stage, then=stage + 1 if stage < passes.head else None))
            self._tensors = self._quantized.stream.own_tensors(stage)
            yield

    def write(self, name: str, values: Tensor) -> None:
        """Put a quantized tensor into the loaded stage. Raises ExportError: it has no place there that is known."""
        entries = self._traced.gguf(self._source, name)
        if entries is None or not self._tensors.keys() >= set(entries.sources):
            raise ExportError(
                f"The running model has no place that dynquant knows for `{name}`, so what it loses cannot be made up "
                "for. Export without --asymmetric."
            )
        LivePlace(entries, self._tensors).write(values)

    def forward(self, stage: int) -> None:
        """Run the loaded stage on all batches; what entered it is no longer needed."""
        for passes in (self._original, self._quantized):
            if stage < passes.head:
                passes.forward(stage)
            passes.states.forget(stage)

    def moments(self, stage: int, step: int) -> tuple[CrossMoments, dict[str, str]]:
        """Return the moments of what a step's matrices read, and the key of those that share an input."""
        moments, x = CrossMoments(), {}

        def see_linear(key: str, y: Tensor, _: Tensor | None) -> None:
            if y.dim() == 2 and _step(key) in (-1, step):
                moments.add(key, y, x[key])

        def see_expert(call: ExpertCall) -> None:
            module = self._experts.get(call.module)
            if module is None or expert_layout(module).gets_all_tokens:  # the original's, or not by token
                return
            names, routed = self._inputs.experts[module], x[module].flatten(0, -2)[call.tokens]
            place = {"expert": call.expert, "num_experts": len(expert_stack(module, expert_layout(module).down))}
            if _step(names.down) == step:
                down_input = call_expert(module, call.expert, routed, call.tokens).down_input
                moments.add(names.down, call.down_input, down_input, **place)
            elif _step(names.inner[0]) == step:
                moments.add(names.inner[0], call.x, routed, **place)

        linears = LinearHooks(self._quantized.stream.hf_model, self._linears, see_linear)
        with ExitStack() as hooks:
            hooks.enter_context(
                LinearHooks(
                    self._original.stream.hf_model, self._inputs.linears, lambda key, values, _: x.update({key: values})
                ).attached()
            )
            for module in self._inputs.experts:
                hooks.enter_context(module.register_forward_pre_hook(partial(_note, x), with_kwargs=True))
            hooks.enter_context(linears.attached())
            hooks.enter_context(record_experts(self._quantized.stream.hf_model, see_expert))
            for index in range(len(self._original.batches)):
                self._original.output(stage, index)
                self._quantized.output(stage, index)
                x.clear()
        experts = {name: each.inner[0] for each in self._inputs.experts.values() for name in each.inner[1:]}
        return moments, linears.aliases | experts


def _step(name: str) -> int:
    """Return the number of a tensor's step, -1 for those that come first."""
    return _STEP_OF.get(role_of(name), -1)


def _note(seen: dict[Any, Tensor], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    seen[module] = args[0] if args else kwargs["hidden_states"]
