"""The words hold: commands parse, files exist, lines are counted, files import from above alone."""

import re
import shlex
from pathlib import Path

import pytest

from nanomimi.bench import BenchConfig
from nanomimi.compare import CompareConfig
from nanomimi.config import parse
from nanomimi.evaluate.__main__ import EvaluateConfig
from nanomimi.picture import PictureConfig
from nanomimi.tiny.listen import ListenConfig
from nanomimi.tiny.train_codec import CodecConfig
from nanomimi.weights import WeightsConfig
from prepare import PrepareConfig
from sample import SampleConfig
from train import TrainConfig, train

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "nanomimi/RESULTS.md")}
README = PAGES["README.md"]
CONFIGS = {
    "prepare.py": PrepareConfig,
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "nanomimi.tiny.train_codec": CodecConfig,
    "nanomimi.tiny.listen": ListenConfig,
    "nanomimi.evaluate": EvaluateConfig,
    "nanomimi.bench": BenchConfig,
    "nanomimi.compare": CompareConfig,
    "nanomimi.picture": PictureConfig,
    "nanomimi.weights": WeightsConfig,
}
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanomimi/**/*.py")])
CEILINGS = {  # lines, comments included
    "prepare.py": 174,
    "train.py": 264,
    "sample.py": 130,
    "nanomimi/__init__.py": 35,
    "nanomimi/files.py": 127,
    "nanomimi/writer.py": 116,
    "nanomimi/audio.py": 110,
    "nanomimi/codec.py": 182,
    "nanomimi/tokens.py": 70,
    "nanomimi/data.py": 150,
    "nanomimi/llama.py": 242,
    "nanomimi/decode.py": 85,
    "nanomimi/lm.py": 100,
    "nanomimi/flat.py": 75,
    "nanomimi/hierarchical.py": 128,
    "nanomimi/delay.py": 85,
    "nanomimi/sampling.py": 45,
    "nanomimi/optimizer.py": 55,
    "nanomimi/corruption.py": 50,
    "nanomimi/checkpoint.py": 165,
    "nanomimi/config.py": 95,
    "nanomimi/weights.py": 160,
    "nanomimi/distributed.py": 82,
    "nanomimi/evaluate/__main__.py": 125,
    "nanomimi/evaluate/likelihood.py": 133,
    "nanomimi/evaluate/contrast.py": 69,
    "nanomimi/evaluate/pairs.py": 70,
    "nanomimi/bench.py": 204,
    "nanomimi/compare.py": 264,
    "nanomimi/picture.py": 89,
    "nanomimi/tiny/digits.py": 112,
    "nanomimi/tiny/sound.py": 160,
    "nanomimi/tiny/listen.py": 110,
    "nanomimi/tiny/train_codec.py": 235,
}
IDEA = "tokens data llama lm decode flat hierarchical sampling optimizer".split()


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_file_is_longer_than_its_ceiling_and_the_whole_is_read_in_an_evening():
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in CODE}
    small = {name for name in sizes if name.endswith("__init__.py")}
    assert set(sizes) - small <= set(CEILINGS)
    over = {name: sizes[name] for name, ceiling in CEILINGS.items() if sizes[name] > ceiling}
    assert not over
    assert sum(sizes.values()) <= 4248
    assert sizes["train.py"] + sum(sizes[f"nanomimi/{name}.py"] for name in IDEA) <= 1200
    assert len(README.splitlines()) <= 200


def test_the_readmes_line_counts_are_true():
    sizes = {str(path.relative_to(ROOT)): lines(path) for path in CODE}
    idea = sizes["train.py"] + sum(sizes[f"nanomimi/{name}.py"] for name in IDEA)
    stated = re.search(
        r"idea alone is\s+([\d,]+) lines of Python, everything together ([\d,]+)", README
    )
    numbers = [int(number.replace(",", "")) for number in stated.groups()]
    assert numbers == [round(idea, -2), round(sum(sizes.values()), -2)]
    counted = re.findall(r"^([\w/]+\.py) .* (\d+)$", tree(), re.M)
    assert {name: int(count) for name, count in counted} == {
        name: round(size + 0.1, -1) for name, size in sizes.items() if name in dict(counted)
    }


def tree() -> str:
    """The annotated tree of the README."""
    return README[README.index("nanomimi/files.py  ") : README.index("## Your own audio")]


def test_the_tree_lists_every_file_and_folder():
    named = set(re.findall(r"^([\w./]+) ", tree(), re.M))
    package = {f"nanomimi/{path.name}" for path in (ROOT / "nanomimi").glob("*.py")}
    folders = {"nanomimi/tiny/", "nanomimi/evaluate/", "tests/"}
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert named == package - {"nanomimi/__init__.py"} | scripts | folders


def test_files_import_only_from_files_above_them():
    order = re.findall(r"^nanomimi/(\w+)(?:\.py|/) ", tree(), re.M)
    for place, name in enumerate(order):
        path = ROOT / "nanomimi" / name
        for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            text = file.read_text()
            imported = set(re.findall(r"^from nanomimi\.(\w+)", text, re.M))
            for names in re.findall(r"^from nanomimi import ([\w, ]+)$", text, re.M):
                imported |= set(names.split(", "))
            assert imported - {name} <= set(order[:place]), file


@pytest.mark.parametrize("package, home", [("moshi", "codec.py"), ("sphn", "audio.py")])
def test_one_file_knows_each_library_for_sound(package, home):
    users = [p for p in CODE if re.search(rf"^(from|import) {package}\b", p.read_text(), re.M)]
    assert [path.name for path in users] == [home]


def commands() -> list[str]:
    """Every command of the pages that starts one of ours, in blocks and in running text."""
    text = "\n".join(PAGES.values())
    pieces = re.findall(r"```bash\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in (line for piece in pieces for line in piece.splitlines()):
        found += [part.strip() for part in re.split(r"&&| \| ", line)]
    return [
        line
        for line in dict.fromkeys(found)
        if re.match(r"(python|torchrun) .*", line) and "-m pytest" not in line
    ]


@pytest.mark.parametrize("command", commands())
def test_commands_have_the_flags_they_show(command):
    words = shlex.split(command)
    name = next(word for word in words if word in CONFIGS)
    parse(CONFIGS[name], words[words.index(name) + 1 :])


def test_every_command_is_shown_and_every_flag_in_the_text_exists():
    shown = " ".join(commands()) + (ROOT / "nanomimi/tiny/README.md").read_text()
    assert all(name in shown for name in CONFIGS)
    known = {f"--{name}" for config in CONFIGS.values() for name in config.__dataclass_fields__}
    for page in PAGES.values():
        assert set(re.findall(r"--\w+", page.replace("--no-", "--"))) <= known | {"--nproc_per_node"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(CONFIGS[name], ["--help"])
    assert stop.value.code == 0 and "default: " in capsys.readouterr().out


def test_links_and_pictures_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), target
    assert all(path.stat().st_size < 150_000 for path in (ROOT / "nanomimi/figures").iterdir())


def test_the_readmes_python_runs(counted, tmp_path, monkeypatch, capsys):
    """With a run of a model that has learned nothing in the place of runs/digits."""
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    run = tmp_path / "run"
    train(TrainConfig(data=(counted,), out=run, max_steps=1, n_layer=1, n_embd=32, max_frames=8))
    monkeypatch.chdir(ROOT)
    exec(code.replace("runs/digits", str(run)), {})
    assert "nats per token" in capsys.readouterr().out


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 -E '([^']+)'", script).group(1)
    assert len(re.findall(pattern, README, re.M)) == 1
