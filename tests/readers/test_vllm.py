"""vLLM itself loads our checkpoints and gives the log-probabilities of our decoded weights."""

import pytest

from tests.readers.programs import Missing
from tests.readers.vllm_parity import measure

KERNELS = ("kernel", "backend", "Marlin", "gptq_marlin_repack")
"""Words by which vLLM says that a scheme has no kernel on the CPU; anything else would be a fault of the files."""
RUN = {"llama-BF16-BF16", "llama-W4A16-W4A16", "llama-W4A16_ASYM-W4A16_ASYM", "textbook-moe-16m-W4A16-BF16"}


@pytest.mark.nightly
def test_log_probabilities_are_ours_or_a_kernel_is_missing(tmp_path) -> None:
    try:
        parities = measure(tmp_path)
    except Missing as missing:
        pytest.skip(str(missing))
    assert {parity.case.name for parity in parities if parity.problem is None} >= RUN
    for parity in parities:
        if parity.problem is None:
            assert parity.kl < 1e-3, parity
        else:
            assert any(word in parity.problem for word in KERNELS), parity
