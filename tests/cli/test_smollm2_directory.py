"""SmolLM2's directory, as transformers saves it, goes through README's commands."""

import contextlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from command_line import run_lorax
from smollm2 import shorten

import lorax

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
RUN = "runs/smollm2-qlora"
ROWS = [
    {"prompt": "What does zipfile do?", "completion": "It reads and writes ZIP archives."},
    {"prompt": "What does os.path.join do?", "completion": "It joins components of a path."},
]
# What keeps a command to seconds on one core.
SMALL = {
    "train": f"--model.path {HUB_ID} --train.max_steps 2 --train.batch_size 2 "
    "--train.micro_batch_size 2 --data.max_length 64 --data.eval_fraction 0",
    "generate": "--max-new-tokens 4",
    "merge --report": "--tokens 32",
    "inspect quantization": "--format nf4-dq",
    "verify": "--tokens 8",
}


def readme_commands() -> list[str]:
    """The block under "## Commands", but for `make` and for the demo, which brings its model."""
    section = (ROOT / "README.md").read_text().split("\n## Commands\n")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL).group(1)
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line.startswith("lorax ") and "lorax demo" not in line]


COMMANDS = readme_commands()
TRAIN = [command for command in COMMANDS if command.startswith("lorax train")]
# README names the six commands of each day; these are docs/cli.md's.
MORE = [
    f"lorax inspect adapter {RUN}/adapter --against runs/longer/adapter",
    f"lorax inspect optimizer {RUN}",
    "lorax adapter add runs/first/adapter runs/second/adapter --weights 0.5 0.5 --output sum",
    f"lorax inspect quantization {HUB_ID}",
]
OTHERS = [command for command in COMMANDS if command not in TRAIN] + MORE


def arguments(command: str) -> list[str]:
    words = shlex.split(command)[1:]
    for start, options in SMALL.items():
        if set(start.split()) <= set(words):
            words += shlex.split(options)
    return words


@pytest.fixture(scope="module")
def place(smollm2_gguf, tmp_path_factory):
    """The directory under the Hub's name, rows, and a run, whose adapter lies in two more."""
    root = tmp_path_factory.mktemp("smollm2")
    save_as_transformers_does(Path(smollm2_gguf), root / HUB_ID)
    for name in ("my.jsonl", "held-out.jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "my-model").symlink_to(root / HUB_ID)  # README's name for a directory of one's own
    with contextlib.chdir(root):
        for command in sorted(TRAIN, key=lambda line: "--dry-run" not in line):  # plans first
            run_lorax(*arguments(command))
        for other in ("longer", "first", "second"):
            shutil.copytree(f"{RUN}/adapter", f"runs/{other}/adapter")
        yield root


def save_as_transformers_does(gguf: Path, directory: Path) -> None:
    """In bfloat16, with lorax's tensors: transformers takes minutes to decode the same .gguf."""
    decoded = directory.with_name("decoded")
    lorax.save_model(shorten(lorax.load_model(gguf, dtype="bfloat16")), decoded)
    model = transformers.AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["model_max_length"] > 1e29  # what a reader of such files has to bear


def hugging_face(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model):
    ids = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


def test_the_base_against_transformers(place):
    ours = lorax.load_model(HUB_ID, dtype="float32")
    assert (logits(ours) - logits(hugging_face(HUB_ID))).abs().max() < 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained(HUB_ID)
    messages = [{"role": "user", "content": "What does zipfile do?"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokenizer = lorax.load_tokenizer(HUB_ID)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == text
    assert tokenizer.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("command", OTHERS)
def test_every_command(place, command):
    run_lorax(*arguments(command))


def test_the_merged_model_against_transformers(place):
    run_lorax("merge", f"{RUN}/adapter", "opened")
    ours = lorax.load_model("opened", dtype="float32")
    assert (logits(ours) - logits(hugging_face("opened"))).abs().max() < 1e-4
    text = "What does zipfile do?"
    before = transformers.AutoTokenizer.from_pretrained(HUB_ID)
    after = transformers.AutoTokenizer.from_pretrained("opened")
    assert after(text).input_ids == before(text).input_ids
    assert after.chat_template == before.chat_template
