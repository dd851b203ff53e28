"""What PEFT trains beside LoRA (whole modules, single rows, biases), against the installed PEFT."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from oracles import gpt2, llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft_pairs import config_as_read
from safetensors.torch import load_file, save_file
from tiny_tokenizer import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import lorax
from lorax import backend as switch
from lorax.adapters.attached import adapter_layers, replaced_parameters
from lorax.adapters.counting import count_parameters
from lorax.adapters.lora import LoRALinear
from lorax.errors import AdapterError, FormatError
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.quant.linear import QuantizedLinear
from lorax.training.loss import summed_loss

FLOAT32 = 1e-5
Q = {"target_modules": ["q_proj"]}
C = {"target_modules": ["c_attn"]}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
BOTH = {"embed_tokens": [1, 2], "lm_head": [3]}

# name -> (the base, PEFT's settings, whether a tied head is still tied after merging)
CASES = {
    "head": (llama, {}, {"modules_to_save": ["lm_head"], **Q}, None),
    "tied head": (llama, TIED, {"modules_to_save": ["lm_head"], **Q}, False),
    "tied embedding": (llama, TIED, {"modules_to_save": ["embed_tokens"], **Q}, False),
    "both, kept tied": (
        llama,
        TIED,
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, **Q},
        True,
    ),
    "names without a dot": (llama, {}, {"modules_to_save": ["norm"], **Q}, None),
    "targets inside": (
        llama,
        {},
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "up_proj"]},
        None,
    ),
    "all but the head": (
        llama,
        {},
        {"modules_to_save": ["model"], "target_modules": ["lm_head"]},
        None,
    ),
    "rows": (llama, {}, {"trainable_token_indices": [5, 1, 7], **Q}, None),
    "rows, tied": (llama, TIED, {"trainable_token_indices": [5, 1, 7], **Q}, True),
    "rows by name": (llama, {}, {"trainable_token_indices": BOTH, **Q}, None),
    "rows by name, tied": (llama, TIED, {"trainable_token_indices": BOTH, **Q}, False),
    "rows of a tied head": (llama, TIED, {"trainable_token_indices": {"lm_head": [3]}, **Q}, False),
    "rows and a head": (
        llama,
        {},
        {"trainable_token_indices": [5], "modules_to_save": ["lm_head"], **Q},
        None,
    ),
    "biases of adapted layers": (
        llama,
        BIASED,
        {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
        None,
    ),
    "no biases to train": (llama, {}, {"bias": "all", **Q}, None),
    "gpt2 rows": (gpt2, {}, {"trainable_token_indices": {"wte": [5], "wpe": [0, 3]}, **C}, True),
    "gpt2 biases": (gpt2, {}, {"bias": "all", **C}, True),
    "gpt2 biases of adapted layers": (gpt2, {}, {"bias": "lora_only", **C}, True),
    "gpt2 biases and a norm": (gpt2, {}, {"bias": "all", "modules_to_save": ["ln_f"], **C}, True),
    "gpt2 transposed": (gpt2, {}, {"modules_to_save": ["c_proj"], **C}, True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """PEFT's adapter of that case, everything trainable moved, and where it and its base lie."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("case")
    make, changes, settings, tied = CASES[request.param]
    base = make(**changes)
    base.save_pretrained(folder / "base")
    theirs = moved(
        get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    )
    theirs.save_pretrained(folder / "adapter")
    return SimpleNamespace(
        base=base, theirs=theirs, settings=settings, tied=tied, path=folder / "base",
        adapter=folder / "adapter",
    )  # fmt: skip


def moved(model, by=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def logits(model):
    with torch.no_grad():
        found = model(tokens())
    return found if isinstance(found, torch.Tensor) else found.logits


def relative_rms(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


def loaded(case, **options):
    model = lorax.load_model(case.path)
    lorax.load_adapter(model, case.adapter, **options)
    return model


def test_theirs_loads_switches_off_and_merges(case):
    model = lorax.load_model(case.path)
    names, base = [n for n, _ in model.named_parameters()], logits(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    lorax.load_adapter(model, case.adapter)
    adapted = logits(model)
    assert (adapted - logits(case.theirs)).abs().max() <= FLOAT32
    assert relative_rms(adapted, base) > 0.01
    assert not any(p.requires_grad for p in model.parameters())
    with lorax.disabled_adapter(model):  # PEFT's own keeps trained biases here
        assert torch.equal(logits(model), base)
    lorax.merge_adapter(model)
    assert relative_rms(logits(model), adapted) <= 2e-6
    with lorax.disabled_adapter(model):
        assert torch.equal(logits(model), base)
    lorax.unmerge_adapter(model)
    assert torch.equal(logits(model), adapted)
    lorax.unload_adapter(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), base)
    assert not replaced_parameters(model)


def test_merged_it_opens_in_transformers_and_says_whether_it_is_tied(case, tmp_path):
    """PEFT's own merge is off by 1.8 where the head's rows are others than the embedding's."""
    model = loaded(case)
    adapted = logits(model)
    lorax.unload_adapter(model, merge=True)
    assert relative_rms(logits(model), adapted) <= 2e-6
    assert not any(p.requires_grad for p in model.parameters())
    assert not adapter_layers(model)
    lorax.save_model(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative_rms(logits(theirs), adapted) <= 2e-6
    if case.tied is not None:
        assert theirs.config.tie_word_embeddings == case.tied
        assert model.config.tie_word_embeddings == case.tied


def test_ours_loads_in_peft_and_every_byte_and_field_survives(case, tmp_path):
    lorax.save_adapter(loaded(case), tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path).eval()
    assert torch.equal(logits(theirs), logits(case.theirs))
    one = load_file(case.adapter / "adapter_model.safetensors")
    two = load_file(tmp_path / "adapter_model.safetensors")
    extra = (".modules_to_save.", ".original_module.")  # PEFT's own second and third copies
    one = {name: t for name, t in one.items() if not any(part in name for part in extra)}
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert torch.equal(one[name], two[name]), name
    assert config_as_read(tmp_path) == config_as_read(case.adapter)


def test_gradients_by_name(case):
    model = loaded(case, trainable=True)
    for side, found in ((model, model(tokens())), (case.theirs, case.theirs(tokens()).logits)):
        side.zero_grad()
        found.log_softmax(-1)[..., 5].mean().backward()
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".default.weight", "" if "lora_" in name else ".weight")
        .replace(".default", "")
        .replace(".modules_to_save", ""): p.grad
        for name, p in case.theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    for name, gradient in found.items():
        theirs = expected[name]
        if case.base.config.model_type == "gpt2" and name.endswith("c_proj.weight"):
            theirs = theirs.t()  # Conv1D
        assert (gradient - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9, name
    assert count_parameters(model)[0] == sum(gradient.numel() for gradient in found.values())


def test_a_fresh_adapter_is_the_base_and_trains_what_peft_trains(case):
    model = lorax.load_model(case.path)
    base = logits(model)
    lorax.add_adapter(model, lorax.LoRAConfig(**case.settings))
    assert relative_rms(logits(model), base) <= 1e-6
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        n for n, p in loaded(case, trainable=True).named_parameters() if p.requires_grad
    }


# --- other bases ---------------------------------------------------------------------------------

EVERYTHING = {
    "bias": "all",
    "modules_to_save": ["lm_head", "norm"],
    "trainable_token_indices": {"embed_tokens": [0, 2]},
    "target_modules": ["q_proj", "up_proj"],
}


def trained(path, **options):
    model = lorax.load_model(path, **options)
    lorax.add_adapter(model, lorax.LoRAConfig(**EVERYTHING))
    return moved(model)


@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_merging_over_a_quantized_base(format, tmp_path):
    llama(**BIASED).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", quantization=format)
    adapted = logits(model)
    lorax.save_adapter(model, tmp_path / "adapter")
    again = lorax.load_model(tmp_path / "base", quantization=format)
    base = logits(again)
    lorax.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), adapted)
    with lorax.disabled_adapter(again):
        assert torch.equal(logits(again), base)
    lorax.merge_adapter(again)
    merged = logits(again)
    lorax.unmerge_adapter(again)
    assert torch.equal(logits(again), adapted)
    if format != "int8":  # LLM.int8 quantizes activations too, which merging takes away
        assert relative_rms(merged, adapted) <= 1e-5


def test_against_peft_over_bitsandbytes(tmp_path):
    """An adapter with everything over NF4: Linear4bit beneath PEFT's, our own beneath ours."""
    # Rows of whole blocks: bitsandbytes' CPU code decodes some others wrongly.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    llama(**BIASED, **sizes).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", quantization="nf4")
    lorax.save_adapter(model, tmp_path / "adapter")
    lorax.save_model(lorax.load_model(tmp_path / "base", quantization="nf4"), tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").train()
    assert relative_rms(logits(model), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("backend", ["pytorch", "triton"])
def test_a_bias_over_a_quantized_weight_gets_its_gradient(backend, adapted):
    """Against the same layer dense; the fused operators have none for it, so they stand aside."""
    layer = QuantizedLinear(lorax.quantize(torch.randn(32, 64), "nf4-dq"), torch.randn(32))
    dense = layer.dense()
    dense.bias = nn.Parameter(layer.bias.detach().clone())
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 64)
    forward = LoRALinear(layer, 4, 2.0) if adapted else layer
    with switch.backend(backend):
        found = forward(x)
    for y, bias in ((found, layer.bias), (dense(x), dense.bias)):
        y.square().sum().backward()
        assert bias.grad.abs().max() > 0
    assert relative_rms(layer.bias.grad, dense.bias.grad) <= 1e-5


def test_over_bfloat16_copies_keep_their_dtype_and_rows_are_float32(tmp_path):
    base = llama(**BIASED).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    theirs = moved(get_peft_model(base, LoraConfig(**EVERYTHING)))
    theirs.save_pretrained(tmp_path / "theirs")
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "theirs")
    lorax.save_adapter(model, tmp_path / "mine")
    one, two = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "mine"))
    assert {t.dtype for t in two.values()} == {torch.bfloat16, torch.float32}
    assert next(model.parameters()).dtype == torch.bfloat16  # whoever asks for the base's dtype
    for name in two:
        assert one[name].dtype == two[name].dtype, name
        assert torch.equal(one[name], two[name]), name


@pytest.mark.nightly
def test_smollm2_with_rows_and_norms(smollm2_gguf, tmp_path):
    """A tied head, 49,152 tokens: logits within 1e-5 of their size, and tied after merging."""
    settings = {"trainable_token_indices": [0, 2, 500, 49151], "modules_to_save": ["norm"]}
    lorax.save_model(lorax.load_model(smollm2_gguf, "float32"), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = moved(get_peft_model(base, LoraConfig(r=8, **settings, **Q)), by=0.01)
    theirs.save_pretrained(tmp_path / "adapter")
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "adapter")
    adapted, expected = logits(model), logits(theirs)
    assert relative_rms(adapted, expected) <= 1e-5
    lorax.unload_adapter(model, merge=True)
    assert relative_rms(logits(model), adapted) <= 2e-6
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows, tied", "both, kept tied", "gpt2 biases and a norm"])
def test_five_steps_of_adamw_against_peft(name, tmp_path):
    """The loss of the training loop on our side, transformers' own on theirs."""
    make, changes, settings, _ = CASES[name]
    base = make(**changes)
    base.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    theirs.save_pretrained(tmp_path / "start")
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "start", trainable=True)
    ids = tokens()
    for side, loss in (
        (theirs, lambda: theirs(ids, labels=ids).loss),
        (model, lambda: summed_loss(model, ids, ids) / ids[:, 1:].numel()),
    ):
        trained = [p for p in side.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(5):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert relative_rms(logits(model), logits(theirs)) <= 1e-5
    lorax.save_adapter(model, tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("theirs", "mine"))
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    for key in two:
        mine, other, before = (t[key] for t in (two, one, start))
        if key.endswith("c_attn.base_layer.bias"):
            # A key's bias moves all scores of a row alike: its gradient is rounding, which AdamW
            # makes into whole steps. Query and value are compared.
            mine, other, before = (t.view(3, -1)[[0, 2]] for t in (mine, other, before))
        assert (other - mine).norm() <= 1e-4 * (other - before).norm(), key


def test_a_recipe_trains_them_and_leaves_an_adapter_that_loads(tmp_path):
    tokenizer = byte_tokenizer()
    llama(vocab_size=tokenizer.vocab_size, **TIED, **BIASED).save_pretrained(tmp_path / "model")
    write_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say a ", "completion": "b"}\n' * 8)
    adapter = {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"]}
    adapter["trainable_token_indices"] = {"embed_tokens": [1, 70]}
    recipe = lorax.Recipe.from_dict(
        {
            "model": {"path": str(tmp_path / "model"), "quantization": "nf4", "dtype": "float32"},
            "adapter": adapter,
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "train": {"output_dir": str(tmp_path / "run"), "batch_size": 4, "max_steps": 3},
        }
    )
    run = lorax.train(recipe)
    again = lorax.load_model(tmp_path / "model", "float32", quantization="nf4")
    base = {name: p.clone() for name, p in again.named_parameters()}
    lorax.load_adapter(again, tmp_path / "run" / "adapter")
    assert torch.equal(logits(again), logits(run.model))
    for replacement in replaced_parameters(again):
        assert not torch.equal(replacement.trained, replacement.original), replacement.places
    rows = again.model.embed_tokens.rows
    assert not torch.equal(rows, base["model.embed_tokens.weight"][[1, 70]])


def test_lora_plus_sees_every_copy(tmp_path):
    """Biases learn with B, rows and whole matrices with A, as PEFT groups them; each once."""
    llama(**TIED, **BIASED).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    settings = {"bias": "all", "trainable_token_indices": [1, 2], "modules_to_save": ["norm"]}
    lorax.add_adapter(model, lorax.LoRAConfig(**settings, **Q))
    slow, fast = lorax.optim.lora_plus_groups(model, 1e-3, 16, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    slow_names, fast_names = ({names[id(p)] for p in g["params"]} for g in (slow, fast))
    assert "model.embed_tokens.token_adapter.trainable_tokens_delta" in slow_names
    assert "model.layers.0.self_attn.q_proj.base_layer.bias" in fast_names
    assert {"model.norm.weight", "model.layers.2.mlp.down_proj.bias"} <= fast_names
    assert len(slow["params"]) + len(fast["params"]) == len(slow_names | fast_names)
    assert sum(p.numel() for g in (slow, fast) for p in g["params"]) == count_parameters(model)[0]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"modules_to_save": ["lm_haed"]}, "lm_haed"),  # PEFT: nothing is saved, without a word
        ({"modules_to_save": ["_proj"]}, "q_proj"),
        ({"modules_to_save": ["mlp", "up_proj"]}, "up_proj"),  # PEFT cannot read its own file
        ({"modules_to_save": "lm_head"}, "list of names"),
        ({"modules_to_save": [3]}, "list of names"),
        ({"modules_to_save": ["("]}, "regular expression"),
        ({"modules_to_save": ["model", "lm_head"]}, "no module is left"),
        ({"bias": "lora"}, "bias"),
        ({"trainable_token_indices": [97]}, "rows 0 to 96"),
        ({"trainable_token_indices": [-1]}, "rows 0 to 96"),
        ({"trainable_token_indices": [5, 5]}, "each once"),
        ({"trainable_token_indices": [1.5]}, "whole numbers"),
        ({"trainable_token_indices": {"embed": [1]}}, "embed"),
        ({"trainable_token_indices": {"norm": [1]}}, "expected an Embedding"),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, "tied"),
        ({"trainable_token_indices": [1], "target_modules": ["lm_head"]}, "tied"),
        ({"trainable_token_indices": BOTH, "ensure_weight_tying": True}, "other rows"),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, "not covered"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(settings, word, tmp_path):
    llama(**TIED).save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path)
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(AdapterError, match=word):
        lorax.add_adapter(model, lorax.LoRAConfig(**{**Q, **settings}))
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


def test_a_quantized_module_cannot_be_trained_as_a_whole(tmp_path):
    llama().save_pretrained(tmp_path)
    model = lorax.load_model(tmp_path, quantization="nf4")
    with pytest.raises(AdapterError, match=r"mlp\.gate_proj is quantized"):
        lorax.add_adapter(model, lorax.LoRAConfig(modules_to_save=["mlp"], **Q))
    lorax.add_adapter(model, lorax.LoRAConfig(modules_to_save=["lm_head", "norm"], **Q))


def test_ensure_weight_tying_over_an_untied_model_says_that_it_does_nothing(tmp_path, caplog):
    llama().save_pretrained(tmp_path)
    config = lorax.LoRAConfig(modules_to_save=["lm_head"], ensure_weight_tying=True, **Q)
    lorax.add_adapter(lorax.load_model(tmp_path), config)
    assert "head is not tied" in caplog.text


@pytest.mark.parametrize("fault", ["missing", "shape", "copies differ", "another base"])
def test_a_file_that_does_not_fit_is_refused_and_the_model_is_as_it_was(fault, tmp_path):
    base = gpt2() if fault == "another base" else llama(**TIED)
    base.save_pretrained(tmp_path / "base")
    settings = {
        "another base": {"bias": "all", "modules_to_save": ["ln_f"], **C},
        "copies differ": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, **Q},
    }.get(fault, {"modules_to_save": ["lm_head"], **Q})
    moved(get_peft_model(base, LoraConfig(**settings))).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    found = load_file(path)
    if fault == "missing":
        del found["base_model.model.lm_head.weight"]
    elif fault == "shape":
        found["base_model.model.lm_head.weight"] = torch.zeros(96, 48)
    elif fault == "copies differ":
        found["base_model.model.lm_head.weight"][3, 4] += 1
    else:
        found["base_model.model.transformer.ln_f.original_module.bias"][7] += 1
    save_file(found, path, metadata={"format": "pt"})
    model = lorax.load_model(tmp_path / "base")
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(AdapterError, match="ln_f" if fault == "another base" else "lm_head"):
        lorax.load_adapter(model, tmp_path / "adapter")
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before


# --- directories, patterns -----------------------------------------------------------------------


def test_an_adapter_of_another_name_lies_in_a_directory_of_that_name(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    settings = LoraConfig(**Q)
    theirs = get_peft_model(copy.deepcopy(base), settings, adapter_name="german")
    moved(theirs).save_pretrained(tmp_path / "adapters")
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "adapters")
    assert (logits(model) - logits(theirs)).abs().max() <= FLOAT32
    theirs.add_adapter("french", settings)
    theirs.save_pretrained(tmp_path / "adapters")
    with pytest.raises(FormatError, match=r"several adapters .*french, german"):
        lorax.load_adapter(lorax.load_model(tmp_path / "base"), tmp_path / "adapters")
    lorax.load_adapter(lorax.load_model(tmp_path / "base"), tmp_path / "adapters" / "french")


def test_overlapping_patterns_keep_their_order(tmp_path):
    """PEFT sorts the keys when it saves, and reads another adapter back than it wrote."""
    llama().save_pretrained(tmp_path / "base")
    ranks = {"layers.1.self_attn.q_proj": 3, "q_proj": 5, ".*": 2}
    alphas = {"v_proj": 4.0, "layers.0.*": 32.0}
    model = lorax.load_model(tmp_path / "base")
    settings = {"rank_pattern": ranks, "alpha_pattern": alphas}
    lorax.add_adapter(model, lorax.LoRAConfig(target_modules=["q_proj", "v_proj"], **settings))
    moved(model)
    lorax.save_adapter(model, tmp_path / "adapter")
    again = lorax.load_model(tmp_path / "base")
    config = lorax.load_adapter(again, tmp_path / "adapter")
    assert list(config.rank_pattern) == list(ranks)
    assert list(config.alpha_pattern) == list(alphas)
    assert torch.equal(logits(again), logits(model))
    assert adapter_layers(again)["model.layers.1.self_attn.q_proj"].r == 3


@pytest.mark.parametrize("key", [{"layers_to_transform": []}, {"layers_pattern": []}])
def test_an_empty_list_of_layers_asks_for_nothing(key, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    theirs = moved(get_peft_model(base, LoraConfig(**key, **Q)))
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    found = {**json.loads(path.read_text()), **key, "newer": [], "also_newer": 0.0}
    path.write_text(json.dumps(found))
    model = lorax.load_model(tmp_path / "base")
    lorax.load_adapter(model, tmp_path / "adapter")
    assert (logits(model) - logits(theirs)).abs().max() <= FLOAT32
