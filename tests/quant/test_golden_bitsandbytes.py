"""Checkpoints that transformers and bitsandbytes wrote, kept in the repository (promise R4).

Nothing here needs either library, so the exchange is tested where they are not installed. A test in
test_bitsandbytes_checkpoints.py makes the same files again with the installed versions.
"""

import subprocess
import sys

import pytest
import torch
from golden.make_bitsandbytes import GOLDEN, HERE, weight
from safetensors.torch import load_file

import lorax
from lorax.quant.linear import QuantizedLinear

FORMATS = {"llama-nf4-dq": "nf4-dq", "gpt2-fp4": "fp4", "gpt2-int8": "int8"}


def quantized(model):
    return {n: m.quantized for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_checkpoint_decodes_to_bitsandbytes_values(name):
    model = lorax.load_model(HERE / name)
    truth = load_file(HERE / name / "dequantized.safetensors")
    found = quantized(model)
    assert {f"{n}.weight" for n in found} == set(truth)
    for path, q in found.items():
        expected = truth[f"{path}.weight"]
        assert q.format == FORMATS[name]
        assert torch.equal(q.dequantize(expected.dtype), expected), path
    assert model.get_parameter(model.embedding_name).dtype == GOLDEN[name][2]
    assert model(torch.arange(12)[None]).isfinite().all()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_checkpoint_is_written_back_tensor_for_tensor(name, tmp_path):
    lorax.save_model(lorax.load_model(HERE / name), tmp_path / "again")
    theirs = load_file(HERE / name / "model.safetensors")
    mine = load_file(tmp_path / "again" / "model.safetensors")
    assert set(mine) == set(theirs)
    for key, tensor in theirs.items():
        stored = tensor
        if key.endswith("weight") and mine[key].dtype == torch.uint8:
            stored = tensor.view(torch.uint8).view(-1, 1)  # lorax writes bytes as bytes
        if "quant_state" in key:
            assert bytes(mine[key].tolist()) == bytes(tensor.tolist()), key
        assert torch.equal(mine[key], stored), key


@pytest.mark.parametrize("name", ["llama-nf4-dq", "gpt2-fp4"])
def test_lorax_quantizes_the_same_weights_to_the_same_bytes(name):
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for path, q in quantized(lorax.load_model(HERE / name)).items():
        key = f"{path}.weight"
        shape = tuple(q.shape)
        dense = weight(key, shape[::-1]).t() if key.endswith(turned) else weight(key, shape)
        mine = lorax.quantize(dense.to(q.dtype), q.format)
        assert torch.equal(mine.packed, q.packed), path
        assert torch.equal(mine.absmax, q.absmax), path
        if q.nested is not None:
            assert torch.equal(mine.nested.absmax, q.nested.absmax), path
            assert torch.equal(mine.nested.offset, q.nested.offset), path


def test_reading_them_imports_neither_library():
    code = (
        f"import sys, lorax; lorax.load_model({str(HERE / 'llama-nf4-dq')!r});"
        "print(sorted({'bitsandbytes', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_golden_files_stay_small():
    sizes = {path: path.stat().st_size for path in HERE.rglob("*") if path.suffix != ".pyc"}
    before = sum(size for path, size in sizes.items() if HERE / "before" in path.parents)
    assert sum(sizes.values()) - before < 200_000
    assert before < 550_000  # of 20 things that the version before wrote
