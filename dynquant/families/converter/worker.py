"""Runs llama.cpp's converter on a checkpoint, and writes what it would write, as a description without weights.

    python -m dynquant.families.converter.worker REQUEST.json OUTPUT_FOLDER

A process of its own, because the converter comes with a gguf-py that knows other architectures than the installed one.
The folder gets tensors.json and metadata.gguf (all keys, and values of tensors that are computed), or refusal.json.
Code that comes with a checkpoint is never run, and nothing is downloaded.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynquant.families.converter.tracing import Explained, Leaf, NotExplainedError, Tracer

PARTS = frozenset({"tensors", "unused", "tokenizer_fault", "asked_pre_tokenizer", "mtp_fault"})
METADATA, TENSORS, REFUSAL = "metadata.gguf", "tensors.json", "refusal.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIGMOID_ROUTERS = ("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minimax_m2")
_UNSTATED: dict[str, dict[str, Any]] = {
    **{kind: {"scoring_func": "sigmoid"} for kind in _SIGMOID_ROUTERS},
    "gpt2": {"n_ctx": None},
    "phimoe": {"original_max_position_embeddings": None},
    "solar_open": {"partial_rotary_factor": 1.0},
}
"""By model_type, what transformers' model computes although config.json does not say it, and the converter reads it
there; None stands for the length of the context."""
_UNSTATED_ROTARY = {"cohere2": 1.0, "gpt_neox": 0.25}
"""The part of a head that is turned, where transformers 5 neither keeps `rotary_pct` nor says it of the angles."""
_FORMER_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}
_FORMER_TYPES = ("granitemoehybrid", "bamba", "jamba")
"""Models whose layers transformers 5 calls by other words than their first configurations and the converter."""
_MAX_COMPUTED = 1 << 24
"""Entries of the largest tensor whose values are taken from the converter."""


class Refusal(Exception):
    """A reason in words, and of which kind it is."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def main() -> None:
    """Describe the checkpoint of a request."""
    request, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    tree = Path(request["tree"])
    sys.path[:0] = [str(tree / "gguf-py"), str(tree)]
    logging.disable(logging.CRITICAL)
    try:
        with torch.inference_mode(False):
            _describe(request, output)
    except Refusal as refusal:
        (output / REFUSAL).write_text(json.dumps({"kind": refusal.kind, "reason": str(refusal)}))


def _describe(request: dict[str, Any], output: Path) -> None:
    import gguf
    from conversion import TEXT_MODEL_MAP, ModelBase, ModelType, get_model_architecture, get_model_class

    if not Path(gguf.__file__).resolve().is_relative_to(Path(request["tree"]).resolve()):
        raise Refusal("failed", f"Python takes the package gguf from {gguf.__file__} and not from the tree")
    _trust_no_code()
    directory = Path(request["directory"])
    converter = _Converter(request)
    converter.prepare()
    try:
        architecture = get_model_architecture(ModelBase.load_hparams(directory, False), ModelType.TEXT)
        spelled = {name.lower(): name for name in TEXT_MODEL_MAP}  # transformers 5 spells some in another way
        model_class = get_model_class(spelled.get(architecture.lower(), architecture))
    except Exception as error:
        raise Refusal("unknown", str(error)) from error
    # Some converters take layers that predict tokens ahead for granted, or count them, of checkpoints that came without
    # them; and of such layers some make tensors that cannot be followed, which is told with what is left out.
    choices = [True] if request["no_mtp"] or not model_class.supports_mtp_export else [False, True]
    faults: list[str] = []
    for no_mtp in choices:
        model_class.no_mtp = no_mtp and model_class.supports_mtp_export
        try:
            model = converter.run(model_class, directory)
            if no_mtp or not converter.lacks_layers_ahead(model):
                converter.write(model, output, mtp_fault="".join(faults))
                return
        except MemoryError:
            raise
        except Refusal as refusal:
            if refusal.kind != "tensor" or no_mtp is choices[-1]:
                raise
            faults.append(str(refusal))
        except Exception as error:  # the converter checks by assertions and errors of all kinds
            faults.append(f"{type(error).__name__}: {str(error)[:600]}")
            if no_mtp is choices[-1]:
                raise Refusal("failed", "; without layers that predict tokens ahead: ".join(faults)) from error


def _trust_no_code() -> None:
    """Make transformers and PyTorch refuse code of checkpoints where the converter would run it."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    for loader in (AutoConfig, AutoModel, AutoTokenizer):
        original = loader.from_pretrained

        def load(*arguments: Any, original: Any = original, **options: Any) -> Any:
            return original(*arguments, **options | {"trust_remote_code": False, "local_files_only": True})

        loader.from_pretrained = load

    def refuse_pickles(*_: Any, **__: Any) -> None:
        raise Refusal("failed", "it would open a pickle, which may run any code")

    torch.load = refuse_pickles


class _Converter:
    """Drives a converter class on tensors without data, and keeps what it hands to the writer."""

    def __init__(self, request: dict[str, Any]) -> None:
        import gguf
        from conversion.base import LazyTorchTensor, ModelBase, TextModel

        self._gguf, self._lazy, self._base, self._text = gguf, LazyTorchTensor, ModelBase, TextModel
        self._request = request
        self._stored = {name for name, *_ in request["tensors"]}
        self._written: dict[str, tuple[Any, str | None]] = {}
        self._used: set[str] = set()
        self._looked: set[str] = set()
        self._tracer = Tracer(gguf.LazyBase)
        self._tokenizer_fault = ""
        self._asked_pre = False

    def prepare(self) -> None:
        """Put our tensors and answers in the place of what the converter would read."""
        gguf, original_pre = self._gguf, self._text.get_vocab_base_pre

        def pre_tokenizer(model: Any, tokenizer: Any) -> str:
            try:
                return original_pre(model, tokenizer)
            except NotImplementedError:
                if self._request["pre_tokenizer"] is None:
                    raise
                self._asked_pre = True
                return self._request["pre_tokenizer"]

        load_parameters = self._base.load_hparams

        def parameters(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
            return _as_expected(load_parameters(directory, is_mistral_format))

        begin = self._base.__init__

        def init(model: Any, *arguments: Any, hparams: dict[str, Any] | None = None, **options: Any) -> None:
            begin(model, *arguments, hparams=hparams and _as_expected(hparams), **options)  # of config.json itself

        self._base.load_hparams = staticmethod(parameters)
        self._base.__init__ = init
        self._base.index_tensors = lambda model, remote_hf_model_id=None: self._indexed(model)
        self._text.get_vocab_base_pre = pre_tokenizer
        # The graph stays as it is, so that it can be followed after the converter looked at values.
        gguf.LazyBase.to_eager = classmethod(lambda _, node: self._looked_at(node))
        gguf.quants.quantize = lambda data, quant_type: data
        self._lazy.to = _moved
        self._lazy.cpu = lambda tensor: tensor
        self._lazy.item = lambda tensor: self._item(tensor)
        zeros = torch.zeros

        def lazy_zeros(*size: Any, device: Any = None, **options: Any) -> Any:
            if str(device) != "meta":
                return zeros(*size, device=device, **options)
            meta = zeros(*size, device=device, **options)
            return self._lazy(meta=meta, args=(size,), func=lambda size: zeros(*size, **options))

        torch.zeros = lazy_zeros

    def run(self, model_class: Any, directory: Path) -> Any:
        """Make the converter do all but write."""
        gguf = self._gguf
        for names in (self._written, self._used, self._looked):
            names.clear()  # of an earlier run
        model = model_class(directory, gguf.LlamaFileType.MOSTLY_BF16, Path("traced.gguf"))
        if isinstance(getattr(model, "impl", None), self._base):
            model = model.impl  # some classes only choose another
        register = model.gguf_writer.add_tensor_info

        def add_tensor(name: str, data: Any, raw_shape: Any = None, raw_dtype: Any = None, **_: Any) -> None:
            self._written[name] = (data, raw_dtype.name if raw_dtype is not None else None)
            shape = tuple(data.shape if raw_shape is None else raw_shape)
            register(name, shape, data.dtype, 0, raw_dtype=gguf.GGMLQuantizationType.F32)

        model.gguf_writer.add_tensor = add_tensor
        model.set_vocab = self._guarded(model)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        return model

    def lacks_layers_ahead(self, model: Any) -> bool:
        """Return whether the keys count layers that predict tokens ahead, and no tensor is of one."""
        from dynquant.checkpoints.tensor_roles import mtp_layers  # with the tree's gguf-py

        writer = model.gguf_writer
        count = writer.kv_data[0].get(f"{writer.arch}.nextn_predict_layers")
        return count is not None and count.value > 0 and not mtp_layers(self._written)

    def _looked_at(self, node: Any) -> Any:
        """Return the values of a tensor that the converter asks for, and note whose they are."""
        self._looked |= {leaf.name for leaf in self._tracer.leaves(node)}
        return self._tracer.values(node)

    def write(self, model: Any, output: Path, mtp_fault: str) -> None:
        """Write the description of all tensors, and the metadata."""
        writer = self._gguf.GGUFWriter(output / METADATA, model.gguf_writer.arch)
        writer.kv_data = [dict(model.gguf_writer.kv_data[0])]
        entries = [self._entry(name, data, kind, writer) for name, (data, kind) in self._written.items()]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unused = sorted(self._stored - self._used)
        about = {
            "tensors": entries,
            "unused": unused,
            "tokenizer_fault": self._tokenizer_fault,
            "asked_pre_tokenizer": self._asked_pre,
            "mtp_fault": mtp_fault,
        }
        (output / TENSORS).write_text(json.dumps(about))

    def _entry(self, name: str, data: Any, kind: str | None, writer: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": name, "shape": list(data.shape), "type": kind}
        explained = Explained((), None)
        if isinstance(data, self._gguf.LazyBase):
            self._used |= {leaf.name for leaf in self._tracer.leaves(data)}
            try:
                explained = self._tracer.explain(data)
            except NotExplainedError as error:
                raise Refusal("tensor", f"`{name}`: {error}") from error
        if explained.selection is None:
            self._add_values(name, data, kind, writer)
            return entry
        return entry | {"parts": explained.parts, "selection": asdict(explained.selection)}

    def _add_values(self, name: str, data: Any, kind: str | None, writer: Any) -> None:
        import numpy as np

        is_lazy = isinstance(data, self._gguf.LazyBase)
        # Without a graph, a tensor may be made of any whose values the converter asked for.
        read = sorted({leaf.name for leaf in self._tracer.leaves(data)} if is_lazy else self._looked)
        # Decays of state spaces may be computed; a weight that is a matrix has inputs, whose statistics it needs.
        is_matrix = name.endswith(".weight") and sum(size > 1 for size in data.shape) > 1
        if read and (is_matrix or prod(data.shape) > _MAX_COMPUTED):
            said = f"its entries are computed, not moved, of values of {', '.join(read[:4])}"
            raise Refusal("tensor", f"`{name}` {list(data.shape)}: {said}{' ...' if len(read) > 4 else ''}")
        self._used |= set(read)
        if is_lazy:
            data = self._tracer.values(data)
        elif kind not in (None, *_DTYPES) or prod(data.shape) > _MAX_COMPUTED:
            raise Refusal("tensor", f"`{name}` {list(data.shape)} is written as {kind} without the converter's graph")
        writer.add_tensor(name, np.array(data, dtype=np.float32).reshape(data.shape))

    def _item(self, tensor: Any) -> Any:
        """Return a lazy tensor's only value, for a key of the metadata."""
        self._used |= {leaf.name for leaf in self._tracer.leaves(tensor)}
        return self._tracer.values(tensor).item()

    def _indexed(self, model: Any) -> dict[str, Callable[[], Any]]:
        """Return what `index_tensors` of the converter does: its tensors by name, from the request."""
        tensors = {}
        turned = _turned_experts(model.hparams, {name: tuple(shape) for name, _, shape, _ in self._request["tensors"]})
        for name, dtype, shape, place in self._request["tensors"]:
            leaf = Leaf(name, tuple(shape), self._reader(name, dtype, shape, place))
            meta = self._lazy.meta_with_dtype_and_shape(_DTYPES[dtype], leaf.shape)

            def lazy(leaf: Leaf = leaf, meta: Tensor = meta) -> Any:
                tensor = self._lazy(meta=meta, args=(leaf,), func=_leaf)
                return tensor.transpose(1, 2) if leaf.name in turned else tensor

            item = model.filter_tensors((name, lazy))
            if item is not None:
                tensors[item[0]] = item[1]
        return tensors

    def _reader(self, name: str, dtype: str, shape: Sequence[int], place: Sequence[Any] | None) -> Callable[[], Tensor]:
        def read() -> Tensor:
            if place is None:
                raise Refusal("tensor", f"`{name}` is stored quantized, and the converter computes with its values")
            path, offset, num_bytes = place
            with open(path, "rb") as file:
                file.seek(offset)
                return torch.frombuffer(bytearray(file.read(num_bytes)), dtype=_DTYPES[dtype]).reshape(shape)

        return read

    def _guarded(self, model: Any) -> Callable[[], None]:
        """Return the function that writes a tokenizer's keys, or none of them where it fails."""
        set_vocab = model.set_vocab

        def guarded() -> None:
            fields = model.gguf_writer.kv_data[0]
            before = dict(fields)
            try:
                set_vocab()
            except Exception as error:  # files that are missing, hashes and assertions
                self._tokenizer_fault = f"{type(error).__name__}: {str(error)[:400]}"
                fields.clear()
                fields.update(before)

        return guarded


def _as_expected(stated: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a checkpoint of floats, which the request's tensors are, in the converter's words."""
    stated.pop("quantization_config", None)
    model_type = str(stated.get("model_type"))
    for key, value in _UNSTATED.get(model_type, {}).items():
        if stated.get(key) is None:
            context = stated.get("max_position_embeddings", stated.get("n_positions"))
            stated[key] = context if value is None else value
    if model_type in _UNSTATED_ROTARY and stated.get("rotary_pct") is None:
        rope = stated.get("rope_parameters") or {}
        stated["rotary_pct"] = rope.get("partial_rotary_factor", _UNSTATED_ROTARY[model_type])
    for key in ("layer_types", "layers_block_type") if model_type in _FORMER_TYPES else ():
        if isinstance(stated.get(key), list):
            stated[key] = [_FORMER_WORDS.get(word, word) for word in stated[key]]
    return stated


def _turned_experts(stated: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """Return the experts of Qwen3-VL-MoE that transformers 5 saved: rows and columns are swapped to those published."""
    if stated.get("model_type") not in ("qwen3_vl_moe", "qwen3_vl_moe_text"):
        return frozenset()
    text = stated.get("text_config") or stated
    width, hidden = text["moe_intermediate_size"], text["hidden_size"]
    saved = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    experts = {name: saved.get(name.rpartition(".")[2]) for name in shapes if ".experts." in name}
    # A square matrix does not tell; gate and up beside down are never both square.
    is_saved = any(shape and shapes[name][1:] == shape != shape[::-1] for name, shape in experts.items())
    return frozenset(name for name, shape in experts.items() if shape and is_saved)


def _moved(tensor: Any, *arguments: Any, **options: Any) -> Any:
    """Return a lazy tensor in another type; a device without data has no other device to go to."""
    options.pop("device", None)
    arguments = tuple(item for item in arguments if not isinstance(item, str | torch.device))

    def to(values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return values.to(*arguments, **options)

    return type(tensor)._wrap_fn(to, use_self=tensor)(*arguments, **options) if arguments or options else tensor


def _leaf(value: Any) -> Any:
    return value.read() if isinstance(value, Leaf) else value


if __name__ == "__main__":
    main()
