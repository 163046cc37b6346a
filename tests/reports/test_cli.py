import ctypes
import json
import os
import subprocess
import sys
import types

import click
import pytest

from audit.errors import ConfigError, UnsafeError
from reports import cli


@pytest.fixture(autouse=True)
def fake_measuring_commands(monkeypatch):
    """Replace the mounted commands by one that fails in a chosen way and one that returns an exit code."""
    module = types.ModuleType("fake_commands")
    table = types.ModuleType("audit.commands.table")
    table.COMMANDS = {"model-list": ("fake_commands", "List models."), "run": ("fake_commands", "Run a benchmark.")}

    @click.command("run", help="Run a benchmark.")
    @click.option("--batch-size", type=int, default=0)
    def run_command(batch_size):
        click.echo(f"batch {batch_size}")
        return 1 if batch_size else 0

    @click.command("model-list", help="List models.")
    @click.argument("how")
    @click.pass_context
    def model_list_command(ctx, how):
        if how == "exit":
            ctx.exit(1)
        raise {
            "unsafe": UnsafeError("refused: \x1b[31m\u202eevil"),
            "config": ConfigError(["a.yaml:1:1: one", "a.yaml:2:1: two"]),
            "stop": KeyboardInterrupt(),
        }[how]

    module.run_command, module.model_list_command = run_command, model_list_command
    monkeypatch.setitem(sys.modules, "fake_commands", module)
    monkeypatch.setitem(sys.modules, "audit.commands.table", table)


def test_help_lists_own_and_mounted_commands(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("figures", "leaderboard", "report", "run", "model-list"):
        assert f"  {name} " in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rvaudit, version ")


def test_underscores_are_accepted_and_a_returned_code_is_the_exit_code(capsys):
    assert cli.main(["run", "--batch_size", "3"]) == 1
    assert capsys.readouterr().out == "batch 3\n"
    assert cli.main(["run"]) == 0


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("unsafe", 4, "Error: refused: evil\n"),
        ("config", 2, "Error: a.yaml:1:1: one\na.yaml:2:1: two\n"),
        ("stop", 130, "Error: interrupted"),
        ("exit", 1, ""),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(how, code, said, capsys):
    assert cli.main(["model_list", how]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_usage_errors_name_the_nearest_command(capsys):
    assert cli.main(["leaderbord"]) == 2
    assert "leaderboard" in capsys.readouterr().err
    assert cli.main(["leaderboard"]) == 2
    assert "RUN" in capsys.readouterr().err


def test_leaderboard_on_a_terminal(mixed_zoo, write_run, capsys, monkeypatch):
    folder = write_run(mixed_zoo)
    assert cli.main(["leaderboard", str(folder)]) == 0
    wide = capsys.readouterr().out
    assert "densenet-robust" in wide
    assert "baseline-h-robust: contradicted: worst_nats 0.30 is under its floor 0.52; saturated" in wide
    assert "resnet-quarter: failed: the weights hold NaN" in wide
    assert "adversarial accuracy bound" not in wide
    assert (folder / "leaderboard.csv").exists()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["leaderboard", str(folder)]) == 0
    narrow = capsys.readouterr().out
    assert "0.530 ± 0.060" in narrow
    assert "natural accuracy" not in narrow


def test_control_characters_of_names_are_removed(hostile, write_run, capsys):
    assert cli.main(["leaderboard", str(write_run(hostile))]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[bold]markup[/bold]" in shown


def test_json_is_one_array_and_nothing_else(mixed_zoo, hostile, write_run, capsys):
    assert cli.main(["leaderboard", "--json", str(write_run(mixed_zoo))]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in rows][-3:] == ["10", "unranked", "unranked"]
    assert rows[0]["flags"] == []
    assert cli.main(["leaderboard", "--json", str(write_run(hostile, "other"))]) == 0
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert len(json.loads(shown)) == len(hostile)


def test_several_runs_and_a_csv_file(zoo, write_run, tmp_path, capsys):
    first, second = write_run(zoo[:6], "one"), write_run(zoo[6:], "two")
    assert cli.main(["leaderboard", str(first), str(second), "--out", str(tmp_path / "all.csv")]) == 0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 13
    assert len((first / "leaderboard.csv").read_text().splitlines()) == 7
    assert cli.main(["leaderboard", str(first), "--out", str(tmp_path / "all.xlsx")]) == 2
    assert "must end in .csv" in capsys.readouterr().err


def test_a_read_only_archive_can_still_be_shown(zoo, write_run, capsys):
    folder = write_run(zoo)
    (folder / "leaderboard.csv").mkdir()
    assert cli.main(["leaderboard", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "Note: cannot write" in captured.err
    assert "vgg-robust" in captured.out


def test_figures_and_report_list_what_they_wrote(zoo, write_run, capsys):
    folder = write_run(zoo[:1])
    assert cli.main(["figures", str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4  # one estimator has none to agree with
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html")


def test_no_records_exit_with_three(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 3
    assert "holds no records" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from reports.cli import main; main(['--help'])\n"
        "names = ('torch', 'numpy', 'pandas', 'matplotlib', 'rich', 'pydantic', 'audit.commands.run')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("given", "used"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_spinning_unless_the_user_wants_it(monkeypatch, given, used):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert cli.main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == used


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("chosen", ["", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_freed_memory_is_kept_unless_the_user_has_set_its_thresholds(platform, chosen, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *words: calls.append(words)))
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(chosen, "1000")
    assert cli.main(["--version"]) == 0
    assert calls == ([(-3, 2**25), (-1, 2**29)] if platform == "linux" and not chosen else [])


@pytest.mark.parametrize("library", [OSError("none"), AttributeError("musl")])
def test_another_c_library_is_no_failure(library, monkeypatch, capsys):
    def load(_):
        raise library

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert cli.main(["--version"]) == 0
