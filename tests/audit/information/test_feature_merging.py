"""Bringing features together: clusters found, balls respected, and networks that cannot be searched refused."""

import pytest
import torch

from audit.adversary.threat import THREATS, Linf, threat_model
from audit.errors import InvalidModelError
from audit.information.feature_merging import Moved, Mover, hub, k_means, towards
from audit.types import Encoded

EPS = {"linf": 0.05, "l2": 0.2, "l1": 0.4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=60, size=4):
    return torch.rand(count, 1, size, size, generator=seeded())


def flat(images):
    return Encoded(images.flatten(1), images.new_empty(len(images), 0))


def started(mover, passes=0.0):
    return Moved(mover.clean, mover.encoder(mover.clean).features.detach(), passes)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e5])  # 1e4 away, cdist by products gave three wrong clusters
@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_found(offset, seed):
    middles = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    planted = torch.arange(300) % 3
    features = offset + middles[planted] + 0.2 * torch.randn(300, 2, generator=seeded(seed))
    centres, nearest = k_means(features, 3, seeded(seed))
    assert centres.shape == (3, 2)
    assert len({(int(a), int(b)) for a, b in zip(planted, nearest, strict=True)}) == 3
    assert (centres - offset)[nearest].sub(middles[planted]).abs().max() < 0.1


def test_nearest_is_the_nearest_centre():
    features = torch.randn(200, 5, generator=seeded())
    centres, nearest = k_means(features, 7, seeded(1))
    distance = (features[:, None] - centres).square().sum(2)
    assert distance.gather(1, nearest[:, None])[:, 0] == pytest.approx(distance.amin(1), abs=1e-5)


@pytest.mark.parametrize(("distinct", "wanted"), [(3, 8), (1, 4), (5, 5)])
def test_no_more_centres_than_distinct_points(distinct, wanted):
    points = torch.arange(float(distinct))[:, None] * 3
    features = points[torch.arange(40) % distinct]
    centres, nearest = k_means(features, wanted, seeded())
    assert sorted(centres.flatten().tolist()) == pytest.approx(points.flatten().tolist(), abs=1e-5)
    assert centres[nearest].flatten().tolist() == pytest.approx(features.flatten().tolist(), abs=1e-5)


def test_one_centre_is_the_mean():
    features = torch.randn(50, 3, generator=seeded())
    centres, nearest = k_means(features, 1, seeded())
    assert centres[0].tolist() == pytest.approx(features.mean(0).tolist(), abs=1e-6)
    assert not nearest.any()


def test_clusters_are_drawn_by_the_generator_alone():
    features = torch.randn(100, 2, generator=seeded())
    before = torch.random.get_rng_state()
    first, again = k_means(features, 8, seeded(3)), k_means(features, 8, seeded(3))
    assert first[0].equal(again[0])
    assert not k_means(features, 8, seeded(4))[0].equal(first[0])
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_steps_never_leave_the_ball_and_get_nearer(norm):
    clean, threat = pixels(), threat_model(norm, EPS[norm])
    mover = Mover(flat, clean, threat, relative_step=1.5, batch_size=16)
    target = torch.full((16,), 0.5)
    found = mover.along(towards(target), started(mover), 7)
    assert float(threat.distance(found.images, clean).max()) <= EPS[norm] + 1e-6
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    before, after = ((images.flatten(1) - target).norm(dim=1) for images in (clean, found.images))
    assert bool((after < before).all())
    assert clean.equal(pixels())  # the clean images are not written to


def test_one_target_each_is_reached_where_it_is_in_the_ball():
    clean = pixels()
    targets = (clean + 0.02 * torch.randn(clean.shape, generator=seeded(3)).clamp(-1, 1)).clamp(0, 1).flatten(1)
    mover = Mover(flat, clean, Linf(0.05))
    found = mover.along(towards(targets), started(mover), 40)
    assert (found.images.flatten(1) - targets).abs().max() < 0.006  # the last steps are a fiftieth of eps


def test_a_start_outside_the_clean_images_stays_in_their_ball():
    clean = pixels()
    mover = Mover(flat, clean, Linf(0.05))
    start = Linf(0.05).random_start(clean, seeded(2))
    found = mover.along(towards(torch.ones(16)), Moved(start, flat(start).features), 30)
    assert float((found.images - clean).abs().max()) <= 0.05 + 1e-6
    assert (
        found.images.equal((clean + 0.05).clamp(0, 1)) or (found.images - clean - 0.05).clamp_max(0).abs().max() < 0.02
    )


def test_passes_and_features_are_those_of_the_last_pass():
    clean = pixels(30)
    mover = Mover(flat, clean, Linf(0.05), batch_size=7)
    one, two = (mover.along(towards(torch.zeros(16)), started(mover, 5.0), steps) for steps in (1, 2))
    assert (one.passes, two.passes) == (35, 65)
    assert one.features.equal(clean.flatten(1))  # one step behind the images
    assert not one.images.equal(clean)


def test_the_pull_sees_all_images_at_once():
    seen = []

    def pull(features):
        seen.append(len(features))
        return features

    mover = Mover(flat, pixels(30), Linf(0.05), batch_size=7)
    mover.along(pull, started(mover), 3)
    assert seen == [30, 30, 30]


@pytest.mark.parametrize(
    ("features_of", "said"),
    [
        (lambda images: images.detach().flatten(1), "gives no gradient to its input"),
        (lambda images: torch.ones(len(images), 2, requires_grad=True) * 1, "gives no gradient to its input"),
        (lambda images: (images - images).sqrt().flatten(1), "gradient to the input is not finite for 20 of 20"),
    ],
    ids=["detached", "of something else", "not finite"],
)
def test_what_cannot_be_searched_is_refused(features_of, said):
    clean = pixels(20)
    mover = Mover(lambda images: Encoded(features_of(images), images.new_empty(len(images), 0)), clean, Linf(0.05))
    with pytest.raises(InvalidModelError, match=said):
        mover.along(lambda features: features + 1, Moved(clean, torch.zeros(20, 16 if "finite" in said else 2)), 2)


def test_parameters_keep_no_gradient():
    layer = torch.nn.Linear(16, 3)
    mover = Mover(lambda images: Encoded(layer(images.flatten(1)), images[:, 0, 0, :0]), pixels(), Linf(0.05))
    mover.along(towards(torch.zeros(3)), started(mover), 2)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_hub_is_the_centre_that_can_be_reached():
    clean = 0.4 + 0.2 * pixels(150)
    mover = Mover(flat, clean, Linf(0.12))
    centres = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.ones(16)])
    chosen, passes = hub(mover, started(mover), centres)
    assert chosen.equal(centres[1])
    assert passes == 3 * 8 * 50  # centres x steps x trial images
    assert hub(mover, started(mover), centres.flip(0)[:1])[0].equal(centres[2])


def test_a_few_images_that_cannot_be_moved_do_not_decide_the_hub():
    clean = 0.4 + 0.2 * pixels(50)
    clean[:15] = 1.0  # far from the centre that the other 35 reach
    mover = Mover(flat, clean, Linf(0.12))
    centres = torch.stack([torch.full((16,), 0.5), torch.full((16,), 0.75)])
    assert hub(mover, started(mover), centres)[0].equal(centres[0])
