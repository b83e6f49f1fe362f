"""Refusals before any work: what is known at the start costs nobody the hours until it is needed."""

import json

import pytest

from tests.helpers.commands import refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("plan {m} --encoder magic -o {t}/o", "--encoder magic is not known; give one of dynquant, ggml."),
        ("plan {m} --for vllm --encoder magic -o {t}/o", "--encoder magic is not known"),
        ("analyze {m} --stats {t}/none --encoder magic -o {t}/o.json", "--encoder magic is not known"),
        ("export {m} --preset uniform-q4_k --encoder magic -o {t}/o.gguf", "--encoder magic is not known"),
        ("release {m} --bpw 4 --encoder magic -o {t}/o", "--encoder magic is not known"),
        ("compare {m} --presets f16 --encoder magic --text {t}/text.txt -o {t}/o", "--encoder magic is not known"),
        ("compare-encoders {m} --presets f16 --variants ggml,magic --text {t}/text.txt -o {t}/o", "--variants magic"),
        ("compare-encoders {m} --presets f16 --variants , --text {t}/text.txt -o {t}/o", "--variants names none; give"),
        ("compare-encoders {m} --presets f16 --scoring , --text {t}/text.txt -o {t}/o", "--scoring names none; give"),
        ("compare {m} --presets f16 --scoring magic --text {t}/text.txt -o {t}/o", "--scoring magic is not known"),
        ("eval {m} --reference {m} --scoring letter,magic --text {t}/text.txt", "give some of letter, cloze."),
        ("release {m} --bpw 4 --scoring magic --mmlu-data {t}/one.jsonl -o {t}/o", "--scoring magic is not known"),
        ("plan {m} --bpw 4 --hessians magic -o {t}/o", "give one of none, activations, gradients, two-sided."),
        ("plan {m} --for vllm --bpw 6 --hessians two-sided -o {t}/o", "--hessians two-sided takes second moments"),
        ("export {m} -f compressed-tensors --preset uniform-w4a16 --hessians two-sided -o {t}/o", "vLLM's schemes has"),
        ("compare {m} --presets uniform-q4_k,magic --text {t}/text.txt -o {t}/o", "There is no preset `magic`"),
        ("compare-encoders {m} --presets uniform-q4_k,magic --text {t}/text.txt -o {t}/o", "There is no preset `mag"),
        ("plan --config-only {m} --for vllm --preset uniform-w4a16", "leave out --for vllm, whose plans need weights"),
        ("plan --config-only {m} --for vllm --preset uniform-q4_k", "leave out --for vllm, whose plans need weights"),
        ("plan {m} --preset uniform-w4a16 -o {t}/o", "no GGUF type: plan with --for vllm, or export with -f"),
        ("plan {m} --for vllm --preset uniform-q4_k -o {t}/o", "plan without --for vllm, or export with -f gguf"),
        ("compare {m} --presets f16 --tasks generate --text {t}/text.txt -o {t}/o", "give some of kl, ppl, mmlu."),
        ("compare {m} --presets , --text {t}/text.txt -o {t}/o", "--presets names none; give some, as"),
        ("compare-encoders {m} --presets , --text {t}/text.txt -o {t}/o", "--presets names none; give some, as"),
        ("compare {m} --presets f16 --text {t}/empty.txt -o {t}/o", "The text empty.txt is empty"),
        ("compare {m} --presets f16 --text {t}/document.json -o {t}/o", "document.json, line 1 is not JSON"),
        ("compare {m} --presets f16 --text {t}/text.txt --tasks mmlu --mmlu-data {t}/empty.jsonl -o {t}/o", "no quest"),
        ("compare {m} --presets f16 --tasks mmlu --mmlu-data {t}/few.jsonl -o {t}/o", "No subject has more than the 5"),
        ("release {m} --bpw 4 --mmlu-data {t}/few.jsonl -o {t}/o", "No subject has more than the 5 questions"),
        ("compare-encoders {m} --presets f16 --text {t}/none.txt -o {t}/o", "There is no text"),
        ("release {m} --bpw 4 --text {t}/empty.txt -o {t}/o", "The text empty.txt is empty"),
        ("release {m} --bpw 4 --name ../up -o {t}/o", "--name '../up': files are called by it, so it is one"),
        ("release {m} --bpw 4 --name .. -o {t}/o", "--name '..': files are called by it"),
        ("release {m} --bpw 4 --push me/ -o {t}/o", "--push me/ is no repository of the Hub; give it as OWNER/REPO."),
        ("release {m} --bpw 4 --name= -o {t}/o", "--name '': files are called by it"),
        ("plan {m} --bpw 4 --select --selection-text {t}/empty.txt -o {t}/o", "The text empty.txt is empty"),
        ("eval {m} --reference {m} --text {t}/text.txt --adapter {t} -o {t}/o.json", "holds no adapter_config.json"),
        ("calibrate {m} --imatrix {t}/none.gguf -o {t}/o.safetensors", "none.gguf cannot be read: No such file or dir"),
        ("calibrate {m} --imatrix {t}/empty.gguf -o {t}/o.safetensors", "empty.gguf is an empty file, not an importa"),
        ("inspect {t}/empty.gguf", "but an empty file. Check"),
        ("export {t}/empty.gguf --preset f16 -o {t}/o.gguf", "but an empty file; check the path"),
        ("recipe {t}/empty.gguf", "empty.gguf is an empty file, not a plan of dynquant."),
    ],
)  # fmt: skip
def test_what_is_known_at_the_start_is_refused_before_any_work(arguments, words, small_moe, tmp_path, monkeypatch):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it runs the model")

    for place in ("calibration.stage.run_calibration", "evaluation.runners.open_runner", "running.load.load_hf"):
        monkeypatch.setattr(f"dynquant.{place}", work)
    (tmp_path / "text.txt").write_text("The words of a text that is long enough. " * 99)
    (tmp_path / "document.json").write_text(json.dumps({"some": "document"}, indent=1))
    (tmp_path / "one.jsonl").write_text('{"text": "one example"}\n')
    question = {"subject": "s", "question": "Which?", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "few.jsonl").write_text(4 * f"{json.dumps(question)}\n")
    for name in ("empty.txt", "empty.jsonl", "empty.gguf"):
        (tmp_path / name).touch()
    before = {*tmp_path.rglob("*")}
    names = {"m": small_moe, "t": tmp_path}
    message = refused(*(word.format(**names) for word in arguments.split()))
    assert words.format(**names) in message
    assert {*tmp_path.rglob("*")} == before
