"""The README's words hold: its commands parse, its files exist, and CI runs its test command."""

import re
import shlex
from pathlib import Path

import pytest

from nanomimi.bench import BenchConfig
from nanomimi.config import parse
from nanomimi.evaluate import EvaluateConfig
from nanomimi.tiny.train_codec import CodecConfig
from prepare import PrepareConfig
from sample import SampleConfig
from tests.counting import CountingConfig
from tests.experiment import ExperimentConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONFIGS = {
    "prepare.py": PrepareConfig,
    "train.py": TrainConfig,
    "sample.py": SampleConfig,
    "nanomimi.tiny.train_codec": CodecConfig,
    "nanomimi.evaluate": EvaluateConfig,
    "nanomimi.bench": BenchConfig,
    "tests.counting": CountingConfig,
    "tests.experiment": ExperimentConfig,
}


def commands() -> list[str]:
    """Every command of the README that starts one of ours, in blocks and in running text."""
    pieces = re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]+)`", README)
    lines = [
        part.strip()
        for piece in pieces
        for line in piece.splitlines()
        for part in re.split(r"&&| \| ", line)
    ]
    return [
        line
        for line in lines
        if re.match(r"(python|torchrun) .*", line) and "-m pytest" not in line
    ]


@pytest.mark.parametrize("command", [c for c in commands() if "-m venv" not in c])
def test_commands_have_the_flags_they_show(command):
    words = shlex.split(command.replace("...", ""))
    name = next(word for word in words if word in CONFIGS)
    parse(CONFIGS[name], words[words.index(name) + 1 :])


def test_the_readme_shows_every_script():
    shown = " ".join(commands())
    assert all(name in shown for name in CONFIGS)


def test_flags_named_in_the_text_exist():
    known = {f"--{name}" for config in CONFIGS.values() for name in config.__dataclass_fields__}
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    assert set(re.findall(r"--\w+", README)) <= known | others


def test_the_table_of_files_is_the_list_of_files():
    table = README[README.index("| file | step |") : README.index("Four decisions")]
    named = set(re.findall(r"^\| `([\w./]+)` \|", table, re.M))
    steps = {f"nanomimi/{path.name}" for path in (ROOT / "nanomimi").glob("*.py")} - {
        "nanomimi/__init__.py"
    }
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert named == steps | scripts | {"nanomimi/tiny/", "tests/"}
    inside = set(re.findall(r"`([\w./]+)`", table)) - named - {"data/NAME", "runs/NAME"}
    assert all(
        (ROOT / name).exists() or (ROOT / "nanomimi/tiny" / name).exists() for name in inside
    )


def test_files_import_only_from_files_above_them():
    order = re.findall(r"^\| `nanomimi/(\w+)(?:\.py|/)` \|", README, re.M)
    for place, name in enumerate(order):
        path = ROOT / "nanomimi" / name
        for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            imported = set(re.findall(r"^from nanomimi\.(\w+)", file.read_text(), re.M))
            assert imported - {name} <= set(order[:place]), file


def test_only_the_codec_knows_moshi_and_only_audio_knows_sphn():
    for package, home in (("moshi", "codec.py"), ("sphn", "audio.py")):
        users = {
            path.name
            for path in ROOT.glob("nanomimi/**/*.py")
            if re.search(rf"^(from|import) {package}\b", path.read_text(), re.M)
        }
        users |= {
            path.name
            for path in ROOT.glob("*.py")
            if re.search(rf"^(from|import) {package}\b", path.read_text(), re.M)
        }
        assert users == {home}


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    pattern = re.search(r"grep -m 1 -E '([^']+)'", script).group(1)
    assert len(re.findall(pattern, README, re.M)) == 1
