"""The report: one self-contained HTML file that opens offline and runs nothing but its own script."""

import base64
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

import pandas as pd
from jinja2 import DictLoader, Environment, StrictUndefined
from matplotlib.figure import Figure

from audit.flags import FlagCode
from audit.records import AuditRecord, CalibrationRow
from reports.estimators import place
from reports.figures.all_figures import agreement_figure, calibration_figure
from reports.page.boards import concords, settings, trials
from reports.page.cells import headers_of
from reports.page.drawings import spark
from reports.page.model_pages import anchors, model_pages
from reports.page.opening import flagged, opening
from reports.page.origin import versions
from reports.page.pictures import Picture, picture, pictures
from reports.page.side_by_side import Other, side_by_side
from reports.statistics.sentences import family_order, summary
from reports.tables.calibration import calibration_sentence, failed_calibration
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame
from reports.text import plain_text, short_name, shorten

_TEMPLATE = "report.html.j2"
_PARTS = (_TEMPLATE, "models.html.j2")
_LONGEST = 2000  # characters of one value of a record


def render_report(
    records: Sequence[AuditRecord],
    calibration: Sequence[CalibrationRow] = (),
    left: Sequence[str] = (),
    origin: Sequence[tuple[str, str]] = (),
    other: Other | None = None,
) -> str:
    """Return the HTML report of records and of their estimators' calibration; the same ones give the same bytes.

    `left` are sentences about what else lies in the run folder, `origin` facts about the run for the head of the page,
    `other` another run to show beside this one; raises UsageError where the two share no cell.
    """
    frame = leaderboard(to_frame(records))
    css, js = _asset("report.css"), _asset("report.js")
    template = _environment().get_template(_TEMPLATE)
    pages, boards = model_pages(records, frame), settings(frame, calibration)
    links, views = anchors(pages), {board.title: board.view for board in boards}
    counts, *findings = summary(frame)
    leading = next((board.title for board in boards if board.leading), "")
    return template.render(
        policy=_policy(css, js),
        css=css,
        js=js,
        headers=headers_of(frame),
        alone=len(pages) == 1,
        origin=[*origin, *versions(records)],
        summary=[counts, *opening(records, frame, leading), *findings],
        notices=[*_notices(records), *_uncalibrated(frame, calibration), *left],
        settings=boards,
        order=family_order(frame).to_dict(orient="records"),
        pictures=pictures(frame, links, views),
        concords=[] if len(pages) == 1 else concords(frame),  # of one model there is no order
        agreement=_optional("Agreement of estimators", agreement_figure(frame), _AGREEMENT),
        trials=trials(calibration),
        calibrated=_optional("Calibration", calibration_figure(calibration), _CALIBRATION),
        flags=flagged(frame),
        failures=_failures(frame),
        attacks=sorted({plain_text(attack) for attack in frame["attack"]}),
        models=pages,
        links=links,
        views=views,
        compared=side_by_side(records, other) if other else None,
        headed=any(record.adversarial_head or record.best_head for record in records),
        certified=any(bound is not None for each in records for bound in (each.certified_bound, each.proved_share)),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=DictLoader({name: _asset(name) for name in _PARTS}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=_plain, spark=spark, anchor=_anchor)
    return environment


def _asset(name: str) -> str:
    return (files("reports") / "page" / "templates" / name).read_text(encoding="utf-8")


def _policy(css: str, js: str) -> str:
    style, script = (base64.b64encode(sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _notices(records: Sequence[AuditRecord]) -> list[str]:
    """Return one sentence for every reason to read some models' numbers with care, with the models it concerns."""
    found = {
        "User code was trusted to build: {}.": [r for r in records if r.code_trusted],
        "No hash of the weights was known beforehand for: {}.": [r for r in records if not r.weights_pinned],
        "The adversarial accuracy is an upper bound, because the attack failed a trust check, for: {}. They are not "
        "ranked.": [r for r in records if FlagCode.UNTRUSTED in r.codes],
        "The worst-case information is an upper bound, because its search failed a trust check, for: {}. They are not "
        "ranked.": [r for r in records if FlagCode.UNTRUSTED_SEARCH in r.codes],
        "The number of images limits the estimate too much to say anything of: {}. They are not ranked.": [
            r for r in records if FlagCode.SATURATED in r.codes
        ],
        "Failed a sanity check, so broken or not what they claim to be: {}. They are not ranked.": [
            r for r in records if r.gated
        ],
    }
    return [
        sentence.format(", ".join(sorted({short_name(record.model) for record in concerned})))
        for sentence, concerned in found.items()
        if concerned
    ]


_AGREEMENT = (
    "Kendall's tau-b (estimate) of the RVs of every two estimators, with the number of models it is over; the lines "
    "under it say the same in words."
)
_CALIBRATION = (
    "Estimate less truth (nats, measured) on channels whose information is known, normal and worst case; grey is the "
    "tolerance, a cross a failure."
)


def _uncalibrated(frame: pd.DataFrame, calibration: Sequence[CalibrationRow]) -> list[str]:
    failed = [name for name in sorted(set(frame["estimator"]), key=place) if failed_calibration(calibration, name)]
    return [f"{plain_text(name)}: {calibration_sentence(calibration, name)}." for name in failed]


def _optional(title: str, figure: Figure | None, words: str) -> Picture | None:
    return None if figure is None else picture(title, figure, words)


def _failures(frame: pd.DataFrame) -> list[tuple[str, str]]:
    failed = frame[~frame["status"].eq("valid")]
    pairs = zip(failed["model"], failed["status"], strict=True)
    return [(plain_text(model), plain_text(status).removeprefix("failed: ")) for model, status in pairs]


def _anchor(code: str) -> str:
    """Return a flag's code as part of an identifier; those of other programs may hold anything."""
    return re.sub(r"[^a-z0-9_]+", "-", code.lower())


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return shorten(plain_text(str(value)), _LONGEST)
