"""What the system refuses, readers that go, and packages that are missing: one paragraph with the right reason."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.commands import command, linked_copy, refused, run, succeed
from tests.helpers.representatives import represented_by

HIDE = """
import sys
from tests.helpers.commands import run

names = sys.argv[1].split(",")

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
for line in sys.stdin:
    done = run(*line.split())
    print(done.returncode, (done.stderr.splitlines() or [""])[-1])
"""
"""Runs commands, one a line, without the packages that are named; prints the exit status and the last words of each."""
EXTRAS = (
    "transformers,accelerate,datasets,sentencepiece,scipy,tokenizers,huggingface_hub,llama_cpp,matplotlib,peft,trl,ray,"
    "PIL,triton,pyarrow"
)
NEED_EXTRAS = """
calibrate {m} -o {t}/s.safetensors
analyze {m} --stats {t}/s.safetensors -o {t}/e.json
plan {m} -o {t}/plan
plan {m} --for vllm -o {t}/plan
plan --config-only {m} --preset f16
export {m} --preset f16 -o {t}/a.gguf
export {m} --preset f16 --ray auto -o {t}/a.gguf
export {m} --preset uniform-w8a16 -f compressed-tensors -o {t}/ct
tune {g} --reference {m} -o {t}/t.gguf
eval {g} --reference {m} --text {text}
eval {m} --reference {g} --text {text}
compare {m} --presets f16 --text {text} -o {t}/c
compare-encoders {m} --presets f16 --text {text} -o {t}/c
finetune {m} --data {text} -o {t}/f
heal {m} --reference {m} --data {text} -o {t}/h
super-weights {m}
demo -o {t}/demo
calibrate owner/name -o {t}/s.safetensors
"""
NEED_NONE = """
inspect {g}
inspect {m}
recipe {g}
diff {g} {g}
version
"""


@pytest.fixture(scope="module")
def exported(small_moe, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.gguf"
    succeed("export", small_moe, "--preset", "f16", "-o", path)
    return path


@pytest.fixture
def unprivileged():
    """A folder outside pytest's private ones, used as a user to whom permissions apply."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        is_root = os.geteuid() == 0
        yield Path(name), (lambda: os.seteuid(65534)) if is_root else lambda: None
        if is_root:
            os.seteuid(0)


def shell(line, *arguments):
    """Run a line of bash in which `"$@"` is a command; returns exit status, output and errors."""
    done = subprocess.run(["bash", "-c", line, "bash", *command(*arguments)], capture_output=True, text=True, cwd="/")
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "line",
    represented_by(
        ('"$@" 2>&1 | head -0; exit ${PIPESTATUS[0]}',),
        (
            '"$@" 2>&1 | head -0; exit ${PIPESTATUS[0]}',  # no reader
            '"$@" | true; exit ${PIPESTATUS[0]}',  # none of results
            '"$@" >&- 2>&- <&-',
            '"$@" --json-progress >(head -c 1 >&2)',  # none of progress
            '"$@" 2>/dev/full',
        ),
    ),
)
@pytest.mark.nightly
def test_an_export_outlives_who_listens(line, small_moe, exported, tmp_path):
    status, _, said = shell(line, "export", small_moe, "--preset", "f16", "-o", tmp_path / "model.gguf")
    assert status == 0 and "Traceback" not in said and "Exception ignored" not in said
    assert (tmp_path / "model.gguf").read_bytes() == exported.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    "arguments",
    represented_by((("inspect", "--json"),), (("inspect",), ("inspect", "--json"), ("recipe",), ("--help",))),
)
def test_results_that_cannot_be_written_are_a_refusal(arguments, exported):
    more = () if arguments == ("--help",) else (exported,)
    status, _, said = shell('"$@" >/dev/full', *arguments, *more)
    assert status == 1 and said.startswith("error: Standard output cannot be written: No space left on device")
    assert len(said.splitlines()) == 1
    status, result, said = shell('"$@" | head -c 1; exit ${PIPESTATUS[0]}', *arguments, *more)
    assert (status, len(result), said) == (0, 1, "")


@pytest.mark.parametrize(
    "line",
    represented_by(
        ("9000 export --preset f16 -f gguf",),
        (
            "9000 export --preset f16 -f gguf",
            "9000 export --preset f16 -f safetensors",
            "1000 calibrate --tokens 256",
            "4 plan --tokens 256 --bpw 5 --types q4_k,q8_0",
        ),
    ),
)
def test_a_file_that_may_not_grow_leaves_nothing_behind(line, small_moe, tmp_path):
    blocks, name, *options = line.split()
    limited, output = (
        f'ulimit -f {blocks}; "$@"',
        tmp_path / ("output.gguf" if "gguf" in options else "output.safetensors" if name == "calibrate" else "output"),
    )
    status, _, said = shell(limited, name, small_moe, *options, "-o", output)
    assert status == 1 and "Traceback" not in said and "File too large" in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_progress_is_named_and_the_export_goes_on_later(small_moe, exported, tmp_path):
    arguments = ("export", small_moe, "--preset", "f16", "-o", tmp_path / "model.gguf")
    message = refused(*arguments, "--json-progress", "/dev/full")
    assert "--json-progress cannot be written: No space left on device" in message
    succeed(*arguments)
    assert (tmp_path / "model.gguf").read_bytes() == exported.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("inspect {long}", "File name too long"),
        ("inspect {t}/folder.gguf", "folder.gguf is a directory, not a GGUF file"),
        ("recipe {t}/folder.gguf", "folder.gguf is a directory"),
        ("export {m} --preset f16 -o {long}.gguf", "File name too long"),
        ("export {m} --preset f16 -o {t}/{name}.gguf", "File name too long"),
        ("plan {m} -o {t}/file", "is a file"),
        ("plan {m} -o {t}/file/plan", "file is no directory"),
        ("calibrate {m} -o {t}/folder", "is a directory"),
        ("calibrate {m} -o {t}/file/stats.safetensors", "file is no directory"),
        ("analyze {m} --stats {t}/none -o {t}/e.json", "none cannot be read: No such file"),
        ("analyze {m} --stats {t}/folder -o {t}/e.json", "folder cannot be read: Is a directory"),
        ("eval {g} --reference {m} --text {t}/file -o {t}/folder", "is a directory"),
        ("export {m} --preset f16 -o {t}/folder", "is a directory"),
        ("export {m} --preset f16 -f safetensors -o {t}/file", "is a file"),
        ("export {m} --preset f16 -f safetensors -o {t}/a.gguf", "a folder is written"),
        ("export {m} --preset f16 -o {t}/a.safetensors", "does not end in .gguf"),
        ("export {m} --preset f16 --split-max-size 9MB -o {t}/a.bin", "name it {t}/a.gguf"),
        ("export {m} --preset uniform-iq2_xxs -o {t}/a.bin", "name it {t}/a.gguf"),
        ("export {m} --preset uniform-iq2_xxs --tune 9 -o {t}/a.bin", "name it {t}/a.gguf"),
        ("export {m} --preset uniform-iq2_xxs --asymmetric 9 -o {t}/a.bin", "name it {t}/a.gguf"),
        ("tune {g} --reference {m} -o {t}/a.bin", "name it {t}/a.gguf"),
        ("export-adapter {m} -o {t}/a.bin", "name it {t}/a.gguf"),
        ("finetune {m} --data {t}/file -o {t}/file2/adapter --json-progress {t}/folder", "is a directory"),
        ("measure-machine -o {t}/folder", "is a directory"),
        ("demo -o {t}/file", "is a file"),
        ("export {m} --plan {t}/folder -o {t}/a.gguf", "folder is a directory without plan.json"),
        ("plan {m} --like {t}/folder -o {t}/p", "folder is a directory without plan.json"),
        ("export {m} --plan {p} --stats {p} -o {t}/a.gguf", "is a directory; give the stats.safetensors in it"),
        ("inspect {p}", "is the folder of a plan of dynquant, not a model. Give the directory of"),
        ("calibrate {p} -o {t}/s.safetensors", "is the folder of a plan of dynquant, not a model; give the directory"),
        ("diff {p} {t}/folder", "Give a plan, its folder or a .gguf file."),
        ("recipe {t}/folder", "folder is a directory without plan.json"),
        ("diff {g} {t}/folder", "folder is a directory without plan.json"),
        ("plan {m} --recipe {t}/folder -o {t}/p", "folder is a directory; give a file in it"),
        ("plan {m} --recipe /dev/null -o {t}/p", "null is a device or pipe"),
        ("finetune {m} --data {t}/none.txt -o {t}/f", "There is no file"),
        ("calibrate {m} --calibration {t}/folder -o {t}/s.safetensors", "folder"),
        ("export {m} --preset f16 -o /", "is a directory"),
        ("calibrate {m} -o /", "is a directory"),
        ("analyze {m} --stats {t}/none -o .", "is a directory"),
        ("calibrate {m} --max-memory 4GB --spill {t}/file -o {t}/s.safetensors", "file (--spill) is a file"),
        ("eval {m} --reference {m} --text {t}/file -o {t}", "(--output) is a directory"),
    ],
)
def test_paths_of_the_wrong_kind_are_named_before_any_work(
    arguments, words, small_moe, exported, planned_16m, tmp_path
):
    (tmp_path / "file").write_text("text")
    for name in ("folder", "folder.gguf"):
        (tmp_path / name).mkdir()
    names = {"m": small_moe, "g": exported, "t": tmp_path, "p": planned_16m, "long": "x" * 300, "name": "x" * 240}
    message = refused(*(word.format(**names) for word in arguments.split()))
    assert words.format(**names) in message and "corrupt" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "folder.gguf"]


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        ("inspect {t}/model.gguf", "model.gguf"),
        ("inspect {t}/model", "model/model.safetensors"),
        ("export {t}/model --preset f16 -o {t}/a.gguf", "model/config.json"),
        ("export {t}/model --preset f16 -o {t}/a.gguf", "model/model.safetensors"),
        ("export {t}/model --preset f16 -o {t}/a.gguf", "model/tokenizer.json"),
        ("export {t}/model --preset f16 -o {t}/a.gguf", "model"),
        ("export {t}/model --plan {t}/plan.json -o {t}/a.gguf", "plan.json"),
        ("analyze {t}/model --stats {t}/stats.safetensors -o {t}/e.json", "stats.safetensors"),
        ("calibrate {t}/model --imatrix {t}/model.gguf -o {t}/s.safetensors", "model.gguf"),
        ("calibrate {t}/model --calibration {t}/text.txt -o {t}/s.safetensors", "text.txt"),
        ("export-adapter {t}/adapter -o {t}/a.gguf", "adapter/adapter_config.json"),
    ],
)
def test_files_that_may_not_be_read_are_not_called_damaged(arguments, hidden, small_moe, exported, unprivileged):
    folder, become_user = unprivileged
    linked_copy(small_moe, folder / "model")
    for name in ("plan.json", "stats.safetensors", "text.txt", "adapter/adapter_config.json", "model.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"GGUF or any other content")
    if hidden.startswith("model/"):  # the links' file is everybody's
        content = (folder / hidden).read_bytes()
        (folder / hidden).unlink()
        (folder / hidden).write_bytes(content)
    (folder / hidden).chmod(0)
    become_user()
    message = refused(*(word.format(t=folder) for word in arguments.split()))
    assert "Permission denied" in message and Path(hidden).name in message
    assert not any(word in message for word in ("corrupt", "damaged", "etch it again", "is not a"))


@pytest.mark.parametrize(
    "output", ["calibrate {m} -o {t}/locked/s.safetensors", "plan {m} -o {t}/locked", "demo -o {t}/locked/new"]
)
def test_places_that_may_not_be_written_to_are_refused_before_any_work(output, small_moe, unprivileged):
    folder, become_user = unprivileged
    (folder / "locked").mkdir(mode=0o555)
    become_user()
    message = refused(*(word.format(m=small_moe, t=folder) for word in output.split()))
    assert "Permission denied" in message and "locked" in message


def test_every_command_names_the_extra_that_it_needs_and_the_core_alone_looks_into_files(small_moe, exported, tmp_path):
    names = {"m": small_moe, "g": exported, "t": tmp_path, "text": small_moe.parent / "demo_text.txt"}
    needing, free = (words.strip().format(**names).splitlines() for words in (NEED_EXTRAS, NEED_NONE))
    done = subprocess.run(
        [sys.executable, "-c", HIDE, EXTRAS], input="\n".join([*needing, *free]), capture_output=True, text=True,
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": ""},
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert len(said) == len(needing) + len(free), done.stderr[-2000:]
    for line, words in zip(needing, said, strict=False):
        extra = "train]" if line.startswith(("finetune", "heal")) else ""
        assert words.startswith("1 error: ") and f"pip install 'dynquant-toolchain[{extra}" in words, (line, words)
    assert {words[0] for words in said[len(needing) :]} == {"0"}


def test_a_name_that_is_not_utf8_is_refused_as_that(small_moe, tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b"/m\xff")
    linked_copy(small_moe, Path(name))
    message = refused("export", name, "--preset", "f16", "-o", tmp_path / "a.gguf")
    assert r"/$'m\xff'` has bytes that are not UTF-8. Rename the file" in message
    assert [path.name for path in tmp_path.iterdir()] == [Path(name).name]


def test_debug_shows_where_the_system_refused():
    with pytest.raises(OSError, match="too long"):
        run("inspect", "x" * 300, "--debug")
