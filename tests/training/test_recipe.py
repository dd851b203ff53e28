"""The recipe and the schedule: every key is checked, every mistake is named."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorax.adapters.config import LoRAConfig
from lorax.errors import LoraxError, RecipeError
from lorax.training.plan import describe
from lorax.training.recipe import Recipe
from lorax.training.schedule import rate_factor, warmup_steps

PLAIN = {
    "model": {"path": "somewhere"},
    "data": {"path": "rows.jsonl"},
    "train": {"output_dir": "runs/first"},
}
DESIGN = """
[model]
path = "HuggingFaceTB/SmolLM2-135M-Instruct"
quantization = "nf4-dq"
dtype = "bfloat16"
[adapter]
r = 16
lora_alpha = 32
target_modules = "all-linear"
[data]
path = "data.jsonl"
eval_fraction = 0.1
max_length = 512
packing = false
shuffle = true
[train]
output_dir = "runs/first"
epochs = 1
batch_size = 16
micro_batch_size = 4
learning_rate = 2e-4
lr_scheduler = "cosine"
warmup_ratio = 0.05
weight_decay = 0.0
max_grad_norm = 1.0
optimizer = "adamw"
eval_steps = 100
early_stopping_patience = 0
seed = 0
"""


def build(**overrides) -> Recipe:
    """The plain recipe with overrides, `__` for the dot."""
    return Recipe.from_dict(PLAIN, {k.replace("__", "."): v for k, v in overrides.items()})


def refused(**overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        build(**overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_needs_three_keys_only():
    recipe = build()
    assert recipe.train.batch_size == 16
    assert recipe.adapter_config(total_steps=5) == LoRAConfig()


@pytest.mark.parametrize("key", ["model.path", "data.path", "train.output_dir"])
def test_a_missing_key_is_named(key):
    values = copy.deepcopy(PLAIN)
    section, name = key.split(".")
    del values[section][name]
    with pytest.raises(RecipeError, match=f"{key} is missing"):
        Recipe.from_dict(values)


def test_a_missing_section_is_named():
    with pytest.raises(RecipeError, match="train is missing"):
        Recipe.from_dict({"model": {"path": "a"}, "data": {"path": "b"}})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.learning_rat", "train.learning_rate"),
        ("train.lr_schedular", "train.lr_scheduler"),
        ("train.micro_batchsize", "train.micro_batch_size"),
        ("adapter.lora_alhpa", "adapter.lora_alpha"),
        ("adapter.target_module", "adapter.target_modules"),
        ("model.quantisation", "model.quantization"),
        ("data.maxlength", "data.max_length"),
        ("trian.epochs", "train"),
        ("adapters.r", "adapter"),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong, right):
    message = refused(**{wrong: 1})
    assert "unknown key" in message
    assert f"did you mean {right}?" in message


def test_an_unknown_key_without_a_neighbour_names_all():
    message = refused(model__zzz=1)
    assert "unknown key" in message
    assert "quantization" in message


def test_overrides_win_by_path_and_leave_the_given_values_alone(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(DESIGN)
    overrides = {"train.learning_rate": 1e-4, "adapter.rank_pattern.q_proj": 4, "data.path": "x"}
    recipe = Recipe.load(file, overrides)
    assert recipe.train.learning_rate == 1e-4
    assert recipe.data.path == "x"
    assert recipe.adapter.rank_pattern == {"q_proj": 4}
    assert recipe.model.quantization == "nf4-dq"
    given_values = copy.deepcopy(PLAIN) | {"adapter": {"rank_pattern": {"v_proj": 2}}}
    before = copy.deepcopy(given_values)
    changed = Recipe.from_dict(given_values, {"adapter.rank_pattern.q_proj": 4})
    assert changed.adapter.rank_pattern == {"v_proj": 2, "q_proj": 4}
    assert given_values == before


def test_an_override_below_a_value_is_refused():
    assert "path is no table" in refused(model__path__x=1)


def test_the_recipe_of_the_design_is_accepted(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(DESIGN)
    config = Recipe.load(file).adapter_config(total_steps=5)
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, "all-linear")


@pytest.mark.parametrize("key", ["modules_to_save", "loftq_config"])
def test_a_lora_option_that_is_left_out_is_refused_by_name(key):
    assert key in refused(**{f"adapter.{key}": True})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter.init_lora_weights", "corda"),
        ("adapter.init_lora_weights", "eva"),
        ("adapter.bias", "some"),
        ("adapter.r", 0),
        ("adapter.lora_dropout", 1.0),
        ("adapter.rank_pattern", {"q_proj": -1}),
        ("adapter.lora_alpha", math.nan),
        ("model.dtype", "float16"),
        ("model.quantization", "int3"),
        ("data.eval_fraction", 1.0),
        ("data.eval_fraction", math.nan),
        ("data.max_length", 1),
        ("train.epochs", 0),
        ("train.epochs", math.inf),
        ("train.learning_rate", math.inf),
        ("train.learning_rate", -1e-4),
        ("train.learning_rate", math.nan),
        ("train.learning_rate", "fast"),
        ("train.lr_scheduler", "polynomial"),
        ("train.weight_decay", math.inf),
        ("train.adam_beta2", 1.0),
        ("train.seed", -1),
        ("train.seed", 10**30),
        ("train.batch_size", 2.5),
        ("train.max_steps", 0),
    ],
)
def test_an_impossible_value_is_named(key, value):
    assert key.partition(".")[2] in refused(**{key: value})


def test_a_broken_expression_is_named():
    assert "'(q_proj' is no regular expression" in refused(adapter__target_modules="(q_proj")


def test_settings_that_contradict_each_other_are_refused():
    assert "micro_batch_size 8 is larger" in refused(train__batch_size=4, train__micro_batch_size=8)
    assert "give 4 or less, or leave it out" in refused(
        train__batch_size=4, train__micro_batch_size=8
    )
    assert "not both" in refused(data__eval_path="x", data__eval_fraction=0.1)


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_micro_batches_follow_the_batch_where_the_recipe_does_not_say(rows, expected):
    recipe = build(train__batch_size=rows)
    assert recipe.train.micro_batch_size == expected
    assert f"micro_batch_size = {expected}\n" in describe(recipe)


def test_a_message_is_short_whatever_the_value():
    assert len(refused(train__lr_scheduler="x" * 100_000)) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"[model",
        b"a = 1\na = 2",
        b"\xff\xfe",
        b"a = " + b"[" * 10_000,
        b"a = " + b"9" * 10_000,
        b"[train]\nseed = 2020-01-01",
        b"model = 3",
        b"a.b.c = {",
        b"",
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, content):
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.toml"):
        Recipe.load(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(LoraxError, match="No such file"):
        Recipe.load(tmp_path / "none.toml")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"path": TEXT},
            optional={
                "quantization": st.sampled_from(["nf4", "nf4-dq"]),
                "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
                "gradient_checkpointing": st.booleans(),
                "revision": TEXT,
            },
        ),
        "adapter": st.fixed_dictionaries(
            {},
            optional={
                "r": st.integers(1, 256),
                "lora_alpha": st.floats(0.1, 1e3),
                "target_modules": st.just("all-linear") | st.lists(TEXT, max_size=3),
                "rank_pattern": st.dictionaries(
                    st.from_regex(r"[a-z_.]{1,9}", fullmatch=True), st.integers(1, 9), max_size=2
                ),
                "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
                "layers_to_transform": st.integers(0, 3),
                "use_rslora": st.booleans(),
            },
        ).filter(
            lambda a: not isinstance(a.get("target_modules"), str) or "layers_to_transform" not in a
        ),
        "data": st.fixed_dictionaries(
            {"path": TEXT}, optional={"eval_fraction": st.floats(0, 0.9), "shuffle": st.booleans()}
        ),
        "train": st.fixed_dictionaries(
            {"output_dir": TEXT},
            optional={
                "learning_rate": st.floats(1e-12, 1e3),
                "epochs": st.floats(1e-3, 100),
                "max_steps": st.integers(1, 10**9),
                "seed": st.integers(0, 2**32 - 1),
            },
        ),
    }
)


@given(RECIPES)
def test_to_toml_round_trip(values):
    import tomllib

    recipe = Recipe.from_dict(values)
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_the_plan_says_what_it_would_do(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    plan = describe(build(data__path=str(rows), train__batch_size=10, train__micro_batch_size=4))
    assert "2 rows, kind: text" in plan
    assert "10 rows in 3 micro-batches of at most 4" in plan
    assert 'output_dir = "runs/first"' in plan
    assert "1 optimizer steps" in plan
    assert "is not here: rows" in describe(build(data__path=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_against_transformers(kind):
    import transformers

    named = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    for total in (1, 2, 3, 7, 20, 100, 333):
        for warmup in sorted({0, 1, 2, total // 3, total - 1, total}):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            steps = {} if kind == "constant" else {"num_training_steps": total}
            theirs = named(optimizer, num_warmup_steps=warmup, **steps)
            for step in range(total):
                if step < warmup:  # theirs begins at zero: a step that changes nothing
                    assert 0 < rate_factor(kind, step, total, warmup) < 1
                    assert rate_factor(kind, step, total, warmup) > theirs.get_last_lr()[0]
                    optimizer.step()
                    theirs.step()
                    continue
                assert rate_factor(kind, step, total, warmup) == theirs.get_last_lr()[0], (
                    total,
                    warmup,
                    step,
                )
                optimizer.step()
                theirs.step()


@given(st.sampled_from(["cosine", "linear", "constant"]), st.integers(1, 5000), st.data())
def test_the_rate_stays_between_zero_and_its_peak(kind, total, data):
    warmup = data.draw(st.integers(0, total))
    step = data.draw(st.integers(0, total - 1))
    assert 0.0 <= rate_factor(kind, step, total, warmup) <= 1.0


@given(st.integers(1, 10**6), st.floats(0, 0.999))
def test_warmup_steps_as_transformers_counts_them(total, ratio):
    assert warmup_steps(total, ratio) == math.ceil(total * ratio) <= total
