"""From the sections of a benchmark to cells: one thing to audit each."""

from dataclasses import dataclass

from audit.adversary.threat import ThreatModel, threat_model
from audit.config.benchmark import BenchmarkConfig
from audit.config.settings import AuditSettings
from audit.config.yaml_source import read_config as read_config


@dataclass(frozen=True)
class Cell:
    """One thing to audit: a model at a layer under a threat model, on the first `images` images of a data set.

    The search of its worst case starts from the images that are worst for `after`, where there is such a cell.
    """

    ref: str
    name: str | None
    dataset: str
    images: int | None
    layer: str
    threat: ThreatModel
    settings: AuditSettings
    after: "Cell | None" = None


def cells(config: BenchmarkConfig) -> list[Cell]:
    """Return a benchmark's cells, all of one model together."""
    settings = dict(zip((section.shown for section in config.estimators), config.settings(), strict=True))
    return [
        Cell(
            ref=planned.model.ref,
            name=planned.model.name,
            dataset=planned.dataset,
            images=planned.images,
            layer=planned.layer,
            threat=threat_model(planned.norm, planned.eps),
            settings=settings[planned.estimator.shown],
        )
        for planned in config.planned()
    ]
