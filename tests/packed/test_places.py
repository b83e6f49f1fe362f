"""Packed vision-language checkpoints: what eval measures of a plan is what transformers loads and runs with images."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("PIL", reason="Pillow is not installed")
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.tensor_roles import Role
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import Guidance, load_encoder
from dynquant.errors import AdapterError, CheckpointError, ExportError
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.exporters.options import ExportOptions
from dynquant.exporters.stage import export
from dynquant.families.open import open_model
from dynquant.inputs.processor import load_processor
from dynquant.recipes.plan import Plan
from dynquant.running.load import load_hf
from tests.helpers.commands import run
from tests.helpers.evaluating import evaluated
from tests.helpers.exports import export_safetensors
from tests.helpers.packed_models import plan_of
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_vision import FAMILIES, encoded_pictures, write_pictures

MIXTURE = ("IQ4_NL", "Q8_0", "Q4_0", "MXFP4", "BF16")
"""Types of the matrices of language model, tower and projector, in turn."""
COMPUTED_WITH = {"gemma3": {"multi_modal_projector.mm_input_projection_weight"}}
"""Matrices outside linear layers, which are stored as floats."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 2)


def mixed_plan(model) -> Plan:
    types = itertools.cycle(MIXTURE)
    return plan_of(model, lambda _: next(types))


def export_mixed(checkpoint, folder):
    model = open_model(checkpoint)
    plan = mixed_plan(model)
    export_safetensors(model, plan, None, folder / "out", encoder=load_encoder("ggml"))
    return model, plan, folder / "out"


def from_pretrained(directory, **options):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, **{"dtype": torch.float32} | options).eval()


@pytest.fixture(scope="module")
def qwen(tiny_vision, tmp_path_factory):
    """Model, plan and packed directory of a Qwen2-VL."""
    return export_mixed(tiny_vision("qwen2_vl"), tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("family", represented_by(("mllama", "qwen2_vl", "gemma3"), FAMILIES))
def test_the_loaded_model_is_the_one_that_eval_renders(family, tiny_vision, pictures, tmp_path):
    model, plan, out = export_mixed(tiny_vision(family), tmp_path)
    samples = encoded_pictures(family, out, pictures)
    packed, rendered = from_pretrained(out), load_hf(model)
    with torch.inference_mode():
        original = rendered(**samples[0].arguments).logits
    store = EncodedStore(model, Guidance(), load_encoder("ggml"), tmp_path / "encoded")
    RenderedModel(rendered, store).install({e.name: e.type for e in plan.entries if not e.quant_type.is_float})
    with torch.inference_mode():
        for sample in samples:
            torch.testing.assert_close(
                packed(**sample.arguments).logits, rendered(**sample.arguments).logits, atol=2e-5, rtol=0
            )
        assert (packed(**samples[0].arguments).logits - original).abs().max() > 0.1
        ids, expected = (
            one.generate(**samples[0].arguments, max_new_tokens=6, do_sample=False) for one in (packed, rendered)
        )
    assert torch.equal(ids, expected)

    kept = {e.sources[0] for e in plan.entries if e.quant_type.is_float}
    packable = {e.sources[0] for e in plan.entries if not e.quant_type.is_float and e.role is not Role.OTHER}
    before, now = (load_file(path / "model.safetensors") for path in (model.path, out))
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in kept)
    assert {name for name in packable if now[name].dtype == torch.uint8} == packable - COMPUTED_WITH.get(family, set())


def test_published_names_of_a_tower_are_kept_and_found(tiny_vision, pictures, tmp_path):
    """Published LLaVA and Gemma 3 checkpoints have a prefix that transformers drops."""
    model, _, out = export_mixed(shutil.copytree(tiny_vision("llava"), tmp_path / "llava"), tmp_path)
    own = load_file(model.path / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in own.items()}
    save_file(renamed, model.path / "model.safetensors", metadata={"format": "pt"})
    published = open_model(model.path)
    export_safetensors(published, mixed_plan(published), None, tmp_path / "again", encoder=load_encoder("ggml"))
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == renamed.keys()
    (sample, *_) = encoded_pictures("llava", model.path, pictures)
    with torch.inference_mode():
        logits, again = (from_pretrained(path)(**sample.arguments).logits for path in (out, tmp_path / "again"))
    assert torch.equal(logits, again)


def test_saving_keeps_names_bytes_and_logits(qwen, pictures, tmp_path):
    model, _, out = qwen
    (sample, *_) = encoded_pictures("qwen2_vl", model.path, pictures)
    packed = from_pretrained(out)
    packed.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        assert torch.equal(packed(**sample.arguments).logits, again(**sample.arguments).logits)
    configs = [json.loads((path / "config.json").read_text()) for path in (out, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    stored, saved = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert stored.keys() == saved.keys() and stored["visual.patch_embed.proj.weight"].dim() == 5


def test_a_missing_tensor_is_named_as_in_the_model(qwen, tmp_path):
    _, _, out = qwen
    tensors = load_file(out / "model.safetensors")
    del tensors["visual.blocks.1.mlp.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\.mlp\.fc1\.weight.*incomplete"):
        from_pretrained(tmp_path)


def test_an_interrupted_export_goes_on_with_the_same_bytes(qwen, tmp_path):
    model, plan, out = qwen

    def stop_late(stage, done, total, **_):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_safetensors(model, plan, None, tmp_path / "again", encoder=load_encoder("ggml"), progress=stop_late)
    assert not (tmp_path / "again" / "config.json").exists()
    export_safetensors(model, plan, None, tmp_path / "again", encoder=load_encoder("ggml"))
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_adapters_of_a_vision_model_leave_the_tower_alone(qwen, pictures, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    from dynquant.exporters.adapter_gguf import export_adapter
    from dynquant.lora import add_adapter

    _, _, out = qwen
    (sample, *_) = encoded_pictures("qwen2_vl", out, pictures)
    adapted = add_adapter(from_pretrained(out), rank=4)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("language_model.layers" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        loss = adapted(**sample.arguments, labels=sample.ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="vision-language model"):
        export_adapter(tmp_path, tmp_path / "adapter.gguf", base=out)


def test_export_inspect_and_eval_agree_with_the_plan(qwen, pictures, tmp_path):
    model, plan, _ = qwen
    out, result = tmp_path / "out", tmp_path / "eval.json"
    plan.save(tmp_path / "plan.json")
    done = run("export", model.path, "--plan", tmp_path / "plan.json", "-f", "safetensors", "-o", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_processor(out).chat_template == load_processor(model.path).chat_template
    assert "AutoModelForImageTextToText" in (out / "README.md").read_text()

    questions = pictures.with_name("questions.jsonl")
    lines = [{"images": [f"{i}.png"], "question": "What color is it?", "answer": "red"} for i in range(2)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    done = run("eval", out, "--reference", model.path, "--tasks", "kl,vqa", "--data", questions, "-o", result)
    assert done.returncode == 0, done.stderr[-2000:]
    packed = json.loads(result.read_text())
    rendered = evaluated(tmp_path / "plan.json", model.path, tasks=("kl", "vqa"), data=questions)
    assert rendered.kl.value > 1e-4 and packed["kl"]["value"] == pytest.approx(rendered.kl.value, rel=1e-3)
    answers = [answer["candidate"] for answer in packed["questions"]["answers"]]
    assert answers == [answer.candidate for answer in rendered.questions.answers]
    assert packed["candidate_bytes"] == (out / "model.safetensors").stat().st_size

    seen = inspect(out)
    assert {share.label for share in seen.types} == {*MIXTURE}
    assert seen.num_weights == model.num_weights
    assert {share.label for share in seen.roles} >= {"projector", "vision_attn", "vision_ffn", "ffn_down"}


def test_a_closing_pass_is_refused(qwen, tmp_path):
    model, plan, _ = qwen
    plan.save(tmp_path / "plan.json")
    files = {"model": str(model.path), "output": tmp_path / "out", "plan": tmp_path / "plan.json"}
    with pytest.raises(ExportError, match="it goes by text alone"):
        export(ExportOptions(format="safetensors", tune=500, **files))
    assert not (tmp_path / "out").exists()
