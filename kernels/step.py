"""The kernels of a training step under one roof; reference_step.py has a twin for each, by name."""

from lorax.kernels.dropout import add_dropped
from lorax.kernels.extended import decode_columns, decode_rows
from lorax.kernels.lora import cross, down
from lorax.kernels.narrow import products
from lorax.kernels.norm import norm, norm_backward
from lorax.kernels.rope import rope_
from lorax.kernels.swiglu import swiglu, swiglu_backward

__all__ = [
    "add_dropped",
    "cross",
    "decode_columns",
    "decode_rows",
    "down",
    "norm",
    "norm_backward",
    "products",
    "rope_",
    "swiglu",
    "swiglu_backward",
]
