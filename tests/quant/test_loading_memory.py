"""Loading a quantized model takes little more than the model: measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

import lorax

# glibc's heap keeps freed memory by a rule that moves while a program runs: the same load took from
# 135 to 189 MB in ten runs. With the threshold fixed, what is freed goes back, and the mark shows
# what the load holds (127 to 142 MB).
PLAIN_HEAP = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}

# The high-water mark of resident memory before and behind the load. (ru_maxrss would begin with the
# parent's value.)
CODE = """
import gc, json, sys, torch, lorax
from lorax.formats.model_config import new_model
from lorax.models.llama_config import LlamaConfig
from lorax.quant.linear import QuantizedLinear

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

# What is made and imported once, whatever the model: the meta device alone brings 140 MB of code.
lorax.quantize(torch.randn(64, 64), "nf4-dq").dequantize()
sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 8)
counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
new_model(LlamaConfig(**sizes, **dict.fromkeys(counts, 1)))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the mark begins anew
before = status("VmRSS")
model = lorax.load_model(sys.argv[1], quantization="nf4-dq")
peak = status("VmHWM") - before
quantized = [m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear)]
plain = [p.nbytes for p in model.parameters()]
print(json.dumps({"peak": peak, "size": sum(quantized) + sum(plain), "largest": max(plain)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_smollm2_as_nf4_dq(dtype, smollm2_gguf, tmp_path):
    lorax.save_model(lorax.load_model(smollm2_gguf, dtype), tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model")],
        capture_output=True, text=True, check=True, env={**os.environ, **PLAIN_HEAP},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["peak"] >= 0.9 * found["size"]  # it measures what it says
    assert found["peak"] <= 1.3 * found["size"] + found["largest"]
