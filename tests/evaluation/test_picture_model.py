"""The picture model's example: pictures, questions, model inputs, and a training run that goes on after a kill."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

from dynquant.inputs.processor import load_processor
from tests.examples.picture_model import processor_files as files
from tests.examples.picture_model.pictures import DIGIT, PLACES, QUESTION_KINDS, ask, describe, draw_picture
from tests.examples.picture_model.train import (
    Encoder,
    Qwen2VLForConditionalGeneration,
    accuracy,
    attend_together,
    make_config,
    model_inputs,
    train,
)

TRAINED = Path(__file__).parents[1] / "examples" / "picture_model" / "trained"


def test_pictures_are_functions_of_seed_and_number():
    first, again, other = draw_picture(3, 5), draw_picture(3, 5), draw_picture(4, 5)
    assert np.array_equal(first.pixels, again.pixels) and first.things == again.things
    assert not np.array_equal(first.pixels, other.pixels)


def test_answers_follow_from_what_is_drawn():
    kinds = set()
    for index in range(200):
        picture = draw_picture(9, index)
        for question in ask(picture, 4, np.random.default_rng(index)):
            kinds.add(question.kind)
            if question.kind == "count":
                assert question.answer == str(sum(thing.kind != DIGIT for thing in picture.things))
            if question.kind == "place":
                (thing,) = [thing for thing in picture.things if question.text == f"Where is the {thing.name}?"]
                assert question.answer == PLACES[thing.place]
        assert all(thing.color in describe(picture).answer for thing in picture.things)
    assert kinds == set(QUESTION_KINDS)


def test_every_picture_has_a_question():
    """Of picture 1851 of the held-out set most kinds of questions have no single answer."""
    assert ask(draw_picture(2, 1851), 1, np.random.default_rng([2, 1851, 1]))


def test_the_trained_model_answers_new_pictures():
    tokenizer = files.train_tokenizer()
    model = Qwen2VLForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32)
    batches = [Encoder(tokenizer).batch(77, range(100), 1)]
    share, by_kind = accuracy(model, batches)
    assert share > 0.95 and set(by_kind) == set(QUESTION_KINDS)


def test_a_thing_is_drawn_in_its_cell_and_colour():
    for index in range(50):
        picture = draw_picture(11, index)
        thing = picture.things[0]
        if thing.color != "red" or thing.digit is not None:
            continue
        cell = np.s_[thing.row * 37 : thing.row * 37 + 39, thing.column * 37 : thing.column * 37 + 39]
        red, green, _ = picture.pixels[cell].astype(int).reshape(-1, 3).T
        assert ((red - green) > 100).sum() > 80


def test_training_sees_what_the_processor_gives(tmp_path):
    """Pixels, token ids and positions of a batch against Qwen2-VL's own processor, and the model's outputs."""
    tokenizer = files.train_tokenizer()
    config = make_config(tokenizer)
    model = Qwen2VLForConditionalGeneration(config).eval()
    config.save_pretrained(tmp_path)
    files.save_processor(tokenizer, tmp_path)
    processor = load_processor(tmp_path)
    batch = Encoder(tokenizer).batch(5, range(3), 1)
    ours = model_inputs(batch, torch.device("cpu"))
    asked = [ask(draw_picture(5, i), 1, np.random.default_rng([5, i, 1]))[0] for i in range(3)]
    for i, question in enumerate(asked):
        parts = [{"type": "image"}, {"type": "text", "text": question.text}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": question.answer}]
        text = processor.apply_chat_template(turns, tokenize=False)
        theirs = processor(images=[Image.fromarray(batch.pixels[i].numpy())], text=[text], return_tensors="pt")
        length = theirs["input_ids"].shape[1]
        assert torch.equal(theirs["input_ids"][0], ours["input_ids"][i, :length])
        assert torch.allclose(theirs["pixel_values"], ours["pixel_values"][64 * i : 64 * (i + 1)], atol=1e-6)
        with torch.no_grad():
            expected = model(**theirs).logits
            given = model(**ours).logits[i : i + 1, :length]
        assert torch.allclose(given, expected, atol=1e-4)
    with torch.no_grad():
        expected = model(**ours).logits
        attend_together(model)
        assert torch.allclose(model(**ours).logits, expected, atol=1e-4)


@pytest.mark.nightly
def test_training_goes_on_and_lowers_the_loss(tmp_path, capsys):
    options = Namespace(
        output=tmp_path / "model", device="cpu", minutes=10, steps=3, pictures=2, questions=2, held_out=4,
        evaluate_every=3, target=1.0, lr=1e-3, warmup=2, workers=0,
    )  # fmt: skip
    train(options)
    options.steps = 6
    train(options)
    printed = capsys.readouterr().out
    assert "goes on from step 3" in printed
    losses = [float(line.split()[5]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 2 and losses[1] < losses[0] - 0.3
    assert sum(file.stat().st_size for file in options.output.iterdir()) < 12_000_000
    assert load_processor(options.output).tokenizer.eos_token == files.IM_END
