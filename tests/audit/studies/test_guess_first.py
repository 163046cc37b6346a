"""The "Guess First" study: the adaptive attack, the rows of one classifier, and resumed runs."""

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.minimum_norm import CarliniWagner
from audit.adversary.pgd import PGD
from audit.adversary.robustness import TargetModel
from audit.adversary.single_attacks import run_attack
from audit.adversary.threat import L2, Linf
from audit.commands.reproduce.guess_first import guess_first_command
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.information.sandwich import Sandwich
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.studies import guess_first
from audit.studies.adaptive_attack import (
    OtherAttacks,
    StandardisedScores,
    adaptive_attack,
    correct_mask,
    craft_transfer_images,
    describe_failed_checks,
    excess_broken,
    judge_single_attack,
    score_objective,
)
from audit.studies.attack_table import (
    AttackedClassifier,
    AttackRow,
    AttackTableSettings,
    AuditedLayer,
    attack_table_rows,
    craft_black_box_images,
    stage_count,
)
from audit.studies.guess_first import (
    COLUMNS,
    RECIPES,
    GuessFirstSettings,
    audited_layers,
    read_rows,
    run_guess_first,
)
from model_zoo.architectures import build

QUICK = LabelAttack((Stage("ce", PGD(3, 0.5)), Stage("margin", PGD(3, 0.5))))
TABLE = AttackTableSettings((0.05, 0.1), 0.5, QUICK, 24, 12, CarliniWagner(steps=10, searches=2))


class Plane(nn.Module):
    """A linear classifier whose scores are multiplied by `scale`."""

    def __init__(self, scale=1.0, key=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, generator=keyed_generator(key)), requires_grad=False)
        self.scale = scale

    def forward(self, images):
        return self.scale * (images.flatten(1) - 0.5) @ self.weight.T


class Rounded(nn.Module):
    """A network on quantised pixels (piecewise constant) with a misleading gradient."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images + ((images * 20).round() / 20 - images).detach() - (images - images.detach()))


def target(network=None, count=40):
    network = (network or Plane()).eval()
    images = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=keyed_generator(2))
    return TargetModel(network, images, Plane()(images).argmax(1))


def whole(subject, settings=TABLE):
    crafted = craft_black_box_images(TargetModel(Plane(key=5).eval(), subject.images, subject.labels), settings, 0)
    reading = AuditedLayer(
        "logits", subject.network, "logits", Sandwich(steps=2, start_steps=1, quantisers=(2,), annealing_steps=2)
    )
    told = []
    rows = attack_table_rows(AttackedClassifier(subject, crafted, [reading]), settings, 0, told.append)
    return rows, told


def test_standardised_scores_do_not_depend_on_scale():
    images = target().images
    plain, scaled = StandardisedScores(Plane())(images), StandardisedScores(Plane(scale=1e4))(images)
    assert torch.allclose(plain, scaled, atol=1e-4)
    assert torch.equal(plain.argmax(1), Plane()(images).argmax(1))
    assert torch.allclose(plain.std(1, correction=0), torch.ones(len(images)))


def test_the_sign_sets_the_direction_of_a_single_score():
    subject = target()
    index = torch.arange(10)
    scores = subject.network(subject.images[:10])
    for sign in (1.0, -1.0):
        judged = score_objective(subject.network, subject.labels, subject.labels, sign)(subject.images[:10], index)
        assert torch.equal(judged.value, sign * scores.gather(1, subject.labels[:10, None]).squeeze(1))
        assert not judged.done.any()


def test_a_single_attack_without_gradients_is_too_weak():
    saturated = target(Plane(scale=1e5))
    step = run_attack("fgsm", saturated, Linf(0.1), 0)
    union = adaptive_attack(
        saturated, Linf(0.1), LabelAttack((Stage("ce", PGD(3, 0.5)),)), OtherAttacks([step.robust]), 0
    )
    more = excess_broken(step.robust, union.robust)
    assert more > 0.2
    trusted, words = judge_single_attack(more, len(union.robust))
    assert not trusted
    assert words == f"too weak: the adaptive attack breaks {more:.1%} more"
    assert "check 'zero gradient of the cross-entropy' failed" in union.verdict


def test_a_network_with_masked_gradients_gets_an_upper_bound():
    union = adaptive_attack(target(Rounded(Plane())), Linf(0.05), QUICK, OtherAttacks(), 0)
    assert union.verdict.startswith("upper bound, attack not trustworthy: check ")
    honest = adaptive_attack(target(), Linf(0.05), QUICK, OtherAttacks(), 0)
    assert honest.verdict == "measured"
    assert describe_failed_checks(honest.tier.checks) == ""


def test_transfer_images_count_and_are_compared_with_the_searches():
    subject = target()
    union = adaptive_attack(subject, Linf(0.05), QUICK, OtherAttacks(), 0)
    nothing = torch.zeros_like(union.robust)
    assert not adaptive_attack(subject, Linf(0.05), QUICK, OtherAttacks([nothing]), 0).robust.any()
    # images outside the ball, which no search finds: the transfer check fails
    unfair = adaptive_attack(subject, Linf(0.05), QUICK, OtherAttacks((), [1 - subject.images]), 0)
    assert int(unfair.robust.sum()) < int(union.robust.sum())
    assert "check 'transfer' failed" in unfair.verdict


@pytest.mark.parametrize(("more", "images", "held"), [(0.01, 500, True), (0.012, 500, False), (0.05, 20, True)])
def test_a_single_attack_is_accepted_up_to_a_hundredth_or_one_image(more, images, held):
    assert judge_single_attack(more, images)[0] is held


def test_excess_counts_the_images_both_attacks_saw():
    robust, union = torch.tensor([True, True, False, True]), torch.tensor([True, False, False])
    assert excess_broken(robust, union) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "cw"])
def test_transfer_images_are_legal_and_fool_the_substitute(name):
    subject = target()
    threat = L2(0.5) if name == "cw" else Linf(0.1)
    made = craft_transfer_images(subject, threat, name, 0)
    assert (threat.distance(made.images, subject.images) <= threat.eps + 1e-6).all()
    assert made.left < 1
    assert made.left == pytest.approx(float(correct_mask(subject.network, made.images, subject.labels).float().mean()))
    assert made.failed == ""


def test_the_rows_of_one_classifier():
    subject = target()
    settings = replace(TABLE, radii=(0.1,))
    rows, told = whole(subject, settings)
    assert len(told) == stage_count(settings)
    keys = [(row.attack, row.access, row.norm, row.eps, row.layer) for row in rows]
    assert len(set(keys)) == len(keys)
    by = dict(zip(keys, rows, strict=True))
    for eps in settings.radii:
        assert {row.attack for row in rows if row.norm == "linf" and row.eps == eps and row.access == "white"} >= {
            "fgsm",
            "pgd",
            "square",
            "adaptive",
            "sandwich",
        }
        union = by["adaptive", "white", "linf", eps, ""]
        assert union.images == TABLE.attack_images
        assert by["sandwich", "white", "linf", eps, "logits"].rv >= -0.1
        for name in ("fgsm", "pgd"):
            row = by[name, "white", "linf", eps, ""]
            first = TargetModel(subject.network, subject.images[: union.images], subject.labels[: union.images])
            assert row.images == len(subject.images)
            assert row.excess == pytest.approx(
                run_attack(name, first, Linf(eps), 0).accuracy.value - union.accuracy, abs=0.1
            )
    assert by["clean", "none", "", 0.0, ""].accuracy == 1
    assert by["cw", "white", "l2", 0.5, ""].images == TABLE.slow_images
    assert "the substitute itself keeps" in by["pgd", "black", "linf", 0.1, ""].note


def test_the_union_is_at_most_every_part():
    rows, _ = whole(target(count=24), replace(TABLE, attack_images=24, slow_images=24))
    for norm, eps in (("linf", 0.05), ("linf", 0.1), ("l2", 0.5)):
        found = {
            row.attack: row.accuracy
            for row in rows
            if (row.norm, row.eps) == (norm, eps)
            and row.access != "none"
            and row.accuracy is not None
            and row.attack != "square"
        }
        assert found["adaptive"] == min(found.values())


@pytest.mark.parametrize(("fault", "said"), [({"radii": ()}, "radii"), ({"slow_images": 0}, "slow_images 0")])
def test_a_table_without_radius_or_images_is_refused(fault, said):
    with pytest.raises(UsageError, match=said):
        replace(TABLE, **fault)


def test_audited_layers_exist_in_every_network():
    shape = {"image_shape": (1, 8, 8), "num_classes": 10}
    images = torch.rand(4, 1, 8, 8, generator=keyed_generator(3))
    for name in ("hypothesis-net", "plain-cnn", "vib"):
        network = build(name, shape).eval().requires_grad_(False)
        widths = {each.name: Representation(each.module, each.layer)(images).shape for each in audited_layers(network)}
        assert widths == {"logits": (4, 10), "fc2": (4, 256)}


def settings_of(folder, **others):
    table = replace(TABLE, radii=(0.1,), attack_images=8, slow_images=8)
    plain = GuessFirstSettings(seeds=1, epochs=1, count=8, folder=folder, table=table, recipes=("cnn", "vib"))
    return replace(plain, **others)


def test_a_run_is_trained_attacked_and_audited(tmp_path, monkeypatch):
    quick = Sandwich(steps=2, start_steps=1, quantisers=(2,), annealing_steps=2)
    monkeypatch.setattr(
        guess_first, "audited_layers", lambda network: (AuditedLayer("logits", network, "logits", quick),)
    )
    settings, told = settings_of(tmp_path, recipes=("cnn",)), []
    run_guess_first(settings, lambda what, done: told.append(done))
    assert told == list(range(settings.steps))
    rows = read_rows(settings.path)
    assert {(row["recipe"], row["seed"], row["dataset"]) for row in rows} == {("cnn", "0", "digits")}
    assert {row["attack"] for row in rows} >= {"clean", "fgsm", "pgd", "cw", "square", "adaptive", "sandwich"}
    assert {row["layer"] for row in rows if row["attack"] == "sandwich"} == {"logits"}
    assert {row["training"] for row in rows} == {"1 epochs on 897 images"}


def quick_rows(study, settings, _seed, progress):
    """Return the clean accuracy after as many stages as the complete table has."""
    for number in range(stage_count(settings)):
        progress(f"stage {number}")
    share = float(correct_mask(study.target.network, study.target.images, study.target.labels).float().mean())
    return [AttackRow("clean", images=len(study.target.images), accuracy=share)]


def test_a_resumed_run_gives_the_rows_of_an_uninterrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr(guess_first, "attack_table_rows", quick_rows)
    told, again = [], []
    left_alone = run_guess_first(settings_of(tmp_path / "a", count=100), lambda what, done: told.append((what, done)))

    def stop(what, _done):
        if what == "vib, seed 0: stage 1":
            raise KeyboardInterrupt

    settings = settings_of(tmp_path / "b", count=100)
    with pytest.raises(KeyboardInterrupt):
        run_guess_first(settings, stop)
    assert {row["recipe"] for row in read_rows(settings.path)} == {"cnn"}
    run_guess_first(settings, lambda what, done: again.append((what, done)))
    assert not [what for what, _ in again if what.startswith("cnn") or "epoch" in what]
    assert again[-1] == told[-1]
    assert settings.path.read_text() == left_alone.read_text()
    # a finished run computes nothing
    run_guess_first(settings, lambda what, _done: pytest.fail(what))
    with pytest.raises(UsageError, match="rows of other settings"):
        run_guess_first(replace(settings, epochs=2))


def test_a_file_with_other_columns_is_refused(tmp_path):
    settings = settings_of(tmp_path)
    assert read_rows(settings.path) == []
    settings.path.write_text("a,b\n1,2\n")
    with pytest.raises(IntegrityError, match="other columns"):
        run_guess_first(settings)
    assert COLUMNS[:2] == ("recipe", "seed")


def test_invalid_settings_are_refused(tmp_path):
    with pytest.raises(UsageError, match="seeds 0"):
        GuessFirstSettings(seeds=0)
    with pytest.raises(UnknownNameError, match="did you mean 'c-js'"):
        settings_of(tmp_path, recipes=("cjs",))
    assert GuessFirstSettings().recipes == RECIPES


def test_the_command_refuses_a_set_that_the_paper_does_not_have(tmp_path):
    found = CliRunner().invoke(guess_first_command, ["--dataset", "cifar10", "--out", str(tmp_path)])
    assert isinstance(found.exception, UnknownNameError)
    assert not list(tmp_path.iterdir())
