"""Everything that products launch, compiled for GPUs that are not here: it fits them and spills no registers."""

import warnings
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dynquant.kernels import dispatch, ops
from dynquant.kernels.triton import activations
from tests.helpers.launches import Needs, needs
from tests.helpers.packed_weights import normal, packed_weights

TYPES = ("Q4_K", "IQ1_S", "IQ2_XXS", "IQ3_S", "Q5_1", "MXFP4")
"""One type of each kind of codes, and with super-blocks, blocks of 32, scales that are powers of two."""

SHARED_KB = {75: 64, 80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability -> most shared memory of a program; 8.6 (RTX 30) has what 8.9 has and runs the code of 8.0."""

PRODUCTS = {
    "linear": (1, 3, 4, 16, 64, 128, 512, 4096),
    "input_grad": (64, 128, 512),
    "experts_linear": (2, 100, 256, 512, 2048, 4096),
    "experts_input_grad": (2, 64, 512, 2048),
    "dequantize": (0,),
    "embedding": (100,),
}
"""Product -> rows, or tokens of eight experts out of 128: each of another kernel or tiling."""

KERNELS = {
    "linear": {"gemv_kernel", "tile_linear_kernel", "arranged_kernel"},
    "input_grad": {"dequantize_kernel"},
    "experts_linear": {"gemv_kernel", "tile_linear_kernel"},
    "experts_input_grad": {"_pair_kernel", "_order_kernel", "tile_input_grad_kernel"},
    "dequantize": {"dequantize_kernel"},
    "embedding": {"dequantize_kernel"},
}
OLD_KERNELS = KERNELS | {
    "linear": {"gemv_kernel", "dequantize_kernel"},
    "experts_linear": {"gemv_kernel"},
}
"""Product -> kernels that are among those launched; before 8.0 fewer."""
RINGS = {product: {"ring_grad_kernel" if product.endswith("grad") else "ring_kernel"} for product in list(PRODUCTS)[:4]}
HOPPER_KERNELS = {product: kernels | RINGS.get(product, set()) for product, kernels in KERNELS.items()}

IS_MEASURED_COMPILER = pytest.mark.skipif(
    not version("triton").startswith("3.6."), reason="what the compiler makes is asserted for Triton 3.6"
)


SPILLED = {
    (80, "experts_linear", "IQ2_XXS"): 8,
    (90, "linear", "Q4_K"): 72,  # these four in rings of 256 rows, between one tile and the next
    (90, "linear", "IQ1_S"): 8,
    (90, "linear", "IQ2_XXS"): 24,
    (90, "linear", "IQ3_S"): 40,
    (90, "experts_linear", "Q4_K"): 8,  # these five in rings of 64 or 256 tokens, there too
    (90, "experts_linear", "IQ1_S"): 16,
    (90, "experts_linear", "IQ2_XXS"): 40,
    (90, "experts_linear", "IQ3_S"): 48,
    (90, "experts_linear", "Q5_1"): 16,
    (100, "experts_input_grad", "MXFP4"): 8,
    (120, "experts_linear", "IQ1_S"): 8,
}
"""Capability, product, type -> bytes that a thread spills; all others spill none."""


def fits(found: list[Needs], capability: int, spilled: int = 0) -> bool:
    most = SHARED_KB[89 if capability == 80 else capability] << 10
    return all(each.local <= spilled and each.shared <= most and each.tensor <= 512 for each in found)


@pytest.fixture
def old_gpu(monkeypatch):
    """A Turing GPU: sm_75, with tensor cores for float16 alone."""
    dispatch._warn_once.cache_clear()
    monkeypatch.setattr(activations, "capability", lambda device: (7, 5))
    yield
    dispatch._warn_once.cache_clear()


@pytest.mark.nightly
@IS_MEASURED_COMPILER
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("capability", SHARED_KB)
def test_products_fit_other_gpus(capability, product, name):
    launched = set()
    for rows in PRODUCTS[product]:
        if (capability, product, rows > 2) == (75, "experts_linear", True):
            continue  # nothing is launched, see below
        found = needs(capability, name, product, rows, torch.bfloat16)
        spilled = SPILLED.get((capability, product, name), 0)
        assert found and fits(found, capability, spilled), (rows, found)
        launched |= {each.kernel for each in found}
    assert launched >= (OLD_KERNELS if capability < 80 else HOPPER_KERNELS if capability == 90 else KERNELS)[product]


@pytest.mark.nightly
@IS_MEASURED_COMPILER
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("capability", SHARED_KB)
def test_products_in_other_dtypes_fit_other_gpus(capability, dtype):
    for product, rows in (
        ("linear", 1),
        ("linear", 64),
        ("linear", 200),
        ("input_grad", 64),
        ("experts_input_grad", 512),
    ):
        found = needs(capability, "Q4_K", product, rows, dtype)
        spilled = SPILLED.get((capability, product, "Q4_K"), 0)
        assert found and fits(found, capability, spilled), (product, rows, found)


def told(call) -> tuple[torch.Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return call(), [str(each.message) for each in caught]


def test_an_old_gpu_takes_few_rows_and_says_once_what_it_does_with_more(old_gpu, monkeypatch):
    x = torch.zeros(64, 256, dtype=torch.float16)
    for rows, chosen in ((1, "gemv"), (4, "gemv"), (5, "two_pass"), (64, "two_pass")):
        assert dispatch._first_kernel("linear", "Q4_K", x[:rows]).__name__.endswith(chosen)
    assert dispatch._first_kernel("input_grad", "Q4_K", x).__name__.endswith("two_pass")

    ran = []
    for name in ("gemv", "two_pass"):
        module = dispatch._module(name)
        monkeypatch.setattr(module, "linear", lambda x, *_, name=name: ran.append(name) or x.new_zeros(len(x), 4))
    weight = packed_weights("Q4_K", 4, 256)
    asked = [told(lambda rows=rows: dispatch.launch_product((rows, 4), x[:rows], weight, "Q4_K", "planes"))
             for rows in (4, 5, 6)]  # fmt: skip
    assert ran == ["gemv", "two_pass", "two_pass"]
    assert [len(messages) for _, messages in asked] == [0, 1, 0]
    assert "compute capability 8.0" in asked[1][1][0] and "no bfloat16" in asked[1][1][0]


def test_an_old_gpu_leaves_many_tokens_of_experts_to_pytorch_and_says_so_once(old_gpu, monkeypatch):
    grouped, few = dispatch._module("grouped"), []
    monkeypatch.setattr(grouped, "linear", lambda *arguments: few.append(arguments[2]))
    weight, ids = packed_weights("Q4_K", 2, 4, 256), torch.arange(80).reshape(40, 2) % 2
    x = normal(40, 256, dtype=torch.float16)
    _, messages = told(lambda: dispatch.launch_experts(None, x[:2], weight, ids[:2], "Q4_K", "blocks"))
    assert len(few) == 1 and not messages
    for count in (1, 0):
        result, messages = told(lambda: dispatch.launch_experts(None, x, weight, ids, "Q4_K", "blocks"))
        assert torch.equal(result, ops.experts_linear(x, weight, ids, "Q4_K")) and len(few) == 1
        assert len(messages) == count and all("experts by PyTorch" in message for message in messages)
