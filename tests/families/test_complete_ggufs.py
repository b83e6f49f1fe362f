"""GGUF models with less or more than a model has: refused by name on every way in, whole ones are not."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from safetensors.torch import load_file, save_file

from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.inspect import inspect
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from tests.helpers.commands import refused, run, succeed
from tests.helpers.gguf_writing import finish
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, save_tiny, write_f32

Tensors = dict[str, np.ndarray]
NAMES = ("llama", "deepseek-v3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_moe: Path) -> Callable[[str], GGUFSource]:
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def source(name: str) -> GGUFSource:
        if name not in made:
            directory = save_tiny(name, folder / name, small_moe)
            made[name] = GGUFSource(write_f32(open_model(directory), folder / f"{name}.gguf"))
        return made[name]

    return source


def rewritten(
    source: GGUFSource, path: Path, edit: Callable[[Tensors], object] = len, *, without: str = "", **keys: object
) -> Path:
    """Write the tensors that `edit` leaves of a file, without one of its keys, or with others."""
    fields = [field for field in source.metadata if field.key != without and field.key not in keys]
    fields += [MetadataField(key, value, GGUFValueType.UINT32) for key, value in keys.items()]
    tensors = {name: source.load(name).numpy() for name in source.names()}
    edit(tensors)
    arch = next(field.value for field in source.metadata if field.key == "general.architecture")
    writer = gguf.GGUFWriter(path, keys.get("arch", arch))
    for field in fields:
        if field.key not in ("general.architecture", "arch"):
            item_type = field.item_type if field.value_type == GGUFValueType.ARRAY else None
            writer.add_key_value(field.key, field.value, field.value_type, item_type)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


@pytest.mark.parametrize("name", represented_by(NAMES, TINY))
def test_every_tensor_is_needed(name: str, whole, tmp_path: Path) -> None:
    source = whole(name)
    assert open_model(source.path).source.names() == source.names()
    optional = {"output.weight", "rope_freqs.weight"}  # a file without them may be a tied model, or one without scaling
    for number, lost in enumerate(sorted(set(source.names()) - optional)):
        if number % 4 and not lost.endswith(("_b.bias", "norm.weight")):
            continue
        path = rewritten(source, tmp_path / "less.gguf", lambda tensors, lost=lost: tensors.pop(lost))
        with pytest.raises(CheckpointError, match=rf"less\.gguf.* (lacks .*{lost}|have no place in it)"):
            open_model(path)


@pytest.mark.parametrize(
    "extra", ["blk.0.foo.weight", "blk.1.attn_q.bias", "blk.2.attn_norm.weight", "foo.weight", "output_norm.bias"]
)
def test_one_tensor_too_many_is_named(extra: str, whole, tmp_path: Path) -> None:
    path = rewritten(whole("llama"), tmp_path / "more.gguf", lambda t: t.update({extra: np.ones(256, np.float32)}))
    with pytest.raises(CheckpointError, match=rf"holds 1 tensors that have no place in it \(`{extra}`\)"):
        open_model(path)


def test_another_shape_is_named(whole, tmp_path: Path) -> None:
    path = rewritten(
        whole("llama"), tmp_path / "m.gguf", lambda t: t.update({"blk.1.ffn_up.weight": np.ones((64, 256), np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"in another shape \(`blk\.1\.ffn_up\.weight`\)"):
        open_model(path)


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"],
)
def test_a_missing_key_is_named(key: str, whole, tmp_path: Path) -> None:
    path = rewritten(whole("llama"), tmp_path / "m.gguf", without=f"llama.{key}")
    with pytest.raises(CheckpointError, match=rf"lacks the key `llama\.{key}`"):
        open_model(path)


def test_a_window_of_no_layer_is_refused(moe_model, tmp_path: Path) -> None:
    """At which llama.cpp ends the process."""
    keys = {
        "sliding_window": (4096, GGUFValueType.UINT32),
        "sliding_window_pattern": ([False] * 6, GGUFValueType.ARRAY),
    }
    fields = [MetadataField(f"deepseek2.attention.{key}", *value, GGUFValueType.BOOL) for key, value in keys.items()]
    edited = replace(moe_model, metadata=(*moe_model.metadata, *fields))
    with pytest.raises(CheckpointError, match=r"no layer that attends in it.*`sliding_window` .* to null"):
        open_model(write_f32(edited, tmp_path / "m.gguf"))


def test_experts_in_tensors_of_their_own_are_recognised(whole, tmp_path: Path) -> None:
    def unstack(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_exps" in name]:
            for expert, values in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps", f".{expert}")] = values

    with pytest.raises(CheckpointError, match=r"every expert as tensors of its own.*until April 2024"):
        open_model(rewritten(whole("mixtral"), tmp_path / "old.gguf", unstack))


def test_layers_of_an_unknown_architecture_are_compared(whole, tmp_path: Path) -> None:
    """Four layers of which the first may differ; hybrids differ in more than one layer."""

    def deepen(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("blk.1.")]:
            tensors |= {name.replace("blk.1.", f"blk.{layer}."): tensors[name] for layer in (2, 3)}
        del tensors["blk.0.attn_norm.weight"]

    keys = {"arch": "refact", **{f"refact.{key}": n for key, n in (("block_count", 4), ("embedding_length", 256))}}
    keys |= {"refact.context_length": 1024}
    source = GGUFSource(rewritten(whole("llama"), tmp_path / "deep.gguf", deepen, **keys))
    assert open_model(source.path).hyper.n_layer == 4
    edits: dict[str, Callable[[Tensors], object]] = {
        r"lacks 1 .*`blk\.2\.attn_k\.weight`": lambda t: t.pop("blk.2.attn_k.weight"),
        r"holds 1 .*`blk\.3\.attn_k\.bias`": lambda t: t.update({"blk.3.attn_k.bias": np.ones(4, np.float32)}),
        r"holds 1 .*`blk\.4\.attn_k\.weight`": lambda t: t.update({"blk.4.attn_k.weight": np.ones(4, np.float32)}),
        r"lacks 1 .*`blk\.3`": lambda t: [t.pop(name) for name in list(t) if name.startswith("blk.3.")],
    }
    for message, edit in edits.items():
        with pytest.raises(CheckpointError, match=message):
            open_model(rewritten(source, tmp_path / "m.gguf", edit))
    for name in ("blk.2.nextn.eh_proj.weight", "rope_factors_long.weight"):
        open_model(rewritten(source, tmp_path / "m.gguf", lambda t, n=name: t.update({n: np.ones(4, np.float32)})))


@pytest.mark.parametrize("command", ["calibrate", "plan", "export", "analyze"])
def test_every_command_refuses_it(command: str, whole, tmp_path: Path, small_moe: Path) -> None:
    path = rewritten(whole("llama"), tmp_path / "less.gguf", lambda tensors: tensors.pop("blk.1.attn_k.weight"))
    more = {"plan": ("--bpw", "4"), "export": ("--preset", "uniform-q8_0"), "analyze": ("--stats", path)}
    ending = {"calibrate": ".safetensors", "export": ".gguf", "analyze": ".json"}.get(command, "")
    output = tmp_path / f"out{ending}"
    assert "lacks 1 tensors" in refused(command, path, *more.get(command, ()), "-o", output)
    assert not output.exists()


def test_a_file_that_is_no_model_is_refused(whole, tmp_path: Path) -> None:
    empty = rewritten(whole("llama"), tmp_path / "vocab.gguf", lambda tensors: tensors.clear())
    assert "holds no tensors" in refused("export", empty, "--preset", "uniform-q8_0", "-o", tmp_path / "out.gguf")
    assert "0.0" in str(inspect(empty).bits_per_weight)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 4), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"lora\.gguf is of the type 'adapter': it is no model"):
        open_model(tmp_path / "lora.gguf")


@pytest.fixture
def parts(whole, tmp_path: Path) -> list[Path]:
    source = whole("llama")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8)
    for field in source.metadata:
        if field.key != "general.architecture":
            item_type = field.item_type if field.value_type == GGUFValueType.ARRAY else None
            writer.add_key_value(field.key, field.value, field.value_type, item_type)
    for name in source.names():
        writer.add_tensor(name, source.load(name).numpy())
    finish(writer)
    return sorted(tmp_path.glob("m-*.gguf"))


def test_parts_are_one_model_and_nothing_else(parts: list[Path], whole, tmp_path: Path) -> None:
    assert len(parts) == 3
    one_file = whole("llama").path
    assert inspect(parts[0]).num_weights == open_model(parts[0]).num_weights == inspect(one_file).num_weights
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    first = tmp_path / "first.gguf"
    first.write_bytes(parts[0].read_bytes())
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(one_file.read_bytes() + bytes(4096))
    refusals = {
        joined: "joined with `cat`.*llama-gguf-split --merge", first: "one of 3 files", junk: "4,096 bytes follow",
        parts[1]: "give the first part",
    }  # fmt: skip
    for path, message in refusals.items():
        for way_in in (inspect, open_model):
            with pytest.raises(CheckpointError, match=rf"{path.name}.*{message}"):
                way_in(path)


def test_parts_in_the_wrong_places_are_refused(parts: list[Path]) -> None:
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    for way_in in (inspect, open_model):
        with pytest.raises(CheckpointError, match="number 2 from 0, but is taken for number 1 of 3"):
            way_in(parts[0])
    parts[1].write_bytes(second)
    inspect(parts[0])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"expert_used_count": 9}, r"`qwen3moe\.expert_used_count` as 9; a number from 1 to 8 is needed"),
        ({"expert_used_count": 0}, r"expert_used_count` as 0"),
        ({"expert_group_count": 8}, r"expert_group_count` as 8; fewer groups than experts, of which there are 8"),
        ({"attention.key_length": 7}, r"attention\.key_length` as 7; 64, as its tensors have, is needed"),
        ({"expert_feed_forward_length": 65}, r"expert_feed_forward_length` as 65; 64, as its tensors have, is needed"),
        ({"expert_group_count": 3, "expert_group_used_count": 1}, r"expert_group_used_count` as 1; a part of 3 equal"),
    ],
)
def test_numbers_at_which_llama_cpp_aborts(keys: dict[str, int], said: str, whole, tmp_path: Path) -> None:
    """No such file is given to llama.cpp, which would refuse it or end the process."""
    keys = {f"qwen3moe.{key}": value for key, value in keys.items()}
    path = rewritten(whole("qwen3-moe"), tmp_path / "bad.gguf", **keys)
    text = tmp_path / "text.txt"
    text.write_text("The sea is blue. " * 40)
    assert re.search(said, refused("eval", path, "--reference", whole("qwen3-moe").path, "--text", text))
    assert re.search(said, refused("plan", path, "--bpw", 4, "-o", tmp_path / "plan"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("deepseek-v3", "deepseek2.attention.head_count_kv", 7), ("deepseek-v3", "deepseek2.attention.key_length", 7),
        ("deepseek-v3", "deepseek2.expert_gating_func", 7), ("deepseek-v3", "deepseek2.feed_forward_length", 0),
        ("gemma3-period-3", "gemma3.attention.sliding_window_pattern", 1), ("llama", "llama.rope.dimension_count", 7),
    ],
)  # fmt: skip
def test_more_numbers_at_which_llama_cpp_aborts(name: str, key: str, value: int, whole, tmp_path: Path) -> None:
    path = rewritten(whole(name), tmp_path / "bad.gguf", **{key: value})
    with pytest.raises(CheckpointError, match=rf"`{key}` as {value}; .* is needed"):
        open_model(path)


def test_lists_of_another_length_than_the_vocabulary(whole, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    kinds = MetadataField("tokenizer.ggml.token_type", [1] * 100, GGUFValueType.ARRAY, GGUFValueType.INT32)
    source = GGUFSource(whole("llama").path)
    with patch.object(GGUFSource, "metadata", [*(f for f in source.metadata if f.key != kinds.key), kinds]):
        rewritten(source, path)
    assert "`tokenizer.ggml.token_type` that is not one int for each of 8,192 tokens" in refused("plan", path)


def test_inspect_shows_what_is_there_and_says_what_is_not(whole, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["blk.0.attn_queries.weight"] = tensors.pop("blk.0.attn_q.weight")

    cases = {
        "lacks 1 tensors .* and holds 1 tensors": rewritten(whole("llama"), tmp_path / "renamed.gguf", rename),
        "lacks .*`blk.2": rewritten(whole("llama"), tmp_path / "deeper.gguf", **{"llama.block_count": 3}),
        "expert_used_count` as 9": rewritten(
            whole("qwen3-moe"), tmp_path / "used.gguf", **{"qwen3moe.expert_used_count": 9}
        ),
    }
    for said, path in cases.items():
        shown = succeed("inspect", path)
        assert re.search(rf"bits per weight of what is there\nThis is not a whole model\. .*{said}", shown), shown
        assert "F32" in shown and re.search(said, json.loads(run("inspect", path, "--json").stdout)["fault"])
        for looked in (("recipe", path), ("diff", path, whole("llama").path)):
            assert re.search(r"is not a whole model: .*" + said, run(*looked).stderr)
    shown = succeed("inspect", whole("llama").path)
    assert "what is there" not in shown and "whole" not in shown.splitlines()[-1]


def test_an_eos_that_is_no_token_is_refused(whole, tmp_path: Path) -> None:
    path = rewritten(whole("llama"), tmp_path / "eos.gguf", **{"tokenizer.ggml.eos_token_id": 8192})
    with pytest.raises(CheckpointError, match=r"eos_token_id` as 8192, but has 8,192 tokens"):
        open_model(path)


def test_inspect_of_a_packed_directory_without_a_tensor(packed_tiny, tmp_path: Path) -> None:
    for file in packed_tiny.directory.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lacks 1 tensors of its quantization_config, first `lm_head.weight`" in succeed("inspect", tmp_path)
    assert "not a whole model" not in succeed("inspect", packed_tiny.directory)


def test_inspect_of_one_shard_is_not_the_model(small_moe: Path, tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "a.safetensors"):
        (tmp_path / name).symlink_to(small_moe / "model.safetensors")
    assert "number 1 of 2 files of a checkpoint" in succeed("inspect", tmp_path / "model-00001-of-00002.safetensors")
    assert "not a whole model" not in succeed("inspect", tmp_path / "a.safetensors")
    files = {"w": "a.safetensors", "v": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert "one of 2 files of a checkpoint" in succeed("inspect", tmp_path / "a.safetensors")
