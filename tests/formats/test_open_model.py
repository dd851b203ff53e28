"""What lies at a path: the base as it was in training, the tokenizer of the adapter, the Hub's ids.

Made with PEFT and transformers as users make them; what PEFT computes is what is expected.
"""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from oracles import llama
from tiny_tokenizer import CHATML, byte_tokenizer

import lorax
from lorax.errors import EnvironmentProblem, FormatError, LoraxError, UsageError
from lorax.formats.open_model import open_model
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.merging import laboratory as merging
from lorax.quant.quantize import stored_format

ROWS = '{"prompt": "say ", "completion": "bb"}\n' * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base (float32, no chat template), and a PEFT adapter over it."""
    root = tmp_path_factory.mktemp("open")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(root / "base")
    write_tokenizer(tokenizer, root / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(root / "adapter")
    (root / "rows.jsonl").write_text(ROWS)
    return root


def trained(place: Path, output: Path, **model) -> Path:
    values = {
        "model": {"path": str(place / "base"), **model},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"path": str(place / "rows.jsonl")},
        "train": {
            "output_dir": str(output),
            "max_steps": 1,
            "batch_size": 2,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
        },
    }
    return lorax.train(lorax.Recipe.from_dict(values)).output_dir


def copied(place: Path, to: Path) -> Path:
    shutil.copytree(place / "adapter", to)
    return to


# The base in training ---------------------------------------------------------------------------

RECORDS = [
    {"quantization": "nf4-dq", "dtype": "bfloat16"},
    {"quantization": "int8"},
    {"dtype": "bfloat16"},
    {"quantization": "fp4", "dtype": "float32"},
    {},
]


@pytest.mark.parametrize("model", RECORDS, ids=[str(sorted(r.items())) for r in RECORDS])
@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_runs_adapter_opens_over_the_base_it_was_trained_over(place, tmp_path, model, inside):
    run = trained(place, tmp_path / "run", **model)
    said: list[str] = []
    opened, _ = open_model(str(run / inside), say=said.append)
    assert stored_format(opened) == model.get("quantization")
    dtype = opened.get_parameter(opened.embedding_name).dtype
    assert str(dtype) == "torch." + model.get("dtype", "float32")
    assert len(said) == (1 if model else 0)
    assert all(value in said[0] for value in model.values())
    expected = lorax.load_model(place / "base", **{"dtype": "auto", **model})
    lorax.load_adapter(expected, run / "adapter")
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(opened(ids), expected(ids))


def test_flags_win_over_the_record(place, tmp_path):
    run = trained(place, tmp_path / "run", quantization="nf4", dtype="bfloat16")
    said: list[str] = []
    opened, _ = open_model(str(run), dtype="float32", quantization="none", say=said.append)
    assert stored_format(opened) is None
    assert opened.get_parameter(opened.embedding_name).dtype == torch.float32
    assert not said
    opened, _ = open_model(str(run), quantization="fp4", say=said.append)
    assert stored_format(opened) == "fp4"
    assert opened.get_parameter(opened.embedding_name).dtype == torch.bfloat16
    assert "bfloat16" in said[0]
    assert "nf4" not in said[0]


def test_a_base_whose_files_are_quantized_loads_as_it_is(place, tmp_path):
    run = trained(place, tmp_path / "run", quantization="nf4")
    from lorax.formats.quantize_model import quantize_model

    quantize_model(place / "base", tmp_path / "four", "nf4")
    opened, _ = open_model(str(run), str(tmp_path / "four"), check_base=False)
    assert stored_format(opened) == "nf4"


def test_an_adapter_that_left_its_run_still_knows_the_quantization(place, tmp_path):
    run = trained(place, tmp_path / "run", quantization="nf4-dq", dtype="bfloat16")
    shutil.copytree(run / "adapter", tmp_path / "elsewhere")
    said: list[str] = []
    opened, _ = open_model(str(tmp_path / "elsewhere"), say=said.append)
    assert stored_format(opened) == "nf4-dq"
    assert "adapter_model.safetensors" in said[0]


@pytest.mark.parametrize(
    "text",
    [
        "[model",
        '[model]\nquantization = "nf5"\n',
        '[model]\ndtype = "int7"\n',
        "[model]\nquantization = 4\n",
        "#" * (2**20 + 1),
    ],
)
def test_a_damaged_record_is_named(place, tmp_path, text):
    run = trained(place, tmp_path / "run")
    (run / "config.toml").write_text(text)
    with pytest.raises(FormatError, match=r"config\.toml.*expected") as caught:
        open_model(str(run))
    assert "\n" not in str(caught.value)


# The tokenizer and its template -----------------------------------------------------------------


def test_the_adapters_own_tokenizer_wins_in_generate_and_merge(place, tmp_path):
    adapter = copied(place, tmp_path / "a")
    write_tokenizer(byte_tokenizer(chat_template=CHATML, eos="<|im_end|>"), adapter)
    _, tokenizer = open_model(str(adapter))
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    base_end = lorax.load_tokenizer(place / "base").eos_token_id
    assert set(tokenizer.end_token_ids) == {tokenizer.eos_token_id, base_end}
    laboratory, tokenizer = merging.open_laboratory(str(adapter))
    laboratory.write(laboratory.requested()[0], tmp_path / "merged", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs.chat_template == CHATML
    assert theirs.eos_token == "<|im_end|>"


def test_a_template_alone_goes_with_the_bases_tokenizer(place, tmp_path):
    adapter = copied(place, tmp_path / "a")
    (adapter / "chat_template.jinja").write_text(CHATML)
    _, tokenizer = open_model(str(adapter))
    assert tokenizer.chat_template == CHATML
    assert tokenizer.encode("abc") == lorax.load_tokenizer(place / "base").encode("abc")


def test_a_template_in_tokenizer_config_counts_too(place, tmp_path):
    adapter = copied(place, tmp_path / "a")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert open_model(str(adapter))[1].chat_template == CHATML


def test_a_base_without_a_tokenizer_is_no_obstacle(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    adapter = copied(place, tmp_path / "a")
    with pytest.raises(FormatError, match="tokenizer"):
        open_model(str(adapter), str(tmp_path / "base"))
    write_tokenizer(byte_tokenizer(chat_template=CHATML), adapter)
    assert open_model(str(adapter), str(tmp_path / "base"))[1].chat_template == CHATML


# Where the base and the adapter are -------------------------------------------------------------


@pytest.mark.parametrize("stated", ["../base", "base", "models/gone", "/nowhere/base"])
def test_a_base_that_is_not_there_names_the_option(place, tmp_path, monkeypatch, stated):
    monkeypatch.chdir(tmp_path)
    adapter = copied(place, tmp_path / "deep" / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = stated
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(EnvironmentProblem, match="--base") as caught:
        open_model(str(adapter))
    assert stated in str(caught.value)
    open_model(str(adapter), str(place / "base"))


@pytest.mark.parametrize("stated", [None, "", 7])
def test_an_adapter_that_names_no_base(place, tmp_path, stated):
    adapter = copied(place, tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = stated
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--base"):
        open_model(str(adapter))


def test_an_adapter_by_its_hub_id(place, tmp_path, monkeypatch):
    """A cache as huggingface_hub leaves it; the id is in no directory."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--poems" / "snapshots" / ("0" * 40)
    copied(place, snapshot)
    refs = tmp_path / "models--someone--poems" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    opened, _ = open_model("someone/poems")
    expected, _ = open_model(str(place / "adapter"))
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(opened(ids), expected(ids))
    laboratory, _ = merging.open_laboratory("someone/poems")
    assert laboratory.requested()
    with pytest.raises(LoraxError, match="someone/prose"):
        open_model("someone/prose")


def test_home_is_filled_in(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    opened, _ = open_model("~/adapter")
    assert opened.name_or_path == str(place / "base")


def test_generation_past_the_positions_is_said_once(place, caplog):
    model, tokenizer = open_model(str(place / "base"))
    positions = model.max_positions
    text = lorax.generate(model, tokenizer, "a" * (positions - 3), max_new_tokens=50)
    (record,) = caplog.records
    assert f"max_new_tokens 50 is cut to 3: the model has {positions}" in record.getMessage()
    assert len(tokenizer.encode(text)) <= 3
    caplog.clear()
    lorax.generate(model, tokenizer, "a" * (positions - 3), max_new_tokens=3)
    assert not caplog.records
    with pytest.raises(UsageError, match="shorten"):
        lorax.generate(model, tokenizer, "a" * positions, max_new_tokens=1)
