"""What a recipe gives a plugin's step hook: [hooks.NAME], as strict as every other table."""

import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import tomli_w
from command_line import complete_lorax, run_lorax
from runs import make_folder, recipe

import lorax
from lorax.errors import PluginError, RecipeError
from lorax.training import hooks

PLUGIN = """
import lorax

class Every(lorax.StepHook):
    def __init__(self, model, n: int, *, word: str = "seen", share: float = 1.0):
        self.n, self.word, self.share, self.steps = n, word, share, 0

    def after_step(self):
        self.steps += 1
        return {self.word: self.share * self.steps} if self.steps % self.n == 0 else {}

lorax.register_step_hook("every-so-often", Every)
"""
SHORT = {"train.max_steps": 4, "train.eval_steps": None, "data.eval_fraction": 0.0}
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("settings"))
    (folder / "mine.py").write_text(PLUGIN)
    lorax.load_plugin(folder / "mine.py")
    return folder


def asked(folder, output, settings=None, **changes):
    """A recipe with that hook."""
    tables = {} if settings is None else {"hooks": {"every-so-often": settings}}
    return recipe(
        folder, output, **SHORT, **{"train.hooks": ["every-so-often"]}, **tables, **changes
    )


def written(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]


def test_they_reach_the_hook_and_stand_in_the_runs_recipe(folder, tmp_path):
    run = lorax.train(asked(folder, tmp_path / "run", {"n": 2, "share": 0.5}))
    assert [line.get("seen") for line in written(run.output_dir)] == [None, 1.0, None, 2.0]
    stated = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stated["hooks"] == {"every-so-often": {"n": 2, "word": "seen", "share": 0.5}}
    again = lorax.Recipe.load(tmp_path / "run" / "config.toml")
    assert again == asked(folder, tmp_path / "run", {"n": 2, "share": 0.5})


def test_the_command_line_gives_them_by_their_paths(folder, tmp_path):
    values = asked(folder, tmp_path / "run", {"n": 3}).model_dump(exclude_none=True)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(values | {"plugins": []}))
    command = ("train", tmp_path / "recipe.toml", "--plugin", folder / "mine.py")
    said = run_lorax(*command, "--dry-run", "--hooks.every-so-often.word", "counted")
    assert '[hooks.every-so-often]\nn = 3\nword = "counted"\nshare = 1.0\n' in said
    wrong = complete_lorax(*command, "--dry-run", "--hooks.every-so-often.wrod", "counted")
    assert wrong.returncode == 2
    assert "wrod is an unknown key; did you mean hooks.every-so-often.word?" in wrong.stderr
    run_lorax(*command, "--hooks.every-so-often.n", "4")
    assert [line["step"] for line in written(tmp_path / "run") if "seen" in line] == [4]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({}, r"hooks\.every-so-often\.n is missing"),
        ({"every-so-often": {"n": 1, "shares": 2}}, r"did you mean hooks\..*\.share\?"),
        ({"every-so-often": {"n": "two"}}, r"hooks\.every-so-often\.n = 'two': input should be a"),
        ({"every-so-often": {"n": 1}, "evry-so-often": {}}, r"you mean hooks\.every-so-often\?"),
        ({"every-so-often": {"n": 1}, "other": {}}, r"hooks\.other: train\.hooks does not name it"),
        ({"every-so-often": 3}, r"hooks\.every-so-often = 3: input should be a valid dict"),
        (3, r"hooks = 3: input should be a valid dict"),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_one_line(folder, tmp_path, tables, words):
    with pytest.raises(RecipeError, match=words) as caught:
        asked(folder, tmp_path / "run", hooks=tables)
    assert "\n" not in str(caught.value)


def test_a_hook_without_settings_takes_no_table(folder, tmp_path):
    hooks.register_step_hook("plain", lambda model: lorax.StepHook())
    changes = {"train.hooks": ["plain"]}
    assert recipe(folder, tmp_path, **changes).hooks is None
    with pytest.raises(RecipeError, match=r"hooks\.plain: this hook takes no settings"):
        recipe(folder, tmp_path, **changes, **{"hooks.plain.n": 1})


def test_a_run_goes_on_with_the_settings_it_began_with(folder, tmp_path):
    lorax.train(asked(folder, tmp_path / "run", {"n": 2}))
    with pytest.raises(RecipeError, match=r"another recipe: hooks\.every-so-often\.n is 3, was 2"):
        lorax.train(asked(folder, tmp_path / "run", {"n": 3}), resume=True)


def test_annotations_decide_what_the_constructor_gets(folder, tmp_path):
    got = []

    class Typed(lorax.StepHook):
        def __init__(
            self, model, where: Path = Path("here"), how: Literal["a", "b"] = "a",
            pair: tuple[int, int] = (1, 2), none: float | None = None,
        ):  # fmt: skip
            got.append((where, how, pair, none))

    hooks.register_step_hook("typed", Typed)
    changes = {"train.hooks": ["typed"], "hooks.typed.pair": [3, 4], "train.max_steps": 1}
    made = recipe(folder, tmp_path / "run", **SHORT | changes)
    assert made.hooks == {"typed": {"where": "here", "how": "a", "pair": [3, 4]}}
    lorax.train(made)
    assert got == [(Path("here"), "a", (3, 4), None)]
    with pytest.raises(RecipeError, match=r"hooks\.typed\.how = 'c': input should be 'a' or 'b'"):
        recipe(folder, tmp_path, **{"train.hooks": ["typed"], "hooks.typed.how": "c"})


def test_settings_of_no_type_for_a_recipe_are_named(folder, tmp_path):
    class Odd(lorax.StepHook):
        def __init__(self, model, stream: "no_such_name" = None):  # noqa: F821
            pass

    class Unsaid(lorax.StepHook):
        def __init__(self, model, default=object()):  # noqa: B008
            pass

    for name, factory in (("odd", Odd), ("unsaid", Unsaid)):
        hooks.register_step_hook(name, factory)
        with pytest.raises(PluginError, match=f"step hook '{name}': its settings cannot be read"):
            recipe(folder, tmp_path, **{"train.hooks": [name]})


def test_a_constructor_that_fails_or_makes_no_hook_is_one_line(folder, tmp_path):
    def fail(model, n: int = 0):
        return 1 // n

    hooks.register_step_hook("fails", fail)
    made = recipe(folder, tmp_path / "one", **SHORT, **{"train.hooks": ["fails"]})
    with pytest.raises(PluginError, match=r"'fails' cannot be made .*ZeroDivisionError") as caught:
        lorax.train(made)
    assert "\n" not in str(caught.value)
    changed = recipe(folder, tmp_path / "two", **SHORT, **{"train.hooks": ["fails"],
                                                            "hooks.fails.n": 1})  # fmt: skip
    with pytest.raises(PluginError, match=r"'fails' is 1; expected a lorax\.StepHook"):
        lorax.train(changed)


def test_a_program_gives_them_itself(folder, tmp_path):
    every = partial(hooks.factory_of("every-so-often"), n=4, word="mine")
    run = lorax.train(recipe(folder, tmp_path / "run", **SHORT), hooks=[every])
    assert [line["step"] for line in written(run.output_dir) if "mine" in line] == [4]
