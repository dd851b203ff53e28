"""A model, or an adapter with its base, whichever lies at a path."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax.data.tokenizer import Tokenizer
from lorax.errors import EnvironmentProblem, FormatError, UsageError
from lorax.formats.huggingface import load_model, load_tokenizer
from lorax.formats.peft import load_adapter
from lorax.formats.peft_directory import CONFIG, is_adapter, read_adapter_config
from lorax.models import Model


def open_model(
    path: str,
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    needs_adapter: bool = False,
    check_base: bool = True,
    resize_vocabulary: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a model, or an adapter with its base, whichever lies at `path`; and its tokenizer.

    Args:
        path: a model (directory, Hub id, .gguf), an adapter's directory or a run's, which has
            an adapter/ or, after full fine-tuning, a model/.
        base: the base of an adapter, where its config's own entry does not lead to it.
        dtype, device, quantization: as in `load_model`.
        needs_adapter: refuse a plain model.
        check_base, resize_vocabulary: as in `load_adapter`.

    Raises:
        UsageError: an adapter that names no base, a plain model with a `base`, or one where an
            adapter is needed. And all that `load_model` and `load_adapter` raise.
    """
    if (Path(path) / "adapter" / CONFIG).is_file():  # a run's directory
        path = str(Path(path) / "adapter")
    elif (Path(path) / "model" / "config.json").is_file():  # of full fine-tuning
        path = str(Path(path) / "model")
    if not is_adapter(Path(path)):
        if needs_adapter or base is not None:
            raise UsageError(
                f"{path}: no {CONFIG} there; expected an adapter's directory (a model that was "
                "fine-tuned in full has none)"
            )
        model = load_model(path, dtype, device, quantization)
        return model, load_tokenizer(path)
    stated = read_adapter_config(path)[1]
    given, base = base, base or stated
    if base is None:
        raise UsageError(f"{path}: the adapter names no base model; give one with --base")
    with stated_base(path, base, given):
        model = load_model(base, dtype, device, quantization)
    load_adapter(model, path, check_base=check_base, resize_vocabulary=resize_vocabulary)
    return model, load_tokenizer(base)


@contextmanager
def stated_base(adapter: str | Path, base: str, given: str | None) -> Iterator[None]:
    """Inside the `with` the base is opened; where only the adapter's own entry leads to it and it
    is not there, the error says what to do.

    adapter: its directory. base: what is opened. given: what the user said, or None.
    """
    try:
        yield
    except (EnvironmentProblem, FormatError, UsageError) as error:
        if given is not None or Path(base).exists():
            raise
        raise type(error)(
            f"{error}. {adapter} names {base!r} as its base; where it lies elsewhere, give it with "
            "--base"
        ) from None
