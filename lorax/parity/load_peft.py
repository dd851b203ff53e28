"""PEFT over transformers, loaded as its users do, but quietly, from local files and in float32."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorax.errors import AdapterError, EnvironmentProblem, FormatError
from lorax.formats.json_files import read_json
from lorax.formats.peft_directory import CONFIG, TENSORS
from lorax.parity.bases import DTYPE
from lorax.parity.sides import PeftSide


def require_packages(*packages: str) -> None:
    """Refuse to go on without them.

    Raises:
        EnvironmentProblem: with the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"verify holds lorax against {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install {' '.join(missing)}"
        )


def peft_versions() -> str:
    """The other side's name in a report: "peft VERSION, transformers VERSION", the installed."""
    return f"peft {version('peft')}, transformers {version('transformers')}"


def load_peft(
    adapter: Path, base: Path, dtype: torch.dtype = DTYPE, rows: int | None = None
) -> tuple[PeftSide, list[str]]:
    """The adapter in PEFT over transformers, trainable, in eval mode; and what PEFT warned of.

    The base's weights are rounded to `dtype`, and then computed with in float32.
    rows: the vocabulary's size, where it is to be another than the base's.
    4-bit Linears compute in float32, backward too, and run in training mode (they have no dropout):
    in eval mode bitsandbytes repacks them for another product on some CPUs.
    """
    for file in (CONFIG, TENSORS):
        if not (adapter / file).is_file():
            raise FormatError(
                f"{adapter}: no {file}; expected a PEFT adapter directory; get it anew"
            )
    if read_json(adapter / CONFIG).get("megatron_config") is not None:
        raise AdapterError(
            f"{adapter / CONFIG}: megatron_config; PEFT would import what it names; remove the key"
        )
    with _quiet(), warnings.catch_warnings(record=True) as caught:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        warnings.simplefilter("always")
        base_model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        if rows is not None:
            base_model.resize_token_embeddings(rows)
        for module in base_model.modules():  # Gemma's: a buffer that was rounded with the weights
            scale = getattr(module, "scalar_embed_scale", None)
            if scale is not None:
                module.embed_scale = torch.tensor(scale, dtype=DTYPE)
        for parameter in base_model.parameters():
            if parameter.is_floating_point():  # in 4-bit files some stay 16-bit, whatever is asked
                parameter.data = parameter.data.to(DTYPE)
        model = PeftModel.from_pretrained(base_model, str(adapter), is_trainable=True).eval()
    said = [
        f"PEFT warned: {short_line(w.message)}"
        for w in caught
        if "/peft/" in w.filename.replace("\\", "/") and issubclass(w.category, UserWarning)
    ]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            linear: Any = module
            linear.compute_dtype, linear.compute_type_is_set = DTYPE, True
            linear.training = True
            state.dtype = DTYPE
    return PeftSide(model), list(dict.fromkeys(said))


def short_line(error: object) -> str:
    """A library's message as one line of 300 letters at most."""
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' and bitsandbytes' bars and messages off, and then as they were."""
    from transformers.utils import logging as their_logging

    third = logging.getLogger("bitsandbytes")
    third_level = third.level
    third.setLevel(logging.ERROR)
    bars, level = their_logging.is_progress_bar_enabled(), their_logging.get_verbosity()
    their_logging.disable_progress_bar()
    their_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        third.setLevel(third_level)
        if bars:
            their_logging.enable_progress_bar()
