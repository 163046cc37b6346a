import pytest

from audit.errors import UnknownNameError, UsageError
from model_zoo.entries import ModelEntry, parse_fraction, parse_ref


def test_every_form_of_the_grammar_parses() -> None:
    assert parse_ref("timm:resnet18.a1_in1k").source == "timm"
    assert parse_ref("torchvision:resnet18").target == "resnet18"
    assert parse_ref("robustbench:cifar10/Linf/Standard").target == "cifar10/Linf/Standard"
    assert parse_ref("hf-hub:timm/resnet18").target == "timm/resnet18"
    assert parse_ref("bundled:resnet-standard").target == "resnet-standard"
    ref = parse_ref("file:../a/b.pth?arch=tests/nets.py:resnet2b&num_classes=10&mean=.4,.5,.6")
    assert ref.target == "../a/b.pth"
    assert ref.options == {"arch": "tests/nets.py:resnet2b", "num_classes": "10", "mean": ".4,.5,.6"}


def test_escaped_characters_of_a_file_are_read() -> None:
    assert parse_ref("file:a%3Fb.pth?name=x%26y").target == "a?b.pth"


def test_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model source 'tim'; did you mean 'timm'"):
        parse_ref("tim:resnet18")


def test_missing_source_lists_the_forms() -> None:
    with pytest.raises(UsageError, match=r"'resnet18' does not name its source; legal forms: timm:<name>"):
        parse_ref("resnet18")


@pytest.mark.parametrize(
    "ref",
    ["timm:", "timm:a/b", "torchvision:a/b/c", "robustbench:cifar10/Linf", "hf-hub:resnet", "bundled:../x", "file:"],
)
def test_malformed_targets_are_refused_with_the_expected_form(ref: str) -> None:
    with pytest.raises(UsageError, match=r"is malformed; write "):
        parse_ref(ref)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown option of a file: reference 'num_class'; did you mean"):
        parse_ref("file:a.pth?num_class=10")
    with pytest.raises(UnknownNameError, match=r"unknown option of a timm: reference"):
        parse_ref("timm:resnet18?num_classes=10")


def test_option_without_value_or_given_twice() -> None:
    with pytest.raises(UsageError, match=r"option 'mean' of .* has no value; write mean=\.\.\."):
        parse_ref("file:a.pth?mean=")
    with pytest.raises(UsageError, match="'name' is given twice"):
        parse_ref("file:a.pth?name=a&name=b")


@pytest.mark.parametrize(
    ("source", "dataset", "expected"),
    [
        ("robustbench", "imagenet", "imagenet:robustbench-5k"),
        ("robustbench", "cifar10", "cifar10"),
        ("torchvision", "imagenet", "imagenet"),
    ],
)
def test_the_data_set_of_published_numbers(source: str, dataset: str, expected: str) -> None:
    assert ModelEntry(ref="x", name="x", source=source, dataset=dataset).published_on == expected


def test_fractions() -> None:
    assert parse_fraction("8/255", "trained_eps") == 8 / 255
    for text in ("8/0", "eight", "1e999", "nan"):
        with pytest.raises(UsageError, match="trained_eps="):
            parse_fraction(text, "trained_eps")
