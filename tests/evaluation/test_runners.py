"""Both runners: the same logits for the same weights, prefix reuse that changes nothing, and refused files."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import CheckpointError, EvaluationError
from dynquant.evaluation import runners
from dynquant.evaluation.llama_cpp import llama_vocabulary
from dynquant.evaluation.runners import LogitRunner, describe_model, open_encoder, open_runner, tokenizer_notes
from dynquant.families.open import locate_model, open_config, open_model
from dynquant.inputs.model_inputs import Batch
from tests.helpers.tiny_models import save_tiny, write_f32

TEXT = "A quantized model answers a question.\n\nWhat is mitosis?  É naïve \t 42 + 7\nAnswer:"


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def runner(request: pytest.FixtureRequest, small_moe: Path, f32_moe: Path) -> Iterator[LogitRunner]:
    opened = open_runner(small_moe if request.param == "transformers" else f32_moe, threads=1, device="cpu")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tokens(small_moe: Path) -> list[int]:
    with open_encoder(small_moe) as encode:
        return encode((small_moe.parent / "demo_text.txt").read_text(encoding="utf-8")[:4000])


def test_gguf_in_float32_gives_the_logits_of_transformers(small_moe, f32_moe, tokens) -> None:
    window = tokens[:200]
    logits = []
    for path in (small_moe, f32_moe):
        opened = open_runner(path, threads=1, device="cpu")
        logits.append(opened.window_logits(window).double().log_softmax(-1))
        opened.close()
    log_p, log_q = logits
    assert log_p.shape == (200, 8192)
    assert float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) < 1e-9


def test_the_size_of_a_context_does_not_make_a_text_long(small_moe, tmp_path) -> None:
    """llama.cpp turns positions by the factors for long texts (longrope) where the context is large."""
    model, plain = open_model(save_tiny("llama", tmp_path / "llama", small_moe)), tmp_path / "plain.gguf"
    write_f32(model, plain)
    keys = {
        "llama.rope.scaling.type": ("longrope", GGUFValueType.STRING),
        "llama.rope.scaling.original_context_length": (256, GGUFValueType.UINT32),
    }
    fields = [MetadataField(key, *value) for key, value in keys.items()]
    factors = {"rope_factors_short.weight": torch.ones(32), "rope_factors_long.weight": torch.full((32,), 4.0)}
    tensors = {name: model.source.load(name) for name in model.source.names()} | factors
    scaled = replace(model, source=DictSource(tensors), metadata=(*model.metadata, *fields))
    opened = [open_runner(write_f32(scaled, tmp_path / "scaled.gguf")), open_runner(plain)]
    prompts = [list(range(start, start + 60)) for start in (1, 100, 200, 300)]
    short, expected = (runner.window_logits(prompts[0]) for runner in opened)
    torch.testing.assert_close(short, expected, atol=1e-4, rtol=0)
    of_long_text = opened[0].window_logits(prompts[0] * 5)[:60]
    assert (of_long_text - expected).abs().max() > 0.1
    groups, expected = (list(runner.write(prompts, 20, frozenset())) for runner in opened)
    assert [len(group) for group in groups] == [3, 1]
    assert list(chain.from_iterable(groups)) == list(chain.from_iterable(expected))
    for runner in opened:
        runner.close()


def test_windows_longer_than_a_batch_and_the_context_grow_on_demand(runner, tokens) -> None:
    short = runner.window_logits(tokens[:40])
    long = runner.window_logits(tokens[:600])
    assert long.shape == (600, 8192)
    torch.testing.assert_close(long[:40], short, atol=2e-3, rtol=0)


def test_windows_scored_side_by_side_have_the_logits_of_one_thread(f32_moe, tokens) -> None:
    """Short windows share batches, whichever context runs them; a runner can be asked again while one is left."""
    starts = (0, 200, 240, 280, 330, 360, 480, 500, 560)
    batches = [Batch.of_tokens(torch.tensor([tokens[a:b]])) for a, b in pairwise(starts)]
    scored = []
    for threads in (1, 2, 5):
        opened = open_runner(f32_moe, threads=threads)
        scored.append(list(opened.scored_logits(batches)))
        next(opened.scored_logits(batches))
        assert torch.equal(opened.window_logits(tokens[:200])[:-1], scored[0][0])
        opened.close()
    for rows in scored[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows, scored[0], strict=True))


def test_both_tokenizers_agree(small_moe, f32_moe) -> None:
    ids = []
    for path in (small_moe, f32_moe):
        with open_encoder(path) as encode:
            ids.append((encode(TEXT), encode(TEXT, add_special=False)))
    assert ids[0] == ids[1]
    assert len(ids[0][0]) > 20


def test_transformers_reads_the_tokenizer_of_a_file_where_there_is_no_llama_cpp(
    f32_moe, tiny_text, tmp_path, monkeypatch
) -> None:
    path = write_f32(open_model(tiny_text("qwen2")), tmp_path / "model.gguf")
    with open_encoder(path) as encode:
        ids = encode(TEXT), encode(TEXT, add_special=False)
    monkeypatch.setattr(runners, "is_installed", lambda: False)
    with open_encoder(path) as encode:
        assert (encode(TEXT), encode(TEXT, add_special=False)) == ids
    with pytest.raises(EvaluationError, match=r"no llama\.cpp here .*deepseek2 is not supported"):
        open_encoder(f32_moe).__enter__()


@pytest.fixture
def changed(small_moe: Path, tmp_path: Path):
    """Write the tokenizer of the small model with other settings, as a directory or as a GGUF without tensors."""

    def written(*, gguf: bool, tokens: dict[str, int] | None = None, **settings: object) -> Path:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(small_moe / name, tmp_path / name)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | settings))
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"]["vocab"] |= tokens or {}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return write_f32(open_config(tmp_path), tmp_path / "other.gguf", with_tensors=False) if gguf else tmp_path

    return written


@pytest.mark.parametrize("gguf", [True, False], ids=["GGUF", "directory"])
def test_tokenizers_that_differ_are_described(gguf: bool, small_moe: Path, f32_moe: Path, changed) -> None:
    assert tokenizer_notes(small_moe, f32_moe) == tokenizer_notes(f32_moe, small_moe) == []
    assert tokenizer_notes(small_moe, changed(gguf=gguf)) == []
    (note,) = tokenizer_notes(small_moe, changed(gguf=gguf, eos_token="!", tokens=swap(small_moe)))
    assert "the EOS token is 0 and 1" in note and "2 ids stand for other tokens" in note
    assert re.search(r"\d+ of 2\d\d strings get other ids", note) and "fed the ids of the former" in note


def swap(directory: Path) -> dict[str, int]:
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    first, second = "\u0120the", "\u0120a"
    return {first: vocab[second], second: vocab[first]}


@pytest.mark.filterwarnings("ignore:.*add_bos_token")
def test_a_bos_that_only_one_tokenizer_adds_is_described(small_moe: Path, changed, tmp_path: Path) -> None:
    (note,) = tokenizer_notes(small_moe, changed(gguf=True, add_bos_token=True))
    assert "a text gets the ids ([], []) and ([0], []) around it" in note
    (note,) = tokenizer_notes(small_moe, tmp_path / "none")
    assert "were not compared" in note


def test_descriptions_come_without_weights(small_moe, f32_moe) -> None:
    for path, kind in ((small_moe, "transformers"), (f32_moe, "llama.cpp")):
        info = describe_model(path)
        assert (info.kind, info.vocab_size, info.context_length) == (kind, 8192, 1024)
        assert info.num_named_tokens == 8192


def test_a_corrupt_gguf_is_refused_before_llama_cpp_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUX" + bytes(100))
    for way_in in (lambda: llama_vocabulary(path).__enter__(), lambda: open_runner(path)):
        with pytest.raises(CheckpointError, match="does not begin with `GGUF`"):
            way_in()


def test_a_truncated_gguf_is_refused(f32_moe: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    with f32_moe.open("rb") as whole:
        path.write_bytes(whole.read(3_000_000))
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        open_runner(path)


def test_a_gguf_with_more_behind_it_is_refused(f32_moe: Path, tmp_path: Path) -> None:
    path = tmp_path / "joined.gguf"
    path.write_bytes(f32_moe.read_bytes() + bytes(100))
    with pytest.raises(CheckpointError, match=r"joined\.gguf"):
        open_runner(path)


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    later = tmp_path / "m-00002-of-00003.gguf"
    later.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"part 2 .* m-00001-of-00003\.gguf"):
        locate_model(later)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        locate_model(tmp_path)
    with pytest.raises(CheckpointError, match="neither"):
        locate_model(tmp_path / "absent.gguf")


def test_damaged_safetensors_are_refused(small_moe: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((small_moe / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((small_moe / "model.safetensors").read_bytes()[:500_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        open_runner(tmp_path, device="cpu")
