"""The stream of quantized tensors: equal to direct encodes, bounded in memory, and strict about what it is given."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.parts import PartLimits, WeightChecks
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import Guidance, TensorEncoder, load_encoder
from dynquant.errors import EncodeError, ExportError, PlanError
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import fixed_bytes, plan_from_types
from tests.helpers.exports import export_gguf

SHAPES = {"token_embd.weight": (40, 256), "blk.0.attn_norm.weight": (256,), "blk.0.attn_q.weight": (64, 256)}
SHAPES |= {"blk.0.attn_k.weight": (64, 96), "blk.0.ffn_gate_inp.weight": (6, 256)}
SHAPES |= {"blk.0.ffn_down_exps.weight": (6, 32, 256)}
TYPES = {"token_embd.weight": ("Q6_K", "asked"), "blk.0.attn_q.weight": ("BF16", "asked")}
TYPES |= {"blk.0.attn_k.weight": ("IQ3_S", "asked"), "blk.0.ffn_down_exps.weight": ("IQ2_XXS", "asked")}


def tiny_model(**changes: torch.Tensor) -> Model:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} | changes
    fields = (
        MetadataField("general.architecture", "llama", GGUFValueType.STRING),
        MetadataField("llama.block_count", 1, GGUFValueType.UINT32),
        MetadataField("llama.embedding_length", 256, GGUFValueType.UINT32),
        MetadataField("tokenizer.ggml.tokens", ["a", "b"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        MetadataField("tokenizer.ggml.scores", [0.5, 1.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
    )
    return Model(Path("tiny"), DictSource(tensors), fields, lambda name: (f"hf.{name}",))


def importance(name, shape):
    experts = shape[0] if len(shape) == 3 else 1
    return torch.rand(experts, shape[-1], generator=torch.Generator().manual_seed(len(name))) + 0.1


def plan_of(model, types=TYPES):
    return plan_from_types(model, types, recipe="preset test")


def test_plan_records_fallbacks_roles_and_what_stays_f32():
    plan = plan_of(tiny_model(), TYPES | {"blk.0.ffn_gate_inp.weight": ("Q4_K", "asked")})
    entries = {entry.name: entry for entry in plan.entries}
    assert list(entries) == list(SHAPES)
    fallback = entries["blk.0.attn_k.weight"]
    assert (fallback.type, fallback.wanted_type) == ("IQ4_NL", "IQ3_S") and "rows of 96" in fallback.reason
    assert entries["blk.0.ffn_gate_inp.weight"].type == entries["blk.0.attn_norm.weight"].type == "F32"
    assert entries["blk.0.ffn_down_exps.weight"].role == "expert_down"
    assert entries["blk.0.ffn_down_exps.weight"].sources == ("hf.blk.0.ffn_down_exps.weight",)


def test_fixed_bytes_and_padded_types_add_up_to_the_prediction():
    model = tiny_model()
    plan = plan_of(model)
    chosen = sum(-(-entry.bytes // 32) * 32 for entry in plan.entries if entry.name in TYPES)
    assert fixed_bytes(model, TYPES, {}, recipe="preset test") + chosen == plan.predicted_bytes


@pytest.mark.parametrize(
    "types, words",
    [
        ({"blk.9.attn_q.weight": ("Q4_K", "")}, "does not have"),
        ({name: TYPES[name] for name in list(TYPES)[1:]}, "token_embd.weight"),
        (TYPES | {"token_embd.weight": ("Q4_Z", "")}, "Q4_Z"),
    ],
    ids=["unknown tensor", "missing tensor", "unknown type"],
)
def test_plan_refuses(types, words):
    with pytest.raises(PlanError, match=words):
        plan_of(tiny_model(), types)


def whole_tensors(stream) -> dict[str, torch.Tensor]:
    """Tensor name -> blocks, from parts in any order."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for one in stream:
        found.setdefault(one.part.name, {})[one.part.offset] = one.packed.reshape(-1)
    return {name: torch.cat([parts[offset] for offset in sorted(parts)]) for name, parts in found.items()}


@pytest.mark.parametrize("memory", [24_000 * 12, 3 * 32 * 256 * 12, None], ids=["rows", "experts", "whole"])
@pytest.mark.parametrize("is_kept", [False, True], ids=["streamed", "kept"])
def test_parts_equal_one_encode(monkeypatch, tmp_path, memory, is_kept):
    model, encoder = tiny_model(token=torch.randn(400, 256)), load_encoder("ggml")
    shapes = SHAPES | {"token": (400, 256)}
    types = TYPES | {"token": ("Q4_K", "asked")}
    loaded = []
    load = model.source.load
    monkeypatch.setattr(
        model.source, "load", lambda name, index=None: (loaded.append((name, index)), load(name, index))[1]
    )
    plan = plan_of(model, types)
    how = {"threads": 2, "limits": PartLimits(memory)}
    tensors = TensorEncoder(model, Guidance(importance), encoder, **how)
    parts = tensors.parts(plan)
    elsewhere = EncodedStore(model, Guidance(importance), encoder, tmp_path, **how).parts if is_kept else None
    stored = whole_tensors(tensors.quantize(plan, parts, elsewhere=elsewhere))
    assert list(stored) == list(shapes)
    assert ("blk.0.ffn_down_exps.weight", None) not in loaded
    assert (("token", None) in loaded) == (memory is None)
    assert (len(parts["blk.0.ffn_down_exps.weight"]) > 1) == (memory is not None)
    for entry in plan.entries:
        weights = load(entry.name)
        matrix = importance(entry.name, entry.shape) if entry.quant_type.uses_imatrix else None
        direct = encoder.encode(entry.quant_type, weights if weights.dim() > 1 else weights[None], matrix, 1)
        assert torch.equal(stored[entry.name], direct.reshape(-1)), entry.name


def test_one_importance_row_holds_for_every_expert():
    model, encoder = tiny_model(), load_encoder("ggml")
    guidance = Guidance(lambda name, shape: importance(name, shape)[:1])
    one = whole_tensors(TensorEncoder(model, guidance, encoder).quantize(plan_of(model)))
    name = "blk.0.ffn_down_exps.weight"
    direct = encoder.encode(QUANT_TYPES["IQ2_XXS"], model.source.load(name), importance(name, SHAPES[name])[0], 1)
    assert torch.equal(one[name], direct.reshape(-1))


def test_progress_counts_every_weight_once_and_skipped_ones_too():
    model, seen = tiny_model(), []
    stream = TensorEncoder(model, Guidance(importance), load_encoder("ggml")).quantize(
        plan_of(model), skip={"token_embd.weight"},
        progress=lambda stage, done, total, **_: seen.append((stage, done, total)),
    )  # fmt: skip
    assert "token_embd.weight" not in [one.part.name for one in stream]
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert seen[-1] == ("quantize", total, total)
    skipped = torch.Size(SHAPES["token_embd.weight"]).numel()
    assert seen[0] == ("quantize", skipped, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(name, value):
    model = tiny_model()
    model.source.load(name).view(-1)[-1] = value
    with pytest.raises(EncodeError, match=name):
        list(TensorEncoder(model, Guidance(importance), load_encoder("ggml")).quantize(plan_of(model)))


def test_missing_statistics_are_refused_before_any_encoding():
    model = tiny_model()
    for lookup in (None, lambda name, shape: None):
        with pytest.raises(EncodeError, match=r"blk\.0\.ffn_down_exps\.weight"):
            next(TensorEncoder(model, Guidance(lookup), load_encoder("ggml")).quantize(plan_of(model)))


def test_a_plan_of_another_checkpoint_is_refused():
    other = tiny_model(**{"token_embd.weight": torch.zeros(40, 256)})
    with pytest.raises(PlanError, match="fingerprint"):
        next(TensorEncoder(other, Guidance(importance), load_encoder("ggml")).quantize(plan_of(tiny_model())))


def test_a_gguf_gives_its_own_blocks_where_it_holds_the_wanted_type(tmp_path):
    model, encoder = tiny_model(), load_encoder("ggml")
    types = TYPES | {"blk.0.ffn_down_exps.weight": ("Q2_K", "asked")}
    (path,) = export_gguf(model, plan_of(model, types), None, tmp_path / "a.gguf", encoder=encoder)
    again = replace(model, path=path, source=GGUFSource(path), gguf_file=path)
    wanted = types | {"token_embd.weight": ("Q4_K", "asked")}
    stored = whole_tensors(TensorEncoder(again, Guidance(), encoder).quantize(plan_of(again, wanted)))
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in ("blk.0.ffn_down_exps.weight", "blk.0.attn_k.weight"):
        assert stored[name].numpy().tobytes() == reader[name].data.tobytes(), name
    assert stored["token_embd.weight"].numel() == QUANT_TYPES["Q4_K"].tensor_bytes((40, 256))
    store = EncodedStore(again, Guidance(), encoder, tmp_path / "store")
    kept = again.source.info(name).dtype
    for tensor in (TensorEncoder(again, Guidance(), encoder).tensor(name, QUANT_TYPES[kept]), store.packed(name, kept)):
        assert tensor.numpy().tobytes() == reader[name].data.tobytes()
    assert torch.equal(store.decoded(name, kept), again.source.load(name))


def test_blocks_that_are_copied_are_compared_with_those_of_the_plan(tmp_path):
    model, name = tiny_model(), "blk.0.attn_k.weight"
    types = TYPES | {"blk.0.ffn_down_exps.weight": ("Q2_K", "asked")}
    (path,) = export_gguf(model, plan_of(model, types), None, tmp_path / "a.gguf", encoder=load_encoder("ggml"))
    source = GGUFSource(path)
    expected = {name: f"{checksum(source.load(name)):016x}" for name in source.names()}
    offset = source.location(name)[1] + source.load_packed(name).numel() - 3  # no fingerprint reads that far
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    edited = replace(model, path=path, source=GGUFSource(path), gguf_file=path)
    assert edited.fingerprint == source.fingerprint
    checks = WeightChecks(expected, "a")
    with pytest.raises(ExportError, match=r"`blk\.0\.attn_k\.weight` in a changed since the plan was made"):
        list(TensorEncoder(edited, Guidance(), load_encoder("ggml"), checks=checks).quantize(plan_of(edited, types)))


def test_an_unknown_encoder_is_refused():
    with pytest.raises(EncodeError, match="no encoder `best`"):
        load_encoder("best")
