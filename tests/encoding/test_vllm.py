"""Schemes that vLLM serves: the library decompresses what we measured, and the search lowers what it should."""

import pytest
import torch

from dynquant.encoding.vllm import encode_layers, nvfp4_global_scale
from dynquant.errors import EncodeError, PlanError
from dynquant.formats import vllm_schemes
from dynquant.formats.vllm_schemes import SCHEMES, fit_to_shapes, vllm_scheme
from tests.helpers.compressed_models import from_stored, library_weights
from tests.helpers.representatives import represented_by

OFTEN = [name for name in SCHEMES if name[1] not in "567" or name == "W5A16"]
QUANTIZED = represented_by(OFTEN, [name for name, scheme in SCHEMES.items() if scheme.is_quantized])
COLUMNS = 256


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    drawn = 0.05 * torch.randn(2, 24, COLUMNS, generator=generator)
    drawn[0, 3, 7], drawn[0, 4] = -1.3, 0.0
    return drawn


@pytest.fixture(scope="module")
def hessian():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x *= torch.linspace(0.1, 3, COLUMNS)
    return (x.T @ x / len(x) + 0.1 * torch.eye(COLUMNS))[None]


def encoded(scheme, weights, **options):
    scale = nvfp4_global_scale(float(weights.abs().max())) if scheme.strategy == "tensor_group" else None
    return encode_layers(scheme, weights, global_scale=scale, **options)


def test_errors_of_nvfp4_do_not_depend_on_its_global_scale():
    """Rows are priced under the scale of their own largest weight, and shipped under that of the whole layer."""
    scheme, generator = SCHEMES["NVFP4A16"], torch.Generator().manual_seed(2)
    weights = 0.02 * torch.randn(1, 64, COLUMNS, generator=generator)
    peak, errors = float(weights.abs().max()), []
    for larger in (1, 1.3, 1.7, 3000):
        (layer,) = encode_layers(scheme, weights, global_scale=nvfp4_global_scale(larger * peak))
        errors.append(float((layer.decoded() - weights[0]).square().sum()))
    assert max(errors) < 1.02 * min(errors)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_library_decompresses_exactly_what_we_decode(name, weights):
    scheme = SCHEMES[name]
    for grouped in map(scheme.grouped, scheme.group_sizes):
        for one in encoded(grouped, weights):
            parts = one.stored()
            for dtype in (torch.bfloat16, torch.float32):
                assert torch.equal(library_weights(parts, grouped, dtype), one.decoded(dtype))
                assert torch.equal(from_stored(grouped, parts).decoded(dtype), one.decoded(dtype))


@pytest.mark.parametrize("name", represented_by(OFTEN, SCHEMES))
def test_parts_have_the_sizes_that_the_scheme_states(name, weights):
    scheme = SCHEMES[name]
    for grouped in map(scheme.grouped, scheme.group_sizes):
        expected = grouped.parts(24, COLUMNS)
        parts = encoded(grouped, weights)[1].stored()
        assert list(parts) == [part.key for part in expected]
        for part in expected:
            assert parts[part.key].shape == part.shape and parts[part.key].nbytes == part.num_bytes


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_and_hessian_lower_the_error_they_weigh(name, weights, hessian):
    scheme = SCHEMES[name]
    importance = hessian.diagonal(dim1=1, dim2=2).expand(2, -1)

    def error(**options):
        lost = weights - torch.stack([one.decoded() for one in encoded(scheme, weights, **options)])
        return float((lost.square() * importance[:, None]).sum()), float(((lost @ hessian) * lost).sum())

    scheme = scheme.grouped(scheme.group_sizes[-1])
    plain, weighted, fed_back = error(), error(importance=importance), error(hessian=hessian)
    assert weighted[0] < plain[0] * 1.005
    assert fed_back[1] < 0.6 * weighted[1]


@pytest.mark.parametrize("num_bits", [2, 4])
def test_zero_points_gain_where_weights_are_lopsided(num_bits, weights, hessian):
    lopsided = (weights + 0.04).abs()
    for options in ({}, {"hessian": hessian}):
        errors = []
        for name in (f"W{num_bits}A16", f"W{num_bits}A16_ASYM"):
            lost = lopsided - torch.stack(
                [one.decoded() for one in encoded(SCHEMES[name].grouped(32), lopsided, **options)]
            )
            errors.append(float(lost.square().sum()))
        assert errors[1] < 0.7 * errors[0]


def test_integers_use_all_sixteen_values_on_either_side(weights):
    """The scale of a group may be negative, so that -8 meets the largest weight whatever its sign."""
    scales = torch.cat([one.scales for one in encoded(SCHEMES["W4A16"].grouped(32), weights)])
    assert (scales < 0).any() and (scales > 0).any()


def test_nan_weights_name_the_layer(weights):
    damaged = weights.clone()
    damaged[1, 2, 3] = float("nan")
    with pytest.raises(EncodeError, match=r"model\.layers\.3.* NaN"):
        encoded(SCHEMES["W4A16"].grouped(32), damaged, name="model.layers.3.mlp.up_proj")


@pytest.mark.parametrize(
    ("wanted", "shapes", "is_expert", "chosen", "words"),
    [
        ("W4A16", [(24, 512), (8, 256)], False, ("W4A16", 128), None),
        ("W4A16", [(24, 576)], False, ("W4A16", 64), None),
        ("W4A16", [(24, 96)], False, ("W4A16", 32), None),
        ("W4A16", [(24, 100)], False, ("FP8", 0), "rows of 100 do not divide into groups of 32"),
        ("NVFP4A16", [(24, 100)], True, ("BF16", 0), "groups of 16"),
        ("FP8", [(24, 256)], True, ("W8A16", 128), "no FP8 weights without FP8 activations"),
        ("W3A16_ASYM", [(64, 256)], True, ("W3A16_ASYM", 128), None),
        ("W3A16_ASYM", [(24, 256)], True, ("W3A16", 128), "3-bit zero points of its rows do not fill words"),
    ],
)
def test_rows_and_experts_that_a_scheme_does_not_fit(wanted, shapes, is_expert, chosen, words):
    scheme, why = fit_to_shapes(SCHEMES[wanted], shapes, is_expert=is_expert)
    assert (scheme.name, scheme.group_size) == chosen
    assert (why is None) if words is None else (words in why)


def test_unservable_types_are_named():
    with pytest.raises(PlanError, match=r"`iq1_s` is not a scheme .* W4A16.* -f gguf"):
        vllm_scheme("iq1_s")
    with pytest.raises(PlanError, match="Did you mean MXFP4A16"):
        vllm_scheme("mxfp4")


@pytest.mark.parametrize(
    ("versions", "refused"),
    [({"vllm": "0.28.0"}, "W3A16 takes vllm 0.29.0, and 0.28.0"), ({"vllm": "0.33.0"}, None), ({}, None),
     ({"compressed-tensors": "0.17.1"}, "W3A16 takes compressed-tensors 0.18.0, and 0.17.1"),
     ({"vllm": "0.32.0", "compressed-tensors": "0.17.0"}, None)],
)  # fmt: skip
def test_an_old_reader_is_named(versions, refused, monkeypatch):
    def version(package):
        if package not in versions:
            raise vllm_schemes.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(vllm_schemes, "version", version)
    assert vllm_scheme("w4a16").num_bits == 4
    if refused is None:
        assert vllm_scheme("w3a16").num_bits == 3
    else:
        with pytest.raises(PlanError, match=refused):
            vllm_scheme("w3a16")
