"""Will it fit, and what does it take: memory and parameters of a training, before it starts.

    configs.py       which model: a recipe, a directory, a config.json, a name that is known offline
    setting.py       how it is trained: method, optimizer, rows, length, and what the path is
    shape.py         what the model is made of: its parameters by kind, and what is trained
    tensors.py       bytes of weights in each format, and of each optimizer's states
    trace.py         a step of lorax's own code on tensors without memory: what it holds, and when
    blank.py         quantized weights without memory
    heap.py          what the C library's heap makes of it
    process.py       the process itself, and the memory that is there
    peak.py          all of it at the moments of a step; the largest is the peak
    watch.py         a run's estimate before it starts, and its measured peak when it is done
    report.py        lines, tables, a picture

Nothing is fitted to measurements: bytes follow from the tensors that lorax's code makes, and tests
hold them against what a real step allocates. What is measured is the process without a model
(process.py).
"""
