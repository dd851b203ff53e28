"""Prompt tuning against the installed PEFT: files, logits, gradients, training, the cache."""

import copy
import json

import pytest
import torch
from oracles import gpt2, llama, tokens
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft_pairs import config_as_read
from safetensors.torch import load_file, save_file
from tiny_runs import folder as folder
from tiny_runs import recipe
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.prompt.layer import prompt_layer
from lorax.errors import AdapterError, FormatError, RecipeError, UsageError
from lorax.inference.batch import stream_rows
from lorax.inference.generate import stream
from lorax.training.loss import summed_loss

FLOAT32 = 1e-5
BASES = {"llama": llama, "gpt2": gpt2}
both = pytest.mark.parametrize("pair", BASES, indirect=True)
PLACES = 5


@pytest.fixture
def pair(request, tmp_path):
    """(PEFT's model, a lorax model of the same base, the folder of PEFT's prompt)"""
    base = BASES[request.param]()
    base.save_pretrained(tmp_path / "base")
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PLACES)
    theirs = get_peft_model(copy.deepcopy(base), settings).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, lorax.load_model(tmp_path / "base"), tmp_path / "theirs"


def their_logits(model, ids):
    """PEFT's logits of the given tokens; it gives those of the virtual ones too."""
    return model(ids).logits[:, PLACES:]


def largest_difference(mine, theirs):
    with torch.no_grad():
        return (mine(tokens()) - their_logits(theirs, tokens())).abs().max().item()


@both
def test_a_prompt_of_peft_loads(pair):
    theirs, mine, path = pair
    with torch.no_grad():
        before = mine(tokens())
    lorax.load_adapter(mine, path)
    with torch.no_grad():
        assert mine(tokens()).shape == before.shape  # logits belong to the given tokens only
        assert (mine(tokens()) - before).abs().max() > 0.1
    assert largest_difference(mine, theirs) <= FLOAT32
    with lorax.disabled_adapter(mine), torch.no_grad():
        assert torch.equal(mine(tokens()), before)
    assert not any(p.requires_grad for p in mine.parameters())
    lorax.unload_adapter(mine)
    with torch.no_grad():
        assert torch.equal(mine(tokens()), before)


@both
def test_bytes_and_config_survive_and_peft_loads_ours(pair, tmp_path):
    _, mine, path = pair
    lorax.load_adapter(mine, path)
    lorax.save_adapter(mine, tmp_path / "mine")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (path, tmp_path / "mine"))
    assert list(one) == list(two) == ["prompt_embeddings"]
    assert torch.equal(one["prompt_embeddings"], two["prompt_embeddings"])
    assert config_as_read(tmp_path / "mine") == config_as_read(path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "mine").eval()
    assert largest_difference(mine, again) <= FLOAT32


@both
def test_gradient_against_peft(pair):
    theirs, mine, path = pair
    lorax.load_adapter(mine, path, trainable=True)
    for logits in (mine(tokens()), their_logits(theirs, tokens())):
        logits.log_softmax(-1)[..., 5].mean().backward()
    expected = [p.grad for p in theirs.parameters() if p.requires_grad]
    found = [p.grad for p in mine.parameters() if p.requires_grad]
    assert len(found) == len(expected) == 1
    assert ((found[0] - expected[0]).norm() / expected[0].norm()).item() <= 1e-5


@both
def test_twenty_steps_against_peft(pair):
    """AdamW on both sides, with the loss that PEFT's forward gives.

    There the last virtual token also learns to predict the first token; in lorax logits and loss
    belong to the given tokens. So the first label is masked on both sides.
    Bounds: losses 1e-5 relative, the prompt 1e-4 in its norm (2e-6 or less measured).
    """
    theirs, mine, path = pair
    lorax.load_adapter(mine, path, trainable=True)
    found = prompt_layer(mine).prompt_embeddings
    expected = theirs.get_parameter("prompt_encoder.default.embedding.weight")
    start = found.detach().clone()
    optimizers = [torch.optim.AdamW([p], lr=1e-2, eps=1e-5) for p in (found, expected)]
    for step in range(20):
        ids = tokens(4, 24, seed=100 + step)
        labels = ids.clone()
        labels[:, 0] = -100
        ours = summed_loss(mine, ids, labels) / labels[:, 1:].numel()
        others = theirs(input_ids=ids, labels=labels).loss
        assert ours.item() == pytest.approx(others.item(), rel=1e-5)
        for loss, optimizer in zip((ours, others), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"the prompts differ by {error:.1e}")
    assert error <= 1e-4
    assert (found - start).norm() > 0.03 * start.norm()


@both
def test_the_cache_counts_the_prompt_once(pair):
    """Token by token, in chunks and all at once: the same logits; and room for all of them."""
    _, mine, path = pair
    lorax.load_adapter(mine, path)
    ids = tokens(2, 12)
    with torch.no_grad():
        whole = mine(ids)
        for sizes in ([12], [5, 7], [1] * 12):
            cache = mine.new_cache(2, 12)
            parts = [mine(part, cache) for part in ids.split(sizes, dim=1)]
            assert cache.length == 12 + PLACES
            assert (torch.cat(parts, dim=1) - whole).abs().max() <= FLOAT32


@both
def test_generate_against_peft(pair):
    theirs, mine, path = pair
    lorax.load_adapter(mine, path)
    ids = tokens(1, 6)
    expected = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokenizer = byte_tokenizer(eos=None)
    found = list(stream(mine, tokenizer, ids[0].tolist(), 16))
    assert found == expected[0, -16:].tolist()
    with lorax.disabled_adapter(mine):
        assert list(stream(mine, tokenizer, ids[0].tolist(), 16)) != found


@both
def test_rows_together_get_what_each_gets_alone(pair):
    """Each row has the virtual tokens in front, and its own length."""
    _, mine, path = pair
    lorax.load_adapter(mine, path)
    rows = [tokens(1, n)[0].tolist() for n in (6, 1, 11)]
    alone = [list(stream(mine, byte_tokenizer(eos=None), row, 8)) for row in rows]
    found: list[list[int]] = [[], [], []]
    for index, token in stream_rows(mine, (), rows, [8, 8, 8], batch_size=2):
        found[index] += [] if token is None else [token]
    assert found == alone


@both
def test_positions_count_the_virtual_tokens(pair):
    _, mine, path = pair
    assert mine.max_positions == 256
    lorax.load_adapter(mine, path)
    assert mine.max_positions == 256 - PLACES
    tokenizer = byte_tokenizer(eos=None)
    with pytest.raises(UsageError, match="expected 1 to 250"):
        list(stream(mine, tokenizer, [7] * 251, 1))
    assert len(list(stream(mine, tokenizer, [7] * 249, 99))) == 2
    with torch.no_grad():
        mine(tokens(1, 251))  # the last position of GPT-2's table
    with lorax.disabled_adapter(mine):
        assert mine.max_positions == 256


@both
def test_it_cannot_be_merged_and_says_why(pair):
    _, mine, path = pair
    lorax.load_adapter(mine, path)
    with torch.no_grad():
        before = mine(tokens())
    for merge in (lorax.merge_adapter, lambda m: lorax.unload_adapter(m, merge=True)):
        with pytest.raises(AdapterError, match="no weight of the model holds it"):
            merge(mine)
    with pytest.raises(AdapterError, match="expected one around modules"):
        lorax.Adapter.of(mine)
    with pytest.raises(AdapterError, match="expected a LoRA"):
        lorax.read_adapter(path)
    with pytest.raises(UsageError, match="carries an adapter"):
        lorax.save_model(mine, path.parent / "model")
    with torch.no_grad():
        assert torch.equal(mine(tokens()), before)


@both
def test_gradient_checkpointing_changes_nothing(pair):
    _, mine, path = pair
    lorax.load_adapter(mine, path, trainable=True)
    gradients = []
    for on in (False, True):
        mine.gradient_checkpointing = on
        mine.zero_grad()
        summed_loss(mine, tokens(), tokens()).backward()
        gradients.append(prompt_layer(mine).prompt_embeddings.grad)
    assert torch.equal(*gradients)


# --- how it starts ---------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    llama(vocab_size=261).save_pretrained(tmp_path / "base")
    return lorax.load_model(tmp_path / "base", "bfloat16")


def embeddings(model, ids):
    return model.model.embed_tokens.weight[ids].float()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_text_starts_it_repeated_or_cut(count, model, tmp_path):
    config = lorax.PromptTuningConfig(count, "TEXT", prompt_tuning_init_text="abc")
    tokenizer = byte_tokenizer()
    lorax.add_adapter(model, config, tokenizer)
    words = (tokenizer.encode("abc") * 5)[:count]
    assert torch.equal(prompt_layer(model).prompt_embeddings, embeddings(model, words))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "model.prefix.prompt_embeddings"
    ]
    lorax.save_adapter(model, tmp_path / "mine")
    written = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert written["tokenizer_name_or_path"] == str(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path / "mine")  # asks for text and tokenizer's name
    again = lorax.load_model(tmp_path / "base", "bfloat16")
    lorax.load_adapter(again, tmp_path / "mine")  # needs no tokenizer
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))


def test_a_text_starts_it_as_in_peft(model, tmp_path):
    """With a tokenizer's own directory, which PEFT opens by its path."""
    from lorax.formats.tokenizer_files import write_tokenizer

    tokenizer = byte_tokenizer(bos=True)
    write_tokenizer(tokenizer, tmp_path / "base")
    settings = {
        "num_virtual_tokens": 9,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "hello",
        "tokenizer_name_or_path": str(tmp_path / "base"),
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", **settings))
    mine = lorax.load_model(tmp_path / "base", "float32")
    lorax.add_adapter(mine, lorax.PromptTuningConfig(**settings), tokenizer)
    expected = theirs.get_parameter("prompt_encoder.default.embedding.weight")
    assert torch.equal(prompt_layer(mine).prompt_embeddings, expected)


def test_random_and_vocabulary_start_it_by_the_seed(model):
    for how in ("RANDOM", "SAMPLE_VOCAB"):
        starts = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            lorax.add_adapter(model, lorax.PromptTuningConfig(50, how))
            starts.append(prompt_layer(model).prompt_embeddings.detach())
            lorax.unload_adapter(model)
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])
        if how == "SAMPLE_VOCAB":
            rows = model.model.embed_tokens.weight.float()
            assert all((rows == row).all(dim=1).any() for row in starts[0])
        else:
            assert starts[0].std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"num_virtual_tokens": 2**40}, "num_virtual_tokens"),
        ({"prompt_tuning_init": "WORDS"}, "WORDS"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    ],
)
def test_an_impossible_config_is_refused_by_name(values, word):
    with pytest.raises(AdapterError, match=word):
        lorax.PromptTuningConfig(**{"num_virtual_tokens": 4, **values})


TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (TEXT, "needs the model's tokenizer"),
        ({"num_virtual_tokens": 256}, "leaves no position"),
        ({"token_dim": 49}, "belongs to another model"),
    ],
)
def test_a_refused_prompt_leaves_the_model_as_it_was(values, word, model):
    model.requires_grad_(True)
    with pytest.raises(AdapterError, match=word):
        lorax.add_adapter(model, lorax.PromptTuningConfig(**{"num_virtual_tokens": 4, **values}))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "adapter_config")


def test_there_is_one_adapter_at_a_time(model):
    lora, prompt = lorax.LoRAConfig(), lorax.PromptTuningConfig(4)
    for first, second in ((lora, prompt), (prompt, lora), (prompt, prompt)):
        lorax.add_adapter(model, first)
        with pytest.raises(AdapterError, match="an adapter already"):
            lorax.add_adapter(model, second)
        lorax.unload_adapter(model)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"num_virtual_tokens": 4}, AdapterError, r"is \(5, 48\).*expected \(4, 48\)"),
        ({"num_virtual_tokens": None}, AdapterError, "num_virtual_tokens"),
        ({"num_virtual_tokens": 300}, AdapterError, "leaves no position"),
        ({"token_dim": 64}, AdapterError, "belongs to another model"),
        ({"modules_to_save": ["lm_head"]}, AdapterError, "modules_to_save"),
        ({"num_layer": 3}, AdapterError, "did you mean num_layers"),
        ({"peft_type": "P_TUNING"}, AdapterError, "P_TUNING"),
        ({"peft_type": "LORA"}, AdapterError, "unknown"),
    ],
)
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_files_that_do_not_fit_are_refused_by_name(pair, change, error, word):
    _, mine, path = pair
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=word):
        lorax.load_adapter(mine, path)
    assert type(mine.model.prefix).__name__ == "Prefix"


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_tensors_that_do_not_fit_are_refused(pair):
    _, mine, path = pair
    file = path / "adapter_model.safetensors"
    prompt = load_file(file)["prompt_embeddings"]
    for tensors, word in (
        ({"prompt_embeddings": prompt.clone().fill_(float("nan"))}, "not finite"),
        ({"prompt_embeddings": prompt, "more": prompt.clone()}, "unexpected"),
        ({"other": prompt}, "missing"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=word):
            lorax.load_adapter(mine, path)
    file.write_bytes(b"x")
    with pytest.raises(FormatError):
        lorax.load_adapter(mine, path)


@pytest.mark.nightly
def test_smollm2_against_peft(smollm2_gguf, smollm2_tokenizer, tmp_path):
    folder, file = smollm2_gguf.rsplit("/", 1)
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    mine = lorax.load_model(smollm2_gguf)
    text = "Answer like a reference manual: "
    config = lorax.PromptTuningConfig(12, "TEXT", prompt_tuning_init_text=text)
    lorax.add_adapter(mine, config, smollm2_tokenizer)
    lorax.save_adapter(mine, tmp_path)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([smollm2_tokenizer.encode("What does os.path.join do?")])
    with torch.no_grad():
        assert (mine(ids) - theirs(ids).logits[:, 12:]).abs().max() <= 1e-4  # as test_models.py's


# --- a run -----------------------------------------------------------------------------------

PROMPT = {"method": "prompt-tuning", "num_virtual_tokens": 6}


@pytest.mark.parametrize(
    "change", [{}, {"model.quantization": "nf4-dq", "model.dtype": "bfloat16"}]
)
def test_a_run_learns_and_leaves_an_adapter(change, folder, tmp_path):
    overrides = {"train.learning_rate": 0.1, **change}
    run = lorax.train(recipe(folder, tmp_path / "run", adapter=PROMPT, **overrides))
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    (tensor,) = load_file(run.result / "adapter_model.safetensors").values()
    assert tensor.shape == (6, 48)
    assert tensor.dtype == torch.float32
    model = lorax.load_model(
        folder / "model",
        change.get("model.dtype", "float32"),
        quantization=change.get("model.quantization"),
    )
    lorax.load_adapter(model, run.result)
    with torch.no_grad():
        assert torch.equal(model(tokens()), run.model(tokens()))


def test_a_run_that_starts_from_a_text(folder, tmp_path):
    overrides = {"adapter.prompt_tuning_init": "TEXT", "adapter.prompt_tuning_init_text": "say"}
    run = lorax.train(recipe(folder, tmp_path / "run", adapter=PROMPT, **overrides))
    config = json.loads((run.result / "adapter_config.json").read_text())
    assert config["prompt_tuning_init_text"] == "say"
    assert config["tokenizer_name_or_path"] == str(folder / "model")


def test_rows_must_leave_room_for_the_prompt(folder, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 300}) + "\n")
    change = {"data.path": str(tmp_path / "long.jsonl"), "data.eval_fraction": 0.0}
    with pytest.raises(RecipeError, match="251 tokens, but the model's positions end at 250"):
        lorax.train(
            recipe(folder, tmp_path / "run", adapter=PROMPT, **change, **{"data.max_length": 251})
        )
    lorax.train(
        recipe(folder, tmp_path / "run", adapter=PROMPT, **change, **{"data.max_length": 250})
    )
