"""Weights in few bits: codebooks, blockwise quantization, packed tensors, frozen Linears."""
