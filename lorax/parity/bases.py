"""The base that two sides stand on: in lorax, and as files that transformers opens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lorax.formats.hub import find_model
from lorax.formats.huggingface import load_model, save_model
from lorax.models import Model
from lorax.quant.four_bit import FourBitTensor
from lorax.quant.linear import QuantizedLinear

DTYPE = torch.float32  # what both compute in


def float32_base(base: str, dtype: torch.dtype, quantization: str | None) -> Model:
    """The base's weights in its dtype, quantized; then everything computes in float32."""
    model = load_model(base, dtype, quantization=quantization).to(DTYPE)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.dtype = DTYPE
            if isinstance(module.quantized, FourBitTensor):
                module.quantized = replace(module.quantized, dtype=DTYPE)
    return model


def files_for_transformers(
    base: str, model: Model, quantization: str | None, folder: Path
) -> tuple[Path, str]:
    """A directory that transformers opens as this base, and a note where lorax wrote it.

    folder: where to write, if the base's own directory will not do.
    """
    found = find_model(base)
    if found.is_dir() and quantization is None:
        return found, ""
    save_model(model, folder / "base")
    written = "in 4 bits" if quantization else "in Hugging Face's layout"
    return folder / "base", f"lorax wrote the base {written} for transformers to read"
