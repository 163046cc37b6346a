"""`balanced`: equally many images of each class, in a benchmark and for single commands."""

import torch

from audit.adversary.threat import Linf
from audit.config.benchmark import BenchmarkConfig
from audit.config.settings import AuditSettings
from audit.run.cell import Cell, InputRules, cells
from audit.run.loading import InputCache, RunOptions, open_images_for
from model_zoo.images.datasets import ImageRequest, load_images

REF = "bundled:digits-vgg-standard"


def test_cells_and_commands_take_the_same_balanced_images() -> None:
    values = {"name": "a", "dataset": "digits", "models": [REF], "threats": {"eps": 0.1}, "images": 50}
    (balanced,) = cells(BenchmarkConfig.model_validate({**values, "balanced": True}))
    (first,) = cells(BenchmarkConfig.model_validate(values))
    cache, options = InputCache(RunOptions(device="cpu")), RunOptions(device="cpu")
    found = cache.images(balanced)
    assert torch.bincount(found.labels, minlength=10).tolist() == [5] * 10
    assert found.sha256 != cache.images(first).sha256 == load_images("digits", ImageRequest(50)).sha256
    rules = InputRules(balanced=True)
    assert open_images_for(REF, "digits", options, options.request(50), rules).sha256 == found.sha256
    assert cache.open(balanced).cell_id != cache.open(first).cell_id
    whole = Cell(REF, None, "digits", None, "logits", Linf(0.1), AuditSettings(), rules=rules)
    assert cache.images(whole).sha256 == load_images("digits").sha256  # all images are all images
