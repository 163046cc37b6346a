"""Disturbs runs of a benchmark, as a program: kills them at random moments, gives them company, sends them signals.

One process imports everything and forks the runs, so that thirty kills take seconds. Prints where the results lie.
"""

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
from audit.run.cell import read_config
from audit.run.cell_runner import Watcher
from audit.run.run_loop import expand, run
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
    """Kill so many runs, then let one finish; return its folder. Where a run gets through, the next begins elsewhere.

    Every cell that was computed stands in `computed.txt` beside the folder.
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
    """Send a signal to the command after its first cell; return its exit code and how long it took to end."""
    out, into = os.pipe()

    def work() -> int:
        os.dup2(into, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
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
    short, long, place = map(Path, sys.argv[1:])
    audit.run.intermediate.SECONDS = -1.0  # parts of cells are in the way of kills, too
    told = {
        "alone": str(killed(short, place / "alone" / "run", 30, 1)),
        "two": str(killed(short, place / "two" / "run", 12, 2)),
        "company": str(killed(short, place / "company" / "run", 0, 2)),
        "SIGTERM": signalled(long, place / "SIGTERM", signal.SIGTERM),
        "SIGINT": signalled(long, place / "SIGINT", signal.SIGINT),
    }
    sys.stdout.write(json.dumps(told))
