"""Full fine-tuning: against transformers, what a run leaves, what it refuses; methods' fields."""

import pytest
import torch
from oracles import gpt2, llama, tokens
from test_recipe import build, refused
from tiny_runs import folder as folder
from tiny_runs import recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lorax
from lorax.errors import RecipeError, UsageError
from lorax.formats.huggingface import save_model
from lorax.formats.open_model import open_model
from lorax.training.evaluate import evaluate
from lorax.training.loss import summed_loss
from lorax.training.methods import set_up
from lorax.training.plan import describe

FULL = {"method": "full"}
BASES = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}


@pytest.mark.parametrize("kind", BASES)
def test_ten_steps_against_transformers(kind, tmp_path):
    """Every parameter by name; losses within 1e-5, weights within 1e-4 in their norms."""
    theirs = BASES[kind]()
    theirs.save_pretrained(tmp_path / "base")
    mine = lorax.load_model(tmp_path / "base")
    set_up(mine, None, build(adapter__method="full"), 10)
    assert all(p.requires_grad for p in mine.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-5) for m in (mine, theirs)]
    for step in range(10):
        ids = tokens(4, 24, seed=100 + step)
        ours = summed_loss(mine, ids, ids) / ids[:, 1:].numel()
        others = theirs(input_ids=ids, labels=ids).loss
        assert ours.item() == pytest.approx(others.item(), rel=1e-5)
        for loss, optimizer in zip((ours, others), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_model(mine, tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected, start = dict(theirs.named_parameters()), dict(before.named_parameters())
    for name, parameter in again.named_parameters():
        error = (parameter - expected[name]).norm() / expected[name].norm()
        assert error <= 1e-4, name
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"


def test_a_run_leaves_a_model_that_both_open(folder, tmp_path):
    run = lorax.train(recipe(folder, tmp_path / "run", adapter=FULL))
    names = sorted(p.name for p in run.output_dir.iterdir())
    assert names == ["config.toml", "environment.json", "loss.png", "metrics.jsonl", "model"]
    assert run.result == run.output_dir / "model"
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    theirs = AutoModelForCausalLM.from_pretrained(run.result)
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        mine = run.model(tokens())
        assert (theirs(tokens()).logits - mine).abs().max() <= 1e-5
    AutoTokenizer.from_pretrained(run.result)
    for path in (run.output_dir, run.result):  # the commands open either
        model, tokenizer = open_model(str(path))
        assert tokenizer.vocab_size == run.tokenizer.vocab_size
        with torch.no_grad():
            assert torch.equal(model(tokens()), mine)
    with pytest.raises(UsageError, match="expected an adapter"):
        open_model(str(run.output_dir), base=str(folder / "model"))


def test_the_run_can_be_repeated_from_its_config(folder, tmp_path):
    first = lorax.train(recipe(folder, tmp_path / "a", adapter=FULL))
    settings = {"train.output_dir": str(tmp_path / "b")}
    second = lorax.train(lorax.Recipe.load(first.output_dir / "config.toml", settings))
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_evaluating_the_run_gives_its_last_loss(folder, tmp_path):
    change = {"data.eval_fraction": 0.0, "data.eval_path": str(folder / "rows.jsonl")}
    run = lorax.train(recipe(folder, tmp_path / "run", adapter=FULL, **change))
    model, tokenizer = open_model(str(run.output_dir))
    rows = lorax.data.examples.load_examples(folder / "rows.jsonl", tokenizer, 512).rows
    found = evaluate(model, rows, 4, tokenizer.pad_token_id)["eval_loss"]
    assert found == pytest.approx(run.metrics[-1]["eval_loss"], rel=1e-5)


def test_auto_means_float32_even_where_the_files_say_bfloat16(folder, tmp_path):
    save_model(lorax.load_model(folder / "model", "bfloat16"), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text((folder / "model" / name).read_text())
    change = {"model.path": str(tmp_path / "base"), "model.dtype": "auto"}
    run = lorax.train(recipe(folder, tmp_path / "run", adapter=FULL, **change))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert AutoConfig.from_pretrained(run.result).dtype == torch.float32


# --- what is refused -------------------------------------------------------------------------


def test_a_quantized_base_is_refused(folder, tmp_path):
    message = refused(adapter__method="full", model__quantization="nf4-dq")
    assert "model.quantization = 'nf4-dq': a quantized weight is frozen" in message
    save_model(lorax.load_model(folder / "model", quantization="nf4"), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_text((folder / "model" / name).read_text())
    with pytest.raises(RecipeError, match="its checkpoint is quantized"):
        lorax.train(
            recipe(folder, tmp_path / "r", adapter=FULL, **{"model.path": str(tmp_path / "base")})
        )
    assert not (tmp_path / "r").exists()


def test_sixteen_bits_are_refused():
    assert "trains in float32" in refused(adapter__method="full", model__dtype="bfloat16")


@pytest.mark.parametrize("method", ["full", "prompt-tuning"])
def test_lora_plus_is_refused_without_a_and_b(method):
    values = {"adapter__num_virtual_tokens": 4} if method == "prompt-tuning" else {}
    message = refused(adapter__method=method, train__lora_plus_ratio=4, **values)
    assert "train.lora_plus_ratio goes with LoRA's A and B" in message


@pytest.mark.parametrize(
    ("method", "key", "word"),
    [
        ("full", "r", "adapter.r belongs to method lora; adapter.method = 'full' takes nothing"),
        ("full", "target_modules", "belongs to method lora and adalora"),
        ("full", "init_r", "belongs to method adalora"),
        ("lora", "init_r", "adapter.init_r belongs to method adalora; adapter.method = 'lora'"),
        ("lora", "num_virtual_tokens", "belongs to method prompt-tuning"),
        ("adalora", "r", "adapter.r belongs to method lora; adapter.method = 'adalora' takes"),
        ("adalora", "use_dora", "belongs to method lora"),
        ("adalora", "rank_pattern", "belongs to method lora"),
        ("prompt-tuning", "lora_alpha", "belongs to method lora and adalora"),
        ("adalora", "total_step", "unknown key"),
        ("adalora", "tinitt", "did you mean adapter.tinit?"),
        ("prompt-tuning", "num_virtual_token", "did you mean adapter.num_virtual_tokens?"),
    ],
)
def test_a_field_of_another_method_is_refused_by_name(method, key, word):
    assert word in refused(**{"adapter__method": method, f"adapter__{key}": 4})


def test_an_unknown_method_names_all():
    message = refused(adapter__method="lora-xs")
    assert (
        "adapter.method = 'lora-xs': expected one of lora, adalora, prompt-tuning, full" in message
    )
    assert "adapter.method" in refused(adapter__method=3)
    assert "adapter" in refused(adapter=3)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"adapter__method": "prompt-tuning"}, "adapter.num_virtual_tokens is missing"),
        ({"adapter__method": "adalora", "adapter__target_r": 12}, "ranks would never change"),
        ({"adapter__method": "adalora", "adapter__beta1": 2.0}, "beta1"),
        (
            {"adapter__method": "adalora", "adapter__tinit": 9, "train__max_steps": 9},
            "leave none of 9 steps",
        ),
        ({"adapter__method": "adalora", "train__max_steps": 1}, "before one was watched"),
    ],
)
def test_what_a_method_lacks_is_named(changes, word):
    assert word in refused(**changes)


METHODS = {
    "lora": ({"adapter__r": 4}, "LoRA of rank 4, lora_alpha 8; the run leaves runs/first/adapter"),
    "adalora": (
        {"adapter__tinit": 2, "adapter__tfinal": 3, "train__max_steps": 30},
        "AdaLoRA: from rank 12 to 8 on average, in steps 3 to 27; the run leaves",
    ),
    "prompt-tuning": (
        {"adapter__num_virtual_tokens": 7},
        "7 virtual tokens in front of each row; the run leaves runs/first/adapter",
    ),
    "full": ({}, "every weight is trained, in float32; the run leaves runs/first/model"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_and_the_round_trip_of_each_method(method, tmp_path):
    changes, word = METHODS[method]
    made = build(adapter__method=method, **changes)
    assert word in describe(made)
    (tmp_path / "recipe.toml").write_text(made.to_toml())
    assert lorax.Recipe.load(tmp_path / "recipe.toml") == made


def test_the_plan_knows_the_steps_where_the_rows_are_here(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 64)
    made = build(adapter__method="adalora", adapter__tfinal=1, data__path=str(rows))
    assert "in steps 1 to 3;" in describe(made)
    with pytest.raises(RecipeError, match="leave none of 4 steps"):
        describe(build(adapter__method="adalora", adapter__tinit=4, data__path=str(rows)))
    made = build(adapter__method="adalora", adapter__tfinal=1, data__path="nowhere.jsonl")
    assert "to the last but 1;" in describe(made)
