"""The models, each read top to bottom, in plain PyTorch and with Hugging Face's parameter names.

The letters behind shapes, here and everywhere in lorax:

    B  batch            C  model width (hidden_size)      M  rows of a matrix product, B * T
    T  tokens given     H  query heads                    r  rank of an adapter
    S  tokens attended  K  key / value heads              V  vocabulary
    L  layers           D  width of a head                W  weight (out, in)

A model offers `hidden_states(input_ids, context)` -> (B, T, C), the final norm included; `logits`,
the head behind it; `model(input_ids)` -> (B, T, V), the two together; `new_cache`; `max_positions`;
and the switch `gradient_checkpointing` (lorax/models/model.py). It knows neither adapters nor
quantization: those replace its Linears, or the `prefix` in front of its first tokens. Which
families there are is in lorax/models/families.py.
"""

from lorax.models.model import Model as Model
