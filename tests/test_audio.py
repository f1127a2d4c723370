import numpy as np
import pytest
import sphn

from nanomimi.audio import audio_files, read_audio, resample, trim_silence, write_wav
from tests.conftest import pcm_wav, tone

RATE = 24000


def test_every_format_rate_and_channel_count_gives_the_same_sound(tmp_path):
    expected = tone(2.0, RATE)
    pcm_wav(tmp_path / "mono8.wav", tone(2.0, 8000)[None], 8000)
    pcm_wav(tmp_path / "mono44.wav", tone(2.0, 44100)[None], 44100)
    pcm_wav(
        tmp_path / "stereo.wav", np.stack([tone(2.0, 16000) * 1.5, tone(2.0, 16000) * 0.5]), 16000
    )
    write_wav(tmp_path / "own.wav", expected, RATE)
    for path in audio_files([tmp_path]):
        wav = read_audio(path, RATE)
        assert wav.dtype == np.float32 and abs(len(wav) - len(expected)) <= 1
        inside = slice(2000, -2000)
        assert np.abs(wav[: len(expected)] - expected[: len(wav)])[inside].max() < 0.03, path
    assert len(read_audio(tmp_path / "own.wav", RATE, max_seconds=0.5)) == RATE // 2


def test_opus_is_read_at_its_length_and_pitch(tmp_path):
    sphn.write_opus(str(tmp_path / "a.opus"), tone(2.0, RATE), RATE)
    wav = read_audio(tmp_path / "a.opus", RATE)
    assert abs(len(wav) - 2 * RATE) < 1000
    spectrum = np.abs(np.fft.rfft(wav[: 2 * RATE - 1000]))
    assert abs(np.fft.rfftfreq(2 * RATE - 1000, 1 / RATE)[spectrum.argmax()] - 440) < 2


@pytest.mark.parametrize("source", [8000, 11025, 16000, 22050, 32000, 44100, 48000])
def test_resampling_keeps_length_and_time(source):
    out = resample(tone(2.0, source), source, RATE)
    assert len(out) == 2 * RATE
    assert np.abs(out - tone(2.0, RATE))[1000:-1000].max() < 0.02


def test_a_recording_is_trimmed_to_its_sounds():
    soft = 0.1 * tone(0.3, RATE)  # a consonant
    sound = np.concatenate([soft, tone(0.5, RATE, hz=200)])
    noise = 1e-3 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    wav = trim_silence(np.concatenate([noise, sound, noise]), RATE)
    assert len(wav) / RATE == pytest.approx(0.2 + 0.8 + 0.2, abs=0.02)
    assert np.sqrt((wav[-9600:-7200] ** 2).mean()) == pytest.approx(0.2, rel=0.01)
    assert len(trim_silence(sound, RATE)) / RATE == pytest.approx(1.2, abs=0.02)
    assert len(trim_silence(np.zeros(RATE, np.float32), RATE)) == 0
    assert len(trim_silence(0.1 * noise, RATE)) == 0


def test_unreadable_files_say_what_is_wrong(tmp_path):
    write_wav(tmp_path / "whole.wav", tone(2.0, RATE), RATE)
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "text.wav").write_text("this is text\n" * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.opus").write_text("this is text")
    (tmp_path / "text.mp3").write_text("this is text")
    write_wav(tmp_path / "silent.wav", np.zeros(0, np.float32), RATE)
    for name, message in [
        ("text.wav", "cannot be read"),
        ("empty.wav", "cannot be read"),
        ("truncated.wav", "truncated"),
        ("text.opus", "cannot be read"),
        ("text.mp3", "cannot be read"),
        ("silent.wav", "no samples"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_audio(tmp_path / name, RATE)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_audio(tmp_path / "missing.wav", RATE)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        audio_files([tmp_path / "nowhere"])
