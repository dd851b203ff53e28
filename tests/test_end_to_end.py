"""The whole way on a tiny Llama in one go: what `make quick` begins with."""

import pytest
import torch
from runs import KillAt, Killed, make_folder, recipe, same
from transformers import AutoModelForCausalLM

import lorax
from lorax.inference.generate import stream


def test_train_resume_generate_merge_and_verify(tmp_path, no_picture):
    folder = make_folder(tmp_path)
    two = {"train.max_steps": 2, "train.save_steps": 1, "train.eval_steps": None}
    whole = lorax.train(recipe(folder, tmp_path / "whole", **two))
    cut = recipe(folder, tmp_path / "cut", **two)
    with pytest.raises(Killed):
        lorax.train(cut, KillAt(2))
    run = lorax.train(cut, resume=True)
    same(whole.output_dir, run.output_dir)

    model = lorax.load_model(folder / "model", "float32")
    ids = run.tokenizer.encode("say aaa ")
    plain = model(torch.tensor([ids]))
    lorax.load_adapter(model, run.result)
    adapted = model(torch.tensor([ids]))
    assert not torch.equal(adapted, plain)
    said = [list(stream(m, run.tokenizer, ids, 5)) for m in (model, run.model)]
    assert said[0] == said[1]
    assert said[0]

    lorax.unload_adapter(model, merge=True)
    lorax.save_model(model, tmp_path / "merged", tokenizer=run.tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits = theirs(torch.tensor([ids])).logits
    assert (logits - adapted).norm() <= 1e-5 * adapted.norm()

    report = lorax.verify(run.result, folder / "model", tokens=32)
    assert report.holds, report
