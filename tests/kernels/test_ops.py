"""The operators: what PyTorch asks of them, their gradients, tracing, and the choice of kernels."""

import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from dynquant.errors import PlanError
from dynquant.formats import decode
from dynquant.kernels import dispatch, ops, reference
from dynquant.kernels.planes import pack_planes
from tests.helpers.packed_weights import experts_truth, normal, packed_weights, relative_error

NAME = "Q4_K"
IDS = torch.tensor([[0, 2], [2, 3], [1, 0]])  # 3 is held by another rank


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return packed_weights(NAME, 5, 256)


@pytest.fixture(scope="module")
def experts() -> torch.Tensor:
    return packed_weights(NAME, 3, 5, 256)


def calls(weight, experts):
    """Operator and arguments, one for each form of its activations."""
    graded = [normal(3, 256), normal(3, 5), normal(3, 256), normal(3, 2, 256), normal(3, 5), normal(3, 2, 5)]
    x, dy, tokens, rows, token_grads, grads = [tensor.requires_grad_() for tensor in graded]
    o = torch.ops.dynquant
    return {
        "linear": (o.linear, (x, weight, NAME, "blocks")),
        "input_grad": (o.input_grad, (dy, weight, NAME, "blocks")),
        "experts_linear": (o.experts_linear, (tokens, experts, IDS, NAME, "blocks")),
        "experts_linear-rows": (o.experts_linear, (rows, experts, IDS, NAME, "blocks")),
        "experts_input_grad": (o.experts_input_grad, (grads, experts, IDS, NAME, "blocks")),
        "experts_input_grad-tokens": (o.experts_input_grad, (token_grads, experts, IDS, NAME, "blocks")),
        "dequantize": (o.dequantize, (experts, NAME, torch.bfloat16, "blocks")),
        "embedding": (o.embedding, (IDS, weight, NAME, torch.float32, "blocks")),
    }


CALLS = ["linear", "input_grad", "experts_linear", "experts_linear-rows", "experts_input_grad",
         "experts_input_grad-tokens", "dequantize", "embedding"]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call, weight, experts):
    operator, arguments = calls(weight, experts)[call]
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_public_functions_equal_the_reference(layout, weight, experts):
    w, e = (pack_planes(NAME, t) if layout == "planes" else t for t in (weight, experts))
    x, dy, rows = normal(3, 256), normal(3, 5), normal(3, 2, 5)
    assert torch.equal(ops.linear(x, w, NAME, layout=layout), reference.linear(x, weight, NAME))
    assert torch.equal(ops.input_grad(dy, w, NAME, layout=layout), reference.input_grad(dy, weight, NAME))
    assert torch.equal(
        ops.experts_linear(x, e, IDS, NAME, layout=layout), reference.experts_linear(x, experts, IDS, NAME)
    )
    assert torch.equal(
        ops.experts_input_grad(rows, e, IDS, NAME, layout=layout),
        reference.experts_input_grad(rows, experts, IDS, NAME),
    )
    assert torch.equal(ops.dequantize(e, NAME, layout=layout), decode(NAME, experts))
    found = ops.embedding(IDS, w, NAME, dtype=torch.float16, layout=layout)
    assert torch.equal(found, decode(NAME, weight)[IDS].half())


def test_gradients_equal_float64(weight, experts):
    dense = decode(NAME, weight).double()
    x = normal(2, 3, 256).requires_grad_()
    g = normal(2, 3, 5, seed=2)
    ops.linear(x, weight, NAME).backward(g)
    assert relative_error(x.grad, g.double() @ dense) < 1e-6
    dy = normal(3, 5).requires_grad_()
    ops.input_grad(dy, weight, NAME).backward(normal(3, 256, seed=3))
    assert relative_error(dy.grad, normal(3, 256, seed=3).double() @ dense.T) < 1e-6
    g = normal(3, 2, 5, seed=4)
    truth = experts_truth(g, experts, IDS, NAME, transposed=True)
    for shape, expected in (((3, 2, 256), truth), ((3, 256), truth.sum(1))):
        x = normal(*shape).requires_grad_()
        ops.experts_linear(x, experts, IDS, NAME).backward(g)
        assert relative_error(x.grad, expected) < 1e-6


@pytest.mark.parametrize("call", CALLS[:6])
def test_gradients_are_those_of_finite_differences(call, weight, experts):
    operator, (x, *rest) = calls(weight, experts)[call]
    x = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: operator(x, *rest), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: operator(x, *rest).square(), (x,), fast_mode=True)


def test_the_backward_pass_keeps_the_packed_bytes_only(weight, experts):
    saved = []
    x = normal(3, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.linear(x, weight, NAME)
        ops.experts_linear(x, experts, IDS, NAME)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr(), experts.data_ptr(), IDS.data_ptr()]
    assert not ops.linear(x.detach(), weight, NAME).requires_grad
    with torch.no_grad():
        assert not ops.linear(x, weight, NAME).requires_grad


def test_gradients_under_checkpointing_and_inference_mode(weight):
    x = normal(3, 256).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: ops.linear(x, weight, NAME), x, use_reentrant=False).sum().backward()
    again = normal(3, 256).requires_grad_()
    ops.linear(again, weight, NAME).sum().backward()
    assert torch.equal(x.grad, again.grad)
    with torch.inference_mode():
        assert ops.linear(x, weight, NAME).is_inference()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_graph_is_traced(backend, weight, experts):
    def model(x, weight, experts, ids):
        y = ops.linear(x, weight, NAME)
        routed = ops.experts_linear(x, experts, ids, NAME)
        again = ops.input_grad(y, weight, NAME) + ops.experts_input_grad(routed, experts, ids, NAME).sum(1)
        rows = ops.embedding(ids, weight, NAME, dtype=torch.float32)
        return (again * rows.sum(1)).sum() + ops.dequantize(weight, NAME).sum()

    grads = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend, dynamic=True)):
        x = normal(3, 256).requires_grad_()
        run(x, weight, experts, IDS).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_fakes_refuse_what_the_operators_refuse(weight):
    for x, w in ((torch.zeros(2, 255), weight), (torch.zeros(2, 255, device="meta"), weight.to("meta"))):
        with pytest.raises(ValueError, match="last dimension of `x` must be 256"):
            ops.linear(x, w, NAME)
    with pytest.raises(PlanError, match="Q9_K"):
        ops.linear(torch.zeros(2, 256), weight, "Q9_K")
    assert ops.linear(torch.zeros(2, 3, 256, device="meta"), weight.to("meta"), NAME).shape == (2, 3, 5)


@pytest.fixture
def fresh_warnings():
    dispatch._warn_once.cache_clear()
    yield
    dispatch._warn_once.cache_clear()


def test_why_triton_is_refused_is_said_once(fresh_warnings, monkeypatch):
    planar = packed_weights(NAME, 4, 256)
    assert dispatch._refusal(planar, "planes", torch.float32) is None
    assert "in blocks" in dispatch._refusal(planar, "blocks", torch.float32)
    assert "float64" in dispatch._refusal(planar, "planes", torch.float64)
    assert "contiguous" in dispatch._refusal(planar[:, ::2], "planes", torch.float32)
    assert "16 bytes" in dispatch._refusal(planar.flatten()[1:], "planes", torch.float32)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    reason = dispatch._refusal(planar, "planes", torch.float32)
    assert "Triton is not installed" in reason
    with pytest.warns(UserWarning, match="Triton is not installed"):
        dispatch._warn_once(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._warn_once(reason)


@pytest.mark.parametrize(
    ("rows", "chosen", "on_hopper"),
    [
        (1, "gemv", "gemv"), (3, "gemv", "gemv"), (4, "tiles", "tiles"), (16, "tiles", "tiles"), (17, "tiles", "ring"),
        (128, "tiles", "ring"), (129, "two_pass", "ring"), (2048, "two_pass", "ring"), (2049, "two_pass", "two_pass"),
    ],
)  # fmt: skip
def test_kernels_are_asked_in_order(rows, chosen, on_hopper, monkeypatch):
    class Kernel:
        def __init__(self, name, most):
            self.name, self.most = name, most

        def supports(self, type_name, x, product):
            return type_name == NAME and x.shape[0] <= self.most

    places = {"gemv": 4, "tiles": 999, "ring": 9999, "two_pass": 1 << 30}
    modules = {name: Kernel(name, most) for name, most in places.items()}
    monkeypatch.setattr(dispatch, "_module", modules.get)
    for has_gluon, expected in ((False, chosen), (True, on_hopper)):
        modules["activations"] = SimpleNamespace(runs_gluon=lambda *_, found=has_gluon: found)
        assert dispatch._first_kernel("linear", NAME, torch.zeros(rows, 256)).name == expected


@pytest.mark.parametrize(
    ("rows", "width", "chosen"),
    [
        (1, 2048, "ring_grad"),
        (128, 2056, "ring_grad"),
        (129, 2048, "two_pass"),
        (64, 2050, "two_pass"),
        (64, 1024, "two_pass"),
    ],
)
def test_gradients_go_to_rings_where_they_run(rows, width, chosen, monkeypatch):
    pytest.importorskip("dynquant.kernels.gluon.ring_grad", reason="this Triton has no Gluon for Hopper GPUs")
    activations = dispatch._module("activations")
    for has_gluon in (False, True):
        monkeypatch.setattr(activations, "runs_gluon", lambda *_, found=has_gluon: found)
        kernel = dispatch._first_kernel("input_grad", NAME, torch.zeros(rows, width))
        assert kernel.__name__.endswith(chosen if has_gluon else "two_pass")


def test_kernels_are_found_in_their_folders():
    names = {name for table in dispatch._KERNELS.values() for name, _ in table} | {"two_pass", "grouped", "dequantize"}
    folders = {name: "gluon" if name in dispatch._GLUON else "triton" for name in names}
    missing = [name for name in names if find_spec(f"dynquant.kernels.{folders[name]}.{name}") is None]
    assert not missing
