"""What lies beside a model's weights and config: the names of such files, and copies of them.

A copy of a model (merged, quantized, saved) keeps them byte for byte: the tokenizer's, how to
generate, the licence and the card. Whose they are does not change with the numbers.
"""

import shutil
from pathlib import Path

TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
GENERATION = "generation_config.json"
PAPERS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_papers(source: Path, target: Path) -> None:
    """Copy generation settings, licence and card from one directory into another, as they are."""
    for pattern in (GENERATION, *PAPERS):
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files from one directory into another, as they are."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
