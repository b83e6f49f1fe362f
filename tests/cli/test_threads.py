"""How OpenMP's threads wait in a command."""

import os
import subprocess
import sys

import pytest

SETTINGS = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    "setting, spins",
    [
        ({}, "0"),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", marks=pytest.mark.nightly),
        pytest.param({"GOMP_SPINCOUNT": "77"}, "77", marks=pytest.mark.nightly),
    ],
    ids=["sleep by default", "users' policy", "users' count"],
)
def test_openmp_reads_how_to_wait_when_pytorch_loads_it(setting, spins, small_moe):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | setting
    call = [sys.executable, "-m", "dynquant", "inspect", str(small_moe)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
