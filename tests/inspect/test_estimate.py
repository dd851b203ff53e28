"""`lorax estimate`: seeds' figures, and each part against what lorax makes in truth."""

import json

import pytest
import torch
from command_line import complete_lorax, run_lorax
from torch.profiler import ProfilerActivity, profile

import lorax
from lorax.formats.model_config import new_model, read_config
from lorax.inspect.estimate.configs import find_config, known
from lorax.inspect.estimate.heap import Heap
from lorax.inspect.estimate.peak import estimate
from lorax.inspect.estimate.setting import OPTIMIZERS, setting_of
from lorax.inspect.estimate.shape import shape_of
from lorax.inspect.estimate.tensors import quantized_bytes, state_bytes, weight_bytes
from lorax.inspect.estimate.trace import trace_step
from lorax.quant import names
from lorax.training.fast.install import accelerated
from lorax.training.loss import summed_loss
from lorax.training.optimizers import OPTIMIZERS as CLASSES

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160} | {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}


def shape(name, r, targets):
    config = lorax.LoRAConfig(r=r, target_modules=targets)
    return shape_of(find_config(name).config, config)


@pytest.mark.parametrize(
    ("name", "r", "targets", "trained"),
    [
        ("huggyllama/Llama-2-7b-hf", 16, ["q_proj", "k_proj", "v_proj", "o_proj"], 16_777_216),
        ("Llama-3.2-1B", 8, ["q_proj", "v_proj"], 851_968),
        ("Llama-2-7b", 8, ["q_proj", "v_proj"], 4_194_304),
        ("Llama-2-7b", 16, ["q_proj", "v_proj"], 8_388_608),
        ("gpt2", 8, ["c_attn"], 294_912),
    ],
)
def test_the_courses_counts_come_out_right(name, r, targets, trained):
    found = shape(name, r, targets)
    assert sum(found.trained) == sum(found.adapter) == trained
    if name == "gpt2":
        assert found.base + trained == 124_734_720


def test_double_quantization_saves_0_373_bits():
    bits = [8 * quantized_bytes(name, 4096, 4096) / 4096**2 for name in ("nf4", "nf4-dq")]
    assert [round(value, 3) for value in bits] == [4.5, 4.127]
    assert round(bits[0] - bits[1], 3) == 0.373


def test_seventy_billion_values_in_nf4_are_36_1_gb():
    assert round(quantized_bytes("nf4-dq", 7_000_000, 10_000) / 1e9, 1) == 36.1


def test_published_sizes_of_the_known_models():
    published = {"Llama-2-7b": 6_738_415_616, "Meta-Llama-3-8B": 8_030_261_248}
    published |= {"Llama-2-70b": 68_976_648_192, "Mistral-7B-v0.1": 7_241_732_096}
    published |= {"SmolLM2-135M": 134_515_008, "Qwen2.5-0.5B": 494_032_768}
    for name, count in published.items():
        model = new_model(find_config(name).config)
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_every_known_config_is_read():
    assert all(find_config(name).config.sizes.layers > 0 for name in known())


@pytest.mark.parametrize("format", names.formats())
@pytest.mark.parametrize("size", [(48, 80), (3, 7)])
def test_quantized_bytes_against_quantize(format, size):
    weight = lorax.quantize(torch.randn(size), format)
    assert quantized_bytes(format, *size) == weight.nbytes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_bytes_against_the_optimizers(optimizer):
    sizes = [(700, 400), (64, 64), (5,), (300, 900), (17, 3)]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made = CLASSES[optimizer](parameters)
    made.step()
    assert state_bytes(optimizer, [p.numel() for p in parameters]) == made.state_bytes()


def real_peak(config, setting):
    """The most bytes of torch's allocator in a real step beyond the model, by its profiler."""
    torch.manual_seed(0)
    model = new_model(config).to_empty(device="cpu").to(torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.tie_weights()
    if setting.adapter is None:
        model.requires_grad_(True)
    else:
        lorax.add_adapter(model, setting.adapter)
    model.gradient_checkpointing = setting.checkpointing
    model.train()
    with (
        accelerated(model, setting.fast),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found,
    ):
        ids = torch.randint(0, 512, (setting.batch, setting.length))
        (summed_loss(model, ids, ids) / 2).backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("values", "method", "more"),
    [
        (LLAMA, "lora", {}),
        (LLAMA, "lora", {"fast": False}),
        (LLAMA, "lora", {"checkpointing": True}),
        (LLAMA, "lora", {"length": 600, "batch": 1}),
        (LLAMA, "full", {}),
        (GPT2, "lora", {}),
        (GPT2, "full", {"checkpointing": True}),
    ],
)
def test_a_traced_step_holds_what_a_real_one_holds(values, method, more):
    config = read_config(values, "test")
    setting = setting_of(method, "float32", **{"batch": 2, "length": 160, "r": 4} | more)
    now = most = 0
    for event in trace_step(config, setting, layers=2).events:
        now += event.nbytes
        most = max(most, now)
    assert most == pytest.approx(real_peak(config, setting), rel=0.03)


def test_the_heap_gives_back_and_keeps():
    heap = Heap()
    for name in range(40):
        heap.allocate(name, 200_000 if name < 20 else 1_000_000)
    assert heap.peak >= 24_000_000
    for name in range(40):
        heap.free(name)
    assert heap.resident < 3_000_000  # what is left is the heap's end
    heap.allocate("again", 10_000_000)
    assert 10_000_000 <= heap.resident < 14_000_000


def test_a_deep_model_from_few_layers():
    """What three layers say of six is what six say."""
    config = read_config(LLAMA | {"num_hidden_layers": 6}, "test")
    setting = setting_of("lora", "float32", batch=1, length=64)
    traced = [sum_of_kept(trace_step(config, setting, n)) for n in (2, 3, 6)]
    assert traced[2] == pytest.approx(traced[1] + 3 * (traced[1] - traced[0]), rel=0.01)


def sum_of_kept(trace):
    now = most = 0
    for event in trace.events:
        now += event.nbytes
        most = max(most, now)
    return most


def test_the_parts_of_an_estimate():
    config = read_config(LLAMA, "test")
    found = estimate(config, setting_of("qlora", "bfloat16", batch=1, length=64), process=10**8)
    parts, config_shape = found.parts, shape_of(config, found.setting.adapter)
    assert parts.weights == weight_bytes(config_shape, found.setting)
    assert parts.adapter == parts.gradients == 4 * found.trainable
    assert found.peak_bytes > parts.weights + parts.adapter + parts.activations + 10**8
    assert sum(found.kinds.values()) + found.trainable == found.parameters


@pytest.mark.parametrize("format", ["nf4-dq", "int8", "int4-affine"])
def test_a_trace_leaves_no_tensor_without_memory_behind(format):
    """Tables that are made once must not have been made in a trace."""
    setting = setting_of("qlora", "float32", batch=1, length=16, quantization=format)
    trace_step(read_config(LLAMA, "test"), setting, layers=1)
    weight = torch.randn(16, 64)
    again = lorax.quantize(weight, format).dequantize()
    assert type(again) is torch.Tensor
    assert (again - weight).abs().max() < 1.0


def test_the_command_compares_methods(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = ("estimate", tmp_path / "config.json", "--r", "4", "--batch", "1", "--length", "32")
    picture = tmp_path / "memory.png"
    found = json.loads(run_lorax(*command, "--json", "--plot", picture))
    assert [one["method"] for one in found] == ["full", "lora", "qlora"]
    assert set(found[0]["bytes"]) == {
        *("weights", "adapter", "gradients", "optimizer", "activations", "logits", "other")
    }
    assert found[0]["trainable"] == found[0]["parameters"]
    assert found[0]["fits"]["8 GB"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_name_says_which_is_near():
    done = complete_lorax("estimate", "llama-2-7")
    assert done.returncode == 3
    assert "did you mean Llama-2-7b" in done.stderr
