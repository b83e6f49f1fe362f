"""Estimates of time and memory: they follow the work, fit machines that were measured, and refuse other files."""

import json
import re
from dataclasses import replace

import pytest

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.costs.model import CostOptions, predict, streamed_cost
from dynquant.calibration.second_moments import kind_beside
from dynquant.errors import PlanError, StatsError
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.streaming.stream_memory import Workload, fit_within
from tests.helpers.commands import run
from tests.recipes.test_presets import DEEPSEEK_R1

MACHINE = Machine(
    name="made up", threads=1, memory_bytes=24 << 30, disk_bytes_per_s=1e9, start_seconds=5.0, start_bytes=300 << 20,
    run_bytes=500 << 20, matmul_flops={64: 5e9, 1024: 5e10, 4096: 1e11}, element_seconds=1e-9,
    encode={"ggml": {"Q4_K": 1e7, "IQ1_S": 5e6}, "dynquant": {"Q4_K": 3e5, "IQ1_S": 2e5}},
    errors={"Q4_K": 1e7, "IQ1_S": 5e6}, table_seconds={"IQ1_S": 10.0, "IQ2_XXS": 5.0},
)  # fmt: skip
WORK = CostOptions(types=("IQ1_S", "Q4_K"))


@pytest.fixture(scope="module")
def costs(small_moe):
    model = open_model(small_moe)
    plan = plan_from_types(model, preset_types("r1-iq1_s", model), recipe="r1-iq1_s")
    return lambda machine=MACHINE, **work: {c.stage: c for c in predict(model, plan, machine, replace(WORK, **work))}


def test_calibration_grows_with_its_tokens_and_what_it_measures(costs):
    plain = costs(hessians="none", tokens=10_000)["calibrate"]
    twice = costs(hessians="none", tokens=20_000)["calibrate"]
    fixed = MACHINE.start_seconds + plain.bytes_read / MACHINE.disk_bytes_per_s
    assert twice.seconds - fixed == pytest.approx(2 * (plain.seconds - fixed))
    moments = costs(hessians="activations", tokens=10_000)["calibrate"]
    gradients = costs(hessians="gradients", tokens=10_000)["calibrate"]
    assert plain.seconds < moments.seconds < gradients.seconds
    assert plain.memory_bytes < moments.memory_bytes
    pooled = costs(hessians="activations", hessian_bytes=1 << 20)["calibrate"]
    assert pooled.memory_bytes < moments.memory_bytes


def test_a_streamed_model_takes_less_memory_and_reads_again_what_has_no_room(costs):
    whole, roomy = costs(tokens=4096), costs(tokens=4096, limit_bytes=8 << 30)
    for stage in ("error table", "export"):
        assert roomy[stage] == whole[stage]
    for stage, passes in (("calibrate", 1), ("sensitivities", 3)):
        assert roomy[stage].memory_bytes < whole[stage].memory_bytes + MACHINE.start_bytes
        assert roomy[stage].bytes_read == passes * whole[stage].bytes_read
    tight = costs(tokens=4096, limit_bytes=1)
    for stage in ("calibrate", "sensitivities"):
        assert tight[stage].memory_bytes < roomy[stage].memory_bytes
        assert tight[stage].bytes_read > roomy[stage].bytes_read
        assert tight[stage].seconds >= roomy[stage].seconds
    back = costs(tokens=4096, hessians="gradients", limit_bytes=8 << 30)["calibrate"]
    assert back.bytes_read == 2 * roomy["calibrate"].bytes_read and back.memory_bytes > roomy["calibrate"].memory_bytes


@pytest.mark.parametrize("is_backward", [False, True])
def test_streamed_memory_is_counted_as_the_limit_is(small_moe, monkeypatch, is_backward):
    model = open_model(small_moe)
    plan = plan_from_types(model, preset_types("bf16", model), recipe="bf16")
    batch = Workload(512, is_backward)
    monkeypatch.setattr("dynquant.running.streaming.stream_memory.resident_memory", lambda: 10**8)
    with pytest.raises(StatsError, match="the largest stage") as refused:
        fit_within(LayerStream(model), 1, batch)
    counted = int(re.search(r"model takes ([\d,]+)", str(refused.value)).group(1).replace(",", ""))
    assert streamed_cost(model, plan, 10**8, batch, 1)[0] == pytest.approx(counted, rel=0.01)


def test_a_slower_encoder_and_a_slower_disk_take_longer(costs):
    assert costs(encoder="ggml")["export"].seconds < costs(encoder="dynquant")["export"].seconds
    slow = MACHINE.model_copy(update={"disk_bytes_per_s": 1e5})
    stored = costs()["error table"].bytes_read
    more = stored / 1e5 - stored / MACHINE.disk_bytes_per_s
    assert costs(slow)["error table"].seconds == pytest.approx(costs()["error table"].seconds + more)
    assert costs(slow)["export"].seconds == pytest.approx(MACHINE.start_seconds + stored / 1e5)


def test_the_plan_of_a_configuration_tells_time_and_memory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    MACHINE.save(tmp_path / "machine.json")
    done = run("plan", "--config-only", tmp_path, "--preset", "r1-iq1_s", "--machine", tmp_path / "machine.json")
    assert done.returncode == 0 and "130.60 GiB" in done.stdout
    for stage in ("calibrate", "error table", "sensitivities", "export"):
        assert stage in done.stdout
    assert "does not fit in 25.77 GB" in done.stderr and "streamed (--max-memory)" in done.stderr


def test_a_streamed_plan_of_a_configuration_stays_within_its_limit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_R1))
    MACHINE.save(tmp_path / "machine.json")

    def planned(limit):
        return run("plan", "--config-only", tmp_path, "--preset", "r1-iq1_s", "--machine", tmp_path / "machine.json",
                   "--max-memory", limit, "--hessians", "none")  # fmt: skip

    assert "streamed within 64.00 GB" in " ".join(planned("64GB").stdout.split())
    assert "does not fit" not in planned("64GB").stderr
    assert "calibrate does not fit in 1.00 GB: give a higher --max-memory" in planned("1GB").stderr


@pytest.mark.parametrize("content", ["", "{}", '{"name": 1}', MACHINE.model_dump_json().replace("5000000.0", "-1.0")])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "machine.json").write_text(content)
    with pytest.raises(PlanError, match=r"machine\.json (is not a|is an empty file, not a|holds a speed)"):
        Machine.load(tmp_path / "machine.json")


@pytest.mark.nightly
def test_more_effort_says_first_how_long_it_takes(small_moe, tmp_path):
    words = ("--effort", "high", "--preset", "uniform-q2_k", "--tokens", 2048, "--no-report", "-o", tmp_path / "plan")
    said = run("plan", small_moe, *words).stderr
    assert 0 <= said.index("--effort high: about") < said.index("calibrate")
    assert kind_beside(tmp_path / "plan" / "stats.safetensors") == "two-sided"
