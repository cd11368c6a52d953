"""Merging files: what comes out, how little memory it takes, and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparing.errors import CheckpointError, ConfigError, SparingError
from sparing.merge import METHODS, merge, pcb_merge
from sparing.merge.method import Method
from sparing.shards import Checkpoint

Folders = tuple[Path, list[Path]]
BLOCKWISE = [slug for slug, method in METHODS.items() if isinstance(method, Method)]


def save_tuned(
    folder: Path, seed: int, dtype: torch.dtype = torch.float32, scale: float = 0.01
) -> Path:
    model = small_llama(dtype)
    perturb(model, scale, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    small_llama().save_pretrained(root / "base")
    (root / "base" / "tokenizer_config.json").write_text('{"note": "kept"}')
    return root / "base", [save_tuned(root / f"expert{i}", i) for i in (1, 2, 3)]


@pytest.fixture
def folders(kept: Folders, tmp_path: Path) -> Folders:
    """Copies that a test may damage."""
    base = shutil.copytree(kept[0], tmp_path / "base")
    return base, [shutil.copytree(e, tmp_path / e.name) for e in kept[1]]


def weights(folder: Path) -> dict[str, Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {
            name: checkpoint.read(name).view(info.shape)
            for name, info in checkpoint.tensors.items()
        }


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", BLOCKWISE)
def test_transformers_loads_the_result_and_it_runs(
    kept: Folders, tmp_path: Path, method: str
) -> None:
    out = merge(*kept, method, tmp_path / "out", max_shard_size="20kB", block_size=500)
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(token_ids()).logits).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"note": "kept"}
    assert (out / "generation_config.json").is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_streams_what_it_computes_in_memory(kept: Folders, tmp_path: Path) -> None:
    """PCB's oracle 11, for any threads and blocks."""
    base, experts = kept
    expected = pcb_merge(weights(base), [weights(e) for e in experts], ratio=0.2)
    for threads, block_size in ((1, 1 << 20), (3, 701)):
        out = tmp_path / f"out{threads}"
        merge(base, experts, "pcb-merging", out, ratio=0.2, threads=threads, block_size=block_size)
        found = weights(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("method", BLOCKWISE)
def test_streamed_bfloat16_is_the_float64_reference_rounded(tmp_path: Path, method: str) -> None:
    base = tmp_path / "base"
    small_llama(torch.bfloat16).save_pretrained(base)
    experts = [save_tuned(tmp_path / str(i), i, torch.bfloat16) for i in (1, 2)]
    exact = weights(
        merge(base, experts, method, tmp_path / "a", arithmetic="float64", dtype="float64")
    )
    found = weights(merge(base, experts, method, tmp_path / "b", threads=2, block_size=333))
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        rounding = 2.0**-8 * exact[name].abs() + 1e-6
        assert ((tensor.double() - exact[name]).abs() <= rounding).all()


def test_one_expert_at_weight_one_is_returned_bit_by_bit(kept: Folders, tmp_path: Path) -> None:
    base, experts = kept
    for method, options in (("average", {}), ("task-arithmetic", {"scale": 1.0})):
        out = merge(base, experts[:1], method, tmp_path / method, **options)
        found, expected = weights(out), weights(experts[0])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", BLOCKWISE)
def test_memory_is_a_few_blocks_whatever_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The most bytes of tensors alive at once, counted by torch's allocator."""
    from sparing.merge import selection

    monkeypatch.setattr(selection, "COLLECTED", 1000)
    block_size, experts = 4096, 3

    def model(folder: Path, seed: int, tensors: int) -> Path:
        generator, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        folder.mkdir(parents=True)
        state = {f"t{i}": torch.randn(128, 256, generator=generator) for i in range(tensors)}
        for tensor in state.values():
            tensor.add_(torch.randn(tensor.shape, generator=noise), alpha=0.1)
        save_file(state, folder / "model.safetensors")
        return folder

    def peak(tensors: int) -> int:
        root = tmp_path / str(tensors)
        paths = [model(root / str(seed), seed, tensors) for seed in range(1 + experts)]
        activity = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], profile_memory=True) as profiler:
            merge(paths[0], paths[1:], method, root / "out", threads=1, block_size=block_size)
        alive = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return most

    small, large = peak(2), peak(8)
    histograms = 4 * experts * 65536 * 8 if METHODS[method].survey else 0
    assert block_size * 8 < large < 12 * experts * block_size * 8 + histograms
    assert large < 1.1 * small


def test_records_method_options_inputs_and_hashes(kept: Folders, tmp_path: Path) -> None:
    base, experts = kept
    out = merge(base, experts, "ties", tmp_path / "out", density=0.3)
    record = json.loads((out / "merge.json").read_text())
    card = (out / "README.md").read_text()
    assert record["method"] == "ties"
    assert record["options"] == {"density": 0.3, "scale": 1.0, "scope": "model"}
    for source, folder in zip([record["base"], *record["experts"]], [base, *experts], strict=True):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert source["files"] == {"model.safetensors": digest}
        assert digest in card
    assert "| density | `0.3` |" in card
    plain = merge(base, experts, "ties", tmp_path / "plain", hash_inputs=False)
    assert json.loads((plain / "merge.json").read_text())["base"]["files"] == {
        "model.safetensors": None
    }


def test_sharded_inputs_of_other_types_are_merged(kept: Folders, tmp_path: Path) -> None:
    base, experts = kept
    AutoModelForCausalLM.from_pretrained(experts[0], dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half", max_shard_size="20kB"
    )
    out = merge(base, [tmp_path / "half", experts[1]], "average", tmp_path / "out")
    found, half, other = weights(out), weights(tmp_path / "half"), weights(experts[1])
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        expected = (half[name].double() + other[name].double()) / 2
        assert torch.allclose(tensor.double(), expected, atol=1e-7)


def test_the_type_of_the_result_can_be_chosen(kept: Folders, tmp_path: Path) -> None:
    out = merge(*kept, "average", tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_single_files_are_models_too(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.safetensors")
        save_file({"w": torch.full((3,), float(i)), "step": torch.tensor(i)}, files[-1])
    out = merge(files[0], files[1:], "average", tmp_path / "out")
    found = weights(out)
    assert found["w"].tolist() == [1.5] * 3
    assert found["step"] == 0


def test_another_base_is_refused(kept: Folders, tmp_path: Path) -> None:
    small_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="architecture, model_type llama, found"):
        merge(kept[0], [tmp_path / "gpt2"], "average", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_far_from_the_base_is_noted(kept: Folders, tmp_path: Path) -> None:
    small_llama(seed=5).save_pretrained(tmp_path / "stranger")
    with pytest.warns(UserWarning, match="hardly a fine-tune"):
        merge(kept[0], [tmp_path / "stranger"], "average", tmp_path / "out")


def test_the_same_model_twice_is_noted(kept: Folders, tmp_path: Path) -> None:
    base, experts = kept
    with pytest.warns(UserWarning, match="vote twice"):
        merge(base, [experts[0], experts[0]], "average", tmp_path / "out")


def _nan(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    rewrite(folder, change)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20] + b"\0" * 20 + path.read_bytes()[40:])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _missing(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _extra(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.ones(2)))


def _shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


def _whole_numbers(folder: Path) -> None:
    rewrite(
        folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).to(torch.int8)})
    )


def _quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))


def _vocabulary(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(70, 32)}),
    )


BAD = {
    _nan: r"'model\.norm\.weight' in .*expert2.*NaN",
    _cut: r"expert2.*truncated",
    _corrupt_header: r"expert2.*complete safetensors file",
    _pickle: r"expert2.*pickle pytorch_model\.bin.*save_pretrained",
    _missing: r"expert2 lacks 'model\.norm\.weight'",
    _extra: r"expert2 has 'extra', which the base lacks",
    _shape: r"expert2 has 'model\.norm\.weight' of shape \[31\] instead of \[32\]",
    _whole_numbers: r"expert2 has 'model\.norm\.weight' in int8",
    _quantised: r"expert2.*quantised",
    _vocabulary: r"embed_tokens.*vocabulary of 64, found 70 rows.*vocabulary=crop",
}


@pytest.mark.parametrize("damage", BAD)
def test_bad_input_is_named_in_one_line_and_nothing_is_left(
    folders: Folders, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    base, experts = folders
    damage(experts[1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=BAD[damage]) as caught:
        merge(base, experts, "pcb-merging", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_leaves_the_old_output(folders: Folders, tmp_path: Path) -> None:
    base, experts = folders
    out = merge(base, experts, "average", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    _nan(experts[0])
    with pytest.raises(CheckpointError):
        merge(base, experts, "average", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_nan_in_the_base_and_an_overflow_are_named(folders: Folders, tmp_path: Path) -> None:
    base, experts = folders
    rewrite(experts[0], lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' in the result"):
        merge(base, experts, "average", tmp_path / "out", dtype="float16")
    _nan(base)
    with pytest.raises(CheckpointError, match=r"in .*base.*NaN"):
        merge(base, experts, "average", tmp_path / "out")


@pytest.mark.parametrize("damage", [_missing, _shape])
def test_skipping_leaves_the_bases_tensor(
    folders: Folders, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    base, experts = folders
    damage(experts[1])
    _extra(experts[2])
    out = merge(base, experts, "average", tmp_path / "out", on_mismatch="skip")
    found = weights(out)
    assert torch.equal(found["model.norm.weight"], weights(base)["model.norm.weight"])
    assert "extra" not in found
    notes = json.loads((out / "merge.json").read_text())["notes"]
    assert len(notes) == 2
    assert all(note.startswith("left as in the base") for note in notes)


@pytest.mark.parametrize("rows", [60, 70])
def test_embeddings_of_another_length(folders: Folders, tmp_path: Path, rows: int) -> None:
    base, experts = folders
    name = "model.embed_tokens.weight"

    def resize(tensors: dict[str, Tensor]) -> None:
        more = torch.cat((tensors[name], torch.ones(10, 32)))
        tensors[name] = more[:rows].clone()

    rewrite(experts[0], resize)
    both = [weights(folder)[name] for folder in (base, experts[0])]
    shared = min(rows, 64)
    kept = merge(base, experts[:1], "average", tmp_path / "kept", vocabulary="base")
    found = weights(kept)[name]
    assert torch.equal(found[:shared], both[1][:shared])
    assert torch.equal(found[shared:], both[0][shared:])
    cropped = merge(base, experts[:1], "average", tmp_path / "cropped", vocabulary="crop")
    assert torch.equal(weights(cropped)[name], both[1][:shared])
    model = AutoModelForCausalLM.from_pretrained(cropped)
    assert model.config.vocab_size == shared


def test_tied_weights_are_stored_once_whoever_stores_them_twice(
    folders: Folders, tmp_path: Path
) -> None:
    base, experts = folders
    expected = weights(merge(base, experts, "pcb-merging", tmp_path / "plain"))
    name = "model.embed_tokens.weight"

    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[name].clone()

    for folder in (base, experts[0]):
        rewrite(folder, twice)
        found = weights(merge(base, experts, "pcb-merging", tmp_path / f"{folder.name}-twice"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)

    def renamed(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop(name)

    rewrite(experts[1], renamed)
    found = weights(merge(base, experts, "pcb-merging", tmp_path / "renamed"))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_task_heads_stay_with_their_tasks(folders: Folders, tmp_path: Path) -> None:
    """The cross-task variant: heads of different sizes, and one that the base lacks."""
    base, experts = folders
    for folder, classes in ((base, 2), (experts[0], 3), (experts[1], 5)):
        rewrite(
            folder,
            lambda tensors, n=classes: tensors.update({"score.weight": torch.full((n, 32), n / 2)}),
        )
    out = merge(base, experts, "pcb-merging", tmp_path / "out", per_task=["score.*"])
    assert torch.equal(weights(out)["score.weight"], torch.full((2, 32), 1.0))
    heads = {path.name: load_file(path) for path in (out / "tasks").iterdir()}
    assert sorted(heads) == ["0-expert1.safetensors", "1-expert2.safetensors"]
    assert torch.equal(heads["1-expert2.safetensors"]["score.weight"], torch.full((5, 32), 2.5))
    with pytest.raises(ConfigError, match="per_task"):
        merge(base, experts, "average", tmp_path / "none", per_task=["nothing*"])


def test_only_what_a_merge_wrote_is_replaced(folders: Folders, tmp_path: Path) -> None:
    base, experts = folders
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for out in (tmp_path / "mine", tmp_path, base, experts[0]):
        with pytest.raises(ConfigError, match="out "):
            merge(base, experts, "average", out)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    merge(base, experts, "average", tmp_path / "out")
    merge(base, experts, "ties", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["method"] == "ties"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int8"),
        ("arithmetic", "float16"),
        ("on_mismatch", "ignore"),
        ("vocabulary", "grow"),
        ("threads", 0),
        ("block_size", 0),
        ("device", "abacus"),
        ("max_shard_size", "big"),
        ("weightz", 1),
    ],
)
def test_settings_that_cannot_work_are_named(
    kept: Folders, tmp_path: Path, option: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(*kept, "average", tmp_path / "out", **{option: value})
    assert option in str(caught.value) or "budget" in str(caught.value)


def test_names_that_mean_nothing_are_refused(kept: Folders, tmp_path: Path) -> None:
    base, experts = kept
    for arguments, words in (
        ((base, experts, "tie", tmp_path / "o"), "ties"),
        ((base, [], "ties", tmp_path / "o"), "at least one"),
        ((base, ["./nowhere"], "ties", tmp_path / "o"), "nowhere"),
        ((base, ["nobody/nothing"], "ties", tmp_path / "o"), "nobody/nothing"),
    ):
        with pytest.raises(SparingError, match=words):
            merge(*arguments)
