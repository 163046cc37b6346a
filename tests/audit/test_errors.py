import pytest

from audit import errors
from audit.errors import AuditError, CheckpointError, ConfigError, UnknownNameError, suggestion

CODES = {
    "AuditError": 1, "InvalidModelError": 1,
    "UsageError": 2, "UnknownNameError": 2, "ConfigError": 2, "MismatchError": 2,
    "EnvironmentFault": 3, "CheckpointError": 3,
    "UnsafeError": 4,
    "IntegrityError": 5,
}  # fmt: skip


def test_every_error_has_its_exit_code():
    found = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert {name: kind.exit_code for name, kind in found.items()} == CODES
    assert all(issubclass(kind, AuditError) for kind in found.values())


def test_unknown_name_suggests_the_nearest_and_lists_legal_names():
    message = str(UnknownNameError("norm", "lnf", ["linf", "l2", "l1", "l2"]))
    assert message == "unknown norm 'lnf'; did you mean 'linf'? Legal: l1, l2, linf"


@pytest.mark.parametrize(
    ("legal", "value", "wanted"),
    [
        ([], "x", "; none is known"),
        (["ab", "cd"], "zz", "; Legal: ab, cd"),
        ([f"layer{i}" for i in range(20)], "layer1x", "; did you mean 'layer1'"),
        ([f"layer{i}" for i in range(20)], "zz", "; 20 names are known, none of them similar"),
    ],
)
def test_suggestions(legal, value, wanted):
    assert suggestion(value, legal).startswith(wanted)


def test_a_long_table_is_not_printed():
    assert "Legal" not in suggestion("layer1", [f"layer{i}" for i in range(20)])


def test_a_configuration_error_carries_all_faults():
    error = ConfigError(["a.yaml:1:2: one", "a.yaml:3:4: two"])
    assert error.faults == ("a.yaml:1:2: one", "a.yaml:3:4: two")
    assert str(error).splitlines() == list(error.faults)


def test_a_checkpoint_error_carries_its_kind():
    error = CheckpointError("html", "this is a web page")
    assert (error.kind, str(error)) == ("html", "this is a web page")
