"""Reading and writing safetensors a piece at a time."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparing.errors import CheckpointError, ConfigError
from sparing.shards import (
    DTYPES,
    INDEX,
    Checkpoint,
    SafetensorsFile,
    Shard,
    ShardWriter,
    TensorInfo,
    index_of,
    parse_size,
    pieces,
    plan_shards,
)

TENSORS = {
    "matrix": torch.arange(24, dtype=torch.float32).view(4, 6),
    "half": torch.linspace(-2, 2, 7).bfloat16(),
    "scalar": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 5),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def test_every_piece_is_what_safetensors_reads(file: Path) -> None:
    opened = SafetensorsFile(file)
    for name, tensor in TENSORS.items():
        assert opened.tensors[name] == TensorInfo(tensor.dtype, tuple(tensor.shape))
        for start, stop in pieces(tensor.numel(), 3):
            assert torch.equal(opened.read(name, start, stop), tensor.reshape(-1)[start:stop])
    opened.close()


def test_pieces_written_in_any_order_make_the_file(tmp_path: Path) -> None:
    infos = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}
    writer = ShardWriter(tmp_path / "out.safetensors", Shard("out.safetensors", infos))
    for name, tensor in reversed(TENSORS.items()):
        for start, stop in reversed(list(pieces(tensor.numel(), 2))):
            writer.write(name, start, tensor.reshape(-1)[start:stop])
    writer.close()
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 50)), max_size=12),
    st.integers(1, 200),
)
def test_shards_hold_every_tensor_once_in_order_and_within_the_bound(
    kinds: list[tuple[str, int]], most: int
) -> None:
    tensors = {str(i): TensorInfo(DTYPES[kind], (size,)) for i, (kind, size) in enumerate(kinds)}
    shards = plan_shards(tensors, most)
    assert [name for shard in shards for name in shard.tensors] == list(tensors)
    for shard in shards:
        size = sum(info.nbytes for info in shard.tensors.values())
        large = [info for info in shard.tensors.values() if info.nbytes > most]
        assert size <= most or len(large) == 1


def test_a_sharded_folder_is_one_model(tmp_path: Path) -> None:
    infos = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}
    shards = plan_shards(infos, 100)
    assert len(shards) > 1
    for shard in shards:
        save_file({name: TENSORS[name] for name in shard.tensors}, tmp_path / shard.name)
    (tmp_path / INDEX).write_text(json.dumps(index_of(shards)))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == TENSORS.keys()
        assert torch.equal(checkpoint.read("half"), TENSORS["half"])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xyz")


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _wrong_offsets(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def _negative_shape(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def _unknown_type(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)


def _list_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2) + b"[]")


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _grow,
        _garbage,
        _empty,
        _wrong_offsets,
        _negative_shape,
        _unknown_type,
        _list_header,
    ],
)
def test_a_damaged_file_is_named(file: Path, damage) -> None:
    damage(file)
    with pytest.raises(CheckpointError, match="complete safetensors file") as caught:
        Checkpoint(file.parent)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=r"pickle pytorch_model\.bin.*save_pretrained"):
            Checkpoint(path)


def test_a_folder_without_weights_and_one_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        Checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"t": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="no index"):
        Checkpoint(tmp_path)


def test_a_missing_shard_and_a_shard_of_another_model_are_named(tmp_path: Path) -> None:
    save_file({"t": torch.ones(1)}, tmp_path / "one.safetensors")
    listed = {"t": "one.safetensors", "u": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        Checkpoint(tmp_path)
    save_file({"v": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="no 'u' in two"):
        Checkpoint(tmp_path)
    save_file({"t": torch.ones(1), "u": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="to be in one file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", ['{"weights": {}}', "[]", "nonsense"])
def test_a_damaged_index_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(tmp_path)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("2MiB") == 2 * 2**20
    assert parse_size(1000) == parse_size("1000") == 1000
    for wrong in ("5%", "0", 0, "5k", True):
        with pytest.raises(ConfigError):
            parse_size(wrong)
