"""Vision-language models as GGUF: llama.cpp computes what transformers does, and the files hold what the plan says."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from dynquant.calibration.run import collect_statistics
from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.gguf_layout import mmproj_path
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.errors import CheckpointError
from dynquant.evaluation import evaluate
from dynquant.evaluation.pictures.llama_cpp import MtmdRunner, segments_of
from dynquant.exporters.gguf import stats_of_part
from dynquant.families.open import open_model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.pictures import SampleEncoder, image_token_of, read_samples
from dynquant.inputs.processor import image_token_limits, load_processor
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from tests.helpers.commands import refused, run
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_vision import pixtral_inputs, write_pictures

SIZES = {"qwen2_vl": (84, 140), "qwen2_5_vl": (140, 196), "gemma3": (56, 56), "llava": (56, 56),
         "pixtral": (56, 84), "mistral3": (56, 84)}  # fmt: skip
"""Height and width of pictures that neither processor resizes. Those of Qwen2.5-VL have four windows of 112 pixels."""


@pytest.fixture(scope="module")
def models(tiny_vision):
    return tiny_vision


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """The language GGUF of a family in F32, with its mmproj file beside it."""
    made = {}

    def files(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("gguf") / f"{family}.gguf"
            done = run("export", models(family), "--preset", "f32", "--tune", 0, "-o", made[family])
            assert done.returncode == 0, done.stderr[-2000:]
        return made[family]

    return files


@pytest.fixture(scope="module")
def pictures_stats(models, tmp_path_factory):
    """Statistics of Qwen2-VL on two pictures."""
    model = open_model(models("qwen2_vl"))
    encoder = SampleEncoder(load_processor(model.path), image_token_of(model.path))
    samples = read_samples(write_pictures(tmp_path_factory.mktemp("two"), 2)).samples
    inputs = ModelInputs(tuple(encoder.encode_all(samples, 1000)))
    provenance = StatsProvenance(fingerprint=model.fingerprint, text_hash="0", text_name="pictures")
    hf_model = load_hf(model)
    names = weight_inputs(model, hf_model)
    return collect_statistics(hf_model, inputs, names=names, provenance=provenance).stats


def sample_of(directory, family, pictures):
    """Model inputs of one picture with text, and the ids that stand inside the picture."""
    if family in ("pixtral", "mistral3"):
        (sample,) = pixtral_inputs(directory, [pictures.parent / "0.png"])
        vocabulary = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        breaks = [token["id"] for token in vocabulary if token["content"] == "[IMG_BREAK]"]
        return sample, ~sample.is_text[0] | torch.isin(sample.ids[0], torch.tensor(breaks))
    encoder = SampleEncoder(load_processor(directory), image_token_of(directory))
    (sample,) = encoder.encode_all(read_samples(pictures).samples[:1], 1000)
    return sample, ~sample.is_text[0]


def mean_kl(reference, candidate):
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def class_embedding_last(self, pixel_values, **_):
    """CLIP's embeddings as llama.cpp orders them: patches first."""
    patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    whole = torch.cat([patches, self.class_embedding.expand(len(patches), 1, -1)], dim=1)
    return whole + self.position_embedding(self.position_ids)


@pytest.mark.parametrize("family", represented_by(("qwen2_5_vl", "gemma3", "pixtral"), SIZES))
def test_llama_cpp_gives_the_distribution_of_transformers(family, models, exported, tmp_path, monkeypatch):
    """LLaVA's is that of transformers with llama.cpp's place for the class embedding, which no file can change."""
    if family == "llava":
        monkeypatch.setattr(CLIPVisionEmbeddings, "forward", class_embedding_last)
    pictures = write_pictures(tmp_path, 1, height=SIZES[family][0], width=SIZES[family][1])
    sample, inside = sample_of(models(family), family, pictures)
    with torch.no_grad():
        logits = load_hf(open_model(models(family)), dtype=torch.float32)(**sample.arguments, use_cache=False).logits[0]
    pixels = np.asarray(Image.open(tmp_path / "0.png").convert("RGB"))
    runner = MtmdRunner(exported(family), mmproj_path(exported(family)), image_tokens=(1, 4096))
    same, other = (
        runner.text_logits(segments_of(sample.ids[0], ~inside, iter([seen])))[0] for seen in (pixels, 255 - pixels)
    )
    runner.close()
    found, of_another_picture = mean_kl(logits[~inside], same), mean_kl(logits[~inside], other)
    print(f"{family}: mean KL {found:.1e}; of the inverted picture {of_another_picture:.1e}")  # for reports, with -rP
    assert abs(found) < 1e-5
    assert of_another_picture > 1e-3


def test_files_hold_the_values_of_the_checkpoint(models, exported):
    stored = load_file(models("qwen2_vl") / "model.safetensors")
    language, vision = GGUFSource(exported("qwen2_vl")), GGUFSource(mmproj_path(exported("qwen2_vl")))
    q, k, v = stored["visual.blocks.1.attn.qkv.weight"].chunk(3)
    patches = stored["visual.patch_embed.proj.weight"]
    expected = {
        "blk.1.ffn_down.weight": stored["model.layers.1.mlp.down_proj.weight"],
        "blk.0.attn_q.bias": stored["model.layers.0.self_attn.q_proj.bias"],
        "token_embd.weight": stored["model.embed_tokens.weight"], "output.weight": stored["lm_head.weight"],
        "v.blk.1.attn_q.weight": q, "v.blk.1.attn_k.weight": k, "v.blk.1.attn_v.weight": v,
        "v.patch_embd.weight": patches[:, :, 0], "v.patch_embd.weight.1": patches[:, :, 1],
        "mm.0.weight": stored["visual.merger.mlp.0.weight"], "v.post_ln.bias": stored["visual.merger.ln_q.bias"],
    }  # fmt: skip
    for name, values in expected.items():
        source = vision if name.startswith(("v.", "mm.")) else language
        assert torch.equal(source.load(name), values.float()), name
    counted = sum(source.info(name).numel for source in (language, vision) for name in source.names())
    assert counted == sum(values.numel() for values in stored.values())
    keys = {field.key: field.value for field in (*language.metadata, *vision.metadata)}
    assert keys["qwen2vl.rope.dimension_sections"] == [2, 3, 3, 0] and "<|im_start|>" in keys["tokenizer.chat_template"]


def test_a_plan_has_the_size_of_both_files(models, tmp_path):
    """Types, Q8_0 where rows allow it, are those of the plan; the size is known before."""
    model = open_model(models("gemma3"))
    planned = plan_from_types(model, preset_types("uniform-q8_0", model), recipe="preset uniform-q8_0")
    planned.save(tmp_path / "plan.json")
    output = tmp_path / "model.gguf"
    done = run("export", models("gemma3"), "--plan", tmp_path / "plan.json", "--tune", 0, "-o", output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.stat().st_size + mmproj_path(output).stat().st_size == planned.predicted_bytes
    types = {entry.name: entry.type for entry in planned.entries}
    vision = GGUFSource(mmproj_path(output))
    assert vision.info("v.blk.0.ffn_up.weight").dtype == types["v.blk.0.ffn_up.weight"] == "Q8_0"
    assert vision.info("mm.input_projection.weight").dtype == types["mm.input_projection.weight"] == "F16"
    assert GGUFSource(output).info("blk.0.ffn_up.weight").dtype == "Q8_0"


@pytest.mark.parametrize(
    ("wanted", "stored"), [pytest.param("bf16", "BF16", marks=pytest.mark.nightly), ("q8_0", "Q8_0")]
)
def test_the_vision_part_takes_a_type_of_its_own(wanted, stored, models, tmp_path):
    output = tmp_path / "model.gguf"
    done = run(
        "export", models("qwen2_vl"), "--preset", "uniform-q4_0", "--mmproj-type", wanted, "--tune", 0, "--encoder",
        "ggml", "-o", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    vision = GGUFSource(mmproj_path(output))
    assert vision.info("v.blk.0.attn_q.weight").dtype == vision.info("mm.2.weight").dtype == stored
    assert vision.info("v.patch_embd.weight").dtype == "F16" and vision.info("v.blk.0.ln1.bias").dtype == "F32"
    assert GGUFSource(output).info("blk.0.attn_q.weight").dtype == "Q4_0"


def test_what_cannot_be_written_is_named(models, tmp_path):
    output = tmp_path / "model.gguf"
    error = refused("export", models("mllama"), "--preset", "f32", "-o", output)
    assert "no mmproj for a mllama model" in error and "no graph for the language model" in error
    error = refused("export", models("qwen2_vl"), "--preset", "f32", "--mmproj-type", "q2_k", "-o", output)
    assert "--mmproj-type q2_k is not known; give one of f32, bf16, f16, q8_0." in error
    error = refused("export", models("qwen2_vl"), "--preset", "f32", "--tune", 64, "-o", output)
    assert "goes by text alone" in error
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_written_without_a_tower_that_llama_cpp_lacks(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models("qwen2_5_vl"), other)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["window_size"] = 56
    (other / "config.json").write_text(json.dumps(config))
    output = tmp_path / "model.gguf"
    done = run("export", other, "--preset", "f32", "--tune", 0, "-o", output)
    assert done.returncode == 0 and "only the language model is written" in done.stderr
    assert "`window_size` is 56" in done.stderr
    assert output.is_file() and not mmproj_path(output).exists()


def test_mmproj_files_that_do_not_fit_are_refused(models, exported, tmp_path):
    cut = tmp_path / "mmproj-cut.gguf"
    cut.write_bytes(mmproj_path(exported("qwen2_vl")).read_bytes()[:9000])
    for file in (cut, exported("qwen2_vl"), tmp_path / "missing.gguf"):
        with pytest.raises(CheckpointError, match=f"{file.name}: llama.cpp cannot load the file"):
            MtmdRunner(exported("qwen2_vl"), file)


def test_limits_of_pictures_are_those_of_the_processor(models):
    assert image_token_limits(load_processor(models("qwen2_vl"))) == (4, 64)
    assert image_token_limits(load_processor(models("gemma3"))) is None


def test_files_are_evaluated_on_pictures(models, exported, tmp_path, monkeypatch):
    pictures = write_pictures(tmp_path, 3, height=84, width=84)
    questions = pictures.with_name("questions.jsonl")
    lines = [{"images": [f"{i}.png"], "question": "What color is it?", "answer": "red"} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    result = tmp_path / "eval.json"
    done = run(
        "eval", exported("qwen2_vl"), "--reference", models("qwen2_vl"), "--tasks", "kl,vqa", "--data", questions,
        "-o", result,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text())
    files = (exported("qwen2_vl"), mmproj_path(exported("qwen2_vl")))
    assert found["candidate_bytes"] == sum(file.stat().st_size for file in files)
    assert found["samples"] == 3 and abs(found["kl"]["value"]) < 1e-5 and found["top1_agreement"]["value"] == 1
    answers = found["questions"]["answers"]
    assert [one["candidate"] for one in answers] == [one["reference"] for one in answers]
    assert any(one["reference"] for one in answers)

    alone = tmp_path / "alone.gguf"
    shutil.copyfile(exported("qwen2_vl"), alone)
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr(evaluate, "load_hf", lambda *_, **__: pytest.fail("a model was loaded"))
    for candidate, words in {
        "alone.gguf": "mmproj-alone.gguf, and alone.gguf alone sees no pictures; give --mmproj FILE",
        "other.json": "other.json is not a plan of dynquant",
        "none": "none is neither a Hugging Face model directory, nor",
        "questions.jsonl": "questions.jsonl is neither a Hugging Face model directory, nor",
    }.items():
        path = tmp_path / candidate
        error = refused("eval", path, "--reference", models("qwen2_vl"), "--tasks", "kl", "--data", questions)
        assert words in error


def test_a_plan_of_other_sizes_is_refused(models, tmp_path):
    model = open_model(models("qwen2_vl"))
    planned = plan_from_types(model, preset_types("f16", model), recipe="preset f16")
    planned.model_copy(update={"predicted_bytes": planned.predicted_bytes + 32}).save(tmp_path / "plan.json")
    error = refused("export", models("qwen2_vl"), "--plan", tmp_path / "plan.json", "-o", tmp_path / "model.gguf")
    assert f"{planned.predicted_bytes + 32:,}" in error and f"{planned.predicted_bytes:,}" in error
    assert not list(tmp_path.glob("*.gguf*"))


def test_statistics_of_split_matrices_are_those_of_the_whole(models, pictures_stats):
    """Q, K and V of the tower read one input, which calibration knows under the name of the matrix they come from."""
    model, stats = open_model(models("qwen2_vl")), pictures_stats
    (part,) = (part for part in model.parts if part.is_projector)
    own = stats_of_part(part, stats)
    whole = stats.input_of("v.blk.0.attn_qkv.weight")
    assert whole is not None
    assert all(own.input_of(f"v.blk.0.attn_{letter}.weight") is whole for letter in "qkv")
    assert own.input_of("mm.2.weight") is stats.input_of("mm.2.weight") is not None
