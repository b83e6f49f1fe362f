"""`export --encoder dynquant` on the bundled model as a user types it: better than ggml on text it never saw, stock
llama.cpp reads the same weights, and a run that was killed ends with the same bytes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dynquant
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.families.open import open_model
from dynquant.formats import decode
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.folder import SuperWeight, SuperWeights
from dynquant.recipes.presets import preset_types
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from dynquant.storage.atomic import file_hash
from tests.conftest import CALIBRATION_16M
from tests.helpers.calibrating import unseen_text
from tests.helpers.commands import command, linked_copy, refused, succeed
from tests.helpers.evaluating import evaluated
from tests.helpers.tiny_models import llama_logits, mean_kl

TUNE_TOKENS = 2048
CRUSHED_DOWN = "blk.1.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def calibrated(calibrated_16m, tmp_path_factory) -> Path:
    return linked_copy(calibrated_16m, tmp_path_factory.mktemp("quality") / "calibrated") / "stats.safetensors"


@pytest.fixture(scope="module")
def plan(small_moe, calibrated) -> Path:
    """The experts of one layer in IQ1_S and IQ2_XXS, the rest in F16: the damage is all ours, and seconds of work."""
    ternary = dict.fromkeys(("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"), "IQ1_S")
    return save_plan(small_moe, calibrated, "plan.json", ternary | {CRUSHED_DOWN: "IQ2_XXS"})


@pytest.fixture(scope="module")
def plan_of_one(small_moe, calibrated) -> Path:
    """`plan` with one of its crushed tensors."""
    return save_plan(small_moe, calibrated, "one.json", {CRUSHED_DOWN: "IQ2_XXS"})


def save_plan(small_moe, calibrated, name: str, crushed: dict[str, str]) -> Path:
    """A plan beside the statistics: F16 but for the `crushed` tensors."""
    model = open_model(small_moe)
    types = dict.fromkeys(preset_types("f16", model), ("F16", "kept"))
    types |= {tensor: (type_name, "crushed") for tensor, type_name in crushed.items()}
    stats, path = CalibrationStats.load(calibrated), calibrated.with_name(name)
    plan_from_types(model, types, recipe="test", stats=stats, stats_hash=file_hash(calibrated)).save(path)
    return path


def export(small_moe, plan, output: Path, *options) -> str:
    return succeed("export", small_moe, "--plan", plan, "-o", output, *options)


@pytest.fixture(scope="module")
def files(small_moe, plan, tmp_path_factory) -> dict[str, Path]:
    """The same types from the same statistics: ggml's encoder, ours, and ours with the closing pass."""
    directory = tmp_path_factory.mktemp("files")
    found = {name: directory / f"{name}.gguf" for name in ("ggml", "dynquant", "tuned")}
    export(small_moe, plan, found["ggml"], "--encoder", "ggml")
    export(small_moe, plan, found["dynquant"], "--tune", 0)
    said = export(small_moe, plan, found["tuned"], "--tune", TUNE_TOKENS)
    assert "closing pass on 2,048 tokens" in said
    assert sorted(path.name for path in directory.iterdir()) == ["dynquant.gguf", "ggml.gguf", "tuned.gguf"]
    return found


@pytest.mark.nightly
def test_held_out_kl_at_the_same_bytes(small_moe, files, tmp_path):
    text, kl = unseen_text(tmp_path), {}
    for name, path in files.items():
        report = evaluated(
            str(path), str(small_moe), tasks=("kl",), text=[text], max_tokens=2048, reference_cache=tmp_path
        )
        kl[name] = report.texts[0].kl.mean.value
    assert len({path.stat().st_size for path in files.values()}) == 1
    assert kl["dynquant"] < 0.85 * kl["ggml"]
    assert kl["tuned"] < 0.97 * kl["dynquant"]


@pytest.mark.nightly
def test_the_encoder_is_named_in_the_file(files):
    for name, expected in (("ggml", "ggml"), ("dynquant", "dynquant"), ("tuned", "dynquant+tune")):
        keys = {field.key: field.value for field in GGUFSource(files[name]).metadata}
        assert keys["dynquant.encoder"].strip() == expected


@pytest.mark.nightly
def test_llama_cpp_computes_with_the_weights_that_we_decode(small_moe, files):
    source, model = GGUFSource(files["tuned"]), open_model(small_moe)
    hf_model = load_hf(model)
    live = LiveWeights(model, hf_model)
    for name in live.names():
        live.write(name, decode(source.info(name).dtype, source.load_packed(name), source.info(name).shape))
    tokens = list(np.random.default_rng(0).integers(1, 8000, 200))
    with torch.no_grad():
        ours = hf_model(input_ids=torch.tensor([tokens])).logits[0]
    # llama.cpp rounds activations to 8 bits where it multiplies packed blocks.
    assert mean_kl(ours, llama_logits(files["tuned"], tokens)) < 5e-3


@pytest.mark.nightly
def test_a_killed_export_ends_with_the_same_bytes(small_moe, plan, files, tmp_path):
    output = tmp_path / "model.gguf"
    arguments = command("export", small_moe, "--plan", plan, "--tune", TUNE_TOKENS, "-o", output)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    deadline = time.monotonic() + 120
    while not any(path.suffix == ".journal" and path.stat().st_size > 2000 for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    export(small_moe, plan, output, "--tune", TUNE_TOKENS)
    assert output.read_bytes() == files["tuned"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.nightly
def test_safetensors_get_the_tuned_bytes(small_moe, plan, files, tmp_path):
    export(small_moe, plan, tmp_path / "out", "-f", "safetensors", "--tune", TUNE_TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    stored, source = load_file(tmp_path / "out" / "model.safetensors"), GGUFSource(files["tuned"])
    model = dynquant.load(files["tuned"], dtype=torch.bfloat16)
    assert model.state_dict().keys() == stored.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name].to(tensor.dtype), tensor), name
    for part in ("gate", "up", "down"):
        packed = source.load_packed(f"blk.1.ffn_{part}_exps.weight")
        assert torch.equal(stored[f"model.layers.1.mlp.experts.{part}_proj"], packed)
    provenance = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["provenance"]
    assert provenance["encoder"] == "dynquant+tune"


def test_without_second_moments_it_says_so(small_moe, calibrated, plan_of_one, tmp_path):
    alone = tmp_path / "stats.safetensors"
    alone.write_bytes(calibrated.read_bytes())
    said = export(small_moe, plan_of_one, tmp_path / "m.gguf", "--stats", alone)
    assert "encoding without error feedback" in said and "closing pass" not in said


@pytest.mark.nightly
def test_super_weights_beside_the_plan_keep_their_value(small_moe, calibrated, plan_of_one, files, tmp_path):
    name, expert, row, column = CRUSHED_DOWN, 2, 3, 100
    weight = float(open_model(small_moe).source.load(name, expert)[row, column])
    found = SuperWeight(
        name=name, module="model.layers.1.mlp.experts", expert=expert, layer=1, row=row, col=column, value=weight,
        max_in=1.0, max_out=1.0, position=0, ratio=100.0, share=0.9, effect=1.0,
    )  # fmt: skip
    (tmp_path / "plan.json").write_text(plan_of_one.read_text())
    supers = SuperWeights(stats_hash="f" * 64, super_weights=(found,))
    supers.save(tmp_path / "super_weights.json")
    refusal = refused(
        "export", small_moe, "--plan", tmp_path / "plan.json", "-o", tmp_path / "m.gguf", "--stats", calibrated
    )
    assert "were found with statistics ffffffffffff" in refusal
    (tmp_path / "super_weights.json").write_text(json.dumps([found.model_dump()]))  # the form of older versions
    export(small_moe, tmp_path / "plan.json", tmp_path / "m.gguf", "--stats", calibrated, "--tune", 0)
    kept, before = (GGUFSource(path).load(name, expert) for path in (tmp_path / "m.gguf", files["dynquant"]))
    assert float(kept[row, column]) == pytest.approx(weight, rel=2e-3)
    assert float(before[row, column]) != pytest.approx(weight, rel=2e-3)
    others = torch.arange(len(kept)) != row
    assert torch.equal(kept[others], before[others])


@pytest.mark.nightly
def test_tune_improves_any_file(small_moe, files, tmp_path):
    options = ("--reference", small_moe, "--tokens", TUNE_TOKENS)
    said = succeed("tune", files["ggml"], *options, "-o", tmp_path / "tuned.gguf")
    assert "closing pass on 2,048 tokens (ended because all text was used" in said
    keys = {field.key: field.value for field in GGUFSource(tmp_path / "tuned.gguf").metadata}
    assert keys["dynquant.encoder"].strip() == "ggml+tune"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--encoder", "magic"), "--encoder magic is not known"),
        (("--encoder", "dynquant", "--device", "cuda:99"), "cuda:99"),
        (("--encoder", "ggml", "--tune", "1024"), "closing pass"),
        (("--hessians", "some"), "--hessians some"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_options_are_refused_in_one_paragraph(small_moe, calibrated, tmp_path, arguments, words):
    said = refused(
        "export", small_moe, "--preset", "uniform-q2_k", "--stats", calibrated, *arguments, "-o", tmp_path / "m.gguf"
    )
    assert words in said
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_kl_never_rises_with_bytes_along_the_frontier(small_moe, calibrated_16m, tmp_path):
    """A file was once worse than one of 95 % of its bytes: the smaller one's closing pass was kept, its own refused."""
    linked_copy(calibrated_16m, tmp_path / "plan")
    unseen, sizes, kls = unseen_text(tmp_path), [], []
    for size in ("4.4MB", "4.8MB", "5.2MB", "5.7MB"):
        succeed("plan", small_moe, "--size", size, *CALIBRATION_16M, "--no-report", "-o", tmp_path / "plan")
        file = tmp_path / f"{size}.gguf"
        succeed("export", small_moe, "--plan", tmp_path / "plan" / "plan.json", "-o", file)
        (text,) = evaluated(file, small_moe, tasks=("kl",), text=[unseen], max_tokens=4096).texts
        sizes.append(file.stat().st_size)
        kls.append(text.kl.mean.value)
    assert sizes == sorted(set(sizes))
    assert kls == sorted(kls, reverse=True)
