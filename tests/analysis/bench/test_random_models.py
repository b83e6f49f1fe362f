"""Random checkpoints: what transformers and dynquant read of them, and refusals."""

from pathlib import Path

import pytest
import torch

from dynquant.analysis.bench.random_models import SHAPES, write_random_checkpoint
from dynquant.errors import ExportError
from dynquant.families.open import open_model
from dynquant.running.load import load_hf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "tiny"
    write_random_checkpoint("tiny", directory)
    return directory


def test_transformers_and_dynquant_read_the_same_weights(tiny: Path) -> None:
    model = open_model(tiny)
    hf_model = load_hf(model)
    experts = hf_model.model.layers[1].mlp.experts
    assert torch.equal(model.source.load("blk.1.ffn_up_exps.weight", 3), experts.gate_up_proj[3, 256:])
    assert torch.equal(model.source.load("blk.1.ffn_down_exps.weight", 7), experts.down_proj[7])
    assert model.hyper.n_expert == SHAPES["tiny"][1]["n_routed_experts"]
    assert 0.1 < float(hf_model(torch.arange(64)[None]).logits.detach().std()) < 10


def test_fewer_layers(tmp_path: Path) -> None:
    write_random_checkpoint("tiny", tmp_path / "two", layers=2)
    assert open_model(tmp_path / "two").hyper.n_layer == 2


def test_equal_seeds_give_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    write_random_checkpoint("tiny", tmp_path / "same")
    write_random_checkpoint("tiny", tmp_path / "other", seed=1)
    weights = (tiny / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_a_checkpoint_is_not_overwritten(tiny: Path) -> None:
    with pytest.raises(ExportError, match="is there already"):
        write_random_checkpoint("tiny", tiny)
