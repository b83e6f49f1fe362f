"""Fixtures: the bundled small MoE, and the larger test beds where the checkout has them beside it."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker, and what it starts, gets its share of the cores: dynquant, PyTorch and llama.cpp start as many
    # threads as there are, and threads of two workers on one core wait for each other in loops, ten times longer.
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    first = share * int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)
    os.sched_setaffinity(0, cores[first : first + share])
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def small_moe() -> Path:
    """textbook-moe-16m: DeepSeek-V3 architecture, 6 layers, 8 routed experts."""
    return REPOSITORY / "dynquant" / "data" / "textbook-moe-16m"


@pytest.fixture(scope="session")
def moe_89m() -> Path:
    path = SHARED / "models" / "textbook-moe-89m"
    if not path.is_dir():
        pytest.skip("textbook-moe-89m is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def tiny_moe(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers, 256 wide for the K-quants, where no number matters; read only."""
    from tests.helpers.tiny_models import save_tiny

    return save_tiny("qwen3-moe", tmp_path_factory.mktemp("tiny") / "tiny-moe", small_moe)


CALIBRATION_16M = ("--tokens", 12288, "--window", 256)
"""How `calibrated_16m` was made: commands with the same options reuse its files."""


@pytest.fixture(scope="session")
def calibrated_16m(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the statistics and second moments of textbook-moe-16m; read only, copies are hard links."""
    from tests.helpers.commands import succeed

    path = tmp_path_factory.mktemp("calibrated") / "stats.safetensors"
    said = succeed("calibrate", small_moe, *CALIBRATION_16M, "-o", path)
    assert "hessians.safetensors" in said and path.with_name("hessians.safetensors").is_file()
    return path.parent


@pytest.fixture(scope="session")
def planned_16m(small_moe: Path, calibrated_16m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan folder of textbook-moe-16m as `plan` leaves it, report included; read only, copies are hard links."""
    from dynquant.analysis.sensitivity import stage
    from tests.helpers.commands import linked_copy, succeed

    folder = linked_copy(calibrated_16m, tmp_path_factory.mktemp("planned") / "plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "PROBE_TOKENS", 512)
        said = succeed("plan", small_moe, "--types", "q2_k,iq4_xs,q6_k", *CALIBRATION_16M, "-o", folder)
    assert "stats.safetensors" in said
    return folder


@pytest.fixture(scope="session")
def drawn_moe(tmp_path_factory: pytest.TempPathFactory):
    """A made-up MoE with a name that is not to be trusted, all its plots, and the progress that was told."""
    from dynquant.analysis.plots.all_plots import write_plots
    from tests.helpers.synthetic_models import SMALL_MOE, DrawnModel, synthetic_model

    made = synthetic_model(
        SMALL_MOE,
        model='evil/<script>alert(1)</script>"&\u0416\udc80 <moe> $x_1$ \u0001',
        spikes={"blk.1.ffn_down_exps.weight": 2.5, "blk.4.ffn_down_shexp.weight": 3.5},
    )
    steps = []
    folder = tmp_path_factory.mktemp("plots")
    files = write_plots(folder, made.results, lambda *step, **_: steps.append(step))
    return DrawnModel(made, files, steps)


@pytest.fixture(scope="session")
def packed_moe(small_moe: Path, tmp_path_factory: pytest.TempPathFactory):
    """textbook-moe-16m as GGUF and as packed safetensors, in the same mixture of types; read only."""
    from tests.helpers.packed_models import export_both

    return export_both(small_moe, tmp_path_factory.mktemp("packed"))


@pytest.fixture
def cuda():
    """The GPU; tests that ask for it are skipped without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
