import pytest
import torch

from audit.adversary.passes import MemoryWarning
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf
from audit.errors import InvalidModelError, UsageError
from audit.random_keys import keyed_generator
from audit.types import ObjectiveValue


@pytest.mark.parametrize("name", ["steps", "restarts", "batch_size"])
def test_counts_must_be_positive(name):
    with pytest.raises(UsageError, match=f"{name} 0 of a search must be at least 1"):
        PGD(**{name: 0})


@pytest.mark.parametrize("step", [0, -1, 2.01, float("nan")])
def test_a_step_is_a_multiple_of_eps(step):
    with pytest.raises(UsageError, match="relative_step"):
        PGD(relative_step=step)


def search(objective, count=3, **settings):
    clean = torch.full((count, 1, 2, 2), 0.5)
    return clean, minimise(objective, clean, Linf(0.1), PGD(**settings), torch.Generator().manual_seed(0))


def total(images, index):
    value = images.flatten(1).sum(1)
    return ObjectiveValue(value, torch.zeros(len(value), dtype=torch.bool))


def test_the_best_iterate_is_kept_not_the_last():
    # the first step reaches the minimum, later ones overshoot it
    _, found = search(lambda x, _: ObjectiveValue((x - 0.42).abs().flatten(1).sum(1), torch.zeros(len(x), dtype=bool)))
    assert (found.value < 4 * 0.08).all()
    assert (found.images - 0.42).abs().flatten(1).sum(1).tolist() == pytest.approx(found.value.tolist(), abs=1e-6)


def test_images_done_at_the_start_are_unchanged_and_take_no_passes():
    clean, found = search(lambda x, _: ObjectiveValue(x.flatten(1).sum(1), torch.ones(len(x), dtype=bool)))
    assert torch.equal(found.images, clean)
    assert found.done.all()
    assert found.passes == 0


def test_passes_count_images_and_steps_until_done():
    assert search(total, steps=4)[1].passes == 12
    assert search(total, steps=4, restarts=3)[1].passes == 36
    # done after one step: the pass that detects it counts, and no further one
    _, found = search(lambda x, _: ObjectiveValue(x.flatten(1).sum(1), x.flatten(1).sum(1) < 1.99), random_start=False)
    assert found.passes == 6
    assert found.done.all()


def test_restarts_start_at_random_even_without_a_random_start():
    seen = []

    def record(images, index):
        seen.append(images.detach().clone())
        return total(images, index)

    clean, _ = search(record, steps=1, restarts=2, random_start=False)
    assert torch.equal(seen[0], clean)
    assert not torch.equal(seen[2], clean)


def test_clean_images_are_not_modified():
    clean, found = search(total)
    assert (clean == 0.5).all()
    assert not found.images.requires_grad
    assert (found.images < 0.5).all()


def test_nan_values_never_replace_the_clean_image():
    def undefined(images, index):
        value, done = total(images, index)
        return ObjectiveValue(torch.where(value < 1.999, torch.full_like(value, torch.nan), value), done)

    clean, found = search(undefined, random_start=False)
    assert torch.equal(found.images, clean)


def test_a_gradient_that_is_not_finite_is_refused():
    def sharp(images, index):
        # sqrt(0): finite value, infinite slope
        value = (images.flatten(1) - 0.5).sum(1).sqrt()
        return ObjectiveValue(value, torch.zeros(len(images), dtype=torch.bool))

    with pytest.raises(InvalidModelError, match="gradient to the input is not finite for 3 of 3 images"):
        search(sharp, random_start=False)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(4, requires_grad=True)])
def test_a_detached_network_is_refused(weight):
    def detached(images, index):
        return ObjectiveValue((images.detach().flatten(1) * weight).sum(1), torch.zeros(len(images), dtype=torch.bool))

    with pytest.raises(InvalidModelError, match="gives no gradient"):
        search(detached)


@pytest.mark.parametrize("random_start", [False, True])
def test_reported_values_are_those_of_the_images(random_start):
    """A rugged objective, whose best iterate is sometimes the latest and sometimes an early one."""

    def rugged(x, _):
        flat = x.flatten(1)
        value = (40 * flat).sin().sum(1) + flat.sum(1)
        return ObjectiveValue(value, value < -1.0)

    clean = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    seen = [float("inf")] * 50

    def recorded(x, index):
        judged = rugged(x, index)
        for i, value in zip(index.tolist(), judged.value.tolist(), strict=True):
            seen[i] = min(seen[i], value)
        return judged

    pgd = PGD(12, 0.3, random_start, restarts=2, batch_size=7)
    found = minimise(recorded, clean, Linf(0.3), pgd, torch.Generator().manual_seed(0))
    assert torch.allclose(rugged(found.images, None).value, found.value, atol=1e-6)
    kept = ~found.done
    assert torch.allclose(found.value[kept], torch.tensor(seen)[kept], atol=1e-6)
    assert 5 < int(kept.sum()) < 50


def test_a_step_repeated_after_running_out_of_memory_changes_no_result(monkeypatch):
    calls = []

    class OutOfMemoryOnce(Linf):
        def step_into(self, out, images, descent, *bounds):
            calls.append(len(images))
            if len(calls) == 3:
                raise RuntimeError("CUDA out of memory")
            super().step_into(out, images, descent, *bounds)

    clean = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    value = lambda x, _: ObjectiveValue((9 * x.flatten(1)).sin().sum(1), torch.zeros(len(x), dtype=torch.bool))  # noqa: E731
    pgd = PGD(6, 0.3, random_start=False)
    wanted = minimise(value, clean, Linf(0.2), pgd, torch.Generator().manual_seed(0))
    with pytest.warns(MemoryWarning):
        found = minimise(value, clean, OutOfMemoryOnce(0.2), pgd, torch.Generator().manual_seed(0))
    assert torch.equal(found.images, wanted.images)
    assert torch.equal(found.value, wanted.value)


def test_searches_that_finish_image_by_image_use_few_batch_sizes():
    """Kernels are compiled for each batch size, so that there must be few."""
    clean, sizes = torch.full((200, 1, 2, 2), 0.5), []
    order = torch.linspace(0.0005, 0.0985, 200)

    def objective(images, index):
        sizes.append(len(images))
        moved = (images - 0.5).abs().flatten(1).amax(1)
        return ObjectiveValue(images.flatten(1).sum(1), moved > order[index])

    found = minimise(objective, clean, Linf(0.1), PGD(100, 0.01, random_start=False), keyed_generator(0))
    assert found.done.all()
    needed = sum(int((order >= 0.001 * step).sum()) for step in range(100))
    assert needed <= found.passes <= 17 / 16 * needed + 200
    assert len(set(sizes)) <= 16 * 5
    assert all(size < 16 or size % (1 << (size.bit_length() - 5)) == 0 or size == 200 for size in sizes)
