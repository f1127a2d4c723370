"""Pictures show the numbers they are made of."""

import json
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from nanomimi.picture import PictureConfig, draw, plot, spectrogram


def test_a_plot_places_every_point_in_proportion():
    svg = plot("x", "y", {}, {"a": [(0, 0), (5, 2), (10, 4)]})
    ElementTree.fromstring(svg)
    x, y = zip(*(map(float, dot) for dot in re.findall(r"M([\d.]+),([\d.]+)h0", svg)))
    assert x[1] - x[0] == x[2] - x[1] > 0 and y[0] - y[1] == y[1] - y[2] > 0


def test_the_training_curve_is_that_of_the_log(tmp_path):
    lines = [{"step": 10, "loss": 3.0}]
    for step, bits in ((10, 300.0), (20, 200.0), (30, 100.0)):
        numbers = {"bits_per_second": bits, "codec_bits_per_second": 400.0}
        lines.append({"step": step, "validation": numbers})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FileNotFoundError, match="is not a run"):  # no weights: no continuation
        draw(PictureConfig(run=tmp_path, out=tmp_path))
    paths = re.findall(r'<path d="M([^"V]+)h0" style', (tmp_path / "training.svg").read_text())
    model, codec = ([tuple(map(float, p.split(","))) for p in d.split(" L")] for d in paths)
    assert len(model) == len(codec) == 3 and len({y for _, y in codec}) == 1
    assert model[0][1] < model[1][1] < model[2][1]  # down the page


def test_a_spectrogram_is_a_png_that_is_dark_at_the_tone():
    rate, hop = 24000, 320
    wav = np.sin(2 * np.pi * 3000 * np.arange(rate) / rate).astype(np.float32)
    png = spectrogram(torch.from_numpy(wav), hop)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">2I", png[16:24])
    assert width == rate // hop + 1 and height == 257
    start = png.index(b"IDAT")
    (size,) = struct.unpack(">I", png[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(png[start + 4 : start + 4 + size]), np.uint8)
    grey = rows.reshape(height, width + 1)[:, 1:]
    darkest = grey[:, 10:-10].mean(axis=1).argmin()
    assert abs((height - 1 - darkest) / (height - 1) * rate / 2 - 3000) < 50
