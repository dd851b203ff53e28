"""data.packing and data.group_by_length: the padded steps, cut and resumed, by any method."""

import json
from collections import Counter
from itertools import islice

import pytest
from command_line import run_lorax
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import tokens
from runs import KillAt, Killed, make_folder, recipe, same

import lorax
from lorax.data.batches import fill, grouped, micro_batches, step_batches
from lorax.data.examples import Example
from lorax.errors import RecipeError
from lorax.inspect.data import inspect_data
from lorax.inspect.loss import inspect_loss
from lorax.training.loop import Listener
from lorax.training.packing import packing_of
from lorax.training.plan import describe

PACKED = {"data.packing": True, "data.max_length": 40}
GROUPED = {"data.group_by_length": True}
SHORT = {"train.max_steps": 4, "train.save_steps": 0, "train.eval_steps": 2}
LORA = {"r": 4, "target_modules": "all-linear"}
METHODS = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
    "prompt-tuning": {"method": "prompt-tuning", "num_virtual_tokens": 3},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("packing"))


def numbers(run, *names):
    return [line[name] for line in run.metrics for name in names if name in line]


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_run_is_the_padded_one_whatever_the_accumulation(folder, tmp_path, method):
    """Losses, norms and evaluations of every step; they move apart by rounding alone."""
    cuts = {"padded": {}, "packed": PACKED}
    if method == "lora":
        cuts["rows"] = {"train.micro_batch_size": 1}
        cuts["packed in small"] = {**PACKED, "train.micro_batch_size": 1}
    found = {}
    for name, change in cuts.items():
        values = recipe(folder, tmp_path / name, METHODS[method], **SHORT, **change)
        run = lorax.train(values)
        found[name] = numbers(run, "loss", "eval_loss", "grad_norm", "tokens")
    for name in cuts:
        assert found[name] == pytest.approx(found["padded"], rel=2e-5), name
        assert found[name][:4] == pytest.approx(found["padded"][:4], rel=1e-6), name


@pytest.mark.parametrize(
    ("change", "step"), [(PACKED, 5), (GROUPED, 5), ({**PACKED, "model.quantization": "nf4-dq"}, 3)]
)
def test_resumed_in_the_middle_of_an_epoch_bit_for_bit(folder, tmp_path, change, step):
    """Dropout is on."""
    lorax.train(recipe(folder, tmp_path / "whole", **change))
    cut = recipe(folder, tmp_path / "cut", **change)
    with pytest.raises(Killed):
        lorax.train(cut, KillAt(step))
    lorax.train(cut, resume=True)
    same(tmp_path / "whole", tmp_path / "cut")


# --- how rows are filled in and grouped -----------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def rows_of(lengths):
    return [Example([index] * length, [True] * length) for index, length in enumerate(lengths)]


@given(lengths=LENGTHS, room=st.integers(40, 120))
@settings(deadline=None)
def test_every_row_is_in_one_pack_and_no_pack_overflows(lengths, room):
    packs = fill(rows_of(lengths), room)
    assert Counter(row.ids[0] for pack in packs for row in pack) == Counter(range(len(lengths)))
    sums = sorted(sum(len(row.ids) for row in pack) for pack in packs)
    assert sums[-1] <= room
    if len(sums) > 1:  # no two would have gone into one
        assert sums[0] + sums[1] > room
    batches = micro_batches(rows_of(lengths), 1, 0, room)
    assert sum(batch.input_ids.numel() for batch in batches) == sum(lengths)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), seed=st.integers(0, 5))
@settings(deadline=None)
def test_a_grouped_epoch_has_each_row_once_by_seed_and_epoch(lengths, batch_size, seed):
    rows, steps = rows_of(lengths), -(-len(lengths) // batch_size)
    found = [
        [[row.ids[0] for row in batch] for _, batch in islice(it, 2 * steps)]
        for it in (step_batches(rows, batch_size, seed, True, True) for _ in range(2))
    ]
    assert found[0] == found[1]
    for epoch in (found[0][:steps], found[0][steps:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(len(lengths)))
        assert all(len(batch) == batch_size for batch in epoch[:-1])
        if len(lengths) >= batch_size and len(epoch[0]) == batch_size:
            full = [i for batch in epoch if len(batch) == batch_size for i in batch]
            assert max(lengths[i] for i in epoch[0]) == max(lengths[i] for i in full)


def test_a_grouped_step_pads_less_and_epochs_differ():
    lengths = [1 + (i * 37) % 100 for i in range(200)]
    orders = [grouped(range(200), lengths, 10, 0, epoch) for epoch in range(2)]
    assert orders[0] != orders[1]

    def spread(order):
        steps = [[lengths[i] for i in order[s : s + 10]] for s in range(0, 200, 10)]
        return sum(max(step) - min(step) for step in steps)

    assert spread(orders[0]) < spread(list(range(200))) / 5


# --- what is said, and what is refused ------------------------------------------------------------


def test_the_dry_run_and_the_plan_count_the_same(folder, tmp_path):
    class Hears(Listener):
        def planned(self, plan):
            self.plan = plan

    values = recipe(folder, tmp_path / "run", **PACKED)
    text = describe(values)
    hears = Hears()
    lorax.train(values, hears)
    counted = packing_of(values, hears.plan.train_rows)
    assert f"# packing: {counted}\n" in text
    assert "packed forward passes of at most 120 tokens" in text
    assert counted.tokens == sum(len(row.ids) for row in hears.plan.train_rows)
    assert counted.passes < counted.padded_passes == 7  # 8, 8 and 3 rows, three in each
    assert 0 < counted.saved < 1
    assert "# packing:" not in describe(recipe(folder, tmp_path / "plain"))


def test_the_command_says_it(folder, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe(folder, tmp_path / "run", **PACKED).to_toml())
    assert "rows each); an epoch is" in run_lorax("train", path)
    found = json.loads(run_lorax("inspect", "data", path, "--json"))
    assert found["packed"]["room"] == 120


@pytest.mark.parametrize("other", [{"data.packing": True}, {"data.shuffle": False}])
def test_grouping_is_refused_where_it_can_help_nothing(folder, tmp_path, other):
    with pytest.raises(RecipeError, match=r"data\.group_by_length .* give one of them"):
        recipe(folder, tmp_path / "run", **GROUPED, **other)


def test_a_family_that_sees_across_is_refused_before_anything_is_written(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("lorax.training.plan.packs_documents", lambda model: False)
    with pytest.raises(RecipeError, match=r"data\.packing: llama's attention does not keep"):
        lorax.train(recipe(folder, tmp_path / "run", **PACKED))
    assert not (tmp_path / "run").exists()


def test_the_loss_does_not_depend_on_packing(folder, tmp_path):
    found = inspect_loss(recipe(folder, tmp_path / "run", **PACKED))
    assert found.holds
    packed = [way for way in found.ways if way.name.startswith("packed")]
    assert len(packed) == 3
    assert max(max(way.loss_gap, way.gradient_gap) for way in packed) <= 1e-6


def test_a_leak_at_the_seams_is_found(folder, tmp_path, monkeypatch):
    """Documents that are attended to as one sequence: `inspect loss` says so."""
    from lorax.models.attention import Context
    from lorax.models.packed import Documents

    monkeypatch.setattr(Documents, "append", Context.append)
    monkeypatch.setattr(Documents, "attend", Context.attend)
    found = inspect_loss(recipe(folder, tmp_path / "run", **PACKED))
    assert not found.holds
    assert all(way.gradient_gap < 1e-6 for way in found.ways if "packed" not in way.name)


def test_the_doctor_shows_the_seams_of_the_first_pass(folder, tmp_path):
    values = recipe(folder, tmp_path / "run", **PACKED)
    found = inspect_data(values, show=2)
    packed = found.packed
    assert sum(packed.tokens) <= packed.room == 120
    assert len(packed.rows) == len(set(packed.rows)) == len(packed.tokens) > 2
    assert [found.lengths[number - 1] for number in packed.rows] == packed.tokens
    assert [len(row) for row in packed.shown] == packed.tokens[:2]
    path = tmp_path / "recipe.toml"
    path.write_text(values.to_toml())
    page = tmp_path / "page.html"
    text = run_lorax("inspect", "data", path, "--show", 2, "--html", page)
    seam = f"row {packed.rows[1]}: {packed.tokens[1]} tokens, positions from 0"
    assert f"━━━ {seam} ━━━" in text
    assert f'<div class="seam">{seam}</div>' in page.read_text()
    assert inspect_data(recipe(folder, tmp_path / "run")).packed is None


def test_evaluation_is_the_same_packed(folder, tmp_path):
    from lorax.training.evaluate import evaluate

    model = lorax.load_model(folder / "model")
    rows = [Example(row, [True] * len(row)) for row in tokens(rows=5, length=12).tolist()]
    padded, packed = (evaluate(model, rows, 2, 0, room) for room in (None, 30))
    assert packed == pytest.approx(padded, rel=1e-6)
