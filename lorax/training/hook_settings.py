"""The settings of step hooks in a recipe: what their constructors take beside the model.

    class Norm(lorax.StepHook):                       [train]
        def __init__(self, model, every: int = 1):    hooks = ["norm"]
            ...
                                                      [hooks.norm]
    lorax.register_step_hook("norm", Norm)            every = 10

A parameter's name is the key, its annotation the type, its default the key's own; one without a
default must be given. No torch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model
from pydantic_core import PydanticSerializationError

from lorax.errors import PluginError, RecipeError
from lorax.text import one_line
from lorax.training.hooks import factory_of
from lorax.training.refusals import describe
from lorax.training.sections import Section

_NOT_NAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def checked_settings(given: Mapping[str, Any], hooks: list[str]) -> dict[str, dict[str, Any]]:
    """Each hook's settings with their defaults; hooks that have none are left out.

    given: the recipe's tables, by the hooks' names. hooks: the names in train.hooks.

    Raises:
        RecipeError: a table of a hook that train.hooks does not name, or a key or value that the
            hook does not take. PluginError: a hook whose settings are of no type for a recipe.
    """
    for name in given:
        if name not in hooks:
            near = difflib.get_close_matches(name, hooks, 1)
            hint = f"did you mean hooks.{near[0]}?" if near else "add it to train.hooks"
            raise RecipeError(f"hooks.{name}: train.hooks does not name it; {hint}")
    checked = {name: _checked(name, given.get(name, {})) for name in hooks}
    return {name: values for name, values in checked.items() if values}


def typed_settings(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A hook's settings as its constructor's annotations want them; `values` are checked ones."""
    return dict(_table(name).model_validate(dict(values)))


def _checked(name: str, values: Any) -> dict[str, Any]:
    table = _table(name)
    if values and not table.model_fields:
        raise RecipeError(f"hooks.{name}: this hook takes no settings; leave the table out")
    try:
        return table.model_validate(values).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        raise RecipeError(describe(error, table, ("hooks", name))) from None
    except PydanticSerializationError as error:  # of a default, which nobody has checked
        raise _unreadable(name, error) from error


def _table(name: str) -> type[Section]:
    """The parameters behind the first, which is the model, as a table of a recipe."""
    factory: Any = factory_of(name)
    try:
        parameters = list(inspect.signature(factory).parameters.values())[1:]
        types = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
        fields: dict[str, Any] = {
            each.name: (types.get(each.name, Any), _default(each))
            for each in parameters
            if each.kind not in _NOT_NAMED
        }
        return create_model(name, __base__=Section, **fields)
    except Exception as error:  # annotations are the user's own code
        raise _unreadable(name, error) from error


def _default(parameter: inspect.Parameter) -> Any:
    return ... if parameter.default is parameter.empty else parameter.default


def _unreadable(name: str, error: Exception) -> PluginError:
    return PluginError(
        f"step hook {name!r}: its settings cannot be read ({type(error).__name__}: "
        f"{one_line(error)}); give its constructor's parameters types and defaults that TOML has"
    )
