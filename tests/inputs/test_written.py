"""Text that the original writes itself."""

import pytest
import torch

from dynquant.calibration.options import CalibrateOptions, CalibrationOptions
from dynquant.calibration.stage import calibrate, statistics_at
from dynquant.errors import StatsError
from dynquant.families.open import open_model
from dynquant.inputs import written
from dynquant.inputs.written import Writer, continued, good_windows
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import SILENT, Session, ignore_progress
from dynquant.storage.file_names import written_path
from tests.helpers.commands import refused
from tests.helpers.tiny_models import write_f32

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|me|>{% endif %}"
)


def test_written_text_follows_the_models_distribution(tiny_moe):
    """After each beginning, the share of each next token is the probability that the model gives it."""
    hf_model = load_hf(open_model(str(tiny_moe)))
    beginnings = torch.arange(100, 132).unfold(0, 16, 1)
    numbers = torch.rand(272, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    windows = continued(hf_model, beginnings.tolist() * 16, numbers, columns=8000)
    assert windows.shape == (272, 17) and windows.max() < 8000
    assert torch.equal(windows[:, :16], beginnings.repeat(16, 1))
    with torch.no_grad():
        likely = hf_model(input_ids=beginnings).logits[:, -1, :8000].softmax(-1).topk(200)
    share = (windows[:, 16:] == likely.indices.repeat(16, 1)).any(1).float().mean()
    expected = likely.values.sum(1).mean()
    assert 0.05 < expected < 0.95 and abs(share - expected) < 4 * (0.25 / len(windows)) ** 0.5


def test_text_goes_on_where_writing_was_stopped_however_many_windows_are_written_together(
    tiny_moe, tmp_path, monkeypatch
):
    model = open_model(str(tiny_moe))
    given, opened = torch.arange(200, 264).reshape(2, 32), []

    def writer(file):
        return Writer(
            "model", lambda: opened.append(1) or load_hf(model), load_tokenizer(model), 8000, file and tmp_path / file
        )

    whole = writer(None).windows(given, 5, 0, ignore_progress)
    assert whole.shape == (5, 32) and not torch.equal(whole, writer(None).windows(given, 5, 1, ignore_progress))
    beginnings = given.unfold(1, 16, 1).reshape(-1, 16)
    assert all(bool((row[:16] == beginnings).all(1).any()) for row in whole[::2])
    monkeypatch.setattr(written, "windows_together", lambda hf_model, length: 2)

    def stop(stage, done, total, **where):
        if done >= 2 * 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer("kept").windows(given, 5, 0, stop)
    assert torch.equal(writer("kept").windows(given, 5, 0, ignore_progress), whole)
    opened.clear()
    assert torch.equal(writer("kept").windows(given, 5, 0, ignore_progress), whole) and not opened


def test_prompts_of_a_chat_begin_windows_and_follow_an_end(tiny_moe):
    model = open_model(str(tiny_moe))
    hf_model, tokenizer = load_hf(model), load_tokenizer(model)
    tokenizer.chat_template = CHAT
    given = torch.arange(300, 364).reshape(1, 64)
    windows = Writer("model", lambda: hf_model, tokenizer).windows(given, 6, 0, ignore_progress)
    chats = [tokenizer.decode(row) for row in windows[2::3]]
    assert len(chats) == 2 and all(chat.startswith(("<|user|>", "<|system|>")) and "<|me|>" in chat for chat in chats)
    first = continued(hf_model, [[5], [7, 8]], torch.full((1, 8), 0.5, dtype=torch.float64))
    end = int(first[0, 3])
    again = continued(hf_model, [[5], [7, 8]], torch.full((1, 8), 0.5, dtype=torch.float64), ends={end})
    place = again[0].tolist().index(end)
    assert again[0, : place + 3].tolist() == [*first[0, : place + 1].tolist(), 7, 8]


def test_loops_and_repeats_are_left_out():
    windows = torch.randint(1000, (5, 128), generator=torch.Generator().manual_seed(0))
    windows[1, 100:] = 7
    windows[3, 70:110] = windows[2, 80:120]
    windows[4, :40] = windows[0, :40]  # one prompt
    assert good_windows(windows).tolist() == [True, False, True, False, True]
    assert good_windows(windows[:0]).tolist() == []


def test_calibration_runs_on_what_the_original_wrote(tiny_moe, tmp_path):
    path = tmp_path / "stats.safetensors"
    options = CalibrationOptions(tokens=160, sampled_tokens=128, window=32)
    model = open_model(str(tiny_moe))
    file = calibrate(CalibrateOptions(model=str(tiny_moe), output=path, calibration=options))
    made = file.stats.provenance
    assert (made.num_windows, made.num_tokens, made.sampled_tokens) == (9, 256, 128) and made.sampled_hash
    assert made.text_name == "dynquant-mix-2 and text that the original wrote"
    assert file.moments.tokens.shape == (8, 32) and written_path(path).is_file()
    assert statistics_at(path, model, options, SILENT).hash == file.hash
    notes = []
    alone = CalibrationOptions(tokens=0, sampled_tokens=128, window=32, hessians="none")
    other = statistics_at(path, model, alone, Session(note=notes.append))
    assert any("other --tokens" in note for note in notes)
    made = other.stats.provenance
    assert made.num_windows == 4 and made.text_name == "text that the original wrote"
    gguf = write_f32(model, tmp_path / "original.gguf")
    of_gguf = calibrate(CalibrateOptions(model=str(gguf), output=tmp_path / "g.safetensors", calibration=alone))
    assert of_gguf.stats.provenance.sampled_hash == made.sampled_hash


def test_models_that_are_streamed_cannot_write(tiny_moe, tmp_path):
    said = refused(
        "calibrate", tiny_moe, "--sampled-tokens", 64, "--max-memory", "3GB", "-o", tmp_path / "s.safetensors"
    )
    assert "cannot write text here" in said and "without --max-memory" in said and not [*tmp_path.glob("*.safetensors")]
    with pytest.raises(StatsError, match="--tokens 0 leaves nothing"):
        CalibrationOptions(tokens=0)
