"""A model, or an adapter with its base, whichever lies at a path."""

from __future__ import annotations

import os
from collections.abc import Callable

from lorax.data.tokenizer import Tokenizer
from lorax.formats.adapter_tokenizer import load_adapter_tokenizer
from lorax.formats.huggingface import load_model
from lorax.formats.peft import load_adapter
from lorax.formats.places import as_trained, find_place
from lorax.models import Model


def open_model(
    path: str | os.PathLike[str],
    base: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantization: str | None = None,
    check_base: bool = True,
    say: Callable[[str], None] = lambda line: None,
    resize_vocabulary: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a model, or an adapter with its base, whichever lies at `path`; and its tokenizer.

    Args:
        path: a model (directory, Hub id, .gguf), an adapter (directory, Hub id) or a run's
            directory, which has an adapter/ or, after full fine-tuning, a model/.
        base: the base of an adapter, where its config's own entry does not lead to it.
        device: as in `load_model`.
        dtype, quantization: of the base; "auto" and None take what the adapter's run has on
            record (`lorax.formats.run_record`), else what `load_model` makes of them.
            quantization "none": plain weights, whatever is on record.
        check_base, resize_vocabulary: as in `load_adapter`.
        say: is told in one line what was taken from the record.

    Raises:
        All that `find_place`, `load_model`, `load_adapter_tokenizer` and `load_adapter` raise.
    """
    place = find_place(path, base)
    dtype, quantization = as_trained(place, dtype, quantization, say)
    model = load_model(place.model, dtype, device, quantization)
    if place.adapter is not None:
        load_adapter(
            model, place.adapter, check_base=check_base, resize_vocabulary=resize_vocabulary
        )
    return model, load_adapter_tokenizer(place.adapter, place.model)
