"""Files from strangers (S1 to S3, S5, S7), and directories that are written whole or not at all."""

import ast
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import in_a_fork
from mutating import MUTATIONS, refused_mutations
from safetensors.torch import save_file
from tiny_tokenizer import CHATML, byte_tokenizer

import lorax
from lorax.data.examples import load_examples
from lorax.errors import EnvironmentProblem, FormatError, LoraxError, UnsupportedModel, UsageError
from lorax.formats.directory import written_directory
from lorax.formats.json_files import parse_json, read_json
from lorax.formats.model_config import new_model, read_config
from lorax.formats.safetensors_files import open_checkpoint, write_checkpoint
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.models.llama_config import LlamaConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 261,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "torch_dtype": "float32",
}
RECIPE = """[model]
path = "base"
quantization = "nf4-dq"
[adapter]
r = 4
target_modules = ["q_proj", "v_proj"]
rank_pattern = {q_proj = 2}
[data]
path = "rows.jsonl"
[train]
output_dir = "runs/first"
learning_rate = 2e-4
"""
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u00fc b"}]
ROWS = {
    "rows.jsonl": json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"messages": MESSAGES}),
    "rows.json": json.dumps([{"prompt": "a", "completion": "b"}] * 2, indent=1),
    "rows.csv": 'instruction,input,output\na,"b, c",d\ne,,"f\ng"\n',
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A directory with one good file of every kind that lorax reads."""
    root = tmp_path_factory.mktemp("good")
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text(json.dumps(LLAMA))
    torch.manual_seed(0)
    model = new_model(read_config(LLAMA, "test"))
    tensors = {
        name: torch.randn(tensor.shape) / 8
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, root / "base" / "model.safetensors", metadata={"format": "pt"})
    tokenizer = byte_tokenizer(pad="<pad>", chat_template=CHATML)
    write_tokenizer(tokenizer, root / "base")
    shutil.copytree(root / "base", root / "sharded", ignore=lambda *_: ["model.safetensors"])
    write_checkpoint(tensors, root / "sharded", max_shard_bytes=4000)
    model = lorax.load_model(root / "base")
    config = lorax.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3})
    lorax.add_adapter(model, config)
    lorax.save_adapter(model, root / "adapter")
    _write_gguf(root / "model.gguf", tensors)
    (root / "recipe.toml").write_text(RECIPE)
    for name, content in ROWS.items():
        (root / name).write_text(content, encoding="utf-8")
    return root


def _write_gguf(path: Path, tensors: dict[str, torch.Tensor], bos: bool = False, **changes) -> None:
    """A small GGUF; `changes` are fields' values by the ends of their names (`__` for the dot)."""
    import gguf

    from lorax.formats.gguf_layout import LAYER_NAMES, NAMES

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    vocab = byte_tokenizer().backend.get_vocab()
    tokens = [*sorted(vocab, key=vocab.__getitem__), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 5 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(CHATML)
    theirs = {mine: name for name, mine in NAMES.items()} | {
        f"model.layers.0.{mine}.weight": f"blk.0.{name}.weight"
        for name, mine in LAYER_NAMES.items()
    }
    for field in writer.kv_data:
        for key in list(field):
            change = next((n for n in changes if key.endswith(n.replace("__", "."))), None)
            if change is not None:
                kind = gguf.GGUFValueType.get_type(changes[change])
                field[key] = gguf.GGUFValue(changes[change], kind)
    for name, tensor in tensors.items():
        writer.add_tensor(theirs[name], tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def changed(good: Path, tmp_path: Path, **changes) -> Path:
    """The good model with keys of config.json changed (None takes a key out)."""
    shutil.copytree(good / "base", tmp_path / "base")
    config = {k: v for k, v in (LLAMA | changes).items() if v is not None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


# S1: no file runs code -------------------------------------------------------------------------

SOURCES = sorted([*(ROOT / "lorax").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "cPickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("os", "system"),
    ("os", "popen"),
    ("np", "load"),
    ("numpy", "load"),
}
FORBIDDEN_WORDS = {"trust_remote_code", "allow_pickle", "weights_only", "shell"}


def _dangers(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
            found += [name for name in names if name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            names = [module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [
                n for n in names if n in FORBIDDEN_MODULES or n in ("torch.load", "os.system")
            ]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES or node.value.id == "builtins":
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_WORDS:
            found.append(node.arg)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_code_from_files(path):
    assert _dangers(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "e = exec",
        "f(trust_remote_code=True)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "import builtins\nbuiltins.eval('1')",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert _dangers(ast.parse(source))


def test_the_scan_sees_the_whole_package():
    assert len(SOURCES) > 40
    assert ROOT / "kernels" / "__init__.py" in SOURCES


def test_a_pickle_is_named_and_not_opened(good, tmp_path):
    base = changed(good, tmp_path)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is a pickle"):
        lorax.load_model(base)
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    os.replace(
        tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_model.bin"
    )
    with pytest.raises(FormatError, match=r"adapter_model\.bin is a pickle"):
        lorax.load_adapter(lorax.load_model(good / "base"), tmp_path / "adapter")


# S2: paths stay inside -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../base/model.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "./x",
        3,
        None,
        ["x"],
        "x\x00y",
        "../\ud800",
    ],
)
def test_an_index_cannot_name_files_elsewhere(good, tmp_path, name):
    directory = tmp_path / "sharded"
    shutil.copytree(good / "base", tmp_path / "base")
    shutil.copytree(good / "sharded", directory)
    (directory / "sub").mkdir()
    shutil.copy(good / "base" / "model.safetensors", directory / "sub" / "x.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    if isinstance(name, str) and name.startswith("/"):
        name = str(good / "base" / "model.safetensors")
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="index"):
        open_checkpoint(directory)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_a_map_is_refused(good, tmp_path, weight_map):
    shutil.copytree(good / "sharded", tmp_path / "x")
    (tmp_path / "x" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    with pytest.raises(FormatError, match="weight_map"):
        open_checkpoint(tmp_path / "x")


def test_an_index_and_its_shards_must_agree(good, tmp_path):
    shutil.copytree(good / "sharded", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert len(set(index["weight_map"].values())) > 1
    homes = list(index["weight_map"].values())
    first = next(name for name, home in index["weight_map"].items() if homes.count(home) > 1)
    del index["weight_map"][first]
    file.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=first):
        open_checkpoint(tmp_path / "x")
    index["weight_map"][first] = "gone.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"gone\.safetensors, which is not there"):
        open_checkpoint(tmp_path / "x")


# S3: hostile JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        ('{"x": {"a": 1, "a": 2}}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": Infinity}', "Infinity"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": ' + "[" * 100_000 + "}", "not valid JSON"),
        ('{"a": "\\ud800"}', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[1]", "expected a JSON object"),
        ("3", "expected a JSON object"),
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} x', "not valid JSON"),
    ],
)
def test_hostile_json_is_refused(text, words):
    with pytest.raises(FormatError, match=words) as caught:
        parse_json(text, "file.json")
    assert str(caught.value).startswith("file.json: ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("number", ["9" * 20, "9" * 300, "9" * 5000, "-1" + "0" * 4400, "1e999"])
def test_a_number_of_any_size_is_refused_where_it_is_used(good, tmp_path, number):
    text = '{"a": ' + number + "}"
    is_whole = number.isdigit() and len(number) <= 300
    assert parse_json(text, "x") == {"a": int(number) if is_whole else float(number)}
    finite = is_whole  # those are fine where any number is
    places = {
        "base/config.json": ["hidden_size", "num_hidden_layers", "vocab_size"],
        "adapter/adapter_config.json": ["r", "lora_dropout"],
    }
    if not finite:
        places["base/config.json"] += ["rms_norm_eps"]
        places["adapter/adapter_config.json"] += ["lora_alpha"]
    for file, keys in places.items():
        load = _load_base if file.startswith("base") else _load_adapter
        for key in keys:
            with pytest.raises(LoraxError, match=key):
                load(_with_number(good, tmp_path / key, file, key, number))
    _load_base(_with_number(good, tmp_path / "other", "base/config.json", "nobodys", number))
    beside = "base/tokenizer_config.json"
    _load_tokenizer(_with_number(good, tmp_path / "max", beside, "model_max_length", number))


def _with_number(good: Path, root: Path, file: str, key: str, number: str) -> Path:
    shutil.copytree(good, root)
    values = json.loads((good / file).read_text())
    values.pop(key, None)
    (root / file).write_text(json.dumps(values)[:-1] + f', "{key}": {number}}}')
    return root


def test_a_key_that_stands_twice_among_many_is_found_at_once():
    many = ",".join(f'"k{i}": 0' for i in range(100_000))
    with pytest.raises(FormatError, match="stands twice"):
        parse_json("{" + many + ', "k99999": 1}', "x")


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "config.json"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="no regular file"):
        read_json(path)


def test_pairs_of_surrogates_are_characters():
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}


def test_a_json_file_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text("{}" + " " * 100)
    with pytest.raises(FormatError, match="at most 100"):
        read_json(tmp_path / "a.json", max_bytes=100)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FormatError, match="bytes"):
        read_json(huge)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(tmp_path / name)


@pytest.mark.parametrize(
    "kind", ["bert", "t5", "mixtral", "gemma", "", None, 3, ["llama"], {"a": 1}, "Llama"]
)
def test_an_unknown_model_type_is_refused_by_name(good, tmp_path, kind):
    with pytest.raises(UnsupportedModel, match="lorax loads llama, mistral, qwen2") as caught:
        lorax.load_model(changed(good, tmp_path, model_type=kind))
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -16}, "hidden_size"),
        ({"hidden_size": 16.0}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "4096"),  # a missing key is the default of transformers
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({"vocab_size": 2**62}, "vocab_size"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "heads"),
        ({"num_attention_heads": 3}, "o_proj"),
        ({"num_attention_heads": 2**27, "head_dim": 2**27, "hidden_size": 2**27}, "heads"),
        ({"num_attention_heads": 64, "head_dim": None}, "head_dim"),
        ({"head_dim": 7}, "head"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "xielu"}, "hidden_act"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
)
def test_an_impossible_config_is_refused_by_key(good, tmp_path, changes, word):
    with pytest.raises(FormatError, match=word):
        lorax.load_model(changed(good, tmp_path, **changes))


def test_a_config_that_asks_for_terabytes_allocates_nothing(good, tmp_path):
    huge = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 2**27)
    with pytest.raises(FormatError, match="expected"):
        lorax.load_model(changed(good, tmp_path, **huge))


@pytest.mark.parametrize("rank", [2**62, 10**18, 2**40])
def test_an_adapter_that_asks_for_terabytes_allocates_nothing(good, tmp_path, rank):
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for change in ({"r": rank, "rank_pattern": {}}, {"rank_pattern": {"q_proj": rank}}):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
        model = lorax.load_model(good / "base")
        with pytest.raises(LoraxError):
            lorax.load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_pattern": "(", "layers_to_transform": [0]},
        {"layers_pattern": ["["], "layers_to_transform": [0]},
        {"rank_pattern": {"(?i)q_proj": 3}},
        {"rank_pattern": {"a)|(b": 3}},
        {"rank_pattern": {"q_proj": "3"}},
        {"alpha_pattern": {"q_proj": None}},
        {"target_modules": "("},
        {"target_modules": [3]},
        {"target_modules": []},
        {"target_modules": {"q_proj": 1}},
        {"r": "2"},
        {"r": None},
        {"lora_alpha": "2"},
        {"lora_dropout": "0"},
        {"lora_dropout": -1},
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "some"},
    ],
)
def test_an_impossible_adapter_config_is_refused_and_the_model_is_as_it_was(
    good, tmp_path, changes
):
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = lorax.load_model(good / "base")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(LoraxError) as caught:
        lorax.load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_an_adapters_odd_dtype_is_an_error(good, tmp_path, dtype):
    from safetensors.torch import load_file

    shutil.copytree(good / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(LoraxError, match="float"):
        lorax.load_adapter(lorax.load_model(good / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
def test_a_models_odd_dtype_is_an_error(good, tmp_path, stored, dtype):
    from safetensors.torch import load_file

    base = changed(good, tmp_path, torch_dtype=None)
    tensors = load_file(base / "model.safetensors")
    save_file({n: t.to(stored) for n, t in tensors.items()}, base / "model.safetensors")
    with pytest.raises(LoraxError):
        lorax.load_model(base, dtype=dtype)


def test_a_tensor_under_two_names_is_refused(good, tmp_path):
    from safetensors.torch import load_file

    base = changed(good, tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(FormatError, match=r"norm\.weight"):
        lorax.load_model(base)


# S5: parsers do not crash ----------------------------------------------------------------------


def _load_base(root: Path) -> None:
    lorax.load_model(root / "base")


def _load_sharded(root: Path) -> None:
    lorax.load_model(root / "sharded")


def _load_tokenizer(root: Path) -> None:
    tokenizer = lorax.load_tokenizer(root / "base")
    tokenizer.encode("a text")
    assert tokenizer.pad_token_id >= 0
    assert tokenizer.prefix is not None


def _load_adapter(root: Path) -> None:
    lorax.load_adapter(_shared_model(root), root / "adapter")


def _load_gguf(root: Path) -> None:
    lorax.load_model(root / "model.gguf")


def _load_gguf_tokenizer(root: Path) -> None:
    lorax.load_tokenizer(root / "model.gguf").encode("a text")


def _load_recipe(root: Path) -> None:
    lorax.Recipe.load(root / "recipe.toml")


def _load_rows(name: str):
    def load(root: Path) -> None:
        load_examples(root / name, byte_tokenizer(chat_template=CHATML), 1000)

    return load


def _shared_model(root: Path):
    return lorax.load_model(root / "base")


FILES = {
    "base/config.json": _load_base,
    "base/model.safetensors": _load_base,
    "base/tokenizer.json": _load_tokenizer,
    "base/tokenizer_config.json": _load_tokenizer,
    "base/generation_config.json": _load_tokenizer,
    "base/chat_template.jinja": _load_tokenizer,
    "sharded/model.safetensors.index.json": _load_sharded,
    "sharded/model-00002-of-00004.safetensors": _load_sharded,
    "adapter/adapter_config.json": _load_adapter,
    "adapter/adapter_model.safetensors": _load_adapter,
    "model.gguf": _load_gguf,
    "recipe.toml": _load_recipe,
    "rows.json": _load_rows("rows.json"),
    "rows.jsonl": _load_rows("rows.jsonl"),
    "rows.csv": _load_rows("rows.csv"),
}


@pytest.mark.parametrize("name", [*FILES, "model.gguf as a tokenizer"])
def test_only_loraxerror_escapes_from_mutated_files(good, tmp_path, name):
    root = tmp_path / "mutated"
    shutil.copytree(good, root)
    file = root / name.partition(" ")[0]
    load = _load_gguf_tokenizer if " " in name else FILES[name]
    refused = refused_mutations(file, lambda: load(root), name)
    assert refused > MUTATIONS // 20 or name.endswith(".jinja")


@pytest.mark.parametrize(
    "changes",
    [
        {"general__architecture": "gemma"},
        {"general__architecture": 3},
        {"block_count": 2**31 - 1},
        {"block_count": 0},
        {"block_count": -1},
        {"block_count": 2},
        {"block_count": "1"},
        {"embedding_length": 32},
        {"embedding_length": 2**31 - 1},
        {"head_count": 0},
        {"head_count": 3},
        {"head_count": 8},
        {"head_count": -2},
        {"head_count_kv": 2},
        {"head_count_kv": 0},
        {"feed_forward_length": "x"},
        {"feed_forward_length": 25},
        {"context_length": 0},
        {"layer_norm_rms_epsilon": "x"},
        {"layer_norm_rms_epsilon": 0.0},
        {"freq_base": -1.0},
        {"freq_base": float("nan")},
        {"freq_base": float("inf")},
    ],
    ids=str,
)
def test_an_impossible_gguf_config_is_refused(good, tmp_path, changes):
    tensors = lorax.load_model(good / "base").state_dict()
    del tensors["lm_head.weight"]
    _write_gguf(tmp_path / "x.gguf", tensors, **changes)
    with pytest.raises(FormatError, match=r"x\.gguf|expected"):
        lorax.load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "changes",
    [
        {"ggml__model": "bert"},
        {"ggml__model": 3},
        {"ggml__pre": "nobody's"},
        {"ggml__tokens": ["a", "b"]},
        {"ggml__tokens": "ab"},
        {"ggml__tokens": [1, 2, 3]},
        {"token_type": [1]},
        {"token_type": 3},
        {"merges": ["ab"]},
        {"merges": ["a z z"]},
        {"merges": 3},
        {"eos_token_id": 10**6},
        {"eos_token_id": -1},
        {"eos_token_id": "1"},
        {"chat_template": 3},
    ],
    ids=str,
)
def test_an_impossible_gguf_tokenizer_is_refused(good, tmp_path, changes):
    tensors = lorax.load_model(good / "base").state_dict()
    del tensors["lm_head.weight"]
    _write_gguf(tmp_path / "x.gguf", tensors, **changes)
    with pytest.raises(FormatError, match=r"x\.gguf"):
        lorax.load_tokenizer(tmp_path / "x.gguf")


def test_a_gguf_is_the_model_it_was_written_from(good, tmp_path):
    tensors = lorax.load_model(good / "base").state_dict()
    del tensors["lm_head.weight"]
    _write_gguf(tmp_path / "x.gguf", tensors, bos=True)
    model, tokenizer = (f(tmp_path / "x.gguf") for f in (lorax.load_model, lorax.load_tokenizer))
    assert model.config.num_hidden_layers == 1
    assert tokenizer.encode("ab") == [0, 261]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "name", [n for n in FILES if not n.endswith((".jinja", ".csv", ".jsonl", ".toml"))]
)
def test_a_file_cut_short_is_an_error(good, tmp_path, name, share):
    root = tmp_path / "cut"
    shutil.copytree(good, root)
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(LoraxError):
        FILES[name](root)


# S7: quiet -------------------------------------------------------------------------------------

QUIET = """
import sys
sys.addaudithook(lambda event, args: event.startswith("socket.") and print("OPENED", event, args))
import lorax
from pathlib import Path
from lorax.data.examples import load_examples
root = Path(sys.argv[1])
model = lorax.load_model(root / "base", quantization="nf4-dq")
lorax.load_adapter(model, root / "adapter")
tokenizer = lorax.load_tokenizer(root / "base")
examples = load_examples(root / "rows.jsonl", tokenizer, 100)
lorax.load_model(root / "model.gguf")
lorax.load_tokenizer(root / "model.gguf")
text = lorax.generate(model, tokenizer, "a", max_new_tokens=2)
print("rows", len(examples))
"""


def test_loading_and_encoding_local_files_opens_no_socket(good):
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(good)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rows 2"


# Directories that are written whole or not at all ----------------------------------------------


def listing(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def write(target: Path, replace: bool = False, **files: str) -> None:
    with written_directory(target, replace=replace) as directory:
        for name, content in files.items():
            (directory / name).write_text(content)


def test_a_directory_appears_whole_and_with_usual_modes(tmp_path):
    write(tmp_path / "deep" / "new", a="1", b="2")
    assert listing(tmp_path) == {"deep/new/a": b"1", "deep/new/b": b"2"}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "deep/new").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "deep/new/a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_nothing_is_seen_before_the_end(tmp_path):
    with written_directory(tmp_path / "new") as directory:
        (directory / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert listing(tmp_path) == {"new/a": b"1"}


def test_replacing_leaves_other_files(tmp_path):
    write(tmp_path / "x", a="1", other="o")
    write(tmp_path / "x", replace=True, a="2", b="3")
    assert listing(tmp_path) == {"x/a": b"2", "x/b": b"3", "x/other": b"o"}


def test_a_taken_target_is_refused_and_left_alone(tmp_path):
    write(tmp_path / "x", a="1")
    (tmp_path / "file").write_text("f")
    (tmp_path / "link").symlink_to("nowhere")
    before = listing(tmp_path)
    with pytest.raises(UsageError, match="not empty"):
        write(tmp_path / "x", a="2")
    for name in ("file", "link"):
        for replace in (False, True):
            with pytest.raises(UsageError, match="is a file"):
                write(tmp_path / name, replace=replace, a="2")
    assert listing(tmp_path) == before


def _fail_while_writing(target: Path, replace: bool, failure: Exception) -> None:
    with written_directory(target, replace=replace) as directory:
        (directory / "a").write_text("half")
        raise failure


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), ValueError("mine")])
def test_a_failure_while_writing_leaves_no_litter(tmp_path, failure):
    write(tmp_path / "x", a="1", b="1")
    before = listing(tmp_path)
    expected = EnvironmentProblem if isinstance(failure, OSError) else ValueError
    for target, replace in ((tmp_path / "x", True), (tmp_path / "new", False)):
        with pytest.raises(expected):
            _fail_while_writing(target, replace, failure)
    assert listing(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("broken", ["rename", "replace", "fsync"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_failure_while_moving_leaves_the_old_content(
    tmp_path, monkeypatch, broken, replace, calls
):
    if replace:
        write(tmp_path / "x", a="1", b="1", other="o")
    before = listing(tmp_path)
    real, left = getattr(os, broken), [calls]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, broken, failing)
    try:
        write(tmp_path / "x", replace=replace, a="2", b="2", c="2")
    except EnvironmentProblem:
        assert listing(tmp_path) == before
    else:
        assert left[0] >= 0  # that call never came
        assert listing(tmp_path / "x") == {
            **({"other": b"o"} if replace else {}),
            **dict.fromkeys("abc", b"2"),
        }
    assert [p.name for p in tmp_path.iterdir()] in (["x"], [])


def saved_on_a_full_disk(base, adapter, limit):
    """What saving an adapter and a model says where no file may have more than `limit` bytes."""
    model = lorax.load_model(base)
    lorax.add_adapter(model, lorax.LoRAConfig(r=64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    codes = []
    for save, path in ((lorax.save_adapter, adapter), (lorax.save_model, f"{adapter}-model")):
        if save is lorax.save_model:
            model = lorax.unload_adapter(model) or model
        try:
            save(model, path)
        except EnvironmentProblem as error:
            codes.append(error.exit_code)
    return codes


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_full_disk_is_an_error_of_the_environment_and_the_old_adapter_stays(
    good, tmp_path, limit
):
    shutil.copytree(good / "adapter", tmp_path / "adapter")
    before = listing(tmp_path)
    codes = in_a_fork(lambda: saved_on_a_full_disk(good / "base", tmp_path / "adapter", limit))
    assert codes == [3, 3]
    assert listing(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_missing_permission_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem):
        write(tmp_path / "file" / "below", a="1")


def test_the_good_files_are_what_they_seem(good):
    """Else the mutations would show nothing."""
    model = lorax.load_model(good / "base")
    assert isinstance(model.config, LlamaConfig)
    ids = torch.tensor([lorax.load_tokenizer(good / "base").encode("a text")])
    expected = model(ids)
    assert torch.equal(lorax.load_model(good / "sharded")(ids), expected)
