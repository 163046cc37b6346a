"""Adversarial accuracy of one attacked model against eps."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from reports.figures.style import paper_style
from reports.text import format_eps, plain_text, shorten

_SAID = {True: "measured, smoke tier; bars are 95 % Wilson intervals", False: "an upper bound: attack not trustworthy"}


def eps_curve(found: Mapping[str, Any]) -> Figure:
    """Return the adversarial accuracies (measured) of `attack.json` against eps, in pixel units.

    The larger mark is the tier's own, at the radius asked for; an attack that failed a trust check gives a hollow one.
    """
    rungs = [{"eps": 0.0, "adversarial_accuracy": found["natural_accuracy"], "low": found["natural_accuracy_low"],
              "high": found["natural_accuracy_high"]}, *found["eps_curve"]]  # fmt: skip
    radii, values = [rung["eps"] for rung in rungs], [rung["adversarial_accuracy"] for rung in rungs]
    below = [max(0.0, rung["adversarial_accuracy"] - rung["low"]) for rung in rungs]
    above = [max(0.0, rung["high"] - rung["adversarial_accuracy"]) for rung in rungs]
    with paper_style():
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        ax = figure.subplots()
        ax.errorbar(
            radii, values, yerr=[below, above], marker="o", markersize=3, linewidth=1, elinewidth=0.6, capsize=2
        )
        inside = "black" if found["trustworthy"] else "white"
        ax.plot(found["eps"], found["adversarial_accuracy"], "D", color="black", markerfacecolor=inside, markersize=5,
                clip_on=False, label=_tier(found))  # fmt: skip
        ax.set_xticks(radii, [format_eps(eps) for eps in radii], rotation=45)
        ax.set_xlabel(f"eps ({found['norm']}, pixels in [0, 1])")
        ax.set_ylabel("accuracy under attack (measured)")
        ax.set_ylim(0, 1)
        ax.set_title(f"{shorten(plain_text(found['model']), 40)}\n{_SAID[found['trustworthy']]}", fontsize=7.5)
        ax.legend(frameon=False, loc="upper right")
    return figure


def _tier(found: Mapping[str, Any]) -> str:
    return f"whole attack: {found['adversarial_accuracy']:.3f} of {found['images']} images"
