"""EPT on whole models: tasks of rows, training, merging, files, and what it refuses."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import perturb, small_gpt2, small_llama, token_ids
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sparing.adapt import EPTConfig, TaskBatches
from sparing.adapt.ept import EPTAdapter
from sparing.errors import ConfigError, DataError
from sparing.tuners import TunerLayer

NAMES = ["cola", "mrpc", "rte"]


def adapted(base: nn.Module | None = None, noise: float = 0.1, **options: object) -> peft.PeftModel:
    chosen = {"r": 2, "task_names": NAMES, "target_modules": "all-linear", "seed_scale": 1.0}
    config = EPTConfig(task_type="CAUSAL_LM", **(chosen | options))  # type: ignore[arg-type]
    model = peft.get_peft_model(small_llama() if base is None else base, config).eval()
    perturb(model, noise)
    return model


def adapters(model: nn.Module, name: str = "default") -> list[EPTAdapter]:
    layers = [m for m in model.modules() if isinstance(m, TunerLayer)]
    return [layer.adapters[name] for layer in layers if name in layer.adapters]


def by_task(model: peft.PeftModel, ids: Tensor, task: object) -> Tensor:
    model.set_task(task)
    return model(ids).logits


def small_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


T5_LAYERS = ["q", "k", "v", "o", "wi", "wo"]


# Tasks of rows.


def test_every_row_of_a_mixed_batch_is_as_it_would_be_alone() -> None:
    model, ids = adapted(), token_ids(rows=5)
    tasks = torch.tensor([2, 0, 1, 2, 0])
    mixed = model(ids, tasks=tasks).logits
    for row, task in enumerate(tasks.tolist()):
        alone = by_task(model, ids[row : row + 1], task)
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    names = [NAMES[task] for task in tasks]
    assert torch.equal(model(ids, tasks=names).logits, mixed)
    model.set_task(tasks)
    assert torch.equal(model(ids).logits, mixed)
    assert not torch.allclose(by_task(model, ids, 0), by_task(model, ids, 1))


def test_rows_are_grouped_so_that_each_task_is_evaluated_once_a_layer() -> None:
    model, ids = adapted(), token_ids(rows=5)
    first, sizes = adapters(model)[0], []
    original = first._mixture
    first._mixture = lambda x, kernels: sizes.append(len(x)) or original(x, kernels)
    model(ids, tasks=[2, 0, 2, 2, 0])
    assert sorted(sizes) == [2, 3]
    sizes.clear()
    model(ids, tasks=[1] * 5)
    assert sizes == [5]


def test_a_calls_own_tasks_go_before_the_one_that_was_set() -> None:
    model, ids = adapted(), token_ids()
    expected = by_task(model, ids, "rte")
    model.set_task("cola")
    assert torch.equal(model(ids, tasks="rte").logits, expected)
    assert torch.equal(model(ids).logits, by_task(model, ids, "cola"))


@pytest.mark.parametrize("training", [True, False])
def test_rows_without_a_task_are_refused(training) -> None:
    model = adapted().train(training)
    with pytest.raises(DataError, match=r"3 tasks, found none\. Call model\.set_task"):
        model(token_ids())


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ("col", ConfigError, "Did you mean cola"),
        (3, ConfigError, "a number from 0 to 2"),
        (torch.tensor([0, -1]), ConfigError, "found -1"),
        (torch.tensor([0.0, 1.0]), DataError, "float32"),
        (torch.tensor([[0], [1]]), DataError, r"shape \(2, 1\)"),
        (torch.tensor([True, False]), DataError, "bool"),
        ([0, 1, 2], DataError, "one task for each of the 2 rows, found 3"),
        ([], DataError, "at least one task"),
    ],
)
def test_bad_tasks_are_refused(tasks, error, message) -> None:
    with pytest.raises(error, match=message):
        adapted()(token_ids(rows=2), tasks=tasks)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_in_a_mixed_batch_equals_generation_alone(options) -> None:
    model, ids = adapted(noise=0.2), token_ids(rows=3)
    chosen = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    mask = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, attention_mask=mask, tasks=[2, 0, 1], **chosen | options)
    for row, task in enumerate([2, 0, 1]):
        model.set_task(task)
        one = slice(row, row + 1)
        alone = model.generate(input_ids=ids[one], attention_mask=mask[one], **chosen | options)
        assert torch.equal(mixed[one, : alone.shape[1]], alone)
    assert model.base_model.routers().assignment.tasks == (1,)


def test_a_part_of_the_model_sees_the_current_routers_and_the_set_task() -> None:
    model, ids = adapted(), token_ids()
    by_task(model, ids, 1)
    perturb(model, seed=3)
    part = model.base_model.model.model
    hidden = part(ids).last_hidden_state
    model.set_task(2)
    assert not torch.allclose(part(ids).last_hidden_state, hidden)
    model.set_task(1)
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(part(ids).last_hidden_state, expected)


def test_what_is_kept_in_evaluation_follows_the_parameters() -> None:
    model, ids = adapted(), token_ids()
    with torch.no_grad():
        before = by_task(model, ids, 0)
        assert torch.equal(model(ids).logits, before)
        for parameter in model.base_model.routers().parameters():
            parameter.neg_()
        rerouted = model(ids).logits
        for adapter in adapters(model):
            adapter.kernels.mul_(2)
        stronger = model(ids).logits
    assert not torch.allclose(rerouted, before)
    assert not torch.allclose(stronger, rerouted)
    fresh = copy.deepcopy(model)
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    fresh.set_task(1)
    assert torch.equal(model(ids).logits, stronger)


def test_active_adapters_have_tasks_of_their_own() -> None:
    model, ids = adapted(), token_ids()
    first = by_task(model, ids, "rte")
    model.add_adapter("other", EPTConfig(task_names=["sst2", "rte"], target_modules="all-linear"))
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("other")
    perturb(model, seed=4)
    assert not torch.allclose(by_task(model, ids, "rte"), first)
    with pytest.raises(ConfigError, match="sst2, rte"):
        model.set_task("cola")
    model.set_task("cola", adapter_name="default")
    with pytest.raises(ConfigError, match="no adapter of that name"):
        model.set_task("cola", adapter_name="third")


# Training.


def contrastive_by_hand(model: peft.PeftModel, one_pass, tasks: list[int], pool) -> float:
    """The mean over layers of the cross-entropy of cosines, from the layers' own inputs."""
    routers, losses, handles = model.base_model.routers(), [], []
    embeddings = routers.all_gates().embeddings

    def watch(layer, args):
        adapter = layer.adapters["default"]
        if adapter.pooling is None:
            return
        embedding = embeddings[routers.numbers[adapter.name]]
        rows = pool(args[0])
        cosines = F.cosine_similarity(rows[:, None], embedding[None], dim=-1) / 0.05
        losses.append(F.cross_entropy(cosines, torch.tensor(tasks)).item())

    for module in model.modules():
        if isinstance(module, TunerLayer):
            handles.append(module.register_forward_pre_hook(watch))
    one_pass()
    for handle in handles:
        handle.remove()
    return sum(losses) / len(losses)


def test_training_adds_the_contrastive_loss_and_evaluation_does_not() -> None:
    """Equation 8, with the mean over tokens that are no padding."""
    model, ids, tasks = adapted(), token_ids(rows=3), [0, 2, 1]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    call = {"input_ids": ids, "attention_mask": mask, "labels": ids, "tasks": tasks}
    plain = model(**call).loss
    model.train()
    real = mask.float()[..., None]
    expected = contrastive_by_hand(
        model, lambda: model(**call), tasks, lambda x: (x * real).sum(1) / real.sum(1)
    )
    loss = model(**call).loss
    assert abs(model.base_model.auxiliary_loss().item() - 0.1 * expected) < 1e-5
    torch.testing.assert_close(loss, plain + 0.1 * expected)


def test_first_tokens_are_compared_where_the_paper_does() -> None:
    model, ids = adapted(contrastive_input="first").train(), token_ids(rows=3)
    model(ids, tasks=[0, 2, 1])
    found = model.base_model.auxiliary_loss().item()
    expected = contrastive_by_hand(
        model, lambda: model(ids, tasks=[0, 2, 1]), [0, 2, 1], lambda x: x[:, 0]
    )
    assert abs(found - 0.1 * expected) < 1e-5


def test_the_contrastive_loss_reaches_lower_adapters() -> None:
    """Pitfall: the layers' inputs are not detached, as in the released code."""
    model = adapted().train()
    model(token_ids(), tasks=1)
    model.base_model.auxiliary_loss().backward()
    below, above = adapters(model)[0], adapters(model)[-1]
    assert below.kernels.grad.any()
    assert above.kernels.grad is None or not above.kernels.grad.any()


def test_checkpointing_changes_neither_loss_nor_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = token_ids(rows=3)
        loss = model(ids, labels=ids, tasks=torch.tensor([0, 2, 0])).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_every_parameter_takes_part_whichever_task_is_drawn() -> None:
    """Pitfall: processes of a distributed run that draw other tasks must not wait for gradients."""
    model, ids = adapted().train(), token_ids()
    model(ids, labels=ids, tasks=0).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_adapter_learns_tasks_that_contradict_each_other_on_the_same_inputs() -> None:
    """And knows them by their names only: with names exchanged, it fails."""
    torch.manual_seed(0)
    base = small_llama()
    base.get_input_embeddings().weight.data.mul_(10)  # so that its logits can be sure of a token
    model = adapted(base, noise=0.0, r=4, task_names=["up", "down"], seed_scale=0.1).train()
    ids = token_ids(rows=8)
    labels = [(ids + 1 - 3) % 61 + 3, (ids - 1 - 3) % 61 + 3]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def loss(task: int, name: int) -> Tensor:
        logits = model(ids, tasks=name).logits
        return F.cross_entropy(logits.flatten(0, 1), labels[task].flatten())

    for step in range(60):
        task = step % 2
        (loss(task, task) + model.base_model.auxiliary_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for task in (0, 1):
            assert loss(task, task) < 2.5
            assert loss(task, 1 - task) > loss(task, task) + 1


def test_unknown_tasks_are_inferred_from_the_layers_inputs() -> None:
    """Equation 9, on tasks whose tokens differ; the model is left as it was."""
    torch.manual_seed(0)
    model = adapted(noise=0.0, lambda_con=1.0, seed_scale=0.1).train()
    ids = torch.cat([token_ids(rows=2, seed=task) % 20 + 20 * task + 3 for task in range(3)])
    tasks = torch.arange(3).repeat_interleave(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        model(ids, labels=ids, tasks=tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_task(0)
    before = model.eval()(ids).logits
    order = torch.tensor([3, 0, 5, 1, 4])
    assert torch.equal(model.infer_tasks(input_ids=ids[order]), tasks[order])
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ConfigError, match="whose embeddings tell tasks apart"):
        adapted(router="table").infer_tasks(input_ids=ids)


# Other architectures.


def test_t5_leaves_its_decoder_out_of_the_contrastive_loss_and_generates_by_task() -> None:
    base = small_t5()
    model = adapted(base, target_modules=T5_LAYERS)
    pooling = {a.name: a.pooling for a in adapters(model)}
    assert all((p is None) == name.startswith("decoder") for name, p in pooling.items())
    assert set(pooling.values()) == {None, "first"}
    ids, labels, tasks = token_ids(rows=3), token_ids(rows=3, length=6, seed=1), [1, 0, 2]
    model.train()
    call = {"input_ids": ids, "labels": labels, "tasks": tasks}
    expected = contrastive_by_hand(model, lambda: model(**call), tasks, lambda x: x[:, 0])
    model(**call).loss.backward()
    assert abs(model.base_model.auxiliary_loss().item() - 0.1 * expected) < 1e-5
    model.eval()
    mixed = model.generate(input_ids=ids, tasks=tasks, max_new_tokens=5, min_new_tokens=5)
    for row, task in enumerate(tasks):
        model.set_task(task)
        alone = model.generate(input_ids=ids[row : row + 1], max_new_tokens=5, min_new_tokens=5)
        assert torch.equal(mixed[row : row + 1], alone)


def test_vit_is_adapted_by_task() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    base = ViTForImageClassification(config).eval()
    chosen = EPTConfig(
        task_names=NAMES, target_modules=["q_proj", "v_proj", "fc1"], r=2, seed_scale=1.0
    )
    model = peft.get_peft_model(base, chosen).eval()
    perturb(model, 0.3)
    images = torch.randn(2, 3, 16, 16)
    mixed = model(pixel_values=images, tasks=[0, 2]).logits
    model.set_task("rte")
    torch.testing.assert_close(model(pixel_values=images).logits[1:], mixed[1:])
    assert {a.pooling for a in adapters(model)} == {"first"}


# Merging and files.


@pytest.mark.parametrize("projection", ["kron", "channel"])
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_each_task_merges_exactly_and_unmerges(make, projection) -> None:
    """Oracle 9."""
    base = make(torch.float64)
    weights = {n: t.clone() for n, t in base.state_dict().items()}
    model, ids = adapted(base, projection=projection).double(), token_ids()
    with torch.no_grad():
        for task in NAMES:
            expected = by_task(model, ids, task)
            model.merge_adapter()
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-8)
            model.unmerge_adapter()
            assert torch.equal(model(ids).logits, expected)
    for name, tensor in model.base_model.model.state_dict().items():
        if "ept" not in name:
            assert torch.equal(tensor, weights[name.replace(".base_layer", "")])


def test_merging_asks_for_one_task() -> None:
    model, ids = adapted(), token_ids()
    for tasks, found in ((None, "found none"), ([0, 1], "a task for each row")):
        model.set_task(tasks)
        with pytest.raises(ConfigError, match=found):
            model.merge_adapter()
    assert not any(m.merged for m in model.modules() if isinstance(m, TunerLayer))
    model.set_task("mrpc")
    expected = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_single_task_needs_no_naming() -> None:
    model, ids = adapted(task_names=None), token_ids()
    expected = model(ids).logits
    assert torch.equal(model(ids, tasks=[0, 0]).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_cannot_change_its_task_unnoticed() -> None:
    model, ids = adapted(), token_ids()
    model.set_task("cola")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        model.set_task("rte")
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        model(ids, tasks=[0, 1])


def test_routing_by_token_works_without_tasks_and_refuses_to_merge(tmp_path) -> None:
    model, ids = adapted(router="token"), token_ids()
    logits = model(ids, labels=ids).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, logits)
    with pytest.raises(ConfigError, match=r"depends on its input.*router='task'"):
        model.merge_adapter()
    for refused in (lambda: model.set_task(0), lambda: model.export_lora(tmp_path / "lora")):
        with pytest.raises(ConfigError, match="routes by token"):
            refused()
    assert model.parameter_counts().routers == sum(8 * a.inputs for a in adapters(model))


def test_saved_and_loaded_tasks_keep_their_outputs(tmp_path) -> None:
    model, ids = adapted(), token_ids()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_llama(), tmp_path).eval()
    assert loaded.peft_config["default"].task_names == NAMES
    for task in NAMES:
        assert torch.equal(by_task(loaded, ids, task), by_task(model, ids, task))


@pytest.mark.parametrize("projection", ["kron", "channel"])
@pytest.mark.parametrize("make", [small_llama, small_gpt2])
def test_an_exported_task_is_a_plain_lora(make, projection, tmp_path) -> None:
    model, ids = adapted(make(), projection=projection), token_ids()
    for task in NAMES:
        model.export_lora(tmp_path, task)
        lora = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        assert type(lora.peft_config["default"]) is peft.LoraConfig
        torch.testing.assert_close(
            lora(ids).logits, by_task(model, ids, task), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ConfigError, match="Did you mean cola"):
        model.export_lora(tmp_path, "colla")
    model.set_task(None)
    with pytest.raises(ConfigError, match="found none"):
        model.export_lora(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_export_takes_a_trained_head_along(tmp_path) -> None:
    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        config = LlamaConfig.from_dict(small_llama().config.to_dict() | {"pad_token_id": 0})
        return LlamaForSequenceClassification(config).eval()

    chosen = EPTConfig(
        task_type="SEQ_CLS", task_names=NAMES, r=2, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(classifier(), chosen).eval()
    perturb(model, 0.2)
    model.set_task("mrpc")
    model.export_lora(tmp_path)
    lora = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    ids = token_ids()
    torch.testing.assert_close(lora(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_route_table_tells_which_experts_each_task_uses() -> None:
    model = adapted()
    table = model.route_table()
    layers = [
        name for name, m in model.base_model.model.named_modules() if isinstance(m, TunerLayer)
    ]
    assert list(table.routes) == layers
    for by_task in table.routes.values():
        for chosen in by_task:
            assert len(chosen) == 2
            assert abs(sum(chosen.values()) - 1) < 1e-6
    for task in range(3):
        shares = table.size_shares(task)
        assert set(shares) <= {2, 4, 6, 8}
        assert abs(sum(shares.values()) - 1) < 1e-6
    assert all(name in str(table) for name in (*NAMES, *layers))


def test_every_layer_has_a_router_of_its_own_whatever_its_width() -> None:
    """Layers of one width are stacked; wide ones come before narrow ones and between them."""
    widths = (64, 128, 16, 64, 128, 8)
    base = nn.Sequential(*(nn.Linear(width, 32) for width in widths))
    config = EPTConfig(task_names=NAMES, target_modules=r"\d", r=2)
    model = peft.get_peft_model(base, config)
    perturb(model, 0.5)
    routers = model.base_model.routers()
    gates, seen = routers.all_gates(), dict.fromkeys(widths, 0)
    expected = {}
    for number, width in enumerate(widths):
        place, seen[width] = seen[width], seen[width] + 1
        embedding = routers.embeddings[str(width)][place]
        assert torch.equal(gates.embeddings[routers.numbers[str(number)]], embedding)
        bias = routers.biases[routers.numbers[str(number)]]
        logits = embedding @ routers.gates[str(width)][place].mT + bias
        expected[str(number)] = logits.softmax(-1).topk(2).indices
    for name, by_task in model.route_table().routes.items():
        for task, chosen in enumerate(by_task):
            assert sorted(chosen) == sorted(expected[name][task].tolist())


# Batches.


def test_every_batch_is_of_one_task_and_repeats_nothing_before_all_was_seen() -> None:
    tasks = [0] * 20 + [7] * 12
    batches = list(TaskBatches(tasks, 4))
    assert len(batches) == 8
    for task in (0, 7):
        own = [item for batch in batches if tasks[batch[0]] == task for item in batch]
        items = tasks.count(task)
        assert all(tasks[item] == task for item in own)
        for start in range(0, len(own) - items + 1, items):
            assert len(set(own[start : start + items])) == items
        assert len(set(own[:items])) == len(own[:items])


def test_tasks_are_drawn_alike_however_large_they_are() -> None:
    """Equal by the paper; by the released code, a softmax of shares."""
    tasks = [0] * 900 + [1] * 100
    drawn = [tasks[batch[0]] for batch in TaskBatches(tasks, 1)]
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.06
    released = TaskBatches(tasks, 1, probabilities="softmax")
    torch.testing.assert_close(released.probabilities, torch.tensor([0.9, 0.1]).softmax(0))
    assert abs(sum(tasks[b[0]] for b in released) / len(released) - 0.31) < 0.06


def test_draws_follow_from_seed_and_epoch() -> None:
    tasks = [0] * 30 + [1] * 30
    one, two = TaskBatches(tasks, 4, seed=3), TaskBatches(tasks, 4, seed=3)
    first, second = list(one), list(one)
    assert list(two) == first != second
    two.set_epoch(1)
    assert list(two) == second
    assert list(TaskBatches(tasks, 4, seed=4)) != first


def test_a_small_task_repeats_its_items_and_bad_options_are_refused() -> None:
    (batch,) = TaskBatches([5, 5], 3)
    assert set(batch) == {0, 1}
    assert len(batch) == 3
    with pytest.raises(ConfigError, match="batch_size"):
        TaskBatches([0], 0)
    with pytest.raises(ConfigError, match="probabilities"):
        TaskBatches([0], 1, probabilities="size")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no items"):
        TaskBatches([], 1)
