"""Calibration of an estimator in one sentence, for the header of its ranking."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from audit.records import CalibrationRow, read_calibration
from reports.text import plain_text, plural

NOT_CALIBRATED = "not calibrated"
_CASES = ("normal", "worst")


def calibration_of(folders: Iterable[Path]) -> list[CalibrationRow]:
    """Return the calibration rows of run folders, each once, in a fixed order; raises IntegrityError."""
    rows = {row: None for folder in folders for row in read_calibration(Path(folder))}
    return sorted(rows, key=lambda row: (row.estimator, row.channel, row.parameters, row.samples, repr(row)))


def calibration_sentence(rows: Sequence[CalibrationRow], estimator: str) -> str:
    """Return how many channels an estimator passed and its largest error in nats, or that it was not calibrated."""
    own = [row for row in rows if row.estimator == estimator]
    judged = [row for row in own if errors(row, judged_only=True)]
    if not own:
        return NOT_CALIBRATED
    if not judged:
        return f"calibration: {plural(len(own), 'channel')} shown, none with a verdict"
    failed = [row for row in judged if not row.passed]
    worst = max(failed or judged, key=_largest)
    if not failed:
        passed = f"passed on {len(judged)} of {plural(len(judged), 'channel')}"
        return f"calibration: {passed}, largest error {_largest(worst):.2f} nats{_unjudged(judged)}"
    return (
        f"FAILED calibration on {len(failed)} of {plural(len(judged), 'channel')} "
        f"(largest error {_largest(worst):.2f} nats on {channel_name(worst)})"
    )


def failed_calibration(rows: Sequence[CalibrationRow], estimator: str) -> bool:
    """Return whether an estimator failed on any channel."""
    return any(row.estimator == estimator and not row.passed for row in rows)


def errors(row: CalibrationRow, *, judged_only: bool = False) -> dict[str, float]:
    """Return estimate less truth in nats of each case, `normal` and `worst`, where both are known.

    `judged_only` leaves out the cases that have no tolerance.
    """
    found = {}
    for case in _CASES:
        value, truth = getattr(row, f"{case}_nats"), getattr(row, f"true_{case}_nats")
        if value is not None and truth is not None and not (judged_only and getattr(row, f"{case}_tolerance") is None):
            found[case] = value - truth
    return found


def verdict(row: CalibrationRow) -> str:
    """Return passed, failed, or that a channel is shown without a verdict."""
    if not errors(row, judged_only=True):
        return "no verdict"
    return "passed" if row.passed else "FAILED"


def channel_name(row: CalibrationRow) -> str:
    """Return a channel with its parameters."""
    return plain_text(f"{row.channel} {row.parameters}".strip())


def _unjudged(rows: Sequence[CalibrationRow]) -> str:
    """Name the channels without a verdict, so that "passed" does not seem to cover them."""
    judged = {case for row in rows for case in errors(row, judged_only=True)}
    return "".join(f" ({case} case only)" for case in judged) if len(judged) == 1 else ""


def _largest(row: CalibrationRow) -> float:
    return max(abs(error) for error in errors(row, judged_only=True).values())
