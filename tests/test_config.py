from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from nanomimi import distributed
from nanomimi.config import Config, option, parse, run_script


@dataclass(frozen=True)
class Example(Config):
    files: tuple[Path, ...] = option((), "files", positional=True)
    rate: float = option(0.5, "a rate", above=0, at_most=1)
    count: int | None = option(None, "a count", at_least=1)
    kind: Literal["a", "b"] = option("a", "a kind")
    fast: bool = option(False, "a switch")
    sizes: tuple[int, ...] = option((1,), "sizes")


def test_flags_become_fields_of_their_types():
    line = "x y/z --rate 0.25 --count 3 --kind b --fast --sizes 2 3"
    expected = Example((Path("x"), Path("y/z")), 0.25, 3, "b", True, (2, 3))
    assert parse(Example, line.split()) == expected
    assert parse(Example, []) == Example()
    defaults = {"fast": True, "rate": 0.75}
    assert parse(Example, ["--no-fast"], defaults=defaults) == Example(rate=0.75)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rate=0.0), "--rate must be above 0; got 0.0"),
        (dict(rate=1.5), "--rate must be at most 1; got 1.5"),
        (dict(count=0), "--count must be at least 1; got 0"),
        (dict(kind="c"), "--kind must be a or b; got 'c'"),
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
        run_script(Example, lambda config: None)
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
        distributed.resolve_device("nonsense")


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_trains_in_bfloat16_only_if_it_has_instructions_for_it(amx, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert distributed.resolve_dtype("auto", torch.device("cpu")) == dtype
    assert distributed.resolve_dtype("auto", torch.device("cpu"), amx=False) == torch.float32
    assert distributed.resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
