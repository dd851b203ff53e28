"""8-bit moments on a real model: SmolLM2's training loss stays within 1 % of 32-bit AdamW's."""

import copy
import json

import pytest
import torch

import lorax
from lorax.demo import has_fast_bfloat16, smollm2_path
from lorax.errors import EnvironmentProblem
from lorax.optim import AdamW, AdamW8bit
from lorax.training.loss import summed_loss

STEPS, ROWS, TOKENS = 100, 2, 64


def token_rows(count):
    """Rows of real text: the language reference that comes with Python."""
    from pydoc_data.topics import topics

    tokenizer = lorax.load_tokenizer(smollm2_path())
    ids = []
    for name in sorted(topics):
        ids += tokenizer.encode(topics[name])
        if len(ids) >= count * TOKENS:
            break
    return torch.tensor(ids[: count * TOKENS]).view(count, TOKENS)


def losses(model, kind, rows):
    """The loss of each of 100 steps, in nats a token."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=2e-3)
    history = []
    for batch in rows.split(ROWS):
        loss = summed_loss(model, batch, batch) / (batch.numel() - ROWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return torch.tensor(history), optimizer


@pytest.mark.nightly
def test_100_steps_of_smollm2_against_32bit_adamw():
    try:
        path = smollm2_path()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    dtype = "bfloat16" if has_fast_bfloat16() else "float32"
    model = lorax.load_model(path, dtype=dtype)
    torch.manual_seed(0)
    config = lorax.LoRAConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    lorax.add_adapter(model, config)
    model.train()
    start = copy.deepcopy({n: p for n, p in model.named_parameters() if p.requires_grad})
    rows = token_rows(STEPS * ROWS)
    wide, _ = losses(model, AdamW, rows)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p.copy_(start[name])
    narrow, optimizer = losses(model, lambda ps, lr: AdamW8bit(ps, lr, min_8bit_size=0), rows)
    assert len(wide) == STEPS
    print(f"last 10 steps: {wide[-10:].mean():.4f} in 32 bits, {narrow[-10:].mean():.4f} in 8")
    print(
        f"all steps: {wide.mean():.4f}, {narrow.mean():.4f}; single steps part by at most", end=" "
    )
    print(f"{100 * (narrow / wide - 1).abs().max():.2f} %")
    assert not torch.equal(wide, narrow)  # the 8-bit moments do take part
    assert wide[-10:].mean() < wide[:10].mean() - 0.1  # and the run does learn
    assert (narrow[-10:].mean() / wide[-10:].mean() - 1).abs() < 0.01
    assert (narrow.mean() / wide.mean() - 1).abs() < 0.01
    parameters = sum(p.numel() for p in start.values())
    assert optimizer.state_bytes() / parameters < 2.04


def metrics_of_a_run(model, directory, name, **train):
    data = directory / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{n} + 1 =", "completion": str(n + 1)}) + "\n" for n in range(8)
        )
    )
    recipe = lorax.Recipe.from_dict(
        {
            "model": {"path": model, "dtype": "float32"},
            "adapter": {"r": 4, "target_modules": ["q_proj"]},
            "data": {"path": str(data), "max_length": 64},
            "train": {
                "output_dir": str(directory / name),
                "max_steps": 3,
                "batch_size": 2,
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                **train,
            },
        }
    )
    lines = lorax.train(recipe).metrics
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.slow
def test_runs_by_name_of_the_optimizer(smollm2_short, tmp_path):
    """Paged and LoRA+ with ratio 1 are the same run as adamw; 8 bits and ratio 16 are not."""
    place = (smollm2_short, tmp_path)
    plain = metrics_of_a_run(*place, "adamw")
    paged = metrics_of_a_run(*place, "p", optimizer="paged-adamw", lora_plus_ratio=1.0)
    narrow = metrics_of_a_run(*place, "n", optimizer="paged-adamw-8bit", lora_plus_ratio=16.0)
    assert len(plain) == 3
    assert paged == plain
    assert narrow[0] == plain[0]  # the first line is written before anything has moved
    assert narrow[2]["loss"] != plain[2]["loss"]
    assert narrow[2]["learning_rate"] == plain[2]["learning_rate"]
