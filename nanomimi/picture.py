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
from nanomimi.tiny import digits, listen

COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a")  # told apart by colour-blind readers too
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d 320">
<style>text{font:13px system-ui,sans-serif;fill:#1f2328}path{fill:none;stroke:#1f2328}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}path{stroke:#e6edf3}}</style>%s</svg>
"""


@dataclass(frozen=True)
class PictureConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    out: Path = option(Path("."), "folder for training.svg and continuation.svg")


def plot(x_label: str, y_label: str, lines: dict[str, list], dots: dict[str, list] = {}) -> str:
    """A plot with a legend: the (x, y) of each name as a line, as dots or as both."""
    x, y = np.array(sum([*lines.values(), *dots.values()], [])).T
    low, high = np.array([(x.min(), y.min() if dots else 0), (x.max(), y.max())])
    place = lambda xy: (60, 270) + (xy - low) / (high - low).clip(1e-9) * (320, -210)
    svg = f"""<path d="M60,60 V270 H380"/><text y="44">{y_label}</text><g text-anchor="end">
<text x="60" y="290">{low[0]:.4g}</text><text x="54" y="275">{low[1]:.4g}</text>
<text x="380" y="290">{high[0]:.4g}</text><text x="54" y="65">{high[1]:.4g}</text>
<text x="380" y="310">{x_label}</text></g>\n"""
    for i, (name, colour) in enumerate(zip({**lines, **dots}, COLOURS)):
        svg += f'<text x="{60 + 60 * i}" y="20" style="fill:{colour}">{name}</text>\n'
        # A line without length has round ends: a dot.
        for points, link, width in ((lines, " L", 2), (dots, "h0 M", 8)):
            if name in points:
                path = link.join(f"{x:.1f},{y:.1f}" for x, y in place(points[name]))
                style = f"stroke:{colour};stroke-width:{width};stroke-linecap:round"
                svg += f'<path d="M{path}h0" style="{style}"/>\n'
    return SVG % (400, svg)


def spectrogram(wav: torch.Tensor, hop: int) -> bytes:
    """(S,) -> a grey PNG: a column per `hop` samples, a row per frequency, 60 dB from white."""
    stft = torch.stft(wav, 512, hop, window=torch.hann_window(512), return_complex=True)
    level = 20 * torch.log10(stft.abs() + 1e-6).flip(0)
    grey = (255 * ((level.max() - level) / 60).clamp(0, 1)).byte().numpy()
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # each row begins with its filter, none
    header = struct.pack(">2I5B", *grey.shape[::-1], 8, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 9), b"IEND")
    pack = lambda c: struct.pack(f">I{len(c)}sI", len(c) - 4, c, zlib.crc32(c))
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(pack, chunks))


def draw(config: PictureConfig) -> None:
    """Write the training curve, and a continuation: its spectrogram over codes of codebook 0."""
    log = [json.loads(line) for line in (config.run / "log.jsonl").read_text().splitlines()]
    curve = lambda key: [(n["step"], n["validation"][key]) for n in log if "validation" in n]
    series = {"model": curve("bits_per_second"), "codec": curve("codec_bits_per_second")}
    (config.out / "training.svg").write_text(plot("training steps", "bit/s of audio", series))
    model, run = checkpoint.load(config.run)
    codec = Codec.load(run["data"]["codec"], model.num_codebooks)
    wav = read_audio(digits.FOLDER / "slt.ogg", codec.sample_rate, max_seconds=2.0)
    prompt, new = listen.continue_wav(model, codec, wav, make_sampler(temperature=0.8, top_k=30))
    codes = torch.cat([prompt, new], dim=2)
    png = base64.b64encode(spectrogram(codec.decode(codes)[0, 0], codec.frame_size // 6)).decode()
    split, step = (800 * n / codes.shape[2] for n in (prompt.shape[2], 1))
    svg = f"""<text y="14">prompt</text><text x="{split + 4:.0f}" y="14">continuation</text>
<image y="20" width="800" height="220" preserveAspectRatio="none"
href="data:image/png;base64,{png}"/>
<path d="M{split:.1f},0 V320" stroke-width="2" style="stroke:{COLOURS[0]}"/>
<text y="312">codes of codebook 0, one per frame of 80 ms</text>"""
    for i, code in enumerate(codes[0, 0]):
        svg += f'<text transform="translate({(i + 0.7) * step:.1f},270) rotate(-90)">{code}</text>'
    (config.out / "continuation.svg").write_text(SVG % (800, svg))


if __name__ == "__main__":
    run_script(PictureConfig, draw, __doc__)
