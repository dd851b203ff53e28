"""The GPU's decoder on a CPU, through its kernels' twins and the interpreter, capture stubbed."""

import copy
from tempfile import TemporaryDirectory

import kernel_testing  # noqa: F401  first: it mends the interpreter
import pytest
import torch
from gpu_step import quantized
from oracles import llama, mistral, tokens

import lorax
from lorax.backend import backend
from lorax.inference import batch, gpu
from lorax.inference.batch import stream_rows
from lorax.kernels import reference_step

pytestmark = pytest.mark.slow

KIND = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def run_again(run):
    """A capture that warms up and replays, as CUDA's does."""
    run()
    return run


def model_of(make=llama, dtype=torch.bfloat16, format="nf4-dq", r=4, **kind):
    torch.manual_seed(0)
    with TemporaryDirectory() as where:
        make(**{**KIND, **kind}).save_pretrained(where)
        model = lorax.load_model(where)
    model = quantized(model.to(dtype), format)
    lorax.add_adapter(model, lorax.LoRAConfig(r=r, lora_alpha=8, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that generation makes, over twins."""
    made, real = [], gpu.decoder_of
    halves = torch.bfloat16, torch.float16
    monkeypatch.setattr(gpu, "kernels_for", lambda x: reference_step if x.dtype in halves else None)

    def decoder_of(model, cache):
        made.append(real(model, cache, run_again))
        return made[-1]

    monkeypatch.setattr(batch, "decoder_of", decoder_of)
    monkeypatch.setattr(batch, "with_twins", lambda model: model)  # those of a CPU
    return made


def hidden_of(model, prompts, following, use):
    """The hidden states of the following tokens (steps, rows, C), prompts being in the cache."""
    cache = batch.RowsCache(model, len(prompts), 40)
    decoder = gpu.decoder_of(model, cache, run_again) if use else None
    found = []
    with torch.inference_mode():
        for slot, prompt in enumerate(prompts):
            model.hidden_states(prompt[None], cache.whole(slot))
        slots = list(range(len(prompts)))
        for step in following:
            if decoder is not None:
                found.append(decoder.step(slots, step.tolist()).clone())
            else:
                found.append(model.hidden_states(step[:, None], cache.step(slots))[:, -1])
    assert (decoder is not None) == use
    return torch.stack(found)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"make": mistral, "sliding_window": 6},
        {"attention_bias": True},
        {"dtype": torch.float16},
    ],
    ids=["plain", "window", "biases", "float16"],
)
def test_rows_of_different_lengths_against_the_plain_pass(how, decoders):
    """Its error against the same weights in float32 is at most 1.5 times the plain pass's."""
    model = model_of(**how)
    wide = copy.deepcopy(model).float()
    prompts = [tokens(1, n, 64, seed=n)[0] for n in (3, 9, 14)]
    following = tokens(4, 3, 64, seed=5)
    truth = hidden_of(wide, prompts, following, use=False)
    plain = hidden_of(model, prompts, following, use=False).float()
    found = hidden_of(model, prompts, following, use=True).float()
    errors = [(side - truth).norm() for side in (found, plain)]
    assert errors[0] <= 1.5 * errors[1], errors


def test_generation_takes_it_and_gives_the_same_tokens_again(decoders):
    model = model_of()
    prompts = [tokens(1, n, 64, seed=n)[0].tolist() for n in (3, 9, 5, 4)]
    runs = [list(stream_rows(model, (), prompts, [6, 4, 5, 6], batch_size=3)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(decoder is not None and decoder.graphs for decoder in decoders)
    alone = [
        [t for _, t in stream_rows(model, (), [prompt], [n]) if t is not None]
        for prompt, n in zip(prompts, [6, 4, 5, 6], strict=True)
    ]
    together = [[t for i, t in runs[0] if i == row and t is not None] for row in range(4)]
    assert together == alone, "a row does not depend on the others"


def test_through_the_interpreter(monkeypatch):
    """The kernels themselves, one layer."""
    model = model_of(num_hidden_layers=1)
    prompts, following = [tokens(1, 4, 64)[0]], tokens(2, 1, 64, seed=5)
    plain = hidden_of(model, prompts, following, use=False).float()
    with backend("triton"):
        found = hidden_of(model, prompts, following, use=True).float()
    assert (found - plain).norm() <= 0.02 * plain.norm()


def watch(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)


def dense(model):
    layer = model.model.layers[1].mlp.up_proj
    layer.base_layer = layer.base_layer.dense(torch.bfloat16)


def other_activation(model):
    model.model.layers[1].mlp.activation = torch.nn.functional.gelu


@pytest.mark.parametrize("change", [watch, dense, other_activation], ids=lambda f: f.__name__)
def test_what_is_not_known_is_generated_the_plain_way(change, decoders):
    model = model_of()
    change(model)
    list(stream_rows(model, (), [[1, 2, 3]], [2]))
    assert decoders == [None]
