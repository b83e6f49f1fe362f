"""`eval` of one plan in both containers and both runtimes: the same KL to the reference."""

from dataclasses import replace

import pytest

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.encoding.stream import load_encoder
from dynquant.errors import OptionError
from dynquant.evaluation.runners import describe_model, open_runner
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types
from tests.helpers.evaluating import evaluated
from tests.helpers.exports import export_gguf
from tests.helpers.tiny_models import mean_kl, write_f32


@pytest.fixture(scope="module")
def measure(small_moe, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def run(candidate, runner="llama.cpp"):
        report = evaluated(
            candidate, small_moe, tasks=["kl"], text=[small_moe.parent / "demo_text.txt"], window=128, max_tokens=256,
            device="cpu", reference_cache=cache, runner=runner,
        )  # fmt: skip
        return report.texts[0].kl.mean.value, report.candidate.runner

    return run


def test_containers_and_runtimes_give_the_same_kl(packed_moe, measure, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    directory, gguf = measure(packed_moe.directory), measure(packed_moe.gguf, "transformers")
    assert directory[0] == gguf[0] and directory[1] == gguf[1] == "transformers"
    kl, runner = measure(packed_moe.gguf)
    # llama.cpp rounds activations to 8 bits before each product with packed weights, PyTorch does not.
    assert runner == "llama.cpp" and kl == pytest.approx(gguf[0], rel=0.05)
    # Given the decoded weights it does not either: what is left is the order of float32 sums.
    decoded = replace(packed_moe.model, source=GGUFSource(packed_moe.gguf))
    kl, runner = measure(write_f32(decoded, tmp_path / "decoded.gguf"))
    assert runner == "llama.cpp" and kl == pytest.approx(gguf[0], abs=1e-5)


def test_rounded_activations_follow_llama_cpp(tiny_text, tmp_path):
    """One packed matrix, the rest in F32: without the rounding the KL between the runtimes is above 1e-5."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = open_model(tiny_text("llama"))
    matrices = [name for name in model.source.names() if len(model.source.info(name).shape) == 2]
    plan = plan_from_types(
        model, dict.fromkeys(matrices, ("F32", "test")) | {"output.weight": ("Q4_K", "test")}, recipe="test"
    )
    (path,) = export_gguf(model, plan, None, tmp_path / "one.gguf", encoder=load_encoder("ggml"))
    tokens, logits = list(range(100, 160)), []
    for options in ({}, {"runner": "transformers"}, {"runner": "transformers", "rounded": True}):
        runner = open_runner(path, device="cpu", **options)
        logits.append(runner.window_logits(tokens))
        runner.close()
    # An activation near the middle of two steps may go the other way: how float32 sums are ordered is the CPU's.
    assert mean_kl(logits[0], logits[2]) < 1e-7 < 1e-5 < mean_kl(logits[0], logits[1])


def test_both_runtimes_describe_a_gguf_file_alike(packed_moe):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ours, theirs = (describe_model(packed_moe.gguf, runner=runner) for runner in ("transformers", "llama.cpp"))
    fields = ("vocab_size", "context_length", "num_named_tokens")
    assert [getattr(ours, field) for field in fields] == [getattr(theirs, field) for field in fields]


def test_an_unknown_runner_is_refused(measure, packed_moe):
    with pytest.raises(OptionError, match=r"--runner onnx is not known; give one of llama\.cpp, transformers"):
        measure(packed_moe.gguf, "onnx")
