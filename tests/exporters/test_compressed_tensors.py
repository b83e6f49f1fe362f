"""compressed-tensors checkpoints: transformers loads them with the logits of our decoded weights; sizes, siblings,
budgets and refusals."""

import json
import re
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.published.packed_parts import has_known_schemes
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import CheckpointError, ExportError, PlanError
from dynquant.evaluation.runners import open_runner
from dynquant.exporters.compressed_config import transformers_problem
from dynquant.exporters.model_card import compressed_card
from dynquant.families.common.conversion import Conversion
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.planning.chooser import SchemeChooser
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import check_linears, plan_for_vllm
from dynquant.recipes.plan import Plan
from tests.helpers.architectures import converted_model, save_architecture
from tests.helpers.calibrating import unseen_text
from tests.helpers.commands import linked_copy, run
from tests.helpers.compressed_models import TOKENS, filled, library_weights, logits, stored_parts, stored_tensors
from tests.helpers.exports import export_compressed_tensors
from tests.helpers.representatives import represented_by
from tests.helpers.rounding_kl import kl_by_rounding
from tests.helpers.tiny_models import save_tiny
from tests.running.test_any_architecture import gpt_oss_conversions

PLANS = Path(__file__).parent.parent / "examples" / "plans"
DENSE = (*("W4A16", "NVFP4A16", "FP8", "MXFP4A16", "W3A16", "BF16", "W2A16", "W5A16"), *("W8A16", "W7A16"))


def export(directory, output, choose, **options):
    """Export without statistics, each unit in the scheme that `choose` gives for its number and layers."""
    model = open_model(directory)
    checkpoint = linear_checkpoint(model)
    mixed = options.pop("mixed_experts", False)
    units = checkpoint.units(mixed_experts=mixed).values()
    wanted = {linear.name: Choice(choose(n, linears), "test") for n, linears in enumerate(units) for linear in linears}
    plan = plan_for_vllm(model, checkpoint, wanted, recipe="test", mixed_experts=mixed)
    export_compressed_tensors(model, plan, checkpoint, output, **options)
    return plan


@pytest.fixture(scope="module")
def llama(tiny_text):
    return tiny_text("llama")


@pytest.fixture(scope="module")
def deepseek(tiny_text):
    return tiny_text("deepseek-v3")


@pytest.fixture(scope="module")
def mixed_llama(llama, tmp_path_factory):
    """Schemes of every kind in one dense model."""
    output = tmp_path_factory.mktemp("mixed") / "out"
    return output, export(llama, output, lambda n, _: DENSE[n % len(DENSE)])


@pytest.fixture(scope="module")
def mixed_deepseek(deepseek, tmp_path_factory):
    """Experts in W4A16, the rest in every scheme."""
    output = tmp_path_factory.mktemp("moe") / "out"
    choose = lambda n, linears: "W4A16" if linears[0].is_expert else DENSE[n % len(DENSE)]  # noqa: E731
    return output, export(deepseek, output, choose)


def test_transformers_gives_the_logits_of_our_decoded_weights(mixed_llama, tmp_path):
    output, plan = mixed_llama
    assert set(plan.histogram()) == set(DENSE[:8])
    expected = logits(filled(output, plan, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert torch.equal(logits(output, torch.bfloat16), expected)


def test_eval_runs_it_in_float32(mixed_llama, tmp_path):
    """FP4 weights come out of the library as bfloat16 whatever the model's type; our runner makes one type of all."""
    output, plan = mixed_llama
    expected = logits(filled(output, plan, tmp_path / "filled", torch.float32), torch.float32)
    runner = open_runner(output)
    torch.testing.assert_close(runner.window_logits(TOKENS[0].tolist()), expected, rtol=1e-4, atol=1e-4)


def test_experts_load_merged_beside_all_schemes(mixed_deepseek, tmp_path):
    output, plan = mixed_deepseek
    assert set(plan.histogram()) == set(DENSE)
    expected = logits(filled(output, plan, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert torch.equal(logits(output, torch.bfloat16), expected)
    assert "model.layers.1.mlp.experts.3.gate_proj.weight_packed" in stored_tensors(output)
    assert json.loads((output / "config.json").read_text())["topk_method"] == "noaux_tc"  # what vLLM asks for


@pytest.mark.parametrize("scheme", represented_by(["W3A16"], ["W8A16", "MXFP4A16", "W2A16", "W7A16", "W3A16"]))
def test_experts_load_in_every_scheme_that_the_planner_gives_them(scheme, deepseek, tmp_path):
    choose = lambda _, linears: scheme if linears[0].is_expert else "BF16"  # noqa: E731
    plan = export(deepseek, tmp_path / "out", choose)
    expected = logits(filled(tmp_path / "out", plan, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert torch.equal(logits(tmp_path / "out", torch.bfloat16), expected)


def test_what_transformers_cannot_load_is_said_and_decompresses_with_the_library(deepseek, tmp_path):
    """NVFP4 experts: transformers 5.24 drops their global scale. The files are right all the same."""
    output = tmp_path / "out"
    choose = lambda _, linears: "NVFP4A16" if linears[0].is_expert else "W4A16"  # noqa: E731
    plan = export(deepseek, output, choose, mixed_experts=True)
    assert "transformers cannot load it: it leaves out the global scale" in (output / "README.md").read_text()
    expected = logits(filled(output, plan, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert not torch.allclose(logits(output, torch.bfloat16), expected, atol=0.5)
    original = open_model(deepseek).source
    parts = stored_parts(output, plan)
    for entry in (entry for entry in plan.entries if entry.is_expert_stack):
        for expert, module in enumerate(entry.modules):
            found = library_weights(parts[module], entry.scheme, torch.float32)
            wanted = original.load(entry.name, expert)
            assert (found - wanted).norm() < 0.12 * wanted.norm()
    by_fusion = {}
    for entry in plan.entries:
        if entry.type == "NVFP4A16":
            fusion = entry.name.replace("_up_", "_gate_")
            by_fusion.setdefault(fusion, set()).update(float(parts[m]["weight_global_scale"]) for m in entry.modules)
    assert all(len(scales) == 1 for scales in by_fusion.values())


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (lambda n: "BF16", "it takes experts in BF16 for W4A16"),
        (lambda n: ("W4A16", "W8A16")[n % 2], "it takes one scheme for the routed experts of all layers"),
    ],
    ids=["BF16", "mixed"],
)
def test_experts_that_transformers_refuses_are_named_beforehand(experts, words, deepseek, tmp_path):
    choose = lambda n, linears: experts(n) if linears[0].is_expert else "W4A16"  # noqa: E731
    plan = export(deepseek, tmp_path / "out", choose, mixed_experts=True)
    assert words in transformers_problem(plan)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        logits(tmp_path / "out", torch.bfloat16)


def test_our_loader_reads_what_transformers_does_not(deepseek, tmp_path):
    """Zero points, experts that differ from layer to layer, NVFP4 experts."""
    schemes = ("W3A16_ASYM", "NVFP4A16", "W2A16_ASYM", "FP8", "W4A16_ASYM", "BF16", "MXFP4A16")
    output = tmp_path / "out"
    plan = export(deepseek, output, lambda n, _: schemes[n % len(schemes)], mixed_experts=True)
    card = (output / "README.md").read_text()
    assert "take vLLM 0.31.0" in card and "transformers cannot load it: it does not unpack zero points" in card
    weights = {share.label: share.num_weights for share in inspect(output).types}
    assert all(weights[name] == sum(map(prod, (e.shape for e in entries))) for name, entries in plan.by_type().items()
               if name != "BF16")  # fmt: skip
    exact = filled(output, plan, tmp_path / "filled", torch.float32, experts=torch.float32)
    found = open_runner(output).window_logits(TOKENS[0].tolist())
    torch.testing.assert_close(found, logits(exact, torch.float32), rtol=1e-4, atol=1e-4)


def test_packing_that_the_configuration_does_not_state_is_refused(mixed_llama, tmp_path):
    """Versions before 0.18 left gaps: 7 bits look like 8. Rotated weights are those of another computation."""
    copy = linked_copy(mixed_llama[0], tmp_path / "out")
    config = json.loads((copy / "config.json").read_text())
    quantization = config["quantization_config"]
    assert has_known_schemes(quantization) and not has_known_schemes(quantization | {"transform_config": {"u": {}}})
    weights = next(g["weights"] for g in quantization["config_groups"].values() if g["weights"]["num_bits"] == 5)
    weights["num_bits"] = 7
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"before 0\.18"):
        SafetensorsSource(copy)


def test_the_directory_is_complete_and_described(mixed_llama):
    output, plan = mixed_llama
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "mixed-precision"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    quantized = [m for entry in plan.entries if entry.scheme.is_quantized for m in entry.modules]
    assert sorted(targets) == sorted(quantized)
    assert {"lm_head", *(m for e in plan.entries if e.type == "BF16" for m in e.modules)} == set(config["ignore"])
    assert (output / "tokenizer.json").is_file() and not list(output.parent.glob("*.partial"))
    card = (output / "README.md").read_text()
    assert all(f"| {name} | {SCHEMES[name].format} |" in card for name in plan.histogram())


def test_the_card_tells_the_damage_or_how_it_is_measured(mixed_llama):
    output, plan = mixed_llama
    assert re.search(
        r"\n\n## Damage\n\n- Not measured on this file\. .*`dynquant eval PATH --reference ORIGINAL --tasks kl,ppl "
        r"--text held-out\.txt`\n\n## Plan\n\n\|",
        (output / "README.md").read_text(),
    )
    kls = {"selected_kl": 0.1234, "predicted_kl": 0.2, "predicted_kl_se": 0.01}
    card = compressed_card(plan.model_copy(update=kls), rounding="rounded")
    assert "measured: 0.1234" in card and "0.2000 ± 0.0100" in card and "Not measured" not in card


def test_written_bytes_are_the_predicted_ones_in_one_file_or_more(mixed_deepseek, deepseek, tmp_path):
    output, plan = mixed_deepseek
    assert sum(f.stat().st_size for f in output.glob("*.safetensors")) == plan.predicted_bytes
    model = open_model(deepseek)
    options = {"shard_max_bytes": 4_200_000, "threads": 1}
    export_compressed_tensors(model, plan, linear_checkpoint(model), tmp_path / "split", **options)
    weight_map = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    whole, split = stored_tensors(output), stored_tensors(tmp_path / "split")
    assert weight_map.keys() == whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    for file in set(weight_map.values()):
        with safe_open(tmp_path / "split" / file, framework="pt") as handle:
            assert {name for name, place in weight_map.items() if place == file} == set(handle.keys())


def test_an_interrupted_export_leaves_no_directory_and_goes_on(llama, mixed_llama, tmp_path, monkeypatch):
    output, plan = mixed_llama
    model, target = open_model(llama), tmp_path / "out"
    checkpoint = linear_checkpoint(model)
    from dynquant.exporters import compressed_tensors

    encode, calls = compressed_tensors.encode_piece, []

    def counted(piece, *arguments, **options):
        calls.append(piece.linear.name)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return encode(piece, *arguments, **options)

    monkeypatch.setattr(compressed_tensors, "encode_piece", counted)
    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(model, plan, checkpoint, target, threads=1)
    assert not target.exists()
    first = calls[:8]
    calls[:] = ["an interruption is over"] * 9
    export_compressed_tensors(model, plan, checkpoint, target, threads=5)
    assert not set(first) & set(calls[9:])
    assert (target / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_rows_that_no_group_divides_fall_back_with_the_reason(small_moe, tmp_path):
    directory = save_tiny("llama", tmp_path / "odd", small_moe, intermediate_size=328)
    plan = export(directory, tmp_path / "out", lambda *_: "W4A16")
    down = {entry.name: entry for entry in plan.entries}["blk.0.ffn_down.weight"]
    assert (down.type, down.wanted_type) == ("FP8", "W4A16")
    reason = "`blk.0.ffn_down.weight`: FP8 instead of W4A16 (test; rows of 328 do not divide into groups of 32: FP8)"
    assert reason in (tmp_path / "out" / "README.md").read_text()
    expected = logits(filled(tmp_path / "out", plan, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert torch.equal(logits(tmp_path / "out", torch.bfloat16), expected)


LOSSES = {"BF16": 1e-6, "W8A16": 4e-5, "FP8": 6e-4, "W4A16": 1e-2, "NVFP4A16": 7e-3, "MXFP4A16": 1.3e-2}


@pytest.fixture(scope="module")
def priced(deepseek):
    """The tiny MoE with a made-up error table, in which later layers matter more."""
    checkpoint = linear_checkpoint(open_model(deepseek))
    rows = [
        ErrorRow(
            name=linear.name, role=linear.role, layer=layer_of(linear.name), type=name, bytes=0, relative_rms=0.0,
            weighted_error=loss, weighted_energy=1.0,
        )
        for linear in checkpoint.linears
        for name, loss in LOSSES.items()
    ]  # fmt: skip
    sensitivity = {linear.name: 1.0 + n for n, linear in enumerate(checkpoint.linears)}
    table = ErrorTable(
        model="tiny", fingerprint="", stats_hash="", encoder="", types=tuple(LOSSES), rows=tuple(rows),
        sensitivity=sensitivity,
    )  # fmt: skip
    return checkpoint, table


@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme for experts", "mixed experts"])
def test_budgets_hold_and_fused_layers_share_their_scheme(priced, deepseek, mixed):
    checkpoint, table = priced
    model = open_model(deepseek)
    sizes = []
    for budget in (9_340_000, 9_700_000, 10_300_000, 11_600_000):
        wanted = SchemeChooser(checkpoint, tuple(LOSSES), mixed, budget=budget).choose(table)
        plan = plan_for_vllm(model, checkpoint, wanted, recipe="test", mixed_experts=mixed)
        assert plan.predicted_bytes <= budget
        sizes.append(plan.predicted_bytes)
        scheme = {entry.name: (entry.type, entry.group_size) for entry in plan.entries}
        for layer in range(3):
            blk = f"blk.{layer}."
            assert scheme[f"{blk}attn_q_a.weight"] == scheme[f"{blk}attn_kv_a_mqa.weight"]
            kinds = ("",) if layer == 0 else ("_shexp", "_exps")
            assert all(scheme[f"{blk}ffn_gate{k}.weight"] == scheme[f"{blk}ffn_up{k}.weight"] for k in kinds)
        experts = [{scheme[f"blk.{n}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} for n in (1, 2)]
        assert all(len(found) == 1 for found in experts)
        if not mixed:
            assert experts[0] == experts[1] and experts[0] <= {("W4A16", 64), ("W8A16", 64), ("MXFP4A16", 32)}
        assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"} <= {
            tensor.key for tensor in checkpoint.others
        }
    assert sizes == sorted(sizes) and sizes[-1] > 1.15 * sizes[0]


def test_budgets_below_the_smallest_size_name_the_range(priced, deepseek):
    model = open_model(deepseek)
    for mixed in (False, True):
        chooser = SchemeChooser(priced[0], tuple(LOSSES), mixed, budget=100_000)
        with pytest.raises(PlanError, match=r"budget of 100,000 bytes is below .* between 9,\d+,\d+ and") as measured:
            chooser.choose(priced[1])
        with pytest.raises(PlanError) as before:
            chooser.check_budget(model)
        bits = re.search(r", (\d+\.\d\d) to \d+\.\d\d bits per weight", str(before.value))
        assert str(before.value).replace(bits[0], "") == str(measured.value)
        least = Target(bpw=float(bits[1])).budget(model.num_weights)
        SchemeChooser(priced[0], tuple(LOSSES), mixed, budget=least).check_budget(model)


def typed(*arguments):
    """Exit status of a command, and what it printed on stderr."""
    done = run(*arguments)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def qwen(small_moe, tmp_path_factory):
    return save_tiny("qwen2", tmp_path_factory.mktemp("qwen") / "qwen", small_moe, num_hidden_layers=1)


def test_command_line_plans_and_exports(qwen, tmp_path):
    text, plan, output = tmp_path / "text.txt", tmp_path / "plan", tmp_path / "out"
    text.write_text("".join(f"The purpose of test {n} is to find what is wrong. " for n in range(60)))
    calibration = ("--calibration", text, "--tokens", 512, "--window", 64)
    status, said = typed("plan", qwen, "--for", "vllm", "--size", "8.9MB", *calibration, "-o", plan)
    assert not status, said
    made = Plan.load(plan / "plan.json", "vllm")
    assert 8_700_000 < made.predicted_bytes <= 8_900_000 and made.predicted_kl > 0
    export = ("export", qwen, "-f", "compressed-tensors", "--plan", plan / "plan.json", "--tune", 0)
    status, said = typed(*export, "-o", output)
    assert not status, said
    assert sum(f.stat().st_size for f in output.glob("*.safetensors")) == made.predicted_bytes
    assert "scales and error feedback under the second moments of" in (output / "README.md").read_text()
    expected = logits(filled(output, made, tmp_path / "filled", torch.bfloat16), torch.bfloat16)
    assert torch.equal(logits(output, torch.bfloat16), expected)
    status, said = typed(*export, "-o", output)
    assert status == 1 and "exists already" in said
    (plan / "stats.safetensors").unlink()
    status, said = typed(*export, "-o", tmp_path / "x")
    assert status == 1 and "made from calibration statistics, but there is no" in said
    status, said = typed("export", qwen, "-f", "gguf", "--plan", plan / "plan.json", "-o", tmp_path / "x.gguf")
    assert status == 1 and "`export` takes it with -f compressed-tensors" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "MODEL", "-f", "tensors", "--preset", "uniform-w4a16"), "--format tensors is not known"),
        (("export", "MODEL", "-f", "compressed-tensors"), "either --plan FILE"),
        (("export", "MODEL", "-f", "compressed-tensors", "--preset", "r1-iq1_s"), "is no preset for vLLM"),
        (("export", "MODEL", "-f", "compressed-tensors", "--preset", "uniform-iq1_s"), "`iq1_s` is not a scheme"),
        (("export", "MODEL", "-f", "compressed-tensors", "--preset", "uniform-fp8", "--ray", "auto"), "--ray is for"),
        (("plan", "MODEL", "--for", "vllm", "--types", "w4a16,q4_k"), "`q4_k` is not a scheme"),
        (("plan", "MODEL", "--for", "sglang", "--bpw", "5"), "--for sglang is not known"),
        (("plan", "MODEL", "--for", "vllm", "--bpw", "5", "--size", "1GB"), "not --bpw and --size"),
        (("plan", "MODEL", "--for", "vllm", "--bpw", "5", "--couple", "qkv"), "--couple is for plans of GGUF types"),
        (("plan", "MODEL", "--for", "vllm", "--preset", "uniform-fp8", "--select"), "leave nothing to choose"),
        (("plan", "MODEL", "--mixed-experts", "--bpw", "5"), "--mixed-experts goes with --for vllm"),
        (("plan", "MODEL", "--for", "vllm", "--group-size", "48"), "give 128 or 64 or 32"),
        (("plan", "MODEL", "--for", "vllm", "--types", "w2a16", "--bpw", "1"), "bytes in every plan; ask for"),
        (("plan", "MODEL", "--tensor-parallel", "2", "--bpw", "5"), "it goes with --for vllm"),
        (("plan", "MODEL", "--for", "vllm", "--tensor-parallel", "3"), "`blk.0.attn_q.weight` has 4 heads"),
        (
            ("plan", "MODEL", "--for", "vllm", "--types", "w4a16", "--tensor-parallel", "4"),
            "can hold `blk.0.ffn_down.weight`",
        ),
    ],
)
def test_refusals_are_one_paragraph(arguments, words, llama, tmp_path):
    status, said = typed(*(llama if part == "MODEL" else part for part in arguments), "-o", tmp_path / "out")
    assert status == 1 and words in said and said.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_shards_of_tensor_parallel_decide_groups(llama, mixed_llama):
    """Of the down projection's rows of 320 each GPU has a part, of two heads of keys each of four GPUs one."""
    model, found = open_model(llama), {}
    for count in (1, 2, 4):
        checkpoint = linear_checkpoint(model, count)
        linears = {linear.name: linear for linear in checkpoint.linears}
        found[count] = SCHEMES["W4A16"].for_shapes([linears["blk.0.ffn_down.weight"].shard])
        assert linears["blk.0.attn_k.weight"].shard == (128 // min(count, 2), 256)
    assert (found[1].group_size, found[2].group_size, found[4]) == (64, 32, None)
    candidates = linear_checkpoint(model, group_size=32).candidates(SCHEMES, mixed_experts=False)
    assert {scheme.group_size for each in candidates.values() for scheme in each} == {0, 16, 32}
    with pytest.raises(PlanError, match=r"`blk.0.ffn_down.weight` is planned as .* each GPU of --tensor-parallel 4"):
        check_linears(mixed_llama[1], checkpoint, model)


def test_gguf_files_and_edited_plans_are_refused(llama, mixed_llama, tmp_path):
    output, plan = mixed_llama
    model = open_model(llama)
    with pytest.raises(ExportError, match="exists already"):
        export_compressed_tensors(model, plan, linear_checkpoint(model), output)
    with pytest.raises(ExportError, match="is not a Hugging Face directory"):
        linear_checkpoint(Model(llama, DictSource({}), (), lambda name: (name,)))
    document = json.loads(plan.model_dump_json())
    entry = next(e for e in document["entries"] if e["name"].endswith("attn_q.weight"))
    changed = plan_with(document, entry, type="W8A16", group_size=128, bytes=256 * 256 + 256 * 4 + 16)
    (tmp_path / "plan.json").write_text(json.dumps(changed))
    with pytest.raises(PlanError, match="which vLLM fuses with it"):
        Plan.load(tmp_path / "plan.json", "vllm")
    changed = plan_with(document, entry, type="IQ1_S")
    (tmp_path / "plan.json").write_text(json.dumps(changed))
    with pytest.raises(PlanError, match="unknown scheme 'IQ1_S'"):
        Plan.load(tmp_path / "plan.json", "vllm")
    shutil.copy(PLANS / "gguf-schema-1.json", tmp_path / "plan.json")
    with pytest.raises(PlanError, match="is a plan of GGUF types"):
        Plan.load(tmp_path / "plan.json", "vllm")


def plan_with(document, entry, **changes):
    entries = [{**e, **changes} if e["name"] == entry["name"] else e for e in document["entries"]]
    return {**document, "entries": entries}


@pytest.mark.nightly
def test_importance_and_feedback_lose_less_than_rounding_to_nearest(small_moe, calibrated_16m, tmp_path):
    """int4 experts of two layers of the bundled model, on text that calibration did not see."""
    stats = calibrated_16m / "stats.safetensors"
    text = unseen_text(tmp_path)
    schemes = {f"blk.{layer}.experts": "W4A16" for layer in (1, 2)}
    measured = kl_by_rounding(small_moe, stats, text, schemes, tmp_path, tokens=1024)
    kl = {rounding: value for rounding, value, _ in measured}
    assert kl["feedback"] < 0.8 * kl["nearest"] and kl["feedback"] < kl["importance"]


def test_experts_with_biases_are_refused(tmp_path: Path) -> None:
    save_architecture("gpt_oss", tmp_path)
    stored = ("model.layers.0.mlp.experts.down_proj_bias",)
    bias = Conversion("blk.0.ffn_down_exps.bias", stored, (4, 64), "F32")
    model = converted_model(tmp_path, [bias, *gpt_oss_conversions()])
    with pytest.raises(ExportError, match=r"`blk\.0\.ffn_down_exps\.bias`.*not one by one"):
        linear_checkpoint(model)


def test_stacks_of_experts_are_known_by_their_names(tmp_path: Path) -> None:
    def stack_of(number: int, stored: str, rows: tuple[int, ...] | None = None) -> Model:
        (tmp_path / stored).mkdir()
        (tmp_path / stored / "config.json").write_text("{}")
        save_file({stored: torch.ones(*(rows or (number, 64)), 96)}, tmp_path / stored / "model.safetensors")
        conversion = Conversion("blk.0.ffn_down_exps.weight", (stored,), (number, 64, 96), "F32")
        return converted_model(tmp_path / stored, [conversion])

    for number in (1, 3):  # one expert is no matrix
        (layer,) = linear_checkpoint(stack_of(number, f"model.layers.{number}.mlp.experts.down_proj")).linears
        assert layer.modules == tuple(f"model.layers.{number}.mlp.experts.{e}.down_proj" for e in range(number))
    for stored, rows in (("moe.output_linear.weight", (3, 64)), ("experts.mlp.w1", (3 * 64,))):  # of Granite and DBRX
        with pytest.raises(ExportError, match=rf"the stack `{re.escape(stored)}`, and it is not known"):
            linear_checkpoint(stack_of(3, stored, rows))
