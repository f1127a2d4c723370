from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from nanomimi import config as config_module
from nanomimi.config import Config, argument, option, parse, resolve_device, run


@dataclass(frozen=True)
class Example(Config):
    files: tuple[Path, ...] = argument("files")
    rate: float = option(0.5, "a rate", above=0, at_most=1)
    count: int | None = option(None, "a count", at_least=1)
    kind: Literal["a", "b"] = option("a", "a kind")
    fast: bool = option(False, "a switch")


def test_flags_become_fields_of_their_types():
    config = parse(Example, ["x", "y/z", "--rate", "0.25", "--count", "3", "--kind", "b", "--fast"])
    assert config == Example((Path("x"), Path("y/z")), 0.25, 3, "b", True)
    assert parse(Example, []) == Example()
    assert parse(Example, ["--no-fast"], defaults={"fast": True, "rate": 0.75}) == Example(
        rate=0.75
    )


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rate=0.0), "--rate must be above 0; got 0.0"),
        (dict(rate=1.5), "--rate must be at most 1; got 1.5"),
        (dict(count=0), "--count must be at least 1; got 0"),
        (dict(kind="c"), "--kind must be one of a, b; got 'c'"),
        (dict(rate=float("nan")), "--rate must be"),
    ],
)
def test_values_out_of_bounds_are_refused_from_python_too(values, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        Example(**values)


@pytest.mark.parametrize(
    "argv", [["--rate", "fast"], ["--rat", "1"], ["--unknown", "1"], ["--rate", "-1"]]
)
def test_a_bad_command_line_ends_with_status_2_and_no_traceback(argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as stop:
        run(Example, lambda config: None)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert argv[0] in message and "Traceback" not in message


def test_help_gives_every_default(capsys):
    with pytest.raises(SystemExit):
        parse(Example, ["--help"])
    text = capsys.readouterr().out
    assert "(default: 0.5)" in text and "--fast, --no-fast" in text


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--device nonsense cannot be used"):
        resolve_device("nonsense")


def test_bfloat16_is_taken_where_it_is_clearly_faster_and_by_all_processes(monkeypatch):
    measured = {torch.float32: 1.31, torch.bfloat16: 1.0}
    monkeypatch.setattr(config_module, "_product_seconds", lambda device: measured)
    auto = lambda: config_module.resolve_dtype("auto", torch.device("cpu"))
    assert auto() == torch.bfloat16
    measured[torch.float32] = 1.29
    assert auto() == torch.float32
    # As a process whose own measurement differs from that of the first.
    monkeypatch.setattr(config_module.dist, "is_initialized", lambda: True)
    first = lambda answer: answer.__setitem__(0, True)
    monkeypatch.setattr(config_module.dist, "broadcast_object_list", first)
    assert auto() == torch.bfloat16
