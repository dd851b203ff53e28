"""Adapters, runs, quantized copies and a state that the version before wrote still open.

tests/golden/before/README.md says what lies there. The bytes are read as they were; logits are held
to 1e-5, because another CPU multiplies matrices in another order (on the machine that wrote them
they are equal).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run_lorax
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorax
from lorax.formats.adapter_data import read_adapter
from lorax.formats.open_model import open_model
from lorax.formats.optimizer_files import load_optimizer_state

BEFORE = Path(__file__).parents[1] / "golden" / "before"
IDS = torch.tensor([[5, 40, 80, 120, 7, 200, 33, 90]])
ADAPTERS = sorted(path.parent.name for path in BEFORE.glob("*/adapter_config.json"))
RUNS = sorted(path.parent.name for path in BEFORE.glob("*/metrics.jsonl"))
COPIES = sorted(path.name for path in BEFORE.glob("copy-*"))
OVER = {"lora-nf4": "nf4", "run-qlora": "nf4-dq"}  # quantization; of the others, none
BOUND = 1e-5


@pytest.fixture(autouse=True)
def beside_the_files(monkeypatch):
    """Their configs name the bases by relative paths, as the runs did."""
    monkeypatch.chdir(BEFORE)


@pytest.fixture(scope="module")
def expected():
    return load_file(BEFORE / "expected.safetensors")


def last_logits(model):
    with torch.no_grad():
        return model(IDS)[0, -1].float()


def assert_close(found, wanted):
    """BOUND, as an absolute error; the logits are about 1."""
    assert (found - wanted).abs().max() <= BOUND * max(1.0, wanted.abs().max().item())


def base_of(adapter):
    return json.loads((Path(adapter) / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


def loaded(adapter, directory=None):
    model = lorax.load_model(base_of(adapter), "float32", quantization=OVER.get(adapter))
    lorax.load_adapter(model, directory or adapter)
    return model


def test_there_is_one_of_everything():
    assert (len(ADAPTERS), len(RUNS), len(COPIES)) == (11, 5, 4)
    names = {*ADAPTERS, *RUNS, *COPIES, "optimizer.before", "optimizer.gradient", "optimizer.after"}
    assert load_file("expected.safetensors").keys() == names


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_gives_the_same_logits_and_merges(adapter, expected):
    model = loaded(adapter)
    assert_close(last_logits(model), expected[adapter])
    lorax.merge_adapter(model)
    assert_close(last_logits(model), expected[adapter])
    lorax.unmerge_adapter(model)
    assert_close(last_logits(model), expected[adapter])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_saved_again_has_the_same_tensors(adapter, tmp_path):
    lorax.save_adapter(loaded(adapter), tmp_path / "again")
    was = load_file(f"{adapter}/adapter_model.safetensors")
    now = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_opens_by_its_directory(run, expected):
    """In the numbers that it has on record; merged as the library merges."""
    said = []
    model, tokenizer = open_model(run, say=said.append)
    assert tokenizer.decode(tokenizer.encode("say aa")) == "say aa"
    assert_close(last_logits(model), expected[run])


@pytest.mark.parametrize("run", [run for run in RUNS if run not in ("run-prompt", "run-full")])
def test_a_run_merges_from_the_command_line(run, tmp_path, expected):
    run_lorax("merge", run, tmp_path / "merged", "--dtype", "float32")
    assert_close(last_logits(lorax.load_model(tmp_path / "merged", "float32")), expected[run])


@pytest.mark.parametrize("run", RUNS)
def test_a_runs_recipe_repeats_the_run(run, tmp_path):
    """Losses to 1e-5; the lines have the keys that they had."""
    output = tmp_path / "again"
    run_lorax("train", f"{run}/config.toml", "--train.output_dir", output)
    texts = (Path(run, "metrics.jsonl").read_text(), (output / "metrics.jsonl").read_text())
    was, now = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert len(was) == len(now)
    for before, after in zip(was, now, strict=True):
        assert before.keys() <= after.keys()
        for key in before.keys() & {"loss", "eval_loss", "learning_rate", "grad_norm", "tokens"}:
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("copy", COPIES)
def test_a_quantized_copy_gives_the_same_logits(copy, expected):
    assert_close(last_logits(lorax.load_model(copy, "float32")), expected[copy])


@pytest.mark.parametrize("copy", COPIES)
def test_a_quantized_copy_is_written_with_the_same_bytes_today(copy, tmp_path):
    format = copy.removeprefix("copy-")
    run_lorax("quantize", "llama", tmp_path / "now", "--format", format, "--dtype", "float32")
    was, now = (load_file(f"{at}/model.safetensors") for at in (copy, tmp_path / "now"))
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_the_8_bit_optimizers_state_goes_on(expected):
    weight = torch.nn.Parameter(expected["optimizer.before"].clone())
    optimizer = lorax.optim.AdamW8bit([weight], lr=0.01, block_size=256, min_8bit_size=256)
    optimizer.load_state_dict(load_optimizer_state(Path("optimizer-8bit.safetensors")))
    weight.grad = expected["optimizer.gradient"].clone()
    optimizer.step()
    moved = expected["optimizer.after"] - expected["optimizer.before"]
    assert moved.abs().max() > 1e-3
    assert (weight - expected["optimizer.after"]).abs().max() <= 2.0**-22  # an ulp of the weight
    assert "8" in run_lorax("inspect", "optimizer", "optimizer-8bit.safetensors")


def test_calculating_with_them(tmp_path):
    total = read_adapter(Path("lora")) + 0.5 * read_adapter(Path("lora"))
    lorax.write_adapter(total, tmp_path / "sum")
    assert read_adapter(tmp_path / "sum").norm() == pytest.approx(
        1.5 * read_adapter(Path("lora")).norm(), rel=1e-6
    )


# Edited --------------------------------------------------------------------------------------


def edited(adapter, tmp_path):
    directory = tmp_path / adapter
    shutil.copytree(adapter, directory)
    return directory


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_edited_alpha_is_refused(adapter, tmp_path):
    directory = edited(adapter, tmp_path)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 5}))
    with pytest.raises(lorax.LoraxError, match="lora_alpha"):
        loaded(adapter, directory)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_edited_tensor_is_refused_by_name(adapter, tmp_path):
    path = edited(adapter, tmp_path) / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(lorax.LoraxError, match="are not those that were saved"):
        loaded(adapter, path.parent)


@pytest.mark.parametrize("adapter", ["lora", "dora", "pissa", "run-qlora/adapter"])
def test_another_base_is_refused(adapter, tmp_path):
    shutil.copytree("llama", tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    model = lorax.load_model(tmp_path / "llama", "float32")
    with pytest.raises(lorax.LoraxError, match="base"):
        lorax.load_adapter(model, adapter)
