"""Several processes of one run, by torchrun's own launcher, forked from one that knows torch.

torchrun as a program starts an interpreter for each process, and each imports torch for seconds.
"""

import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

PRELOADED = ["lorax.training.loop"]  # not lorax.cli, which reads its rank as it is imported


def launch_lorax(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in so many processes; what all of them said, rank by rank.

    The exit code is 0, or 1 where a process failed, as torchrun's is.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    words, code = [str(argument) for argument in arguments], 0
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
            monitor_interval=0.1, start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL),
        )  # fmt: skip
        try:
            elastic_launch(config, _command)(words)
        except ChildFailedError:
            code = 1
        said = [
            "".join(path.read_text() for path in sorted(Path(folder).rglob(name)))
            for name in ("stdout.log", "stderr.log")
        ]
    return subprocess.CompletedProcess(words, code, *said)


def _command(words: list[str]) -> None:
    from lorax import cli

    sys.argv = ["lorax", *words]
    cli.main()
