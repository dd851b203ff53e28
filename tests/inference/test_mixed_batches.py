"""One batch, a different adapter in each row: the logits of each adapter alone."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import gpt2, llama, tokens
from peft import PeftModel
from peft_pairs import in_peft, logits, save
from torch import nn

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.adapters.lora import LoRALinear
from lorax.adapters.variants import Variant, register_variant
from lorax.backend import backend
from lorax.errors import AdapterError, UsageError
from lorax.inference.mixed import shares_base
from lorax.quant.linear import QuantizedLinear

SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip
MAKE = {"llama": llama, "gpt2": gpt2}
KINDS = (  # in turn, of ranks 1 to 6
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "c_attn"], "use_rslora": True},
    {"target_modules": "all-linear", "use_dora": True},
    {"target_modules": ["down_proj", "c_proj"], "lora_bias": True},
    {"target_modules": ["embed_tokens", "wte", "v_proj", "c_fc"]},
    {"target_modules": ["o_proj", "c_attn"], "trainable_token_indices": [4, 20, 3]},
    {"target_modules": ["q_proj", "c_attn"], "init_lora_weights": "pissa"},
)
COUNT, ROWS = 32, 12
IDS = tokens(rows=ROWS, length=7)
NEAR = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family, make in MAKE.items():
        torch.manual_seed(0)
        base, made[family] = make(**SIZES[family]), tmp_path_factory.mktemp(family)
        base.save_pretrained(made[family] / "base")
        for i in range(COUNT):
            torch.manual_seed(i)
            adapter = in_peft(base, r=1 + i % 6, **KINDS[i % len(KINDS)])
            save(adapter, made[family] / str(i))
    return made


@pytest.fixture(
    scope="module",
    params=[(family, q) for family in MAKE for q in (None, "nf4")],
    ids=lambda case: f"{case[0]} {case[1]}",
)
def served(request, folders):
    """A model with 32 adapters, and by name the logits of all rows with that one in use."""
    family, quantization = request.param
    model = lorax.load_model(folders[family] / "base", quantization=quantization)
    expected = {None: logits(model, IDS)}
    for i in range(COUNT):
        # PEFT's own PiSSA says too little over a quantized base, and is refused: convert.py
        if quantization is None or KINDS[i % len(KINDS)].get("init_lora_weights") is None:
            lorax.load_adapter(model, folders[family] / str(i), name=str(i))
            with lorax.use_adapter(model, str(i)):
                expected[str(i)] = logits(model, IDS)
    return model, expected


def test_the_adapters_differ(served):
    _, expected = served
    found = torch.stack(list(expected.values()))
    apart = (found[:, None] - found[None]).abs().amax((2, 3, 4))
    assert apart[~torch.eye(len(found), dtype=torch.bool)].min() > 1e-2


@given(data=st.data())
@settings(max_examples=12)
def test_each_row_has_the_logits_of_its_adapter_alone(served, data):
    model, expected = served
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS))
    name = st.sampled_from([None, *lorax.named_adapters(model).names])
    names = data.draw(st.lists(name, min_size=len(rows), max_size=len(rows)))
    with torch.no_grad():
        found = model(IDS[rows], adapters=names)
    for row, name, mine in zip(rows, names, found, strict=True):
        assert (mine - expected[name][row]).abs().max() < NEAR, name
    assert torch.equal(logits(model, IDS), expected[None])


def test_all_of_them_in_one_batch_in_any_order(served):
    model, expected = served
    names = [None, *lorax.named_adapters(model).names]
    for seed in range(3):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            found = model(IDS[:1].expand(len(names), -1), adapters=[names[i] for i in order])
        for i, mine in zip(order, found, strict=True):
            assert (mine - expected[names[i]][0]).abs().max() < NEAR, names[i]


@pytest.mark.parametrize("family", MAKE)
def test_mixed_rows_against_pefts_adapter_names(folders, family):
    names = ["0", "__base__", "7", "1", "0", "14", "7", "__base__", "8", "0", "1", "14"]
    folder = folders[family]
    theirs = MAKE[family]().from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's orientation
        theirs = PeftModel.from_pretrained(theirs, folder / "0", adapter_name="0")
        for name in ("1", "7", "8", "14"):
            theirs.load_adapter(folder / name, name)
    model = lorax.load_model(folder / "base")
    for name in ("0", "1", "7", "8", "14"):
        lorax.load_adapter(model, folder / name, name=name)
    with torch.no_grad():
        expected = theirs.eval()(IDS, adapter_names=names).logits
        found = model(IDS, adapters=[None if name == "__base__" else name for name in names])
    assert (found - expected).abs().max() < 2 * NEAR


def calls_of(modules):
    """Counts the rows that each module is called with, by its path."""
    seen = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, given, __, n=name: seen[n].append(len(given[0])))
        for name, module in modules.items()
    ]
    return seen, hooks


def test_the_base_computes_once_for_all_rows(served):
    model, _ = served
    kinds = nn.Linear, nn.Embedding, QuantizedLinear
    bases = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n != "lm_head"}
    seen, hooks = calls_of({n: m for n, m in bases.items() if "wpe" not in n})
    names = ["0", "1", "2", None, "3", "4", "2", "5", "0", "8", "16", "9"]
    with torch.no_grad():
        model(IDS, adapters=names)
    for hook in hooks:
        hook.remove()
    assert set(map(tuple, seen.values())) == {(ROWS,)}


def test_a_whole_batch_of_one_adapter_takes_the_way_of_that_adapter_alone(served):
    model, expected = served
    for name in ("2", None, "0"):
        with torch.no_grad():
            assert torch.equal(model(IDS, adapters=[name] * ROWS), expected[name])
    lorax.use_adapter(model, "7")
    lorax.merge_adapter(model)
    merged = logits(model, IDS)
    lorax.use_adapter(model, "0")
    with torch.no_grad():
        assert torch.equal(model(IDS, adapters=["7"] * ROWS), merged)
        mixed = model(IDS, adapters=["7", "0"] * (ROWS // 2))
    assert torch.equal(logits(model, IDS), expected["0"])
    assert (mixed[::2] - merged[::2]).abs().max() < NEAR
    assert (mixed[1::2] - expected["0"][1::2]).abs().max() < NEAR
    lorax.use_adapter(model, "7")
    lorax.unmerge_adapter(model)
    lorax.use_adapter(model, None)


def test_the_one_in_use_comes_back_and_nothing_of_the_batch_stays(served):
    model, expected = served
    adapters = lorax.named_adapters(model)
    lorax.use_adapter(model, "2")
    model(IDS[:2], adapters=["0", None])
    assert adapters.active == "2"
    assert torch.equal(logits(model, IDS), expected["2"])
    hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS[:2], adapters=["0", None])
    hook.remove()
    assert torch.equal(logits(model, IDS), expected["2"])
    lorax.use_adapter(model, None)
    assert not adapter_layers(model)


def test_gradients_go_to_each_rows_own_adapter(folders):
    model = lorax.load_model(folders["llama"] / "base")
    for name in ("0", "7"):
        lorax.load_adapter(model, folders["llama"] / name, trainable=True, name=name)
    model(IDS[:4], adapters=["0", "7", None, "7"])[1].square().mean().backward()
    with lorax.use_adapter(model, "0"):
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with lorax.use_adapter(model, "7"):
        mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(IDS[1:2]).square().mean().backward()
        assert mixed
        for name, parameter in model.named_parameters():
            if name in mixed:
                torch.testing.assert_close(mixed[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_within_a_budget(folders):
    model = lorax.load_model(folders["gpt2"] / "base")
    adapters = lorax.named_adapters(model)
    adapters.budget = 3
    expected = {}
    for i in range(12):
        lorax.load_adapter(model, folders["gpt2"] / str(i), name=str(i))
        with lorax.use_adapter(model, str(i)):
            expected[str(i)] = logits(model, IDS)
    for names in (["1", "0", "3", None], ["3", "9", "1", "9"], ["11", "5", "2", "5"]):
        with torch.no_grad():
            found = model(IDS[:4], adapters=names)
        for i, name in enumerate(names):
            if name is not None:
                assert (found[i] - expected[name][i]).abs().max() < NEAR
        assert len(adapters.in_memory) <= 3
    with pytest.raises(UsageError, match="4 at once, and the budget is 3"):
        model(IDS[:4], adapters=["1", "2", "3", "4"])


@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
def test_by_the_segmented_kernel(folders, quantization):
    """In Triton's interpreter here; on CUDA as it is."""
    model = lorax.load_model(folders["llama"] / "base", quantization=quantization)
    names = ["0", "2", None, "7", "0", "3"]
    for name in ("0", "2", "3", "7"):
        lorax.load_adapter(model, folders["llama"] / name, name=name)
    with torch.no_grad(), backend("pytorch"):
        expected = model(IDS[:6, :3], adapters=names)
    with torch.no_grad(), backend("triton"):
        found = model(IDS[:6, :3], adapters=names)
    assert (found - expected).abs().max() < NEAR


def test_the_kernel_gives_no_gradients_and_is_not_asked_for_them(folders):
    model, gradients = lorax.load_model(folders["llama"] / "base"), {}
    for name in ("0", "7"):
        lorax.load_adapter(model, folders["llama"] / name, trainable=True, name=name)
    for how in ("pytorch", "triton"):
        with backend(how):
            model(IDS[:2], adapters=["0", "7"]).square().mean().backward()
        with lorax.use_adapter(model, "7"):
            gradients[how] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            model.zero_grad()
        with lorax.use_adapter(model, "0"):
            model.zero_grad()
    assert any(gradient.any() for gradient in gradients["pytorch"])
    torch.testing.assert_close(gradients["triton"], gradients["pytorch"])


# A researcher's own variant ------------------------------------------------------------------


class Doubled(LoRALinear):
    """Changes what is computed and says nothing of `path_onto`."""

    def adapted(self, x):
        return super().adapted(2 * x)


class Shifted(LoRALinear):
    """Says what it makes of its base's output."""

    def path_onto(self, y, x):
        return super().path_onto(y + 1, x)


def test_a_variant_from_outside_is_right_whatever_it_says(folders):
    from dataclasses import dataclass

    model = lorax.load_model(folders["llama"] / "base")
    layers = {}
    for kind in (Doubled, Shifted):
        config = dataclass(frozen=True)(
            type(f"{kind.__name__}Config", (lorax.LoRAConfig,), {"peft_type": kind.__name__})
        )
        register_variant(
            Variant(kind.__name__, config, title=kind.__name__, summary=repr, layer=kind)
        )
        lorax.add_adapter(model, config(r=2, init_lora_weights=False))
        layers[kind] = next(iter(adapter_layers(model).values()))
        lorax.unload_adapter(model)
    assert not shares_base(layers[Doubled])
    assert shares_base(layers[Shifted])


# What is refused -----------------------------------------------------------------------------


def test_what_a_row_cannot_have_is_refused(folders, tmp_path):
    model = lorax.load_model(folders["llama"] / "base")
    for name in ("0", "1"):
        lorax.load_adapter(model, folders["llama"] / name, name=name)
    base = llama().from_pretrained(folders["llama"] / "base")
    save(in_peft(base, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    lorax.load_adapter(model, tmp_path, name="head")
    lorax.use_adapter(model, "1")
    before = logits(model, IDS)
    for names, error, message in (
        (["0"], UsageError, "1 names for 12 rows"),
        (["0"] * 13, UsageError, "13 names for 12 rows"),
        ("0", UsageError, "'0' for 12 rows"),
        (["0"] * 11 + ["2"], UsageError, "no adapter is named '2'"),
        (["0"] * 11 + ["head"], AdapterError, "'head' replaces lm_head.weight"),
    ):
        with pytest.raises(error, match=message):
            model(IDS, adapters=names)
        assert lorax.named_adapters(model).active == "1"
        assert torch.equal(logits(model, IDS), before)
    with torch.no_grad():
        found = model(IDS, adapters=["head"] * ROWS)
    with lorax.use_adapter(model, "head"):
        assert torch.equal(found, logits(model, IDS))


def test_a_name_that_another_adapter_takes_is_that_one(folders, tmp_path):
    """Also where a batch in between was refused half way."""
    folder = folders["llama"]
    model = lorax.load_model(folder / "base")
    base = llama().from_pretrained(folder / "base")
    save(in_peft(base, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), tmp_path)
    lorax.load_adapter(model, tmp_path, name="head")
    lorax.load_adapter(model, folder / "0", name="x")  # on every Linear
    with pytest.raises(AdapterError, match="'head' replaces"):
        model(IDS[:2], adapters=["x", "head"])
    lorax.named_adapters(model).remove("x")
    lorax.load_adapter(model, folder / "3", name="x")  # on down_proj alone
    with lorax.use_adapter(model, "x"):
        expected = logits(model, IDS[:2])
    with torch.no_grad():
        found = model(IDS[:2], adapters=["x", None])
    assert (found[0] - expected[0]).abs().max() < NEAR
