"""Blocks decoded in long rows are what the gguf package decodes; opening a model draws nothing."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

from lorax.formats.gguf_files import _decoded
from lorax.formats.model_config import new_model, read_config

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "TQ1_0")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (48, 3), (7, 2), (64, 40), (5, 600)])
def test_every_row_is_decoded_as_the_package_does(rows, blocks, kind):
    kind = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    data = draw.integers(0, 60, (rows, blocks * size * (8 if size < 8 else 1)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found, expected = _decoded(data, kind), gguf.quants.dequantize(data, kind)
    assert found.shape == expected.shape
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_model_without_memory_draws_no_numbers_and_imports_no_compiler():
    code = (
        "import sys, torch\n"
        "from lorax.formats.model_config import new_model, read_config\n"
        f"new_model(read_config({CONFIG!r}, 'test'))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = new_model(read_config(CONFIG, "test"))
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.nn.Linear(3, 3).weight.abs().sum() > 0  # outside it draws as ever
