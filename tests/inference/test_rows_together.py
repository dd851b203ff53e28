"""Prompts answered together: each gets what it gets alone, as transformers and PEFT give it."""

import copy

import pytest
import torch
from families import family
from oracles import gpt2, llama, mistral, tokens
from peft_pairs import pair as adapter_pair
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.dora import DoRALinear
from lorax.backend import backend
from lorax.inference import batch, rows, twins
from lorax.inference.batch import Sampling, stream_rows
from lorax.inference.generate import stream
from lorax.inference.native import library
from lorax.inference.products import FastLinear
from lorax.inference.twins import with_twins
from lorax.quant.linear import QuantizedLinear
from lorax.training.fast.install import accelerated

LENGTHS = (3, 20, 1, 11, 27)
MAKERS = {
    "llama": llama,
    "llama, one key head": lambda: llama(num_key_value_heads=1),
    "llama, dynamic rope": lambda: llama(
        rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        max_position_embeddings=32,
    ),
    "mistral, window": lambda: mistral(sliding_window=6),
    "gpt2": gpt2,
    "qwen2: window": lambda: family("qwen2: window"),
    "qwen3": lambda: family("qwen3"),
    "gemma2": lambda: family("gemma2"),
    "gemma3_text": lambda: family("gemma3_text"),
    "phi3: longrope": lambda: family("phi3: longrope"),
}


def prompts(lengths=LENGTHS, high=97):
    ids = tokens(rows=len(lengths), length=max(lengths)).clamp(3, high - 1)
    return [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]


def answers(model, rows, count=16, ends=(), **options):
    """{index: tokens}, and that each row says once that it has ended, behind its last token."""
    found, ended = {i: [] for i in range(len(rows))}, set()
    for index, token in stream_rows(model, ends, rows, [count] * len(rows), **options):
        assert index not in ended
        if token is None:
            ended.add(index)
        else:
            found[index].append(token)
    assert ended == set(found)
    return list(found.values())


def by_transformers(theirs, row, count=16):
    ids = torch.tensor([row])
    made = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
        min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(row) :].tolist()


@pytest.fixture(scope="module", params=MAKERS)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "base"
    torch.manual_seed(0)
    MAKERS[request.param]().save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lorax.load_model(folder), theirs


@pytest.mark.slow
def test_greedy_rows_against_transformers(both):
    """Over windows, and over the border of longrope, at which each row arrives at another time."""
    mine, theirs = both
    expected = [by_transformers(theirs, row) for row in prompts()]
    for size in (1, 2, 8):
        assert answers(mine, prompts(), batch_size=size) == expected
    with backend("pytorch"):
        assert answers(mine, prompts(), batch_size=3) == expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "base"
    torch.manual_seed(0)
    llama(hidden_size=64, num_attention_heads=4, intermediate_size=96).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "nf4-dq", "int8"])
def test_each_row_gets_what_it_gets_alone(plain, quantization, dtype):
    model = lorax.load_model(plain, dtype, quantization=quantization)
    alone = [answers(model, [row])[0] for row in prompts()]
    assert answers(model, prompts(), batch_size=4) == alone
    assert len({tuple(row) for row in alone}) == len(alone)


def test_draws_are_each_prompts_own(plain):
    model, sampling = lorax.load_model(plain), Sampling(1.0, 0.9, seed=5)
    alone = [answers(model, [row], sampling=sampling)[0] for row in prompts()]
    assert answers(model, prompts(), sampling=sampling, batch_size=2) == alone
    assert answers(model, prompts(), sampling=Sampling(1.0, 0.9, seed=6)) != alone


def test_a_row_that_ends_makes_room_for_the_next(plain):
    model = lorax.load_model(plain)
    free = answers(model, prompts())
    ends = {free[0][2], free[3][0], free[4][15]}
    expected = [row[: next((i for i, t in enumerate(row) if t in ends), 16)] for row in free]
    assert answers(model, prompts(), ends=ends, batch_size=2) == expected
    assert expected[3] == []
    assert max(map(len, expected)) == 16


def test_tokens_are_computed_without_a_graph_where_none_can_be_made(plain, monkeypatch, caplog):
    """As on a GPU whose driver refuses the capture: the same tokens, and one line."""
    model = lorax.load_model(plain)
    expected = answers(model, prompts())

    class Refused:
        def step(self, slots, tokens):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(batch, "decoder_of", lambda model, cache: Refused())
    assert answers(model, prompts()) == expected
    assert [m for m in caplog.messages if "without a graph" in m] == [
        "tokens are computed without a graph: operation not permitted when stream is capturing"
    ]


def test_nothing_is_made_where_nothing_is_asked_for(plain):
    model = lorax.load_model(plain)
    assert answers(model, prompts(), count=0) == [[]] * len(LENGTHS)
    assert answers(model, []) == []


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_an_unmerged_adapter_against_peft(tmp_path, options, quantization):
    theirs, mine = adapter_pair(
        llama(hidden_size=64, num_attention_heads=4, attention_bias=True, mlp_bias=True),
        tmp_path, r=5, lora_alpha=9, target_modules="all-linear", **options,
    )  # fmt: skip
    expected = [by_transformers(theirs, row) for row in prompts()]
    assert answers(mine, prompts()) == expected
    with lorax.disabled_adapter(mine):
        assert answers(mine, prompts()) != expected
    lorax.merge_adapter(mine)
    assert answers(mine, prompts()) == expected
    if quantization is not None:  # PEFT over the dequantized weights
        base = lorax.load_model(tmp_path / "base", quantization=quantization)
        with torch.no_grad():
            for name, module in base.named_modules():
                if hasattr(module, "quantized"):
                    held = theirs.get_submodule(f"base_model.model.{name}").base_layer
                    held.weight.copy_(module.quantized.dequantize(torch.float32))
        lorax.load_adapter(base, tmp_path / "theirs", check_base=False)
        assert answers(base, prompts()) == [by_transformers(theirs, row) for row in prompts()]


def test_a_variant_that_computes_otherwise_stays_as_it_is(tmp_path):
    theirs, mine = adapter_pair(
        llama(), tmp_path, r=4, use_dora=True, target_modules=["q_proj", "down_proj"]
    )
    assert answers(mine, prompts()) == [by_transformers(theirs, row) for row in prompts()]
    twin = with_twins(mine)
    kinds = {type(m) for m in twin.modules()}
    assert DoRALinear in kinds
    assert library() is None or FastLinear in kinds


def test_without_a_compiler_weights_are_decoded_once_where_they_fit(tmp_path, monkeypatch, caplog):
    adapter_pair(
        llama(hidden_size=64, num_attention_heads=4), tmp_path, r=3, target_modules="all-linear"
    )
    mine = lorax.load_model(tmp_path / "base", quantization="nf4-dq")
    lorax.load_adapter(mine, tmp_path / "theirs", check_base=False)
    expected = answers(mine, prompts())
    monkeypatch.setattr(twins, "library", lambda: None)
    monkeypatch.setattr(rows, "library", lambda: None)
    for free, decoded, said in (
        (10**9, True, "are decoded once for generation, 0.00 GB more memory"),
        (10**4, False, "decoding weights for each token for generation, 0.00 GB would be too much"),
    ):
        monkeypatch.setattr(twins, "_free_bytes", lambda free=free: free)
        caplog.clear()
        assert answers(mine, prompts()) == expected
        assert [said in message for message in caplog.messages] == [True]
        kept = [m for m in twins.with_twins(mine).modules() if isinstance(m, QuantizedLinear)]
        assert (not kept) is decoded


def test_the_model_is_not_touched(plain):
    model = lorax.load_model(plain, quantization="nf4").train()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = copy.deepcopy(model.state_dict())
    rows = stream_rows(model, (), prompts(), [4] * len(LENGTHS))
    next(rows)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    rows.close()
    assert model.training
    assert all(torch.equal(a, tensors[n]) for n, a in model.state_dict().items())
    loss = model(torch.tensor(prompts()[:1])).sum()
    assert loss.isfinite()


def test_hooks_are_called(plain):
    model = lorax.load_model(plain)
    expected = answers(model, prompts())
    called = []
    module = model.get_submodule("model.layers.1.mlp.gate_proj")
    hook = module.register_forward_hook(lambda m, given, out: called.append(out.shape[1]))
    assert answers(model, prompts()[:1], count=4) == [expected[0][:4]]
    assert called == [3, 1, 1, 1]
    hook.remove()


def test_a_forward_that_somebody_put_on_a_module_is_called(plain):
    model = lorax.load_model(plain)
    module, called = model.get_submodule("model.layers.1.mlp.gate_proj"), []
    inner = module.forward
    module.forward = lambda x: (called.append(x.shape[1]), inner(x))[1]
    answers(model, prompts()[:1], count=4)
    assert called == [3, 1, 1, 1]


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_while_a_run_is_under_way_too(plain, quantization):
    """A callback may sample: each answer is the one that it is outside of the run."""
    model = lorax.load_model(plain, quantization=quantization)
    expected = answers(model, prompts())
    with accelerated(model):
        assert not any("forward" in vars(m) for m in with_twins(model).modules())
        assert answers(model, prompts()) == expected


def test_a_family_whose_attention_keeps_no_rows_apart_is_refused_by_name(plain, monkeypatch):
    from lorax.models import attention
    from lorax.models.llama import LlamaAttention

    model = lorax.load_model(plain)
    expected = answers(model, prompts())

    def forward(self, x, rope, context):
        parts = (attention.split_heads(p, self.head_dim) for p in self.project(x))
        query, key, value = parts
        from lorax.models.rope import rotate

        key, value = context.append(self.index, rotate(key, *rope), value)
        out = attention.causal_attention(rotate(query, *rope), key, value)
        return self.o_proj(attention.merge_heads(out))

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert answers(model, prompts(), batch_size=1) == expected
    with pytest.raises(lorax.errors.UnsupportedModel, match="batch size of 1"):
        answers(model, prompts(), batch_size=2)


def test_a_cache_that_is_full_to_its_last_place(plain):
    model = lorax.load_model(plain)
    row = prompts((200,))[0]

    class Ends:
        end_token_ids = ()

    found = list(stream(model, Ends(), row, 500))
    assert len(found) == 256 - 200
    with torch.no_grad():  # the last token again, from a whole pass
        logits = model(torch.tensor([[*row, *found[:-1]]]))[0, -1]
    assert logits.argmax() == found[-1]
