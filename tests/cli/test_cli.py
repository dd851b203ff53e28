"""The command line: it answers at once, and a user's mistake is one line and an exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import docstring_parser
import pytest
import torch
from command_line import run_lorax
from safetensors.torch import save_file
from tiny_tokenizer import CHATML, byte_tokenizer

import lorax
from lorax import cli
from lorax.errors import LoraxError, UsageError
from lorax.formats.model_config import new_model, read_config
from lorax.formats.tokenizer_files import write_tokenizer

COMMANDS = ("train", "generate", "evaluate", "merge", "quantize", "verify", "demo")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 261,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
RECIPE = """[model]
path = "{base}"
[adapter]
r = 2
[data]
path = "{rows}"
[train]
output_dir = "{run}"
max_steps = 2
batch_size = 2
micro_batch_size = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, an adapter for it, rows and a recipe."""
    root = tmp_path_factory.mktemp("cli")
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = new_model(read_config(CONFIG, "test"))
    tensors = {n: torch.randn(t.shape) / 8 for n, t in model.state_dict().items()}
    del tensors["lm_head.weight"]
    save_file(tensors, root / "base" / "model.safetensors")
    write_tokenizer(byte_tokenizer(chat_template=CHATML), root / "base")
    model = lorax.load_model(root / "base")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, init_lora_weights=False))
    lorax.save_adapter(model, root / "adapter")
    (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (root / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    recipe = RECIPE.format(base=root / "base", rows=root / "rows.jsonl", run=root / "run")
    (root / "recipe.toml").write_text(recipe)
    (root / "taken").mkdir()
    (root / "taken" / "file").write_text("here")
    return root


@pytest.fixture
def run(place, monkeypatch, capfd):
    """Run the command line in this process, in `place`: (exit code, stdout, stderr)."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", ["lorax", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return run_command


def lorax_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorax", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


# At once ---------------------------------------------------------------------------------------


def test_help_loads_the_command_line_s_own_packages_and_no_other():
    """So it answers at once: 0.3 s of processor time where this was written."""
    code = (
        "import sys; sys.argv = ['lorax', '--help']\n"
        "from lorax import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "found = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "print(*found, file=sys.stderr)\n"
        "print(len(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, count = done.stderr.splitlines()
    light = {"attr", "attrs", "cyclopts", "docstring_parser", "lorax", "rich", "__main__"}
    others = {name for name in packages.split() if not name.startswith(("__editable__", "_dist"))}
    assert others <= light | {"typing_extensions"}
    assert int(count) < 350


@pytest.mark.parametrize(
    "code",
    [
        "import lorax",
        "import lorax.cli",
        "import lorax.errors, lorax.data.templates, lorax.training.recipe",
        "import lorax; dir(lorax); lorax.LoRAConfig; lorax.Recipe",
    ],
)
def test_these_imports_do_not_import_torch(code):
    code += "; import sys; print(sorted({'torch', 'triton', 'numpy', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_lorax_draws_no_random_number_and_starts_nothing():
    code = (
        "import torch, threading, random; torch.manual_seed(1); random.seed(1)\n"
        "before = torch.get_rng_state(), random.getstate(), threading.active_count()\n"
        "import lorax\n"
        "for name in lorax.__all__: getattr(lorax, name)\n"
        "after = torch.get_rng_state(), random.getstate(), threading.active_count()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"lorax {command}" in out
    assert command in run("--help")[1]


def test_python_m_lorax_is_the_same_program():
    assert lorax_process("--version").stdout.strip() == lorax.__version__
    done = lorax_process("train", "nowhere.toml")
    assert done.returncode == 3
    assert done.stderr == (
        "error: nowhere.toml: cannot be read (No such file or directory); give a path that exists\n"
    )


def test_no_color_is_kept():
    done = lorax_process("train", "nowhere.toml", NO_COLOR="1", FORCE_COLOR="1")
    assert "\x1b[31m" not in done.stderr
    assert "\x1b[1;31m" not in done.stderr


# Mistakes --------------------------------------------------------------------------------------

MISTAKES = [
    # exit code, words of the message, arguments
    (2, 'Unknown command "generat". Did you mean "generate"?', "generat"),
    (2, "Did you mean --dtype?", "generate base hi --dtyp float32"),
    (2, "requires an argument", "train"),
    (2, "requires an argument", "generate base"),
    (2, "--data", "evaluate base"),
    (2, "unable to convert", "generate base hi --max-new-tokens many"),
    (3, "no.toml: cannot be read", "train no.toml"),
    (2, "did you mean train.learning_rate?", "train recipe.toml --train.learning_rat 1"),
    (2, "did you mean adapter.lora_alpha?", "train recipe.toml --adapter.lora_alhpa=1"),
    (2, "its value is missing", "train recipe.toml --train.epochs"),
    (2, "expected --section.key value", "train recipe.toml --epochs 2"),
    (2, "expected --section.key value", "train recipe.toml train.epochs 2"),
    (2, "train.batch_size = 0", "train recipe.toml --train.batch_size 0"),
    (2, "give one of them", "train recipe.toml --data.packing true --data.group_by_length true"),
    (2, "not empty", "train recipe.toml --train.output_dir taken"),
    (2, "is a file", "train recipe.toml --train.output_dir rows.jsonl"),
    (2, "model.quantization", "train recipe.toml --model.quantization int3"),
    (2, "model.dtype", "train recipe.toml --model.dtype float8"),
    (3, "no.jsonl: cannot be read", "train recipe.toml --data.path no.jsonl"),
    (4, "broken.jsonl:2: ", "train recipe.toml --data.path broken.jsonl"),
    (3, "./no: no such directory", "train recipe.toml --model.path ./no"),
    (4, "match no module", "train recipe.toml --adapter.target_modules '[\"nothing\"]'"),
    (4, "no config.json; expected a model directory", "generate taken hi"),
    (3, "./no: no such directory", "generate ./no hi"),
    (3, "no.gguf: no such file", "generate no.gguf hi"),
    (4, "expected a model directory", "generate rows.jsonl hi"),
    (2, "dtype 'float8' is unknown", "generate base hi --dtype float8"),
    (2, "nf3", "generate base hi --quantization nf3"),
    (2, "expected an adapter's directory", "generate base hi --base base"),
    (2, "device", "generate base hi --device nowhere"),
    (2, "temperature", "generate base hi --temperature -1"),
    (2, "top_p", "generate base hi --temperature 1 --top-p 0"),
    (2, "max_new_tokens", "generate base hi --max-new-tokens -1"),
    (3, "./no: no such directory", "evaluate ./no --data rows.jsonl"),
    (3, "no.jsonl: cannot be read", "evaluate base --data no.jsonl"),
    (4, "broken.jsonl:2: ", "evaluate base --data broken.jsonl"),
    (2, "--micro-batch-size", "evaluate base --data rows.jsonl --micro-batch-size 0"),
    (2, "--max-length", "evaluate base --data rows.jsonl --max-length 0"),
    (2, "dtype 'half' is unknown", "evaluate base --data rows.jsonl --dtype half"),
    (2, "not empty", "merge adapter taken"),
    (2, "is a file", "merge adapter rows.jsonl"),
    (2, "expected an adapter's directory", "merge base new"),
    (3, "no: no such directory", "merge no new"),
    (3, "./no: no such directory", "merge adapter new --base ./no"),
    (2, "nf5", "merge adapter new --quantization nf5"),
    (2, "not empty", "demo --output-dir taken --model base"),
    (2, "--steps", "demo --output-dir new --model base --steps 0"),
    (3, "./no: no such directory", "demo --output-dir new --model ./no"),
]


@pytest.mark.parametrize(("code", "words", "command"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_one_line_and_an_exit_code(run, place, code, words, command):
    import shlex

    before = {p.name for p in place.iterdir()} | {"new-data"}  # the demo's rows, written first
    found, out, err = run(*shlex.split(command))
    assert words in err
    assert found == code
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert {p.name for p in place.iterdir()} | {"new-data"} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error_of_the_environment(run):
    code, _, err = run("generate", "base", "hi", "--device", "cuda")
    assert code == 3
    assert "cuda" in err
    assert err.count("\n") == 1


def test_every_error_class_has_its_exit_code():
    found = {kind.__name__: kind.exit_code for kind in _subclasses(LoraxError)}
    assert found["UsageError"] == found["RecipeError"] == 2
    assert found["EnvironmentProblem"] == 3
    assert found["FormatError"] == found["DataError"] == found["TemplateError"] == 4
    assert found["UnsupportedModel"] == found["AdapterError"] == 4
    assert found["NumericalStop"] == 5
    assert set(found.values()) <= {2, 3, 4, 5}


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))


# What works ------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_writes_nothing(run, place):
    before = sorted(place.iterdir())
    code, out, err = run("train", "recipe.toml", "--dry-run", "--train.learning_rate", "1e-4")
    assert (code, err) == (0, "")
    assert "learning_rate = 0.0001" in out
    assert "4 rows, kind: prompt/completion" in out
    assert sorted(place.iterdir()) == before


def test_train_evaluate_generate_merge(run, place):
    for name in ("run", "merged"):
        assert not (place / name).exists()
    code, out, _ = run("train", "recipe.toml")
    assert code == 0
    assert "run/adapter" in out
    assert len((place / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    code, out, _ = run("evaluate", "run/adapter", "--data", "rows.jsonl", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == 4
    assert json.loads(out)["tokens"] == 8
    code, out, _ = run("evaluate", "base", "--data", "rows.jsonl")
    assert "nats" in out
    assert run("generate", "run/adapter", "hi", "--max-new-tokens", "3")[0] == 0
    assert run("generate", "base", "hi", "--raw", "--max-new-tokens", "3")[0] == 0
    code, out, _ = run("merge", "run/adapter", "merged")
    assert code == 0
    assert (place / "merged" / "model.safetensors").is_file()
    assert run("generate", "merged", "hi", "--max-new-tokens", "3")[0] == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--train.epochs", "2"], {"train.epochs": 2}),
        (["--train.epochs=2"], {"train.epochs": 2}),
        (["--train.learning_rate", "1e-4"], {"train.learning_rate": 1e-4}),
        (["--data.path", "my file.jsonl"], {"data.path": "my file.jsonl"}),
        (["--data.path", "a=b"], {"data.path": "a=b"}),
        (["--data.shuffle", "false"], {"data.shuffle": False}),
        (["--adapter.target_modules", '["a", "b"]'], {"adapter.target_modules": ["a", "b"]}),
        (["--adapter.target_modules", "all-linear"], {"adapter.target_modules": "all-linear"}),
        (["--data.path", "1\n[x]"], {"data.path": "1\n[x]"}),
        (["--data.path", "9" * 5000], {"data.path": "9" * 5000}),
        (["--data.path", "[" * 5000], {"data.path": "[" * 5000}),
        ([], {}),
    ],
)
def test_overrides_are_read_as_toml_else_as_text(tokens, expected):
    assert cli.parse_overrides(tuple(tokens)) == expected


@pytest.mark.parametrize("tokens", [["x"], ["--x", "1"], ["--a.b"], ["a.b", "1"], ["-a.b", "1"]])
def test_what_is_no_override_is_refused(tokens):
    with pytest.raises(UsageError):
        cli.parse_overrides(tuple(tokens))


# The tree of commands ----------------------------------------------------------------------------


def leaves(parent, words=()):
    """(words, command) of each command that does something."""
    for name in parent:
        if not name.startswith("-"):
            command = parent[name]
            if command.default_command is None:
                yield from leaves(command, (*words, name))
            else:
                yield (*words, name), command


def test_every_argument_and_option_has_a_help_text():
    silent, seen = [], 0
    for words, command in leaves(cli.app):
        stated = docstring_parser.parse(command.default_command.__doc__)
        helps = {
            name.strip(): each.description
            for each in stated.params
            for name in each.arg_name.split(",")
        }
        for argument in command.assemble_argument_collection():
            seen += 1
            if argument.show and not (
                argument.parameter.help or helps.get(argument.field_info.name)
            ):
                silent.append((*words, argument.names[0]))
    assert seen > 80
    assert silent == []


def test_the_command_line_has_a_file_for_each_command_and_none_over_250_lines():
    files = {path.stem: path for path in Path(cli.__file__).parent.glob("*.py")}
    assert {words[0] for words, _ in leaves(cli.app)} <= files.keys()
    assert max(len(path.read_text().splitlines()) for path in files.values()) <= 250


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_that_wait_do_not_spin_unless_one_asks_for_it(monkeypatch, given):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    run_lorax("--version")
    assert os.environ["OMP_WAIT_POLICY"] == (given or "passive")


def test_runtime_is_the_commands_and_not_the_librarys(place, tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.chdir(place)
    more = {"runtime.threads": 3, "train.max_steps": 1}
    lorax.train(lorax.Recipe.load("recipe.toml", {**more, "train.output_dir": f"{tmp_path}/a"}))
    assert threads == []
    words = [word for key, value in more.items() for word in (f"--{key}", value)]
    run_lorax("train", "recipe.toml", *words, "--train.output_dir", tmp_path / "b")
    assert threads == [3]
