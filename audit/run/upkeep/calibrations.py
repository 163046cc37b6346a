"""Calibrate several estimators at once, in several processes: no channel waits for another one."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from audit.calibration.calibrate import ChannelProgress, Extent, applicable_channels, calibrate, calibrate_channel
from audit.errors import EnvironmentFault
from audit.information.estimator import Estimator
from audit.records import CalibrationRow


class _Task(NamedTuple):
    """A channel of an estimator, both by their numbers."""

    estimator: int
    channel: int


def calibrate_all(
    estimators: Sequence[Estimator], extent: Extent, processes: int, progress: ChannelProgress
) -> Iterator[tuple[int, list[CalibrationRow]]]:
    """Yield the number of every estimator with its rows, as soon as they are complete.

    With more than one process, each computes a channel in one thread. Raises EnvironmentFault if a process ends without
    a result.
    """
    if processes == 1:
        return _one_by_one(estimators, extent, progress)
    return _in_processes(estimators, extent, processes, progress)


def _one_by_one(
    estimators: Sequence[Estimator], extent: Extent, progress: ChannelProgress
) -> Iterator[tuple[int, list[CalibrationRow]]]:
    before = 0
    for number, each in enumerate(estimators):
        yield number, (rows := calibrate(each, extent=extent, progress=_counting_on(each.name, before, progress)))
        before += len(rows)


def _counting_on(name: str, before: int, progress: ChannelProgress) -> ChannelProgress:
    return lambda channel, done: progress(f"{name}: {channel}", before + done)


def _in_processes(
    estimators: Sequence[Estimator], extent: Extent, processes: int, progress: ChannelProgress
) -> Iterator[tuple[int, list[CalibrationRow]]]:
    from audit.run.processes import sharing_environment

    counts = [len(applicable_channels(each, extent)) for each in estimators]
    found = [dict[int, CalibrationRow]() for _ in estimators]
    yield from ((number, []) for number, count in enumerate(counts) if count == 0)
    # the last channels have the largest images and take longest: they come first
    tasks = [_Task(one, channel) for one, count in enumerate(counts) for channel in range(count)][::-1]
    with sharing_environment(), _pool(processes) as pool:
        futures = {pool.submit(_row, estimators[task.estimator], extent, task.channel): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                task, row = futures[future], future.result()
                progress(f"{row.estimator}: {row.channel}, {row.parameters}", done)
                rows = found[task.estimator]
                rows[task.channel] = row
                if len(rows) == counts[task.estimator]:
                    yield task.estimator, [rows[channel] for channel in sorted(rows)]
        except BrokenProcessPool as fault:
            message = "a process of the calibration ended without a result, perhaps for lack of memory: use --jobs 1"
            raise EnvironmentFault(message) from fault
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pool(processes: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a traceback
    torch.set_num_threads(1)


def _row(estimator: Estimator, extent: Extent, number: int) -> CalibrationRow:
    return calibrate_channel(estimator, applicable_channels(estimator, extent)[number], extent)
