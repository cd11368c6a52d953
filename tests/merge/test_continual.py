"""MADE-IT on files: arrivals, kills, and the model that comes out."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import perturb, small_gpt2, small_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from sparing import checkpoint
from sparing.adapt import MoSConfig
from sparing.cli import main
from sparing.errors import CheckpointError, ConfigError
from sparing.merge import MadeIt, MadeItModel, Routing, continue_merge, merge
from sparing.merge.ledger import Ledger
from sparing.merge.routed import routed_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*use of fork",
    "ignore::FutureWarning",
    "ignore:.*tie",
    "ignore:.*tied",
    "ignore::DeprecationWarning",
)

WHOLE: dict[str, Any] = {"rank": None, "energy": 1.0, "router_rank": 4}
SMALL: dict[str, Any] = {"rank": 6, "router_rank": 4}


def save(folder: Path, model: Any, seed: int | None = None, scale: float = 0.02) -> Path:
    if seed is not None:
        perturb(model, scale, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, e1, e2, e3 and again, which is e1 in other files."""
    root = tmp_path_factory.mktemp("models")
    save(root / "base", small_llama())
    (root / "base" / "tokenizer_config.json").write_text('{"note": "kept"}')
    for seed in (1, 2, 3):
        save(root / f"e{seed}", small_llama(), seed)
    return root


def begin(root: Path, out: Path, *numbers: int, **options: Any) -> Path:
    experts = [root / f"e{number}" for number in numbers]
    return merge(root / "base", experts, "made-it", out, **{**SMALL, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def load(folder: Path) -> Any:
    model, told = MadeItModel.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids).logits


# What comes out


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_one_expert_at_full_rank_is_that_model(tmp_path: Path, make: Any) -> None:
    save(tmp_path / "base", make())
    save(tmp_path / "e1", make(), 1)
    out = begin(tmp_path, tmp_path / "out", 1, **WHOLE)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "e1").eval())
    assert torch.allclose(logits(load(out)), expected, atol=1e-5)


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_files_give_what_memory_gives(tmp_path: Path, make: Any) -> None:
    base = make()
    save(tmp_path / "base", base)
    made = MadeIt(base, **SMALL, tau_min=0.1, tau_max=0.13)
    for seed in (1, 2, 3):
        model = make()
        save(tmp_path / f"e{seed}", model, seed)
        made.add(model, str(tmp_path / f"e{seed}"))
    options = {"tau_min": 0.1, "tau_max": 0.13, "threads": 2, "block_size": 700}
    out = begin(tmp_path, tmp_path / "out", 1, 2, 3, **options)
    found = Ledger.load(out)
    for name, module in found.modules.items():
        ours = made.ledger.modules[name]
        assert module.members == ours.members
        assert (module.ranks, module.router_ranks) == (ours.ranks, ours.router_ranks)
        for one, two in zip(module.arrivals, ours.arrivals, strict=True):
            assert one.affinities == pytest.approx(two.affinities, abs=1e-5)
    counts = {module.experts for module in found.modules.values()}
    assert counts != {3}  # something was merged
    assert torch.allclose(logits(load(out)), logits(made.module()), atol=1e-5)


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_generation_with_a_cache_is_that_without(tmp_path: Path, make: Any) -> None:
    save(tmp_path / "base", make())
    for seed in (1, 2):
        save(tmp_path / f"e{seed}", make(), seed, scale=0.05)
    model = load(begin(tmp_path, tmp_path / "out", 1, 2))
    ids = token_ids()
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0}
    cached, uncached = (
        model.generate(input_ids=ids, do_sample=False, use_cache=use, **arguments)
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert cached.shape[1] > ids.shape[1]
    state = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids[:, -1:], past_key_values=state).logits[:, -1]
    assert torch.allclose(last, logits(model, ids)[:, -1], atol=1e-5)


def test_transformers_loads_and_saves_it(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1, 2)
    config = AutoConfig.from_pretrained(out)
    assert config.tasks == [str(kept / "e1"), str(kept / "e2")]
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model, MadeItModel)
    assert model.base.lm_head.weight is model.base.model.embed_tokens.weight
    model.set_routing(Routing(temperature=0.2, top_k=1))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.config.routing["top_k"] == 1
    assert {e.router.routing.temperature for _, e in routed_layers(again)} == {0.2}
    half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(half)).all()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"note": "kept"}
    assert (out / "generation_config.json").is_file()


def test_a_vision_transformer_is_routed_by_sample(tmp_path: Path) -> None:
    def make() -> ViTForImageClassification:
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
        return ViTForImageClassification(config).eval()

    save(tmp_path / "base", make())
    for seed in (1, 2):
        save(tmp_path / f"e{seed}", make(), seed)
    out = begin(tmp_path, tmp_path / "out", 1, 2, per_task=["classifier.*"], **WHOLE)
    load(out)
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    assert model.config.routing["granularity"] == "sample"
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together = model(pixel_values=pixels).logits
    alone = torch.cat([model(pixel_values=one[None]).logits for one in pixels])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(model.base.classifier.weight, make().classifier.weight)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(pixel_values=pixels).logits, together)
    heads = sorted((out / "tasks").iterdir())
    assert [path.name for path in heads] == ["0-e1.safetensors", "1-e2.safetensors"]
    expected = load_file(tmp_path / "e2" / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_file(heads[1])["classifier.weight"], expected)


def test_pooled_routing_refuses_a_cache(kept: Path, tmp_path: Path) -> None:
    model = load(begin(kept, tmp_path / "out", 1, 2, granularity="sample"))
    ids = token_ids()
    with pytest.raises(ConfigError, match="use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0)
    model.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0, use_cache=False)
    model.set_routing(Routing(granularity="model"))
    assert torch.isfinite(logits(model)).all()


def test_padding_does_not_change_how_a_row_is_routed(kept: Path, tmp_path: Path) -> None:
    model = load(begin(kept, tmp_path / "out", 1, 2, granularity="sample"))
    ids = token_ids(1, 8)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.int64)), 1)
    mask = torch.tensor([[1] * 8 + [0] * 4])
    found = model(input_ids=padded, attention_mask=mask).logits[:, :8]
    assert torch.allclose(found, logits(model, ids), atol=1e-5)
    without = model(input_ids=padded).logits[:, :8]
    assert not torch.allclose(without, logits(model, ids), atol=1e-5)


# What comes in


def test_a_lora_arrives_as_its_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_llama()
    save(tmp_path / "base", base)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=9)
    model = peft.get_peft_model(base, config)
    perturb(model, 0.1, seed=1)
    save(tmp_path / "e1", model)
    expected = logits(model.eval())
    from sparing.merge import arrivals

    monkeypatch.setattr(arrivals, "factorize", lambda *_: pytest.fail("a dense SVD"))
    out = begin(tmp_path, tmp_path / "out", 1, rank=8, energy=1.0, router_rank=8)
    ledger = Ledger.load(out)
    assert {n: m.ranks for n, m in ledger.modules.items() if m.ranks} == {
        f"model.layers.{i}.{n}": [3] for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert any("in 3 directions, which is r there, 4 modules" in note for note in ledger.notes)
    assert any("leaves as they are 10 modules" in note for note in ledger.notes)
    assert torch.allclose(logits(load(out)), expected, atol=1e-5)


def test_a_lora_on_conv1d(tmp_path: Path) -> None:
    base = small_gpt2()
    save(tmp_path / "base", base)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=2)
    model = peft.get_peft_model(base, config)
    perturb(model, 0.1, seed=1)
    save(tmp_path / "e1", model)
    out = begin(tmp_path, tmp_path / "out", 1, **WHOLE)
    assert torch.allclose(logits(load(out)), logits(model.eval()), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_any_adapter_that_can_be_merged_arrives(tmp_path: Path) -> None:
    base = small_llama()
    save(tmp_path / "base", base)
    model = peft.get_peft_model(base, MoSConfig(target_modules=["q_proj", "v_proj"], r=2))
    perturb(model, 0.1, seed=1)
    save(tmp_path / "e1", model)
    out = begin(tmp_path, tmp_path / "out", 1, **WHOLE)
    assert torch.allclose(logits(load(out)), logits(model.eval()), atol=1e-5)


def test_shards_in_and_shards_out(kept: Path, tmp_path: Path) -> None:
    for name in ("base", "e1", "e2"):
        AutoModelForCausalLM.from_pretrained(kept / name).save_pretrained(
            tmp_path / name, max_shard_size="20kB"
        )
    out = begin(tmp_path, tmp_path / "out", 1, 2, max_shard_size="20kB")
    assert len(list(out.glob("weights-*"))) > 1
    assert len(list(out.glob("experts-*"))) > 1
    whole = begin(kept, tmp_path / "whole", 1, 2)
    assert torch.equal(logits(load(out)), logits(load(whole)))


def test_half_precision_models_and_storage(tmp_path: Path) -> None:
    save(tmp_path / "base", small_llama(torch.bfloat16))
    for seed in (1, 2):
        save(tmp_path / f"e{seed}", small_llama(torch.bfloat16), seed)
    out = begin(tmp_path, tmp_path / "out", 1, 2, storage="bfloat16")
    (file,) = out.glob("experts-*")
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    model = load(out)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model)).all()


def test_the_rest_is_the_running_mean(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1, 2)
    continue_merge(out, [kept / "e3"])
    model = load(out)
    experts = [load_file(kept / f"e{i}" / "model.safetensors") for i in (1, 2, 3)]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        mean = sum(expert[name] for expert in experts) / 3
        assert torch.allclose(model.base.get_parameter(name), mean, atol=1e-6)
    assert torch.equal(
        model.base.model.layers[0].mlp.up_proj.weight,
        load_file(kept / "base" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
    )


def test_memory_is_that_of_a_few_layers(tmp_path: Path) -> None:
    """Four times the layers take no more memory."""

    def make(layers: int, seed: int | None = None) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=32,
        )
        model = LlamaForCausalLM(config)
        if seed is not None:
            perturb(model, 0.01, seed=seed)
        return model

    def peak(layers: int) -> int:
        root = tmp_path / str(layers)
        save(root / "base", make(layers))
        for seed in (1, 2):
            save(root / f"e{seed}", make(layers, seed))
        activity = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], profile_memory=True) as profiler:
            begin(root, root / "out", 1, 2, threads=1, block_size=1000)
        alive = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                most = max(most, alive)
        return most

    assert peak(8) < 1.1 * peak(2)


# One after another


def test_continuing_is_as_arriving_together(
    kept: Path, tmp_path: Path, together: dict[str, bytes]
) -> None:
    out = begin(kept, tmp_path / "out", 1)
    assert continue_merge(out, [kept / "e2"]) == out
    continue_merge(out, [kept / "e3"])
    assert contents(out) == together
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_layers_own_weights_are_not_written_again(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1)
    (weights,) = out.glob("weights-*")
    before = weights.stat().st_ino
    continue_merge(out, [kept / "e2"])
    assert weights.stat().st_ino == before


def test_threads_and_blocks_change_nothing(kept: Path, tmp_path: Path) -> None:
    one = begin(kept, tmp_path / "one", 1, 2, threads=1)
    two = begin(kept, tmp_path / "two", 1, 2, threads=3, block_size=333)
    assert contents(one) == contents(two)


def test_the_same_expert_twice_is_left_out(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1, 2)
    before = contents(out)
    shutil.copytree(kept / "e1", tmp_path / "copy of e1")
    with pytest.warns(UserWarning, match=r"copy of e1 is .*e1, which is in the bank"):
        continue_merge(out, [tmp_path / "copy of e1"])
    assert contents(out) == before
    with pytest.warns(UserWarning, match="once more"):
        twice = begin(kept, tmp_path / "twice", 1, 1, 2)
    assert contents(twice) == before


class Bomb:
    """kill -9 at the n-th sign of progress."""

    def __init__(self, at: int) -> None:
        self.left = at

    def stage(self, text: str, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def advance(self, done: int) -> None:
        self.stage("", 0)


def killed(work: Callable[[], object]) -> bool:
    """Do it in another process; whether that was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def together(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bank that was never interrupted."""
    return contents(begin(kept, tmp_path_factory.mktemp("together") / "out", 1, 2, 3))


@pytest.fixture(scope="module")
def first(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bank with one task."""
    return begin(kept, tmp_path_factory.mktemp("first") / "out", 1)


@pytest.mark.filterwarnings("ignore:.*in the bank")
def test_a_kill_leaves_a_whole_bank_and_the_order_gives_the_same(
    kept: Path, tmp_path: Path, first: Path, together: dict[str, bytes]
) -> None:
    """Killed at ever later moments, in the first and the second of two arrivals and between."""
    valid = [contents(first)]
    out = shutil.copytree(first, tmp_path / "two")
    valid.append(contents(continue_merge(out, [kept / "e2"])))
    experts = [kept / "e2", kept / "e3"]
    moment, seen = 1, set()
    while True:
        out = shutil.copytree(first, tmp_path / str(moment))

        def work(to: Path = out, at: int = moment) -> None:
            continue_merge(to, experts, progress=Bomb(at), threads=1)

        if not killed(work):
            break
        assert contents(out) in valid
        seen.add(valid.index(contents(out)))
        continue_merge(out, experts)
        assert contents(out) == together
        assert not (tmp_path / f".{moment}.merging").exists()
        moment += 23
    assert seen == {0, 1}
    assert contents(out) == together


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_while_the_new_bank_takes_its_place(
    kept: Path,
    tmp_path: Path,
    first: Path,
    together: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    swaps: bool,
) -> None:
    """Where folders can be swapped in one step, and where the old one is moved aside first."""
    out = shutil.copytree(first, tmp_path / "out")
    swap, replace = checkpoint._swap, Path.replace

    def kill_after(old: Path, new: Path) -> bool:
        if not swaps:
            return False
        swap(old, new)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def kill_before(old: Path, new: Path) -> Path:
        if new == out:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_swap", kill_after)
        patch.setattr(Path, "replace", kill_before)
        assert killed(lambda: continue_merge(out, [kept / "e2"], threads=1))
    if swaps:
        assert len(Ledger.load(out).tasks) == 2
        continue_merge(out, [kept / "e3"])
    else:
        assert not out.exists()
        continue_merge(out, [kept / "e2", kept / "e3"])
    assert contents(out) == together


def test_a_new_bank_that_was_killed_resumes(
    kept: Path, tmp_path: Path, together: dict[str, bytes]
) -> None:
    arrived = set()
    for moment in (1, 90, 170):
        out = tmp_path / str(moment)

        def work(to: Path = out, at: int = moment) -> None:
            begin(kept, to, 1, 2, 3, progress=Bomb(at), threads=1)

        assert killed(work)
        assert not out.exists()
        bank = tmp_path / f".{moment}.merging" / "bank"
        arrived.add(len(Ledger.load(bank).tasks) if bank.is_dir() else 0)
        begin(kept, out, 1, 2, 3, resume=True)
        assert contents(out) == together
        assert not (tmp_path / f".{moment}.merging").exists()
    assert arrived == {0, 1, 2}
    stamp = (out / "bank.json").stat().st_mtime_ns
    begin(kept, out, 1, 2, 3, resume=True)
    assert (out / "bank.json").stat().st_mtime_ns == stamp


def test_a_failed_arrival_changes_nothing(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1)
    before = contents(out)
    shutil.copytree(kept / "e2", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj.weight'.*NaN"):
        continue_merge(out, [tmp_path / "bad"])
    assert contents(out) == before
    assert not (tmp_path / ".out.merging").exists()


def test_the_base_may_move_but_not_change(kept: Path, tmp_path: Path) -> None:
    root = shutil.copytree(kept, tmp_path / "models")
    out = begin(root, tmp_path / "out", 1)
    (root / "base").rename(root / "moved")
    with pytest.raises(ConfigError, match="base"):
        continue_merge(out, [root / "e2"])
    continue_merge(out, [root / "e2"], base=root / "moved")
    before = contents(out)
    with pytest.raises(CheckpointError, match=r"the bank's base, SHA-256"):
        continue_merge(out, [root / "e3"], base=root / "e1")
    assert contents(out) == before


def _other_vocabulary(root: Path) -> Path:
    model = small_llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    return save(root / "bad", model)


def _other_shape(root: Path) -> Path:
    save(root / "bad", small_llama(), 1)
    tensors = load_file(root / "bad" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, root / "bad" / "model.safetensors", metadata={"format": "pt"})
    return root / "bad"


def _other_architecture(root: Path) -> Path:
    return save(root / "bad", small_gpt2())


def _truncated(root: Path) -> Path:
    save(root / "bad", small_llama(), 1)
    path = root / "bad" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return root / "bad"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_other_vocabulary, "embed_tokens.*vocabulary of 64"),
        (_other_shape, "up_proj.*of shape"),
        (_other_architecture, "model_type llama"),
        (_truncated, "complete safetensors"),
        (lambda root: root / "nowhere", "nowhere"),
    ],
)
def test_what_is_no_fine_tune_is_refused_before_anything_is_written(
    kept: Path, tmp_path: Path, make: Any, words: str
) -> None:
    out = begin(kept, tmp_path / "out", 1)
    before = contents(out)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        continue_merge(out, [kept / "e2", make(tmp_path)])
    assert contents(out) == before


def test_what_a_bank_cannot_do_is_refused(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hash_inputs"):
        begin(kept, tmp_path / "out", 1, hash_inputs=False)
    with pytest.raises(ConfigError, match="vocabulary"):
        begin(kept, tmp_path / "out", 1, vocabulary="crop")
    with pytest.raises(CheckpointError, match="a bank of experts"):
        continue_merge(kept / "e1", [kept / "e2"])
    with pytest.raises(ConfigError, match="at least one"):
        continue_merge(begin(kept, tmp_path / "out", 1), [])
    with pytest.raises(ConfigError, match="holds the input"):
        begin(kept, kept / "base", 1)
    save_file({"w": torch.zeros(3, 3)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"names a class of transformers, found no config"):
        merge(
            tmp_path / "plain.safetensors",
            [tmp_path / "plain.safetensors"],
            "made-it",
            tmp_path / "x",
        )


def test_the_record_names_everything(kept: Path, tmp_path: Path) -> None:
    out = begin(kept, tmp_path / "out", 1, 2)
    record = json.loads((out / "merge.json").read_text())
    assert record["method"] == "made-it"
    assert record["options"]["rank"] == 6
    assert [e["name"] for e in record["experts"]] == [str(kept / "e1"), str(kept / "e2")]
    assert record["experts"][0]["files"]["model.safetensors"] in (out / "README.md").read_text()


# At a shell


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sparing", *map(str, arguments)])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_the_whole_life_at_a_shell(
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    together: dict[str, bytes],
) -> None:
    monkeypatch.chdir(tmp_path)
    first = ["merge", "--method", "made-it", "--base", kept / "base", "--expert", kept / "e1"]
    options = ["--option", "rank=6", "--option", "router_rank=4"]
    assert run(monkeypatch, *first, *options, "--out", "bank") == 0
    more = ["--expert", kept / "e2", "--expert", kept / "e3"]
    assert run(monkeypatch, "merge", "--continue", "bank", *more) == 0
    assert contents(tmp_path / "bank") == together
    capsys.readouterr()
    assert run(monkeypatch, "report", "bank") == 0
    told = capsys.readouterr().out
    assert "3 tasks, " in told
    assert "model.layers.1.mlp.down_proj: " in told
    assert "threshold when" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--base", "./base"), "--out: expected a folder"),
        (("--out", "x"), "--base: expected the model"),
        (("--continue", "./base"), "a bank of experts"),
        (("--continue", "./base", "--option", "rank=3"), "--option"),
        (("--continue", "./base", "--out", "x"), "--out"),
    ],
)
def test_what_a_shell_is_told(
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(kept)
    assert run(monkeypatch, "merge", "--expert", "./e1", *arguments) == 2
    assert words in capsys.readouterr().err


def test_experts_are_a_child_of_their_layer() -> None:
    """So that the layer's own tensors keep their names, for transformers and for PEFT."""
    made = MadeIt(small_llama(), **SMALL)
    model = small_llama()
    perturb(model, 0.02, seed=1)
    made.add(model)
    layer: Any = made.module().model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear)
    assert set(layer.state_dict()) == {"weight", "experts.inputs", "experts.outputs"}
