"""The names of all formats, without torch: what recipes and help texts offer.

    name             bits a weight   what it is                                          its file
    nf4              4.5             quantiles of a normal distribution                  four_bit.py
    nf4-dq           4.127           the same, its scales in 8 bits                      four_bit.py
    fp4, fp4-dq      4.5, 4.127      a tiny floating-point number                        four_bit.py
    sym4, sym4-dq    4.5, 4.127      a codebook that somebody registered                 four_bit.py
    int8             8 + 32 / in     LLM.int8: a scale a row, activations in int8 too    int8.py
    int8-symmetric   8.5             equal steps, around zero                            affine.py
    int8-affine      8.625           equal steps, with a zero point                      affine.py
    int4-symmetric   4.5             equal steps, around zero                            affine.py
    int4-affine      4.625           equal steps, with a zero point                      affine.py

(Blocks of 64, where there are blocks.)
"""

from lorax.quant import codebooks

INT8 = "int8"
AFFINE = ("int8-symmetric", "int8-affine", "int4-symmetric", "int4-affine")


def formats() -> tuple[str, ...]:
    """Every name that `lorax.quantize` takes at this moment."""
    return (*codebooks.formats(), INT8, *AFFINE)


def bitsandbytes_formats() -> tuple[str, ...]:
    """Those that bitsandbytes' files can hold."""
    return (*codebooks.formats(bitsandbytes=True), INT8)


def listed(names: tuple[str, ...]) -> str:
    """The names as a sentence has them: "nf4, nf4-dq or int8"."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
