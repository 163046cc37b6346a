"""Projected descent that merges features: k-means, legal images, passes, and rejected networks."""

import pytest
import torch

from audit.adversary.threat import THREATS, Linf, threat_model
from audit.errors import InvalidModelError
from audit.information.feature_merging import Candidate, FeatureDescent, k_means, most_reachable, step_sizes, towards
from audit.types import Encoded

EPS = {"linf": 0.05, "l2": 0.2, "l1": 0.4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(count=60, size=4):
    return torch.rand(count, 1, size, size, generator=seeded())


def flat(images):
    return Encoded(images.flatten(1), images.new_empty(len(images), 0))


def clean_candidate(descent, passes=0.0):
    return Candidate(descent.clean, descent.encoder(descent.clean).features.detach(), passes)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e5])  # 1e4 away, cdist by products gave three wrong clusters
@pytest.mark.parametrize("seed", range(3))
def test_k_means_finds_planted_clusters(offset, seed):
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


def test_k_means_depends_on_its_generator_alone():
    features = torch.randn(100, 2, generator=seeded())
    before = torch.random.get_rng_state()
    first, again = k_means(features, 8, seeded(3)), k_means(features, 8, seeded(3))
    assert first[0].equal(again[0])
    assert not k_means(features, 8, seeded(4))[0].equal(first[0])
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_steps_stay_in_the_ball_and_approach_the_target(norm):
    clean, threat = pixels(), threat_model(norm, EPS[norm])
    descent = FeatureDescent(flat, clean, threat, relative_step=1.5, batch_size=16)
    target = torch.full((16,), 0.5)
    found = descent.run(towards(target), clean_candidate(descent), 7)
    assert float(threat.distance(found.images, clean).max()) <= EPS[norm] + 1e-6
    assert 0 <= float(found.images.min()) <= float(found.images.max()) <= 1
    before, after = ((images.flatten(1) - target).norm(dim=1) for images in (clean, found.images))
    assert bool((after < before).all())
    assert clean.equal(pixels())  # the clean images are not written to


def test_targets_inside_the_ball_are_reached():
    clean = pixels()
    targets = (clean + 0.02 * torch.randn(clean.shape, generator=seeded(3)).clamp(-1, 1)).clamp(0, 1).flatten(1)
    descent = FeatureDescent(flat, clean, Linf(0.05))
    found = descent.run(towards(targets), clean_candidate(descent), 40)
    assert (found.images.flatten(1) - targets).abs().max() < 0.006  # the last steps are a fiftieth of eps


def test_a_perturbed_start_stays_in_the_ball_of_the_clean_images():
    clean = pixels()
    descent = FeatureDescent(flat, clean, Linf(0.05))
    start = Linf(0.05).random_start(clean, seeded(2))
    found = descent.run(towards(torch.ones(16)), Candidate(start, flat(start).features), 30)
    assert float((found.images - clean).abs().max()) <= 0.05 + 1e-6
    assert (
        found.images.equal((clean + 0.05).clamp(0, 1)) or (found.images - clean - 0.05).clamp_max(0).abs().max() < 0.02
    )


def test_passes_and_features_are_those_of_the_last_pass():
    clean = pixels(30)
    descent = FeatureDescent(flat, clean, Linf(0.05), batch_size=7)
    one, two = (descent.run(towards(torch.zeros(16)), clean_candidate(descent, 5.0), steps) for steps in (1, 2))
    assert (one.passes, two.passes) == (35, 65)
    assert one.features.equal(clean.flatten(1))  # one step behind the images
    assert not one.images.equal(clean)


def test_feature_gradient_is_computed_for_all_images_at_once():
    seen = []

    def feature_gradient(features):
        seen.append(len(features))
        return features

    descent = FeatureDescent(flat, pixels(30), Linf(0.05), batch_size=7)
    descent.run(feature_gradient, clean_candidate(descent), 3)
    assert seen == [30, 30, 30]


@pytest.mark.parametrize(
    ("features_of", "message"),
    [
        (lambda images: images.detach().flatten(1), "gives no gradient to its input"),
        (lambda images: torch.ones(len(images), 2, requires_grad=True) * 1, "gives no gradient to its input"),
        (lambda images: (images - images).sqrt().flatten(1), "gradient to the input is not finite for 20 of 20"),
    ],
    ids=["detached", "of something else", "not finite"],
)
def test_what_cannot_be_searched_is_refused(features_of, message):
    clean = pixels(20)
    descent = FeatureDescent(
        lambda images: Encoded(features_of(images), images.new_empty(len(images), 0)), clean, Linf(0.05)
    )
    with pytest.raises(InvalidModelError, match=message):
        descent.run(
            lambda features: features + 1, Candidate(clean, torch.zeros(20, 16 if "finite" in message else 2)), 2
        )


def test_parameters_keep_no_gradient():
    layer = torch.nn.Linear(16, 3)
    descent = FeatureDescent(
        lambda images: Encoded(layer(images.flatten(1)), images[:, 0, 0, :0]), pixels(), Linf(0.05)
    )
    descent.run(towards(torch.zeros(3)), clean_candidate(descent), 2)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_reachable_centre_is_chosen():
    clean = 0.4 + 0.2 * pixels(150)
    descent = FeatureDescent(flat, clean, Linf(0.12))
    centres = torch.stack([torch.zeros(16), torch.full((16,), 0.5), torch.ones(16)])
    chosen, passes = most_reachable(descent, clean_candidate(descent), centres)
    assert chosen.equal(centres[1])
    assert passes == 3 * 8 * 50  # centres x steps x trial images
    assert most_reachable(descent, clean_candidate(descent), centres.flip(0)[:1])[0].equal(centres[2])


def test_a_minority_of_fixed_images_does_not_affect_the_choice():
    clean = 0.4 + 0.2 * pixels(50)
    clean[:15] = 1.0  # far from the centre that the other 35 reach
    descent = FeatureDescent(flat, clean, Linf(0.12))
    centres = torch.stack([torch.full((16,), 0.5), torch.full((16,), 0.75)])
    assert most_reachable(descent, clean_candidate(descent), centres)[0].equal(centres[0])


def test_step_sizes_hold_and_then_shrink_linearly_to_a_tenth():
    assert step_sizes(2.0, 4) == pytest.approx([2.0, 1.55, 1.1, 0.65])
    assert step_sizes(1.0, 10, hold=0.5) == pytest.approx([1.0] * 6 + [0.82, 0.64, 0.46, 0.28])
