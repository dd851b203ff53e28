"""The hand-written training step of a GPU: one autograd Function a layer, over Triton kernels.

    group.py       Linears with one input as one product, LoRA's path inside it
    halves.py      attention and MLP, forward and backward, with what each keeps
    layer.py       the Function: what is kept and what is computed again
    known.py       whether a layer is exactly what these compute
    graphs.py      forward, loss and backward as a CUDA graph for each length

`accelerated` (lorax/training/fast/install.py) puts it on, as it does the CPU's. The kernels are in
lorax.kernels.step, and every one has a slow twin in lorax.kernels.reference_step.
"""
