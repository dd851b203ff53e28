"""lorax serve: a model and its adapters behind the OpenAI protocol."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from lorax.cli.options import Device, LocalPath, PlainDtype, Positive
from lorax.cli.terminal import say
from lorax.errors import EnvironmentProblem
from lorax.quant import names

Seconds = Annotated[float, Parameter(validator=Number(gt=0))]


def serve(
    base: str,
    *,
    adapters: Annotated[
        LocalPath | None,
        Parameter(help="A directory: each adapter below it is a model of its name."),
    ] = None,
    host: Annotated[str, Parameter(help="Where to listen; 0.0.0.0: for everyone.")] = "127.0.0.1",
    port: Annotated[
        int, Parameter(help="0 takes a free one.", validator=Number(gte=0, lte=65535))
    ] = 8000,
    api_key: Annotated[
        str | None,
        Parameter(help="What clients must know. LORAX_API_KEY says it where no one else reads it."),
    ] = None,
    quantization: Annotated[
        str | None, Parameter(help=f"Quantize the base: {names.listed(names.formats())}.")
    ] = None,
    dtype: PlainDtype = "auto",
    device: Device = "cpu",
    slots: Annotated[Positive, Parameter(help="Answers that are made together.")] = 8,
    context: Annotated[
        Positive, Parameter(help="Tokens of a prompt and its answer; times the slots: the cache.")
    ] = 2048,
    max_tokens: Annotated[Positive, Parameter(help="Tokens of an answer, at most.")] = 1024,
    queue: Annotated[Positive, Parameter(help="Requests that wait; more are refused.")] = 128,
    max_body: Annotated[Positive, Parameter(help="Bytes of a request.")] = 2**20,
    timeout: Annotated[Seconds, Parameter(help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[Seconds, Parameter(help="Seconds for what is under way at the end.")] = 30.0,
    adapters_in_memory: Annotated[
        Positive | None, Parameter(help="The others are read again when they are asked for.")
    ] = None,
) -> None:
    """Serve a model and its adapters over HTTP, as OpenAI and vLLM do; SIGTERM ends it.

    Parameters
    ----------
    base
        A model: directory, Hub id or .gguf.
    """
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing:
        raise EnvironmentProblem(
            f"lorax serve needs {' and '.join(missing)}, which is not installed; "
            "pip install 'lorax-finetuning[serve]'"
        )
    from lorax.inference.server.limits import Limits
    from lorax.inference.server.run import Service, open_engine

    limits = Limits(
        slots=slots,
        context_tokens=context,
        answer_tokens=max_tokens,
        queue=queue,
        body_bytes=max_body,
        request_seconds=timeout,
        drain_seconds=drain,
    )
    engine, models = open_engine(
        base,
        adapters,
        limits,
        dtype=dtype,
        device=device,
        quantization=quantization,
        budget=adapters_in_memory,
    )
    count = len(models.all()) - 1
    service = Service(
        engine,
        models,
        host,
        port,
        api_key or os.environ.get("LORAX_API_KEY") or None,
        lambda address: say(f"serving {base} with {count} adapters at {address}"),
    )
    service.serve_until_told()
