"""The hand-written training step of a CPU: the same numbers as the plain path, in less time.

    install.py       `accelerated`: the one way in, from outside, while a run lasts
    products.py      x W^T and dy W by the fastest library that is here
    parts.py         a Linear that is known well enough: its frozen weight, LoRA's path beside it
    projections.py   one Linear, or several that read the same input, forward and backward
    mlp.py           gate, up, SwiGLU and down, forward and backward
    attention.py     rotary positions and causal attention, of rows or of packed documents
    norm.py          RMSNorm
    head.py          cross entropy behind the frozen head

The plain path (lorax/models, lorax/adapters) says what is computed, and is computed wherever a
module is not exactly one of those known here. Nothing in those rooms knows of this one.
"""
