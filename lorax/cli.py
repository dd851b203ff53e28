"""The command line: parses, calls, prints; no logic.

Exit codes: 0 ok, 1 a check does not hold, 2 usage or recipe, 3 environment or disk, 4 data or
files, 5 numerical stop, 130 / 143 signals.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

from lorax.console import ConsoleLog, PlainConsole
from lorax.errors import FormatError, LoraxError, UsageError
from lorax.plugins import load_plugin
from lorax.quant import codebooks, names
from lorax.text import visible
from lorax.version import __version__

if TYPE_CHECKING:
    from lorax.data.tokenizer import Tokenizer
    from lorax.models import Model

app = App(
    name="lorax",
    version=__version__,
    help="LoRA and QLoRA from scratch: small enough to read, exact enough to trust. Each command "
    "takes --plugin FILE.py: your own file, executed first, which registers variants and the like.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
out = PlainConsole()
err = PlainConsole(stderr=True)


def _path(_: Any, tokens: Any) -> Path:
    return Path(tokens[0].value).expanduser()


LocalPath = Annotated[Path, Parameter(converter=_path)]
BITSANDBYTES_4BIT = names.listed(codebooks.formats(bitsandbytes=True))
Quantization = Annotated[
    str | None,
    Parameter(
        help=f"Quantize the base: {names.listed(names.formats())} (int8 is LLM.int8); none: plain "
        "weights. Without it, as the adapter's run has it on record."
    ),
]
Dtype = Annotated[
    str,
    Parameter(
        help="float32, bfloat16 or float16; auto: what the adapter's run has on record, else what "
        "config.json says, else the file's own."
    ),
]
PlainDtype = Annotated[
    str,
    Parameter(help="float32, bfloat16 or float16; auto: what config.json says, else the file's."),
]
Device = Annotated[str, Parameter(help="cpu or cuda.")]
Base = Annotated[str | None, Parameter(help="The base model, where the adapter's is elsewhere.")]
CheckBase = Annotated[bool, Parameter(help="Refuse an adapter that was trained over another base.")]
ResizeVocabulary = Annotated[
    bool,
    Parameter(help="Give the base the adapter's vocabulary, where tokens were added.", negative=""),
]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
Json = Annotated[bool, Parameter(help="Print one JSON object.", negative="")]


def main() -> None:
    """Run the command line; every error that a user can cause is one line on stderr."""
    if not logging.getLogger("lorax").handlers:
        logging.getLogger("lorax").addHandler(ConsoleLog(err))
    try:
        rest = take_plugins(sys.argv[1:])
        command, given, _ = app.parse_args(rest, exit_on_error=False, print_error=False)
        named = {name: _at_home(value) for name, value in given.kwargs.items()}
        command(*map(_at_home, given.args), **named)
    except (CycloptsError, LoraxError) as error:
        err.say_line(error, "error: ")
        sys.exit(error.exit_code if isinstance(error, LoraxError) else UsageError.exit_code)
    except KeyboardInterrupt as interrupt:
        line = ": ".join(["interrupted", *map(str, interrupt.args)])
        err.say_line(line)
        sys.exit(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
        sys.exit(0)


given_plugins: list[Path] = []  # by --plugin, in this call; a run's config.toml names them too


def take_plugins(arguments: list[str]) -> list[str]:
    """Execute what --plugin names, and give the other arguments."""
    given_plugins.clear()
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.partition("=")
        if name != "--plugin":
            rest.append(argument)
            continue
        if not equals and not waiting:
            raise UsageError("--plugin: expected a Python file behind it")
        given_plugins.append(Path(value if equals else waiting.pop(0)).expanduser())
    for plugin in given_plugins:
        load_plugin(plugin)
    return rest


@app.command
def train(
    recipe: LocalPath,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    resume: Annotated[
        bool, Parameter(help="Go on from the newest checkpoint of that run.", negative="")
    ] = False,
    dry_run: Annotated[bool, Parameter(help="Check and print the plan only.", negative="")] = False,
) -> None:
    """Train a recipe: lorax train recipe.toml --train.learning_rate 1e-4 --data.path my.jsonl

    Any key of the recipe can be given by its path, and then wins over the file. A value is
    read as TOML: --adapter.target_modules '["q_proj", "v_proj"]'. --dry-run prints the plan.

    Parameters
    ----------
    recipe
        A TOML file; configs/ has some to start from.
    """
    from lorax.training.recipe import Recipe

    checked = Recipe.load(recipe, parse_overrides(overrides), given_plugins)
    if dry_run:
        from lorax.training.plan import describe

        out.print(describe(checked), soft_wrap=True)
        return
    from lorax.progress import TrainingProgress
    from lorax.training.loop import train as run_recipe

    with TrainingProgress(out) as progress:
        run = run_recipe(checked, progress, resume=resume)
    _say(f"{run.result.name:<8} {run.result}")
    if (run.output_dir / "loss.png").is_file():
        _say(f"picture  {run.output_dir / 'loss.png'}")


@app.command
def generate(
    path: str,
    prompt: str,
    *,
    base: Base = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: Annotated[bool, Parameter(help="No chat template: the prompt as it stands.")] = False,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    check_base: CheckBase = True,
    resize_vocabulary: ResizeVocabulary = False,
) -> None:
    """Let a model, or a model with an adapter, answer a prompt.

    Parameters
    ----------
    path
        A model (directory, Hub id or .gguf), an adapter (directory or Hub id) or a run's directory.
    prompt
        What to answer. Put through the model's chat template if it has one.
    temperature
        0 takes the likeliest token each time.
    """
    from lorax.inference.generate import stream

    model, tokenizer = _open(path, base, dtype, device, quantization, check_base, resize_vocabulary)
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


@app.command
def evaluate(
    path: str,
    *,
    data: LocalPath,
    base: Base = None,
    max_length: Positive = 512,
    micro_batch_size: Positive = 4,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    check_base: CheckBase = True,
    resize_vocabulary: ResizeVocabulary = False,
    json: Json = False,
) -> None:
    """Loss and perplexity of a model, or of a model with an adapter, on rows of data.

    Parameters
    ----------
    path
        A model (directory, Hub id or .gguf), an adapter (directory or Hub id) or a run's directory.
    data
        A jsonl, json or csv file, of any kind that training takes.
    """
    from lorax.adapters.tables import embedding_weight
    from lorax.data.examples import load_examples
    from lorax.data.vocabulary import check_vocabulary
    from lorax.quant.quantize import stored_format
    from lorax.training.evaluate import evaluate as measure

    model, tokenizer = _open(path, base, dtype, device, quantization, check_base, resize_vocabulary)
    examples = load_examples(data, tokenizer, max_length)
    for row in examples.rows:
        check_vocabulary(row.ids, embedding_weight(model).shape[0], tokenizer)
    result: dict[str, Any] = measure(model, examples.rows, micro_batch_size, tokenizer.pad_token_id)
    numbers = str(embedding_weight(model).dtype).removeprefix("torch.")
    result |= {"rows": len(examples), "tokens": sum(row.tokens for row in examples.rows)}
    format = stored_format(model)
    result |= {"base": model.name_or_path, "dtype": numbers, "quantization": format}
    if json:
        _print_json(result)
    else:
        out.print(
            f"loss {result['eval_loss']:.4f} nats   perplexity {result['eval_perplexity']:.3f}   "
            f"({result['tokens']} tokens in {result['rows']} rows; base {model.name_or_path} in "
            f"{numbers}, {format or 'not quantized'})",
            soft_wrap=True,
        )


@app.command
def merge(
    adapter: str,
    output: LocalPath | None = None,
    /,
    *,
    report: Annotated[
        bool, Parameter(help="First compare all routes, by layer and on text.", negative="")
    ] = False,
    route: Annotated[
        str | None,
        Parameter(
            help="float32, bfloat16 or float16 (dense, over the weights that were trained over); "
            "original-bfloat16 (over those from before quantization); nf4-dq (quantized again); "
            "nf4-dq+r16 (the same, with a residual adapter of rank 16)."
        ),
    ] = None,
    format: Annotated[str | None, Parameter(help=f"A 4-bit output: {BITSANDBYTES_4BIT}.")] = None,
    residual_rank: Annotated[
        int,
        Parameter(help="Keep what quantizing loses in an adapter of this rank, in OUT/residual."),
    ] = 0,
    text: Annotated[
        LocalPath | None, Parameter(help="The report's text; Python's own, if none.")
    ] = None,
    tokens: Annotated[Positive, Parameter(help="How many tokens of it.")] = 1024,
    base: Base = None,
    original: Annotated[
        str | None, Parameter(help="The weights from before quantization, if not the base's files.")
    ] = None,
    quantization: Annotated[
        str | None,
        Parameter(
            help="What the adapter was trained over: nf4-dq and the others, or none. A run's "
            "adapter knows it."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    check_base: CheckBase = True,
    resize_vocabulary: ResizeVocabulary = False,
    json: Json = False,
) -> None:
    """Merge an adapter into its base and write a model that transformers opens.

    Of the routes that give what is asked for, the one that loses least of the adapter is taken.
    Without --format that is a dense model in the base's dtype; over a quantized base it holds the
    dequantized weights, which are what a QLoRA adapter was trained over. Linears that the adapter
    leaves alone stay quantized.

    Parameters
    ----------
    adapter
        The adapter (directory or Hub id), or a run's directory.
    output
        The model's directory; must be missing or empty. Without it, --report writes nothing.
    dtype
        The base's in training, and the output's unless --route names another.
    """
    from lorax.merging import laboratory as merging
    from lorax.merging import report as merge_report

    merging.check_request(output, report, route, format, residual_rank, text)
    laboratory, tokenizer = merging.open_laboratory(
        adapter,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        original=original,
        check_base=check_base,
        say=_tell,
        resize_vocabulary=resize_vocabulary,
    )
    chosen = laboratory.requested(route, format, residual_rank)
    found = None
    if report:
        ids = merging.sample(tokenizer, laboratory.model.max_positions, text, tokens)
        laboratory.check_tokens(ids, tokenizer)
        compared = laboratory.routes(residual_rank, also=chosen)
        found = laboratory.compare(compared, ids, lambda name: _note(f"measuring {name}"))
    cost = laboratory.choose(chosen, found)
    if not json:
        _say(merge_report.summary(laboratory, cost))
        for table in merge_report.tables(found) if found is not None else ():
            out.print(table)
    if output is not None:
        laboratory.write(cost.route, output, tokenizer)
    if json:
        _print_json(merge_report.as_dict(laboratory, found, cost, output))
        return
    for line in merge_report.written(cost, output):
        _say(line)


inspect = App(
    name="inspect",
    help="Look into a model, an adapter or a run: lorax inspect quantization MODEL, "
    "... adapter PATH, ... optimizer RUN, ... data RECIPE, ... loss RECIPE, ... diff RUN RUN",
)
app.command(inspect)


@inspect.command(name="quantization")
def inspect_quantization(
    model: str,
    /,
    *,
    format: Annotated[
        tuple[str, ...], Parameter(help="Formats to compare.", consume_multiple=True)
    ] = codebooks.formats(),
    block_size: Annotated[
        tuple[int, ...], Parameter(help="Block sizes to compare.", consume_multiple=True)
    ] = (64,),
    dtype: PlainDtype = "auto",
    tensors: Annotated[bool, Parameter(help="A line for each tensor too.", negative="")] = False,
    plot: Annotated[LocalPath | None, Parameter(help="Write the picture there, as PNG.")] = None,
    json: Json = False,
) -> None:
    """What quantizing would cost a model's weights: bits, error, the worst rows.

    Parameters
    ----------
    model
        A directory, Hub id or .gguf file.
    """
    from lorax.inspect import quantization as report

    errors = report.inspect_quantization(model, format, block_size, dtype)
    if plot is not None:
        report.plot(errors, plot)
    if json:
        print(report.to_json(errors))
        return
    out.print(report.table(errors))
    if tensors:
        for line in report.lines(errors):
            _say(line)
    if plot is not None:
        _say(f"picture  {plot}")


@inspect.command(name="adapter")
def inspect_adapter(
    path: LocalPath,
    /,
    *,
    against: Annotated[
        LocalPath | None, Parameter(help="Another adapter of the same base.")
    ] = None,
    json: Json = False,
) -> None:
    """How large an adapter's change is, layer by layer, and the angle to another adapter.

    Parameters
    ----------
    path
        A PEFT LoRA directory; no base model is needed.
    """
    from lorax.inspect import adapter as report

    found = report.inspect_adapter(path, against)
    if json:
        print(report.to_json(found))
        return
    out.print(report.table(found))


@inspect.command(name="optimizer")
def inspect_optimizer(path: str, /, *, json: Json = False) -> None:
    """What a run's optimizer holds, by name, and what paging has moved.

    Parameters
    ----------
    path
        A run's directory, a checkpoint's directory, or an optimizer state's file.
    """
    from lorax.inspect import optimizer as report

    found = report.inspect_optimizer(path)
    if json:
        print(report.to_json(found))
        return
    _show(report.parts(found))


@inspect.command(name="data")
def inspect_data(
    recipe: LocalPath,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    show: Annotated[int, Parameter(help="How many rows to show token by token.")] = 3,
    max_truncated: Annotated[
        float, Parameter(help="The share of rows whose answers may be cut.")
    ] = 0.1,
    html: Annotated[LocalPath | None, Parameter(help="Write the page there, too.")] = None,
    json: Json = False,
) -> None:
    """What a recipe's rows become: tokens, loss mask, lengths; exit code 1 where rows are wrong.

    Parameters
    ----------
    recipe
        A TOML file; its keys can be given by their paths, as for train.
    """
    from lorax.inspect import data as report
    from lorax.training.recipe import Recipe

    checked = Recipe.load(recipe, parse_overrides(overrides))
    found = report.inspect_data(checked, show, max_truncated)
    if html is not None:
        report.write_html(found, html)
    _show(found.as_dict() if json else report.parts(found))
    if html is not None and not json:
        _say(f"page  {html}")
    sys.exit(0 if found.holds else 1)


@inspect.command(name="loss")
def inspect_loss(
    recipe: LocalPath,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    json: Json = False,
) -> None:
    """Whether loss and gradients of a step depend on micro-batches, padding or order; 1 if so.

    Parameters
    ----------
    recipe
        A TOML file; its keys can be given by their paths, as for train.
    """
    from lorax.inspect import loss as report
    from lorax.training.recipe import Recipe

    found = report.inspect_loss(Recipe.load(recipe, parse_overrides(overrides)))
    _show(found.as_dict() if json else report.parts(found))
    sys.exit(0 if found.holds else 1)


@inspect.command(name="diff")
def inspect_diff(first: LocalPath, second: LocalPath, /, *, json: Json = False) -> None:
    """The first step and tensor in which two runs with train.digests differ; 1 if they do.

    Parameters
    ----------
    first, second
        Two runs' directories.
    """
    from lorax.inspect.runs import compare_runs

    found = compare_runs(first, second)
    _show(found.as_dict() if json else [found.verdict])
    sys.exit(0 if found.holds else 1)


adapter = App(name="adapter", help="Calculate with adapters: lorax adapter add A B --output SUM")
app.command(adapter)


@adapter.command(name="add")
def add_adapters(
    *paths: LocalPath,
    output: LocalPath,
    weights: Annotated[
        tuple[float, ...],
        Parameter(
            help="One for each, such as 1 -0.5; 1 where none are given.",
            consume_multiple=True,
        ),
    ] = (),
    rank: Annotated[
        Positive | None, Parameter(help="Truncate each layer of the sum to this rank.")
    ] = None,
) -> None:
    """Write the weighted sum of adapters as an adapter: exact, of the sum of their ranks.

    Parameters
    ----------
    paths
        PEFT LoRA directories of one base; no base model is needed.
    output
        The sum's directory; must be missing or empty.
    """
    from lorax.formats.adapter_data import weighted_sum, write_adapter
    from lorax.formats.directory import check_free

    check_free(output)
    total = weighted_sum(paths, weights)
    if rank is not None:
        total, errors = total.truncate(rank)
        worst = max(errors, key=lambda name: errors[name])
        _say(f"truncating to rank {rank} lost {100 * errors[worst]:.2f} % at most ({worst})")
    write_adapter(total, output)
    _say(f"wrote {output}")


@app.command
def verify(
    adapter: str,
    /,
    *,
    base: Base = None,
    against: Annotated[str, Parameter(help="The other program: peft.")] = "peft",
    reference: Annotated[
        LocalPath | None, Parameter(help="Another adapter's directory, which PEFT reads instead.")
    ] = None,
    quantization: Annotated[
        str | None,
        Parameter(
            help=f"Quantize the base: {BITSANDBYTES_4BIT}; none: plain weights. Without it, "
            "as the adapter's run has it on record."
        ),
    ] = None,
    dtype: Dtype = "auto",
    text: Annotated[LocalPath | None, Parameter(help="A text file to run through both.")] = None,
    tokens: Annotated[Positive, Parameter(help="How many of its tokens.")] = 128,
    html: Annotated[
        LocalPath | None, Parameter(help="Write the report there, as one page.")
    ] = None,
    resize_vocabulary: ResizeVocabulary = False,
    json: Json = False,
) -> None:
    """Hold an adapter in lorax against the same adapter in the installed PEFT.

    Both load it independently and run forward, backward and merge in float32; each module's
    tensors, weights, outputs and gradients are compared. Exit code 0 only if all of it holds, 1 if
    not; then the first module where the two part is named, and which side is right.

    Parameters
    ----------
    adapter
        The adapter (directory or Hub id), or a run's directory.
    """
    from lorax.parity.against_peft import verify as hold_against

    report = hold_against(
        adapter,
        base,
        against=against,
        reference=reference,
        quantization=quantization,
        dtype=dtype,
        text=text,
        tokens=tokens,
        resize_vocabulary=resize_vocabulary,
        say=_tell,
    )
    if html is not None:
        report.write_html(html)
    if json:
        _print_json(report.as_dict())
    else:
        from lorax.parity.report import table

        out.print(table(report))
        _say(str(report))
        if html is not None:
            _say(f"report   {html}")
    if not report.holds:
        sys.exit(1)


@app.command
def quantize(
    model: str,
    output: LocalPath,
    /,
    *,
    format: Annotated[
        str, Parameter(help=f"{names.listed(names.bitsandbytes_formats())}.")
    ] = "nf4-dq",
    block_size: Annotated[
        int | None, Parameter(help="Values that share a scale: 32 to 4096, by default 64.")
    ] = None,
    dtype: PlainDtype = "auto",
    max_shard_bytes: Annotated[Positive, Parameter(help="The largest file.")] = 5 * 10**9,
    json: Json = False,
) -> None:
    """Write a copy of a model in 4 or 8 bits that lorax and transformers + bitsandbytes open.

    Tensor by tensor, in memory of about one output file.

    Parameters
    ----------
    model
        A model: directory, Hub id or .gguf.
    output
        The copy's directory; must be missing or empty. The tokenizer's files come along.
    """
    from lorax.formats.quantize_model import quantize_model
    from lorax.heap import give_memory_back
    from lorax.progress import TensorProgress

    give_memory_back()
    with TensorProgress(err if json else out) as progress:
        result = quantize_model(
            model,
            output,
            format,
            block_size=block_size,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    if json:
        _print_json(result.as_dict())
    else:
        out.print(str(result), soft_wrap=True)
        out.print(f"wrote {output}", soft_wrap=True)


@app.command
def demo(
    *,
    output_dir: LocalPath = Path("runs/demo"),
    steps: Positive = 48,
    model: str | None = None,
    dtype: Annotated[str, Parameter(help="auto takes bfloat16 where the CPU has it.")] = "auto",
    device: Device = "cpu",
) -> None:
    """Fine-tune a real model on this machine in a few minutes and show what changed.

    QLoRA on SmolLM2-135M-Instruct over questions about Python's standard library; whole modules
    are held out. `make demo` runs it.

    Parameters
    ----------
    output_dir
        The run's directory; must be missing or empty.
    steps
        Optimizer steps of 16 rows.
    model
        A model of your own instead.
    """
    from lorax.demo import run_demo

    run_demo(out, output_dir, steps, model, dtype, device)


def _at_home(value: Any) -> Any:
    """A path, or several, with "~" for the home directory written out."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return value.expanduser() if isinstance(value, Path) else value


def parse_overrides(tokens: tuple[str, ...]) -> dict[str, Any]:
    """`--section.key value` or `--section.key=value`; values as in TOML, else as text."""
    overrides: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or "." not in key:
            raise UsageError(f"{token}: expected --section.key value, such as --train.epochs 2")
        if not equals:
            if not rest:
                raise UsageError(f"--{key}: its value is missing")
            value = rest.pop(0)
        overrides[key] = _toml_value(value)
    return overrides


def _toml_value(text: str) -> Any:
    from lorax.formats.toml_files import parse_toml

    try:
        values = parse_toml(f"value = {text}", "value")
    except FormatError:
        return text
    return values["value"] if len(values) == 1 else text


def _open(
    path: str,
    base: str | None,
    dtype: str,
    device: str,
    quantization: str | None,
    check_base: bool,
    resize_vocabulary: bool = False,
) -> tuple[Model, Tokenizer]:
    from lorax.formats.open_model import open_model

    return open_model(
        path,
        base,
        dtype=dtype,
        device=device,
        quantization=quantization,
        check_base=check_base,
        say=_tell,
        resize_vocabulary=resize_vocabulary,
    )


def _say(text: str) -> None:
    out.print(text, soft_wrap=True)


def _tell(text: str) -> None:
    """A line beside the results: on stderr, so that what reads stdout gets results alone."""
    err.print(text, style="dim", soft_wrap=True)


def _note(text: str) -> None:
    if err.is_terminal:
        err.print(text, soft_wrap=True)


def _show(found: Any) -> None:
    """One JSON object, or lines and tables in order."""
    if isinstance(found, dict):
        _print_json(found)
        return
    for part in found:
        if isinstance(part, str):
            _say(part)
        else:
            out.print(part)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))
