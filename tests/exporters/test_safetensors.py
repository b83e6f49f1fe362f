"""Packed safetensors: the GGUF export's bytes, what lies beside them, and what a kill or a wrong input leaves."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.safetensors_format import read_header
from dynquant.errors import ExportError, OptionError, PlanError
from dynquant.exporters import safetensors as exporter
from dynquant.exporters.model_card import packed_card
from dynquant.exporters.safetensors import hf_config_of
from dynquant.families.open import open_model
from dynquant.families.text.llama import interleave_halves
from dynquant.packed.places import build_meta_model, find_places
from dynquant.recipes.build_plan import plan_from_types
from tests.helpers.exports import export_safetensors
from tests.helpers.tiny_gguf import GGML, WatchedEncoder, stop_after


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def tiny(tiny_text):
    """A Llama with rotary rows to reorder and a head of its own; its plan takes Q8_0 and leaves one matrix in F16."""
    model = open_model(tiny_text("llama"))
    types = {name: ("Q8_0", "test") for name in model.source.names() if len(model.source.info(name).shape) == 2}
    types["blk.0.ffn_up.weight"] = ("F16", "test")
    return model, plan_from_types(model, types, recipe="preset uniform-q8_0")


def test_every_tensor_has_the_bytes_of_the_gguf_export(packed_moe):
    gguf, stored = GGUFSource(packed_moe.gguf), load_file(packed_moe.directory / "model.safetensors")
    config = hf_config_of(packed_moe.model)
    found, computed = find_places(config, build_meta_model(config))
    assert not computed and found.keys() == set(gguf.names())
    assert {place.key for place in found.values()} == stored.keys()
    for name, place in found.items():
        assert sha(gguf.load_packed(name)) == sha(stored[place.key]), name


def test_rotary_rows_move_whole(tiny, tmp_path):
    model, plan = tiny
    export_safetensors(model, plan, None, tmp_path / "out", encoder=GGML)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    query = stored["model.layers.0.self_attn.q_proj.weight"]
    encoded = GGML.encode(plan.entries[0].quant_type, model.source.load("blk.0.attn_q.weight"), None, None, name="q")
    assert torch.equal(interleave_halves(4)(query), encoded) and not torch.equal(query, encoded)
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


def test_the_directory_says_what_it_holds(packed_moe, small_moe):
    names = {path.name for path in packed_moe.directory.iterdir()}
    assert names == {"config.json", "README.md", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((packed_moe.directory / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and config["quantization_config"]["quant_method"] == "dynquant"
    types = config["quantization_config"]["types"]
    assert types["model.layers.1.mlp.experts.up_proj"] == "IQ4_NL"
    assert (
        types["model.layers.0.self_attn.kv_b_proj.k_b"] == "Q4_0" and types["model.layers.1.mlp.gate.weight"] == "F32"
    )
    assert config["quantization_config"]["provenance"]["plan_hash"] == packed_moe.plan.hash
    assert (packed_moe.directory / "tokenizer.json").read_bytes() == (small_moe / "tokenizer.json").read_bytes()
    with safe_open(packed_moe.directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    starts = [e["data_offsets"][0] for e in read_header(packed_moe.directory / "model.safetensors").values()]
    assert len(set(starts)) == len(starts)


def test_inspect_shows_quant_types_and_bits(packed_moe):
    summary, gguf = inspect(packed_moe.directory), inspect(packed_moe.gguf)
    assert {share.label: share.num_weights for share in summary.types} == {
        share.label: share.num_weights for share in gguf.types
    }
    assert summary.provenance["dynquant.encoder"] == "ggml"


def test_the_card_tells_plan_and_damage(packed_moe):
    card = (packed_moe.directory / "README.md").read_text()
    assert "| expert_up | IQ4_NL | 5 |" in card and "Not measured on this file" in card
    measured = packed_moe.plan.model_copy(update={"selected_kl": 0.1234, "predicted_kl": 0.2, "predicted_kl_se": 0.01})
    card = packed_card(measured, encoder="ggml", stored_bytes=1000)
    assert "measured: 0.1234" in card and "0.2000 ± 0.0100" in card and "Not measured" not in card


def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path):
    model, plan = tiny
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {"shard_max_bytes": 3_000_000}
    export_safetensors(model, plan, None, whole, encoder=GGML, **options)
    with pytest.raises(KeyboardInterrupt):
        export_safetensors(model, plan, None, broken, encoder=WatchedEncoder(stop_after(12)), threads=1, **options)
    assert not (broken / "config.json").exists() and not list(broken.glob("*.safetensors"))
    encoded = []
    recorder = WatchedEncoder(lambda name, _: encoded.append(name))
    export_safetensors(model, plan, None, broken, encoder=recorder, **options)
    assert len(encoded) == len(plan.entries) - 12
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (whole, broken)]
    assert contents[0] == contents[1]


def test_another_plan_is_refused_until_told_to_start_over(tiny, tmp_path):
    model, plan = tiny
    other = replace_type(plan, "blk.1.ffn_up.weight", "Q4_0")
    with pytest.raises(KeyboardInterrupt):
        export_safetensors(model, plan, None, tmp_path, encoder=WatchedEncoder(stop_after(3)))
    with pytest.raises(ExportError, match="interrupted export with another plan"):
        export_safetensors(model, other, None, tmp_path, encoder=GGML)
    export_safetensors(model, other, None, tmp_path, encoder=GGML, resume=False)
    assert (tmp_path / "config.json").is_file()


def replace_type(plan, name, type_name):
    from dynquant.formats.quant_types import quant_type

    entries = {entry.name: entry for entry in plan.entries}
    size = quant_type(type_name).tensor_bytes(entries[name].shape)
    entries[name] = entries[name].model_copy(update={"type": type_name, "bytes": size})
    return plan.model_copy(update={"entries": tuple(entries.values())})


def test_an_older_export_is_replaced_whole(tiny, tmp_path):
    model, plan = tiny
    export_safetensors(model, plan, None, tmp_path, encoder=GGML, shard_max_bytes=3_000_000)
    assert len(list(tmp_path.glob("model-*"))) > 1
    export_safetensors(model, plan, None, tmp_path, encoder=GGML)
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]


def test_bytes_of_a_gguf_file_of_the_plan_are_taken_over(packed_moe, tmp_path):
    unused, stored = WatchedEncoder(None), GGUFSource(packed_moe.gguf)
    export_safetensors(packed_moe.model, packed_moe.plan, None, tmp_path, encoder=unused, stored=stored)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, packed_moe.directory))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_gguf_file_can_be_the_model(packed_moe, tmp_path):
    from dynquant.running.parameter_map import without_progress_bars

    model = open_model(packed_moe.gguf)
    types = {e.name: (e.type, "kept") for e in packed_moe.plan.entries if len(e.shape) > 1}
    plan = plan_from_types(model, types, recipe="test")
    with without_progress_bars(), pytest.warns(UserWarning, match="tokenizer"):
        export_safetensors(model, plan, None, tmp_path, encoder=GGML)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, packed_moe.directory))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_wrong_outputs_and_plans_are_refused(tiny, small_moe, tmp_path):
    model, plan = tiny
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="writes a directory"):
        export_safetensors(model, plan, None, tmp_path / "file", encoder=GGML)
    with pytest.raises(ExportError, match="model that is being read"):
        export_safetensors(model, plan, None, model.hf_directory, encoder=GGML)
    with pytest.raises(ExportError, match="cannot be split"):
        export_safetensors(model, plan, None, tmp_path / "out", encoder=GGML, shard_max_bytes=1000)
    with pytest.raises(PlanError, match="fingerprint"):
        export_safetensors(open_model(small_moe), plan, None, tmp_path / "out", encoder=GGML)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_what_is_finished(tiny, tmp_path, monkeypatch):
    model, plan = tiny
    write = exporter.ResumableOutput.write

    def full(self, name, data):
        if name == "output.weight":
            raise ExportError("The disk is full")
        write(self, name, data)

    monkeypatch.setattr(exporter.ResumableOutput, "write", full)
    with pytest.raises(ExportError, match="full"):
        export_safetensors(model, plan, None, tmp_path, encoder=GGML)
    assert (tmp_path / "model.safetensors.partial").exists() and not (tmp_path / "config.json").exists()


def test_the_command_line_exports_and_inspects(tiny, tmp_path):
    from typer.testing import CliRunner

    from dynquant.cli.app import app

    model, run = tiny[0], CliRunner().invoke
    arguments = ["export", str(model.hf_directory), "--preset", "uniform-q8_0", "--encoder", "ggml"]
    done = run(app, [*arguments, "-f", "safetensors", "-o", str(tmp_path / "out"), "--split-max-size", "3MB"])
    assert done.exit_code == 0 and "config.json" in done.output and "bits per weight" in done.output
    done = run(app, ["inspect", str(tmp_path / "out"), "--json"])
    assert json.loads(done.output)["types"][0]["label"] == "Q8_0"
    done = run(app, [*arguments, "-f", "onnx", "-o", str(tmp_path / "other")])
    assert isinstance(done.exception, OptionError) and "gguf, safetensors" in str(done.exception)
