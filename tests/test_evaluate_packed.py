"""`eval` of one plan in both containers and both runtimes: the same KL to the reference."""

import pytest
import torch

from dynquant.errors import EvaluationError
from dynquant.evaluate import evaluate
from dynquant.logit_runners import describe_model


@pytest.fixture(scope="module")
def measure(small_moe, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    torch.set_num_threads(2)

    def run(candidate, runner="llama.cpp"):
        report = evaluate(
            candidate, small_moe, tasks=["kl"], text=[small_moe.parent / "demo_text.txt"], window=128, max_tokens=512,
            threads=2, device="cpu", cache_dir=cache, runner=runner,
        )  # fmt: skip
        return report.texts[0].kl.mean.value, report.candidate.runner

    return run


def test_containers_and_runtimes_give_the_same_kl(packed_moe, measure):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    directory, gguf = measure(packed_moe.directory), measure(packed_moe.gguf, "transformers")
    assert directory[0] == gguf[0] and directory[1] == gguf[1] == "transformers"
    kl, runner = measure(packed_moe.gguf)
    # llama.cpp rounds activations to 8 bits before each product, PyTorch does not.
    assert runner == "llama.cpp" and kl == pytest.approx(gguf[0], rel=0.02)


def test_both_runtimes_describe_a_gguf_file_alike(packed_moe):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ours, theirs = (describe_model(packed_moe.gguf, runner=runner) for runner in ("transformers", "llama.cpp"))
    fields = ("vocab_size", "context_length", "num_named_tokens")
    assert [getattr(ours, field) for field in fields] == [getattr(theirs, field) for field in fields]


def test_an_unknown_runner_is_refused(measure, packed_moe):
    with pytest.raises(EvaluationError, match="no runner `onnx`"):
        measure(packed_moe.gguf, "onnx")
