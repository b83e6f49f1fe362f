"""plan.json: what is written is what is read, and nothing else is read."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError
from dynquant.families.open import open_config
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import fixed_bytes, plan_from_types
from dynquant.recipes.held_types import matrices
from dynquant.recipes.plan import Plan, PlanEntry


def entry(name: str, shape: tuple[int, ...], type_name: str, num_bytes: int, **more) -> PlanEntry:
    return PlanEntry(name=name, shape=shape, role=Role.ATTN_Q, type=type_name, reason="test", bytes=num_bytes, **more)


@pytest.fixture
def plan() -> Plan:
    entries = (
        entry("blk.0.attn_q.weight", (4, 256), "IQ1_S", 200, sources=("a", "b"), weighted_error=0.25),
        entry("blk.0.attn_k.weight", (2, 96), "Q5_0", 132, wanted_type="Q4_K"),
        entry("output_norm.weight", (256,), "F32", 1024),
    )
    return Plan(
        model="tiny", arch="llama", fingerprint="f" * 64, recipe="bpw 2.0", types=("IQ1_S", "Q4_K"),
        predicted_bytes=2048, entries=entries,
    )  # fmt: skip


@pytest.fixture
def edit(plan, tmp_path):
    """Write the plan with a change to its JSON and give the path."""

    def write(change):
        content = json.loads(plan.model_dump_json())
        change(content)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_round_trip(plan, tmp_path):
    path = tmp_path / "new" / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    first = path.read_bytes()
    Plan.load(path).save(path)
    assert path.read_bytes() == first


def test_totals(plan):
    assert plan.num_weights == 4 * 256 + 2 * 96 + 256
    assert plan.tensor_bytes == 200 + 132 + 1024
    assert plan.bits_per_weight == 8 * 2048 / plan.num_weights
    assert list(plan.histogram().items()) == [("F32", 1), ("Q5_0", 1), ("IQ1_S", 1)]


def test_hash_is_of_what_decides_the_weights(plan):
    assert len(plan.hash) == 64
    same = plan.model_copy(update={"recipe": "preset x", "tool_version": "9", "model": "moved"})
    assert same.hash == plan.hash
    other = plan.entries[0].model_copy(update={"type": "IQ1_M"})
    changes = [{"fingerprint": "e" * 64}, {"stats_hash": "s"}, {"entries": (other, *plan.entries[1:])}]
    assert len({plan.hash, *(plan.model_copy(update=change).hash for change in changes)}) == 4


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c["entries"][0].update(surprise=1), r"entries\.0\.surprise"),
        (lambda c: c.pop("fingerprint"), "fingerprint"),
        (lambda c: c.update(schema_version=3), "schema_version"),
        (lambda c: c["entries"][0].update(type="Q9_Z"), r"blk\.0\.attn_q\.weight.*unknown type 'Q9_Z'"),
        (lambda c: c["entries"].append(c["entries"][0]), r"blk\.0\.attn_q\.weight.*twice"),
        (lambda c: c["entries"][0].update(bytes=201), "201 bytes"),
        (lambda c: c["entries"][1].update(type="Q4_K"), "blocks of 256 do not divide its rows of 96"),
        (lambda c: c["entries"][0].update(shape=[]), "impossible shape"),
        (lambda c: c["entries"][0].update(shape=[-4, -256]), "impossible shape"),
        (lambda c: c["entries"][0].update(role="chef"), r"entries\.0\.role"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_refused(edit, change, words):
    with pytest.raises(PlanError, match=words) as refusal:
        Plan.load(edit(change))
    assert "plan.json" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json is (not a plan|an empty file, not a plan)"):
        Plan.load(path)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_check_covers(plan):
    names = [one.name for one in plan.entries]
    tiny = SimpleNamespace(fingerprint=plan.fingerprint, name="tiny", settings={"rope.freq_base": 10000.0})
    other = SimpleNamespace(fingerprint="e" * 64, name="other", settings={})
    plan.check_covers(names, tiny)
    with pytest.raises(PlanError, match=r"ffffffffffff \(tiny\), but other has fingerprint eeeeeeeeeeee\."):
        plan.check_covers(names, other)
    edited = plan.model_copy(update={"settings": {"rope.freq_base": 5000.0, "block_count": 2}})
    with pytest.raises(PlanError, match=r"configuration of tiny: `rope\.freq_base` \(`rope_theta` .* was 5000 and is"):
        edited.check_covers(names, tiny)
    with pytest.raises(PlanError, match=r"plan names the tensor `output_norm\.weight`, which tiny does not have"):
        plan.check_covers(names[:-1], tiny)
    with pytest.raises(PlanError, match=r"tiny has the tensor `extra`, which the plan does not name"):
        plan.check_covers([*names, "extra"], tiny)


def test_predicted_bytes_are_the_fixed_bytes_and_the_padded_tensors_for_any_types(small_moe, tmp_path):
    shutil.copy(small_moe / "config.json", tmp_path)
    model = open_config(tmp_path)
    planned = matrices(model)
    fixed = fixed_bytes(model, planned, {}, recipe="bpw 2")
    rng = random.Random(0)
    for _ in range(300):
        wanted = {name: (rng.choice(list(QUANT_TYPES)), "random") for name in planned}
        plan = plan_from_types(model, wanted, recipe="bpw 2")
        spent = sum(padded(entry.bytes) for entry in plan.entries if entry.name in wanted)
        assert plan.predicted_bytes == fixed + spent


PLANS = Path(__file__).parent.parent / "examples" / "plans"


def test_plans_of_gguf_types_that_schema_1_wrote_are_read(tmp_path):
    document = json.loads((PLANS / "gguf-schema-1.json").read_text())
    plan = Plan.load(PLANS / "gguf-schema-1.json")
    assert plan.hash == "a45bb729c119c20481890eb8550630c20c028f245dac63666e969d235a3eea88"
    written = json.loads(plan.model_dump_json())
    assert (written.pop("target"), written.pop("schema_version")) == ("gguf", 2)
    assert document.pop("schema_version") == 1 and written == document


def test_plans_for_vllm_that_schema_1_wrote_are_read(tmp_path):
    """They had fields of their own: `serves`, `schemes`, `scheme`, `wanted_scheme` and `num_weights`."""
    document = json.loads((PLANS / "vllm-schema-1.json").read_text())
    plan = Plan.load(PLANS / "vllm-schema-1.json", "vllm")
    assert plan.hash == "29ae19dd0aa8cb0e5158003a6aba1077c760e759ad67f2ea4f9d0e7be493dda8"
    assert plan.target == "vllm" and plan.mixed_experts and plan.types == tuple(document["schemes"])
    assert (plan.num_weights, plan.other_bytes) == (document["num_weights"], document["other_bytes"])
    for entry, old in zip(plan.entries, document["entries"], strict=True):
        assert (entry.type, entry.wanted_type) == (old["scheme"], old["wanted_scheme"])
        assert (entry.group_size, entry.unit, list(entry.modules)) == (old["group_size"], old["unit"], old["modules"])
        assert entry.scheme.tensor_bytes(entry.shape) == old["bytes"]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", "vllm") == plan


@pytest.mark.parametrize("field", ["num_weights", "entries"])
def test_a_damaged_plan_of_schema_1_is_refused(tmp_path, field):
    document = json.loads((PLANS / "vllm-schema-1.json").read_text())
    del document[field]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match=rf"not a plan of dynquant.*{field}"):
        Plan.load(tmp_path / "plan.json", "vllm")


def test_a_plan_of_the_other_target_is_refused_with_the_way_out():
    with pytest.raises(PlanError, match="`export` takes it with -f compressed-tensors"):
        Plan.load(PLANS / "vllm-schema-1.json")
    with pytest.raises(PlanError, match="is a plan of GGUF types"):
        Plan.load(PLANS / "gguf-schema-1.json", "vllm")
