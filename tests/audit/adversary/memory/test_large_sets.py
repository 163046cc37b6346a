"""Large sets of images lie in scratch files and are handled part by part, with the results of small ones."""

import gc
import mmap
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import audit.types
from audit import storage
from audit.adversary import accuracy
from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.threat import L1, L2, Linf
from audit.config.settings import AuditSettings
from audit.information.probing.opponents import Field, ProbeDescent
from audit.information.probing.positions import chosen
from audit.information.sandwich import Sandwich
from audit.run.cell import Cell
from audit.run.cell_runner import CellRunner
from audit.run.encoders.head_images import head_plan
from audit.run.intermediate import file_parts, read_result
from audit.run.layer_audit import LayerAudit
from audit.run.loading import RunOptions
from audit.storage import release_scratch, scratch_in, scratch_memory
from audit.types import (
    Encoded,
    copied_pixels,
    empty_pixels,
    equal_pixels,
    image_slices,
    pixel_extremes,
    selected_pixels,
)
from model_zoo.images.datasets import ImageSet, load_images

SIDE = 8
BYTES = 4 * SIDE * SIDE  # of one image


@pytest.fixture
def ten_at_a_time(monkeypatch):
    """Let sets of more than ten images be large."""
    monkeypatch.setattr(audit.types, "LARGE", 10 * BYTES)


def images_of(count):
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


def scratch_bytes():
    gc.collect()
    return sum(len(memory) for memory in storage._mapped)


@pytest.mark.usefixtures("ten_at_a_time")
def test_large_copies_lie_in_files_that_vanish_with_them(tmp_path):
    images, before = images_of(25), scratch_bytes()
    with scratch_in(tmp_path):
        copy, empty, few = copied_pixels(images), empty_pixels((30, 1, SIDE, SIDE), images), copied_pixels(images[:9])
    assert scratch_bytes() - before == 55 * BYTES
    assert torch.equal(copy, images)
    assert torch.equal(few, images[:9])
    empty[:] = 0.5
    release_scratch()  # contents stay
    assert torch.equal(copy, images)
    assert bool((empty == 0.5).all())
    assert not list(tmp_path.iterdir())
    view = copy[3:]
    del copy, empty
    assert scratch_bytes() - before == 25 * BYTES
    assert torch.equal(view, images[3:])
    del view
    assert scratch_bytes() == before


@pytest.mark.usefixtures("ten_at_a_time")
def test_a_large_selection_lies_in_a_file_and_a_small_one_does_not():
    images, before = images_of(25), scratch_bytes()
    index = torch.randperm(25, generator=torch.Generator().manual_seed(2))
    large, small, masked = (selected_pixels(images, each) for each in (index, index[:9], index > 3))
    assert scratch_bytes() - before == (25 + 21) * BYTES
    assert torch.equal(large, images[index])
    assert torch.equal(small, images[index[:9]])
    assert torch.equal(masked, images[index > 3])


@pytest.mark.usefixtures("ten_at_a_time")
def test_images_that_heads_are_trained_on_are_not_held_in_memory():
    """Neither to leave out copies of audited images, nor as halves of these."""
    images, labels = torch.rand(200, 1, 32, 32), torch.arange(200) % 4
    found = ImageSet(images, labels, ("a", "b", "c", "d"), "set", "test", tuple(range(200)), "")
    audited = replace(found, images=images[:100].clone(), labels=labels[:100])
    before = scratch_bytes()
    tracemalloc.start()
    (fold,) = head_plan(audited, found, 0).folds
    halves = head_plan(audited, None, 0).folds
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(fold.images, images[100:])
    assert torch.equal(fold.labels, labels[100:])
    assert torch.equal(halves[0].images, audited.images[halves[1].measured])
    assert peak < 25 * 4 * 32 * 32
    assert scratch_bytes() - before == 200 * 4 * 32 * 32


def test_memory_without_room_on_the_disk_is_ordinary(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.types, "LARGE", 1)
    with scratch_in(tmp_path / "missing"):
        assert len(scratch_memory(4096)) == 4096  # in the folder of temporary files
        monkeypatch.setattr(storage.os, "posix_fallocate", full)
        assert scratch_memory(4096) is None
        assert torch.equal(copied_pixels(images_of(3)), images_of(3))


def test_a_runner_puts_large_sets_into_its_folder(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setattr(audit.types, "LARGE", 64 * 4 * 50)
    monkeypatch.setattr(
        storage, "scratch_memory", lambda size: folders.append(storage._scratch_folder.get()) or mmap.mmap(-1, size)
    )
    estimator = Sandwich(steps=1, start_steps=1, quantisers=(2,), annealing_steps=1)
    settings = replace(AuditSettings(estimator), attack=LabelAttack((Stage("ce", PGD(1)),)), seeds=(0,))
    cell = Cell("bundled:digits-vgg-standard", None, "digits", 60, "logits", Linf(0.1), settings)
    assert CellRunner(RunOptions(), tmp_path).compute(cell).valid
    assert len(folders) > 5
    assert set(folders) == {tmp_path}


def test_released_pages_are_not_resident():
    memory = scratch_memory(64 * mmap.PAGESIZE)
    held = np.frombuffer(memory, dtype=np.uint8)
    held[:] = 7
    before = resident_file_bytes()
    release_scratch()
    assert before - resident_file_bytes() >= 60 * mmap.PAGESIZE
    assert held.sum() == 7 * held.size


def test_comparing_large_images_keeps_few_pages_resident(monkeypatch):
    monkeypatch.setattr(audit.types, "LARGE", 16 * mmap.PAGESIZE)
    images = torch.rand(320, 1, 32, 32, generator=torch.Generator().manual_seed(0))  # one page each
    one, other = copied_pixels(images), copied_pixels(images)
    release_scratch()
    before = resident_file_bytes()
    assert equal_pixels(one, other)
    assert resident_file_bytes() - before <= 64 * mmap.PAGESIZE
    other[-1, 0, 0, 0] += 1
    assert not equal_pixels(one, other)
    assert not equal_pixels(one, other[:-1])
    assert equal_pixels(one, one)


def resident_file_bytes():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssFile")))


@pytest.mark.usefixtures("ten_at_a_time")
@pytest.mark.parametrize(("count", "size", "expected"), [
    (25, 0, [9, 9, 7]), (10, 0, [10]), (11, 0, [6, 5]), (25, 11, [11, 11, 3]), (0, 0, []), (1, 0, [1]),
])  # fmt: skip
def test_slices_cover_all_images_in_order(count, size, expected):
    images = images_of(count)
    found = [images[part] for part in image_slices(images, size)]
    assert [len(part) for part in found] == expected
    assert torch.equal(torch.cat([images[:0], *found]), images)


@pytest.mark.usefixtures("ten_at_a_time")
@pytest.mark.parametrize("odd", [0.25, float("inf"), float("nan"), -2.0])
def test_extremes_are_those_of_all_images(odd):
    images = images_of(25)
    images[17, 0, 3, 3] = odd
    expected = float(images.min()), float(images.max())
    assert pixel_extremes(images) == pytest.approx(expected, nan_ok=True)


@pytest.mark.usefixtures("ten_at_a_time")
def test_a_data_set_is_the_same_in_scratch_files(monkeypatch, tmp_path):
    pixels = (images_of(25) * 255).to(torch.uint8).numpy()
    labels = np.arange(25) % 3
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "floats.npz", images=pixels / 255, labels=labels)
    large = [load_images(f"npz:{tmp_path / name}.npz") for name in ("bytes", "floats")]
    monkeypatch.undo()
    for found, name in zip(large, ("bytes", "floats"), strict=True):
        small = load_images(f"npz:{tmp_path / name}.npz")
        assert torch.equal(found.images, small.images)
        assert found.sha256 == small.sha256


@pytest.mark.usefixtures("ten_at_a_time")
def test_stored_results_of_large_sets_are_read_back(tmp_path):
    result = (
        images_of(25),
        {"flags": torch.tensor([True, False, True]), "count": torch.tensor(3)},
        images_of(2).double(),
    )
    (tmp_path / "part").write_bytes(b"".join(file_parts(result, {})))
    images, rest, last = read_result(tmp_path / "part", {}, torch.device("cpu"))
    assert torch.equal(images, result[0])
    assert torch.equal(rest["flags"], result[1]["flags"])
    assert torch.equal(rest["count"], result[1]["count"])
    assert torch.equal(last, result[2])


THREATS = pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4), L1(2.0)], ids=["linf", "l2", "l1"])


@THREATS
def test_worst_cases_of_large_sets_are_those_of_small_ones(monkeypatch, threat):
    images, labels = images_of(60), torch.arange(60) % 3
    estimator = Sandwich(steps=3, start_steps=2, quantisers=(2,), annealing_steps=3)
    settings = replace(AuditSettings(estimator), seeds=(0,))
    small = LayerAudit(network(), images, labels, "logits", settings).searched(threat)[0]
    monkeypatch.setattr(audit.types, "LARGE", 10 * BYTES)
    large = LayerAudit(network(), copied_pixels(images), labels, "logits", settings).searched(threat)[0]
    assert large.worst == small.worst
    assert large.origin == small.origin
    assert large.passes == small.passes
    assert torch.equal(large.adversarial, small.adversarial)


@THREATS
def test_large_sets_move_against_probes_as_small_ones_do(monkeypatch, threat):
    images, labels, model = images_of(60), torch.arange(60) % 3, network()

    def moved():
        field = Field(lambda some: Encoded(model(some), some.new_empty(len(some), 0)), images, labels, threat, 7)
        descent = ProbeDescent(field, [lambda encoded: encoded.features.log_softmax(1)])
        return descent.run(images, [0.05, 0.03, 0.02], torch.linspace(0.1, 1, 60))

    small = moved()
    monkeypatch.setattr(audit.types, "LARGE", 10 * BYTES)
    assert torch.equal(moved(), small)
    assert float((small - images).abs().max()) > 0.01
    assert bool((threat.distance(small, images) <= threat.eps + 1e-6).all())


@pytest.mark.usefixtures("ten_at_a_time")
def test_mixtures_of_large_sets_take_every_image_from_its_position():
    positions = [torch.full((25, 1, SIDE, SIDE), float(number)) for number in range(3)]
    which = torch.arange(25) % 3
    assert torch.equal(chosen(positions, which)[:, 0, 0, 0], which.float())


def test_a_large_set_is_attacked_part_by_part(monkeypatch):
    images, model = images_of(40), network()
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    attack = LabelAttack((Stage("ce", PGD(4, random_start=False)), Stage("margin", PGD(3, random_start=False))))
    whole = measure_accuracy(model, images, labels, Linf(0.05), attack, 0)
    monkeypatch.setattr(accuracy, "_AT_ONCE", 20 * BYTES)
    monkeypatch.setattr(audit.types, "LARGE", 10 * BYTES)
    parts = measure_accuracy(model, images, labels, Linf(0.05), attack, 0)
    assert 0 < int(whole.robust.sum()) < int(whole.outcome.correct.sum()) < 40
    assert (parts.natural, parts.adversarial) == (whole.natural, whole.adversarial)
    assert (parts.passes, parts.forwards, parts.names) == (whole.passes, whole.forwards, whole.names)
    assert (parts.largest_share, parts.num_classes) == (whole.largest_share, whole.num_classes)
    for name in ("correct", "robust", "stage", "step"):
        assert torch.equal(getattr(parts.outcome, name), getattr(whole.outcome, name))
    assert torch.allclose(parts.outcome.images, whole.outcome.images, atol=1e-6)
    assert torch.allclose(parts.outcome.margin, whole.outcome.margin, atol=1e-6)
