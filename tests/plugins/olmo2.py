"""OLMo 2 (arXiv:2501.00656) as a researcher adds it: one file, nothing else touched.

A Llama with a norm over the whole of q and of k, and norms behind each half in the place of those
before it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

import lorax
from lorax.models.llama import Llama, LlamaAttention, LlamaMLP, LlamaModel
from lorax.models.llama_config import LlamaConfig, head_dim, read_sizes
from lorax.models.rope_config import read_rope


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(LlamaConfig):
    model_type: ClassVar = "olmo2"
    defaults: ClassVar = {**LlamaConfig.defaults, "vocab_size": 50304, "rms_norm_eps": 1e-5}
    bias_words: ClassVar = {"self_attn": "attention_bias"}
    gguf: ClassVar = None

    @classmethod
    def read(cls, values, where):
        rope = read_rope(values, head_dim(values, where), where)
        return cls(**read_sizes(values, where), **rope, attention_bias=values["attention_bias"])


class Olmo2(Llama):
    default_targets = None  # PEFT has none for it

    def new_body(self, config):
        return LlamaModel(config, Olmo2Layer, Olmo2Norm)


class Olmo2Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.self_attn = Olmo2Attention(config, index)
        self.mlp = LlamaMLP(config)
        self.post_attention_layernorm = Olmo2Norm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Olmo2Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rope, cache):
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Olmo2Attention(LlamaAttention):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.q_norm = Olmo2Norm(self.q_proj.out_features, config.rms_norm_eps)
        self.k_norm = Olmo2Norm(self.k_proj.out_features, config.rms_norm_eps)

    def project(self, x):
        query, key, value = super().project(x)
        return self.q_norm(query), self.k_norm(key), value


class Olmo2Norm(nn.RMSNorm):
    def __init__(self, width, eps):
        super().__init__(width, eps)

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


lorax.register_model("olmo2", "Olmo2ForCausalLM", config=Olmo2Config, model=Olmo2)
