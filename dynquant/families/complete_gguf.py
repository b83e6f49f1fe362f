"""The check of every GGUF model that is opened, of whatever architecture: it is whole, and llama.cpp can load it."""

import re
from collections import Counter
from math import prod

import gguf

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config
from dynquant.families.common.conversion_book import ConversionBook, some_of
from dynquant.families.common.metadata import KEYS
from dynquant.families.from_gguf import Keys, NotUnderstoodError, stated
from dynquant.families.text.registry import FAMILIES

_LAYER = re.compile(r"^blk\.\d+\.")
_OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
_ARCHS = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
_MAX_EXPERTS, _MAX_GATING = 512, 3
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


def check_complete(source: GGUFSource) -> None:
    """Refuse a GGUF model that llama.cpp would not load, or would load without some of its tensors.

    For the known families the tensors are those that the keys call for; for others, the layers are compared.

    Raises:
        CheckpointError: a key or tensors are missing, or tensors are there that no model of the architecture has.
    """
    keys = Keys(source)
    kind = keys.values.get("general.type", "model")
    if kind in ("adapter", "imatrix") or not keys.names:
        what = f"is of the type {kind!r}" if keys.names else "holds no tensors"
        raise CheckpointError(f"{source.path} {what}: it is no model. Give the GGUF file of a model.")
    if keys.arch == "clip":
        return
    old = [name for name in keys.names if _OLD_EXPERT.fullmatch(name)]
    if old:
        raise CheckpointError(
            f"{source.path} stores every expert as tensors of its own ({some_of(old)}), as llama.cpp did until April "
            "2024 and no longer reads. Convert the original checkpoint again."
        )
    for key in ("block_count", "embedding_length", "context_length"):
        keys.integer(key)
    check_loads(source)
    try:
        lost, foreign = _against_family(keys)
    except NotUnderstoodError:
        lost, foreign = _against_each_other(keys)
    # Layers that predict tokens ahead are counted, but llama.cpp does without them.
    num_run = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    lost = {name for name in lost if (layer_of(f"{name}.") or 0) < num_run or num_run < 1}
    problems = []
    if lost:
        problems.append(f"lacks {len(lost)} tensors that it must have, or has them in another shape ({some_of(lost)})")
    if foreign:
        problems.append(f"holds {len(foreign)} tensors that have no place in it ({some_of(foreign)})")
    if problems:
        raise CheckpointError(
            f"{source.path} ({keys.arch}) {' and '.join(problems)}. llama.cpp would not load it. Fetch the file again, "
            "or convert the checkpoint again."
        )


def check_loads(source: GGUFSource) -> None:
    """Refuse keys at which llama.cpp ends the whole process instead of refusing the file, or takes another EOS.

    Raises:
        CheckpointError: numbers of experts that do not fit together, an unknown rope scaling, lists of a tokenizer that
            are not of one length or kind, or an EOS that is no token.
    """
    keys = Keys(source)
    experts, used, groups, groups_used = (
        keys.integer(f"expert_{name}count", 0) for name in ("", "used_", "group_", "group_used_")
    )
    has_experts = 0 < used <= experts <= _MAX_EXPERTS if experts else used == 0
    has_groups = groups <= 1 or (experts % groups == 0 and 0 < groups_used < groups)
    is_gated = keys.integer("expert_gating_func", 0) <= _MAX_GATING
    has_norms = keys.number("attention.layer_norm_rms_epsilon", 0.0) >= 0
    is_scaled = keys.get("rope.scaling.type", "none") in _ROPE_SCALINGS
    for key, holds, needed in (
        ("expert_used_count", has_experts, f"a number from 1 to {experts}" if experts else "none, without experts"),
        ("expert_group_count", groups < max(experts, 1), f"fewer groups than experts, of which there are {experts},"),
        ("expert_group_used_count", has_groups, f"a part of {groups} equal groups of {experts} experts"),
        ("expert_gating_func", is_gated, f"a number to {_MAX_GATING}"),
        ("attention.layer_norm_rms_epsilon", has_norms, "a number from 0"),
        ("rope.scaling.type", is_scaled, f"one of {', '.join(_ROPE_SCALINGS)}"),
    ):
        if not holds:
            raise keys.wrong(key, needed)
    windows = keys.get("attention.sliding_window_pattern")
    if isinstance(windows, list) and not any(windows) and keys.integer("attention.sliding_window", 0):
        raise CheckpointError(
            f"{source.path} has a sliding window ({keys.arch}.attention.sliding_window) and no layer that attends in "
            "it (sliding_window_pattern), at which llama.cpp ends the process. Where all layers attend globally, set "
            "`sliding_window` in config.json to null and convert the checkpoint again."
        )
    num_tokens = len(keys.values.get("tokenizer.ggml.tokens") or ())
    eos = keys.values.get("tokenizer.ggml.eos_token_id", 0)
    if num_tokens and not (isinstance(eos, int) and 0 <= eos < num_tokens):
        raise CheckpointError(
            f"{source.path} gives `tokenizer.ggml.eos_token_id` as {eos!r:.80}, but has {num_tokens:,} tokens: "
            "generation would not stop. Correct the key with llama.cpp's `gguf-set-metadata`, or convert it again."
        )
    for name, kind in (("tokens", str), ("token_type", int), ("scores", float), ("merges", str)):
        values = keys.values.get(f"tokenizer.ggml.{name}", [])
        of_kind = isinstance(values, list) and all(type(value) is kind for value in values)
        if not of_kind or (values and name != "merges" and len(values) != num_tokens):
            raise CheckpointError(
                f"{source.path} has a list `tokenizer.ggml.{name}` that is not one {kind.__name__} for each of "
                f"{num_tokens:,} tokens. Fetch it again, or convert it again."
            )


def _against_family(keys: Keys) -> tuple[set[str], set[str]]:
    """Return the tensors that are missing or of another shape, and those that nothing calls for."""
    raw, names = stated(keys), keys.names
    for key in (key for table in KEYS.values() for key in table if key.gguf.endswith("feed_forward_length")):
        if key.config in raw and keys.integer(key.gguf, raw[key.config]) != raw[key.config]:
            raise keys.wrong(key.gguf, f"{raw[key.config]}, as its tensors have,")
    if keys.integer("block_count") > len(names):
        return {f"blk.{keys.integer('block_count') - 1}"}, set()
    config = Config(keys.source.path, raw, raw)
    book = ConversionBook(config, None, whole_kv_b="blk.0.attn_kv_b.weight" in names)
    FAMILIES[config.model_type].add_tensors(book)
    shapes = {conversion.name: conversion.shape for conversion in book.finish()}
    stored = {name: keys.source.info(name).shape for name in shapes.keys() & names}
    lost = {name for name, shape in stored.items() if _size(shape) != _size(shapes[name])}
    kinds = Counter(_LAYER.sub("blk.{bid}.", name) for name in names)
    # Biases may be left out of all layers, and optional tensors are in all of them.
    lost |= {n for n in shapes.keys() - names if not n.endswith(".bias") or _LAYER.sub("blk.{bid}.", n) in kinds}
    allowed = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[_ARCHS[keys.arch]]}
    foreign = set()
    for name in names - shapes.keys():
        kind = _LAYER.sub("blk.{bid}.", name)
        is_everywhere = kinds[kind] == (keys.integer("block_count") if kind != name else not kind.endswith(".bias"))
        is_optional = kind.rpartition(".")[0] in allowed and is_everywhere
        if not is_optional and not kind.startswith(("blk.{bid}.nextn.", "cls.", "rope_factors_")):
            foreign.add(name)
    return lost, foreign


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape), shape[-1]


def _against_each_other(keys: Keys) -> tuple[set[str], set[str]]:
    """Return what sets a layer apart from all others but is more or less of what several of them have.

    The first layer may differ, and the layers of a hybrid do, in several ways that are there more than once.
    """
    layers: dict[int, set[str]] = {}
    for name in keys.names:
        if match := re.fullmatch(r"blk\.(\d+)\.(?!nextn\.)(.+)", name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    count = keys.values[f"{keys.arch}.block_count"]
    kinds = Counter(map(frozenset, layers.values()))
    shared = [kind for kind, layers_of_kind in kinds.items() if layers_of_kind > 1]
    lost, foreign = set(), set()
    for number, kind in layers.items():
        nearest = min(shared, key=lambda other: len(other ^ kind), default=kind)
        if number >= count:
            foreign |= {f"blk.{number}.{name}" for name in kind}
        elif number and kind < nearest:
            lost |= {f"blk.{number}.{name}" for name in nearest - kind}
        elif number and kind > nearest:
            foreign |= {f"blk.{number}.{name}" for name in kind - nearest}
    if layers and not isinstance(keys.get("attention.head_count"), list):  # a list may leave layers out
        lost |= {f"blk.{number}" for number in range(count) if number not in layers}
    return lost, foreign
