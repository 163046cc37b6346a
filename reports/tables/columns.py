"""Columns of the leaderboard: meaning, unit and kind of each. Stdlib only."""

import csv
from dataclasses import dataclass
from io import StringIO

NO_RESULT = "no result"


@dataclass(frozen=True)
class Column:
    """One column: its name, unit, what it means, and the kind of the result it holds ("" where it holds none)."""

    name: str
    unit: str
    meaning: str
    kind: str = ""


def _estimate(name: str, unit: str, meaning: str) -> Column:
    return Column(name, unit, meaning, "estimate")


def _certified(name: str, unit: str, meaning: str) -> Column:
    return Column(name, unit, meaning, "certified")


def _measured(name: str, unit: str, meaning: str) -> Column:
    return Column(name, unit, meaning, "measured")


RANK = _estimate("rank", "place", "place by RV in its group, 1 the least vulnerable; or unranked")

# the floor follows from measured accuracies alone, which is why it can refute an estimate
_COLUMNS = (
    Column("model", "text", "name or reference of the model"),
    Column("source", "text", "where the model comes from"),
    Column("family", "text", "architecture family"),
    Column("training", "text", "how the model was trained: standard, robust, certified or unknown"),
    Column("trained_eps", "pixel units", "radius the model was trained for, 0 where none"),
    Column("dataset", "text", "images audited on"),
    Column("layer", "text", "the representation g"),
    Column("norm", "text", "norm of the ball"),
    Column("eps", "pixel units", "radius of the ball, images in [0, 1]"),
    Column("num_classes", "count", "classes K"),
    Column("seeds", "count", "seeds averaged over"),
    Column("images", "count", "images the accuracies were measured on"),
    Column("estimator", "text", "how the information was estimated"),
    Column("quantity", "text", "what the nats are nats of"),
    Column("ranks", "yes or no", "whether the estimator claims to rank models"),
    _estimate("normal_nats", "nats", "the quantity on the images as they are"),
    _estimate("normal_nats_se", "nats", "standard error of normal_nats over seeds and samples"),
    _estimate("worst_nats", "nats", "the quantity on the worst images found in the balls"),
    _estimate("worst_nats_se", "nats", "standard error of worst_nats over seeds and samples"),
    _estimate("rv", "nats", "representation vulnerability, normal_nats - worst_nats"),
    _estimate("rv_se", "nats", "standard error of rv over seeds and samples"),
    _estimate("rv_by_seed", "nats", "rv of each seed, as seed=nats pairs"),
    _estimate("ceiling_nats", "nats", "the most the estimator could have said of so many images"),
    _measured("floor_nats", "nats", "the least normal_nats that measured answers allow"),
    _estimate("adversarial_accuracy_bound", "fraction", "Theorem 3.4 as printed, from worst_nats: an estimated bound"),
    _estimate("fano_accuracy_bound", "fraction", "exact Fano bound on any head, from worst_nats: an estimated bound"),
    _estimate("adversarial_risk_bound", "fraction", "1 - adversarial_accuracy_bound"),
    _certified("certified_bound", "fraction", "no head on the layer keeps more of these images right"),
    _certified("certified_bound_population", "fraction", "nor of all images of their kind, with 95 % confidence"),
    Column("certified_tier", "text", "what the same features means in the certificate"),
    Column("best_head", "text", "the best head found: own, or trained on the layer (slf, mlp, alf)"),
    _measured("best_head_accuracy", "fraction", "share it keeps under the attack"),
    _certified("proved_share", "fraction", "share that no image in the ball makes the network misclassify, proved"),
    _certified("not_broken_share", "fraction", "share without a known adversarial image; the accuracy is at most this"),
    _certified("kept_population_low", "fraction", "adversarial accuracy on all images of their kind: at least this"),
    _certified("kept_population_high", "fraction", "and at most this, both with 95 % confidence"),
    _measured("natural_accuracy", "fraction", "share of the images answered rightly"),
    _measured("natural_accuracy_low", "fraction", "low end of its 95 % interval"),
    _measured("natural_accuracy_high", "fraction", "high end of its 95 % interval"),
    _measured("adversarial_accuracy", "fraction", "share answered rightly under the attack"),
    _measured("adversarial_accuracy_low", "fraction", "low end of its 95 % interval"),
    _measured("adversarial_accuracy_high", "fraction", "high end of its 95 % interval"),
    _measured("adversarial_gap", "fraction", "natural_accuracy - adversarial_accuracy"),
    Column("natural_head", "text", "of an encoder: the head on the layer with its natural accuracy (slf or alf)"),
    Column("adversarial_head", "text", "of an encoder: the head on the layer with its adversarial accuracy"),
    _measured("worst_probe_accuracy", "fraction", "share that the best classifier fitted on worst-case features gets"),
    _measured("worst_probe_accuracy_low", "fraction", "low end of its 95 % interval"),
    _measured("worst_probe_accuracy_high", "fraction", "high end of its 95 % interval"),
    Column("attack", "text", "the attack of adversarial_accuracy"),
    Column("attack_trust", "text", "trusted, upper bound (a trust check of the attack failed), or not checked"),
    Column("passes", "count", "passes of single images through the network, forward or backward"),
    Column("flags", "text", "what speaks against the row, with the numbers that say so"),
    Column("status", "text", "valid, or failed with the reason"),
    Column("weights_sha256", "text", "hash of the weights"),
    Column("cell_id", "text", "name of the record"),
)

COLUMNS = tuple(column.name for column in _COLUMNS)
KINDS = {column.name: column.kind for column in _COLUMNS if column.kind}
CERTIFICATE = tuple(name for name in COLUMNS if name.startswith(("certified_", "best_head")))
"""Columns that files leave out where no row has a certificate."""
LEDGER = ("proved_share", "not_broken_share", "kept_population_low", "kept_population_high")
PROBE = tuple(name for name in COLUMNS if name.startswith("worst_probe_"))
HEADS = ("natural_head", "adversarial_head")
OPTIONAL = (
    (CERTIFICATE, "certified_tier"),
    (LEDGER, "proved_share"),
    (PROBE, "worst_probe_accuracy"),
    (("passes",), "passes"),
    (HEADS, "adversarial_head"),
)
"""Groups of columns that files leave out where no row has a value, each with the column that decides it."""
UNITS = {column.name: column.unit for column in _COLUMNS}


def columns_csv() -> str:
    """Return the description of leaderboard.csv: column, kind, unit and meaning, one line a column."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("column", "kind", "unit", "meaning"))
    writer.writerows((c.name, c.kind or NO_RESULT, c.unit, c.meaning) for c in (RANK, *_COLUMNS))
    return buffer.getvalue()
