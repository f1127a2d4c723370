"""A run's training curve, and what it made of a prompt, as SVG: python -m nanomimi.picture"""

import base64
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanomimi import checkpoint
from nanomimi.audio import read_audio
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.sampling import make_sampler
from nanomimi.tiny.listen import continue_wav

HEIGHT = 320  # of both pictures
COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a")  # told apart by colour-blind readers too
STYLE = """<style>text{font:13px system-ui,sans-serif;fill:#1f2328}path{fill:none;stroke:#1f2328}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}path{stroke:#e6edf3}}</style>"""
Series = dict[str, list[tuple[float, float]]]  # the points of each name


@dataclass(frozen=True)
class PictureConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    prompt: Path = option(Path("nanomimi/tiny/digits/slt.ogg"), "audio file to continue")
    out: Path = option(Path("."), "folder for training.svg and continuation.svg")


def svg(width: int, marks: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}">'
    return "\n".join([head, STYLE, *marks, "</svg>\n"])


def plot(x_label: str, y_label: str, series: Series, lines: bool) -> str:
    """A plot with a legend, of lines or of dots."""
    every = np.array([*sum(series.values(), []), (np.inf, 0.0)])  # the y-axis includes zero
    low, high = every.min(axis=0), every[:-1].max(axis=0)
    (left, bottom), (right, top) = start, end = np.array([(60, HEIGHT - 50), (380, 60)])
    place = lambda points: start + (points - low) / (high - low).clip(1e-9) * (end - start)
    text = '<text x="{:.0f}" y="{:.0f}" text-anchor="end">{}</text>'.format
    axes = f'<path d="M{left},{top} V{bottom} H{right}"/><text y="44">{y_label}</text>'
    marks = [axes, text(right, HEIGHT - 10, x_label)]
    for (x, y), (px, py) in zip((low, high), place((low, high))):
        marks += [text(px, HEIGHT - 30, f"{x:.4g}"), text(54, py + 5, f"{y:.4g}")]
    for i, ((name, points), colour) in enumerate(zip(series.items(), COLOURS)):
        pixels = [(f"{x:.1f}", f"{y:.1f}") for x, y in place(points)]
        path = " L".join(map(",".join, pixels))
        line = f'<path d="M{path}" style="stroke:{colour}" stroke-width="2"/>'
        dots = [f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>' for x, y in pixels]
        marks += [line] if lines else dots
        marks.append(f'<text x="80" y="{16 * i + 14}" style="fill:{colour}">{name}</text>')
    return svg(400, marks)


def training_curve(run: Path) -> str:
    """Validation in bits per second of audio over training steps, beside the codec's own rate."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curve = lambda key: [(n["step"], n["validation"][key]) for n in log if "validation" in n]
    series = {"model": curve("bits_per_second"), "codec": curve("codec_bits_per_second")}
    return plot("training steps", "bit/s of audio", series, lines=True)


def spectrogram(wav: np.ndarray, hop: int, window: int = 512) -> bytes:
    """(S,) -> a grey PNG: a column per `hop` samples, a row per frequency, 60 dB from white."""
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wav, window // 2), window)[::hop]
    level = 20 * np.log10(np.abs(np.fft.rfft(frames * np.hanning(window))) + 1e-6).T[::-1]
    grey = (255 * (1 - ((level - level.max()) / 60 + 1).clip(0, 1))).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)  # each row begins with its filter, none
    header = struct.pack(">2I5B", *grey.shape[::-1], 8, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 9), b"IEND")
    pack = lambda c: struct.pack(f">I{len(c)}sI", len(c) - 4, c, zlib.crc32(c))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(pack, chunks))


def draw(config: PictureConfig) -> None:
    """Write the training curve, and a continuation: its spectrogram over codes of codebook 0."""
    (config.out / "training.svg").write_text(training_curve(config.run))
    model, run = checkpoint.load(config.run)
    codec = Codec.load(run["data"]["codec"], model.num_codebooks)
    wav = read_audio(config.prompt, codec.sample_rate, max_seconds=2.0)
    prompt, new = continue_wav(model, codec, wav, make_sampler(temperature=0.8, top_k=30))
    codes = torch.cat([prompt, new], dim=2)
    image = spectrogram(codec.decode(codes)[0, 0].numpy(), codec.frame_size // 6)
    row, split = codes[0, 0].tolist(), 800 * prompt.shape[2] / codes.shape[2]
    upright = '<text transform="translate({:.1f},270) rotate(-90)">{}</text>'.format
    marks = [
        f'<text y="14">prompt</text><text x="{split + 4:.0f}" y="14">continuation</text>',
        f'<image y="20" width="800" height="220" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{base64.b64encode(image).decode()}"/>',
        f'<path d="M{split:.1f},0 V{HEIGHT}" stroke-width="2" style="stroke:{COLOURS[0]}"/>',
        '<text y="312">codes of codebook 0, one per frame of 80 ms</text>',
    ]
    marks += [upright((i + 0.7) * 800 / len(row), code) for i, code in enumerate(row)]
    (config.out / "continuation.svg").write_text(svg(800, marks))


if __name__ == "__main__":
    run_script(PictureConfig, draw, __doc__)
