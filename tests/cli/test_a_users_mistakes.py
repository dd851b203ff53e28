"""Typical mistakes: each is one line that says what lies there and what to do, and no traceback."""

import gzip
import json
import shutil

import pytest
from command_line import run_lorax
from peft import LoraConfig, get_peft_model
from tiny_runs import folder, recipe  # noqa: F401
from tiny_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lorax
from lorax.data.examples import load_examples
from lorax.errors import DataError, LoraxError
from lorax.formats.adapter_data import weighted_sum
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.training.plan import describe

POINTER = "version https://git-lfs.example/spec/v1\noid sha256:4665\nsize 269060552\n"
PAGE = "<!DOCTYPE html>\n<html><body>404</body></html>\n"
ROW = {"prompt": "river", "completion": "stone"}


@pytest.fixture(scope="module")
def place(folder):  # noqa: F811
    """The tiny Llama, a GPT-2 and an adapter by PEFT and by lorax over each."""
    GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=byte_tokenizer().vocab_size)
    ).save_pretrained(folder / "gpt2")
    write_tokenizer(byte_tokenizer(), folder / "gpt2")
    for name in ("model", "gpt2"):
        theirs = AutoModelForCausalLM.from_pretrained(folder / name)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(theirs, config).save_pretrained(folder / f"{name}-peft")
        mine = lorax.load_model(folder / name)
        lorax.add_adapter(mine, lorax.LoRAConfig(r=2, target_modules="all-linear"))
        lorax.save_adapter(mine, folder / f"{name}-adapter")
    return folder


def fails(*arguments, code=4) -> str:
    """The one line on stderr of a command that ends so."""
    with pytest.raises(AssertionError, match=f"exit code {code}") as caught:
        run_lorax(*arguments)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in str(caught.value)
    return lines[0]


# A directory of another kind ----------------------------------------------------------------------


def test_an_adapter_where_a_model_is_expected(place, tmp_path):
    adapter = place / "model-adapter"
    for arguments in (
        ["quantize", adapter, tmp_path / "out"],
        ["inspect", "quantization", adapter],
        ["generate", adapter, "hi", "--base", adapter],
    ):
        assert "an adapter lies there: give its base model here" in fails(*arguments)
    with pytest.raises(LoraxError, match="an adapter lies there; its base model has one"):
        lorax.load_tokenizer(adapter)


def test_a_model_where_an_adapter_is_expected(place):
    for arguments in (
        ["verify", place / "model"],
        ["inspect", "adapter", place / "model"],
        ["adapter", "add", place / "model", "--output", place / "sum"],
    ):
        assert "a model lies there: give the adapter's directory here" in fails(*arguments)


def test_half_an_adapter_and_nothing_at_all(place, tmp_path):
    assert "no config.json; expected a model directory; give" in fails("generate", tmp_path, "hi")
    shutil.copy(place / "model-adapter/adapter_model.safetensors", tmp_path)
    assert "without its adapter_config.json" in fails("generate", tmp_path, "hi")


@pytest.mark.parametrize(
    "command", [["generate", "RUN", "hi"], ["merge", "RUN", "out"], ["verify", "RUN"]]
)
def test_a_run_that_has_not_ended(place, tmp_path, command):
    (tmp_path / "config.toml").write_text(recipe(place, tmp_path).to_toml())
    code = 2 if command[0] == "merge" else 4
    line = fails(*(tmp_path if word == "RUN" else word for word in command), code=code)
    assert line.endswith(f"go on with lorax train {tmp_path / 'config.toml'} --resume")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_as_windows_writes_it(place, tmp_path, encoding):
    made = recipe(place, tmp_path / "run")
    file = tmp_path / "recipe.toml"
    file.write_bytes(made.to_toml().replace("\n", "\r\n").encode(encoding))
    assert lorax.Recipe.load(file) == made
    file.write_text('[data]\npath = "C:\\data\\rows.jsonl"\n')
    with pytest.raises(LoraxError, match="those with a backslash single ones"):
        lorax.Recipe.load(file)


@pytest.mark.parametrize(("mine", "other"), [("model", "gpt2"), ("gpt2", "model")])
def test_an_adapter_of_another_architecture(place, mine, other):
    line = fails("generate", place / f"{mine}-adapter", "hi", "--base", place / other)
    assert line.count(" here, ") == 1  # the kind of model, and none of its options
    assert "'Llama'" in line
    assert "'GPT2'" in line
    assert "Load it over its base" in line
    assert "match no module" in fails(
        "generate", place / f"{mine}-peft", "hi", "--base", place / other
    )


def test_a_base_that_differs_in_many_options_names_some(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "other")
    file = tmp_path / "other/config.json"
    changed = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 3.0, "rope_type": "yarn"}}
    changed["rope_parameters"] |= {"factor": 4.0, "beta_fast": 20.0}
    changed |= {"hidden_act": "gelu", "sliding_window": 5, "use_sliding_window": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    line = fails("generate", place / "model-adapter", "hi", "--base", tmp_path / "other")
    assert "MISSING" not in line
    assert 1 < line.count(" here, ") <= 5


def test_adapters_of_two_models_are_not_added(place, tmp_path, caplog):
    with pytest.raises(LoraxError, match="no module in common; expected adapters of one base"):
        weighted_sum([place / "model-peft", place / "gpt2-peft"], [])
    shutil.copytree(place / "model-peft", tmp_path / "copy")
    file = tmp_path / "copy/adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": "elsewhere/model"}
    file.write_text(json.dumps(values))
    assert not caplog.records
    weighted_sum([place / "model-peft", tmp_path / "copy"], [])
    assert "'elsewhere/model'; their sum needs these to be the same" in caplog.text


# A file that is another one -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "word"), [(POINTER, "pointer of Git LFS: git lfs pull"), (PAGE, "it is a web page")]
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_or_a_page_instead_of_a_model_file(place, tmp_path, content, word, name):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    load = lorax.load_tokenizer if name == "tokenizer.json" else lorax.load_model
    with pytest.raises(LoraxError, match=rf"{name}: .*{word}.*get the file anew") as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "model.gguf"])
def test_a_pointer_instead_of_a_binary_file(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(LoraxError, match="git lfs pull"):
        lorax.load_tokenizer(tmp_path / name if name.endswith("gguf") else tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_data_that_are_something_else(tmp_path, ending):
    line = (json.dumps(ROW) + "\n").encode()
    for content, word in (
        (POINTER.encode(), "git lfs pull"),
        (PAGE.encode(), "a web page"),
        (gzip.compress(line), "packed by gzip: unpack it first"),
        (b"PK\x03\x04" + line, "packed by zip"),
        (b"\x28\xb5\x2f\xfd" + line, "packed by zstd"),
    ):
        path = tmp_path / f"rows.{ending}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=word):
            load_examples(path, byte_tokenizer(), 100)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(line))
    with pytest.raises(DataError, match="unpack it first"):
        load_examples(path, byte_tokenizer(), 100)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_file_without_commas(tmp_path, mark):
    (tmp_path / "rows.csv").write_text(f"prompt{mark}completion\na{mark}b\n")
    with pytest.raises(DataError, match=r"one column, 'prompt.*expected commas"):
        load_examples(tmp_path / "rows.csv", byte_tokenizer(), 100)


def test_preferences_are_refused_by_name_without_a_completion(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="column chosen: preference rows are not trained on"):
        load_examples(tmp_path / "rows.jsonl", byte_tokenizer(), 100)


# What a dry run sees ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": "a", "completion": None}, ":3: completion is null"),
        ({"prompt": "a", "completion": 3}, ":3: completion is a number"),
        ({"text": "a"}, ":3: prompt is missing"),
    ],
)
@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_a_dry_run_looks_at_each_row(place, tmp_path, row, word, key):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (ROW, ROW, row)))
    changed = {f"data.{key}": str(rows), "data.eval_fraction": 0.0}
    with pytest.raises(DataError, match=word):
        describe(recipe(place, tmp_path / "run", **changed))


def test_a_dry_run_says_what_is_evaluated_on(place, tmp_path):
    changed = {"data.eval_path": str(place / "rows.jsonl"), "data.eval_fraction": 0.0}
    assert "40 rows to evaluate on" in describe(recipe(place, tmp_path / "run", **changed))
    changed["data.eval_path"] = str(tmp_path / "none.jsonl")
    assert "none.jsonl is not here" in describe(recipe(place, tmp_path / "run", **changed))
