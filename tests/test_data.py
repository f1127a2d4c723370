import json

import numpy as np
import pytest
import torch

from nanomimi import DatasetWriter, TokenDataset
from nanomimi.tokens import unflatten

ONE = torch.zeros(6, 3, dtype=torch.long)  # an utterance
FRAMES = 8  # a window is FRAMES + 1 frames


def codes_of(dataset: TokenDataset, start: int, count: int) -> torch.Tensor:
    return unflatten(dataset.frames(start, count)[None], dataset.num_codebooks, 15)[0]


def test_utterances_come_back_at_their_place_between_separators(random_codec, tmp_path):
    utterances = [torch.randint(0, 15, (6, n)) for n in (3, 1, 7)]
    with DatasetWriter(tmp_path, random_codec) as writer:
        for i, codes in enumerate(utterances):
            writer.add("train", codes, file=f"{i}.wav", group="anna")
        writer.add("val", utterances[0], file="3.wav", group="ben")
    lines = [json.loads(line) for line in (tmp_path / "utterances.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    dataset = TokenDataset([tmp_path], "train", 6)
    separators = [0]
    for line, codes in zip(lines, utterances):
        assert torch.equal(codes_of(dataset, line["first_frame"], line["num_frames"]), codes)
        separators.append(line["first_frame"] + line["num_frames"])
    assert separators == [0, 4, 6, 14] and dataset.num_frames == 15
    for frame in separators:
        assert (codes_of(dataset, frame, 1) == 15).all()


def test_fewer_codebooks_are_the_first_ones(random_data):
    full, three = (TokenDataset([random_data], "train", q) for q in (6, 3))
    assert torch.equal(codes_of(full, 5, 10)[:3], codes_of(three, 5, 10))


def test_a_window_starts_with_codebook_zero_and_holds_whole_frames(random_data):
    batch = TokenDataset([random_data], "train", 4).train_batch(0, 5, FRAMES, seed=0)
    assert batch.shape == (5, (FRAMES + 1) * 4)
    assert (batch // 16 == torch.arange(4).repeat(FRAMES + 1)).all()


def windows_of_an_epoch(dataset: TokenDataset) -> int:
    """All windows that fit, less the one that leaves room for the phase."""
    return (dataset.num_frames - 1) // FRAMES - 1


def test_an_epoch_predicts_every_frame_at_most_once_and_nearly_all(random_data):
    dataset = TokenDataset([random_data], "train", 6)
    position = {
        tuple(codes_of(dataset, i, 2).flatten().tolist()): i for i in range(dataset.num_frames - 1)
    }
    count = windows_of_an_epoch(dataset)
    for epoch in range(3):
        windows = dataset.train_batch(epoch, count, FRAMES, seed=4)
        starts = sorted(
            position[tuple(unflatten(w[None], 6, 15)[0, :, :2].flatten().tolist())] for w in windows
        )
        assert set(np.diff(starts)) == {FRAMES}
        assert dataset.num_frames - count * FRAMES < 2 * FRAMES + 1


def test_epochs_differ_in_order_and_phase_and_seeds_differ(random_data):
    dataset = TokenDataset([random_data], "train", 6)
    count = windows_of_an_epoch(dataset)
    batch = lambda epoch, seed: dataset.train_batch(epoch, count, FRAMES, seed)
    assert not torch.equal(batch(0, 0), batch(1, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert torch.equal(batch(3, 2), batch(3, 2))


def test_processes_share_the_batch_that_one_process_sees(random_data):
    dataset = TokenDataset([random_data], "train", 6)
    for index in (0, 7):
        parts = [dataset.train_batch(index, 6, FRAMES, 0, rank, 3) for rank in range(3)]
        assert torch.equal(torch.cat(parts), dataset.train_batch(index, 6, FRAMES, 0))


def test_evaluation_windows_are_fixed_disjoint_and_spread_over_the_split(random_data):
    dataset = TokenDataset([random_data], "val", 6)
    few, all_of_them = (torch.cat(dataset.eval_batches(2, FRAMES, n)) for n in (3, 10**6))
    assert len(few) == 3 and len(all_of_them) == (dataset.num_frames - 1) // FRAMES
    assert torch.equal(few[0], all_of_them[0]) and torch.equal(few[-1], all_of_them[-1])
    assert torch.equal(all_of_them[0], dataset.frames(0, FRAMES + 1).flatten())
    assert torch.equal(all_of_them[1], dataset.frames(FRAMES, FRAMES + 1).flatten())


def test_ids_beyond_sixteen_bits_are_stored_in_thirty_two(random_codec, tmp_path):
    class Large:
        num_codebooks, codebook_size, name, sha256 = 32, 2048, "mimi", "0"
        frame_rate, sample_rate = 12.5, 24000

    codes = torch.full((32, 4), 2047)
    with DatasetWriter(tmp_path, Large()) as writer:
        for split in ("train", "val"):
            writer.add(split, codes, "a.wav", "a")
    dataset = TokenDataset([tmp_path], "train", 32)
    assert dataset.meta["dtype"] == "uint32"
    assert torch.equal(unflatten(dataset.frames(1, 4)[None], 32, 2048)[0], codes)


def test_an_unfinished_or_empty_folder_is_no_data_folder(random_codec, tmp_path):
    with pytest.raises(RuntimeError):
        with DatasetWriter(tmp_path, random_codec) as writer:
            writer.add("train", torch.zeros(6, 3).long(), "a.wav", "a")
            raise RuntimeError("the disk is full")
    for required, message in ((("train", "val"), "for val"), (("train",), "for train")):
        with pytest.raises(ValueError, match=f"nothing was prepared: no utterance {message}"):
            with DatasetWriter(tmp_path, random_codec, required) as writer:
                writer.add("train" if "val" in required else "val", ONE, "a.wav", "a")
    with pytest.raises(FileNotFoundError, match="prepare.py"):
        TokenDataset([tmp_path], "train", 6)


def test_damaged_and_short_data_are_refused(random_data, tmp_path):
    with pytest.raises(ValueError, match="--num_codebooks must be 1 to 6"):
        TokenDataset([random_data], "train", 7)
    with pytest.raises(ValueError, match="lower --max_frames"):
        TokenDataset([random_data], "val", 6).eval_batches(1, 5000, 1)
    for name in ("meta.json", "train.bin"):
        (tmp_path / name).write_bytes((random_data / name).read_bytes())
    (tmp_path / "train.bin").write_bytes((random_data / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="prepare the data again"):
        TokenDataset([tmp_path], "train", 6)
    for text in ("not json", '{"format": 1}', "[]"):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match="of another format"):
            TokenDataset([tmp_path], "train", 6)


def test_several_folders_are_their_streams_one_after_another(random_data, random_codec, tmp_path):
    with DatasetWriter(tmp_path / "other", random_codec) as writer:
        for split in ("train", "val"):
            writer.add(split, ONE + 3, "other.wav", "other")
    folders = [random_data, tmp_path / "other"]
    first, second = (TokenDataset([folder], "train", 4) for folder in folders)
    both = TokenDataset(folders, "train", 4)
    assert both.num_frames == first.num_frames + second.num_frames == first.num_frames + 5
    expected = torch.cat([first.frames(0, first.num_frames), second.frames(0, 5)])
    assert torch.equal(both.frames(0, both.num_frames), expected)
    for before, count in ((3, 5), (0, 5), (2, 2)):  # across the border, after it, before it
        start = first.num_frames - before
        assert torch.equal(both.frames(start, count), expected[4 * start : 4 * (start + count)])
    line = both.utterances()[-1]
    assert line["file"] == "other.wav" and len(both.utterances()) == len(first.utterances()) + 1
    assert torch.equal(both.codes(line["first_frame"], line["num_frames"]), ONE[:4] + 3)


def test_folders_of_different_codecs_are_refused(random_data, tmp_path):
    meta = json.loads((random_data / "meta.json").read_text())
    for path in random_data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "codec_sha256": "another"}))
    with pytest.raises(ValueError, match="another codec or --num_codebooks than"):
        TokenDataset([random_data, tmp_path], "train", 4)
