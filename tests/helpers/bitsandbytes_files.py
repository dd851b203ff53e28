"""Quantized models of transformers and bitsandbytes: made, saved, opened, compared."""

import torch
from golden.make_bitsandbytes import decoded, quantized_linears
from oracles import gpt2, llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorax.models.replace import replace_module
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear

TINY = 1e-5
KINDS = {"llama": llama, "gpt2": gpt2}
FORMATS = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
LAYER = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}
# Rows that are multiples of 64: bitsandbytes' AVX-512 dequantize is right for these only.
EVEN = {
    "llama": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
RAGGED = {"llama": {}, "gpt2": {"n_inner": 100, "bos_token_id": 0, "eos_token_id": 0}}


def settings(format, **more):
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **more)
    kind, _, double = format.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        **more,
    )


def plain(path, kind, sizes=EVEN, **more):
    """A random model as transformers saves it; `path` again."""
    torch.manual_seed(0)
    KINDS[kind](**{**sizes[kind], **more}).save_pretrained(path)
    return path


def theirs_from(source, path, config, dtype=torch.float32):
    """Quantized and saved by transformers and bitsandbytes; the model that was saved."""
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
    model.save_pretrained(path)
    return model


def opened(path, **options):
    """A directory opened by transformers and bitsandbytes, with nothing missing and nothing odd."""
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def quantized(model):
    return {n: m.quantized for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def codes_of(module):
    return module.weight.data.contiguous().view(torch.uint8).flatten()


def assert_same_weights(mine, theirs):
    """Bytes, scales and decoded values of every quantized Linear, bit for bit."""
    ours, other = quantized(mine), quantized_linears(theirs)
    assert set(ours) == set(other)
    assert ours
    for name, q in ours.items():
        module = other[name]
        assert torch.equal(q.tensors()[0].view(torch.uint8).flatten(), codes_of(module)), name
        expected = decoded(module)
        assert torch.equal(q.dequantize(expected.dtype), expected), name
        if isinstance(q, FourBitTensor):
            assert torch.equal(q.absmax, module.weight.quant_state.absmax), name
            assert (q.dtype, q.shape) == (expected.dtype, expected.shape)


def densified(model):
    """The model with every quantized Linear made dense, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            replace_module(model, name, module.dense())
    return model


@torch.no_grad()
def logits(model, ids):
    out = model(ids)
    return (out if isinstance(out, torch.Tensor) else out.logits).float()


def exact(theirs):
    """Their model with its quantized Linears in training mode: see the top of this file."""
    for module in quantized_linears(theirs).values():
        module.train()
    return theirs
