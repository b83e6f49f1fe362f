"""Triton kernels: interpreted on the CPU, compiled for an H100 without one, and measured against float64 on a GPU."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from dynquant.formats import decode
from dynquant.kernels import dispatch, ops
from dynquant.kernels.planes import PLANES, pack_planes
from tests.helpers.packed_weights import experts_truth, normal, packed_weights, relative_error
from tests.helpers.representatives import represented_by

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
TYPES = sorted(PLANES)
FAMILIES = ("Q4_K", "Q6_K", "NVFP4", "IQ2_S", "IQ3_S", "TQ1_0")
"""One type of each kind of codes."""
BF16_ERROR = 4e-3


IS_MEASURED_COMPILER = pytest.mark.skipif(
    not version("triton").startswith("3.6."), reason="what the compiler makes is asserted for Triton 3.6"
)


@pytest.fixture(scope="module")
def interpreted(request) -> dict:
    """What the interpreter found, for the types of the tests that were selected."""
    tests = [item for item in request.session.items if "interpreted" in item.fixturenames]
    asked = {item.callspec.params["name"] for item in tests if hasattr(item, "callspec")}
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.interpreted_kernels", *sorted(asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", represented_by(("Q4_K",), TYPES))
def test_interpreted_weights_are_bit_equal(name, interpreted):
    assert interpreted["whole"][name]
    assert all(interpreted["parts"].get(name, {}).values()), interpreted["parts"][name]


@pytest.mark.parametrize("name", represented_by(("Q5_1",), TYPES))
def test_interpreted_products_equal_float64(name, interpreted):
    found = interpreted["single_pairs"][name]
    assert max(found["pairs"], found["fragments"], found["arranged"]) < 1e-6 and found["sentinels"] == 0
    for what, error in interpreted["products"].get(name, {}).items():
        assert error < 1e-6, what


def test_interpreted_pairs_are_sorted_and_covered_by_tiles(interpreted):
    """To 777 pairs of eight segments and 2,500 of 128, which are several chunks of pairs and of segments."""
    assert interpreted["sorted"] == [True] * 4


def test_interpreted_flags_of_rings_are_zeroed(interpreted):
    """Those of two, three and four groups of the 132 programs of an H100: the last are more than 512."""
    assert interpreted["zeroed"] == [True] * 3


@IS_MEASURED_COMPILER
@pytest.mark.parametrize("name", represented_by(("Q4_K",), TYPES))
def test_dequantize_compiles_for_an_h100_without_spills(name):
    from dynquant.kernels.triton.dequantize import _TILE_ROWS, dequantize_kernel
    from tests.helpers.sm90 import count, opcodes

    types = {"planes_ptr": "*u8", "table_ptr": "*i32", "out_ptr": "*bf16"}
    sizes = ("num_blocks", "tensor_rows", "tensor_groups", "num_rows", "num_groups", "first_row", "first_group")
    constants = {"ids_ptr": None, "TYPE": name, "ROWS": _TILE_ROWS}
    types |= dict.fromkeys(sizes, "i32")
    codes = opcodes(
        dequantize_kernel, types, constants, {"tensor_groups", "num_groups"}, num_warps=4, enable_fp_fusion=False
    )
    assert not count(codes, "LDL", "STL")
    # Eight weights a thread, written at once. 26 instructions are what an H100 can issue for a weight while it writes
    # two bytes: small programs need about that, and are faster than large ones.
    assert count(codes, "STG.E.128") == 1, "stores are not 16 bytes wide"
    assert len(codes) / 8 <= 30


@pytest.mark.nightly
@IS_MEASURED_COMPILER
@pytest.mark.parametrize(
    ("kernel", "rows"), [*(("tile_linear_kernel", rows) for rows in (16, 32, 64, 128)), ("tile_input_grad_kernel", 64)]
)
@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS"])
def test_tiles_compile_for_an_h100_without_spills(kernel, name, rows):
    from dynquant.kernels.triton import tiles
    from tests.helpers.sm90 import count, opcodes

    function, is_linear = getattr(tiles, kernel), kernel == "tile_linear_kernel"
    pointers = {"planes_ptr": "*u8", "table_ptr": "*i32", "tiles_ptr": "*i32", "order_ptr": "*i64"}
    config = (tiles.linear_config if is_linear else tiles.input_grad_config)(rows, torch.bfloat16)
    constants = {"TYPE": name, **config, **({"PDL": True} if is_linear else {})}
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages") if option in constants}
    options = options or {"num_warps": config["WARPS"]}
    others = {arg: "*bf16" if arg.endswith("_ptr") else "i32" for arg in function.arg_names if arg not in constants}
    codes = opcodes(function, others | pointers, constants, {"N", "K_groups", "row_blocks", "num_steps"}, **options)
    assert not count(codes, "LDL", "STL")
    assert count(codes, "HGMMA")
    # One load of codes for sixteen bytes: word by word, the loads took longer than everything else.
    assert name != "Q4_K" or count(codes, "LDG.E.128") >= 2
    # Decoded weights stay where they are: shared memory is for activations.
    assert not is_linear or count(codes, "STS") <= 24


def test_what_gpus_have_goes_by_their_generation(monkeypatch):
    from dynquant.kernels.triton import activations

    places = [torch.device("cuda", number) for number in (75, 80, 90, 120)] + [torch.device("cpu")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(device.index, 10))
    assert [activations.has_hopper_instructions(place) for place in places] == [False, False, True, True, False]
    assert [activations.takes_fragments(place) for place in places] == [False, True, True, True, True]
    assert [activations.is_hopper(place) for place in places] == [False, False, True, False, False]
    tensor_cores = [activations.has_tensor_cores(place, torch.bfloat16) for place in places]
    assert tensor_cores == [False, True, True, True, True]
    assert not activations.has_tensor_cores(places[2], torch.float32)
    activations.capability.cache_clear()


def test_a_grid_has_room_for_the_rows_of_many_tokens(monkeypatch):
    from dynquant.kernels.triton import activations

    grids = []
    kernel = {"__getitem__": lambda self, grid: grids.append(grid) or (lambda *arguments, **constants: None)}
    monkeypatch.setattr(activations, "_arrange_kernel", type("Kernel", (), kernel)())
    activations.arrange(torch.empty(600_000, 64, device="meta"), "Q8_0", 600_000)
    (grid,) = grids
    assert len(grid) == 1 or max(grid[1:]) <= 65535


@pytest.mark.parametrize("name", TYPES)
def test_rings_fit_a_hopper_gpu_and_are_decoded_in_parts(name):
    from dynquant.kernels.triton import fragments

    ring = pytest.importorskip("dynquant.kernels.gluon.ring", reason="this Triton has no Gluon for Hopper GPUs")
    step = fragments.step_of.fn(name)
    weights = [torch.empty(rows, 8192, dtype=torch.uint8, device="meta") for rows in (14336, 28672)]
    chosen = [ring.config(rows, weight, name) for rows in (17, 33, 65, 129, 1024) for weight in weights]
    chosen += [ring.experts_config(rows, name) for rows in (24, 32, 48, 400)]
    for each in chosen:
        assert step % each["CHUNK"] == 0 and step // each["CHUNK"] >= 2
        assert each["DEPTH"] >= 3 and each["DEPTH"] * each["CHUNK"] * each["BM"] * 2 <= 192 << 10
    assert ring.experts_config(11.9, name) is None


def planar(name: str, *shape: int) -> torch.Tensor:
    return pack_planes(name, packed_weights(name, *shape)).cuda()


def dtypes_of(name: str) -> dict[torch.dtype, float]:
    """Activation dtypes and the error they may have. Each is a compilation: the rarer two are for some types only."""
    some = {torch.float16: BF16_ERROR, torch.float32: 1e-5} if name in FAMILIES else {}
    return {torch.bfloat16: BF16_ERROR, **some}


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_cuda_weights_are_bit_equal(name, cuda):
    weight = packed_weights(name, 3, 67, 1280)
    dense, packed = decode(name, weight), pack_planes(name, weight).cuda()
    found = ops.dequantize(packed, name, layout="planes").cpu()
    assert torch.equal(found.view(torch.int32), dense.view(torch.int32))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ops.dequantize(packed, name, dtype=dtype, layout="planes").cpu(), dense.to(dtype))
    table = pack_planes(name, weight[0]).cuda()
    ids = torch.tensor([[66, 0], [5, 5]], device=cuda)
    rows = ops.embedding(ids, table, name, dtype=torch.float32, layout="planes").cpu()
    assert torch.equal(rows, dense[0][ids.cpu()])
    assert ops.embedding(ids + 66, table, name, dtype=torch.float32, layout="planes")[0, 0].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_cuda_subnormal_scales_are_kept(name, cuda):
    weight = packed_weights(name, 256, 64)
    columns = 1 if name == "MXFP4" else 4
    weight[:, :columns] = torch.arange(256, dtype=torch.uint8)[:, None]
    found = ops.dequantize(pack_planes(name, weight).cuda(), name, layout="planes").cpu()
    assert torch.equal(found.nan_to_num(7.0), decode(name, weight).nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_cuda_products_equal_float64(name, cuda):
    weight = packed_weights(name, 130, 768)
    dense, packed = decode(name, weight).double(), pack_planes(name, weight).cuda()
    for rows in (1, 2, 5, 17, 40, 65, 257):
        for dtype, bound in dtypes_of(name).items():
            x, dy = normal(rows, 768, dtype=dtype), normal(rows, 130, dtype=dtype)
            y = ops.linear(x.cuda(), packed, name, layout="planes")
            dx = ops.input_grad(dy.cuda(), packed, name, layout="planes")
            assert y.dtype == dtype and relative_error(y.cpu(), x.double() @ dense.T) <= bound, (rows, dtype)
            assert dx.dtype == dtype and relative_error(dx.cpu(), dy.double() @ dense) <= bound, (rows, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_cuda_experts_equal_float64(name, tokens, cuda):
    weight = packed_weights(name, 5, 72, 512)
    packed = pack_planes(name, weight).cuda()
    ids = torch.randint(-1, 7, (tokens, 2), generator=torch.Generator().manual_seed(2))
    ids[ids == 2] = 3  # nobody chooses expert 2
    for chosen in (ids, torch.full_like(ids, 4)):
        for dtype, bound in dtypes_of(name).items():
            x, dy = normal(tokens, 512, dtype=dtype), normal(tokens, 2, 72, dtype=dtype)
            y = ops.experts_linear(x.cuda(), packed, chosen.cuda(), name, layout="planes").cpu()
            dx = ops.experts_input_grad(dy.cuda(), packed, chosen.cuda(), name, layout="planes").cpu()
            assert relative_error(y, experts_truth(x, weight, chosen, name)) <= bound
            assert relative_error(dx, experts_truth(dy, weight, chosen, name, transposed=True)) <= bound
            absent = (chosen < 0) | (chosen >= 5)
            assert not y[absent].any() and not dx[absent].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [100, 300])
def test_cuda_experts_with_long_rows_equal_float64(name, tokens, cuda):
    """On a Hopper GPU these run beside their decoding, in tiles of 64 and of 128."""
    weight = packed_weights(name, 5, 130, 2304)
    packed, x = pack_planes(name, weight).cuda(), normal(tokens, 2304, dtype=torch.bfloat16)
    ids = torch.randint(-1, 6, (tokens, 2), generator=torch.Generator().manual_seed(2))
    y = ops.experts_linear(x.cuda(), packed, ids.cuda(), name, layout="planes").cpu()
    assert relative_error(y, experts_truth(x, weight, ids, name)) <= BF16_ERROR
    assert not y[(ids < 0) | (ids >= 5)].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, "MXFP4", "Q8_0"])
@pytest.mark.parametrize("tokens", [40, 100, 300, 600])
@pytest.mark.parametrize("rows", [392, 130])
def test_cuda_gradients_of_experts_with_long_rows_equal_float64(name, tokens, rows, cuda):
    """On a Hopper GPU these run beside their decoding, but for gradients whose rows TMA does not take."""
    weight = packed_weights(name, 5, rows, 2304)
    packed, dy = pack_planes(name, weight).cuda(), normal(tokens, 2, rows, dtype=torch.bfloat16)
    ids = torch.randint(-1, 6, (tokens, 2), generator=torch.Generator().manual_seed(2))
    dx = ops.experts_input_grad(dy.cuda(), packed, ids.cuda(), name, layout="planes").cpu()
    assert relative_error(dx, experts_truth(dy, weight, ids, name, transposed=True)) <= BF16_ERROR
    assert not dx[(ids < 0) | (ids >= 5)].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, "MXFP4", "Q8_0"])
@pytest.mark.parametrize(("rows", "shape"), [(5, (2056, 8192)), (64, (4096, 1280)), (100, (20000, 1024))])
def test_cuda_gradients_of_matrices_equal_float64(name, rows, shape, cuda):
    """On a Hopper GPU programs share the rows of a matrix, and add up parts in the same order every time."""
    weight = packed_weights(name, *shape)
    packed, dy = pack_planes(name, weight).cuda(), normal(rows, shape[0], dtype=torch.bfloat16).cuda()
    dx = ops.input_grad(dy, packed, name, layout="planes")
    assert relative_error(dx, dy.double() @ decode(name, weight).cuda().double()) <= BF16_ERROR
    assert all(torch.equal(ops.input_grad(dy, packed, name, layout="planes"), dx) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Q4_K", "MXFP4"])
@pytest.mark.parametrize("tokens", [30, 700])
def test_cuda_experts_in_tiles_of_32_and_256_equal_float64(name, tokens, cuda):
    weight = packed_weights(name, 4, 200, 2304)
    packed, x = pack_planes(name, weight).cuda(), normal(tokens, 2304, dtype=torch.bfloat16)
    ids = torch.randint(0, 4, (tokens, 2), generator=torch.Generator().manual_seed(2))
    y = ops.experts_linear(x.cuda(), packed, ids.cuda(), name, layout="planes").cpu()
    assert relative_error(y, experts_truth(x, weight, ids, name)) <= BF16_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("rows", "shape"), [(32, (424, 8192)), (50, (20000, 1024)), (100, (2056, 4096)), (300, (20000, 1024))]
)
def test_cuda_programs_share_the_steps_of_tiles(name, rows, shape, cuda):
    """Few tiles, whose sums go from program to program on a Hopper GPU; as many as programs; and several rounds."""
    weight = packed_weights(name, *shape)
    packed, x = pack_planes(name, weight).cuda(), normal(rows, shape[1], dtype=torch.bfloat16).cuda()
    y = ops.linear(x, packed, name, layout="planes")
    assert relative_error(y, x.double() @ decode(name, weight).cuda().double().T) <= BF16_ERROR
    for groups in (2, 3, 4) * 7:
        torch.full((132, groups), 4, dtype=torch.int32, device=cuda)  # flags find memory where all are raised
        assert torch.equal(ops.linear(x, packed, name, layout="planes"), y)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "Q8_0"])
def test_cuda_gradients(name, cuda):
    packed, experts = planar(name, 96, 512), planar(name, 4, 96, 512)
    x = normal(70, 512, dtype=torch.bfloat16).cuda().requires_grad_()
    ids = torch.randint(0, 5, (70, 2), generator=torch.Generator().manual_seed(2)).cuda()
    y = ops.linear(x, packed, name, layout="planes")
    routed = ops.experts_linear(x, experts, ids, name, layout="planes")
    (x_grad,) = torch.autograd.grad((y.float().square().sum() + routed.float().square().sum()) / 2, x)
    dense = decode(name, packed_weights(name, 96, 512)).double().cuda()
    dense_experts = decode(name, packed_weights(name, 4, 96, 512)).double().cuda()
    stacked = torch.cat((dense_experts, torch.zeros_like(dense_experts[:1])))[ids]  # [70, 2, 96, 512]
    expected = y.double() @ dense + torch.einsum("tsn,tsnk->tk", routed.double(), stacked)
    assert relative_error(x_grad, expected) <= 1e-2


@pytest.mark.gpu
def test_cuda_ids_are_sorted_once_until_they_change(cuda, monkeypatch):
    from dynquant.kernels.triton import grouped

    sorted_ids = []
    sort = grouped.sorted_tiles
    monkeypatch.setattr(grouped, "sorted_tiles", lambda ids, *sizes: sorted_ids.append(ids) or sort(ids, *sizes))
    weight = packed_weights("Q4_K", 5, 96, 512)
    packed, x = pack_planes("Q4_K", weight).cuda(), normal(100, 512).cuda().requires_grad_()
    ids = torch.randint(0, 5, (100, 2), generator=torch.Generator().manual_seed(2)).cuda()
    y = ops.experts_linear(x, packed, ids, "Q4_K", layout="planes")
    ops.experts_linear(2 * x, packed, ids, "Q4_K", layout="planes").sum().backward()
    assert len(sorted_ids) == 1 and relative_error(y.cpu(), experts_truth(x.cpu(), weight, ids.cpu(), "Q4_K")) < 1e-5
    ids.fill_(3)
    y = ops.experts_linear(x, packed, ids, "Q4_K", layout="planes")
    assert len(sorted_ids) == 2 and relative_error(y.cpu(), experts_truth(x.cpu(), weight, ids.cpu(), "Q4_K")) < 1e-5
    buffer = ids.clone()
    for expert in (4, 1):  # as compiled code does it
        buffer.data.fill_(expert)
        y = torch.ops.dynquant.experts_linear(x, packed, buffer, "Q4_K", "planes")
        assert relative_error(y.cpu(), experts_truth(x.cpu(), weight, buffer.cpu(), "Q4_K")) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "Q5_1"])
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_cuda_graphs_repeat_the_same_bits(name, tokens, cuda):
    packed, experts = planar(name, 96, 512), planar(name, 4, 96, 512)
    x = normal(tokens, 512, dtype=torch.bfloat16).cuda()
    ids = torch.randint(0, 5, (tokens, 2), device=cuda)

    def step():
        y = ops.linear(x, packed, name, layout="planes")
        routed = ops.experts_linear(x, experts, ids, name, layout="planes")
        back = ops.input_grad(y, packed, name, layout="planes")
        return y, routed, back, ops.experts_input_grad(routed, experts, ids, name, layout="planes")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(normal(tokens, 512, seed=9).cuda())
    ids.copy_(torch.randint(0, 5, (tokens, 2), device=cuda))
    expected = step()
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_cuda_blocks_run_by_the_reference_with_a_warning(cuda):
    dispatch._warn_once.cache_clear()
    weight = packed_weights("Q4_K", 9, 256)
    x = normal(2, 256)
    with pytest.warns(UserWarning, match="pack_planes"):
        y = ops.linear(x.cuda(), weight.cuda(), "Q4_K")
    assert relative_error(y.cpu(), x.double() @ decode("Q4_K", weight).double().T) < 1e-5


@pytest.mark.gpu
def test_cuda_opcheck(cuda):
    packed, experts = planar("Q4_K", 96, 512), planar("Q4_K", 4, 96, 512)
    x = normal(7, 512, dtype=torch.bfloat16).cuda().requires_grad_()
    ids = torch.randint(0, 5, (7, 2), device=cuda)
    torch.library.opcheck(torch.ops.dynquant.linear.default, (x, packed, "Q4_K", "planes"))
    torch.library.opcheck(torch.ops.dynquant.experts_linear.default, (x, experts, ids, "Q4_K", "planes"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Q8_0", "IQ4_NL"])
def test_cuda_sizes_of_one(name, cuda):
    """Triton makes arguments that are 1 into constants, which are other programs."""
    weight = packed_weights(name, 1, 1, 32)
    dense, packed = decode(name, weight).double(), pack_planes(name, weight).cuda()
    most = 2 * BF16_ERROR  # a single block: the rounding of its scale does not average out
    for tokens in (1, 40, 300):
        x = normal(tokens, 32, dtype=torch.bfloat16)
        ids = torch.zeros(tokens, 1, dtype=torch.int64, device=cuda)
        expected = x.double() @ dense[0].T
        assert relative_error(ops.linear(x.cuda(), packed[0], name, layout="planes").cpu(), expected) <= most
        routed = ops.experts_linear(x.cuda(), packed, ids, name, layout="planes")
        assert relative_error(routed[:, 0].cpu(), expected) <= most
        back = ops.experts_input_grad(routed, packed, ids, name, layout="planes")
        assert relative_error(back[:, 0].cpu(), routed[:, 0].cpu().double() @ dense[0]) <= most
    assert torch.equal(ops.dequantize(packed, name, layout="planes").cpu(), dense.float())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "rows"), [("Q4_K", 7), ("IQ3_S", 1)])
def test_cuda_traced_whole_and_recorded(name, rows, cuda):
    packed = planar(name, 96, 512)
    dispatch.prepare(name, packed.device)

    def model(x):
        return ops.linear(torch.nn.functional.silu(x), packed, name, layout="planes") * 2

    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # plain, recorded, replayed
        x = normal(rows, 512, seed=seed, dtype=torch.bfloat16).cuda()
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
