"""Vision-language models of every family: names, roles, samples with images, calibration, plans and evaluation."""

import json
import shutil
from collections import Counter
from importlib import resources
from math import prod

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from dynquant.analysis.plots import all_plots
from dynquant.calibration.run import collect_statistics
from dynquant.calibration.statistics import CalibrationStats, StatsProvenance
from dynquant.checkpoints.tensor_roles import Role, gguf_name_of, role_of
from dynquant.checkpoints.vision_names import vision_name
from dynquant.errors import CheckpointError, DataError
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.pictures import SampleEncoder, image_token_of, read_samples
from dynquant.inputs.processor import load_processor
from dynquant.recipes.plan import Plan
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from dynquant.storage.file_names import kind_path
from tests.helpers.commands import refused, run
from tests.helpers.tiny_vision import FAMILIES, encoded_pictures, write_pictures

VISION_ROLES = {Role.VISION_PATCH, Role.VISION_ATTN, Role.VISION_FFN, Role.PROJECTOR}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four samples with a picture each."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4)


@pytest.fixture(scope="module")
def qwen(tiny_vision):
    """A random Qwen2-VL on disk."""
    return tiny_vision("qwen2_vl")


@pytest.mark.parametrize(
    ("name", "expected", "role"),
    [
        ("visual.blocks.3.attn.qkv.weight", "v.blk.3.attn_qkv.weight", Role.VISION_ATTN),
        ("model.visual.merger.mlp.2.weight", "mm.2.weight", Role.PROJECTOR),
        ("visual.patch_embed.proj.weight", "v.patch_embd.weight", Role.VISION_PATCH),
        (
            "model.vision_tower.transformer.layers.0.attention.o_proj.weight",
            "v.blk.0.attn_out.weight",
            Role.VISION_ATTN,
        ),
        ("vision_tower.vision_model.encoder.layers.11.mlp.fc2.bias", "v.blk.11.ffn_down.bias", Role.OTHER),
        ("vision_model.global_transformer.layers.5.mlp.fc1.weight", "v.global.blk.5.ffn_up.weight", Role.VISION_FFN),
        ("multi_modal_projector.linear_1.weight", "mm.1.weight", Role.PROJECTOR),
        ("language_model.model.layers.7.cross_attn.o_proj.weight", "blk.7.cross_attn_output.weight", Role.CROSS_ATTN),
        ("model.language_model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight", Role.FFN_DOWN),
        ("language_model.lm_head.weight", "output.weight", Role.OUTPUT),
    ],
)
def test_names_and_roles_of_parts(name, expected, role):
    assert gguf_name_of(name, "llama", 16) == expected
    assert role_of(expected) is role


def test_language_models_have_no_vision_names():
    assert vision_name("model.layers.0.self_attn.q_proj.weight") is None


def collect(hf_model, inputs, model, provenance):
    return collect_statistics(hf_model, inputs, names=weight_inputs(model, hf_model), provenance=provenance)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_opened_run_and_measured(family, pictures, tiny_vision):
    model = open_model(tiny_vision(family))
    hf_model = load_hf(model)
    samples = ModelInputs(tuple(encoded_pictures(family, model.path, pictures)))
    provenance = StatsProvenance(fingerprint=model.fingerprint, text_hash="0", text_name="pictures")
    found = collect(hf_model, samples, model, provenance)

    counted = sum(parameter.numel() for parameter in hf_model.parameters())
    assert model.num_weights == counted
    roles = Counter(role_of(name) for name in model.source.names())
    assert roles.keys() >= VISION_ROLES and (family != "mllama" or roles[Role.CROSS_ATTN] == 4)
    num_images = sum(int((~sample.is_text).sum()) for sample in samples[:3])
    num_text = sum(sample.num_tokens for sample in samples[:3]) - num_images
    for name in model.source.names():
        shape, role = model.source.info(name).shape, role_of(name)
        if len(shape) != 2 or role in (Role.OTHER, Role.EMBEDDING, Role.OUTPUT) or "input_projection" in name:
            continue
        stats = found.stats.input_of(name)
        image, text = (found.by_kind[kind].input_of(name) for kind in ("image", "text"))
        assert stats is not None, name
        assert torch.allclose(stats.in_sum2, image.in_sum2 + text.in_sum2)
        assert stats.samples is not None and stats.samples.shape[-1] == shape[1]
        if role in VISION_ROLES or name.endswith(("cross_attn_k.weight", "cross_attn_v.weight")):
            assert int(image.counts) > 0 and int(text.counts) == 0
        else:
            assert (int(image.counts), int(text.counts)) == (num_images, num_text), name


def test_sums_are_those_of_the_layer_inputs(qwen, pictures):
    """Against a hook of the test's own on one layer of the language model, image and text tokens apart."""
    model = open_model(qwen)
    hf_model = load_hf(model)
    encoder = SampleEncoder(load_processor(qwen), image_token_of(qwen))
    (sample,) = encoder.encode_all(read_samples(pictures).samples[:1], 1000)
    seen = []
    down = hf_model.model.language_model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    provenance = StatsProvenance(fingerprint=model.fingerprint, text_hash="0", text_name="pictures")
    found = collect(hf_model, ModelInputs((sample,)), model, provenance)
    hook.remove()
    (x,) = seen
    image = found.by_kind["image"].inputs["blk.1.ffn_down.weight"]
    assert torch.allclose(image.in_sum2[0].float(), x[~sample.is_text[0]].square().sum(0), rtol=1e-5)
    assert not torch.allclose(image.in_sum2[0].float(), x[sample.is_text[0]].square().sum(0), rtol=0.1)


def test_three_forms_of_a_sample_give_the_same_inputs(qwen, pictures):
    picture = "0.png"
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Is it red?"}]
    answer = {"role": "assistant", "content": "yes"}
    lines = [
        {"images": [picture], "question": "Is it red?", "answer": "yes"},
        {"messages": [{"role": "user", "content": parts}, answer]},
        {"images": [picture], "messages": [{"role": "user", "content": "Is it red?"}, answer]},
    ]
    path = pictures.with_name("forms.jsonl")
    path.write_text("\n".join(map(json.dumps, lines)))
    encoder = SampleEncoder(load_processor(qwen), image_token_of(qwen))
    found = [encoder.encode(sample).arguments for sample in read_samples(path).samples]
    assert int((found[0]["input_ids"] == image_token_of(qwen)).sum()) == 4
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"images": "a.png", "text": "x"}', "`images` must be a list"),
        ('{"images": ["a.png"]}', "neither `text`, nor `messages`, nor `question` and `answer`"),
        ('{"images": [], "text": "x"}', "has an image"),
        ('{"images": ["a.png"], "messages": [{"content": "x"}]}', "needs `role` and `content`"),
        ('{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "'video'"),
        ('{"images": ["a", "b"], "messages": [{"role": "user", "content": [{"type": "image"}]}]}', "2 images for 1"),
    ],
)  # fmt: skip
def test_malformed_samples_are_named(line, message, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=message):
        read_samples(path)


def test_images_that_cannot_be_decoded_are_skipped_or_refused(qwen, pictures, tmp_path):
    shutil.copytree(pictures.parent, tmp_path / "samples")
    path = tmp_path / "samples" / "samples.jsonl"
    (path.parent / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    done = run("calibrate", qwen, "--data", path, "-o", tmp_path / "stats.safetensors", "--hessians", "none")
    assert done.returncode == 0
    assert "skipped 1 samples" in done.stderr and "1.png cannot be decoded" in done.stderr
    assert CalibrationStats.load(tmp_path / "stats.safetensors").provenance.num_windows == 3
    error = refused("calibrate", qwen, "--data", path, "--strict", "-o", tmp_path / "strict.safetensors")
    assert "1.png cannot be decoded" in error and "--strict" in error
    assert not (tmp_path / "strict.safetensors").exists()


def test_a_missing_processor_is_named(qwen, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(qwen, bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="processor, which turns images into model inputs, is missing"):
        load_processor(bare)


def test_text_alone_says_what_will_be_wrong(qwen, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What color is the ring? red " * 40)
    stats = tmp_path / "stats.safetensors"
    done = run("calibrate", qwen, "--calibration", text, "--window", 32, "-o", stats, "--hessians", "none")
    assert done.returncode == 0
    assert "nothing of the vision tower, the projector and cross-attention will be measured" in done.stderr
    found = CalibrationStats.load(stats)
    assert found.input_of("blk.0.attn_q.weight") is not None and found.input_of("v.blk.0.attn_qkv.weight") is None


def test_pictures_are_refused_for_a_language_model(pictures, tmp_path):
    bundled = str(resources.files("dynquant") / "data" / "textbook-moe-16m")
    error = refused("calibrate", bundled, "--data", pictures, "-o", tmp_path / "stats.safetensors")
    assert "has no vision tower" in error


def test_what_cannot_be_written_yet_is_refused(qwen, tmp_path):
    error = refused("export", qwen, "--preset", "uniform-w4a16", "-f", "compressed-tensors", "-o", tmp_path / "model")
    assert "has a vision tower" in error and not (tmp_path / "model").exists()


def test_plan_and_evaluation_on_pictures(qwen, pictures, tmp_path, monkeypatch):
    every = all_plots._drawings  # the others are drawn for language models
    monkeypatch.setattr(all_plots, "_drawings", lambda results: {"token_errors": every(results)["token_errors"]})
    plan_dir = tmp_path / "plan"
    types = "q2_k,q4_k,q8_0,iq4_nl,q4_0"
    made = run("plan", qwen, "--data", pictures, "-o", plan_dir, "--types", types, "--bpw", 10)
    assert made.returncode == 0, made.stderr[-2000:]
    plan = Plan.load(plan_dir / "plan.json")
    assert {entry.role for entry in plan.entries} >= VISION_ROLES
    budget = 10 * open_model(qwen).num_weights / 8
    assert 0.97 * budget < plan.predicted_bytes <= budget
    assert sum(prod(entry.shape) for entry in plan.entries) == open_model(qwen).num_weights
    assert all(kind_path(plan_dir / "stats.safetensors", kind).is_file() for kind in ("image", "text"))
    rows = {row["name"]: row for row in json.loads((plan_dir / "token_errors.json").read_text())["rows"]}
    assert rows["blk.0.ffn_down.weight"]["image"] > 0 and rows["blk.0.ffn_down.weight"]["text"] > 0
    assert rows["mm.0.weight"]["image"] > 0 and rows["mm.0.weight"]["text"] is None
    sensitivity = json.loads((plan_dir / "errors.json").read_text())["sensitivity"]
    assert sensitivity["v.blk.0.attn_qkv.weight"] > 0 and sensitivity["mm.2.weight"] > 0

    questions = pictures.with_name("questions.jsonl")
    lines = [{"images": [f"{i}.png"], "question": "What color is it?", "answer": "red"} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    result = tmp_path / "eval.json"
    done = run("eval", plan_dir, "--reference", qwen, "--tasks", "kl,vqa", "--data", questions, "--json", result)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert 0 < found["kl"]["value"] < 1 and found["samples"] == 3
    assert found["candidate_bytes"] == plan.predicted_bytes
    assert (plan_dir / "plots" / "token_errors.png").is_file()
    page = (plan_dir / "report.html").read_text()
    assert "data:image/png;base64" in page and "Super weights are looked for in text models only." in page
    same = run("eval", qwen, "--reference", qwen, "--tasks", "kl", "--data", questions, "--json", result)
    assert same.returncode == 0 and abs(json.loads(result.read_text())["kl"]["value"]) < 1e-6
