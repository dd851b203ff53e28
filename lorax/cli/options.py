"""The options that several commands share, and opening a model as they say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from lorax.cli.terminal import tell
from lorax.quant import codebooks, names

if TYPE_CHECKING:
    from lorax.data.tokenizer import Tokenizer
    from lorax.models import Model


LocalPath = Path  # "~" is the home directory: program.py
BITSANDBYTES_4BIT = names.listed(codebooks.formats(bitsandbytes=True))
Quantization = Annotated[
    str | None,
    Parameter(
        help=f"Quantize the base: {names.listed(names.formats())} (int8 is LLM.int8); none: plain "
        "weights. Without it, as the adapter's run has it on record."
    ),
]
Dtype = Annotated[
    str,
    Parameter(
        help="float32, bfloat16 or float16; auto: what the adapter's run has on record, else what "
        "config.json says, else the file's own."
    ),
]
PlainDtype = Annotated[
    str,
    Parameter(help="float32, bfloat16 or float16; auto: what config.json says, else the file's."),
]
Device = Annotated[str, Parameter(help="cpu or cuda.")]
Base = Annotated[str | None, Parameter(help="The base model, where the adapter's is elsewhere.")]
CheckBase = Annotated[bool, Parameter(help="Refuse an adapter that was trained over another base.")]
ResizeVocabulary = Annotated[
    bool,
    Parameter(help="Give the base the adapter's vocabulary, where tokens were added.", negative=""),
]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Json = Annotated[bool, Parameter(help="Print one JSON object.", negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Opening:
    """How a model, or a model with an adapter, is opened: the options of generate and evaluate."""

    base: Base = None
    quantization: Quantization = None
    dtype: Dtype = "auto"
    device: Device = "cpu"
    check_base: CheckBase = True
    resize_vocabulary: ResizeVocabulary = False

    def open(self, path: str) -> tuple[Model, Tokenizer]:
        """The model and its tokenizer; `path` is a model's, an adapter's or a run's."""
        from lorax.formats.open_model import open_model

        return open_model(path, say=tell, **vars(self))


AS_IT_IS = Opening()
