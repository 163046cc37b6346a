from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from scipy import stats

from reports.figures.agreement_figure import agreement_figure
from reports.statistics.agreement import agreements
from reports.tables.table import to_frame

NAMES = ["sandwich", "label-information", "label-level", "mine-infonce", "ref-local", "ref-mean"]


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def rvs(records, estimator):
    return [record.rv for record in records if record.estimator == estimator]


def test_every_pair_has_scipys_tau_over_the_models(suite):
    records = suite()
    (found,) = agreements(to_frame(records))
    assert list(found.estimators) == NAMES
    assert len(found.taus) == 15
    for (one, other), tau in found.taus.items():
        theirs = stats.kendalltau(rvs(records, one), rvs(records, other), method="exact")
        assert (tau.value, tau.p, tau.n) == pytest.approx((theirs.statistic, theirs.pvalue, 8))
    assert found.tau("ref-mean", "sandwich") == found.tau("sandwich", "ref-mean")


def test_a_reversed_order_is_minus_one(suite):
    records = suite(estimators=["sandwich", "mine-infonce"])
    order = {record.model: record.rv for record in records if record.estimator == "sandwich"}
    turned = [replace(r, rv=-order[r.model]) if r.estimator == "mine-infonce" else r for r in records]
    (found,) = agreements(to_frame(turned))
    assert found.tau("sandwich", "mine-infonce").value == pytest.approx(-1)


def test_models_contradicted_for_either_do_not_count_and_missing_ones_neither(suite):
    records = suite(estimators=["sandwich", "mine-infonce", "label-level"])
    by = {(r.model, r.estimator): i for i, r in enumerate(records)}
    models = sorted({record.model for record in records})
    records[by[models[0], "sandwich"]] = replace(records[by[models[0], "sandwich"]], flags=("contradicted: planted",))
    records[by[models[1], "mine-infonce"]] = replace(records[by[models[1], "mine-infonce"]], status="failed", rv=None)
    del records[by[models[2], "mine-infonce"]]
    (found,) = agreements(to_frame(records))
    counts = {pair: tau.n for pair, tau in found.taus.items()}
    assert counts == {
        ("sandwich", "label-level"): 7,
        ("sandwich", "mine-infonce"): 5,
        ("label-level", "mine-infonce"): 6,
    }
    assert [found.firmness[name].models for name in found.estimators] == [7, 8, 6]


@pytest.mark.parametrize(("models", "value", "p"), [(2, False, False), (4, True, False), (5, True, True)])
def test_few_models_are_refused(suite, models, value, p):
    (found,) = agreements(to_frame(suite(models=models, estimators=["sandwich", "mine-infonce"])))
    tau = found.tau("sandwich", "mine-infonce")
    assert (tau.value is not None, tau.p is not None) == (value, p)
    assert bool(tau.note) == (not p)


def test_settings_are_apart_and_one_estimator_has_nothing_to_agree_with(suite):
    assert [a.title for a in agreements(to_frame(suite(radii=(0.05, 0.2))))] == [
        "digits, penultimate, ℓ∞ 0.05",
        "digits, penultimate, ℓ∞ 0.2",
    ]
    alone = to_frame(suite(estimators=["sandwich"]))
    assert agreements(alone) == []
    assert agreement_figure(alone) is None


def test_firmness_is_the_median_error_and_the_spread_between_models(suite):
    records = suite(estimators=["sandwich", "ref-local"])
    changed = [replace(r, rv_se=0.5) if i == 0 else r for i, r in enumerate(records)]
    (found,) = agreements(to_frame(changed))
    firm = found.firmness["sandwich"]
    assert firm.error == 0.01
    assert firm.spread == pytest.approx(np.std(rvs(records, "sandwich"), ddof=1))
    assert (firm.ranks, found.firmness["ref-local"].ranks) == (True, False)


def test_hostile_estimators_are_drawn(suite):
    records = suite(models=3, estimators=["sandwich", "mine-infonce"])
    names = {"sandwich": "\x1b[31m_模型", "mine-infonce": "$x^2$ <script>"}
    shown = texts(agreement_figure(to_frame([replace(r, estimator=names[r.estimator]) for r in records])))
    assert " _??" in shown
    assert "$x^2$ <script>" in shown


def test_the_figure_writes_numbers_counts_and_its_kind(suite):
    records = suite(models=8, estimators=["sandwich", "mine-infonce", "ref-local"])
    (found,) = agreements(to_frame(records))
    shown = texts(agreement_figure(to_frame(records)))
    assert f"{found.tau('sandwich', 'mine-infonce').value:.2f}\nn = 8" in shown
    assert any("Kendall's tau-b of RV (estimate)" in text for text in shown)
    assert "± 0.120\nn = 8" in shown
    assert "ref-local *" in shown
    few = texts(agreement_figure(to_frame(suite(models=2, estimators=["sandwich", "mine-infonce"]))))
    assert "–\nn = 2" in few
