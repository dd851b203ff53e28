"""Files that never end, block, or ask for much more than they hold (cases 83, 84, 89)."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from oracles import llama
from tiny_tokenizer import byte_tokenizer

import lorax
from lorax.data.rows import read_rows
from lorax.errors import LoraxError, RecipeError
from lorax.formats.json_files import parse_json
from lorax.formats.optimizer_files import load_optimizer_state
from lorax.formats.run_record import read_record
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.formats.toml_files import MAX_DEPTH, parse_toml


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounded") / "base"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    llama(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    lorax.save_adapter(model, folder)
    return folder


ENDLESS = {
    "config.json": lorax.load_model,
    "model.safetensors": lorax.load_model,
    "tokenizer.json": lorax.load_tokenizer,
    "tokenizer_config.json": lorax.load_tokenizer,
    "chat_template.jinja": lorax.load_tokenizer,
    "tokenizer.model": lorax.load_tokenizer,
    "merges.txt": lorax.load_tokenizer,
    "adapter_config.json": lambda path: lorax.load_adapter(torch.nn.Module(), path),
    "model.gguf": lambda path: lorax.load_model(path / "model.gguf"),
    "recipe.toml": lambda path: lorax.Recipe.load(path / "recipe.toml"),
    "config.toml": lambda path: read_record(path / "adapter"),
    "rows.jsonl": lambda path: read_rows(path / "rows.jsonl"),
    "rows.json": lambda path: read_rows(path / "rows.json"),
    "rows.csv": lambda path: read_rows(path / "rows.csv"),
    "optimizer.safetensors": lambda path: load_optimizer_state(path / "optimizer.safetensors"),
}
# Where a file is not there, these are read without it: a device is no file.
WITHOUT = {"chat_template.jinja", "tokenizer.model", "merges.txt", "config.toml"}


@pytest.mark.parametrize("kind", ["fifo", "zero", "directory"])
@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.timeout(20)
def test_what_never_ends_is_no_file(base, tmp_path, name, kind):
    root = tmp_path / "base"
    shutil.copytree(base, root)
    (root / "adapter").mkdir()
    if name in ("tokenizer.model", "merges.txt"):
        (root / "tokenizer.json").unlink()
    (root / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(root / name)
    elif kind == "zero":
        (root / name).symlink_to("/dev/zero")
    else:
        (root / name).mkdir()
    try:
        ENDLESS[name](root)
    except LoraxError as error:
        assert len(str(error)) <= 2000  # noqa: PT017 - it may also do without
    else:
        assert name in WITHOUT | {"tokenizer_config.json"}


@pytest.mark.parametrize("count", [1000, 100_000])
@pytest.mark.parametrize("doubled", ["last", "first", "all"])
def test_a_doubled_key_is_found_in_one_pass(count, doubled):
    keys = [f"k{i}" for i in range(count)]
    keys = {"last": [*keys, keys[-1]], "first": [*keys, keys[0]], "all": keys * 2}[doubled]
    started = time.process_time()
    with pytest.raises(LoraxError, match="stands twice"):
        parse_json("{" + ",".join(f'"{key}":0' for key in keys) + "}", "x")
    assert time.process_time() - started < 1.5


MANY = 40_000
BOMBS = {
    "a dotted key": ".".join(["a"] * MANY) + " = 1",
    "a quoted dotted key": " . ".join(['"a"'] * (MANY // 2)) + " = 1",
    "a table's name": "[" + ".".join(["a"] * MANY) + "]",
    "a key in a table in a line": "x = {" + ".".join(["a"] * MANY) + " = 1}",
    "brackets": "a = " + "[" * MANY,
    "braces": "a = " + "{a = " * (MANY // 2),
    "tables": "[[a]]\n" * (MANY // 2),
    "a large file": "#\n" * 10**6,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_in_toml_is_refused_before_it_is_parsed(tmp_path, name):
    (tmp_path / "recipe.toml").write_text(BOMBS[name])
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(RecipeError, match=r"expected at most"):
        lorax.Recipe.load(tmp_path / "recipe.toml")
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize(
    "text",
    [
        "x = 'a" + ".b" * 1000 + "'",
        'x = "a\\"' + ".b[[{" * 1000 + '"',
        'x = """a\n' + "[[[[.\n" * 1000 + '"""',
        "x = '''" + "[" * 1000 + "'''  # " + "." * 1000,
        "# don't " + "." * 1000 + "\nx = 1",
        "x" + ".x" * (MAX_DEPTH - 1) + " = 1",
        "x = [" + "1.5, " * 1000 + "]",
    ],
    ids=lambda text: text[:12],
)
def test_dots_and_brackets_inside_of_a_text_are_text(text):
    import tomllib

    assert parse_toml(text, "x") == tomllib.loads(text)


def test_every_recipe_of_the_repository_is_well_inside_the_bounds(request):
    for file in (request.config.rootpath / "configs").glob("*.toml"):
        parse_toml(file.read_text() * 1, str(file))


ASKS = {
    "r": {"r": 65536, "rank_pattern": {}},
    "a pattern": {"rank_pattern": {"q_proj": 60000}},
    "DoRA": {"r": 65536, "use_dora": True},
    "AdaLoRA": {
        "peft_type": "ADALORA", "init_r": 65536, "target_r": 8, "total_step": 100, "tfinal": 10,
    },
    "a prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2**40},
    "all layers": {"r": 65536, "target_modules": "all-linear"},
}  # fmt: skip


# Each in a fork of its own, whose high-water mark begins with it.
LOAD_EACH = """
import os, resource, sys
import lorax

model = lorax.load_model(sys.argv[1])
for folder in sys.argv[2:]:
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            lorax.load_adapter(model, folder, check_adapter=False)
        except lorax.LoraxError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(os.path.basename(folder), grown // 1024, error, sep="|", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def answers(base, adapter, tmp_path_factory):
    """Of each config in ASKS: the megabytes that loading took, and the error."""
    root = tmp_path_factory.mktemp("asks")
    for name, asks in ASKS.items():
        shutil.copytree(adapter, root / name)
        file = root / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | asks))
    command = [sys.executable, "-c", LOAD_EACH, base, *(root / name for name in ASKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {name: (int(megabytes), message) for name, megabytes, message in lines}


@pytest.mark.parametrize("name", ASKS)
def test_a_config_that_asks_for_more_than_its_file_has_allocates_nothing(answers, name):
    megabytes, message = answers[name]
    assert megabytes < 100
    assert message
