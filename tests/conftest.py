"""Fixtures: the bundled small MoE, and the larger test beds where the checkout has them beside it."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.made_once import made_once

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


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leave what is imported out of collections of garbage, which would each go through two million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def settings_of_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the user set for llama.cpp's tree, which tests do not see: they have no tree and an empty cache."""
    stated = {name: os.environ[name] for name in ("LLAMA_CPP_DIR", "DYNQUANT_CACHE") if name in os.environ}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LLAMA_CPP_DIR", raising=False)
        patch.setenv("DYNQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield stated


@pytest.fixture(scope="session")
def llama_cpp_tree(settings_of_user: dict[str, str]) -> Path:
    from dynquant.families.converter.source_tree import find_tree

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DYNQUANT_CACHE")
        for name, value in settings_of_user.items():
            patch.setenv(name, value)
        folder = find_tree()
    if folder is None:
        pytest.skip("no source tree of llama.cpp: set LLAMA_CPP_DIR, or run `dynquant fetch-llama-cpp`")
    return folder


@pytest.fixture(scope="session", autouse=True)
def short_probe():
    """Plans that are made in this process weigh their tensors by gradients of 512 tokens, not of thousands."""
    from dynquant.analysis.sensitivity import stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "PROBE_TOKENS", 512)
        yield


@pytest.fixture(scope="session")
def small_moe() -> Path:
    """textbook-moe-16m: DeepSeek-V3 architecture, 6 layers, 8 routed experts."""
    return REPOSITORY / "dynquant" / "data" / "textbook-moe-16m"


@pytest.fixture(scope="session")
def moe_model(small_moe: Path):
    from dynquant.families.open import open_model

    return open_model(small_moe)


@pytest.fixture(scope="session")
def f32_moe(moe_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """textbook-moe-16m as a GGUF of float32; read only."""
    from tests.helpers.tiny_models import write_f32

    folder = made_once(tmp_path_factory, "f32-moe", lambda folder: write_f32(moe_model, folder / "small.gguf"))
    return folder / "small.gguf"


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
def tiny_text(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a name in `tests.helpers.tiny_models`; read only."""
    from tests.helpers.tiny_models import save_tiny

    return lambda name: made_once(tmp_path_factory, f"text-{name}", lambda folder: save_tiny(name, folder, small_moe))


@pytest.fixture(scope="session")
def tiny_moe(tiny_text: Callable[[str], Path]) -> Path:
    """A random Qwen3-MoE of two layers, 256 wide for the K-quants, where no number matters; read only."""
    return tiny_text("qwen3-moe")


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the vision-language checkpoint of a family in `tests.helpers.tiny_vision`; read only."""
    from tests.helpers.tiny_vision import save_vision_model

    return lambda family: made_once(
        tmp_path_factory, f"vision-{family}", lambda folder: save_vision_model(family, folder)
    )


CALIBRATION_16M = ("--calibration", REPOSITORY / "dynquant/data/demo_text.txt", "--tokens", 12288, "--window", 256)
"""How `calibrated_16m` was made: commands with the same options reuse its files."""


@pytest.fixture(scope="session")
def calibrated_16m(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the statistics and second moments of textbook-moe-16m; read only, copies are hard links."""
    from tests.helpers.commands import succeed

    def calibrate(folder: Path) -> None:
        said = succeed("calibrate", small_moe, *CALIBRATION_16M, "-o", folder / "stats.safetensors")
        assert "hessians.safetensors" in said and (folder / "hessians.safetensors").is_file()

    return made_once(tmp_path_factory, "calibrated-16m", calibrate)


@pytest.fixture(scope="session")
def planned_16m(small_moe: Path, calibrated_16m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan folder of textbook-moe-16m as `plan` leaves it, report included; read only, copies are hard links."""
    from tests.helpers.commands import linked_copy, succeed

    def plan(folder: Path) -> None:
        linked_copy(calibrated_16m, folder)
        said = succeed("plan", small_moe, "--types", "q2_k,iq4_xs,q6_k", *CALIBRATION_16M, "-o", folder)
        assert "stats.safetensors" in said

    return made_once(tmp_path_factory, "planned-16m", plan)


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
    from tests.helpers.packed_models import export_both, exported_both

    folder = made_once(tmp_path_factory, "packed-moe", lambda folder: export_both(small_moe, folder))
    return exported_both(small_moe, folder)


@pytest.fixture(scope="session")
def packed_tiny(tiny_text: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    """A random DeepSeek-V3 of three layers in that mixture: MLA, dense, routed and shared experts; read only."""
    from tests.helpers.packed_models import export_both, exported_both

    original = tiny_text("deepseek-v3")
    folder = made_once(tmp_path_factory, "packed-tiny", lambda folder: export_both(original, folder))
    return exported_both(original, folder)


@pytest.fixture
def cuda():
    """The GPU; tests that ask for it are skipped without one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
