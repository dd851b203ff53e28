"""Twenty steps of AdamW, lorax against PEFT: the same start, the same batches, float32 on a CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import gpt2, llama, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_pairs import in_peft, plain_name
from smollm2 import with_few_words
from transformers import AutoModelForCausalLM

import lorax
from lorax.optim.lora_plus import lora_plus_groups
from lorax.training.loss import summed_loss

pytestmark = pytest.mark.slow

STEPS = 20


def batches(vocabulary):
    """20 batches of 4 rows; labels masked at random, as prompts and padding are."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for step in range(STEPS):
        ids = tokens(4, 24, vocabulary, seed=100 + step)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.4] = -100
        made.append((ids, labels))
    return made


RATIO = 16  # LoRA+


def optimizer_for(model, plus=False):
    # eps 1e-5: with 1e-8 a gradient of rounding noise is blown up to a full step, and two
    # implementations that differ by one bit part ways.
    if not plus:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, eps=1e-5, weight_decay=0.01)
    if isinstance(model, PeftModel):
        rates = {"lr": 1e-3, "loraplus_lr_ratio": RATIO, "loraplus_weight_decay": 0.01}
        return create_loraplus_optimizer(model, torch.optim.AdamW, **rates, eps=1e-5)
    groups = lora_plus_groups(model, 1e-3, RATIO, weight_decay=0.01)
    return torch.optim.AdamW(groups, eps=1e-5)


def adapter_tensors(model):
    return {plain_name(n): p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


WHOLE, MICRO_BATCHES = (slice(0, 4),), (slice(0, 1), slice(1, 4))


def train_theirs(model, plus, parts=(slice(0, 4),)):
    """PEFT on transformers, the loss as transformers defines it: the mean over trained tokens.

    parts: micro-batches, each weighted by its share of the step's tokens.
    """
    optimizer, losses = optimizer_for(model, plus), []
    model.train()
    for ids, labels in batches(model.config.vocab_size):
        count, total = (labels[:, 1:] != -100).sum(), 0.0
        for part in parts:
            logits = model(ids[part]).logits[:, :-1].flatten(0, 1)
            targets = labels[part, 1:].flatten()
            loss = F.cross_entropy(logits, targets, ignore_index=-100)
            loss = loss * ((targets != -100).sum() / count)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, adapter_tensors(model)


def train_ours(model, plus):
    """lorax: two micro-batches of a step, each weighted by its share of the step's tokens."""
    optimizer, losses = optimizer_for(model, plus), []
    model.train()
    for ids, labels in batches(model.config.vocab_size):
        count = (labels[:, 1:] != -100).sum()
        total = 0.0
        for part in MICRO_BATCHES:
            loss = summed_loss(model, ids[part], labels[part]) / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, adapter_tensors(model)


def largest_relative(one, other):
    return max(((one[n] - other[n]).norm() / other[n].norm()).item() for n in other)


CASES = {
    "llama lora": (llama, {"target_modules": "all-linear", "r": 4}),
    "llama rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "gpt2 lora": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4}),
    "llama dora": (llama, {"target_modules": "all-linear", "use_dora": True, "r": 4}),
    "gpt2 dora": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "llama embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "r": 4}),
    "llama lora+": (llama, {"target_modules": "all-linear", "r": 4}),
    "gpt2 rslora+": (gpt2, {"target_modules": ["c_attn"], "use_rslora": True}),
    "gpt2 dora+": (gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "gpt2 lora_bias": (gpt2, {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(case, tmp_path):
    make, config = CASES[case]
    base = make()
    base.save_pretrained(tmp_path / "base")
    start, plus = in_peft(base, **config), case.endswith("+")
    compare_runs(start, lorax.load_model(tmp_path / "base"), tmp_path, plus)


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_twenty_steps_of_smollm2(use_dora, smollm2_short, tmp_path):
    lorax.save_model(with_few_words(lorax.load_model(smollm2_short)), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    compare_runs(get_peft_model(base, config), lorax.load_model(tmp_path / "base"), tmp_path)


def compare_runs(start, mine, tmp_path, plus=False):
    """Train copies of `start` in PEFT, and the same adapter on `mine` in lorax."""
    start.save_pretrained(tmp_path / "start")

    def theirs(attention, parts=WHOLE):
        copied = copy.deepcopy(start)
        copied.set_attn_implementation(attention)
        return train_theirs(copied, plus, parts)

    expected_losses, expected_weights = theirs("sdpa")
    lorax.load_adapter(mine, tmp_path / "start", trainable=True)
    losses, weights = train_ours(mine, plus)

    before = adapter_tensors(start)
    assert any((weights[n] - before[n]).norm() > 0.03 * before[n].norm() for n in before)
    for ours, expected in zip(losses, expected_losses, strict=True):
        assert abs(ours - expected) <= 1e-5 * abs(expected)
    # PEFT's own spread between ways to compute the same step is the noise of the task: another
    # attention, and the micro-batches that lorax takes.
    assert_within(
        largest_relative(weights, expected_weights),
        lambda: (theirs(*way)[1] for way in (("eager",), ("eager", MICRO_BATCHES))),
        expected_weights,
    )


def assert_within(error, others, expected):
    """The error is at most 1e-5, or four times what the others' weights differ by.

    others: gives them; called only where 1e-5 is not kept.
    """
    if error > 1e-5:
        noise = max(largest_relative(weights, expected) for weights in others())
        print(f"weights differ by {error:.1e}; PEFT's own ways by {noise:.1e}")
        assert error <= 4 * noise
