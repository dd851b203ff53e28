"""AdaLoRA: its config, its layer, and the allocator that takes its ranks away."""
