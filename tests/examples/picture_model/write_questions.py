"""Writes pictures as PNG files and a question file, for calibration and evaluation of the picture model.

    python -m tests.examples.picture_model.write_questions -o questions --count 500 --seed 3

`questions.jsonl` has a line for each picture: `images` (paths from the file's directory), `question`, `answer`, `kind`.
Training uses the seeds 1 and 2.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.examples.picture_model.pictures import ask, draw_picture


def write_questions(directory: Path, *, count: int, seed: int) -> Path:
    """Write pictures and questions and return the path of `questions.jsonl`."""
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        picture = draw_picture(seed, index)
        name = f"pictures/{index:05d}.png"
        Image.fromarray(picture.pixels).save(directory / name)
        (asked,) = ask(picture, 1, np.random.default_rng([seed, index, 1]))
        line = {"images": [name], "question": asked.text, "answer": asked.answer, "kind": asked.kind}
        lines.append(json.dumps(line))
    file = directory / "questions.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    print(write_questions(options.output, count=options.count, seed=options.seed))


if __name__ == "__main__":
    main()
