"""A merged model as a directory, with the residual of a quantized one inside it.

OUT/config.json  OUT/model.safetensors  tokenizer's files     transformers and lorax open these
OUT/residual/adapter_config.json  adapter_model.safetensors   a PEFT adapter over OUT, where
                                                              the route leaves one
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorax.adapters.attached import adapter_layers
from lorax.adapters.merge import unload_adapter
from lorax.data.tokenizer import Tokenizer
from lorax.formats.directory import written_directory
from lorax.formats.huggingface import save_model
from lorax.formats.peft import save_adapter
from lorax.merging.residual import attach_residual
from lorax.models import Model

RESIDUAL = "residual"


def write_merged(
    model: Model,
    path: Path,
    tokenizer: Tokenizer | None = None,
    residuals: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Write a merged model and its residuals, (A, B) by path; all of it or nothing.

    Raises:
        UsageError: `path` is taken, or the model is quantized in a way that has no files.
        EnvironmentProblem: the disk is full or refuses.
    """
    assert not adapter_layers(model)
    path = path.expanduser()
    with written_directory(path) as directory:
        save_model(model, directory, tokenizer=tokenizer)
        if residuals:
            model.name_or_path = str(path)  # what the residual stands over
            model.loaded_from = directory  # where its digest is taken
            attach_residual(model, residuals)
            save_adapter(model, directory / RESIDUAL)
            unload_adapter(model)
