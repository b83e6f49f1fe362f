"""The whole tool as a user types it, on the bundled model, and one paragraph for every bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.cli.compare import encoder_table, recipe_table
from dynquant.cli.demo import continuation
from dynquant.cli.plan import print_plan
from dynquant.evaluation.statistics import Estimate, shown_kl
from dynquant.exporters.model_card import packed_card
from dynquant.families.open import open_model
from dynquant.recipes.plan import Plan
from dynquant.storage.atomic import file_hash
from tests.conftest import CALIBRATION_16M
from tests.helpers.commands import command, linked_copy, refused, run, run_alone, succeed
from tests.helpers.tiny_models import save_tiny

TYPES = "q2_k,iq4_xs,q6_k"


@pytest.fixture(scope="module")
def planned(planned_16m, tmp_path_factory):
    """The plan folder of the bundled model; other plans are made in it."""
    return linked_copy(planned_16m, tmp_path_factory.mktemp("cli") / "plan")


@pytest.fixture
def damaged(small_moe, tmp_path):
    """A copy of the bundled model whose tensors a test may change."""
    copy = tmp_path / "copy"
    shutil.copytree(small_moe, copy)
    return copy


def save_empty_statistics(model, path):
    """Statistics of this checkpoint that saw no input."""
    CalibrationStats(StatsProvenance(fingerprint=model.fingerprint, text_hash="0" * 64, text_name="none")).save(path)


def test_plan_leaves_every_file_of_the_contract(planned):
    for name in ("stats.safetensors", "errors.json", "errors.csv", "plan.json", "report.html", "plots/plan_map.png"):
        assert (planned / name).stat().st_size > 0, name


def test_plan_crushes_experts_and_keeps_the_rest(planned):
    plan = Plan.load(planned / "plan.json")
    types = {entry.name: entry.type for entry in plan.entries}
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert types["blk.1.attn_q_a.weight"] == "IQ4_XS"
    assert any(types[f"blk.{layer}.ffn_down_exps.weight"] == "Q2_K" for layer in range(1, 6))
    assert all(entry.reason for entry in plan.entries)
    fallback = next(entry for entry in plan.entries if entry.name == "blk.1.attn_k_b.weight")
    assert fallback.type == "IQ4_NL" or fallback.wanted_type is None


def test_another_budget_reuses_statistics_and_errors(planned, small_moe):
    """Also in a folder that was copied, with times in any order; the plan before stays, by what was asked for it."""
    path, former = planned / "plan.json", (planned / "plan.json").read_bytes()
    asked = Plan.load(path).recipe
    files = [planned / name for name in ("stats.safetensors", "errors.json", "super_weights.json")]
    os.utime(files[2], (0, 0))
    before = [file.stat().st_mtime_ns for file in files]
    again = ("plan", small_moe, "--types", TYPES, *CALIBRATION_16M, "-o", planned, "--size", "6.5MB", "--no-report")
    said, kept = succeed(*again), planned / f"{asked.replace(' ', '-')}.plan.json"
    assert f"{path} was the plan of {asked}, which is kept as {kept}; `export --plan` takes it as well" in said
    assert f"{planned / 'report.html'} and the plots are of an earlier plan" in said
    assert kept.read_bytes() == former and "which is kept" not in succeed(*again)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert json.loads(files[2].read_text())["stats_hash"] == file_hash(files[0])
    assert 6_300_000 < Plan.load(planned / "plan.json").predicted_bytes <= 6_500_000


def test_a_plan_for_a_memory_prints_the_parts_and_coupled_tensors_agree(planned, small_moe, tmp_path):
    shutil.copytree(planned, tmp_path / "plan")
    common = ("plan", small_moe, "--types", TYPES, *CALIBRATION_16M, "-o", tmp_path / "plan",
              "--no-report", "--context", "1024", "--couple", "gate-up,qkv")  # fmt: skip
    said = succeed(*common, "--fits", "576MB")
    assert "KV cache 3.54 MB, compute buffer 29.88 MB (at most) and CUDA context 536.87 MB" in said
    assert "--couple qkv: this model has no such tensors" in said
    plan = Plan.load(tmp_path / "plan" / "plan.json")
    assert plan.predicted_bytes <= 576_000_000 - 3_538_944 - 29_884_416 - (512 << 20)
    types = {entry.name: entry.type for entry in plan.entries}
    for layer in range(1, 6):
        assert types[f"blk.{layer}.ffn_gate_exps.weight"] == types[f"blk.{layer}.ffn_up_exps.weight"]
    assert "smallest plan" in refused(*common, "--fits", "573MB")


def test_a_kl_near_none_keeps_two_digits_wherever_it_is_shown(planned, tmp_path, capfd):
    kls = {"predicted_kl": 3.21e-5, "predicted_kl_se": 4.4e-6, "selected_kl": 2.96e-5}
    plan = Plan.load(planned / "plan.json").model_copy(update=kls)
    print_plan(plan, planned)
    printed = capfd.readouterr().out
    assert "predicted 3.2e-05 ± 4.4e-06 (sampling error alone), measured 3e-05 on the text" in printed
    card = packed_card(plan, encoder="ggml", stored_bytes=1)
    assert "measured: 3e-05 nats" in card and "not measured: 3.2e-05 ± 4.4e-06 nats" in card
    metric = {"value": 4.1e-4, "low": 0.0, "high": 0.00123}
    metrics = {"KL t": metric, "top-1 t": metric, "KL 99.9 % t": {"value": 0.5}}
    row = {"recipe": "r", "variant": "ggml", "bytes": 9, "bits_per_weight": 8.5, "metrics": metrics}
    assert "0.00041 [0, 0.0012] | 0.000 [0.000, 0.001] | 0.5000 |" in recipe_table({"r": row})
    assert "| 0.00041 |" in encoder_table({"r ggml": row | {"kl_blocks": {"t": [1.0]}}})
    assert Estimate(value=0.0926, low=0.00051, high=1.4961).shown(shown_kl) == "0.0926 [0.00051, 1.4961]"
    assert [shown_kl(nats) for nats in (0.000998, 0.00096, 0.00095, 0.000949, -3.21e-5)] == [
        "0.0010",
        "0.0010",
        "0.00095",
        "0.00095",
        "-3.2e-05",
    ]


def test_exported_file_has_the_predicted_size_and_runs(planned, small_moe, tmp_path):
    folder = linked_copy(planned, tmp_path / "plan")
    output = folder / "model.gguf"
    for _ in range(2):  # again, too, where the file is in the folder that is read
        succeed("export", small_moe, "--plan", folder, "--encoder", "ggml", "-o", output)
    plan = Plan.load(planned / "plan.json")
    assert output.stat().st_size == plan.predicted_bytes
    fields = gguf.GGUFReader(output).fields
    assert fields["dynquant.plan_hash"].contents() == plan.hash
    assert str(tmp_path) not in str([field.contents() for field in fields.values()])
    result = tmp_path / "eval.json"
    text = small_moe.parent / "demo_text.txt"
    options = ("--reference", small_moe, "--text", text, "--tokens", 512, "-o", result)
    succeed("eval", output, "--tasks", "kl,ppl", *options)
    kl = json.loads(result.read_text())["texts"][0]["kl"]
    assert 0.01 < kl["mean"]["value"] < 1.5 and kl["mean"]["low"] < kl["mean"]["value"] < kl["mean"]["high"]
    assert continuation(output, small_moe).startswith("The purpose of a statistical test is to ")


@pytest.mark.nightly
def test_killed_export_resumes_to_the_same_bytes(planned, small_moe, tmp_path):
    whole, broken = tmp_path / "whole.gguf", tmp_path / "broken.gguf"
    plan = str(planned / "plan.json")
    arguments = ("export", str(small_moe), "--plan", plan, "--encoder", "ggml", "--threads", "1", "-o")
    assert run(*arguments, whole).returncode == 0
    process = subprocess.Popen(
        command(*arguments, broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
    journal = next((p for _ in range(600) if (p := _journal(tmp_path)) or time.sleep(0.05)), None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert journal is not None and not broken.exists()
    assert run(*arguments, broken).returncode == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf", "whole.gguf"]


def _journal(directory):
    return next((p for p in directory.glob("*broken*journal*") if p.stat().st_size > 600), None)


def test_budgets_outside_the_possible_range_name_both_ends(planned, small_moe):
    common = ("plan", small_moe, "--types", TYPES, *CALIBRATION_16M, "-o", planned)
    for size, words in (("1MB", "below the smallest"), ("10GB", "above the largest")):
        message = refused(*common, "--size", size)
        assert words in message and message.count(",") >= 4


@pytest.mark.parametrize(
    "more", [(), ("--max-memory", "4GB"), ("--stats", "given")], ids=["whole", "streamed", "stats"]
)
def test_budgets_that_no_type_meets_are_refused_before_anything_is_measured(small_moe, tmp_path, more):
    if "--stats" in more:
        save_empty_statistics(open_model(small_moe), tmp_path / "stats.safetensors")
        more = ("--stats", tmp_path / "stats.safetensors")
    for size, words in (("1MB", "below the smallest"), ("10GB", "above the largest")):
        message = refused("plan", small_moe, "--types", TYPES, *more, "--size", size, "-o", tmp_path / "plan")
        assert words in message and "between" in message
    assert "for the weights, and the smallest plan" in refused(
        "plan", small_moe, "--types", "q8_0", *more, "--fits", "570MB", "--context", "256", "-o", tmp_path / "plan"
    )
    assert "below the smallest" in refused(
        "plan", small_moe, "--for", "vllm", *more, "--size", "1MB", "-o", tmp_path / "plan"
    )
    assert not (tmp_path / "plan").exists()


def test_statistics_of_another_checkpoint_are_refused(planned, damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    message = refused("analyze", damaged, "--stats", planned / "stats.safetensors", "-o", damaged / "errors.json")
    assert "fingerprint" in message and not (damaged / "errors.json").exists()
    message = refused("export", damaged, "--plan", planned / "plan.json", "-o", damaged / "out.gguf")
    assert "fingerprint" in message and not list(damaged.glob("out*"))


def test_a_plan_that_names_a_missing_tensor_is_refused(planned, small_moe, tmp_path):
    document = json.loads((planned / "plan.json").read_text())
    document["entries"][5]["name"] = "blk.77.attn_q.weight"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    message = refused("export", small_moe, "--plan", tmp_path / "plan.json", "--stats",
                      planned / "stats.safetensors", "-o", tmp_path / "out.gguf")  # fmt: skip
    assert "blk.77.attn_q.weight" in message and not list(tmp_path.glob("out*"))


def test_nan_weights_name_the_tensor(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for command_line in (
        ("export", damaged, "--preset", "uniform-q8_0", "-o", damaged / "out.gguf"),
        ("calibrate", damaged, "--tokens", 600, "-o", damaged / "out.safetensors"),
    ):
        message = refused(*command_line)
        assert "blk.2.attn_output.weight" in message or "layers.2.self_attn.o_proj" in message
    assert not list(damaged.glob("*out*"))


def test_truncated_checkpoint(damaged):
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused("export", damaged, "--preset", "f16", "-o", damaged / "out.gguf")


def test_missing_checkpoint(tmp_path):
    assert "nowhere" in refused("plan", tmp_path / "nowhere", "-o", tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_unknown_architecture_points_to_base_gguf(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["architectures"], config["model_type"] = ["NovelForCausalLM"], "novel"
    (damaged / "config.json").write_text(json.dumps(config))
    message = refused("plan", damaged, "-o", damaged / "plan")
    assert "novel" in message.lower() and "--base-gguf" in message


def test_empty_calibration_text(small_moe, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    message = refused("plan", small_moe, "--calibration", tmp_path / "empty.txt", "-o", tmp_path / "plan")
    assert "empty.txt" in message and not (tmp_path / "plan").exists()


def test_tiny_calibration_text_lists_experts_without_tokens(small_moe, tmp_path):
    (tmp_path / "tiny.txt").write_text("Yes.")
    said = succeed("calibrate", small_moe, "--calibration", tmp_path / "tiny.txt", "-o", tmp_path / "stats.safetensors")
    assert "starved" in said and "(0)" in said


def test_corrupt_gguf_header(tmp_path):
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 64)
    for arguments in (("inspect", path), ("plan", path, "-o", tmp_path / "plan")):
        assert "corrupt.gguf" in refused(*arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--preset", "r2-d2"), "r1-iq1_s"),
        (("--preset", "uniform-iq9_z"), "IQ"),
        (("--size", "many"), "140GB"),
        (("--bpw", "2", "--size", "4MB"), "--bpw and --size"),
        (("--fits", "24GB", "--kv-type", "q5_k"), "f16, q8_0, q4_0"),
        (("--fits", "0.5GB"), "leave nothing for the weights"),
        (("--bpw", "2", "--couple", "gates"), "gate-up, qkv"),
    ],
)
def test_unknown_presets_and_sizes(small_moe, tmp_path, arguments, words):
    assert words in refused("plan", small_moe, *arguments, "-o", tmp_path / "plan")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"f16": {"kl": 1', '{"f16": 5}', "\u00e9"])
def test_a_damaged_table_of_a_comparison_is_refused(content, small_moe, tmp_path):
    (tmp_path / "compare.json").write_text(content, "latin-1")
    text = small_moe.parent / "demo_text.txt"
    assert "compare.json is no table of an earlier" in refused(
        "compare", small_moe, "--presets", "f16", "--text", text, "-o", tmp_path
    )


def test_help_names_every_command():
    text = run_alone("--help").stdout
    for name in ("calibrate", "analyze", "plan", "export", "tune", "eval", "inspect", "super-weights", "demo",
                    "compare-encoders", "recipe", "diff"):  # fmt: skip
        assert name in text


@pytest.mark.parametrize(
    "preset, options, line",
    [
        ("uniform-q4_k", (), r"16 tensors: rows of 80 do not divide into Q4_K blocks of 256: F16"),
        ("llama-q4_k_m", (), r"13 tensors: rows of 80 do not divide into Q4_K blocks of 256: F16"),
        ("uniform-w4a16", ("-f", "compressed-tensors"), r"tensors?: rows of 80 do not divide into groups of \d+: \w+"),
    ],
)
def test_a_preset_says_how_many_tensors_took_another_type_and_why(small_moe, tmp_path, preset, options, line):
    model = save_tiny("llama", tmp_path / "model", small_moe, hidden_size=80, intermediate_size=80)
    tokens = ("--tokens", "600", "--hessians", "none")
    output = tmp_path / ("out" if options else "out.gguf")
    options = options or ("--encoder", "ggml")
    said = succeed("export", model, "--preset", preset, *tokens, *options, "-o", output)
    assert re.search(line, said)
    if not options:
        assert re.search(line, succeed("plan", "--config-only", model, "--preset", preset))


@pytest.mark.nightly
def test_what_mixed_experts_gain_is_said(small_moe, tmp_path):
    schemes = ("--for", "vllm", "--types", "w2a16,w3a16,w4a16", "--bpw", 6.6, "--hessians", "none", "--no-report")
    arguments = ("plan", small_moe, *schemes, "--tokens", 2048, "-o", tmp_path / "plan")
    gain = re.search(r"with --mixed-experts .* a KL of ([0-9.]+) instead of ([0-9.]+);", one := succeed(*arguments))
    mixed = succeed(*arguments, "--mixed-experts")
    assert gain and [gain[1], gain[2]] == [re.search(r"predicted ([0-9.]+)", said)[1] for said in (mixed, one)]
    assert "with --mixed-experts" not in mixed


@pytest.mark.parametrize("target", ["gguf", pytest.param("vllm", marks=pytest.mark.nightly)])
def test_a_weight_that_was_edited_after_the_plan_is_noticed(small_moe, tmp_path, target):
    """In the middle of a tensor, where the fingerprint has no sample: a norm, an expert."""
    model = save_tiny("llama", tmp_path / "tiny", small_moe)
    options = ("--for", "vllm", "--bpw", 15) if target == "vllm" else ("--bpw", 6, "--types", "q4_k,q8_0")
    succeed("plan", model, *options, "--tokens", 600, "--hessians", "none", "--no-report", "-o", tmp_path / "plan")
    form = ("-f", "compressed-tensors") if target == "vllm" else ("--encoder", "ggml")
    output = tmp_path / ("out" if target == "vllm" else "out.gguf")
    original = load_file(model / "model.safetensors")
    for name in ("model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight", None):
        tensors = {key: tensor.clone() for key, tensor in original.items()}
        if name is not None:
            tensors[name].view(-1)[tensors[name].numel() // 2 + 77] += 0.5
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        arguments = ("export", model, "--plan", tmp_path / "plan" / "plan.json", *form, "-o", output)
        if name is not None:
            message = refused(*arguments)
            assert re.search(r"changed since the plan .* was [0-9a-f]{16}, now it is [0-9a-f]{16}", message)
            assert not output.exists()
        else:
            succeed(*arguments)


@pytest.mark.parametrize("put", [os.symlink, pytest.param(shutil.copytree, marks=pytest.mark.nightly)])
@pytest.mark.nightly
def test_a_linked_or_renamed_model_exports_its_plan(small_moe, planned, tmp_path, put):
    put(small_moe, tmp_path / "another name")
    command_line = ("export", tmp_path / "another name", "--plan", planned / "plan.json", "--encoder", "ggml")
    succeed(*command_line, "-o", tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types == {entry.name: entry.type for entry in Plan.load(planned / "plan.json").entries}


def test_what_is_no_earlier_result_is_not_replaced(small_moe, damaged, planned, tmp_path):
    weights = (damaged / "model.safetensors").read_bytes()
    stats = planned / "stats.safetensors"
    for arguments, words in (
        (("export", small_moe, "--preset", "uniform-q8_0", "-f", "safetensors", "-o", damaged), "another checkpoint"),
        (("calibrate", small_moe, "--tokens", 600, "-o", damaged / "model.safetensors"), "no earlier result"),
        (("calibrate", small_moe, "--tokens", 600, "-o", damaged / "config.json"), "no earlier result"),
        (("analyze", small_moe, "--stats", stats, "-o", tmp_path / "errors.csv"), "does not end in .json"),
    ):
        assert words in refused(*arguments)
    assert (damaged / "model.safetensors").read_bytes() == weights


def test_a_preset_measures_its_own_types_alone(tiny_moe, tmp_path):
    """What no tensor of the plan takes costs minutes; a later budget measures the rest."""
    options = (tiny_moe, "--tokens", 64, "--window", 32, "--encoder", "ggml", "--no-report", "-o", tmp_path)
    succeed("plan", *options, "--preset", "uniform-q4_k")
    table, plan = (json.loads((tmp_path / name).read_text()) for name in ("errors.json", "plan.json"))
    assert {*table["types"]} <= {entry["type"] for entry in plan["entries"]}
    assert "adding" in succeed("plan", *options, "--size", plan["predicted_bytes"], "--types", "q4_k,q5_0,q6_k")
    assert {"Q6_K"} < {*json.loads((tmp_path / "errors.json").read_text())["types"]}
