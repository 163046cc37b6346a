"""The paper's encoder: its sizes, and its way back through a file into every command that takes a model."""

import pytest
import torch

from audit.errors import UnsafeError, UsageError
from audit.representation import Representation
from model_zoo.architectures import encoders
from model_zoo.architectures.encoders import FACTORIES, PaperEncoder
from model_zoo.checkpoints import write_safetensors
from model_zoo.load import SourceSettings, load_model

PLACE = "model_zoo.architectures.encoders"


@pytest.mark.parametrize(("shape", "flat"), [((3, 32, 32), 4096), ((1, 28, 28), 2304), ((1, 8, 8), 256)])
def test_at_width_64_the_layers_are_the_papers(shape, flat):
    encoder = PaperEncoder(shape)
    sizes = [tuple(p.shape) for name, p in encoder.named_parameters() if p.dim() > 1]
    channels = shape[0]
    assert sizes == [(64, channels, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (1024, flat), (64, 1024)]
    assert all(encoder.convolutions[place].bias is None for place in (0, 3, 6))
    assert encoder.eval()(torch.rand(2, *shape)).shape == (2, 64)


@pytest.mark.parametrize(("key", "name"), FACTORIES.items())
def test_each_factory_makes_the_size_it_is_listed_for(key, name):
    shape, width = key
    encoder, classifier = getattr(encoders, name)(), getattr(encoders, name)(num_classes=7).eval()
    images = torch.rand(1, *shape)
    assert classifier(images).shape == (1, 7)
    assert torch.equal(Representation(classifier, "penultimate")(images), classifier[0](images))
    assert encoder.eval()(images).shape == (1, 64)
    assert encoder.convolutions[0].out_channels == width


def test_a_saved_encoder_is_loaded_as_a_model_without_a_classifier(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = PaperEncoder((1, 8, 8), 16).eval()
    path = tmp_path / "g.safetensors"
    write_safetensors(encoder.state_dict(), path)
    ref = f"file:{path}?arch={PLACE}:grey8_w16&num_classes=0&shape=1x8x8"
    with pytest.raises(UnsafeError, match="--trust-code"):
        load_model(ref)
    loaded = load_model(ref, SourceSettings(trust_code=True, offline=True))
    images = torch.rand(3, 1, 8, 8)
    assert loaded.num_classes == 0
    assert torch.equal(Representation(loaded.network, "logits")(images), encoder(images))
    assert Representation(loaded.network, "penultimate")(images).shape == (3, 256)


def test_images_too_small_and_widths_below_one_are_refused():
    with pytest.raises(UsageError, match="4 x 8 pixels are too small"):
        PaperEncoder((1, 4, 8))
    with pytest.raises(UsageError, match="encoder width 0 and features 64"):
        PaperEncoder((1, 8, 8), 0)
