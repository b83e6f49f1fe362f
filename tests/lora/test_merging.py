"""Merged adapters: packed weights encoded again, under the statistics of the export."""

import copy

import pytest
import torch

from dynquant.errors import AdapterError, StatsError
from dynquant.packed.layers import set_layout
from tests.helpers.adapters import bytes_of, logits, randomized
from tests.helpers.tiny_models import mean_kl

pytest.importorskip("peft", reason="peft is not installed")
from dynquant.lora import add_adapter, load_adapter, merge


@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_merging_encodes_again(model, saved, tmp_path, layout):
    from transformers import AutoModelForCausalLM

    base = copy.deepcopy(model)
    assert base.config.quantization_config.provenance["stats_hash"] == ""  # made without statistics
    set_layout(base, layout)
    adapted = load_adapter(base, saved)
    wanted, before = logits(adapted), logits(model)
    merged = merge(adapted, encoder="ggml")
    found = logits(merged)
    assert not any("lora" in name for name, _ in merged.named_modules())
    # What is left is rounding: of the same size as that of the base, of which the adapter knows nothing.
    assert mean_kl(wanted[0], found[0]) < 0.5 * mean_kl(wanted[0], before[0])
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), found)
    assert "merged_adapter" in again.config.quantization_config.provenance


@pytest.mark.nightly
def test_merging_encodes_under_the_statistics_of_the_export(tiny_text, tmp_path):
    from transformers import AutoModelForCausalLM

    from dynquant.calibration.options import CalibrationOptions
    from dynquant.exporters.options import ExportOptions
    from dynquant.exporters.stage import export

    source = tiny_text("deepseek-v3")
    output, calibration = tmp_path / "out", CalibrationOptions(tokens=2048, hessians="activations")
    kinds = {"format": "safetensors", "preset": "uniform-q4_k", "encoder": "ggml", "tune": 0}
    export(ExportOptions(model=str(source), output=output, calibration=calibration, **kinds))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert "Q4_K" in base.config.quantization_config.types.values()
    base_logits = logits(base)
    adapted = randomized(add_adapter(base, rank=4), std=0.2)
    before = {
        name: parameter.clone() for name, parameter in adapted.named_parameters() if parameter.dtype == torch.uint8
    }
    wanted = logits(adapted)
    merged = merge(adapted, stats=tmp_path / "out.stats.safetensors", encoder="dynquant")
    assert mean_kl(wanted[0], logits(merged)[0]) < 0.5 * mean_kl(wanted[0], base_logits[0])
    after = dict(merged.named_parameters())
    changed = set()
    for name, old in before.items():
        bare = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert after[bare].shape == old.shape
        if not torch.equal(after[bare], old):
            changed.add(bare.rpartition(".")[2] if "experts" in bare else bare.split(".")[-2])
    assert changed >= {"gate_proj", "up_proj", "down_proj", "o_proj", "kv_b_proj", "q_b_proj"}
    assert not changed & {"embed_tokens", "lm_head"}


def test_merging_asks_for_the_statistics_and_checks_them(model, saved, tmp_path):
    adapted = load_adapter(copy.deepcopy(model), saved)
    adapted.get_base_model().config.quantization_config.provenance = {}  # as of a file that others made
    before = bytes_of(adapted)
    with pytest.raises(AdapterError, match=r"dynquant\.lora\.merge"):
        adapted.merge_and_unload()
    with pytest.raises(StatsError, match=r"encoded under statistics.*stats\.safetensors"):
        merge(adapted)
    other = tmp_path / "stats.safetensors"
    other.write_bytes(b"other")
    adapted.get_base_model().config.quantization_config.provenance = {"stats_hash": "0" * 64}
    with pytest.raises(StatsError, match="hash"):
        merge(adapted, stats=other)
    with pytest.raises(StatsError, match="no "):
        merge(adapted, stats=tmp_path / "none.safetensors")
    assert bytes_of(adapted) == before
