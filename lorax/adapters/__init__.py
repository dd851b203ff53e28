"""LoRA and its family: configs, layers, injection, merging."""
