"""Experts that are left out: which, what the smaller model computes in both runtimes, and all that is made of it."""

import json
from dataclasses import replace

import pytest
import torch

from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.model import PrunedExperts
from dynquant.errors import CheckpointError, PlanError
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model, open_pruned
from dynquant.planning.pruning import least_used, linears_without_experts, remove_pruned, sized_without_experts
from dynquant.recipes.plan import Plan
from dynquant.running.load import load_hf
from dynquant.session import SILENT
from tests.helpers.calibrating import calibrate
from tests.helpers.commands import refused, succeed
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, hf_logits, llama_logits, mean_kl, save_tiny, write_f32

TOKENS = list(range(40, 80))
GROUPED = {"n_routed_experts": 16}
"""A DeepSeek-V3 whose router chooses two of four groups of four experts."""
MOES = [name for name in TINY if "moe" in name or name.startswith(("mixtral", "deepseek"))]


@pytest.fixture(scope="module")
def grouped(small_moe, tmp_path_factory):
    return save_tiny("deepseek-v3", tmp_path_factory.mktemp("grouped") / "model", small_moe, **GROUPED)


def without(model, folder, *gone: int):
    """Return the model without these experts of every layer."""
    layers = sorted({int(name.split(".")[1]) for name in model.source.names() if "_exps" in name})
    origin = {"original": model.name, "fingerprint": model.fingerprint, "num_experts": model.hyper.n_expert}
    return open_pruned(model, PrunedExperts(**origin, experts=dict.fromkeys(layers, gone)), folder, SILENT)


def test_without_experts_a_model_computes_what_it_does_when_they_are_never_chosen(grouped, tmp_path):
    model, gone = open_model(grouped), (1, 6, 8, 15)
    smaller = without(model, tmp_path, *gone)
    assert (smaller.hyper.n_expert, smaller.hyper.n_expert_used) == (12, 3)
    masked, tokens = load_hf(model), torch.tensor([TOKENS])
    for layer in masked.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[list(gone)] = -1e4
    with torch.inference_mode():
        torch.testing.assert_close(load_hf(smaller)(tokens).logits, masked(tokens).logits, rtol=1e-5, atol=1e-5)
    sized, real = linears_without_experts(linear_checkpoint(model), model, 4), linear_checkpoint(smaller)
    assert {*sized.others} == {*real.others}
    layers = zip(sized.linears, real.linears, strict=True)
    assert all((mine.shape, len(mine.modules)) == (its.shape, len(its.modules)) for mine, its in layers)
    again = without(model, tmp_path, *gone)
    assert again.path == smaller.path and again.original is model
    assert open_pruned(smaller, smaller.pruned, tmp_path, SILENT) is smaller
    with pytest.raises(CheckpointError, match="Give that checkpoint, or plan again"):
        open_pruned(replace(smaller, pruned=None), smaller.pruned, tmp_path, SILENT)


@pytest.mark.parametrize("name", represented_by(("qwen2-moe", "deepseek-v3"), MOES))
def test_both_runtimes_agree_on_the_smaller_model(name, small_moe, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    has_groups = name == "deepseek-v3"
    model = open_model(save_tiny(name, tmp_path / "model", small_moe, **(GROUPED if has_groups else {})))
    smaller = without(model, tmp_path, *((0, 5, 9, 13) if has_groups else (1, 4)))
    sized = sized_without_experts(model, 4 if has_groups else 2)
    assert all(sized.source.info(n).shape == smaller.source.info(n).shape for n in smaller.source.names())
    file = write_f32(smaller, tmp_path / "model.gguf")
    assert mean_kl(hf_logits(smaller.path, TOKENS), llama_logits(file, TOKENS)) < 1e-9


def test_the_least_used_experts_go_and_groups_stay_equal(grouped, tmp_path):
    model = open_model(grouped)
    stats = calibrate(model, tokens=1024).stats
    for layer, name in enumerate(["blk.1.ffn_down_exps.weight", "blk.2.ffn_down_exps.weight"]):
        stats.input_of(name).counts = torch.arange(1, 17).roll(layer)
    protected = {("blk.1.ffn_down_exps.weight", 4)}
    gone = least_used(model, stats, 4, protected)
    assert gone == {1: (0, 5, 8, 12), 2: (1, 4, 8, 12)}
    for count, reason in ((2, "multiple of 4"), (12, "Give at most 8")):
        with pytest.raises(PlanError, match=reason):
            least_used(model, stats, count, set())
    with pytest.raises(PlanError, match="never left out"):
        least_used(model, stats, 4, {("blk.2.ffn_down_exps.weight", expert) for expert in range(4)})
    stats.input_of("blk.1.ffn_down_exps.weight").counts.zero_()
    with pytest.raises(PlanError, match="Calibrate anew"):
        least_used(model, stats, 4, set())


@pytest.mark.nightly
def test_a_plan_its_files_and_their_evaluation_know_what_is_gone(small_moe, tmp_path):
    folder, text = tmp_path / "plan", ("--tokens", 4096, "--window", 256)
    succeed("plan", small_moe, "--prune-experts", 2, "--size", "5.5MB", "--types", "q2_k,q4_k", *text, "-o", folder)
    plan = Plan.load(folder / "plan.json")
    assert {layer: len(gone) for layer, gone in plan.pruned.experts.items()} == dict.fromkeys(range(1, 6), 2)
    assert str(plan.pruned) in (folder / "report.html").read_text()
    files = {"gguf": tmp_path / "model.gguf", "safetensors": tmp_path / "packed"}
    for (form, output), tokens in zip(files.items(), (2048, 0), strict=True):
        succeed("export", small_moe, "--plan", folder / "plan.json", "--tune", tokens, "-f", form, "-o", output)
        summary = inspect(output)
        assert summary.provenance["dynquant.pruned_experts"] == str(plan.pruned)
        names = ("ffn_down_exps", ".experts.down")
        assert {t.shape[0] for t in summary.tensors if any(name in t.name for name in names)} == {6}
        kl = ("--tasks", "kl", "--text", small_moe / "README.md", "--tokens", 512, "--json", tmp_path / "kl.json")
        succeed("eval", output, "--reference", small_moe, *kl)
        assert json.loads((tmp_path / "kl.json").read_text())["texts"][0]["kl"]["mean"]["value"] < 2
    assert files["gguf"].stat().st_size == plan.predicted_bytes
    remove_pruned(folder, SILENT)
    assert not list(folder.glob("pruned-*"))


def test_what_cannot_be_pruned_is_refused_before_anything_is_measured(small_moe, tmp_path):
    vllm = (2, "--for", "vllm")
    for words, reason in (
        ((7,), "Give at most 6"),
        ((2, "--bpw", 0.9), "below the smallest possible size"),
        ((*vllm, "--bpw", 0.9), "below the smallest possible size"),
        ((*vllm, "--tensor-parallel", 5), "divides them"),
        ((*vllm, "--types", "fp8"), "None of FP8 can hold"),
    ):
        assert reason in refused("plan", small_moe, "--prune-experts", *words, "-o", tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
