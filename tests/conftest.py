"""Fixtures: the bundled small MoE, and the larger test beds where the checkout has them beside it."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has its share of the cores: threads of both on one core would only wait for each other.
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    if hasattr(os, "sched_setaffinity") and (share := len(cores := sorted(os.sched_getaffinity(0))) // workers):
        first = share * int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, cores[first : first + share])

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
SEARCH_TABLES = ("test_dynquant_encoder", "test_export_dynquant", "test_ggml_encoder", "test_codecs_decode")
"""Files that encode IQ1 and IQ2 with ggml, which builds 28 s of search tables in each process that does."""
LONGEST_FILES = (
    *SEARCH_TABLES,
    "test_plan_search",
    "test_kernels_gemv",
    "test_cli",
    "test_gguf_model",
    "test_exporters_compressed",
    "test_heal",
    "test_finetune",
    "test_grpo",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take longest go first, so that no worker is left alone with one of them at the end."""
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: (item.path.stem not in LONGEST_FILES, -slow[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """`--dist loadfile`, with the files of `SEARCH_TABLES` on one worker."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.helpers.scheduling import FileScheduling

    return FileScheduling(config, log, SEARCH_TABLES)


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
def packed_moe(small_moe: Path, tmp_path_factory: pytest.TempPathFactory):
    """textbook-moe-16m as GGUF and as packed safetensors, in the same mixture of types; read only."""
    from tests.helpers.packed_models import export_both

    return export_both(small_moe, tmp_path_factory.mktemp("packed"))
