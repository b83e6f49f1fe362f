"""Speeds in vLLM: the configuration of a shape in a scheme, and what becomes of a vLLM that is not there."""

import sys

import pytest

from dynquant.analysis.bench.random_models import write_headers
from dynquant.analysis.bench.readers import interpreter
from dynquant.analysis.bench.vllm_speed import __main__ as vllm_speed
from dynquant.errors import LibraryError, PlanError
from dynquant.families.open import open_model
from tests.readers import programs


def test_a_shape_has_the_configuration_of_an_export(tmp_path) -> None:
    write_headers("tiny", tmp_path / "tiny", num_hidden_layers=2)
    assert (tmp_path / "tiny" / "model.safetensors").stat().st_blocks < 200
    model = open_model(tmp_path / "tiny")
    config = vllm_speed.scheme_config(model, "FP8/w2a16")
    fp8, experts = config["quantization_config"]["config_groups"].values()
    assert (fp8["weights"]["type"], experts["weights"]["num_bits"]) == ("float", 2)
    assert all("experts" in target for target in experts["targets"])
    assert config["num_hidden_layers"] == 2
    with pytest.raises(PlanError, match="w1a16"):
        vllm_speed.scheme_config(model, "w1a16")


def test_a_vllm_that_is_not_there_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DYNQUANT_READERS", str(tmp_path / "readers"))
    for asked, python in ((str(tmp_path / "python"), "python"), (None, "readers/vllm/bin/python")):
        with pytest.raises(LibraryError, match=rf"{tmp_path}/{python} is not there: `\.ci/readers` sets vllm up"):
            interpreter("vllm", asked)
    with pytest.raises(programs.Missing, match=rf"{tmp_path}/readers/python/bin/python is not there"):
        programs.interpreter("python")
    row = vllm_speed.cells(vllm_speed.run_vllm(sys.executable, str(tmp_path), ["1", "16"]), 2)
    assert row == ["refused: ModuleNotFoundError: No module named 'vllm'", "", ""]
