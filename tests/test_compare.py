"""The table and the picture of compare.py say what the runs said."""

import json
import re

from nanomimi import compare as compare_module
from nanomimi.compare import CompareConfig, compare, table


def result(nats: float, margin: float) -> dict:
    swap = {"accuracy": 0.5 + margin, "margin": margin}
    held = {"nats_per_frame": nats, "nats_per_codebook": [nats / 4, 3 * nats / 4]}
    return {"parameters": 1500000, "held_out": held, "consistency": swap}


RESULTS = {
    "flat": [result(6.0, 0.1), result(7.0, 0.3)],
    "hierarchical": [result(5.0, 0.0), result(5.0, 0.0)],
}


def test_the_table_gives_means_and_standard_deviations():
    text = table(RESULTS, dict.fromkeys(RESULTS, 63.2))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1
    nats = ["6.50 ± 0.71", "1.62 4.88"]
    assert rows[2] == ["flat", "1.50M", "63", *nats, "70 ± 14", "0.200 ± 0.141"]


def test_models_are_trained_and_evaluated_once(random_data, tmp_path, monkeypatch, capsys):
    """Its commands run as printed; a second call trains nothing; a stopped one is continued."""
    small = "--num_codebooks 2 --max_frames 8 --n_layer 1 --n_embd 32 --batch_size 2"
    models = {"flat": small, "hierarchical": f"--arch hierarchical {small}"}
    monkeypatch.setattr(compare_module, "MODELS", models)
    monkeypatch.setattr(compare_module, "COMPARISON", models)
    commands = []
    monkeypatch.setattr(compare_module.tqdm, "write", commands.append)
    config = CompareConfig(data=random_data, out=tmp_path / "out", seeds=1, max_steps=2)
    compare(config)
    assert len(commands) == 4
    runs = [json.loads(path.read_text()) for path in sorted(config.out.glob("*/evaluation.json"))]
    nats = [run["held_out"]["nats_per_frame"] for run in runs]
    margins = [run["consistency"]["margin"] for run in runs]
    dots = re.findall(r"M([\d.]+),([\d.]+)h0", (config.out / "compare.svg").read_text())
    x, y = zip(*(map(float, dot) for dot in dots))  # flat and hierarchical, from the top left
    assert len(dots) == 2
    assert (x[0] < x[1]) == (nats[0] < nats[1]) and (y[0] > y[1]) == (margins[0] < margins[1])
    first = capsys.readouterr().out
    compare(config)
    assert len(commands) == 4 and capsys.readouterr().out == first
    assert first.count("| flat |") == 1
    (config.out / "flat-0" / "evaluation.json").unlink()
    compare(config)
    assert len(commands) == 6 and "--resume" in commands[4]
    assert capsys.readouterr().out == first
