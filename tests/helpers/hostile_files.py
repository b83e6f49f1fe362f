"""Valid files of every kind that dynquant reads, their damage, and what reads them.

Damage is what fuzzers of file formats do: flipped bits, numbers at the edges of their types written over bytes, pieces
cut out, doubled, moved or inserted. JSON is also damaged as a tree, so that most cases get past the parser.
"""

import json
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.imatrix import import_imatrix
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.errors import DynquantError
from dynquant.families.open import open_config, open_model
from dynquant.recipes.plan import Plan, PlanEntry
from tests.helpers.gguf_writing import finish

_EDGES = (0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 60, 1 << 63)
_VALUES = (None, True, "", "x" * 5000, "\x1b[2J", "../../x", -1, 0, 1, 1 << 31, 1 << 63, 10**400, 1e308, float("nan"),
           [], [[[]]], {}, [0] * 1000)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """`file` is a valid file of a directory of its own; `read` raises DynquantError or succeeds."""

    file: Path
    read: Callable[[Path], object]
    header_bytes: int | None = None
    """Where most damage goes; None: anywhere."""


def read_damaged(target: Target, content: bytes) -> str | None:
    """Put `content` in the place of the file and read it; the refusal, or None when it was read."""
    target.file.write_bytes(content)
    try:
        target.read(target.file)
    except DynquantError as refusal:
        return str(refusal)
    return None


def damage(content: bytes, rng: random.Random, header_bytes: int | None) -> bytes:
    """One to six accidents."""
    if content[:1] in b"{[" and rng.random() < 0.7:
        return _damage_tree(content, rng)
    if content[8:9] == b"{" and rng.random() < 0.7:
        return _damage_safetensors(content, rng)
    data = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        end = min(len(data), header_bytes or len(data)) if rng.random() < 0.9 else len(data)
        at = rng.randrange(max(1, end))
        piece = data[at : at + rng.randint(1, 24)]
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind in (1, 2):
            layout = rng.choice(("<Q", "<I", "<H", "B"))
            number = struct.pack(layout, rng.choice(_EDGES) % (1 << 8 * struct.calcsize(layout)))
            data[at : at + len(number)] = number
        elif kind == 3:
            del data[at : at + len(piece)]
        elif kind == 4:
            data[at:at] = piece * rng.randint(1, 3)
        elif kind == 5:
            target = rng.randrange(max(1, end))
            data[target : target + len(piece)] = piece
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
    if rng.random() < 0.05:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def _damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A damaged header, or damaged metadata of ours in it, before data that is whole."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    own = header.get("__metadata__", {})
    if "dynquant" in own and rng.random() < 0.5:
        own["dynquant"] = _damage_tree(own["dynquant"].encode(), rng).decode()
        text = json.dumps(header).encode()
    else:
        text = _damage_tree(json.dumps(header).encode(), rng)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _damage_tree(content: bytes, rng: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(rng.randint(1, 4)):
        parent, key = _place(tree, rng)
        if parent is None:
            return json.dumps(_value(rng)).encode()
        kind = rng.randrange(4)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "\x1b", "a" * 3000, str(key) + ".x"))] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, deepcopy(parent[key]))
        else:
            parent[key] = _value(rng)
    return json.dumps(tree).encode()


def _value(rng: random.Random) -> object:
    return deepcopy(rng.choice(_VALUES))


def _place(tree: object, rng: random.Random) -> tuple[object, object]:
    """A random container in a tree and a key in it."""
    parent, key = None, None
    while isinstance(tree, dict | list) and tree and (parent is None or rng.random() < 0.8):
        parent, key = tree, rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        tree = parent[key]
    return parent, key


def make_targets(directory: Path, small_moe: Path) -> dict[str, Target]:
    """One target for each kind of file. `small_moe` lends its configuration and tokenizer."""
    return {
        "gguf": Target(_gguf(directory / "gguf"), _read_model, 1500),
        "imatrix": Target(_imatrix(directory / "imatrix"), _read_imatrix(directory / "gguf" / "model.gguf")),
        "safetensors": Target(_safetensors(directory / "safetensors"), _read_checkpoint, 360),
        "index": Target(_index(directory / "index"), _read_checkpoint),
        "config": Target(_config(directory / "config", small_moe), _read_config),
        "stats": Target(_stats(directory / "stats"), _read_stats, 1400),
        "moments": Target(_moments(directory / "moments"), _read_moments, 700),
        "plan": Target(_plan(directory / "plan"), _read_plan),
        "errors": Target(_errors(directory / "errors"), ErrorTable.load),
    }


def _read_model(path: Path) -> None:
    inspect(path)
    model = open_model(path)
    assert model.fingerprint
    for name in model.source.names():
        assert model.source.load(name).shape == model.source.info(name).shape
    assert model.hyper.n_layer >= 0


def _read_imatrix(model_file: Path) -> Callable[[Path], object]:
    model = open_model(model_file)
    return lambda path: import_imatrix(path, model)


def _read_checkpoint(path: Path) -> None:
    inspect(path.parent)
    source = SafetensorsSource(path.parent)
    assert source.fingerprint
    for name in source.names():
        assert tuple(source.load(name).shape) == source.info(name).shape


def _read_config(path: Path) -> None:
    model = open_config(path.parent)
    assert model.num_weights > 0 and model.hyper.n_layer >= 0


def _read_stats(path: Path) -> None:
    stats = CalibrationStats.load(path)
    stats.merge(CalibrationStats.load(path))
    stats.save(path.with_name("again.safetensors"))


def _read_moments(path: Path) -> None:
    moments = SecondMoments.load(path)
    moments.merge(SecondMoments.load(path))
    assert moments.identity


def _read_plan(path: Path) -> None:
    plan = Plan.load(path)
    assert plan.hash and plan.bits_per_weight >= 0 and plan.histogram() is not None


def _gguf(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_context_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_token_list(["a", "b", "\u00e9"])
    writer.add_array("test.numbers", [1, 2, 3])
    matrix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", matrix[0].copy())
    for name, rows in (("token_embd", 3), *((f"blk.0.attn_{part}", 64) for part in ("q", "k", "v", "output"))):
        writer.add_tensor(f"{name}.weight", matrix[:rows].astype(np.float16))
    writer.add_tensor("blk.0.ffn_gate_inp.weight", matrix[:4].copy())
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, rows, columns in (("gate", 32, 64), ("up", 32, 64), ("down", 64, 32)):
        stack = np.stack([matrix[:rows, :columns]] * 4)
        writer.add_tensor(f"blk.0.ffn_{name}_exps.weight", gguf.quants.quantize(stack, q8_0), raw_dtype=q8_0)
    finish(writer)
    return path


def _imatrix(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 32)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.ones((1, 1), np.float32))
    finish(writer)
    return path


def _safetensors(directory: Path) -> Path:
    directory.mkdir()
    tensors = {
        "a.weight": torch.ones(6, 16),
        "b.weight": torch.ones(3, 4, 8).bfloat16(),
        "c.bias": torch.ones(5).half(),
    }
    save_file(tensors, directory / "model.safetensors")
    return directory / "model.safetensors"


def _index(directory: Path) -> Path:
    directory.mkdir()
    save_file({"a.weight": torch.ones(2, 2)}, directory / "model-1.safetensors")
    save_file({"b.weight": torch.ones(2, 2)}, directory / "model-2.safetensors")
    weight_map = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    return path


def _config(directory: Path, small_moe: Path) -> Path:
    directory.mkdir()
    path = directory / "config.json"
    path.write_bytes((small_moe / "config.json").read_bytes())
    return path


def _provenance() -> StatsProvenance:
    return StatsProvenance(fingerprint="a" * 64, text_hash="b" * 64, text_name="text", num_tokens=64)


def _stats(directory: Path) -> Path:
    directory.mkdir()
    stacked = InputStats(
        in_sum2=torch.ones(2, 8, dtype=torch.float64),
        counts=torch.tensor([3, 4]),
        samples=torch.ones(2, 4, 8, dtype=torch.bfloat16),
        sample_counts=torch.tensor([1, 4]),
        max_in=torch.ones(2),
        max_in_channel=torch.tensor([0, 1]),
        max_in_position=torch.tensor([2, 3]),
    )
    plain = InputStats(torch.ones(1, 8, dtype=torch.float64), torch.tensor([7]))
    inputs = {"blk.0.ffn_down_exps.weight": stacked, "blk.0.attn_q.weight": plain}
    aliases = {"blk.0.attn_k.weight": "blk.0.attn_q.weight"}
    CalibrationStats(_provenance(), inputs, aliases).save(directory / "stats.safetensors")
    return directory / "stats.safetensors"


def _moments(directory: Path) -> Path:
    directory.mkdir()
    key = "blk.0.attn_q.weight"
    moments = SecondMoments(_provenance(), torch.zeros(2, 4, dtype=torch.int32))
    moments.sums[key] = torch.eye(8)[None]
    moments.weights[key] = torch.ones(1, dtype=torch.float64)
    moments.save(directory / "hessians.safetensors")
    return directory / "hessians.safetensors"


def _plan(directory: Path) -> Path:
    directory.mkdir()
    entries = tuple(
        PlanEntry(name=name, shape=(4, 256), role="attn_q", type=stored, reason="test", bytes=size)
        for name, stored, size in (("blk.0.attn_q.weight", "Q8_0", 1088), ("blk.1.attn_q.weight", "IQ2_XXS", 264))
    )
    plan = Plan(model="m", arch="llama", fingerprint="a" * 64, recipe="test", predicted_bytes=2000, entries=entries)
    plan.save(directory / "plan.json")
    return directory / "plan.json"


def _errors(directory: Path) -> Path:
    directory.mkdir()
    row = {
        "name": "blk.0.attn_q.weight", "role": "attn_q", "layer": 0, "type": "Q8_0", "bytes": 1088,
        "relative_rms": 0.1, "weighted_error": 0.1, "weighted_energy": 1.0,
    }  # fmt: skip
    table = {
        "model": "m", "fingerprint": "a" * 64, "stats_hash": "b" * 64, "encoder": "ggml", "types": ["Q8_0"],
        "rows": [row], "sensitivity": {row["name"]: 0.5}, "sensitivity_se": {row["name"]: 0.1},
        "prices": {"fisher-probe": {row["name"]: {"Q8_0": {"kl": 0.1, "se": 0.01}}}}, "priced_by": "fisher-probe",
    }  # fmt: skip
    (directory / "errors.json").write_text(json.dumps(table))
    return directory / "errors.json"
