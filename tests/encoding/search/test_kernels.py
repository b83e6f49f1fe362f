"""Triton's kernels of the search, compiled for an H100 without one; what they find is in `test_dynquant_encoder`."""

import re

import pytest
import torch

from dynquant.encoding.search.layouts import LAYOUTS
from dynquant.encoding.search.rows import Rows
from tests.helpers.representatives import represented_by

pytest.importorskip("triton", reason="Triton is not installed")

CODES = {"scales_ptr": "*i64", "mins_ptr": "*i64", "steps_ptr": "*i32"}
WALKS = ["column_kernels._feed_back_kernel", "column_kernels._descend_kernel", "scale_kernels._descend_scales_kernel"]


@pytest.mark.parametrize("walk", represented_by(WALKS[:1], WALKS))
@pytest.mark.parametrize("name", represented_by(("IQ2_XXS", "Q2_K"), ["IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q2_K", "Q4_K"]))
def test_walks_over_columns_compile_without_spills_and_use_tensor_cores(name, walk):
    from dynquant.encoding.search import column_kernels, scale_kernels
    from tests.helpers.sm90 import compiled, count, opcodes

    module, kernel = walk.split(".")
    function = getattr({"column_kernels": column_kernels, "scale_kernels": scale_kernels}[module], kernel)
    given = scale_kernels.trial_constants(Rows.of(LAYOUTS[name], torch.zeros(1, 1, 256)))
    options = {option: given[option] for option in ("num_warps", "num_stages")}
    constants = {arg: given[arg] for arg in function.arg_names if arg in given and not arg.endswith("_ptr")}
    types = {arg: "*fp32" if arg.endswith("_ptr") else "i32" for arg in function.arg_names if arg not in constants}
    types |= {arg: kind for arg, kind in CODES.items() if arg in types}
    codes = opcodes(function, types, constants, set(types), **options)
    layouts = compiled(function, types, constants, set(types), **options).asm["ttgir"]
    assert not re.search(r"tensor<\d+x1xf32, #ttg.dot_op", layouts), "tensor cores get products of one term wrong"
    assert not count(codes, "LDL", "STL")
    assert count(codes, "HMMA")
    assert count(codes, "LDGSTS"), "tiles of products are not copied ahead"
