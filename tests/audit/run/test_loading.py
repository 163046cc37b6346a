"""Models and images on one device, and the memory they take."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audit.errors import MismatchError, UsageError
from audit.run.loading import RunOptions, batch_bytes, model_bytes, open_images, open_model, open_representation
from model_zoo.load import SourceSettings

REF = "bundled:digits-resnet-standard"
CPU = RunOptions(device="cpu")


def test_a_model_and_its_images_are_on_one_device() -> None:
    images = open_images("digits", CPU, CPU.request(60))
    model = open_model(REF, images, CPU)
    assert len(images.images) == 60
    assert {parameter.device for parameter in model.network.parameters()} == {images.images.device}
    assert open_representation(REF, images, CPU).num_classes == 10


def test_too_few_images_are_refused() -> None:
    images = open_images("digits", CPU, CPU.request(10))
    with pytest.raises(UsageError, match="10 images are too few: an audit needs at least 50"):
        open_model(REF, images, CPU)
    assert open_model(REF, images, CPU, min_images=10).num_classes == 10


def test_at_most_gives_all_images_of_a_smaller_data_set() -> None:
    every = open_images("digits", CPU)
    request = CPU.request(10**6)
    assert len(open_images("digits", CPU, request, at_most=True).images) == len(every.images)
    with pytest.raises(UsageError, match="images were asked for"):
        open_images("digits", CPU, request)


def test_memory_is_estimated_without_weights() -> None:
    images = open_images("digits", CPU, CPU.request(60))
    network = open_model(REF, images, CPU).network
    assert model_bytes(REF, "digits", CPU) == batch_bytes(network, images.images, 256)


FACTORY = """
from torch import nn, rand

def make(num_classes):
    {line}
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize(
    ("line", "available"), [("float(rand(1))", True), ("raise ValueError", False)], ids=["not on meta", "never"]
)
def test_a_network_that_needs_values_is_built_on_the_cpu(tmp_path: Path, line: str, available: bool) -> None:
    (tmp_path / "nets.py").write_text(FACTORY.format(line=line))
    torch.save({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, tmp_path / "w.pt")
    ref = f"file:{tmp_path / 'w.pt'}?arch={tmp_path / 'nets.py'}:make&num_classes=10"
    found = model_bytes(ref, "digits", RunOptions(SourceSettings(trust_code=True), device="cpu"))
    assert (found > 4 * 650) == available
    assert (found == 0) != available


def test_a_representation_refuses_images_of_another_size() -> None:
    images = open_images("digits", CPU, CPU.request(60))
    with pytest.raises(MismatchError, match="takes images of"):
        open_representation(REF, replace(images, images=images.images[..., :7]), CPU)
