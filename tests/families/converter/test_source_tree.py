"""llama.cpp's source tree is found where it was named or fetched, and never is where it was not agreed to."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from dynquant.errors import CheckpointError
from dynquant.families.converter import source_tree
from dynquant.families.open import open_model
from tests.helpers.commands import refused, run, succeed

FILES = ("conversion/__init__.py", "conversion/base.py", "gguf-py/gguf/__init__.py", "LICENSE")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is the test's own, and no tree from outside."""
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("DYNQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree(folder: Path) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def make_archive(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return path


@pytest.fixture
def olmo(tmp_path: Path, small_moe: Path) -> Path:
    """A directory of an architecture that dynquant has no family for."""
    directory = tmp_path / "olmo"
    shutil.copytree(small_moe, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    return directory


def test_without_a_tree_every_way_is_named(olmo: Path) -> None:
    said = refused("plan", olmo, "--bpw", 4, "-o", olmo.parent / "plan")
    for way in ("--llama-cpp", "LLAMA_CPP_DIR", "fetch-llama-cpp", "--base-gguf", "olmo2"):
        assert way in said
    assert not (olmo.parent / "plan").exists()


def test_a_folder_that_is_no_tree_is_refused(olmo: Path, small_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is no source tree of llama.cpp" in refused("calibrate", olmo, "--llama-cpp", olmo, "-o", "s.safetensors")
    for command in (("version",), ("inspect", small_moe)):  # which need none
        assert "absent (--llama-cpp, or" in refused(*command, "--llama-cpp", olmo / "absent")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(olmo / "absent"))
    with pytest.raises(CheckpointError, match="absent"):
        open_model(olmo)


def test_the_tree_of_the_option_goes_before_the_fetched_one(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source_tree.find_tree() is None
    fetched = make_tree(source_tree.fetched_tree())
    make_tree(empty_cache / "llama.cpp-0.0.1")
    assert source_tree.find_tree() == fetched
    inside = make_tree(tmp_path / "sdist" / "vendor" / "llama.cpp")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "sdist"))
    assert source_tree.find_tree() == inside


def test_an_archive_gives_the_converter_and_nothing_else(tmp_path: Path) -> None:
    names = [f"llama_cpp_python-1.0/vendor/llama.cpp/{name}" for name in (*FILES, "src/llama.cpp", "../../evil")]
    archive = make_archive(tmp_path / "a.tar.gz", *names, "llama_cpp_python-1.0/setup.py")
    tree = source_tree.unpack_tree(archive, source_tree.fetched_tree())
    assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == set(FILES)
    assert source_tree.find_tree() == tree
    assert "is there already" in succeed("fetch-llama-cpp")


def test_an_archive_without_a_converter_leaves_nothing(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "broken.tar.gz").write_bytes(b"no archive")
    for archive in (make_archive(tmp_path / "other.tar.gz", "other-1.0/setup.py"), tmp_path / "broken.tar.gz"):
        with pytest.raises(CheckpointError, match=r"converter of llama|cannot be unpacked"):
            source_tree.unpack_tree(archive, source_tree.fetched_tree())
    assert not any(empty_cache.glob("*"))


def test_nothing_is_fetched_without_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tree, "fetch_tree", lambda: pytest.fail("fetched"))
    for typed, why in (("n\n", "the answer was no"), ("", "nobody answered")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        done = run("fetch-llama-cpp")
        assert done.returncode == 1 and "70 MB" in done.stdout
        assert f"error: Nothing was fetched: {why}. Give --yes" in done.stderr


def test_pip_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_tree, "_installed_version", lambda: None)
    assert "is not installed" in refused("fetch-llama-cpp", "--yes")
    monkeypatch.setattr(source_tree, "_installed_version", lambda: "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "could not fetch" in refused("fetch-llama-cpp", "--yes")


def test_a_tree_of_another_version_is_said(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = make_tree(empty_cache / "llama.cpp-0.0.1")
    monkeypatch.setattr(source_tree, "_installed_version", lambda: "1.0")
    with pytest.warns(UserWarning, match=r"llama.cpp-0.0.1.*1.0 is installed"):
        assert source_tree.find_tree() == older


def test_a_relative_cache_is_known_by_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNQUANT_CACHE", "here")
    assert source_tree.cache_directory() == tmp_path / "here"
