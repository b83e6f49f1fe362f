"""The library of llama.cpp: which one is taken, and that another layout of its structures is refused."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dynquant import llama_library
from dynquant.errors import LibraryError
from dynquant.llama_library import LlamaCpp, library_path, llama_cpp

RUN = """
import sys, torch
from pathlib import Path
from dynquant.encoding.ggml import encode
from dynquant.evaluation.llama_cpp import LlamaCppRunner
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.llama_library import library_path
weights, importance = torch.arange(4096.0).view(1, 8, 512).sin(), torch.arange(1.0, 513.0).view(1, 512)
blocks = [encode(QUANT_TYPES[name], weights, importance) for name in ("IQ2_XXS", "Q2_K", "Q4_K", "TQ1_0")]
runner = LlamaCppRunner(Path(sys.argv[1]), threads=1)
torch.save([str(library_path("llama")), blocks, runner.window_logits(range(64))], sys.argv[2])
"""


@pytest.fixture
def fresh(monkeypatch):
    """Look for libraries anew, and again behind the test."""
    caches = (library_path, llama_cpp, llama_library._opened)
    monkeypatch.delenv(llama_library.VARIABLE, raising=False)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_the_variable_goes_before_llama_cpp_python_and_that_before_xllamacpp(fresh, tmp_path):
    packages = {name: tmp_path / name for name in ("llama_cpp", "xllamacpp")}
    own = tmp_path / "own"
    for folder in (packages["llama_cpp"] / "lib", packages["xllamacpp"], own):
        folder.mkdir(parents=True)
    libraries = [
        own / "libllama.so",
        packages["llama_cpp"] / "lib/libllama.so",
        packages["xllamacpp"] / "xllamacpp.abi3.so",
    ]
    for library in libraries:
        library.touch()
    fresh.setattr(llama_library, "_package", lambda name: packages.get(name))
    fresh.setattr(llama_library, "_NAMES", ("lib{}.so",))
    for chosen in (own, own / "libllama.so"):
        fresh.setenv(llama_library.VARIABLE, str(chosen))
        library_path.cache_clear()
        assert library_path("llama") == own / "libllama.so"
    assert library_path("ggml-base") == own / "libllama.so"  # one file may hold all
    for file in (own / "another.so", own / "libggml-base.so.0", own / "libmtmd.so"):
        file.touch()
    fresh.setenv(llama_library.VARIABLE, str(own / "another.so"))
    library_path.cache_clear()
    assert library_path("llama") == own / "another.so" and library_path("mtmd") == own / "libmtmd.so"
    fresh.setenv(llama_library.VARIABLE, str(tmp_path / "nothing"))
    library_path.cache_clear()
    with pytest.raises(LibraryError, match="which is no library"):
        library_path("mtmd")
    fresh.setenv(llama_library.VARIABLE, "")
    for library in libraries[1:]:
        library_path.cache_clear()
        assert library_path("llama") == library
        del packages["llama_cpp" if "llama_cpp" in packages else "xllamacpp"]
    library_path.cache_clear()
    with pytest.raises(LibraryError, match="Neither llama-cpp-python nor xllamacpp is installed"):
        library_path("llama")
    assert not llama_library.is_installed()


def test_what_computes_is_loaded_where_it_lies_in_files_of_its_own(fresh, tmp_path):
    (tmp_path / "libggml.so").touch()
    for name, built_in in (("releases", 0), ("a build in one piece", 3)):
        loaded = []
        ggml = SimpleNamespace(
            ggml_backend_load_all_from_path=loaded.append, ggml_backend_reg_count=lambda count=built_in: count
        )
        fresh.setattr(llama_library, "_opened", lambda path, ggml=ggml: ggml if path.stem == "libggml" else object())
        fresh.setattr(LlamaCpp, "_fitting", lambda *_: None)
        fresh.setattr(llama_library, "library_path", lambda _: tmp_path / "libllama.so")
        LlamaCpp()
        assert loaded == ([] if built_in else [os.fsencode(tmp_path)]), name


def test_structures_of_another_layout_are_refused(fresh):
    layout = llama_library._structure("n_ctx:u n_batch:u", {"n_ctx": 2048})
    fresh.setattr(llama_library, "_CONTEXTS", [layout])
    with pytest.raises(LibraryError, match=r"The structures of .* are of another release. Install llama-cpp-python"):
        LlamaCpp()


def test_defaults_are_those_that_llama_cpp_python_declares():
    api = pytest.importorskip("llama_cpp")
    for name in ("llama_model_default_params", "llama_context_default_params"):
        ours, theirs = getattr(LlamaCpp(), name)(), getattr(api, name)()
        names = [field for field, _ in type(ours)._fields_ if field != "tail"]
        values = [
            value.value if isinstance(value := getattr(theirs, field), ctypes.c_void_p) else value for field in names
        ]
        plain = [
            (ours_, value)
            for ours_, value in zip(map(ours.__getattribute__, names), values, strict=True)
            if isinstance(value, int | float)
        ]
        assert len(plain) > 8 and all(one == other for one, other in plain)


@pytest.mark.nightly
def test_both_libraries_give_the_same_blocks_and_logits(small_moe, tmp_path):
    import torch

    from dynquant.families.open import open_model
    from tests.helpers.tiny_models import write_f32

    package = importlib.util.find_spec("xllamacpp")
    if package is None:
        pytest.skip("xllamacpp is not installed")
    prebuilt = next(file for file in os.scandir(os.path.dirname(package.origin)) if file.name.endswith((".so", ".pyd")))
    file = write_f32(open_model(small_moe), tmp_path / "model.gguf")
    results = []
    for variables in ({}, {llama_library.VARIABLE: prebuilt.path}):
        command = [sys.executable, "-c", RUN, str(file), str(tmp_path / "result")]
        subprocess.run(command, check=True, env=os.environ | variables)
        results.append(torch.load(tmp_path / "result"))
    (path, blocks, logits), (other_path, other_blocks, other_logits) = results
    assert path != other_path == prebuilt.path
    assert all(torch.equal(one, other) for one, other in zip(blocks, other_blocks, strict=True))
    torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=0)
