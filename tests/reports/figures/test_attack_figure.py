import pytest

from reports.figures.attack_figure import eps_curve

FOUND = {
    "model": "evil\x1b[31m", "norm": "linf", "eps": 0.2, "images": 40, "trustworthy": True,
    "natural_accuracy": 0.9, "natural_accuracy_low": 0.8, "natural_accuracy_high": 0.95, "adversarial_accuracy": 0.4,
    "eps_curve": [{"eps": 0.1, "adversarial_accuracy": 0.7, "low": 0.6, "high": 0.8},
                  {"eps": 0.2, "adversarial_accuracy": 0.45, "low": 0.3, "high": 0.6}],
}  # fmt: skip


def test_the_curve_starts_at_natural_accuracy_and_has_every_radius():
    (ax,) = eps_curve(FOUND).axes
    line = ax.lines[0]
    assert line.get_xdata().tolist() == [0, 0.1, 0.2]
    assert line.get_ydata().tolist() == [0.9, 0.7, 0.45]
    assert "measured" in ax.get_title()
    assert "\x1b" not in ax.get_title()
    assert ax.get_ylim() == (0, 1)


@pytest.mark.parametrize(("trusted", "inside", "said"), [(True, "black", "measured"), (False, "white", "upper bound")])
def test_an_attack_that_is_not_trusted_is_hollow_and_called_a_bound(trusted, inside, said):
    (ax,) = eps_curve({**FOUND, "trustworthy": trusted}).axes
    (mark,) = [line for line in ax.lines if line.get_marker() == "D"]
    assert mark.get_markerfacecolor() == inside
    assert said in ax.get_title()
    assert "0.400 of 40 images" in ax.get_legend().get_texts()[0].get_text()
