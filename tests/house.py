"""Counts the house: `python tests/house.py` prints what the layout promises beside what is there.

Folders of at most 12 modules, modules of at most 500 lines (Triton 600), functions of at most 60 lines and 8 parameters
(but kernels), docstrings that are sentences, printing in `cli` alone, and names that say what they are and are there.
`tests/test_layout.py` asserts that nothing is over its limit.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("dynquant", "kernels", "analysis", "exporters")
MAX_MODULES, MAX_MODULE, MAX_TRITON, MAX_FUNCTION, MAX_PARAMETERS = 12, 500, 600, 60, 8
MAX_README = 140
BANNED_MODULES = re.compile(r"serving|served|workflow|commands|utils|helpers")
VISION_PLACES = (
    "dynquant/families/vision/",
    "dynquant/checkpoints/vision_names.py",
    "dynquant/planning/vision_modules.py",
    "analysis/bench/vision_modules.py",
)
NO_SENTENCE = re.compile(r"(Of|What|Inside|How|Whether|Where)\b")
VAGUE_NAMES = {"found", "one", "wanted", "made", "own", "known"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package; `place` is its path in the repository."""

    place: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def folder(self) -> str:
        return self.place.rpartition("/")[0]

    @property
    def is_package(self) -> bool:
        return self.place.endswith("/__init__.py")

    @property
    def num_lines(self) -> int:
        return self.text.count("\n")

    @property
    def is_kernel(self) -> bool:
        """Whether launches and block formulas, with their many parameters, live here."""
        is_compiled = "/search/compiled/" in self.place and not self.place.endswith("tiles.py")
        return self.place.startswith("kernels/") or self.place.endswith("_kernels.py") or is_compiled

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def read_modules() -> list[Module]:
    """Read every module of the four top folders."""
    paths = sorted(path for top in TOPS for path in (ROOT / top).rglob("*.py"))
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def crowded_folders(modules: list[Module]) -> list[str]:
    counts = Counter(module.folder for module in modules)
    return [f"{folder}: {count} modules" for folder, count in counts.items() if count > MAX_MODULES]


def long_modules(modules: list[Module]) -> list[str]:
    return [
        f"{module.place}: {module.num_lines} lines"
        for module in modules
        if module.num_lines > (MAX_TRITON if module.place.startswith("kernels/triton") else MAX_MODULE)
    ]


def misnamed_modules(modules: list[Module]) -> list[str]:
    banned = [module.place for module in modules if BANNED_MODULES.search(module.place)]
    vision = [module.place for module in modules if "vision" in module.place]
    return banned + [place for place in vision if not place.startswith(VISION_PLACES)]


def long_functions(modules: list[Module]) -> list[str]:
    return [
        f"{module.place}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for module in modules
        if not module.is_kernel
        for node in module.functions()
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]


def many_parameters(modules: list[Module]) -> list[str]:
    counts = [
        (module.place, node.name, sum(arg.arg != "self" for arg in node.args.args + node.args.kwonlyargs))
        for module in modules
        if not module.is_kernel
        for node in module.functions()
    ]
    return [f"{place}: {name} has {count} parameters" for place, name, count in counts if count > MAX_PARAMETERS]


def no_sentences(modules: list[Module]) -> list[str]:
    """List docstrings, of attributes too, that begin with a word that makes no sentence."""
    return [
        f"{module.place}:{node.lineno}: {node.value.value.strip().splitlines()[0][:70]}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if NO_SENTENCE.match(node.value.value.strip())
    ]


def printing_modules(modules: list[Module]) -> list[str]:
    """List modules outside `cli` that print, or that know the terminal."""
    prints = re.compile(r"^\s*print\(|sys\.std(out|err)\.write|^\s*(from|import) (rich|dynquant\.cli)\b", re.MULTILINE)
    places = [module.place for module in modules if prints.search(module.text)]
    return [place for place in places if not re.match(r"dynquant/(cli/|__main__)|(kernels|analysis)/bench/", place)]


def vague_names(modules: list[Module]) -> list[str]:
    """List assignments to names of the moment."""
    return [
        f"{module.place}:{node.lineno}: {node.id}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE_NAMES
    ]


def lost_names(modules: list[Module]) -> list[str]:
    """List modules, and names in them, that are named in backticks (`families.open.open_model`, `open.py`) and are
    not there."""
    texts = {
        re.sub(r"^dynquant/|(/__init__)?\.py$", "", module.place).replace("/", "."): module.text for module in modules
    }
    folders = {name.partition(".")[0] for name in texts if "." in name}
    lost = []
    for module in modules:
        for name in re.findall(r"`(?:dynquant\.)?((?:\w+\.)+\w+)`", module.text):
            parts = name.split(".")
            ends = [end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in texts]
            if parts[-1] == "py":
                is_there = any(other.place.endswith(f"/{parts[0]}.py") for other in modules)
            elif parts[0] not in folders:
                continue
            else:
                inside = parts[ends[0]] if ends and ends[0] < len(parts) else ""
                is_there = bool(ends) and re.search(rf"\b{inside}\b", texts[".".join(parts[: ends[0]])])
            lost += [] if is_there else [f"{module.place}: `{name}`"]
    return lost


def lost_rows(modules: list[Module]) -> list[str]:
    """List rows of maps in docstrings of folders (`    name, name    words`) that name no module or folder there."""
    places = {place for module in modules for place in (module.place.removesuffix(".py"), module.folder)}
    return [
        f"{module.place}: {name}"
        for module in modules
        if module.is_package
        for names in re.findall(r"^ {4}(\w+(?:, \w+)*) {2,}[^`\s]", ast.get_docstring(module.tree) or "", re.MULTILINE)
        for name in names.split(", ")
        if f"{module.folder}/{name}" not in places
    ]


CHECKS = (
    crowded_folders,
    long_modules,
    misnamed_modules,
    long_functions,
    many_parameters,
    no_sentences,
    printing_modules,
    vague_names,
    lost_names,
    lost_rows,
)


def main() -> None:
    modules = read_modules()
    lines = sum(module.num_lines for module in modules)
    comments = sum(bool(re.match(r"\s*#", line)) or "  # " in line for m in modules for line in m.text.splitlines())
    readme = (ROOT / "README.md").read_text().count("\n")
    print(f"{len(modules)} modules, {lines:,} lines; README {readme} (at most {MAX_README})")
    print(f"{comments} lines have a comment, {100 * comments / lines:.1f} %")
    for check in CHECKS:
        problems = check(modules)
        print(f"{check.__name__}: {len(problems)}", *problems, sep="\n    ")


if __name__ == "__main__":
    main()
