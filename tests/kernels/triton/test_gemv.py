"""The GEMV of every type against decoded weights: interpreted here, compiled for sm_90, run where there is a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from dynquant.formats import decode
from dynquant.kernels.planes import PLANES, pack_planes
from dynquant.kernels.triton import codebook_rows, gemv
from tests.helpers.gemv_checks import activations, finite_blocks
from tests.helpers.representatives import represented_by

LIMIT = {"bf16": 4e-3, "int8": 1.2e-2}
IS_MEASURED_COMPILER = pytest.mark.skipif(
    not version("triton").startswith("3.6."), reason="what the compiler makes is asserted for Triton 3.6"
)
CHECKS = Path(__file__).parents[2] / "helpers" / "gemv_checks.py"


def check_results(cases: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Results by mode, as the cases are given, all from one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if "compile" not in cases:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(CHECKS), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def case(name: str, m: int, k: int, act: str, **config: int) -> dict:
    tiling = {"bn": 8, "warps": 1, "rows": min(m, 4), **config}
    return {"type": name, "m": m, "n": 5, "k": k, "act": act, "hot": k - 7 * m, "config": tiling}


EVERY_TYPE = [
    case(name, 2, 256 if i % 4 else 512, "bf16")
    for i, name in enumerate(sorted(PLANES))
    if name not in ("Q4_K", "TQ1_0")
]
OTHER_FORMS = [
    case("TQ1_0", 1, 256, "bf16"),
    case("IQ2_XS", 2, 512, "int8", bn=2, split=2),
    case("Q8_0", 5, 256, "bf16", rows=3),
    case("Q4_0", 16, 256, "int8", rows=8),
    case("Q2_0", 2, 576, "bf16"),
    case("Q1_0", 3, 1408, "int8", split=2),
    case("IQ4_NL", 2, 288, "bf16", warps=2),
]

PRODUCTS = {
    "Q4_K": [case("Q4_K", 2, 256, "bf16"), case("Q4_K", 4, 256, "int8")],
    "types": EVERY_TYPE,
    "forms": OTHER_FORMS,
}
ROUTES = [[0, 2], [3, 0], [-1, 2]]
ROUTED = [
    {"type": name, "n": 5, "k": k, "act": act, "ids": ROUTES, "per_slot": per_slot,
     "config": {"bn": 4, "warps": 1, "rows": 1, **more}}
    for name, k, act, per_slot, more in (
        ("Q4_K", 256, "bf16", False, {}), ("IQ2_XXS", 256, "bf16", True, {}),
        ("IQ1_S", 512, "int8", False, {"split": 2}),
    )
]  # fmt: skip


@pytest.mark.parametrize("kind", represented_by(("Q4_K",), PRODUCTS))
def test_interpreted_products_are_those_of_decoded_weights(kind):
    cases = PRODUCTS[kind]
    for asked, found in zip(cases, check_results({"interpret": cases})["interpret"], strict=True):
        assert found["error"] <= {"bf16": 1e-3, "int8": 2.5e-2}[asked["act"]], (asked, found)
        assert found["wrong"] == 0 or asked["act"] == "int8", (asked, found)


@pytest.mark.nightly
def test_interpreted_experts_are_those_of_decoded_weights():
    for asked, found in zip(ROUTED, check_results({"interpret_routed": ROUTED})["interpret_routed"], strict=True):
        assert found["error"] <= {"bf16": 1e-3, "int8": 2.5e-2}[asked["act"]] and found["zeros"], (asked, found)


BUDGETS = [("TQ2_0", "int8", 1.15), ("Q4_K", "int8", 1.8), ("Q4_K", "bf16", 2.35), ("IQ1_S", "int8", 1.8),
           ("IQ2_XXS", "int8", 2.0)]  # fmt: skip


@pytest.mark.nightly
@IS_MEASURED_COMPILER
def test_sm_90_code_has_no_spills_and_stays_within_its_budget():
    cases = [{"type": name, "act": act} for name, act, _ in BUDGETS]
    cases.append({**cases[1], "routed": True})
    found = check_results({"compile": cases})["compile"]
    for (name, act, budget), result in zip([*BUDGETS, BUDGETS[1]], found, strict=True):
        assert result["spills"] == 0 and result["shared"] == 0, (name, act, result)
        assert 0.3 < result["per_weight"] <= budget, (name, act, result)


@pytest.mark.nightly
@IS_MEASURED_COMPILER
def test_every_type_compiles_for_sm_90_without_spills():
    # Two planes of activations (bf16) need the most registers; the test above has compiled some of them.
    names = sorted(PLANES.keys() - {name for name, act, _ in BUDGETS if act == "bf16"})
    cases = [{"type": name, "act": "bf16"} for name in names]
    for asked, found in zip(cases, check_results({"compile": cases})["compile"], strict=True):
        assert found["spills"] == 0 and found["shared"] == 0, (asked, found)


def test_what_kernels_cannot_multiply_is_refused():
    x = torch.zeros(1, 512, dtype=torch.bfloat16)
    assert gemv.supports("Q4_K", x)
    assert not gemv.supports("BF16", x)
    assert not gemv.supports("Q8_0", x[:, :48]) and not gemv.supports("Q8_0", x.float())
    assert not gemv.supports("Q4_K", x.expand(5, 512))


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XS"])
def test_a_copy_is_all_that_makes_codebook_words_on_a_device(name):
    made = []  # programs read the words before they wait for kernels that run ahead of them; a copy is waited for

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            made.extend([operation] if result.is_meta else [])
            return result

    with Operations():
        codebook_rows.codebook_words.__wrapped__(name, torch.device("meta"))
    assert made == [torch.ops.aten._to_copy.default]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(PLANES))
@pytest.mark.parametrize("m", [1, 3, 4])
def test_products_on_a_gpu(name, m):
    blocks = finite_blocks(name, 1003, 1024)
    x = torch.cat((activations(m, 1024, 77), torch.randn(m, 1024).to(torch.bfloat16)))[-m:].cuda()
    weights = decode(name, blocks.cuda())
    planar = pack_planes(name, blocks.cuda())
    reference = x.double() @ weights.double().T
    for act, limit in LIMIT.items():
        y = gemv.linear(x, planar, name, act)
        assert torch.equal(y, gemv.linear(x, planar, name, act))
        assert (y.double() - reference).norm() / reference.norm() <= 1.5 * limit
    one_hot = activations(m, 1024, 77).cuda()
    assert torch.equal(gemv.linear(one_hot, planar, name)[0], weights[:, 77].to(torch.bfloat16))
