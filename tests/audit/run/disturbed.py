"""Disturb benchmark runs, as a program: kill them at random times, run several in one folder, send signals.

One process imports everything and forks the runs, so that thirty kills take seconds. Prints the result folders.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import audit.run.intermediate
from audit.config.yaml_source import read_config
from audit.run.cell import expand
from audit.run.run_loop import Watcher, run
from reports.cli import main

DRAW = random.Random(7)
LONGEST = 0.35  # seconds until a kill


def forked(work: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(config: Path, folder: Path, kills: int, workers: int) -> Path:
    """Kill runs, then let one finish, and return its folder. After a run that finishes early, use a new one.

    The ids of all computed cells are in `computed.txt` beside the folder.
    """
    cells = expand(read_config(config))

    def done(record: object, known: bool) -> None:
        if not known:
            with (folder.parent / "computed.txt").open("a") as file:
                file.write(record.cell_id + "\n")

    def work() -> int:
        run(cells, folder, watcher=Watcher(done=done))
        return 0

    folder.mkdir(parents=True)
    count = 0
    while count < kills:
        children = [forked(work) for _ in range(workers)]
        time.sleep(DRAW.uniform(0.02, LONGEST))
        for child in children:
            os.kill(child, signal.SIGKILL)
            count += code_of(child) == -signal.SIGKILL
        if len(list((folder / "cells").glob("*.json"))) == len(cells):
            folder = folder.with_name(folder.name + "-")
            folder.mkdir()
    assert [code_of(child) for child in [forked(work) for _ in range(workers)]] == [0] * workers
    return folder


def signalled(config: Path, folder: Path, number: int) -> tuple[int, float]:
    """Send a signal to the command after its first cell; return its exit code and the seconds until it ended."""
    out, into = os.pipe()

    def work() -> int:
        os.dup2(into, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore SIGINT
        return main(["run", str(config), "--out", str(folder)])

    child = forked(work)
    os.close(into)
    with os.fdopen(out) as said:
        while not said.readline().startswith("[1/"):
            pass
        os.kill(child, number)
        started = time.monotonic()
        return code_of(child), time.monotonic() - started


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage: a fork need not walk and copy what was imported
    short, long, place = map(Path, sys.argv[1:])
    audit.run.intermediate.MIN_SECONDS = -1.0  # so that kills also meet intermediate results
    told = {
        "alone": str(killed(short, place / "alone" / "run", 30, 1)),
        "two": str(killed(short, place / "two" / "run", 12, 2)),
        "company": str(killed(short, place / "company" / "run", 0, 2)),
        "SIGTERM": signalled(long, place / "SIGTERM", signal.SIGTERM),
        "SIGINT": signalled(long, place / "SIGINT", signal.SIGINT),
    }
    sys.stdout.write(json.dumps(told))
