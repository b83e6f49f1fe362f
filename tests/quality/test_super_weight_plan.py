"""From checkpoint to plan: a super weight in a routed expert is found, and keeps that tensor precise."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.analysis.outliers.super_weights import DownScan
from dynquant.calibration.options import CalibrationOptions
from dynquant.families.open import open_model
from dynquant.planning.options import PlanOptions
from dynquant.planning.stage import make_plan
from dynquant.planning.target import Target
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.running.weight_inputs import weight_inputs

NAME, ROW = "blk.3.ffn_down_exps.weight", 37
TEXT = "The cat (noun): a small animal that is kept in houses. def area(radius): return 3.14159 * radius ** 2. " * 24


@pytest.fixture
def planted(small_moe, tmp_path):
    """A copy of the bundled model with one dominating weight in a routed expert; its directory, and its column."""
    directory = tmp_path / "model"
    shutil.copytree(small_moe, directory)
    model = open_model(small_moe)
    tokens = torch.tensor(load_tokenizer(model)(TEXT)["input_ids"][:256])
    hf_model = load_hf(model)
    spikes = DownScan(hf_model, weight_inputs(model, hf_model), tokens).run()[0]
    usual = sorted(abs(spike.max_out) for spike in spikes)[len(spikes) // 2]
    strongest = max((spike for spike in spikes if spike.name == NAME), key=lambda spike: abs(spike.max_in))
    tensors = load_file(directory / "model.safetensors")
    stored = tensors[f"model.layers.3.mlp.experts.{strongest.expert}.down_proj.weight"]
    stored[ROW, strongest.in_channel] = 100 * usual / abs(strongest.max_in)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, strongest.in_channel


@pytest.mark.nightly
def test_a_planted_super_weight_in_a_routed_expert_keeps_that_tensor_precise(planted, tmp_path):
    directory, column = planted
    (tmp_path / "text.txt").write_text(TEXT)
    options = CalibrationOptions(text=str(tmp_path / "text.txt"), tokens=1024, window=256, hessians="none")
    target = Target(bpw=3.2, types=("Q2_K", "Q6_K"))
    made = make_plan(PlanOptions(model=str(directory), output=tmp_path / "plan", target=target, calibration=options))
    entries = {entry.name: entry for entry in made.entries}
    assert entries[NAME].type == "Q6_K"
    assert f"super weight [{ROW},{column}]" in entries[NAME].reason
    others = [entry for name, entry in entries.items() if name.endswith("_down_exps.weight") and name != NAME]
    assert {entry.type for entry in others} == {"Q2_K"}
    assert not any("super weight" in entry.reason for entry in others)
