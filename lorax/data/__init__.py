"""From a file to batches with a loss mask: tokenizer, templates, examples, batches."""
