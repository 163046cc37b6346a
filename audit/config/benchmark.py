"""The sections of a benchmark file: legal values, and the settings they stand for. Imports neither YAML nor torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_serializer

from audit.adversary.norms import NORMS, eps_fault
from audit.config.estimators import ESTIMATOR_SECTIONS, AnyEstimator, EstimatorSection, Section
from audit.config.values import Names, Number, as_list, checked, known
from audit.config.values import parse_number as parse_number
from audit.information.settings import AT_LEAST_ONE, STEP_SIZE
from audit.storage import canonical_json

TIERS = ("smoke", "audit", "leaderboard")


def _legal_norm(norm: str) -> str:
    known("norm", norm.lower() if norm.lower() in NORMS else norm, NORMS)
    return norm


def _legal_radius(eps: float, info: ValidationInfo) -> float:
    fault = eps_fault(eps, info.data.get("norm"))  # without a norm if that is not legal itself
    if fault:
        raise ValueError(fault)
    return eps


def _legal_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)} must be at least one, each named once")
    return seeds


Radius = Annotated[Number, AfterValidator(_legal_radius)]
Radii = Annotated[tuple[Radius, ...], BeforeValidator(as_list), Field(min_length=1)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(as_list), AfterValidator(_legal_seeds)]


class ThreatConfig(Section):
    """A norm and one or more radii in pixel units."""

    decides = ("norm", "eps")

    norm: Annotated[str, AfterValidator(_legal_norm)] = "linf"
    eps: Radii


class ModelConfig(Section):
    """A model reference, and the settings of the benchmark that it overrides.

    Reference and data set enter a cell's identity through the hashes of weights and images.
    """

    decides = ("ref", "dataset", "images", "layers", "threats")
    labels = ("name",)

    ref: str
    name: str | None = None
    dataset: str | None = None
    images: int | None = Field(default=None, ge=1)
    layers: Names | None = None
    threats: Annotated[tuple[ThreatConfig, ...], BeforeValidator(as_list)] | None = None


def _as_model(value: object) -> object:
    return {"ref": value} if isinstance(value, str) else value


def _as_models(value: object) -> object:
    return [_as_model(item) for item in as_list(value)]


class AttackConfig(Section):
    """The name of an attack tier, or custom steps of an attack on the cross-entropy and then on the margin."""

    decides = ("tier", "steps", "relative_step", "restarts")
    settings_of = "audit.adversary.pgd:PGD"

    tier: Annotated[str, AfterValidator(lambda name: known("tier", name, TIERS))] | None = None
    steps: Annotated[int, checked(AT_LEAST_ONE)] = 10
    relative_step: Annotated[Number, checked(STEP_SIZE)] = 0.25
    restarts: Annotated[int, checked(AT_LEAST_ONE)] = 1

    @field_validator("steps", "relative_step", "restarts")
    @classmethod
    def _alone(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("tier") is not None:
            raise ValueError(f"{info.field_name} and a tier exclude each other: a tier has its own settings")
        return value

    @property
    def is_custom(self) -> bool:
        """Whether the section holds custom steps, not a tier.

        Run folders of earlier versions spell the audit tier as `tier: null` beside the default steps.
        """
        given = self.model_fields_set
        spelled_out = given == set(type(self).model_fields) and self.tier is None
        default = (self.steps, self.relative_step, self.restarts) == (10, 0.25, 1)
        return bool(given - {"tier"}) and not (spelled_out and default)

    @model_serializer
    def _as_read_back(self) -> dict[str, Any]:
        """Return the given fields only: default steps beside a tier would be read back as custom ones."""
        if self.is_custom:
            return {"steps": self.steps, "relative_step": self.relative_step, "restarts": self.restarts}
        return {} if self.tier is None else {"tier": self.tier}

    def attack(self) -> Any:
        """Return the `LabelAttack` of the tier or of custom steps, by default of the audit tier."""
        from audit.adversary.label_attack import TIERS as ATTACKS
        from audit.adversary.label_attack import two_losses
        from audit.adversary.pgd import PGD

        if not self.is_custom:
            return ATTACKS[self.tier or "audit"]
        return two_losses(PGD(self.steps, self.relative_step, restarts=self.restarts))


def _as_attack(value: object) -> object:
    return {"tier": value} if isinstance(value, str) else value


class CertificateConfig(Section):
    """A certificate, with the ledger of images that the network provably keeps if asked for."""

    decides = ("ledger",)

    ledger: bool = False


def _as_certificate(value: object) -> object:
    if isinstance(value, dict):
        return CertificateConfig.model_validate(value)
    if not isinstance(value, bool | CertificateConfig):
        raise ValueError(f"certificate {value!r} is not legal: write true, false, or {{ledger: true}}")
    return value


class Planned(NamedTuple):
    """One cell before anything is loaded."""

    model: ModelConfig
    dataset: str
    images: int | None
    layer: str
    norm: str
    eps: float
    estimator: EstimatorSection


class BenchmarkConfig(Section):
    """A benchmark: models x layers x threat models, each over all seeds."""

    decides = (
        "dataset",
        "models",
        "threats",
        "layers",
        "images",
        "seeds",
        "reduce",
        "estimators",
        "certificate",
        "attack",
        "preprocess",
        "restrict_classes",
        "balanced",
    )
    labels = ("name", "keep_images")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")
    dataset: str
    models: Annotated[tuple[ModelConfig, ...], BeforeValidator(_as_models), Field(min_length=1)]
    threats: Annotated[tuple[ThreatConfig, ...], BeforeValidator(as_list), Field(min_length=1)]
    layers: Names = ("logits",)
    images: int | None = Field(default=None, ge=1)
    seeds: Seeds = (0, 1, 2)
    reduce: Literal["flatten", "mean"] = "flatten"
    estimators: Annotated[tuple[AnyEstimator, ...], BeforeValidator(as_list), Field(min_length=1)] = (
        ESTIMATOR_SECTIONS["sandwich"].model_validate({}),
    )
    certificate: Annotated[bool | CertificateConfig, BeforeValidator(_as_certificate)] = False
    attack: Annotated[AttackConfig, BeforeValidator(_as_attack)] = AttackConfig()
    preprocess: Literal["model", "none"] = "model"
    restrict_classes: bool = False
    balanced: bool = False
    keep_images: bool = False

    @field_validator("estimators")
    @classmethod
    def _distinct(cls, estimators: tuple[EstimatorSection, ...]) -> tuple[EstimatorSection, ...]:
        names = [each.shown for each in estimators]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice: tables distinguish estimators by name only")
        return estimators

    def planned(self) -> Iterator[Planned]:
        """Yield the cells of the benchmark, model by model; patterns of references are not expanded."""
        for model in self.models:
            dataset, images = model.dataset or self.dataset, model.images or self.images
            for layer in model.layers or self.layers:
                for estimator in self.estimators:
                    for section in model.threats or self.threats:
                        for eps in section.eps:
                            yield Planned(model, dataset, images, layer, section.norm.lower(), eps, estimator)

    def settings(self) -> list[Any]:
        """Return the `AuditSettings` of each estimator."""
        from audit.config.settings import AuditSettings

        attack, asked = self.attack.attack(), self.certificate
        ledger = asked.ledger if isinstance(asked, CertificateConfig) else False
        return [
            AuditSettings(each.estimator(), attack, self.seeds, self.reduce, bool(asked), ledger)
            for each in self.estimators
        ]

    def canonical(self) -> str:
        """Return the canonical JSON of this configuration; its digest identifies a run folder."""
        data = self.model_dump(mode="json")
        if not self.attack.is_custom:  # spelled in full, as in the stamps of existing run folders
            attack = self.attack
            data["attack"] = {name: getattr(attack, name) for name in type(attack).model_fields}
        for name in ("preprocess", "restrict_classes", "balanced"):  # later than the stamps of existing run folders
            if data[name] == type(self).model_fields[name].default:
                del data[name]
        del data["keep_images"]  # the same run, whether it keeps images or not
        return canonical_json(data)


__all__ = ["ESTIMATOR_SECTIONS", "AttackConfig", "BenchmarkConfig", "ModelConfig", "Planned", "ThreatConfig"]
