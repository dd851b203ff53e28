"""The compiled decoder gives the other decoder's bits. It needs a C++ compiler."""

import shutil
import subprocess
import sys

import pytest
import torch

import lorax
from lorax import backend as switch
from lorax.errors import UsageError
from lorax.quant import compiled

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("format", ["nf4", "fp4-dq"])
def test_equal_bits(format):
    torch.manual_seed(0)
    dtype = torch.bfloat16
    for shape in ((64, 96), (7, 65), (1,), (0,), (333, 64), (3, 63)):
        for block_size in (32, 64) if shape == (64, 96) else (64,):
            weight = lorax.quantize(torch.randn(shape).to(dtype), format, block_size)
            expected = weight.dequantize()
            out = torch.full(shape, torch.nan, dtype=dtype)
            with switch.backend("compiled"):
                assert torch.equal(weight.dequantize(out=out), expected), (shape, block_size)


@pytest.mark.slow
@needs_compiler
def test_infinite_and_missing_scales():
    weight = lorax.quantize(torch.randn(8, 64), "nf4")
    weight.absmax[0], weight.absmax[1], weight.absmax[2] = torch.inf, torch.nan, 0
    expected = weight.dequantize(torch.bfloat16)
    with switch.backend("compiled"):
        found = weight.dequantize(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert found[0].isinf().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_go_the_other_way(dtype, monkeypatch):
    def no(*arguments):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiled, "_compiled", no)
    weight = lorax.quantize(torch.randn(8, 64), "nf4")
    with switch.backend("compiled"):
        found = weight.dequantize(dtype)
        with pytest.raises(AssertionError, match="compiled"):
            weight.dequantize(torch.bfloat16)
    assert torch.equal(found, weight.dequantize(dtype))


def test_bits_by_logic():
    """What is compiled, not compiled: each of the 16 entries is found."""
    entries = torch.randn(16)
    codes = torch.arange(16, dtype=torch.int32)
    assert torch.equal(compiled._choose(entries.tolist(), codes), entries)


@pytest.mark.slow
def test_without_a_compiler_it_says_so(tmp_path):
    code = (
        "import torch, lorax\n"
        "from lorax import backend as switch\n"
        "weight = lorax.quantize(torch.randn(4, 64), 'nf4')\n"
        "try:\n"
        "    with switch.backend('compiled'):\n"
        "        weight.dequantize(torch.bfloat16)\n"
        "except lorax.errors.EnvironmentProblem as error:\n"
        "    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HOME": "/"},
    )  # fmt: skip
    assert "C++" in found.stdout
    assert "Leave it out" in found.stdout


def test_the_switch(monkeypatch):
    monkeypatch.setenv("LORAX_KERNELS", "compiled")
    tensor = torch.zeros(1)
    assert switch.uses_compiled(tensor)
    assert not switch.uses_triton(tensor)
    monkeypatch.setenv("LORAX_KERNELS", "compile")
    with pytest.raises(UsageError, match="'compile' is unknown"):
        switch.uses_compiled(tensor)
