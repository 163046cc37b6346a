"""Small classifiers: a deeper ResNet extends the shallow one, whose weights keep their names."""

import pytest
import torch

from model_zoo.architectures import build


@pytest.mark.parametrize("side", [8, 14, 16])
def test_a_deeper_resnet_adds_blocks_without_stride(side):
    arguments = {"image_shape": (1, side, side), "num_classes": 10, "width": 4}
    shallow, deep = (build("resnet", arguments | {"depth": depth}).eval() for depth in (1, 3))
    assert (len(shallow.blocks), len(deep.blocks)) == (3, 9)
    assert list(build("resnet", arguments).state_dict()) == list(shallow.state_dict())
    images = torch.rand(2, 1, side, side)
    assert shallow.blocks(shallow.stem(images)).shape == deep.blocks(deep.stem(images)).shape
    assert deep(images).shape == (2, 10)
    assert sum(weight.numel() for weight in deep.parameters()) > 2 * sum(w.numel() for w in shallow.parameters())
