import pytest

from reports.text import format_eps, format_norm, plain_text, short_name, shorten, spreadsheet_text


@pytest.mark.parametrize(
    ("eps", "shown"),
    [
        (8 / 255, "8/255"),
        (2 / 255, "2/255"),
        (0.5 / 255, "0.5/255"),
        (7.5 / 255, "7.5/255"),
        (0.2, "0.2"),
        (0.3, "0.3"),
        (0.05, "0.05"),
        (1.0, "1"),
        (0.0, "0"),
        (8 / 255 * (1 + 1e-12), "8/255"),
        (8 / 255 * (1 + 1e-6), repr(8 / 255 * (1 + 1e-6))),
    ],
)
def test_eps_is_shown_as_people_write_it(eps, shown):
    assert format_eps(eps) == shown


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "\r\n@", "\u202e=", "\x1b[1m="])
def test_no_cell_starts_like_a_formula(start):
    assert spreadsheet_text(f"{start}1+1").startswith("'")


def test_plain_text_keeps_ordinary_names():
    name = "hf-hub:org/Résumé-模型 (v2) [x] $y$"
    assert plain_text(name) == name


@pytest.mark.parametrize("hidden", ["\x00", "\x1b", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800"])
def test_plain_text_hides_nothing(hidden):
    assert hidden not in plain_text(f"a{hidden}b")


def test_short_names():
    assert short_name("parquet:../data/cifar10-test-a.parquet") == "cifar10-test-a.parquet"
    assert short_name("torchvision:resnet18/DEFAULT") == "resnet18/DEFAULT"
    assert short_name("digits") == "digits"
    assert short_name("my:own") == "my:own"


def test_shorten_fits_the_width():
    for width in range(4, 40):
        assert len(shorten("abcdefghijklmnopqrstuvwxyz", width)) <= width


def test_norms_have_signs():
    assert [format_norm(norm) for norm in ("linf", "Linf", "l2", "wasserstein")] == ["ℓ∞", "ℓ∞", "ℓ2", "wasserstein"]
