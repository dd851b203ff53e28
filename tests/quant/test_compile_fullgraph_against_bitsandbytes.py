"""torch.compile(fullgraph=True) passes through quantized Linears, as through bitsandbytes' own.

Outputs and gradients must have the bits that they have without the compiler. "aot_eager" traces
forward and backward as inductor does and compiles nothing, so it needs no C++ compiler.
"""

import pytest
import torch
from oracles import llama

import lorax
from lorax.quant import names
from lorax.quant.linear import QuantizedLinear
from lorax.quant.quantize import quantize


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def run(module, x):
    """Output, and the gradients of x and of every parameter that is trained."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.float().square().sum().backward()
    trained = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *trained]


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("format", names.formats())
def test_a_quantized_linear_keeps_its_bits(format, bias):
    weight = quantize(torch.randn(96, 64), format)
    linear = QuantizedLinear(weight, None if bias == "none" else torch.randn(96))
    if bias == "trained":
        linear.bias.requires_grad_()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for shape in ((5, 64), (2, 3, 64), (1, 64), (17, 64)):  # sizes may vary from call to call
        x = torch.randn(shape)
        x.view(-1)[::50] *= 10  # outliers, which int8 takes out
        for found, expected in zip(run(compiled, x), run(linear, x), strict=True):
            assert torch.equal(found, expected)


def test_layers_of_one_size_share_a_graph():
    layers = [QuantizedLinear(quantize(torch.randn(64, 64), "nf4-dq")) for _ in range(12)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in layers:
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        x = torch.randn(4, 64)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_as_bitsandbytes_linear4bit_under_fullgraph(quant_type, nested):
    """The same weight there and here, both compiled in one graph."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(3)
    weight, x = torch.randn(64, 128), torch.randn(6, 128)
    theirs = bnb.nn.Linear4bit(
        128,
        64,
        bias=False,
        quant_type=quant_type,
        compress_statistics=nested,
        compute_dtype=torch.float32,
    )
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=nested
    )
    theirs = theirs.to("cpu").train()  # in eval mode it repacks for another product on some CPUs
    ours = QuantizedLinear(quantize(weight, quant_type + ("-dq" if nested else "")))
    results = [
        run(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
        for module in (ours, theirs)
    ]
    for found, expected in zip(*results, strict=True):
        # 128 products in another order: 8 ulps of the largest, as without the compiler
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq", "int8", "int4-affine", None])
def test_a_model_with_an_adapter_compiles_in_one_graph(tmp_path, quantization):
    llama(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    model = lorax.load_model(tmp_path / "model", quantization=quantization)
    config = lorax.LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lorax.add_adapter(model, config)
    ids = torch.randint(0, model.config.vocab_size, (2, 7))

    def gradients(callable):
        model.zero_grad()
        logits = callable(ids)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = gradients(model)
    found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
