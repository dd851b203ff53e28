"""lorax generate: an answer, token by token; or the answers to a file of prompts."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorax.cli.options import AS_IT_IS, LocalPath, Opening, Positive
from lorax.cli.terminal import out
from lorax.errors import UsageError
from lorax.text import visible

if TYPE_CHECKING:
    from lorax.inference.batch import Sampling


def generate(
    path: str,
    prompt: str | None = None,
    *,
    prompts: Annotated[
        LocalPath | None,
        Parameter(
            help="A file of prompts in the place of PROMPT: rows with prompt, messages or another "
            "form of training's data. A JSON line each on stdout, in their order."
        ),
    ] = None,
    batch_size: Annotated[
        Positive, Parameter(help="Prompts that are answered together: speed and memory only.")
    ] = 8,
    max_new_tokens: Annotated[int, Parameter(help="At most so many, if no end comes.")] = 128,
    temperature: Annotated[
        float, Parameter(help="0: the likeliest token each time; 1: the model's own odds.")
    ] = 0.0,
    top_p: Annotated[
        float, Parameter(help="Draw from the likeliest tokens that have this share together.")
    ] = 1.0,
    seed: Annotated[int | None, Parameter(help="Of the draws; the same text each time.")] = None,
    raw: Annotated[bool, Parameter(help="No chat template: the prompt as it stands.")] = False,
    opening: Opening = AS_IT_IS,
) -> None:
    """Let a model, or a model with an adapter, answer a prompt, or each prompt of a file.

    Parameters
    ----------
    path
        A model (directory, Hub id or .gguf), an adapter (directory or Hub id) or a run's directory.
    prompt
        What to answer. Put through the model's chat template if it has one.
    """
    from lorax.inference.batch import Sampling

    if (prompt is None) == (prompts is None):
        raise UsageError(
            "generate requires an argument PROMPT or --prompts FILE, and one of them only; give "
            "the text to answer, or a file with a prompt a row"
        )
    sampling = Sampling(temperature, top_p, seed)
    if prompts is not None:
        _answer_file(path, prompts, raw, opening, max_new_tokens, sampling, batch_size)
    elif prompt is not None:
        _answer(path, prompt, raw, opening, max_new_tokens, sampling)


def _answer(
    path: str, prompt: str, raw: bool, opening: Opening, most: int, sampling: Sampling
) -> None:
    """Print the answer as it is made."""
    from lorax.data.prompts import encode_prompt
    from lorax.inference.generate import stream
    from lorax.inference.text import as_text

    model, tokenizer = opening.open(path)
    ids = encode_prompt(prompt, tokenizer, raw)
    tokens = stream(model, tokenizer, ids, most, *astuple(sampling))
    for text in as_text(tokens, tokenizer):
        print(visible(text, keep="\n\t") if out.is_terminal else text, end="", flush=True)
    print(flush=True)


def _answer_file(
    path: str,
    prompts: Path,
    raw: bool,
    opening: Opening,
    most: int,
    sampling: Sampling,
    batch_size: int,
) -> None:
    """Print a JSON object a prompt: its own words, and its completion."""
    from lorax.data.prompts import read_prompts
    from lorax.inference.generate import answers

    model, tokenizer = opening.open(path)
    asked = read_prompts(prompts, tokenizer, raw)
    places = [f"{one.where}: " for one in asked]
    ids = [one.ids for one in asked]
    made = answers(model, tokenizer, ids, most, sampling, batch_size, places)
    for one, completion in zip(asked, made, strict=True):
        line = json.dumps(one.said | {"completion": completion}, ensure_ascii=False)
        print(visible(line) if out.is_terminal else line, flush=True)
