"""What docs/files.md says is refused is refused: a LoraxError of one line, with the words shown."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from hf_directories import Cell, build, read, write
from safetensors.torch import load_file, save_file

import lorax
from lorax.data.examples import load_examples
from lorax.errors import LoraxError

DOCS = (Path(__file__).parents[2] / "docs/files.md").read_text()
TABLE = dict(re.findall(r"^\| ([^|]+) \| `([^`]+)`", DOCS.split("\n## Refused\n")[1], re.M))


@pytest.fixture
def model(tmp_path) -> Path:
    """A directory that loads, with an adapter beside it that does, too."""
    build(Cell("llama", "bytes", "minimal"), tmp_path / "model")
    base = lorax.load_model(tmp_path / "model")
    lorax.add_adapter(base, lorax.LoRAConfig(r=2))
    lorax.save_adapter(base, tmp_path / "adapter")
    return tmp_path / "model"


def changed(file: Path, **keys) -> None:
    write(file, read(file) | keys)


def config(**keys):
    def refused(model):
        changed(model / "config.json", **keys)
        lorax.load_model(model)

    return refused


def pickle(model):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    lorax.load_model(model)


def missing_shard(model):
    (model / "model.safetensors").unlink()
    weight_map = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    write(model / "model.safetensors.index.json", {"weight_map": weight_map})
    lorax.load_model(model)


def damaged(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    lorax.load_model(model)


def tensor_too_many(model):
    file = model / "model.safetensors"
    save_file(load_file(file) | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}, file)
    lorax.load_model(model)


def no_tokenizer(model):
    (model / "tokenizer.json").unlink()
    lorax.load_tokenizer(model)


def pointer(model):
    text = "version https://git-lfs.example/spec/v1\noid sha256:46\nsize 26\n"
    (model / "model.safetensors").write_text(text)
    lorax.load_model(model)


def old_tekken(model):
    (model / "tokenizer.json").unlink()
    write(model / "tekken.json", {"config": {"pattern": "."}, "vocab": []})
    lorax.load_tokenizer(model)


def to_fill_in(model):
    changed(model / "tokenizer_config.json", fill_token="<FILL_ME>")
    lorax.load_tokenizer(model).encode("a <FILL_ME> b")


def packed(model):
    file = model.with_name("rows.jsonl")
    file.write_bytes(gzip.compress(b'{"text": "a"}'))
    load_examples(file, lorax.load_tokenizer(model), 64)


def damaged_gguf(model):
    file = model.with_suffix(".gguf")
    file.write_bytes(b"GGUF" + bytes(20))
    lorax.load_model(file)


def adapter_pickle(model):
    adapter = model.with_name("adapter")
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    lorax.load_adapter(lorax.load_model(model), adapter)


def adapter(**keys):
    def refused(model):
        directory = model.with_name("adapter")
        changed(directory / "adapter_config.json", **keys)
        lorax.load_adapter(lorax.load_model(model), directory)

    return refused


def rows(text, ending="jsonl"):
    def refused(model):
        file = model.with_name(f"rows.{ending}")
        file.write_text(text if isinstance(text, str) else json.dumps(text))
        load_examples(file, lorax.load_tokenizer(model), 64)

    return refused


REFUSED = {
    "another architecture": config(model_type="mixtral"),
    "another rotation of positions, or longrope outside Phi-3": config(
        rope_parameters={"rope_type": "longrope"}
    ),
    "weights as a pickle": pickle,
    "a checkpoint of another quantizer": config(quantization_config={"quant_method": "gptq"}),
    "a shard that is missing": missing_shard,
    "a pointer of Git LFS, or a web page, in a file's place": pointer,
    "a damaged safetensors file": damaged,
    "a tensor without a place": tensor_too_many,
    "no tokenizer file": no_tokenizer,
    "a `tekken.json` from before version 7": old_tekken,
    "`<FILL_ME>` in a text for Code Llama": to_fill_in,
    "an adapter's directory as a model": lambda model: lorax.load_model(model.with_name("adapter")),
    "a damaged `.gguf` file": damaged_gguf,
    "an adapter as a pickle": adapter_pickle,
    "another kind of adapter": adapter(peft_type="IA3"),
    "an option that changes the result": adapter(use_qalora=True),
    "an option near one of PEFT's": adapter(use_rslorra=True),
    "another kind of data file": rows("a\tb", ending="tsv"),
    "packed data": packed,
    "a `.csv` file without commas": rows("prompt;completion\na;b\n", ending="csv"),
    "columns that fit no kind of row": rows({"frage": "?", "antwort": "!"}),
    "rows of preferences": rows({"prompt": "a", "chosen": "b", "rejected": "c"}),
    "rows with pictures or sound": rows({"prompt": "a", "completion": "b", "images": ["c.png"]}),
    "a row that is no JSON": rows('{"text": "a"}\n{"text": "b"\n'),
}


def test_the_table_and_the_cases_are_the_same():
    assert set(TABLE) == set(REFUSED)


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_one_line(kind, model):
    with pytest.raises(LoraxError) as caught:
        REFUSED[kind](model)
    message = str(caught.value)
    assert TABLE[kind] in message
    assert "\n" not in message
    assert len(message) < 600
