"""Calibration statistics: merging in any order, and the file."""

import copy
import os
import stat

import pytest
import torch

from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.errors import StatsError, WriteError

EXPERTS, CHANNELS, CAPACITY = 2, 4, 3
DENSE, STACK = "blk.0.attn_q.weight", "blk.1.ffn_down_exps.weight"


def run(seed: int, *, fingerprint: str = "f" * 64, extra: str | None = None) -> CalibrationStats:
    """Statistics of whole numbers, so that sums are exact in any order."""
    random = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-50, 50, shape, generator=random)

    def one(experts: int) -> InputStats:
        return InputStats(
            in_sum2=numbers(experts, CHANNELS).abs().double(),
            counts=numbers(experts).abs(),
            samples=numbers(experts, CAPACITY, CHANNELS).bfloat16(),
            sample_counts=torch.full((experts,), seed % 3),
            max_in=numbers(experts).float() + seed / 16,
            max_in_channel=numbers(experts).abs(),
            max_in_position=numbers(experts).abs(),
            max_out=numbers(experts).float() + seed / 16,
            max_out_channel=numbers(experts).abs(),
            max_out_position=numbers(experts).abs(),
        )

    provenance = StatsProvenance(
        fingerprint=fingerprint, text_hash=f"{seed:064x}", text_name="t", num_windows=1, num_tokens=10 + seed
    )
    inputs = {DENSE: one(1), STACK: one(EXPERTS)} | ({extra: one(1)} if extra else {})
    return CalibrationStats(provenance, inputs, {"blk.0.attn_k.weight": DENSE})


def merged(*runs: CalibrationStats) -> CalibrationStats:
    first, *others = (copy.deepcopy(one) for one in runs)
    for other in others:
        first.merge(other)
    return first


def assert_same(first: CalibrationStats, second: CalibrationStats) -> None:
    assert first.provenance == second.provenance and first.aliases == second.aliases
    assert first.inputs.keys() == second.inputs.keys()
    for key, left in first.inputs.items():
        right = second.inputs[key]
        for part, value in vars(left).items():
            other = getattr(right, part)
            if part == "samples" and value is not None:
                filled = torch.arange(CAPACITY) < left.sample_counts.unsqueeze(1)
                value, other = value[filled], other[filled]
            assert (value is None and other is None) or torch.equal(value, other), (key, part)


def test_merging_is_associative():
    a, b, c = run(1), run(2, extra="blk.9.attn_q.weight"), run(4)
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


def test_merging_adds_sums_and_fills_samples_in_order():
    a, b = run(1), run(2)
    both = merged(a, b).inputs[STACK]
    assert torch.equal(both.in_sum2, a.inputs[STACK].in_sum2 + b.inputs[STACK].in_sum2)
    assert torch.equal(both.counts, a.inputs[STACK].counts + b.inputs[STACK].counts)
    assert both.sample_counts.tolist() == [3, 3]
    assert torch.equal(both.samples[:, :1], a.inputs[STACK].samples[:, :1])
    assert torch.equal(both.samples[:, 1:], b.inputs[STACK].samples[:, :2])
    assert merged(a, b).provenance.num_tokens == 11 + 12


def test_extremes_keep_the_larger_magnitude_with_its_place():
    a, b = run(1), run(2)
    left, right = a.inputs[STACK], b.inputs[STACK]
    left.max_in, right.max_in = torch.tensor([5.0, -3.0]), torch.tensor([-9.0, 2.0])
    for stats, places in ((left, [1, 2]), (right, [3, 4])):
        stats.max_in_channel, stats.max_in_position = torch.tensor(places), torch.tensor(places) * 10
    both = merged(a, b).inputs[STACK]
    assert both.max_in.tolist() == [-9.0, -3.0]
    assert both.max_in_channel.tolist() == [3, 2] and both.max_in_position.tolist() == [30, 20]


def test_what_only_one_run_measured_is_kept():
    a, b = run(1), run(2)
    for part in ("samples", "sample_counts", "max_in", "max_in_channel", "max_in_position"):
        setattr(a.inputs[DENSE], part, None)
    both = merged(a, b).inputs[DENSE]
    assert torch.equal(both.samples, b.inputs[DENSE].samples)
    assert torch.equal(both.max_in, b.inputs[DENSE].max_in)


def test_merging_does_not_tie_the_runs_together():
    a, b = run(1), run(2, extra="blk.9.attn_q.weight")
    before = b.inputs["blk.9.attn_q.weight"].in_sum2.clone()
    a.merge(b)
    a.merge(b)
    assert torch.equal(b.inputs["blk.9.attn_q.weight"].in_sum2, before)
    assert torch.equal(a.inputs["blk.9.attn_q.weight"].in_sum2, 2 * before)


def test_another_checkpoint_is_refused():
    other = run(2, fingerprint="e" * 64)
    with pytest.raises(StatsError, match=r"eeeeeeeeeeee .*ffffffffffff"):
        run(1).merge(other)
    with pytest.raises(StatsError, match=r"eeeeeeeeeeee, but tiny has fingerprint ffffffffffff"):
        other.check_belongs_to("f" * 64, "tiny", {})
    other.check_belongs_to("e" * 64, "tiny", {})


def test_weights_with_the_same_input_share_statistics():
    stats = run(1)
    assert stats.input_of("blk.0.attn_k.weight") is stats.inputs[DENSE]
    assert stats.input_of("token_embd.weight") is None


def test_round_trip(tmp_path):
    stats, path = run(1), tmp_path / "stats.safetensors"
    stats.inputs[DENSE].max_out = stats.inputs[DENSE].max_out_channel = stats.inputs[DENSE].max_out_position = None
    stats.save(path)
    assert_same(CalibrationStats.load(path), stats)
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


def test_provenance_of_a_newer_dynquant_is_read_and_kept(tmp_path):
    stats, path = run(1), tmp_path / "stats.safetensors"
    stats.provenance = StatsProvenance(**stats.provenance.model_dump(), of_newer={"a": 1})
    stats.save(path)
    again = CalibrationStats.load(path)
    assert_same(again, stats)
    assert again.provenance.joined(stats.provenance).model_extra == {"of_newer": {"a": 1}}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_file_follows_the_umask(tmp_path, umask, mode):
    path, before = tmp_path / "stats.safetensors", os.umask(umask)
    try:
        run(1).save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"stats\.safetensors could not be written"):
        run(1).save(tmp_path / "file" / "stats.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(WriteError, match="taken"):
        run(1).save(tmp_path / "taken")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken"]


def test_a_damaged_or_foreign_file_is_refused(tmp_path, small_moe):
    path = tmp_path / "stats.safetensors"
    run(1).save(path)
    data = path.read_bytes()
    for damaged in (b"", data[:7], data[:200], data[:-1], data.replace(b".in_sum2", b".in_sum3")):
        path.write_bytes(damaged)
        with pytest.raises(StatsError, match=r"stats\.safetensors is (an empty file, )?not a statistics file"):
            CalibrationStats.load(path)
    for foreign, words in (
        (small_moe / "model.safetensors", "not a statistics file"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(StatsError, match=words):
            CalibrationStats.load(foreign)
