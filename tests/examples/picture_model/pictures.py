"""Synthetic pictures with things that can be asked about, and questions whose answers follow from how they were drawn.

A picture is 112 x 112 pixels: up to five coloured shapes and perhaps a digit, each in a cell of a 3 x 3 grid, with
jitter in place, size and colour, on a light noisy background. `draw_picture(seed, index)` is a pure function of its two
numbers, so a set of pictures is a seed and a range, and sets of different seeds are independent. NumPy only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZE = 112
CELLS = 3
COLORS = {
    "red": (215, 40, 40), "green": (40, 155, 60), "blue": (45, 75, 220), "yellow": (235, 205, 40),
    "purple": (150, 50, 180), "orange": (240, 130, 30), "black": (30, 30, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
DIGIT = "digit"
PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
MAX_SHAPES = 5

_FONT = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip
"""Rows of the ten digits, 5 x 7 dots."""


@dataclass(frozen=True)
class Thing:
    """One shape or digit: `kind` is of SHAPES or DIGIT, `place` an index of PLACES, `digit` its value."""

    kind: str
    color: str
    place: int
    digit: int | None = None

    @property
    def row(self) -> int:
        return self.place // CELLS

    @property
    def column(self) -> int:
        return self.place % CELLS

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Picture:
    """`pixels` uint8 [SIZE, SIZE, 3], and what was drawn."""

    pixels: np.ndarray
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and which of QUESTION_KINDS it is."""

    text: str
    answer: str
    kind: str


def draw_picture(seed: int, index: int) -> Picture:
    """The picture number `index` of the set `seed`."""
    rng = np.random.default_rng([seed, index])
    things = _choose_things(rng)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = rng.integers(190, 246) + rng.integers(-10, 11, 3)
    for thing in things:
        _draw(canvas, thing, rng)
    canvas += rng.standard_normal(canvas.shape, np.float32) * 5
    return Picture(canvas.clip(0, 255).astype(np.uint8), things)


def ask(picture: Picture, count: int, rng: np.random.Generator) -> list[Question]:
    """Up to `count` different questions about a picture, each of a kind drawn evenly from those that it allows."""
    found: dict[str, Question] = {}
    kinds = list(QUESTION_KINDS)
    for _ in range(64 * count):
        kind = kinds[rng.integers(len(kinds))]
        asked = QUESTION_KINDS[kind](picture.things, rng)
        if asked is not None:
            found.setdefault(asked[0], Question(*asked, kind))
        if len(found) == count:
            break
    return list(found.values())


def describe(picture: Picture) -> Question:
    """Everything in the picture, from the top left to the bottom right."""
    things = sorted(picture.things, key=lambda thing: thing.place)
    listed = ", ".join(
        f"{thing.color} {thing.kind if thing.digit is None else thing.digit} {PLACES[thing.place]}" for thing in things
    )
    return Question("Describe the picture.", listed, "description")


def _choose_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Half of the pictures repeat a few kinds and colours, so that counts beyond one are common."""
    num_shapes = int(rng.integers(1, MAX_SHAPES + 1))
    variety = (len(SHAPES), len(COLORS)) if rng.random() < 0.5 else (2, 3)
    kinds = rng.permutation(SHAPES)[: variety[0]]
    colors = rng.permutation(list(COLORS))[: variety[1]]
    places = rng.permutation(len(PLACES))
    things = [Thing(str(rng.choice(kinds)), str(rng.choice(colors)), int(place)) for place in places[:num_shapes]]
    if rng.random() < 0.5:
        things.append(Thing(DIGIT, str(rng.choice(list(COLORS))), int(places[num_shapes]), int(rng.integers(10))))
    return tuple(things)


def _draw(canvas: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    cell = SIZE / CELLS
    radius = rng.uniform(10, 15)
    slack = cell / 2 - radius - 1
    x0 = (thing.column + 0.5) * cell + rng.uniform(-slack, slack)
    y0 = (thing.row + 0.5) * cell + rng.uniform(-slack, slack)
    low_x, low_y = int(x0 - radius) - 1, int(y0 - radius) - 1
    window = canvas[low_y : low_y + 34, low_x : low_x + 34]
    y, x = np.mgrid[: window.shape[0], : window.shape[1]].astype(np.float32)
    x, y = x + low_x - x0, y + low_y - y0
    if thing.digit is None:
        opacity = np.clip(0.5 - _DISTANCES[thing.kind](x, y, radius), 0, 1)
    else:
        opacity = _digit_mask(thing.digit, x, y, radius)
    color = np.array(COLORS[thing.color], np.float32) + rng.integers(-15, 16, 3)
    window += opacity[..., None] * (color - window)


def _digit_mask(digit: int, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    dots = np.array([[float(dot) for dot in row] for row in _FONT[digit].split()], np.float32)
    dot_size = 2 * radius / 7
    row = np.floor(y / dot_size + 3.5).astype(int)
    column = np.floor(x / dot_size + 2.5).astype(int)
    inside = (row >= 0) & (row < 7) & (column >= 0) & (column < 5)
    return np.where(inside, dots[row.clip(0, 6), column.clip(0, 4)], 0)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "triangle": lambda x, y, r: np.maximum(y - 0.7 * r, 0.89 * abs(x) - 0.45 * (y + r)),
    "diamond": lambda x, y, r: (abs(x) + abs(y) - r) * 0.71,
    "cross": lambda x, y, r: np.minimum(np.maximum(abs(x) - r, abs(y) - r / 3), np.maximum(abs(x) - r / 3, abs(y) - r)),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r,
}
"""Signed distances in pixels from the outline, negative inside, of a shape of radius `r` around the origin."""

Things = tuple[Thing, ...]
Asked = tuple[str, str] | None


def _only(things: Things, matches: Callable[[Thing], bool]) -> Thing | None:
    found = [thing for thing in things if matches(thing)]
    return found[0] if len(found) == 1 else None


def _some(options: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return str(options[rng.integers(len(options))])


def _color_of(things: Things, rng: np.random.Generator) -> Asked:
    thing = things[rng.integers(len(things))]
    if _only(things, lambda other: other.kind == thing.kind) is None:
        return None
    return f"What color is the {thing.kind}?", thing.color


def _shape_of(things: Things, rng: np.random.Generator) -> Asked:
    thing = things[rng.integers(len(things))]
    if _only(things, lambda other: other.color == thing.color) is None:
        return None
    return f"What is {thing.color}?", thing.kind


def _thing_at(things: Things, rng: np.random.Generator) -> Asked:
    place = int(rng.integers(len(PLACES))) if rng.random() < 0.2 else things[rng.integers(len(things))].place
    thing = _only(things, lambda other: other.place == place)
    return f"What is at the {PLACES[place]}?", thing.name if thing else "nothing"


def _place_of(things: Things, rng: np.random.Generator) -> Asked:
    thing = things[rng.integers(len(things))]
    if _only(things, lambda other: other.name == thing.name) is None:
        return None
    return f"Where is the {thing.name}?", PLACES[thing.place]


def _count_kind(things: Things, rng: np.random.Generator) -> Asked:
    kind = _some(SHAPES, rng) if rng.random() < 0.25 else things[rng.integers(len(things))].kind
    if kind == DIGIT:
        return None
    return f"How many {kind}s are there?", str(sum(thing.kind == kind for thing in things))


def _count_shapes(things: Things, rng: np.random.Generator) -> Asked:
    return "How many shapes are there?", str(sum(thing.kind != DIGIT for thing in things))


def _count_color(things: Things, rng: np.random.Generator) -> Asked:
    color = _some(list(COLORS), rng) if rng.random() < 0.25 else things[rng.integers(len(things))].color
    return f"How many things are {color}?", str(sum(thing.color == color for thing in things))


def _digit_value(things: Things, rng: np.random.Generator) -> Asked:
    thing = _only(things, lambda other: other.kind == DIGIT)
    if thing is None and rng.random() < 0.8:
        return None
    return "Which digit is shown?", "none" if thing is None else str(thing.digit)


def _is_there(things: Things, rng: np.random.Generator) -> Asked:
    names = {thing.name for thing in things}
    name = _some(sorted(names), rng) if rng.random() < 0.5 else f"{_some(list(COLORS), rng)} {_some(SHAPES, rng)}"
    return f"Is there a {name}?", "yes" if name in names else "no"


def _compare(things: Things, rng: np.random.Generator) -> Asked:
    if len(things) < 2:
        return None
    first, second = (things[i] for i in rng.permutation(len(things))[:2])
    if any(_only(things, lambda other, name=thing.name: other.name == name) is None for thing in (first, second)):
        return None
    if rng.random() < 0.5:
        word, difference = "left of", second.column - first.column
    else:
        word, difference = "above", second.row - first.row
    if difference == 0:
        return None
    return f"Is the {first.name} {word} the {second.name}?", "yes" if difference > 0 else "no"


QUESTION_KINDS: dict[str, Callable[[Things, np.random.Generator], Asked]] = {
    "color": _color_of, "shape": _shape_of, "thing at": _thing_at, "place": _place_of, "count of kind": _count_kind,
    "count": _count_shapes, "count of color": _count_color, "digit": _digit_value, "existence": _is_there,
    "comparison": _compare,
}  # fmt: skip
"""Each gives a question with its answer, or None where the picture leaves the drawn question without one answer."""
