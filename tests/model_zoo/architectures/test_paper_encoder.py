"""The encoder of the paper: layer sizes, and its features below a head."""

import pytest
import torch

from audit.errors import UsageError
from audit.representation.layers import Representation
from model_zoo.architectures import build
from model_zoo.architectures.paper_encoder import PaperEncoder


@pytest.mark.parametrize(("shape", "flat"), [((3, 32, 32), 4096), ((1, 28, 28), 2304), ((1, 8, 8), 256)])
def test_at_width_64_the_layers_match_the_paper(shape, flat):
    encoder = PaperEncoder(shape)
    sizes = [tuple(p.shape) for name, p in encoder.named_parameters() if p.dim() > 1]
    channels = shape[0]
    assert sizes == [(64, channels, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1024, flat), (64, 1024)]
    assert all(encoder.convolutions[place].bias is None for place in (0, 3, 6))
    assert encoder.eval()(torch.rand(2, *shape)).shape == (2, 64)


def test_penultimate_of_an_encoder_with_a_head_is_its_features():
    classifier = build("paper-encoder", {"image_shape": [1, 8, 8], "width": 4, "num_classes": 7}).eval()
    images = torch.rand(2, 1, 8, 8)
    assert classifier(images).shape == (2, 7)
    assert torch.equal(Representation(classifier, "penultimate")(images), classifier[0](images))
    encoder = build("paper-encoder", {"image_shape": [1, 8, 8], "width": 4})
    assert isinstance(encoder, PaperEncoder)
    assert encoder.convolutions[0].out_channels == 4


def test_images_too_small_and_widths_below_one_are_refused():
    with pytest.raises(UsageError, match="4 x 8 pixels are too small"):
        PaperEncoder((1, 4, 8))
    with pytest.raises(UsageError, match="encoder width 0 and features 64"):
        PaperEncoder((1, 8, 8), 0)
