"""lorax export: hand over to llama.cpp."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorax.cli.options import AS_IT_IS, Json, LocalPath, Opening
from lorax.cli.terminal import print_json, say, tell


def export(
    path: str,
    output: LocalPath,
    /,
    *,
    format: Annotated[
        str,
        Parameter(help="gguf: a model, an adapter merged into it; gguf-adapter: an adapter alone."),
    ],
    type: Annotated[
        str | None,
        Parameter(
            help="Of the matrices. gguf: F16 (the default), Q8_0 or F32; gguf-adapter: F32 (the "
            "default) or F16."
        ),
    ] = None,
    json: Json = False,
    opening: Opening = AS_IT_IS,
) -> None:
    """Write a model, or an adapter, as the GGUF file that llama.cpp opens.

    Parameters
    ----------
    path
        A model (directory, Hub id, .gguf), an adapter (directory or Hub id) or a run's directory.
    output
        The file, by custom NAME.gguf; nothing may be there.
    """
    from lorax.formats import export as exporting

    written = exporting.export(path, output, format, type, say=tell, **vars(opening))
    if json:
        print_json(written.as_dict())
    else:
        say(str(written))
