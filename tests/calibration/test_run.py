"""Calibration: exact logits, sums equal to a direct computation, held-back samples, starved experts, text sources."""

import copy
import json
import unicodedata
import weakref
from collections import Counter
from concurrent.futures import wait
from dataclasses import replace
from importlib import resources
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional

from dynquant.analysis.errors.options import TableOptions
from dynquant.analysis.errors.stage import error_table
from dynquant.calibration import stage as calibration_stage
from dynquant.calibration.collector import SampleLimits
from dynquant.calibration.importance import SHRINK_TOKENS, coverage_report, importance
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import StatisticsOptions, collect_statistics
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.stage import run_calibration
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.model import HyperParams
from dynquant.errors import CheckpointError, StatsError, WriteError
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.records import text_of
from dynquant.inputs.text import CalibrationText, pack_windows, read_text, refused_chats
from dynquant.planning import stage as planning_stage
from dynquant.planning.options import PlanOptions, SearchOptions
from dynquant.planning.stage import make_plan
from dynquant.planning.target import Target
from dynquant.running.expert_hooks import record_experts
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import SILENT, ignore_progress
from tests.helpers.calibrating import calibrate
from tests.helpers.commands import linked_copy
from tests.helpers.gguf_writing import finish
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import write_f32

N_LAYER, N_EXPERT = 6, 8


def test_windows_that_run_backward_together_fit_in_a_share_of_the_memory(small_moe, monkeypatch):
    monkeypatch.setattr(calibration_stage, "total_memory", lambda: 16_000_000_000)
    hyper = HyperParams(arch="llama", n_layer=30, n_embd=576, n_head=9, n_head_kv=3, n_vocab=49_152)
    model = Mock(hyper=hyper)
    batches = {each: calibration_stage._batch_size(model, 512, each, "cpu") for each in ("activations", "two-sided")}
    assert batches == {"activations": 4, "two-sided": 1}
    assert calibration_stage._batch_size(open_model(str(small_moe)), 512, "two-sided", "cpu") == 4


def test_a_model_is_gone_when_it_is_calibrated(small_moe, tmp_path, monkeypatch):
    loaded = []

    def load(model, **options):
        hf_model = load_hf(model, **options)
        loaded.append(weakref.ref(hf_model))
        return hf_model

    monkeypatch.setattr(calibration_stage, "load_hf", load)
    run_calibration(open_model(small_moe), CalibrationOptions(tokens=64, window=32), tmp_path / "stats.safetensors")
    assert [model() for model in loaded] == [None]


def test_statistics_of_their_own_are_not_taken_for_those_of_one_kind_of_token(small_moe, calibrated_16m, tmp_path):
    own = linked_copy(calibrated_16m, tmp_path) / "stats.safetensors"
    own = own.rename(tmp_path / "stats-text.safetensors")
    content = own.read_bytes()
    with pytest.raises(WriteError, match=r"stats-text\.safetensors is of another calibration") as refusal:
        run_calibration(open_model(small_moe), CalibrationOptions(tokens=64), tmp_path / "stats.safetensors")
    assert own.read_bytes() == content and "text tokens" in str(refusal.value)


@pytest.mark.nightly
def test_second_moments_that_cannot_be_written_beside_other_work_are_told_at_the_end(small_moe, tmp_path, monkeypatch):
    options, path = CalibrationOptions(tokens=256, window=64), tmp_path / "stats.safetensors"
    file = run_calibration(open_model(small_moe), options, path, in_background=True)
    file.finish()
    assert file.moments.identity == SecondMoments.load(tmp_path / "hessians.safetensors").identity

    def refuse(*_):
        raise WriteError("no space")

    monkeypatch.setattr(SecondMoments, "write", refuse)
    file = run_calibration(open_model(small_moe), options, path, in_background=True)
    with pytest.raises(WriteError, match="no space"), file.finishing():
        pass
    assert not (tmp_path / "hessians.safetensors").exists()
    wait((file.writing,))
    with pytest.raises(WriteError, match="no space"):
        error_table(open_model(small_moe), file, tmp_path / "errors.json", TableOptions(types=("Q4_0",)), SILENT)


@pytest.mark.parametrize("part", represented_by(("check_budget",), ("_tell_result", "check_budget", "encoded_store")))
def test_an_interruption_on_the_way_leaves_no_half_of_the_second_moments(part, small_moe, tmp_path, monkeypatch):
    write = SecondMoments.write

    def write_late(moments, target, stop):
        assert stop.wait(60)
        write(moments, target, stop)

    def interrupt(*_args, **_kwargs):
        if (tmp_path / "stats.safetensors").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(SecondMoments, "write", write_late)
    monkeypatch.setattr(calibration_stage if part == "_tell_result" else planning_stage, part, interrupt)
    monkeypatch.setattr(planning_stage, "check_computation", lambda *_args, **_kwargs: None)
    calibration, search = CalibrationOptions(tokens=256, window=64), SearchOptions(methods=("fisher-probe",))
    options = {"target": Target(bpw=4.5), "calibration": calibration, "search": search}
    with pytest.raises(KeyboardInterrupt):
        make_plan(PlanOptions(model=str(small_moe), output=tmp_path, **options))
    assert not list(tmp_path.glob("*hessians*"))


def test_an_interruption_leaves_no_half_of_the_second_moments(small_moe, tmp_path, monkeypatch):
    options, path, write = (
        CalibrationOptions(tokens=256, window=64),
        tmp_path / "stats.safetensors",
        SecondMoments.write,
    )

    def write_late(moments, target, stop):
        assert stop.wait(60)
        write(moments, target, stop)

    monkeypatch.setattr(SecondMoments, "write", write_late)
    file = run_calibration(open_model(small_moe), options, path, in_background=True)
    with pytest.raises(KeyboardInterrupt), file.finishing():
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def moe(small_moe):
    return load_hf(open_model(small_moe))


@pytest.fixture(scope="module")
def tokenizer(small_moe):
    return load_tokenizer(open_model(small_moe))


@pytest.fixture(scope="module")
def windows(tokenizer):
    return pack_windows(read_text(None, seed=1), tokenizer, window=64, max_tokens=64 * 8)


@pytest.fixture(scope="module")
def stats(moe, windows):
    return collect(moe, windows)


def collect(model, windows, *, batch_size=4, progress=ignore_progress, **options):
    provenance = StatsProvenance(fingerprint="f" * 64, text_hash="0" * 64, text_name="test")
    names = weight_inputs(open_model(model.name_or_path), model)
    found = collect_statistics(
        model, ModelInputs(windows, batch_size), names=names, provenance=provenance,
        options=StatisticsOptions(**options), progress=progress,
    )  # fmt: skip
    return found.stats


def inputs_of(model, module_name, tokens):
    """What the named linear layer is called with, [tokens, channels]."""
    seen = []
    module = model.get_submodule(module_name)
    handle = module.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return [torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*seen, strict=True)]


def tiny_model(kind):
    """Random two-layer models whose experts differ in layout: plain, transposed with bias, interleaved gate."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["small_moe", "qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe"])
def test_recording_leaves_logits_bit_equal(kind, request):
    model = request.getfixturevalue("moe") if kind == "small_moe" else tiny_model(kind)
    tokens = torch.arange(60).reshape(2, 30)
    before = model.config._experts_implementation
    seen = []
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(input_ids=tokens).logits
        model.set_experts_implementation(before)
        with record_experts(model, lambda call: seen.append(call.expert)):
            recorded = model(input_ids=tokens).logits
    assert torch.equal(recorded, expected)
    assert seen and model.config._experts_implementation == before


def test_implementation_is_restored_after_a_failure(moe, windows):
    before = moe.config._experts_implementation

    def fail(stage, done, total, **_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(moe, windows[:2], progress=fail)
    assert moe.config._experts_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in moe.modules())


def test_sums_equal_a_direct_computation(moe, windows, stats):
    summed = windows[:7]
    for module, weight in {
        "model.layers.2.self_attn.q_a_proj": "blk.2.attn_q_a.weight",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down.weight",
        "model.layers.4.mlp.shared_experts.up_proj": "blk.4.ffn_up_shexp.weight",
        "lm_head": "output.weight",
    }.items():
        x, _ = inputs_of(moe, module, summed)
        found = stats.input_of(weight)
        torch.testing.assert_close(found.in_sum2[0], x.double().square().sum(0), rtol=2e-5, atol=1e-12)
        assert found.counts.tolist() == [summed.numel()]


def test_expert_sums_equal_a_direct_computation(moe, windows, stats):
    layer = moe.model.layers[3].mlp
    kept = {}
    handle = layer.experts.register_forward_pre_hook(lambda _module, args: kept.update(x=args[0], index=args[1]))
    with torch.no_grad():
        moe(input_ids=windows[:7])
    handle.remove()
    for expert in range(N_EXPERT):
        x = kept["x"][(kept["index"] == expert).any(-1)]
        gate, up = functional.linear(x, layer.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        down_input = (functional.silu(gate) * up).detach()
        for weight, expected in (("ffn_up_exps", x), ("ffn_down_exps", down_input)):
            found = stats.input_of(f"blk.3.{weight}.weight")
            assert int(found.counts[expert]) == len(x)
            torch.testing.assert_close(found.in_sum2[expert], expected.double().square().sum(0), rtol=1e-4, atol=1e-9)


def test_every_expert_layer_counts_all_routed_tokens(stats):
    for layer in range(1, N_LAYER):
        for part in ("gate", "down"):
            assert int(stats.input_of(f"blk.{layer}.ffn_{part}_exps.weight").counts.sum()) == 7 * 64 * 2


def test_latent_attention_uses_queries_and_the_latent(moe, windows, stats):
    _, queries = inputs_of(moe, "model.layers.1.self_attn.q_b_proj", windows[:7])
    nope = queries.reshape(-1, 4, 64)[..., :32].double()
    torch.testing.assert_close(stats.input_of("blk.1.attn_k_b.weight").in_sum2, nope.square().sum(0), rtol=1e-5, atol=0)
    latent = importance(stats, "blk.1.attn_v_b.weight", (4, 64, 256))
    assert torch.equal(latent, importance(stats, "blk.1.attn_kv_b.weight", (384, 256)).expand(4, -1))


def test_weights_with_one_input_share_it(stats):
    for alias, key in {
        "blk.1.attn_kv_a_mqa.weight": "blk.1.attn_q_a.weight",
        "blk.0.ffn_up.weight": "blk.0.ffn_gate.weight",
        "blk.1.ffn_up_exps.weight": "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_up_shexp.weight": "blk.1.ffn_gate_shexp.weight",
    }.items():
        assert stats.aliases[alias] == key
    assert "blk.1.attn_q_b.weight" in stats.inputs
    assert not any("token_embd" in name for name in (*stats.inputs, *stats.aliases))


def test_held_back_windows_give_samples_only(moe, windows, stats):
    assert stats.provenance.num_tokens == 7 * 64
    assert stats.provenance.num_held_back_tokens == 64
    x, _ = inputs_of(moe, "model.layers.2.self_attn.q_a_proj", windows[7:])
    found = stats.input_of("blk.2.attn_q_a.weight")
    assert found.sample_counts.tolist() == [64]
    torch.testing.assert_close(found.samples[0, :64], x.to(torch.bfloat16), rtol=0.01, atol=1e-3)
    experts = stats.input_of("blk.2.ffn_down_exps.weight")
    assert experts.samples.dtype == torch.bfloat16 and int(experts.sample_counts.sum()) > 0
    assert (experts.sample_counts <= experts.samples.shape[1]).all()


def test_samples_come_from_all_held_back_batches(moe, windows):
    found = collect(moe, windows, held_back=0.5, batch_size=1, limits=SampleLimits(dense_rows=8))
    rows = found.input_of("blk.3.attn_q_a.weight").samples[0].float()
    x, _ = inputs_of(moe, "model.layers.3.self_attn.q_a_proj", windows[4:])
    nearest = torch.cdist(rows, x.float()).argmin(1)
    assert (nearest // 64).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_expert_samples_are_bounded_in_bytes():
    limits = SampleLimits()
    assert limits.rows_per_expert(8, 512) == 32
    assert 256 * limits.rows_per_expert(256, 9216) * 9216 * 2 <= 64 * 2**20


def test_extremes_name_channel_and_position(moe, windows, stats):
    x, out = inputs_of(moe, "model.layers.3.mlp.shared_experts.down_proj", windows)
    found = stats.input_of("blk.3.ffn_down_shexp.weight")
    for values, name in ((x, "max_in"), (out, "max_out")):
        token, channel = divmod(int(values.abs().argmax()), values.shape[1])
        assert getattr(found, name).item() == pytest.approx(values[token, channel].item(), rel=1e-4)
        assert getattr(found, f"{name}_channel").item() == channel
        assert getattr(found, f"{name}_position").item() == token % 64
    assert stats.input_of("blk.3.attn_q_a.weight").max_in is None
    assert stats.input_of("blk.3.ffn_down_exps.weight").max_out.shape == (N_EXPERT,)


def test_batch_size_and_shards_give_the_same_sums(moe, windows):
    whole = collect(moe, windows, held_back=0.0, batch_size=3)
    merged = collect(moe, windows[:4], held_back=0.0)
    merged.merge(collect(moe, windows[4:], held_back=0.0))
    assert merged.provenance.num_tokens == whole.provenance.num_tokens == windows.numel()
    for key, found in whole.inputs.items():
        assert torch.equal(merged.inputs[key].counts, found.counts)
        torch.testing.assert_close(merged.inputs[key].in_sum2, found.in_sum2, rtol=1e-4, atol=1e-9)


def test_statistics_survive_a_file(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert loaded.aliases == stats.aliases and loaded.provenance == stats.provenance
    for key, found in stats.inputs.items():
        assert torch.equal(loaded.inputs[key].in_sum2, found.in_sum2)


@pytest.fixture
def starved_router(moe):
    bias = moe.model.layers[2].mlp.gate.e_score_correction_bias
    before = bias.clone()
    bias[5] = -1e4
    yield
    bias.copy_(before)


def test_starved_expert_is_listed_and_gets_the_layer_mean(moe, moe_model, windows, starved_router):
    found = collect(moe, windows)
    row = coverage_report(found, moe_model)[1]
    assert row.layer == 2 and row.tokens[5] == 0
    assert 5 in row.starved and row.tokens[5] == 0
    weights = importance(found, "blk.2.ffn_gate_exps.weight", (N_EXPERT, 256, 256))
    raw = found.inputs["blk.2.ffn_gate_exps.weight"]
    mean = raw.in_sum2.sum(0) / raw.counts.sum()
    torch.testing.assert_close(weights[5], mean.float())
    expert, count = 1, int(raw.counts[1])
    expected = (raw.in_sum2[expert] + SHRINK_TOKENS * mean) / (count + SHRINK_TOKENS)
    torch.testing.assert_close(weights[expert], expected.float())


def test_importance_refuses_another_shape(stats):
    with pytest.raises(StatsError, match="another model"):
        importance(stats, "blk.2.ffn_gate_exps.weight", (16, 256, 256))
    assert importance(stats, "token_embd.weight", (8192, 256)) is None


def test_coverage_of_statistics_without_experts(stats, moe_model):
    dense = CalibrationStats(stats.provenance, {"blk.0.ffn_down.weight": stats.inputs["blk.0.ffn_down.weight"]})
    with pytest.raises(StatsError, match="8 experts"):
        coverage_report(dense, moe_model)
    rest = frozenset(name for name, role in moe_model.roles.items() if role.is_routed_expert)
    of_dense_layers = replace(moe_model, source=moe_model.source.without(rest))
    assert of_dense_layers.hyper.n_expert == 8 and coverage_report(dense, of_dense_layers) == []


def test_calibrate_a_model_on_disk(small_moe, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    model = open_model(small_moe)
    steps = []
    found = calibrate(model, path, tokens=256, window=64, progress=lambda *step, **_: steps.append(step)).stats
    assert found.provenance.fingerprint == model.fingerprint
    assert found.provenance.num_windows == 4 and found.provenance.text_name == "text.txt"
    assert [steps[0], steps[-1]] == [("calibrate", 0, 192), ("sample", 64, 64)]
    assert [row.layer for row in coverage_report(found, model)] == [1, 2, 3, 4, 5]


def test_all_three_sources_are_read(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("plain text\n\nof two paragraphs")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.txt").documents == ("plain text\n\nof two paragraphs",)
    assert sorted(read_text(tmp_path / "a.jsonl").documents) == ["one", "two"]
    default = read_text(None)
    assert default.name == "dynquant-mix-2" and default == read_text(default.name)
    with pytest.raises(StatsError, match="dynquant-mix-1 ships no more"):
        read_text("dynquant-mix-1")
    assert default.sha256 == read_text(None).sha256 != read_text(None, seed=1).sha256


def test_any_part_of_the_mix_has_all_domains_and_every_document_a_licence():
    lines = resources.files("dynquant").joinpath("data/dynquant-mix-2.jsonl").read_text("utf-8").splitlines()
    # Composed: llama.cpp splits words before combining marks, whatever the tokenizer's file says.
    assert all(unicodedata.is_normalized("NFC", line) for line in lines)
    records = [json.loads(line) for line in lines]
    assert {record["licence"] for record in records} == {"public domain", "Apache-2.0", "PSF-2.0", "Unlicense"}
    domains = {text_of(record, "", StatsError): record["domain"] for record in records}
    documents = read_text(None, seed=3).documents
    assert domains.keys() == set(documents)
    assert {domains[document] for document in documents[:6]} == set(domains.values())
    places = Counter(domains.values())
    assert all(0.3 < Counter(map(domains.get, documents[:109]))[name] / places[name] < 0.7 for name in places)


def test_conversations_are_in_the_template_of_the_model(tmp_path, tokenizer):
    calls = [{"id": "a", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    system = [{"role": "system", "content": "be kind"}, *turns]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, system)))
    text = read_text(tmp_path / "t.jsonl")
    plain = tokenizer.decode(pack_windows(text, tokenizer)[0])
    assert "user: hi\n\nassistant: [" in plain and '"name": "add"' in plain and not refused_chats(text, tokenizer)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    templated = copy.copy(tokenizer)
    templated.chat_template = refusal + "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    shown = templated.decode(pack_windows(text, templated)[0])
    assert "<user>hi<assistant><tool>2<assistant>two" in shown and "system: be kind\n\nuser: hi" in shown
    assert refused_chats(text, templated) == ["refuses it: no system"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n", "is empty"),
        ("bad.jsonl", "{oops\n", "line 1 is not JSON"),
        ("field.jsonl", '{"content": "x"}\n', 'neither a field "text"'),
        ("turns.jsonl", '{"messages": [{"role": "user"}]}\n', "`role` and `content`"),
    ],
)
def test_bad_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(StatsError, match=message):
        read_text(tmp_path / name)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(StatsError, match="There is no text"):
        read_text(tmp_path / "none.txt")


def test_short_text_gives_one_short_window(tokenizer):
    packed = pack_windows(CalibrationText("t", ("just a few words",)), tokenizer, window=512)
    assert packed.shape[0] == 1 and 2 < packed.shape[1] < 10


def test_ragged_end_is_dropped_and_documents_are_separated(tokenizer):
    text = CalibrationText("t", ("alpha beta gamma", "delta"))
    whole = pack_windows(text, tokenizer, window=512)[0].tolist()
    assert whole.count(tokenizer.eos_token_id) == 1
    packed = pack_windows(text, tokenizer, window=4)
    assert packed.flatten().tolist() == whole[: len(whole) // 4 * 4]


def test_windows_start_with_bos_where_the_tokenizer_adds_it(tokenizer):
    class WithBos:
        bos_token_id, eos_token_id = 7, 0

        def __call__(self, text, **_):
            return {"input_ids": [7, *tokenizer(text)["input_ids"]]}

    packed = pack_windows(CalibrationText("t", ("one two three four five six", "seven")), WithBos(), window=4)
    assert (packed[:, 0] == 7).all() and not (packed[:, 1:] == 7).any()


def test_experts_outside_the_interface_are_refused():
    class LooseExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(StatsError, match="LooseExperts"), record_experts(LooseExperts(), print):
        pass


def test_unsupported_gguf_is_refused_with_the_way_out(tmp_path):
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "refact")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_head_count(1)
    writer.add_vocab_size(8)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 32).numpy())
    finish(writer)
    with pytest.raises(CheckpointError, match="import an importance matrix"):
        load_hf(open_model(path))


def test_gguf_input_is_calibrated(tiny_text, tmp_path):
    checkpoint = open_model(tiny_text("llama"))
    model = open_model(write_f32(checkpoint, tmp_path / "llama.gguf"))
    found = calibrate(model, tokens=64, window=32).stats
    assert found.provenance.fingerprint == model.fingerprint
    for name in model.source.names():
        shape = model.source.info(name).shape
        if len(shape) == 2 and name != "token_embd.weight":
            assert torch.isfinite(importance(found, name, shape)).all()
