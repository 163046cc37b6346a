"""Settings of label information: probes, the panel of readers, and the game against them. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from audit.information.settings import (
    FIXED,
    AtLeastTwo,
    Count,
    EstimatorSettings,
    NotNegative,
    Positive,
    Settings,
    Share,
    StepSize,
)


@dataclass(frozen=True)
class ProbeTraining(Settings):
    """Training of probes: number of `folds`, L2 `penalty` on the weights per sample, `hidden` units and `steps`."""

    subject: ClassVar[str] = "probe training"

    folds: AtLeastTwo = 5
    penalty: NotNegative = 1.0
    hidden: Count = 64
    steps: Count = 200


@dataclass(frozen=True)
class PanelSettings(Settings):
    """The panel of readers: `neighbours` that vote, `trees` of the forest, boosting iterations (`boosts`).

    All members but the linear one see at most `components` principal components of the features. Features are rounded
    to `grain` of their clean standard deviation: classes that a search drove to one point differ by rounding errors,
    which no head is meant to read.
    """

    subject: ClassVar[str] = "label panel"

    neighbours: Count = 20
    trees: Count = 100
    boosts: Count = 15
    components: Count = 64
    grain: Share = 1e-3


@dataclass(frozen=True)
class LabelInformationSettings(EstimatorSettings):
    """Settings of the information that features hold about labels: the panel that reads it, and the search.

    The search is a repeated game, from where densities of the classes are alike if that tells little. A round fits two
    probes on the present images, and then takes `steps` steps, from `relative_step` x eps down to a tenth of that,
    against the last `memory` probes. It ends when nothing is left, or when three rounds brought at most `gain` nats and
    the second half of all passes at most `tolerance` nats or one standard error, at the latest after `rounds` rounds.
    """

    subject: ClassVar[str] = "label-information"
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    probes: ProbeTraining = field(default_factory=ProbeTraining, metadata=FIXED)
    panel: PanelSettings = field(default_factory=PanelSettings, metadata=FIXED)
    rounds: Count = 30
    steps: Count = 7
    memory: Count = 9
    relative_step: StepSize = 0.3
    gain: Positive = 0.02
    tolerance: Positive = 0.05
    batch_size: Count = 256
