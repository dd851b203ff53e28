"""What lies in a directory where something else was expected, and what to do about it."""

from pathlib import Path


def instead_of_model(directory: Path) -> str:
    """The end of a message about a directory that holds no model."""
    if (directory / "adapter_config.json").is_file():
        return "an adapter lies there: give its base model here"
    if (directory / "adapter_model.safetensors").is_file():
        return "an adapter without its adapter_config.json lies there: get that file as well"
    return _unfinished_run(directory) or "give the path of one, or get the file as well"


def instead_of_adapter(directory: Path) -> str:
    """The end of a message about a directory that holds no adapter."""
    if (directory / "model" / "config.json").is_file():
        return "full fine-tuning leaves none, its model/ stands alone: give that as the model"
    if (directory / "config.json").is_file():
        return "a model lies there: give the adapter's directory here, the model as its base"
    return _unfinished_run(directory) or "give the path of one"


def _unfinished_run(directory: Path) -> str:
    recipe = directory / "config.toml"
    if not recipe.is_file():
        return ""
    return f"a run lies there that has not ended: go on with lorax train {recipe} --resume"
