"""GGUF files: exact sizes, exact bytes, stock llama.cpp, and inputs that are refused."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from dynquant.calibration.importance import importance
from dynquant.checkpoints.gguf_layout import file_type_of
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import ExportError, PlanError, StatsError
from dynquant.exporters.gguf import check_is_not_read
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import plan_from_types
from tests.helpers.exports import export_gguf
from tests.helpers.packed_models import plan_of
from tests.helpers.tiny_gguf import GGML, NUM_LAYERS, WatchedEncoder, left_in, tiny_model, tiny_plan, tiny_stats


@pytest.fixture(scope="module")
def moe_plan(moe_model):
    return plan_of(moe_model, lambda name: "MXFP4" if "exps" in name else "Q8_0", recipe="preset uniform-q8_0")


@pytest.fixture(scope="module")
def moe_file(moe_model, moe_plan, tmp_path_factory):
    (path,) = export_gguf(
        moe_model, moe_plan, None, tmp_path_factory.mktemp("moe") / "moe.gguf", encoder=GGML, threads=2
    )
    return path


@pytest.fixture(scope="module")
def moe_parts(moe_model, moe_plan, moe_file):
    output = moe_file.with_name("parts.gguf")
    return export_gguf(moe_model, moe_plan, None, output, encoder=GGML, threads=2, split_max_bytes=4_000_000)


def test_the_file_has_the_predicted_size_and_the_bytes_of_direct_encodes(moe_model, moe_plan, moe_file):
    assert moe_file.stat().st_size == moe_plan.predicted_bytes
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(moe_file).tensors}
    assert list(stored) == moe_model.source.names()
    for entry in moe_plan.entries:
        weights = moe_model.source.load(entry.name)
        weights = weights if weights.dim() > 1 else weights[None]
        assert stored[entry.name].tensor_type.name == entry.type
        assert stored[entry.name].data.tobytes() == GGML.encode(entry.quant_type, weights, None, 2).numpy().tobytes()


def test_metadata_survives_with_its_types(moe_model, moe_file):
    written = {field.key: field for field in open_model(moe_file).metadata}
    for field in moe_model.metadata:
        found = written[field.key]
        assert (found.value_type, found.item_type) == (field.value_type, field.item_type), field.key
        if isinstance(field.value, float):
            assert found.value == pytest.approx(field.value, rel=1e-6)
        elif isinstance(field.value, list | tuple):
            assert list(found.value) == list(field.value)
        else:
            assert found.value == field.value


def greedy_tokens(path: Path, count: int = 8) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False, seed=0)
    try:
        prompt = model.tokenize(b"The largest planet is")
        return [token for token, _ in zip(model.generate(prompt, temp=0.0), range(count), strict=False)]
    finally:
        model.close()


def test_stock_llama_cpp_generates_the_same_from_one_file_and_from_parts(moe_file, moe_parts):
    tokens = greedy_tokens(moe_file)
    assert len(tokens) == 8 and len(set(tokens)) > 2
    assert greedy_tokens(moe_parts[0]) == tokens


def test_parts_hold_the_tensors_of_the_single_file_and_keep_to_the_limit(moe_file, moe_parts):
    count = len(moe_parts)
    assert [path.name for path in moe_parts] == [f"parts-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert count > 2 and all(path.stat().st_size <= 4_000_000 for path in moe_parts)
    single, parts = GGUFSource(moe_file), GGUFSource(moe_parts[0])
    assert single.names() == parts.names()
    assert all(torch.equal(single.load_packed(name), parts.load_packed(name)) for name in single.names())
    for number, path in enumerate(moe_parts):
        fields = gguf.GGUFReader(path).fields
        keys = {"split.no": (number, "UINT16"), "split.count": (count, "UINT16"),
                "split.tensors.count": (len(single.names()), "INT32")}  # fmt: skip
        for key, (value, type_name) in keys.items():
            assert (fields[key].contents(), fields[key].types[0].name) == (value, type_name)


def test_provenance_and_imatrix_keys_name_no_path(tmp_path):
    model = tiny_model()
    stats = tiny_stats(model)
    plan = tiny_plan(model, "Q4_K", stats=stats, stats_hash="5" * 64)
    (path,) = export_gguf(model, plan, stats, tmp_path / "a.gguf", encoder=GGML)
    assert path.stat().st_size == plan.predicted_bytes
    assert b"somebody" not in path.read_bytes()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["quantize.imatrix.file"] == "stats.safetensors"
    assert fields["quantize.imatrix.dataset"] == "prose.jsonl"
    assert fields["quantize.imatrix.entries_count"] == NUM_LAYERS
    assert fields["quantize.imatrix.chunks_count"] == 7
    assert fields["general.quantization_version"] == 2
    assert fields["dynquant.plan_hash"] == plan.hash
    assert fields["dynquant.stats_hash"] == "5" * 64
    assert fields["dynquant.fingerprint"] == model.fingerprint
    assert fields["dynquant.encoder"].strip() == "ggml"
    assert "general.alignment" not in fields and fields["llama.flag"] is False


def test_each_expert_is_encoded_with_its_own_statistics(tmp_path):
    model, name = tiny_model(), "blk.3.ffn_up_exps.weight"
    stats = tiny_stats(model)
    types = {n: ("IQ2_XXS" if "exps" in n else "Q4_K", "asked") for n in model.source.names() if "norm" not in n}
    plan = plan_from_types(model, types, recipe="bpw 2.0", stats=stats, stats_hash="5" * 64)
    (path,) = export_gguf(model, plan, stats, tmp_path / "a.gguf", encoder=GGML)
    weights, measured = model.source.load(name), importance(stats, name, (3, 16, 256))
    stored = GGUFSource(path)
    for expert in range(3):
        direct = GGML.encode(QUANT_TYPES["IQ2_XXS"], weights[expert], measured[expert], 1)
        assert torch.equal(stored.load_packed(name, expert), direct)
        swapped = GGML.encode(QUANT_TYPES["IQ2_XXS"], weights[expert], measured[(expert + 1) % 3], 1)
        assert not torch.equal(swapped, direct), "the statistics of two experts must differ for this test to mean much"


def test_the_size_does_not_depend_on_the_encoder(tmp_path):
    model = tiny_model()
    plan, encoder = tiny_plan(model), WatchedEncoder(lambda *_: None)
    encoder.name = "dynquant"
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=encoder)
    assert path.stat().st_size == plan.predicted_bytes


@pytest.mark.parametrize(
    "recipe, expected",
    [("preset llama-q4_k_s", "MOSTLY_Q4_K_S"), ("preset r1-iq1_s", "MOSTLY_IQ1_S"), ("preset bf16", "MOSTLY_BF16"),
     ("preset f32", "ALL_F32"), ("preset r1-q2_k_xl", "MOSTLY_Q5_K_M"), ("bpw 2.0", "MOSTLY_Q5_K_M")],
)  # fmt: skip
def test_file_type_is_the_presets_or_that_of_most_weights(recipe, expected):
    model = tiny_model()
    plan = tiny_plan(model, "Q5_K")
    specs = [gguf_spec(entry) for entry in plan.entries]
    assert gguf.LlamaFileType(file_type_of(recipe, specs)).name == expected


def gguf_spec(entry):
    return namedtuple("Spec", "name shape type")(entry.name, entry.shape, entry.type)


def test_a_plan_with_another_size_or_shape_is_refused(tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    with pytest.raises(ExportError, match="predicts a file of"):
        wrong = plan.model_copy(update={"predicted_bytes": plan.predicted_bytes + 32})
        export_gguf(model, wrong, None, tmp_path / "a.gguf", encoder=GGML)
    entries = (plan.entries[0].model_copy(update={"shape": (35, 512)}), *plan.entries[1:])
    with pytest.raises(PlanError, match="shape"):
        export_gguf(model, plan.model_copy(update={"entries": entries}), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []


def test_statistics_must_be_the_plans_own(tmp_path):
    model = tiny_model()
    stats = tiny_stats(model)
    with_stats = tiny_plan(model, stats=stats, stats_hash="5" * 64)
    with pytest.raises(StatsError, match=r"stats\.safetensors"):
        export_gguf(model, with_stats, None, tmp_path / "a.gguf", encoder=GGML)
    with pytest.raises(PlanError, match="without calibration statistics"):
        export_gguf(model, tiny_plan(model), stats, tmp_path / "a.gguf", encoder=GGML)
    stats.provenance.fingerprint = "another"
    with pytest.raises(StatsError, match="another"):
        export_gguf(model, with_stats, stats, tmp_path / "a.gguf", encoder=GGML)


def test_the_model_that_is_read_is_no_output(tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    with pytest.raises(ExportError, match="being read"):
        check_is_not_read(tmp_path / "a.gguf", [path])
    check_is_not_read(tmp_path / "b.gguf", [path])


def test_a_tensor_larger_than_a_part_and_a_name_llama_cpp_cannot_load_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ExportError, match=r"token_embd\.weight.*at least"):
        export_gguf(model, tiny_plan(model), None, tmp_path / "a.gguf", encoder=GGML, split_max_bytes=5_000)
    tensors = {"blk.0." + "x" * 60: torch.zeros(4)}
    with pytest.raises(ExportError, match="longer than the 63 bytes"):
        tiny_plan(replace(model, source=DictSource(tensors)))
