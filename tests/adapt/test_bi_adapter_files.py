"""Files of Bi-Adapter: as small as they should be, and exact."""

import copy
import json
import struct

import peft
import pytest
import torch
import transformers
from _bi_adapter import KINDS, adapted, adapters, config, images, of, small_vit
from conftest import perturb, small_gpt2, small_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

from sparing.adapt import compact_bytes, export_compact, export_peft, import_compact
from sparing.errors import CheckpointError, ConfigError, DataError

WEIGHTS = "adapter_model.safetensors"

# Files: safetensors.


def header_bytes(path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_file_has_the_size_that_arithmetic_says(kind, bits, tmp_path) -> None:
    """Oracle 6: Σ (n b / 8 + 8) bytes, and a stated header."""
    model = adapted(kind=kind, bits=bits)
    model.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    expected = sum(m.latent.numel() * bits // 8 + 8 for m in of(model))
    assert file.stat().st_size == header_bytes(file) + expected
    assert expected == compact_bytes(model)
    tensors = load_file(file)
    assert {t.dtype for t in tensors.values()} == {torch.uint8, torch.float32}
    moments = [t for name, t in tensors.items() if name.endswith("moments")]
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) == 2 * len(moments)


def test_codes_that_do_not_fill_a_byte_are_padded_and_counted(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(5, 3))
    model = adapted(copy.deepcopy(base), kind="lora", target_modules=["0"], h=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (down,) = (t for n, t in tensors.items() if n.endswith("down.codes"))
    assert down.shape == (2,)
    assert sorted(t.item() for n, t in tensors.items() if n.endswith("count")) == [9, 15]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    x = torch.randn(4, 5)
    assert torch.equal(loaded(x), model(x))
    wider = nn.Sequential(nn.Linear(5, 4))  # 12 codes take as many bytes as 9 do
    with pytest.raises(CheckpointError, match="12 numbers, found 9"):
        peft.PeftModel.from_pretrained(wider, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("granularity", ["matrix", "row"])
def test_loading_gives_bit_identical_outputs(kind, bits, granularity, tmp_path) -> None:
    """Oracle 6."""
    model, ids = adapted(kind=kind, bits=bits, granularity=granularity), token_ids()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for one, two in zip(of(model), of(loaded), strict=True):
        assert torch.equal(one.weight(), two.weight())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_loaded_adapter_is_never_quantised_again(bits, tmp_path) -> None:
    """Oracle 7: its levels would shrink; saving, copying and freezing keep its codes."""
    adapted(bits=bits, noise=0.02).save_pretrained(tmp_path / "one")
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path / "one", is_trainable=True)
    with torch.no_grad():
        loaded.train()(token_ids())
    loaded.eval().save_pretrained(tmp_path / "two")
    first, again = (load_file(tmp_path / name / WEIGHTS) for name in ("one", "two"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin(token_ids()).logits, loaded(token_ids()).logits)
    for matrix in of(loaded):
        value = matrix.weight().detach()
        twice = matrix.quantizer.decode(matrix.quantizer.encode(value))
        if bits == 1:
            assert twice.std() < 0.7 * value.std()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_training_goes_on_where_the_file_left_off(bits, tmp_path) -> None:
    """Latent numbers of a loaded adapter are quantised to what the file holds."""
    model, ids = adapted(bits=bits, noise=0.02, h=32), token_ids()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path, is_trainable=True).train()
    for matrix in of(loaded):
        encoded = matrix.quantizer.encode(matrix.latent.detach())
        value = matrix.quantizer.decode(encoded)
        torch.testing.assert_close(value, matrix.weight().detach(), rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-4)
    start = loaded(ids, labels=ids).loss
    assert start == model(ids, labels=ids).loss
    start.backward()
    optimizer.step()
    after = loaded(ids, labels=ids).loss
    assert after != start
    assert abs(after - start) < 0.05
    for matrix in of(loaded):
        assert matrix.stored_codes is None
        assert len(matrix.weight().unique()) <= 2**bits


def test_unpacked_files_resume_training_exactly(tmp_path) -> None:
    model = adapted(pack=False)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path)
    for one, two in zip(of(model), of(loaded), strict=True):
        assert torch.equal(one.latent, two.latent)


def test_state_dicts_of_a_whole_model_hold_latent_numbers() -> None:
    """What training checkpoints save."""
    model, other = adapted(), adapted(noise=0.3)
    assert not any("codes" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)


def test_adapters_load_through_set_peft_model_state_dict() -> None:
    model, other = adapted(), adapted(noise=0.3)
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert torch.equal(other(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("options", [{"h": 4}, {"bits": 2}, {"granularity": "row"}, {"bits": 32}])
def test_other_options_than_saved_are_refused_with_both_sizes(options, tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="bytes"):
        peft.PeftModel.from_pretrained(small_llama(), tmp_path, config=config(**options))


def test_another_width_is_refused_with_both_sizes(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    base = small_llama()
    changed = copy.deepcopy(base.config)
    changed.hidden_size = 64
    with pytest.raises(CheckpointError, match=r"64 bytes of codes.*found 32 bytes"):
        peft.PeftModel.from_pretrained(type(base)(changed), tmp_path)


def test_a_file_that_lacks_a_matrix_or_has_a_constant_one_is_refused(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(n for n in tensors if n.endswith("down.moments"))
    save_file(tensors | {name: torch.zeros(1, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="constant"):
        peft.PeftModel.from_pretrained(small_llama(), tmp_path)
    fewer = {n: t for n, t in tensors.items() if not n.startswith(name.removesuffix("moments"))}
    save_file(fewer, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="neither"):
        peft.PeftModel.from_pretrained(small_llama(), tmp_path)


def test_a_constant_matrix_cannot_be_saved(tmp_path) -> None:
    model = adapted()
    with torch.no_grad():
        of(model)[0].latent.fill_(0.5)
    with pytest.raises(DataError, match="constant"):
        model.save_pretrained(tmp_path)


# Files: the paper's layout.


def _base16(labels: int = 100) -> nn.Module:
    with torch.device("meta"):
        return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=labels))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"h": 32, "modules_to_save": ["classifier"]}, 381_520),
        ({"h": 32, "binary_head": ["classifier"]}, 83_528),
        ({"h": 1, "binary_head": ["classifier"]}, 12_104),
        ({"h": 32, "kind": "lora", "binary_head": ["classifier"]}, 157_448),
        ({"h": 1, "kind": "lora", "binary_head": ["classifier"]}, 14_600),
        ({"h": 32}, 73_920),
    ],
)
def test_sizes_are_those_of_the_released_files(options, expected) -> None:
    """ViT-B/16 with 100 classes."""
    model = peft.get_peft_model(_base16(), config(**options))
    assert compact_bytes(model) == expected


def test_numbers_of_weights_are_the_papers() -> None:
    for kind, expected in (("adaptformer", 589_824), ("lora", 1_179_648)):
        model = peft.get_peft_model(_base16(), config(kind=kind, h=32))
        assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("header", [False, True])
def test_compact_files_come_back_bit_by_bit(kind, bits, header, tmp_path) -> None:
    """Oracle 6."""
    options = {"kind": kind, "bits": bits, "binary_head": ["classifier"]}
    model = adapted(small_vit(8), **options)
    file = tmp_path / "adapter.bin"
    size = export_compact(model, file, header=header)
    assert size == file.stat().st_size
    assert size == compact_bytes(model) + (12 + 12 * len(of(model))) * header
    other = adapted(small_vit(8), noise=0.3, **options)
    before = other(pixel_values=images()).logits
    import_compact(other, file)
    after = other(pixel_values=images()).logits
    assert torch.equal(after, model(pixel_values=images()).logits)
    assert not torch.equal(after, before)
    export_compact(other, tmp_path / "again.bin", header=header)
    assert (tmp_path / "again.bin").read_bytes() == file.read_bytes()


def test_compact_layout_is_the_papers_byte_by_byte(tmp_path) -> None:
    """Section 7: codes of W_d, μ, σ, then W_u, block by block; then the head in full precision."""
    model = adapted(small_vit(), modules_to_save=["classifier"])
    export_compact(model, tmp_path / "adapter.bin")
    content, place = (tmp_path / "adapter.bin").read_bytes(), 0
    for adapter in adapters(model):
        for matrix in (adapter.bottleneck.down, adapter.bottleneck.up):
            w = matrix.latent.detach()
            bits = [int(v > w.mean()) for v in w.flatten()]
            for start in range(0, len(bits), 8):
                byte = sum(bit << i for i, bit in enumerate(bits[start : start + 8]))
                assert content[place] == byte
                place += 1
            mean, std = struct.unpack("<2f", content[place : place + 8])
            assert mean == pytest.approx(w.mean().item(), rel=1e-5)
            assert std == pytest.approx(w.std(unbiased=True).item(), rel=1e-5)
            place += 8
    head = model.base_model.model.classifier.modules_to_save["default"]
    numbers = struct.unpack(f"<{5 * 33}f", content[place:])
    expected = [*head.weight.flatten().tolist(), *head.bias.tolist()]
    assert list(numbers) == expected


def test_a_head_in_full_precision_comes_back(tmp_path) -> None:
    model = adapted(small_vit(), modules_to_save=["classifier"])
    export_compact(model, tmp_path / "adapter.bin")
    other = adapted(small_vit(), noise=0.4, modules_to_save=["classifier"])
    import_compact(other, tmp_path / "adapter.bin")
    expected = model(pixel_values=images()).logits
    assert torch.equal(other(pixel_values=images()).logits, expected)


def test_a_compact_file_of_another_length_changes_nothing(tmp_path) -> None:
    model, file = adapted(), tmp_path / "adapter.bin"
    export_compact(model, file)
    file.write_bytes(file.read_bytes()[:-1])
    before = model(token_ids()).logits
    size = compact_bytes(model)
    with pytest.raises(CheckpointError, match=f"{size:,} bytes, found {size - 1:,} bytes"):
        import_compact(model, file)
    export_compact(adapted(bits=2), file, header=True)
    with pytest.raises(CheckpointError, match="header"):
        import_compact(model, file)
    with pytest.raises(CheckpointError, match=r"nothing\.bin"):
        import_compact(model, tmp_path / "nothing.bin")
    assert torch.equal(model(token_ids()).logits, before)


def test_codes_that_do_not_fill_a_byte_need_the_header(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(5, 3))
    model = adapted(base, kind="lora", target_modules=["0"], h=3)
    with pytest.raises(ConfigError, match="header=True"):
        export_compact(model, tmp_path / "adapter.bin")
    assert not (tmp_path / "adapter.bin").exists()
    export_compact(model, tmp_path / "adapter.bin", header=True)
    before, x = model(torch.ones(2, 5)), torch.ones(2, 5)
    perturb(model, 0.5)
    assert not torch.equal(model(x), before)
    import_compact(model, tmp_path / "adapter.bin")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("options", [{"bits": 32}, {"granularity": "row"}])
def test_the_compact_layout_holds_codes_with_two_moments_only(options, tmp_path) -> None:
    with pytest.raises(ConfigError, match="save_pretrained"):
        export_compact(adapted(**options), tmp_path / "adapter.bin")


# Files: plain LoRA.


@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_exported_lora_loads_in_stock_peft(make, tmp_path) -> None:
    model = adapted(make(), kind="lora", scale=0.1, h_pattern={"v_proj": 3})
    export_peft(model, tmp_path / "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = peft.PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    ids = token_ids()
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lora(ids).logits, make()(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    "head", [{"binary_head": ["classifier"]}, {"modules_to_save": ["classifier"]}]
)
def test_exported_lora_carries_the_head(head, tmp_path) -> None:
    model = adapted(small_vit(), kind="lora", **head)
    export_peft(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(small_vit(), tmp_path / "lora").eval()
    expected = model(pixel_values=images()).logits
    torch.testing.assert_close(lora(pixel_values=images()).logits, expected, rtol=1e-5, atol=1e-5)


def test_adaptformer_is_no_lora_and_does_not_merge(tmp_path) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="ReLU"):
        export_peft(model, tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"depends on its input.*kind='lora'"):
        model.merge_adapter()


def test_files_are_for_models_with_the_adapter(tmp_path) -> None:
    with pytest.raises(ConfigError, match="'other'"):
        export_peft(adapted(kind="lora"), tmp_path / "lora", "other")
    lora = peft.get_peft_model(small_llama(), peft.LoraConfig())
    with pytest.raises(ConfigError, match="LoraConfig"):
        export_compact(lora, tmp_path / "adapter.bin")
