"""The dynquant encoder: never worse than ggml on its objective, better with error feedback, exact about its limits."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dynquant.encoding import dynquant_encoder as encoder_module
from dynquant.encoding.dynquant_encoder import DynquantEncoder
from dynquant.encoding.ggml import encode as ggml_encode
from dynquant.encoding.interface import Encoder, ProtectedWeight
from dynquant.encoding.search.compiled.jit import ROWS as ROWS_OF_TILE
from dynquant.encoding.search.layouts import LAYOUTS
from dynquant.errors import EncodeError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from tests.conftest import REPOSITORY
from tests.helpers.representatives import SLOW_GGML_TABLES, represented_by

ASKED = [
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q2_K", "Q3_K", "Q4_K", "IQ4_XS", "TQ1_0",
    "TQ2_0", "MXFP4", "Q2_0", "Q1_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL",
]  # fmt: skip
QUICK = ("IQ1_S", "IQ2_XXS", "IQ3_S", "Q2_K", "Q4_K", "IQ4_XS", "TQ2_0", "MXFP4", "Q2_0", "Q5_1")
"""One of each way to search: grids by signs and by codes, scales with and without offsets, tables, ternary, floats,
plain minimums."""
QUICK_IN_GGML = set(QUICK) - set(SLOW_GGML_TABLES)
EXPERTS, ROWS, COLUMNS = 2, 7, 256
ENCODER = DynquantEncoder("cpu")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed() -> torch.Tensor:
    return noise(EXPERTS, ROWS, COLUMNS) * noise(EXPERTS, ROWS, COLUMNS, seed=1).abs().clamp_min(0.02).rsqrt()


def with_outliers() -> torch.Tensor:
    weights = 0.02 * noise(EXPERTS, ROWS, COLUMNS)
    weights[:, :, 7] = 3.0
    return weights


def with_zero_rows() -> torch.Tensor:
    weights = noise(EXPERTS, ROWS, COLUMNS)
    weights[:, ::2] = 0
    return weights


WEIGHTS = {
    "gaussian": lambda: 0.02 * noise(EXPERTS, ROWS, COLUMNS),
    "heavy tailed": heavy_tailed,
    "one outlier a row": with_outliers,
    "constant": lambda: torch.full((EXPERTS, ROWS, COLUMNS), 0.013),
    "zero rows": with_zero_rows,
    "subnormal scales": lambda: 2e-8 * noise(EXPERTS, ROWS, COLUMNS),
    "scales near the fp16 limit": lambda: 1.5e4 * noise(EXPERTS, ROWS, COLUMNS),
}


def importance() -> torch.Tensor:
    return torch.exp(noise(EXPERTS, COLUMNS, seed=2))


def weighted_error(weights: torch.Tensor, decoded: torch.Tensor, weight_of: torch.Tensor) -> float:
    return float(((weights - decoded).double().square() * weight_of.double().unsqueeze(1)).sum())


def correlated(columns: int, rank: int, experts: int = EXPERTS, seed: int = 3) -> torch.Tensor:
    """Second moments of inputs that live mostly in `rank` directions."""
    directions = noise(experts, columns, rank, seed=seed)
    return directions @ directions.transpose(1, 2) / rank + 0.05 * torch.eye(columns)


def loss(weights: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = weights - decoded
    return float(((error @ hessian) * error).sum())


def test_every_asked_type_is_searched():
    assert set(ASKED) <= set(LAYOUTS)
    assert ENCODER.name == "dynquant" and ENCODER.uses_hessians
    _: Encoder = ENCODER


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", represented_by(QUICK_IN_GGML, ASKED))
def test_weighted_error_is_never_above_ggmls(name, kind):
    weights, weight_of = WEIGHTS[kind](), importance()
    theirs = decode(name, ggml_encode(QUANT_TYPES[name], weights, weight_of))
    ours = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, weight_of))
    # A constant row is met to the rounding of its scale to float16.
    floor = 1e-7 * weighted_error(weights, torch.zeros_like(weights), weight_of)
    assert weighted_error(weights, ours, weight_of) <= weighted_error(weights, theirs, weight_of) + floor


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("middle", [0.15, -0.15, 1000.0])
def test_plain_minimums_serve_weights_of_one_sign(name, middle):
    """A block is a line between its own ends, on either side of zero and far from it."""
    weights, hessian = middle + 0.02 * noise(EXPERTS, ROWS, COLUMNS), correlated(COLUMNS, 64)
    theirs = decode(name, ggml_encode(QUANT_TYPES[name], weights))
    alone = decode(name, ENCODER.encode(QUANT_TYPES[name], weights))
    plain = decode(name, DynquantEncoder("cpu", is_plain=True).encode(QUANT_TYPES[name], weights))
    fed_back = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian))
    assert (weights - alone).square().sum() <= (weights - theirs).square().sum()
    assert (weights - plain).square().sum() <= (weights - theirs).square().sum()
    assert loss(weights, fed_back, hessian) < 0.65 * loss(weights, theirs, hessian)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_weights_that_lie_on_few_levels_are_met(name):
    """Of ternary checkpoints, and of those that were trained for, or decoded from, four bits."""
    hessian, draw = correlated(COLUMNS, 64), torch.Generator().manual_seed(7)
    for low, high, share in (-1, 2, 1e-6), (-7, 8, 3e-4):
        weights = 0.03 * torch.randint(low, high, (EXPERTS, ROWS, COLUMNS), generator=draw).float()
        ours = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian))
        assert loss(weights, ours, hessian) < share * loss(weights, torch.zeros_like(weights), hessian)


@pytest.mark.parametrize("name", represented_by(QUICK_IN_GGML, [n for n in ASKED if n not in ("TQ1_0", "MXFP4")]))
def test_error_feedback_lowers_the_loss_on_correlated_inputs(name):
    """On rows of two super-blocks, whose scales are refitted together."""
    weights, hessian = 0.02 * noise(EXPERTS, ROWS, 2 * COLUMNS), correlated(2 * COLUMNS, 64)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    theirs = decode(name, ggml_encode(QUANT_TYPES[name], weights, diagonal))
    alone = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, diagonal))
    fed_back = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, diagonal, hessian=hessian))
    assert loss(weights, fed_back, hessian) < 0.7 * loss(weights, alone, hessian)
    assert loss(weights, fed_back, hessian) < 0.65 * loss(weights, theirs, hessian)


@pytest.mark.parametrize("name", represented_by(QUICK, ASKED))
def test_equal_inputs_give_equal_bytes_however_they_are_batched(name, monkeypatch):
    weights, hessian = 0.02 * noise(2, 3, 256), correlated(256, 32, experts=2)
    whole = ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian)
    monkeypatch.setattr(encoder_module, "_CPU_HESSIAN_BYTES", 1)
    experts = [ENCODER.encode(QUANT_TYPES[name], weights[e], hessian=hessian[e : e + 1]) for e in range(2)]
    assert torch.equal(torch.stack(experts), ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian))
    together, apart = (decode(name, packed) for packed in (whole, torch.stack(experts)))
    assert loss(weights, apart, hessian) == pytest.approx(loss(weights, together, hessian), rel=0.02)


def test_a_tensor_larger_than_a_batch_is_taken_in_row_chunks(monkeypatch):
    weights, weight_of, done = 0.02 * noise(2, 150, 256), torch.exp(noise(256)), []
    quant_type = QUANT_TYPES["Q4_K"]
    whole = ENCODER.encode(quant_type, weights, weight_of)
    monkeypatch.setattr(encoder_module, "_CPU_WEIGHTS", 5 * 256)
    assert torch.equal(ENCODER.encode(quant_type, weights, weight_of, progress=done.append), whole)
    assert sum(done) == weights.numel() and max(done) == ROWS_OF_TILE * 256


def test_threads_do_not_change_bytes(monkeypatch):
    """Stacks and matrices are cut into the same batches, whoever encodes them."""
    monkeypatch.setattr(encoder_module, "_CPU_WEIGHTS", 5 * 256)
    hessian, quant_type = correlated(256, 32, experts=3), QUANT_TYPES["IQ2_XXS"]
    for weights in (0.02 * noise(3, 150, 256), 0.02 * noise(150, 256)):
        options = {"hessian": hessian[: 3 if weights.dim() == 3 else 1], "protected": (ProtectedWeight(7, 3),)}
        alone, *others = (ENCODER.encode(quant_type, weights, None, threads, **options) for threads in (1, 2, 5))
        assert all(torch.equal(packed, alone) for packed in others)


@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("name", represented_by(QUICK_IN_GGML, ["IQ1_S", "IQ2_XXS", "Q2_K"]))
def test_hessians_of_few_tokens_and_dead_channels_work(name, tokens):
    """Rank 0, 1 and 8, with channels that were never active; damping is all that makes them invertible."""
    weights = 0.02 * noise(4, 256)
    x = noise(max(1, tokens), 256) * (tokens > 0)
    x[:, ::3] = 0
    sample = x.T @ x / max(1, tokens)
    trust = tokens / (256 + tokens)
    hessian = (trust * sample + (1 - trust) * torch.diag(sample.diagonal())).unsqueeze(0)
    hessian += 0.01 * torch.eye(256) * max(1.0, float(sample.diagonal().mean()))
    decoded = decode(name, ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian))
    assert torch.isfinite(decoded).all()
    plain = decode(name, ggml_encode(QUANT_TYPES[name], weights, hessian[0].diagonal()))
    assert loss(weights, decoded, hessian) <= loss(weights, plain, hessian)
    assert (decoded - weights)[:, ::3].norm() < weights[:, ::3].norm(), "dead channels keep their weights"


@pytest.mark.parametrize("name", represented_by(QUICK, ASKED))
def test_super_weights_keep_their_value(name):
    """What fp16 and the type's own scale steps allow: MXFP4 has steps of a third, the others none."""
    weights, hessian = 0.02 * noise(EXPERTS, ROWS, COLUMNS), correlated(COLUMNS, 32)
    weights[1, 4, 200] = 0.9
    scalar = ProtectedWeight(4, 200, expert=1)
    plain = ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian)
    packed = ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian, protected=[scalar])
    kept = float(decode(name, packed)[1, 4, 200])
    assert kept == pytest.approx(0.9, rel=0.12 if name == "MXFP4" else 2e-3)
    others = torch.ones(EXPERTS, ROWS, dtype=torch.bool)
    others[1, 4] = False
    assert torch.equal(packed[others], plain[others])


def test_matrices_and_stacks_give_the_same_bytes():
    weights, weight_of = 0.02 * noise(9, 256), torch.exp(noise(256))
    for name in ("IQ1_M", "Q3_K"):
        matrix = ENCODER.encode(QUANT_TYPES[name], weights, weight_of)
        assert torch.equal(matrix, ENCODER.encode(QUANT_TYPES[name], weights[None], weight_of)[0])


@pytest.mark.parametrize("name", ["F16", "Q8_0", "NVFP4"])
def test_other_types_are_ggmls(name):
    weights, weight_of = noise(4, 64), torch.exp(noise(64))
    assert torch.equal(
        ENCODER.encode(QUANT_TYPES[name], weights, weight_of), ggml_encode(QUANT_TYPES[name], weights, weight_of)
    )


def test_empty_tensor_gives_no_bytes():
    assert ENCODER.encode(QUANT_TYPES["Q4_K"], torch.zeros(0, 256)).shape == (0, 144)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(name, value):
    weights = noise(5, 256)
    weights[3, 9] = value
    with pytest.raises(EncodeError, match=r"`blk\.0\.ffn_up\.weight`.*NaN or Inf"):
        ENCODER.encode(QUANT_TYPES[name], weights, torch.ones(256), name="blk.0.ffn_up.weight")


def test_weights_beyond_every_scale_are_refused():
    with pytest.raises(EncodeError, match="beyond float16"):
        ENCODER.encode(QUANT_TYPES["IQ1_S"], 1e7 * noise(2, 256), torch.ones(256), name="x")


def test_hessian_of_another_shape_is_refused():
    with pytest.raises(EncodeError, match=r"hessian of `x` has shape \(2, 256, 256\)"):
        ENCODER.encode(QUANT_TYPES["Q4_K"], noise(3, 4, 256), hessian=correlated(256, 8), name="x")


def test_missing_importance_is_refused():
    with pytest.raises(EncodeError, match="without an importance matrix"):
        ENCODER.encode(QUANT_TYPES["IQ1_S"], noise(4, 256))


@pytest.mark.nightly
def test_kernels_find_what_pytorch_finds():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.interpreted_encoding"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, passes in json.loads(done.stdout).items():
        for label, found in passes.items():
            assert found["changed"] > 0.002 and found["same"] > 0.99, (name, label, found)
            assert found["loss"] == pytest.approx(1, rel=0.01), (name, label, found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LAYOUTS)
def test_cuda_gives_blocks_as_good_and_the_same_ones_each_time(name):
    weights, hessian = 0.02 * noise(EXPERTS, 64, COLUMNS), correlated(COLUMNS, 32)
    on_gpu = DynquantEncoder("cuda")
    packed = on_gpu.encode(QUANT_TYPES[name], weights, hessian=hessian)
    assert torch.equal(on_gpu.encode(QUANT_TYPES[name], weights, hessian=hessian), packed)
    on_cpu = ENCODER.encode(QUANT_TYPES[name], weights, hessian=hessian)
    there, here = (loss(weights, decode(name, p), hessian) for p in (packed, on_cpu))
    assert there == pytest.approx(here, rel=0.01)
