"""The command line: parses, calls, prints; no logic. One file a command, or a group of them.

    program.py     the app, and `main`: errors to lines, exit codes
    options.py     the options that several commands share
    overrides.py   a recipe with what the command line says of its keys
    plugins.py     --plugin, which every command takes
    terminal.py    where results and remarks go

A new command is a function in a file of its own and a line below. Nothing here may import torch
before a command runs: each imports what it calls.
"""

from lorax.cli.adapter import adapter
from lorax.cli.demo import demo
from lorax.cli.estimate import estimate
from lorax.cli.evaluate import evaluate
from lorax.cli.export import export
from lorax.cli.generate import generate
from lorax.cli.inspect import inspect
from lorax.cli.merge import merge
from lorax.cli.overrides import parse_overrides as parse_overrides
from lorax.cli.program import app as app
from lorax.cli.program import main as main
from lorax.cli.quantize import quantize
from lorax.cli.serve import serve
from lorax.cli.terminal import out as out
from lorax.cli.train import train
from lorax.cli.verify import verify

COMMANDS = (train, generate, evaluate, merge, inspect, adapter, verify, quantize)
for command in (*COMMANDS, estimate, export, serve, demo):
    app.command(command)
