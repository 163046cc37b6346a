"""The sections of estimators, derived from `audit.information.registry`: keys, defaults and legal values.

A section is validated without torch, so that a typo is reported at once.
"""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag, create_model

from audit.config.values import Number, checked, known
from audit.information.registry import REGISTRY
from audit.information.settings import EstimatorSettings, rules_of


class Section(BaseModel):
    """A mapping in a benchmark file; `decides` are the fields that are part of a cell's identity, `labels` the others.

    `settings_of` is the dataclass that the section fills, as `module:name`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    decides: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[tuple[str, ...]] = ()
    settings_of: ClassVar[str] = ""


class EstimatorSection(Section):
    """An estimator by its name, with the settings that differ from its defaults."""

    name: str

    def settings(self) -> EstimatorSettings:
        """Return the settings of the estimator, without torch."""
        found: EstimatorSettings = _filled(REGISTRY[self.name].settings, self)
        return found

    @property
    def shown(self) -> str:
        """The name of the estimator in tables, such as `mine-infonce`."""
        return self.settings().name

    def estimator(self) -> Any:
        """Return the `audit.information.estimator.Estimator` with these settings."""
        from audit.information.estimator import ESTIMATORS

        settings = self.settings()
        return replace(ESTIMATORS[self.name], **{each.name: getattr(settings, each.name) for each in fields(settings)})


def _is_fixed(field: Field[Any]) -> bool:
    return field.metadata.get("yaml") == "fixed"


def _is_flat(field: Field[Any]) -> bool:
    return field.metadata.get("yaml") == "flat"


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _filled(defaults: Any, section: Section) -> Any:
    """Return settings with the values of a section; fixed fields keep their defaults."""
    values = {}
    for field in fields(defaults):
        if _is_fixed(field):
            continue
        default = getattr(defaults, field.name)
        value = section if _is_flat(field) else getattr(section, _key(field))
        values[field.name] = _filled(default, value) if is_dataclass(default) else value
    return replace(defaults, **values)


def _section_fields(defaults: Any) -> dict[str, Any]:
    """Return the fields of a section for pydantic, each an annotation and a default, in the order of the settings."""
    found: dict[str, Any] = {}
    for field in fields(defaults):
        default = getattr(defaults, field.name)
        if _is_fixed(field):
            continue
        if _is_flat(field):
            found |= _section_fields(default)
        elif is_dataclass(default):
            kind: type = type(default)
            nested = nested_section(kind)
            found[_key(field)] = (nested, nested())
        else:
            found[_key(field)] = (_annotation(field.type), default)
    return found


def _annotation(kind: Any) -> Any:
    """Return a setting's annotation with pydantic validators: rules are checked, and floats may be fractions."""
    base = get_args(kind)[0] if rules_of(kind) else kind
    if get_origin(base) is tuple:
        base = tuple[_annotation(get_args(base)[0]), ...]  # type: ignore[misc]
    elif base is float:
        base = Number
    elif base == float | None:
        base = Number | None
    for rule in rules_of(kind):
        base = Annotated[base, checked(rule)]
    return base


@cache
def nested_section(settings: type) -> type[Section]:
    """Return the section of settings that are a mapping inside an estimator's section, such as `critic`."""
    found = create_model(
        f"{settings.__name__}Section", __base__=Section, __doc__=settings.__doc__, **_section_fields(settings())
    )
    found.decides = tuple(found.model_fields)
    found.settings_of = f"{settings.__module__}:{settings.__name__}"
    return found


def estimator_section(name: str, defaults: EstimatorSettings) -> type[EstimatorSection]:
    """Return the section of an estimator, by its name and default settings."""
    own = {"name": (Literal[name], name), **_section_fields(defaults)}
    kind = type(defaults)
    found = create_model(f"{kind.__name__}Section", __base__=EstimatorSection, __doc__=kind.__doc__, **own)
    found.labels = defaults.memory_only
    found.decides = tuple(key for key in found.model_fields if key not in found.labels)
    found.settings_of = f"{kind.__module__}:{kind.__name__}"
    return found


ESTIMATOR_SECTIONS: Mapping[str, type[EstimatorSection]] = {
    name: estimator_section(name, registered.settings) for name, registered in REGISTRY.items()
}


def _as_estimator(value: object) -> object:
    """Return a name as a mapping with it; raises ValueError for an unknown name."""
    mapping = {"name": value} if isinstance(value, str) else value
    if isinstance(mapping, EstimatorSection):
        return mapping
    if not isinstance(mapping, dict) or not isinstance(mapping.get("name"), str):
        raise ValueError(f"an estimator is a name or a mapping with one; legal: {', '.join(ESTIMATOR_SECTIONS)}")
    known("estimator", mapping["name"], ESTIMATOR_SECTIONS)
    return mapping


def _section_name(value: object) -> str | None:
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


AnyEstimator: Any = Annotated[
    Union[*(Annotated[section, Tag(name)] for name, section in ESTIMATOR_SECTIONS.items())],
    Discriminator(_section_name),
    BeforeValidator(_as_estimator),
]
