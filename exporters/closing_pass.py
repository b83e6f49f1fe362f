"""The closing pass: stored scales, minimums and norms of a quantized model are tuned on the KL to the original.

Codes are fixed. Every super-block's d (and dmin) gets a factor, every norm its own values; all are trained together by
Adam on KL(original || quantized) over calibration text, with gradients that flow through the whole model, so that each
layer also makes up for what the layers before it lost. Step sizes follow the damage: a scale moves in proportion to the
relative error of its tensor, norms to the mean one; longer runs take smaller steps, or noise undoes what more text
gains. The result is kept only where it clearly lowers the KL on windows that were not trained on. File size and types
stay as they are.

The loss is the lower bound of `kl_lower_bound`; what is compared before and after is the unbiased KL. The original's
distributions are kept as a few probabilities of every token, so only one model is in memory: float32 weights, their
gradients, and the decoded codes, 16 bytes a weight.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of, mtp_layers, role_of
from dynquant.errors import ExportError, StatsError
from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.statistics import block_sums
from dynquant.exporters.gguf import write_patched
from dynquant.exporters.output import Encoding
from dynquant.families.common.conversion import ConvertedSource
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, read_scales, with_scales
from dynquant.resources import chosen_device
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf, tf32_products
from dynquant.session import Progress, Session, ignore_progress

BYTES_PER_WEIGHT = 20  # peak memory: the model, its gradients, the decoded codes of one or two parts, and activations
_TRAINED_TOP = 1024
_FULL_RATE_STEPS = 16
_CLEARLY = 1.64  # standard errors by which the KL must fall: one chance in twenty that it did not


@dataclass(frozen=True)
class TuneOptions:
    """Settings of training. Rates are shares of the relative error that the quantization made, for runs of 16 steps or
    fewer; they fall with the square root of the number of steps."""

    tokens: int = 16384
    step_tokens: int = 1024
    scale_rate: float = 0.025
    norm_rate: float = 0.01
    held_out_windows: int = 4
    seed: int = 0


class Tuned(NamedTuple):
    """New bytes of each changed tensor; empty when tuning did not clearly lower the KL on held-out windows."""

    replacements: dict[str, Tensor]
    kl_before: float
    kl_after: float
    tokens: int


@torch.no_grad()
def tune(
    model: Model,
    hf_model: nn.Module,
    file: GGUFSource,
    windows: Tensor,
    options: TuneOptions,
    *,
    progress: Progress = ignore_progress,
) -> Tuned:
    """Tune `file` towards `hf_model`, its original in float32, which ends up holding tuned weights.

    Args:
        windows: token ids [n, window] to train on; the last `held_out_windows` are held out.

    Raises:
        StatsError: too little text.
        CheckpointError: the original's weights cannot be followed into the running model.
    """
    train, held = _split(windows, options)
    live = LiveWeights(model, hf_model)
    steps, checks = (part.split(max(1, options.step_tokens // train.shape[1])) for part in (train, held))
    total = train.numel() + held.numel()
    targets = []
    for number, batch in enumerate((*steps, *checks)):
        few = {"num_top": _TRAINED_TOP, "num_tail": 0} if number < len(steps) else {}
        targets.append(Distributions.of(_logits(hf_model, batch), **few))
        progress("original", min(total, sum(len(t) for t in targets)), total, unit="tokens")
    trained = _install(live, file)
    before = _block_kls(hf_model, checks, targets[len(steps) :])
    _train(hf_model, live, trained, steps, targets, options, progress)
    after = _block_kls(hf_model, checks, targets[len(steps) :])
    change = after - before
    is_lower = float(change.mean()) < -_CLEARLY * float(change.std()) / math.sqrt(len(change))
    changed = {name: tensor.packed() for name, tensor in trained.items()} if is_lower else {}
    return Tuned(changed, float(before.mean()), float(after.mean()), train.numel())


def tune_file(
    model: Model, path: Path, windows: Tensor, options: TuneOptions, output: Path, session: Session, *, encoder: str
) -> list[Path]:
    """Tune the scales and norms of a GGUF file of `model` on token ids [n, window], and write the result."""
    source = GGUFSource(path)
    check_original(model, source, path)
    hf_model = load_hf(model, dtype=torch.float32, device=chosen_device(session.device))
    with session.stage("Encoded tensors are kept; the closing pass starts again.") as progress:
        tuned = tune(model, hf_model, source, windows, options, progress=progress)
    change = f"{tuned.kl_before:.4f} -> {tuned.kl_after:.4f} nats on {options.held_out_windows} windows held out"
    if tuned.replacements:
        session.note(f"closing pass on {tuned.tokens:,} tokens: KL {change}")
        encoder = f"{encoder}+tune"
    else:
        session.note(
            f"the closing pass on {tuned.tokens:,} tokens did not clearly help (KL {change}); scales stay as encoded"
        )
    return write_patched(source, output, tuned.replacements, encoder=encoder)


def check_original(model: Model, file: GGUFSource, path: Path) -> None:
    """Refuse a quantized file of another model. Raises ExportError: other layers or shapes; the first is named."""
    sides = [{name: list(source.info(name).shape) for name in source.names()} for source in (file, model.source)]
    ahead = mtp_layers(sides[1])
    layers = [max(({layer_of(name) or 0 for name in shapes} - ahead), default=0) for shapes in sides]
    difference = next(
        (
            f"`{name}` is {shape} and {sides[1][name]}"
            for name, shape in sides[0].items()
            if sides[1].get(name, shape) != shape
        ),
        f"there are {layers[0] + 1} and {layers[1] + 1} layers" if layers[0] != layers[1] else "",
    )
    if difference or not sides[0].keys() & sides[1].keys():
        raise ExportError(
            f"{path} is not of {model.name}: {difference or 'no tensor is in both'}. Give the model that it was made "
            "from as --reference."
        )


def closing_pass_of(encoding: Encoding, tokens: int | None) -> TuneOptions | None:
    """Return what the closing pass should do, or None; by default it runs with the encoder that uses second moments.
    Raises ExportError: `tokens` ask for one that cannot run."""
    model, moments = encoding.model, encoding.moments
    if tokens == 0 or (tokens is None and moments is None):
        return None
    reason, device = None, chosen_device(encoding.session.device)
    if model.has_vision:
        reason = "it trains on text alone, and the model sees pictures"
    elif not encoding.encoder.uses_hessians:
        reason = "it goes with --encoder dynquant"
    elif moments is None:
        reason = "there are no second moments, whose text it would train on; calibrate with --hessians"
    elif model.hf_directory is not None and not isinstance(model.source, ConvertedSource):
        reason = "the model is not of a family that dynquant converts itself"
    elif tokens is None and model.hf_directory is None:
        reason = "the original is a GGUF file, which transformers may load in another form (`--tune N` tries)"
    elif tokens is None and (too_large := too_large_to_tune(model, device, encoding.limits.memory)):
        reason = too_large
    elif tokens is None and len(moments.tokens) <= TuneOptions().held_out_windows:
        reason = "the calibration text is too short"
    if reason is None:
        return TuneOptions() if tokens is None else TuneOptions(tokens=tokens)
    if tokens is not None:
        raise ExportError(f"The closing pass (--tune {tokens}) cannot run: {reason}. Export with --tune 0.")
    encoding.session.note(f"no closing pass: {reason}")
    return None


def too_large_to_tune(model: Model, device: str, allowed: int | None = None) -> str | None:
    """Why the closing pass should not run unasked on `device`, or None: it would take more than half of its memory, or
    more host memory than `allowed` bytes."""
    needed = BYTES_PER_WEIGHT * model.num_weights
    if allowed is not None and needed > allowed:
        return f"it needs about {needed / 1e9:.1f} GB, more than --max-memory leaves (`--tune N` insists)"
    if device != "cpu":
        where, memory = "GPU", torch.cuda.mem_get_info(device)[1]
    else:
        where, memory = "machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory / 2:
        return None
    return f"it needs about {needed / 1e9:.0f} GB, and this {where} has {memory / 1e9:.0f} GB (`--tune N` insists)"


def _split(windows: Tensor, options: TuneOptions) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed))
    if len(windows) < options.held_out_windows + 1:
        raise StatsError(
            f"The closing pass needs more than {options.held_out_windows} windows of {windows.shape[1]} tokens, but "
            f"calibration had {len(windows)}. Calibrate on more text, or export with `--tune 0`."
        )
    held, rest = order[: options.held_out_windows], order[options.held_out_windows :]
    return windows[rest[: max(1, options.tokens // windows.shape[1])]].long(), windows[held].long()


def _logits(hf_model: nn.Module, batch: Tensor) -> Tensor:
    device = next(hf_model.parameters()).device
    with tf32_products(device):
        return hf_model(input_ids=batch.to(device), use_cache=False).logits.float().flatten(0, 1)


def _block_kls(hf_model: nn.Module, batches: tuple[Tensor, ...], targets: list[Distributions]) -> Tensor:
    """Return the mean KL of every block of tokens."""
    pairs = zip(batches, targets, strict=True)
    per_token = [target.kl(_logits(hf_model, batch)).cpu() for batch, target in pairs]
    sums, sizes = block_sums(torch.cat(per_token).numpy(), [len(row) for batch in batches for row in batch])
    return torch.from_numpy(sums / sizes)


class _Scales:
    """The fp16 numbers of one tensor; `parameter` [blocks, count] are the factors on them."""

    def __init__(self, live: LiveWeights, name: str, type_name: str, packed: Tensor) -> None:
        self._live, self._name, self._type, self._shape = live, name, type_name, packed.shape
        original = live.read(name)
        self._blocks = packed.reshape(-1, QUANT_TYPES[type_name].block_bytes)
        blocks = self._blocks.to(original.device)
        stored = read_scales(type_name, blocks)  # [blocks, count]
        alone = [stored * keep for keep in torch.eye(stored.shape[1], device=blocks.device)]
        parts = [decode(type_name, with_scales(type_name, blocks, scales)) for scales in alone]
        self._parts = torch.stack(parts, dim=1)  # [blocks, count, block_size]
        self.parameter = torch.ones(stored.shape, device=original.device)
        decoded = self._parts.sum(1).view_as(original)
        self.relative_error = float((decoded - original).norm() / original.norm().clamp_min(1e-12))  # zeros have none
        self.num_weights = original.numel()

    def apply(self) -> None:
        self._live.write(self._name, (self._parts * self.parameter.unsqueeze(-1)).sum(1))

    def pull_gradient(self) -> None:
        gradient = self._live.gradient(self._name).reshape(len(self._parts), 1, -1)
        self.parameter.grad = (gradient * self._parts).sum(-1)

    def packed(self) -> Tensor:
        scales = read_scales(self._type, self._blocks) * self.parameter.cpu()
        return with_scales(self._type, self._blocks, scales).reshape(self._shape)


class _Norm:
    """The values of one norm, stored in F32, which are its `parameter`."""

    def __init__(self, live: LiveWeights, name: str) -> None:
        self._live, self._name = live, name
        self.parameter = live.read(name).float()
        self.magnitude = float(self.parameter.square().mean().sqrt())

    def apply(self) -> None:
        self._live.write(self._name, self.parameter)

    def pull_gradient(self) -> None:
        self.parameter.grad = self._live.gradient(self._name).float().view_as(self.parameter)

    def packed(self) -> Tensor:
        return self.parameter.cpu().view(torch.uint8)


def _install(live: LiveWeights, file: GGUFSource) -> dict[str, _Scales | _Norm]:
    """Put the file's weights into the model; returns what can be trained. Parameters without a use stay frozen."""
    trained: dict[str, _Scales | _Norm] = {}
    followed = set(live.names())
    for name in (name for name in file.names() if name in followed):
        stored = file.info(name)
        if num_scales(stored.dtype):
            trained[name] = _Scales(live, name, stored.dtype, file.load_packed(name))
            trained[name].apply()
        else:
            live.write(name, file.load(name))
            if role_of(name) is Role.NORM and stored.dtype == "F32":
                trained[name] = _Norm(live, name)
    return trained


def _train(
    hf_model: nn.Module,
    live: LiveWeights,
    trained: dict[str, _Scales | _Norm],
    steps: tuple[Tensor, ...],
    targets: list[Distributions],
    options: TuneOptions,
    progress: Progress,
) -> None:
    hf_model.requires_grad_(False)
    for name in trained:
        for parameter in live.parameters(name):
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(_groups(trained, options, len(steps)), betas=(0.9, 0.99))
    warm, num_steps = min(4, max(1, len(steps) // 4)), len(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    done = 0
    for batch, target in zip(steps, targets, strict=False):
        with torch.enable_grad(), tf32_products(next(hf_model.parameters()).device):
            target.kl_lower_bound(_logits(hf_model, batch)).mean().backward()
        for tensor in trained.values():
            tensor.pull_gradient()
        hf_model.zero_grad(set_to_none=True)  # their memory is free before the next pass needs it
        optimizer.step()
        schedule.step()
        for tensor in trained.values():
            tensor.apply()
        done += batch.numel()
        progress("tune", done, sum(step.numel() for step in steps), unit="tokens")
    hf_model.requires_grad_(False)


def _groups(trained: dict[str, _Scales | _Norm], options: TuneOptions, steps: int) -> list[dict[str, object]]:
    scales = [tensor for tensor in trained.values() if isinstance(tensor, _Scales)]
    norms = [tensor for tensor in trained.values() if isinstance(tensor, _Norm)]
    weights = sum(tensor.num_weights for tensor in scales)
    mean_error = sum(tensor.relative_error * tensor.num_weights for tensor in scales) / max(1, weights)
    shorter = min(1.0, math.sqrt(_FULL_RATE_STEPS / steps))
    scale_rate, norm_rate = shorter * options.scale_rate, shorter * options.norm_rate * mean_error
    rates = [(tensor, scale_rate * tensor.relative_error) for tensor in scales]
    rates += [(tensor, norm_rate * tensor.magnitude) for tensor in norms]
    return [{"params": [tensor.parameter], "lr": rate} for tensor, rate in rates]
