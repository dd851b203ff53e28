"""lorax generate: an answer, token by token."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import AS_IT_IS, Opening
from lorax.cli.terminal import out
from lorax.text import visible


def generate(
    path: str,
    prompt: str,
    *,
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
    """Let a model, or a model with an adapter, answer a prompt.

    Parameters
    ----------
    path
        A model (directory, Hub id or .gguf), an adapter (directory or Hub id) or a run's directory.
    prompt
        What to answer. Put through the model's chat template if it has one.
    """
    from lorax.inference.generate import stream

    model, tokenizer = opening.open(path)
    if tokenizer.chat_template is not None and not raw:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt)
    tokens: list[int] = []
    shown = ""
    for token in stream(model, tokenizer, ids, max_new_tokens, temperature, top_p, seed):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            new = text[len(shown) :]
            print(visible(new, keep="\n\t") if out.is_terminal else new, end="", flush=True)
            shown = text
    print()
