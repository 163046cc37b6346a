"""Records as a collection: those of one call or of run folders, with their table, ranking and figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self, overload

import pandas as pd
from matplotlib.figure import Figure

from audit.errors import UsageError
from audit.records import AuditRecord, RecordStore, read_records
from reports.figures.gap_figure import figure1
from reports.figures.information_figure import figure2
from reports.tables.closing import closing_table
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame


class AuditRecords(Sequence[AuditRecord]):
    """Records in order: an immutable sequence that a notebook shows as a table; `+` joins two of them.

    MI values are in nats, accuracies are fractions in [0, 1]. Raises UsageError for values that are no records.
    """

    def __init__(self, records: Iterable[AuditRecord]) -> None:
        self._records = tuple(records)
        for record in self._records:
            if not isinstance(record, AuditRecord):
                raise UsageError(f"a {type(record).__name__} is no AuditRecord: {record!r}")

    @classmethod
    def read(cls, *folders: str | Path) -> Self:
        """Return the records of run folders; raises EnvironmentFault if one has none, IntegrityError if damaged."""
        return cls(read_records(*map(Path, folders)))

    @overload
    def __getitem__(self, index: int) -> AuditRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "AuditRecords": ...
    def __getitem__(self, index: int | slice) -> "AuditRecord | AuditRecords":
        return AuditRecords(self._records[index]) if isinstance(index, slice) else self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __add__(self, others: Iterable[AuditRecord]) -> "AuditRecords":
        return AuditRecords([*self, *others])

    def __eq__(self, other: object) -> bool:
        return self._records == other._records if isinstance(other, AuditRecords) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(record.cell_id for record in self))

    def __repr__(self) -> str:
        models = dict.fromkeys(record.model for record in self)
        return f"<AuditRecords: {len(self)} of {', '.join(models)}>"

    def _repr_html_(self) -> str:
        return closing_table(self).html

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy frame with one row a record, as `reports.to_frame`."""
        return to_frame(self)

    def leaderboard(self) -> pd.DataFrame:
        """Return the rows ranked by RV (nats) inside each data set, layer, threat model and estimator."""
        return leaderboard(self.to_frame())

    def figure1(self) -> Figure:
        """Return RV (nats) against the adversarial gap."""
        return figure1(self.leaderboard())

    def figure2(self) -> Figure:
        """Return information (nats) against accuracy, normal and worst case."""
        return figure2(self.leaderboard())

    def write(self, folder: str | Path) -> list[Path]:
        """Store the records in a folder with leaderboard, figures and report.html, and return the reports' paths.

        Raises UsageError where the folder holds other records, EnvironmentFault where it cannot be written to.
        """
        from reports.publish import write_reports  # loads every figure and the page

        store, ids = RecordStore(Path(folder)), {record.cell_id for record in self}
        if any(record.cell_id not in ids for record in store):
            raise UsageError(f"{folder} holds records of another audit: choose another folder")
        for record in self:
            store.write(record)
        store.write_plan(ids)
        return write_reports(store.folder)
