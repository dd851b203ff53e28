"""Faults that no test noticed once, when they were planted: tests/mutants/ plants them again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import llama, tokens
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from tiny_tokenizer import byte_backend, byte_tokenizer
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lorax
from lorax.adapters.attached import adapter_layers
from lorax.data.batches import epoch_order
from lorax.data.tokenizer import Tokenizer
from lorax.errors import AdapterError, FormatError, NumericalStop
from lorax.formats.directory import written_directory
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.inference.batch import draw
from lorax.inference.generate import stream
from lorax.models.llama import RMSNorm
from lorax.parity.difference import difference
from lorax.parity.report import Check, Report
from lorax.quant.affine import pack_nibbles
from lorax.training import loop, processes
from lorax.training.evaluate import evaluate

TOKENIZER = byte_tokenizer(eos=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 32 positions with a tokenizer, and rows."""
    folder = tmp_path_factory.mktemp("unnoticed")
    torch.manual_seed(0)
    model = llama(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=32)
    model.save_pretrained(folder / "model")
    write_tokenizer(TOKENIZER, folder / "model")
    rows = [{"prompt": "ab"[i % 2] * (i % 5 + 1), "completion": "xyz"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, output, **overrides):
    values = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "adapter": {"r": 4, "target_modules": "all-linear"},
        "data": {"path": str(folder / "rows.jsonl")},
        "train": {"output_dir": str(output), "batch_size": 4, "learning_rate": 1e-2},
    }
    return lorax.Recipe.from_dict(values, overrides)


def adapted(folder, **config):
    model = lorax.load_model(folder / "model")
    lorax.add_adapter(model, lorax.LoRAConfig(r=4, init_lora_weights=False, **config))
    return model


# Training --------------------------------------------------------------------------------------


def test_a_gradient_that_is_nan_stops_although_the_loss_is_finite(folder, tmp_path, monkeypatch):
    real = processes.summed_loss

    def poisoned(model, *batch):
        trained = next(p for p in model.parameters() if p.requires_grad)
        return real(model, *batch) + (0 * trained.sum()).sqrt()  # 0, whose gradient is 0 / 0

    monkeypatch.setattr(processes, "summed_loss", poisoned)
    with pytest.raises(NumericalStop, match=r"step 1.*gradient norm nan"):
        lorax.train(recipe(folder, tmp_path / "run"))


def test_dropout_acts_in_training_and_not_in_evaluation(folder, tmp_path):
    runs = []
    for p in (0.0, 0.8):
        changes = {"adapter.lora_dropout": p, "train.epochs": 2}
        runs.append(lorax.train(recipe(folder, tmp_path / str(p), **changes)))
    losses = [[line["loss"] for line in run.metrics] for run in runs]
    assert losses[0][0] == losses[1][0]  # B is zero in the first step
    assert losses[0][1:] != losses[1][1:]
    model, rows = runs[1].model, loop.prepare(recipe(folder, tmp_path / "none"))[2].train_rows
    expected = evaluate(model.eval(), rows, 4, 0)
    assert evaluate(model.train(), rows, 4, 0) == expected
    assert model.training


def test_each_epoch_has_an_order_of_its_own_and_none_without_shuffling():
    orders = [epoch_order(20, 3, epoch, shuffle=True) for epoch in range(4)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(20, 3, 1, shuffle=False) == list(range(20))


# Generating ------------------------------------------------------------------------------------


def drawn(logits, temperature, top_p, count=400):
    generator = torch.Generator().manual_seed(0)
    return {draw(logits.clone(), temperature, top_p, generator) for _ in range(count)}


@pytest.mark.parametrize("top_p", [0.05, 0.35, 0.45, 0.69, 0.75, 0.95, 1.0])
def test_top_p_draws_from_what_transformers_keeps(top_p):
    """The token with which the sum crosses top_p is the last that is kept."""
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()
    kept = TopPLogitsWarper(top_p)(None, logits[None])[0].isfinite().nonzero().flatten()
    assert drawn(logits, 1.0, top_p) == set(kept.tolist())


def test_temperature_sharpens_below_one_and_flattens_above():
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    for temperature, expected in ((0.1, {3}), (50.0, {0, 1, 2, 3})):
        warped = TemperatureLogitsWarper(temperature)(None, logits[None])[0].softmax(0)
        assert {i for i in range(4) if warped[i] > 0.05} == expected
        assert drawn(logits, temperature, 1.0) == expected


def test_generation_ends_where_the_models_room_ends(folder):
    model = lorax.load_model(folder / "model")
    found = list(stream(model, TOKENIZER, list(range(10, 30)), max_new_tokens=100))
    assert len(found) == 32 - 20
    assert len(list(stream(model, TOKENIZER, list(range(10, 30)), max_new_tokens=5))) == 5


def test_any_end_token_ends_and_the_mode_is_as_before(folder):
    model = lorax.load_model(folder / "model").train()
    first = next(stream(model, TOKENIZER, [20, 21, 22], 3))
    ending = Tokenizer(byte_backend(), eos_token="</s>", end_token_ids=[first])
    assert first != ending.eos_token_id
    assert list(stream(model, ending, [20, 21, 22], 3)) == []
    assert model.training


# Models and adapters ---------------------------------------------------------------------------


def test_the_norm_rounds_where_transformers_does():
    mine, theirs = RMSNorm(64, 1e-5).bfloat16(), LlamaRMSNorm(64, 1e-5).bfloat16()
    weight, x = torch.randn(64).bfloat16(), torch.randn(50, 64).bfloat16()
    for norm in (mine, theirs):
        norm.weight.data.copy_(weight)
    assert torch.equal(mine(x), theirs(x))


def test_merged_weights_count_in_train_mode_too(folder):
    """As in PEFT: what is merged has no dropout."""
    model = adapted(folder, target_modules="all-linear", lora_dropout=0.5)
    lorax.merge_adapter(model)
    with torch.no_grad():
        expected = model(tokens(2, 9))
        assert torch.equal(model.train()(tokens(2, 9)), expected)


def test_a_rounding_to_float32_costs_something(folder):
    report = lorax.merge_adapter(adapted(folder, target_modules="all-linear"))
    assert all(0 < error < 1e-6 for error in report.errors.values())


@pytest.mark.parametrize("name", ["proj", "_proj", "attn.q_proj"])
def test_a_target_matches_whole_words(name, folder):
    model = lorax.load_model(folder / "model")
    with pytest.raises(AdapterError):
        lorax.add_adapter(model, lorax.LoRAConfig(target_modules=[name]))
    assert adapter_layers(model) == {}


@pytest.mark.parametrize("key", ["proj", "q_proj", "self_attn.q_proj", r"layers\.1\..*q_proj"])
def test_a_pattern_matches_as_in_peft(key):
    config = lorax.LoRAConfig(r=4, rank_pattern={key: 2}, target_modules=["q_proj"])
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        assert config.rank(path) == config.rank_pattern.get(get_pattern_key([key], path), 4)


def test_a_failed_load_leaves_each_requires_grad(folder, tmp_path):
    lorax.save_adapter(adapted(folder, target_modules=["q_proj"]), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    model = lorax.load_model(folder / "model")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match="missing"):
        lorax.load_adapter(model, tmp_path / "adapter")
    assert [p.requires_grad for p in model.parameters()] == before


def test_an_affine_block_uses_its_lowest_code():
    q = lorax.quantize(torch.linspace(-1, 1, 64)[None], "int8-affine")
    assert (q.packed.min(), q.packed.max()) == (-128, 127)


def test_packed_nibbles_have_the_first_value_in_the_upper_half():
    """As in bitsandbytes' 4-bit formats."""
    codes = torch.tensor([1, 2, -3, 4, -8], dtype=torch.int8)
    assert pack_nibbles(codes).tolist() == [0x12, 0xD4, 0x80]


def test_a_text_that_begins_with_bos_gets_no_second_bos():
    tokenizer = byte_tokenizer(bos=True)
    assert tokenizer.encode("<s>ab") == tokenizer.encode("ab")
    assert tokenizer.encode("ab")[0] == tokenizer.bos_token_id


# Files -----------------------------------------------------------------------------------------


def test_one_tensor_in_two_shards_is_refused(folder, tmp_path):
    lorax.save_model(lorax.load_model(folder / "model"), tmp_path / "m", max_shard_bytes=50_000)
    first, second, *_ = sorted((tmp_path / "m").glob("*.safetensors"))
    twice = load_file(second) | dict([next(iter(load_file(first).items()))])
    save_file(twice, second, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="stands in"):
        lorax.load_model(tmp_path / "m")


def test_a_directory_and_a_file_come_by_rename(tmp_path):
    """Not by copying, which a crash leaves half done: the inodes are those that were written."""
    with written_directory(tmp_path / "new") as made:
        (made / "file").write_text("one")
        directory, file = made.stat().st_ino, (made / "file").stat().st_ino
    assert (tmp_path / "new").stat().st_ino == directory
    assert (tmp_path / "new" / "file").stat().st_ino == file
    with written_directory(tmp_path / "new", replace=True) as made:
        (made / "file").write_text("two")
        file = (made / "file").stat().st_ino
    assert (tmp_path / "new" / "file").stat().st_ino == file


def test_the_revision_reaches_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, **options):
        asked.append((name, revision))
        return str(folder / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    lorax.load_model("someone/model", revision="v2")
    lorax.load_tokenizer("someone/model", revision="v3")
    assert asked == [("someone/model", "v2"), ("someone/model", "v3")]
    hub = {"model.path": "someone/model", "model.revision": "v4", "train.max_steps": 1}
    for resume in (False, True):  # a run, and the finished run again
        asked.clear()
        lorax.train(recipe(folder, tmp_path / "run", **hub), resume=resume)
        assert len(asked) >= 2
        assert set(asked) == {("someone/model", "v4")}


def test_the_eos_token_id_of_config_json_is_read(tmp_path):
    write_tokenizer(byte_tokenizer(), tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [4, 9]}))
    assert {4, 9} <= set(lorax.load_tokenizer(tmp_path).end_token_ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert 9 not in lorax.load_tokenizer(tmp_path).end_token_ids


# Reports ---------------------------------------------------------------------------------------


def check_of(mine, theirs, bound):
    return Check("q_proj", "output", "", difference(mine, theirs), bound, "")


def test_a_report_holds_only_if_something_was_compared_and_all_of_it_holds():
    x = torch.ones(3)
    for checks, holds in (
        ([], False),
        ([check_of(x, x, 0.0)], True),
        ([check_of(x, x + 1e-6, 1e-5)], True),
        ([check_of(x, x, 0.0), check_of(x, x + 1e-3, 1e-5)], False),
        ([check_of(x, x + 1e-6, 0.0)], False),
    ):
        report = Report("adapter", "base", "peft", None, 9, checks=checks)
        assert report.holds is holds
    assert not Report("a", "b", "peft", None, 9, checks=checks[:1], refusals={"peft": "no"}).holds


def test_a_difference_sees_nan_and_another_dtype():
    x = torch.tensor([1.0, torch.nan])
    assert difference(x, torch.ones(2)).relative == float("inf")
    assert not difference(torch.zeros(4), torch.zeros(4, dtype=torch.int32)).equal
    assert difference(x, x.clone()).equal


# The list itself -------------------------------------------------------------------------------


def test_each_fault_can_still_be_planted():
    script = Path(__file__).parents[1] / "mutants" / "run.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
