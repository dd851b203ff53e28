"""Every method and variant as a user goes: train, then each command, then PEFT and transformers.

Each command works, or it refuses in one line with the exit code that the table says.
"""

import json
import sys
import warnings

import pytest
import tomli_w
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from variants import make_base

import lorax
from lorax import cli

ROWS = [{"prompt": "say a", "completion": "b"}, {"prompt": "say c", "completion": "dd"}] * 4
IDS = torch.arange(60, 80)[None]
FLOAT32 = 1e-5
ADALORA = {"method": "adalora", "init_r": 4, "target_r": 2}
PROMPT = {"method": "prompt-tuning", "num_virtual_tokens": 3}
FULL = {"method": "full"}

# What a command says instead of working: its exit code and words. None: it works.
NO_MATRIX = (4, "it is no low-rank matrix alone")
NO_PROMPT = (4, "nothing to merge")
NO_ADAPTER = (4, "full fine-tuning leaves none")
INSIDE = (4, "depends on its base")
LOFTQ = (1, "PEFT does not load it: ")
INT8 = (2, "expected nf4")
FOLD = (4, "fold_into_lora")
NO_BIAS = (4, "lora_bias cannot be merged into it")
WORKS: dict[str, tuple[int, str]] = {}

# name -> (base, [adapter], quantization, what does not work)
CASES = {
    "lora": ("llama", {"target_modules": "all-linear", "use_rslora": True}, None, WORKS),
    "lora gpt2": ("gpt2", {}, None, WORKS),
    "dora": ("llama", {"use_dora": True}, None, {"inspect": NO_MATRIX}),
    "dora gpt2": ("gpt2", {"use_dora": True, "target_modules": ["wte", "c_attn"]}, None,
                  {"inspect": NO_MATRIX}),
    "lora_bias": ("llama", {"lora_bias": True}, None, {"inspect": NO_MATRIX}),
    "lora_bias on a head": ("llama", {"lora_bias": True, "target_modules": ["q_proj", "lm_head"]},
                            None, {"inspect": NO_MATRIX, "merge": NO_BIAS, "report": NO_BIAS}),
    "lora_bias gpt2": ("gpt2", {"lora_bias": True}, None, {"inspect": NO_MATRIX}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, None,
                  {"inspect": (4, "is no lora_A or lora_B of a Linear")}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, None, WORKS),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, None, {"inspect": INSIDE}),
    "pissa at random": ("llama", {"init_lora_weights": "pissa_niter_4"}, None, WORKS),
    "olora": ("llama", {"init_lora_weights": "olora"}, None, {"inspect": INSIDE}),
    "olora gpt2": ("gpt2", {"init_lora_weights": "olora"}, None, WORKS),
    "loftq": ("llama", {"init_lora_weights": "loftq"}, None, {"inspect": INSIDE, "verify": LOFTQ}),
    "adalora": ("llama", ADALORA, None, {"inspect": FOLD}),
    "adalora gpt2": ("gpt2", ADALORA, None, {"inspect": FOLD}),
    "prompt": ("llama", PROMPT, None, {"inspect": (4, "expected a LoRA"), "merge": NO_PROMPT,
                                       "report": NO_PROMPT, "verify": (4, "a tuned prompt")}),
    "prompt gpt2": ("gpt2", PROMPT, None, {"inspect": (4, "expected a LoRA"), "merge": NO_PROMPT,
                                           "report": NO_PROMPT, "verify": (4, "a tuned prompt")}),
    "full": ("llama", FULL, None, {"inspect": NO_ADAPTER, "verify": NO_ADAPTER,
                                   "merge": (2, "full fine-tuning leaves none"),
                                   "report": (2, "full fine-tuning leaves none")}),
    "saved head": ("llama", {"modules_to_save": ["lm_head"]}, None, {"inspect": NO_MATRIX}),
    "saved norm and biases": ("gpt2", {"modules_to_save": ["ln_f"], "bias": "all"}, None,
                              {"inspect": NO_MATRIX}),
    "rows": ("llama", {"trainable_token_indices": [73, 80]}, None, {"inspect": NO_MATRIX}),
    "lora on nf4": ("llama", {"target_modules": "all-linear"}, "nf4", WORKS),
    "dora on nf4-dq": ("llama", {"use_dora": True}, "nf4-dq", {"inspect": NO_MATRIX}),
    "adalora on nf4": ("llama", ADALORA, "nf4", {"inspect": FOLD}),
    "pissa on nf4": ("llama", {"init_lora_weights": "pissa"}, "nf4", WORKS),
    "saved head on nf4": ("llama", {"modules_to_save": ["lm_head"]}, "nf4",
                          {"inspect": NO_MATRIX}),
    "lora on int8": ("llama", {}, "int8", {"verify": INT8}),
    "loftq on nf4": ("llama", {"init_lora_weights": "loftq"}, "nf4",
                     {"train": (4, "LoftQ quantizes the base itself")}),
    "full on nf4": ("llama", FULL, "nf4", {"train": (2, "a quantized weight is frozen")}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tied Llama, a GPT-2 and some rows."""
    root = tmp_path_factory.mktemp("end-to-end")
    torch.manual_seed(0)
    make_base(root / "llama", "llama", tie_word_embeddings=True)
    make_base(root / "gpt2", "gpt2")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run the command line in this process: (exit code, all that it said)."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorax", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = capfd.readouterr()
        return code, found.out, found.err

    return run_command


def recipe(place, folder, base, adapter, quantization):
    """Three steps on the tiny base; the ranks of AdaLoRA fall in them."""
    values = {
        "model": {"path": str(place / base), "dtype": "float32"},
        "adapter": adapter if "method" in adapter else {"r": 4, **adapter},
        "data": {"path": str(place / "rows.jsonl")},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": 3,
            "batch_size": 2,
            "micro_batch_size": 1,
            "learning_rate": 1e-2,
        },
    }
    if quantization is not None:
        values["model"]["quantization"] = quantization
    (folder / "recipe.toml").write_text(tomli_w.dumps(values))
    return folder / "recipe.toml"


def by_transformers(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def relative_rms(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_a_variant_goes_through_every_command(name, place, run, tmp_path):
    base, adapter, quantization, refused = CASES[name]
    over = () if quantization is None else ("--quantization", quantization)
    trained, merged = tmp_path / "run", tmp_path / "merged"
    rows = ("--data", place / "rows.jsonl", "--json")

    def does(what, *command):
        """Run it; whether it worked. A refusal is one line and the code that is expected."""
        code, out, err = run(*command)
        expected, words = refused.get(what, (0, ""))
        assert code == expected, (what, code, out, err)
        assert "Traceback" not in out + err, what
        assert words in out + err, (what, out, err)
        if code > 1:
            assert err.strip().splitlines()[-1].startswith("error: "), (what, err)
            assert not out.strip(), what
        return code == 0, out

    if not does("train", "train", recipe(place, tmp_path, base, adapter, quantization))[0]:
        assert not trained.exists()
        return
    assert does("generate", "generate", trained, "hi", "--max-new-tokens", 3, *over)[0]
    before = json.loads(run("evaluate", place / base, *rows, *over)[1])["eval_loss"]
    loss = json.loads(does("evaluate", "evaluate", trained, *rows, *over)[1])["eval_loss"]
    assert loss != before if adapter is PROMPT else loss < before  # a prompt starts at random
    if does("merge", "merge", trained, merged)[0]:
        again = json.loads(run("evaluate", merged, *rows)[1])["eval_loss"]
        if quantization != "int8":  # which quantizes the inputs too; a dense model does not
            assert again == pytest.approx(loss, rel=FLOAT32)
    does("report", "merge", trained, "--report", "--tokens", 32)
    does("verify", "verify", trained, "--tokens", 32, *(over if quantization else ()))
    does("inspect", "inspect", "adapter", trained)
    if quantization is None:
        in_other_programs(name, place / base, trained, merged)


def in_other_programs(name, base, trained, merged):
    """What the run left, and what merging made of it, in PEFT and transformers."""
    with torch.no_grad():
        if name == "full":
            mine = lorax.load_model(trained / "model", "float32")
            theirs = by_transformers(trained / "model")
            assert relative_rms(mine(IDS), theirs(IDS).logits) <= FLOAT32
            return
        mine = lorax.load_model(base, "float32")
        lorax.load_adapter(mine, trained / "adapter")
        expected = mine(IDS)
        if merged.exists():
            assert relative_rms(expected, by_transformers(merged)(IDS).logits) <= FLOAT32
        if name != "loftq":  # PEFT has it on CUDA alone: tests/test_verify_variants.py
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = PeftModel.from_pretrained(by_transformers(base), trained / "adapter")
            logits = theirs.eval()(IDS).logits[:, -IDS.shape[1] :]
            assert relative_rms(expected, logits) <= FLOAT32


def test_an_adapter_in_a_sub_directory_is_verified_and_inspected(place, run, tmp_path):
    """PEFT puts an adapter that is not called "default" into a directory of its name."""
    model = lorax.load_model(place / "llama", "float32")
    lorax.add_adapter(model, lorax.LoRAConfig(r=2, init_lora_weights=False))
    lorax.save_adapter(model, tmp_path / "saved" / "first")
    for command in (("verify",), ("inspect", "adapter")):
        code, out, err = run(*command, tmp_path / "saved")
        assert code == 0, (out, err)
    lorax.save_adapter(model, tmp_path / "saved" / "second")
    for command in (("verify",), ("inspect", "adapter")):
        code, _, err = run(*command, tmp_path / "saved")
        assert code == 4
        assert "several adapters lie there (first, second)" in err
