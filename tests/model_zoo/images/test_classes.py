"""Classes of a data set mapped to the outputs of a network."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.errors import EnvironmentFault, MismatchError, UsageError
from model_zoo.images.classes import ClassMap, Outputs, map_classes
from model_zoo.images.datasets import ImageSet, load_images, with_outputs
from model_zoo.libraries import imagenet_names
from model_zoo.lookup import check_dataset

ANIMALS = Outputs("net", 5, ("cat", "dog", "great white shark", "ant", "eel"))
IMAGENET = Outputs("net", 1000)


def image_set(classes: tuple[str, ...], labels: list[int], ref: str = "folder:photos") -> ImageSet:
    images = torch.zeros(len(labels), 1, 2, 2)
    return ImageSet(images, torch.tensor(labels), classes, ref, "test", tuple(range(len(labels))), "0" * 64)


@pytest.mark.parametrize(
    ("classes", "outputs"),
    [
        (("n01440764", "n01491361", "n15075141"), (0, 3, 999)),
        (("n15075141", "n01440764"), (999, 0)),
        (("n02129165",), (291,)),
    ],
)
def test_wnids_are_places_in_the_sorted_list(classes: tuple[str, ...], outputs: tuple[int, ...]) -> None:
    assert map_classes(classes, IMAGENET, "folder:x") == ClassMap(outputs, "wnid")
    assert [imagenet_names(1000)[place][0] for place in outputs] == list(classes)


@pytest.mark.parametrize(
    ("classes", "outputs"),
    [
        (("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue"), (0, 999)),
        (("lion", "Tench", "goldfish"), (291, 0, 1)),
        (("great_white_shark", "tiger shark"), (2, 3)),
    ],
)
def test_names_of_imagenet_are_found_whatever_their_spelling(classes: tuple[str, ...], outputs: Any) -> None:
    assert map_classes(classes, IMAGENET, "folder:x") == ClassMap(outputs, "name")


@pytest.mark.parametrize("name", ["crane", "maillot"])
def test_names_that_two_classes_share_are_not_guessed(name: str) -> None:
    """`crane` is a bird and a machine."""
    assert sum(text.split(",")[0] == name for _, text in imagenet_names(1000)) == 2
    with pytest.raises(MismatchError, match=f"the classes tench, {name} are not among the outputs"):
        map_classes(("tench", name), IMAGENET, "folder:x")


@pytest.mark.parametrize(
    ("classes", "outputs"),
    [
        (("ant", "cat"), (3, 0)),
        (("Great_White_Shark",), (2,)),
        (("eel", "ant", "great white  shark", "dog", "cat"), (4, 3, 2, 1, 0)),
    ],
)
def test_names_of_the_networks_outputs_come_first(classes: tuple[str, ...], outputs: tuple[int, ...]) -> None:
    assert map_classes(classes, ANIMALS, "folder:x") == ClassMap(outputs, "name")


@pytest.mark.parametrize("names", [("a", "b", "c"), ("n01440764", "x", "y"), ("0", "1", "2")])
def test_as_many_classes_as_outputs_keep_their_order(names: tuple[str, ...]) -> None:
    assert map_classes(names, Outputs("net", 3), "folder:x") == ClassMap((0, 1, 2), "order")


@pytest.mark.parametrize(("classes", "outputs"), [(3, 5), (1, 2), (999, 1001)])
def test_fewer_numbers_than_outputs_are_refused(classes: int, outputs: int) -> None:
    names = tuple(map(str, range(classes)))
    with pytest.raises(MismatchError, match=f"has {outputs} outputs, data set npz:a has {classes} classes"):
        map_classes(names, Outputs("net", outputs), "npz:a", numbered=True)


@pytest.mark.parametrize(("classes", "outputs"), [(3, 1000), (900, 1000), (20_000, 21_843)])
def test_numbers_without_names_are_imagenets(classes: int, outputs: int) -> None:
    names = tuple(map(str, range(classes)))
    found = map_classes(names, Outputs("net", outputs), "npz:a", numbered=True)
    assert found == ClassMap(tuple(range(classes)), "number")
    with pytest.raises(MismatchError, match=f"has {outputs} outputs, data set npz:a has {classes} classes"):
        map_classes(names, Outputs("net", outputs), "npz:a")


@pytest.mark.parametrize(
    ("classes", "outputs", "sentence"),
    [
        (
            ("cow", "hen"),
            ANIMALS,
            r"the classes cow, hen are not among the outputs cat, dog, great white shark, \.\.\.; say",
        ),
        (("cow",), IMAGENET, r"the classes cow are not among the outputs n01440764 \(tench, Tinca tinca\), n01443537"),
        (
            ("cow",),
            Outputs("net", 7),
            r"net has 7 outputs, data set folder:x has 1 classes: .* folder:x\?classes=map\.json",
        ),
        (tuple("abcdefgh"), Outputs("net", 7), "net has 7 outputs, data set folder:x has 8 classes$"),
    ],
)
def test_classes_that_cannot_be_mapped_are_named(classes: tuple[str, ...], outputs: Outputs, sentence: str) -> None:
    with pytest.raises(MismatchError, match=sentence):
        map_classes(classes, outputs, "folder:x")


@pytest.mark.parametrize(
    ("held", "outputs", "expected"),
    [
        ({"cow": 2, "hen": 0}, Outputs("net", 3), (2, 0)),
        ({"cow": "eel", "hen": "ant", "pig": 1}, ANIMALS, (4, 3)),
        ({"cow": 1, "hen": 1}, Outputs("net", 2), (1, 1)),
        (["a", "hen", "b", "cow"], Outputs("net", 4), (3, 1)),
    ],
)
def test_a_map_in_a_file_decides(tmp_path: Path, held: Any, outputs: Outputs, expected: tuple[int, ...]) -> None:
    (tmp_path / "map.json").write_text(json.dumps(held))
    images = image_set(("cow", "hen"), [1, 0, 1], f"folder:photos?classes={tmp_path / 'map.json'}")
    found = with_outputs(images, outputs)
    assert found.class_map is not None
    assert found.class_map.outputs == expected
    assert found.labels.tolist() == [expected[1], expected[0], expected[1]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"cow": 1}', "has no entry for the class 'hen' of folder:photos; it has cow"),
        ('{"cow": 1, "hen": 3}', "maps 'hen' to 3; net has the outputs 0 to 2"),
        ('{"cow": 1, "hen": true}', "maps 'hen' to True"),
        ('{"cow": 1, "hen": "fowl"}', "maps 'hen' to 'fowl'"),
        ('["a"]', "names 1 outputs, net has 3"),
        ("[1, 2", "is not JSON; write a mapping such as"),
        ("7", "is neither a mapping from classes to outputs, nor a list"),
    ],
)
def test_faults_of_a_map(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "map.json").write_text(text)
    images = image_set(("cow", "hen"), [0], f"folder:photos?classes={tmp_path / 'map.json'}")
    with pytest.raises(UsageError, match=sentence):
        with_outputs(images, Outputs("net", 3))


def test_a_map_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    ref = f"folder:{tmp_path / 'photos'}?classes={tmp_path / 'none.json'}"
    with pytest.raises(EnvironmentFault, match=r"class map .*none\.json does not exist"):
        with_outputs(image_set(("cow",), [0], ref), Outputs("net", 3))
    with pytest.raises(EnvironmentFault, match=r"none\.json does not exist"):
        check_dataset(ref)


@pytest.mark.parametrize("labels", [[0, 1, 2], [2, 2, 0], [1]])
def test_labels_become_outputs_or_outputs_are_restricted(labels: list[int]) -> None:
    images = image_set(("eel", "cat", "ant"), labels)
    mapped, restricted = with_outputs(images, ANIMALS), with_outputs(images, ANIMALS, restrict=True)
    assert mapped.labels.tolist() == [(4, 0, 3)[label] for label in labels]
    assert mapped.sha256 != images.sha256
    assert mapped.label_count == 5
    assert restricted.labels.tolist() == labels
    assert restricted.label_count == 3
    assert restricted.class_map == ClassMap((4, 0, 3), "name", restricted=True)
    shown = {"mapped_by": "name", "count": 3, "competing": "all outputs"}
    assert mapped.described() == {"classes": shown}
    assert restricted.described() == {"classes": {**shown, "competing": "the data set's classes"}}


def test_images_that_need_no_map_stay_as_they_were() -> None:
    digits = load_images("digits")
    for restrict in (False, True):
        found = with_outputs(digits, Outputs("net", 10), restrict=restrict)
        assert (found.sha256, found.described()) == (digits.sha256, {})
        assert replace(found, class_map=None).labels is digits.labels


def test_few_classes_are_mapped_without_timm():
    assert len(imagenet_names(1000)) == 1000  # loads timm without its warnings
    from timm.data.imagenet_info import _NUM_CLASSES_TO_SUBSET

    assert min(_NUM_CLASSES_TO_SUBSET) == 1000
    code = (
        "import sys; from model_zoo.images.classes import Outputs, map_classes; "
        "print(map_classes(['a', 'b'], Outputs('net', 2), 'x').by, 'timm' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["order", "False"]
