"""What quantizing lost, in a small adapter: a truncated SVD of the lost part, layer by layer.

    lost = W - dequantize(quantize(W)) ~ B A        B = U_k sqrt(S_k) (out, k),  A = sqrt(S_k) V_k^T

By Eckart and Young no other B A of rank k is nearer. How much k directions hold depends on what was
lost. An adapter that is small against the steps of the quantization is wiped out by it, and then
the lost part is that adapter, of low rank: 16 directions hold 83 to 88 % of its square. Otherwise
it is rounding noise with a flat spectrum: 10 to 24 % (SmolLM2's q_proj and up_proj, an adapter of
rank 16 whose weights are 1 % and 10 % of the base's; docs/log.md).

Small layers get the exact SVD. Larger ones get a randomized one (Halko et al., arXiv:0909.4061)
with eight power iterations, because the spectrum is flat: it holds at most 1.5 % less than the best
there (16 directions: 0.0948 against 0.0963 of the square) in a sixth of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorax.adapters.attached import adapter_layers
from lorax.adapters.config import LoRAConfig
from lorax.adapters.inject import add_adapter

EXACT_SIZE = 256  # up to here the whole SVD is a matter of milliseconds
OVERSAMPLING = 8
POWER_ITERATIONS = 8


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest B A of that rank: A (rank, in) and B (out, rank), float32, of equal size.

    matrix: (out, in). Where the rank is above its sizes, the rest of A and B is zero. The same
    matrix gives the same result; torch's global generator is left as it was.
    """
    matrix = matrix.float()
    smaller = min(matrix.shape)
    if smaller <= max(EXACT_SIZE, rank + OVERSAMPLING):
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, rank + OVERSAMPLING, POWER_ITERATIONS)
        Vt = V.t()
    kept = min(rank, smaller)
    root = S[:kept].sqrt()
    A = matrix.new_zeros(rank, matrix.shape[1])
    B = matrix.new_zeros(matrix.shape[0], rank)
    A[:kept] = root[:, None] * Vt[:kept]
    B[:, :kept] = U[:, :kept] * root
    return A, B


def attach_residual(model: nn.Module, residuals: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put residuals, (A, B) by the layers' paths, into the model as a LoRA of scale 1.

    Raises:
        AdapterError: the model has an adapter already.
    """
    rank = next(iter(residuals.values()))[0].shape[0]
    config = LoRAConfig(r=rank, lora_alpha=rank, target_modules=sorted(residuals))
    with torch.random.fork_rng(devices=[]):
        add_adapter(model, config)
    for name, layer in adapter_layers(model).items():
        tensors = layer.tensors()
        with torch.no_grad():
            tensors["lora_A.weight"].copy_(residuals[name][0])
            tensors["lora_B.weight"].copy_(residuals[name][1])
