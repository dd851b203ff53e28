"""`lorax.train` against transformers' Trainer over PEFT, step by step, in float32 on a CPU.

Both get the same model, the same adapter to start from, and the same encoded rows in the same order
(of each epoch); all else is each program's own: batches, accumulation, the loss's mean over the
tokens of an accumulated batch, clipping, the schedule, AdamW.
"""

import json
from dataclasses import dataclass, field

import pytest
import torch
from oracles import gpt2, llama
from peft import PeftModel
from test_training_against_peft import adapter_tensors, assert_within, largest_relative
from tiny_tokenizer import byte_tokenizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import get_scheduler

import lorax
from lorax.data.batches import epoch_order
from lorax.formats.tokenizer_files import write_tokenizer
from lorax.training.loop import prepare

MODELS = {"llama": llama, "gpt2": gpt2}
TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"]}


@dataclass(frozen=True)
class Case:
    """One run. Of 19 or 21 rows, 3 or 5 are left to an epoch's last step of up to 8."""

    model: str = "llama"
    rows: int = 19
    epochs: float = 3
    scheduler: str = "cosine"
    warmup: float = 0.0
    train: dict = field(default_factory=dict)
    micro: int = 4


CASES = {
    "cosine": Case(),
    "linear": Case(scheduler="linear", rows=21),
    "constant": Case(scheduler="constant", rows=16, epochs=2),
    "a part of an epoch": Case(scheduler="linear", rows=24, epochs=1.4),
    "rows one by one": Case(micro=1, rows=13, epochs=2),
    "clipping": Case(train={"max_grad_norm": 0.05}),
    "no clipping": Case(train={"max_grad_norm": 0.0}, epochs=2),
    "decay": Case(train={"weight_decay": 0.3}, scheduler="linear"),
    "betas": Case(train={"adam_beta1": 0.7, "adam_beta2": 0.95}, epochs=2),
    "warm-up": Case(warmup=0.3),
    "warm-up, linear": Case(warmup=0.5, scheduler="linear", rows=21),
    "warm-up, constant": Case(warmup=0.25, scheduler="constant"),
    "all": Case(warmup=0.2, rows=21, train={"max_grad_norm": 0.1, "weight_decay": 0.1}),
    "gpt2": Case("gpt2", rows=21),
    "gpt2, all": Case("gpt2", warmup=0.2, scheduler="linear",
                      train={"max_grad_norm": 0.1, "weight_decay": 0.1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory for each model, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    for name, make in MODELS.items():
        make(vocab_size=tokenizer.vocab_size).save_pretrained(root / name)
        write_tokenizer(tokenizer, root / name)
    return root


def recipe_of(case, models, folder):
    """Rows of unlike lengths, so that a mean of means would be another number."""
    rows = [
        {"prompt": f"say {'a' * (i % 7 + 1)} ", "completion": "bcdefg"[i % 6] * (i * i % 11 + 1)}
        for i in range(case.rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # eps 1e-5: with 1e-8 a gradient of rounding noise is blown up to a full step.
    train = {
        "output_dir": str(folder / "run"),
        "batch_size": 8,
        "micro_batch_size": case.micro,
        "learning_rate": 3e-3,
        "epochs": case.epochs,
        "lr_scheduler": case.scheduler,
        "warmup_ratio": case.warmup,
        "adam_epsilon": 1e-5,
        "seed": 7,
        **case.train,
    }
    return lorax.Recipe.from_dict(
        {
            "model": {"path": str(models / case.model), "dtype": "float32"},
            "adapter": {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[case.model]},
            "data": {"path": str(folder / "rows.jsonl")},
            "train": train,
        }
    )


class Rows(torch.utils.data.Sampler):
    """Another order for each epoch, as lorax's seed gives it."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.epoch = rows, seed, 0

    def __len__(self):
        return self.rows

    def __iter__(self):
        order = epoch_order(self.rows, self.seed, self.epoch, shuffle=True)
        self.epoch += 1
        return iter(order)


def collate(rows):
    """Padded on the right: 0 for ids and mask, -100 for labels."""
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in padding.items()
    }


def encoded(row):
    labels = [i if t else -100 for i, t in zip(row.ids, row.trained, strict=True)]
    return {"input_ids": list(row.ids), "attention_mask": [1] * len(row.ids), "labels": labels}


def transformers_rates(kind, warmup, total):
    """The factor of each step, from transformers' scheduler of this name."""
    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def expected_rates(case, total):
    """transformers' own; but its warm-up begins at a rate of zero, which lorax leaves out.

    So lorax climbs as transformers does with one step of warm-up more, from its second step on.
    """
    warmup = -(-total * case.warmup // 1)
    rates = transformers_rates(case.scheduler, int(warmup), total)
    climbing = transformers_rates("constant", int(warmup) + 1, total + 1)[1:]
    return [climbing[i] if i < warmup else rates[i] for i in range(total)]


class Recorder(TrainerCallback):
    """Each step's rate, and the gradients' norm before clipping."""

    def __init__(self):
        self.rates, self.norms = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


class InOrder(Trainer):
    """Trainer with lorax's order of rows; keeps each micro-batch's share of its step's loss."""

    def __init__(self, *args, seed, factors, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows_seed, self.factors, self.losses = seed, factors, []

    def _get_train_sampler(self, *args):
        return Rows(len(self.train_dataset), self.rows_seed)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.factors is None:
            return super().create_scheduler(num_training_steps, optimizer)
        assert num_training_steps == len(self.factors)
        factors = [*self.factors, 0.0]  # it is asked once more behind the last step
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: factors[step])
        return self.lr_scheduler

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append((self.state.global_step, loss.item()))
        return loss


def train_theirs(case, recipe, rows, start, folder, attention):
    """(losses, rates, norms, adapter's tensors) of a Trainer over PEFT."""
    base = AutoModelForCausalLM.from_pretrained(
        recipe.model.path, dtype=torch.float32, attn_implementation=attention
    )
    model = PeftModel.from_pretrained(base, start, is_trainable=True)
    t = recipe.train
    arguments = TrainingArguments(
        output_dir=folder / attention,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=t.batch_size // case.micro,
        num_train_epochs=case.epochs,
        learning_rate=t.learning_rate,
        lr_scheduler_type=case.scheduler,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        adam_epsilon=t.adam_epsilon,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    recorder = Recorder()
    total = lorax_steps(case)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=[encoded(row) for row in rows],
        data_collator=collate,
        callbacks=[recorder],
        seed=t.seed,
        factors=expected_rates(case, total) if case.warmup else None,
    )
    trainer.train()
    losses = [0.0] * trainer.state.global_step
    for step, loss in trainer.losses:
        losses[step] += loss
    return losses, recorder.rates, recorder.norms, adapter_tensors(model)


def lorax_steps(case):
    """An epoch's last step may be a smaller one; a part of an epoch is rounded up to a step."""
    return int(-(-case.epochs * -(-case.rows // 8) // 1))


@pytest.mark.parametrize("name", CASES)
def test_a_run_against_transformers_trainer(name, models, tmp_path):
    case = CASES[name]
    recipe = recipe_of(case, models, tmp_path)
    torch.manual_seed(recipe.train.seed)
    model, _, plan = prepare(recipe)
    lorax.save_adapter(model, tmp_path / "start")
    run = lorax.train(recipe)

    def theirs(attention):
        return train_theirs(case, recipe, plan.train_rows, tmp_path / "start", tmp_path, attention)

    losses, rates, norms, weights = theirs("sdpa")

    assert len(run.metrics) == len(losses) == lorax_steps(case)
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx(rates, rel=1e-9)
    assert [line["loss"] for line in run.metrics] == pytest.approx(losses, rel=1e-5)
    assert [line["grad_norm"] for line in run.metrics] == pytest.approx(norms, rel=1e-4)
    if 0 < recipe.train.max_grad_norm < 1:
        assert min(norms) > recipe.train.max_grad_norm  # it acts in each step
    # PEFT's own spread between two ways to compute the same attention is the noise of the task.
    error = largest_relative(adapter_tensors(run.model), weights)
    assert_within(error, lambda: [theirs("eager")[3]], weights)
