"""Asymmetric calibration: matrices make up for what was lost before them, and an interrupted export goes on."""

import pytest
import torch

from dynquant.calibration.statistics import StatsProvenance
from dynquant.encoding.store import EncodedStore
from dynquant.exporters.asymmetric.cross_moments import CrossMoments
from tests.helpers.commands import run, succeed

PROVENANCE = StatsProvenance(fingerprint="a", text_hash="a", text_name="a", window=8, max_tokens=8, seed=0)


def test_a_correction_undoes_half_of_a_linear_loss_as_far_as_tokens_show_it():
    generator = torch.Generator().manual_seed(0)
    loss = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    x, weights = torch.randn(3200, 32, generator=generator), torch.randn(8, 32, generator=generator)
    y = x @ loss
    cross = CrossMoments()
    cross.add("many", y, x)
    cross.add("experts", y[:4], x[:4], num_experts=2)
    correction = cross.corrections(*cross.of_quantized(PROVENANCE, {}))
    before = float((y @ weights.T - x @ weights.T).norm())
    corrected = weights + weights @ correction["many"][0]
    assert float((y @ corrected.T - x @ weights.T).norm()) == pytest.approx(0.5 * before, rel=0.1)
    few, none = correction["experts"]
    assert 0 < few.norm() < 0.5 * correction["many"].norm() and not none.any()


@pytest.fixture(scope="module")
def exported(tiny_moe, tmp_path_factory):
    """Arguments of an export without their output, and the file that they give."""
    path = tmp_path_factory.mktemp("asymmetric") / "whole.gguf"
    succeed("calibrate", tiny_moe, "--tokens", 2048, "-o", path.with_name("stats.safetensors"))
    stats = path.with_name("stats.safetensors")
    arguments = ("export", tiny_moe, "--preset", "uniform-q2_k", "--stats", stats, "--tune", 0)
    succeed(*arguments, "--asymmetric", 1024, "-o", path)
    return arguments, path


@pytest.mark.nightly
def test_other_blocks_have_the_same_size(exported, tmp_path):
    arguments, path = exported
    plain = tmp_path / "plain.gguf"
    succeed(*arguments, "-o", plain)
    assert plain.stat().st_size == path.stat().st_size and plain.read_bytes() != path.read_bytes()
    assert not list(path.parent.glob(".*")), "what was kept on the way is removed"


@pytest.mark.nightly
def test_an_interrupted_export_encodes_nothing_twice_and_ends_with_the_same_bytes(exported, tmp_path, monkeypatch):
    arguments, path = exported
    again, packed, replaced = tmp_path / "again.gguf", EncodedStore.packed, []

    def stopping(store, name, type_name):
        if "blk.1.ffn_gate_exps" in name:
            raise KeyboardInterrupt
        return packed(store, name, type_name)

    with monkeypatch.context() as patch:
        patch.setattr(EncodedStore, "packed", stopping)
        assert run(*arguments, "--asymmetric", 1024, "-o", again).returncode
    kept = {*tmp_path.glob(".*asymmetric*/*.Q2_K")}
    assert len(kept) > 4

    def writing(file, data):
        replaced.append(file)
        file.write_bytes(data)

    monkeypatch.setattr("dynquant.encoding.store.write_atomically", writing)
    succeed(*arguments, "--asymmetric", 1024, "-o", again)
    assert again.read_bytes() == path.read_bytes()
    assert replaced and not kept & {*replaced}


def test_what_cannot_run_is_refused(small_moe, tmp_path):
    plan = ("--preset", "uniform-q8_0", "--encoder", "ggml")
    done = run("export", small_moe, *plan, "--asymmetric", 512, "-o", tmp_path / "x.gguf")
    assert done.returncode == 1 and "it goes with --encoder dynquant" in done.stderr
    assert not list(tmp_path.iterdir())
