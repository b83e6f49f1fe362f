"""A model as GGUF sees it, wherever its files come from.

Every stage has the same view: GGUF tensor names, shapes and float32 values, GGUF metadata, and the numbers that
planning rules need. `families.open.open_model` makes one from a directory or a file.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.tensor_roles import Role, layer_of, mtp_layers, roles_of
from dynquant.checkpoints.tensor_source import ModelSource
from dynquant.errors import CheckpointError
from dynquant.storage.documents import FrozenRecord

_MAX_NUMBER = 1 << 31
_LARGEST = {"block_count": 512}
"""Loops run over layers before any tensor is looked at."""


@dataclass(frozen=True)
class HyperParams:
    """The few numbers of an architecture that planning rules depend on, read from GGUF metadata."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_expert: int = 0
    n_expert_used: int = 0
    leading_dense: int = 0
    n_ctx: int = 0
    """Tokens of the context; 0 where the metadata do not say."""

    @classmethod
    def from_metadata(cls, values: dict[str, object]) -> "HyperParams":
        """Read from GGUF key/value pairs.

        Raises:
            CheckpointError: a key that every architecture must have is missing.
        """
        arch = str(values.get("general.architecture", ""))
        prefix = "clip.vision" if arch == "clip" else arch

        def number(key: str, default: int | None = None) -> int:
            value = values.get(f"{prefix}.{key}", default)
            if value is None:
                raise CheckpointError(
                    f"The GGUF metadata has no `{prefix}.{key}`; a model of architecture `{arch}` cannot be planned "
                    "without it. Convert the checkpoint again with llama.cpp's converter."
                )
            try:
                count = int(max(value)) if isinstance(value, list | tuple) else int(value)  # type: ignore[call-overload]
                if not 0 <= count <= _LARGEST.get(key, _MAX_NUMBER):
                    raise ValueError
                return count
            except (ValueError, TypeError, OverflowError) as error:
                raise CheckpointError(
                    f"The GGUF metadata gives `{prefix}.{key}` as {value!r:.80}, which cannot be. The file is corrupt; "
                    "fetch or make it again."
                ) from error

        n_head = number("attention.head_count", 1)
        tokens = values.get("tokenizer.ggml.tokens")
        return cls(
            arch=arch,
            n_layer=number("block_count"),
            n_embd=number("embedding_length"),
            n_head=n_head,
            n_head_kv=number("attention.head_count_kv", n_head),
            n_vocab=number("vocab_size", len(tokens) if isinstance(tokens, list | tuple) else 0),
            n_expert=number("expert_count", 0),
            n_expert_used=number("expert_used_count", 0),
            leading_dense=number("leading_dense_block_count", 0),
            n_ctx=number("context_length", 0),
        )


class PrunedExperts(FrozenRecord):
    """The routed experts that a checkpoint does not have any more, by layer, under the numbers of its original."""

    original: str
    fingerprint: str  # of the original
    num_experts: int  # of a layer of the original
    experts: dict[int, tuple[int, ...]]

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def __str__(self) -> str:
        count = len(next(iter(self.experts.values())))
        listed = "; ".join(f"{layer}: {' '.join(map(str, gone))}" for layer, gone in self.experts.items())
        return f"{count} of {self.num_experts} in each of {len(self.experts)} layers ({listed})"


@dataclass(frozen=True)
class Model:
    """One checkpoint in GGUF terms.

    `hf_directory` is set when transformers can load the model from a directory; `gguf_file` when it is a GGUF.
    `checkpoint_names(name)` lists the checkpoint's own tensors that a GGUF tensor is made of. A vision-language model
    is written as several files, its `parts`; `unwritten` says why parts are missing there.
    """

    path: Path
    source: ModelSource
    metadata: tuple[MetadataField, ...]
    checkpoint_names: Callable[[str], tuple[str, ...]]
    hf_directory: Path | None = None
    gguf_file: Path | None = None
    parts: "tuple[ModelPart, ...]" = ()
    unwritten: tuple[str, ...] = ()
    base_gguf: Path | None = None
    """The file that a directory's tensors and metadata were taken from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that decide the computation beside the weights (`families.common.settings`)."""
    has_family: bool = True
    """False for an architecture that no family of dynquant has: all comes from llama.cpp's converter."""
    pruned: PrunedExperts | None = None
    original: "Model | None" = None
    """The checkpoint that this one was pruned from, whose output plans and scales are chosen by."""

    @cached_property
    def hyper(self) -> HyperParams:
        return HyperParams.from_metadata({field.key: field.value for field in self.metadata})

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The role of every tensor, by its name."""
        return roles_of(self.source.names())

    @cached_property
    def mtp_tensors(self) -> frozenset[str]:
        """All tensors of layers that predict tokens ahead (multi-token prediction)."""
        ahead = mtp_layers(self.roles)
        return frozenset(name for name in self.roles if layer_of(name) in ahead or name.startswith("nextn."))

    def without_mtp(self) -> "Model":
        """Return the model without its layers that predict tokens ahead, with the keys of llama.cpp's converter for it.

        Fingerprint and settings stay: they are of what both compute.

        Raises:
            CheckpointError: those layers are not the last.
        """
        ahead, count = mtp_layers(self.roles), self.hyper.n_layer
        rest = count - len(ahead)
        if ahead != frozenset(range(rest, count)):
            raise CheckpointError(
                f"{self.name} has layers that predict tokens ahead at {sorted(ahead)} of {count}, and only the last "
                "can be left out. Leave --no-mtp out."
            )
        fields = (self._of_layers(entry, rest) for entry in self.metadata)
        return replace(self, source=self.source.without(self.mtp_tensors), metadata=tuple(filter(None, fields)))

    def _of_layers(self, entry: MetadataField, count: int) -> MetadataField | None:
        """Return a key/value pair as it is of the first `count` layers; None for one that counts those left out."""
        key, value = entry.key.removeprefix(f"{self.arch}."), entry.value
        if key == "nextn_predict_layers":
            return None
        if key == "block_count":
            return replace(entry, value=count)
        if key != entry.key and isinstance(value, list | tuple) and len(value) == self.hyper.n_layer:
            return replace(entry, value=value[:count])
        return entry

    @property
    def is_converted(self) -> bool:
        """True when llama.cpp's converter describes the directory."""
        return self.hf_directory is not None and self.base_gguf is None and not self.has_family

    @cached_property
    def has_vision(self) -> bool:
        """True when there is a vision tower."""
        return any(name.startswith("v.") for name in self.source.names())

    @cached_property
    def has_own_output(self) -> bool:
        """True when the output matrix is stored, whether or not config.json ties it to the embedding."""
        names = self.checkpoint_names("output.weight") if "output.weight" in self.source.names() else ()
        return any(name.endswith("lm_head.weight") for name in names)

    def reads_input(self, name: str) -> bool:
        """Return whether a matrix is multiplied with an input, as embeddings are where they are the output too."""
        is_output = self.roles[name] is Role.EMBEDDING and Role.OUTPUT not in self.roles.values()
        return is_output or not self.roles[name].is_embedding

    @cached_property
    def num_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(self.source.info(name).numel for name in self.source.names())

    @property
    def arch(self) -> str:
        return self.hyper.arch

    @property
    def name(self) -> str:
        return self.path.stem if self.gguf_file and self.path.is_file() else self.path.resolve().name


@dataclass(frozen=True)
class ModelPart:
    """One GGUF file of a model that is written as several.

    `plan_name(name)` is the tensor of the whole model from which a tensor of the file takes its type.
    """

    model: Model
    plan_name: Callable[[str], str]
    is_projector: bool = False
