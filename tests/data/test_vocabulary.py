"""A tokenizer with tokens that its model's embedding does not have."""

import json

import pytest
import torch
from command_line import complete_lorax
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.data.tokenizer import Tokenizer
from lorax.data.vocabulary import check_vocabulary, padding_id
from lorax.errors import DataError
from lorax.parity.rows import batch

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """transformers' own files; the tokens were added, the embedding was not resized."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    backend = byte_tokenizer().backend
    rows = backend.get_vocab_size()
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, added, template in (
        ("pad", {"pad_token": "[PAD]"}, None),
        ("chat", {"extra_special_tokens": ["<|start|>", "<|end|>"]}, CHATML),
    ):
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_tokenizer().backend,
            eos_token="</s>",
            model_max_length=128,
            **added,
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(root / name)
    return root


def _rows(path, count=3):
    talk = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]
    lines = [
        {"messages": talk} if path.stem == "chat" else {"prompt": "a" * n, "completion": "b"}
        for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _recipe(root, name, output, rows):
    return lorax.Recipe.from_dict(
        {
            "model": {"path": str(root / name)},
            "data": {"path": str(rows), "eval_path": str(rows)},
            "train": {"output_dir": str(output), "max_steps": 1, "batch_size": 4},
        }
    )


def test_a_pad_token_beyond_the_embedding_is_padded_with_another(made, tmp_path):
    tokenizer = lorax.load_tokenizer(made / "pad")
    model = lorax.load_model(made / "pad")
    assert tokenizer.pad_token_id == model.config.vocab_size
    run = lorax.train(_recipe(made, "pad", tmp_path / "run", _rows(tmp_path / "rows.jsonl")))
    assert run.metrics[0]["eval_loss"] > 0
    assert lorax.generate(model, tokenizer, "a", max_new_tokens=1) is not None


def test_padding_with_another_id_gives_the_same_loss(made, tmp_path):
    from lorax.data.examples import load_examples
    from lorax.training.evaluate import evaluate

    tokenizer, model = lorax.load_tokenizer(made / "pad"), lorax.load_model(made / "pad")
    rows = load_examples(_rows(tmp_path / "rows.jsonl"), tokenizer, 100).rows
    beyond = evaluate(model, rows, 3, tokenizer.pad_token_id)
    assert beyond == evaluate(model, rows, 3, 0)
    assert beyond["eval_loss"] == pytest.approx(evaluate(model, rows, 1, 0)["eval_loss"], rel=1e-6)


def test_a_row_with_such_a_token_is_one_line_with_the_token(made, tmp_path):
    recipe = _recipe(made, "chat", tmp_path / "run", _rows(tmp_path / "chat.jsonl"))
    with pytest.raises(DataError, match=r"'<\|start\|>' has id 261, .*embedding has 261 rows"):
        lorax.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_prompt_with_such_a_token_is_one_line(made):
    tokenizer, model = lorax.load_tokenizer(made / "chat"), lorax.load_model(made / "chat")
    with pytest.raises(DataError, match="embedding has 261 rows"):
        lorax.generate(model, tokenizer, "a<|end|>b")


def test_a_text_to_verify_on_with_such_a_token_is_one_line(made, tmp_path):
    tokenizer, model = lorax.load_tokenizer(made / "chat"), lorax.load_model(made / "chat")
    (tmp_path / "text").write_text("river <|end|> stone")
    with pytest.raises(DataError, match=r"'<\|end\|>' has id 262"):
        batch(tokenizer, model, tmp_path / "text", 20)


def test_a_prompt_to_tune_from_with_such_a_token_is_one_line(made):
    tokenizer, model = lorax.load_tokenizer(made / "chat"), lorax.load_model(made / "chat")
    config = lorax.PromptTuningConfig(
        num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="a<|end|>"
    )
    with pytest.raises(lorax.LoraxError, match="262"):
        lorax.add_adapter(model, config, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["generate", "MODEL", "river"], ["evaluate", "MODEL", "--data", "ROWS"]]
)
def test_the_command_line_says_it_in_one_line(made, tmp_path, command):
    names = {"MODEL": str(made / "chat"), "ROWS": str(_rows(tmp_path / "chat.jsonl"))}
    done = complete_lorax(*(names.get(word, word) for word in command))
    assert done.returncode == 4
    assert done.stderr.startswith("error: token '<|start|>' has id 261")
    assert done.stderr.count("\n") == 1


def test_the_check_and_the_padding_themselves():
    tokenizer = byte_tokenizer()
    assert isinstance(tokenizer, Tokenizer)
    check_vocabulary([0, 9], 10, tokenizer)
    with pytest.raises(DataError, match="id 10"):
        check_vocabulary([0, 10], 10, tokenizer)
    assert [padding_id(9, 10), padding_id(10, 10)] == [9, 0]
