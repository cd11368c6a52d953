"""A made-up comparison that has everything a report must cope with."""

import math
import random
from dataclasses import replace
from typing import Any

from sparing.compare.results import LearningRate, Results, Row, Summary

BEFORE = 3.4021
GRID = [1e-4, 3e-4, 1e-3, 3e-3]


def fake_curve(seed: int, end: float, steps: int = 400) -> list[float]:
    """A falling, noisy training loss."""
    noise = random.Random(seed)
    return [
        end + (BEFORE - end) * math.exp(-step / 60) + noise.gauss(0, 0.04) for step in range(steps)
    ]


def fake_row(method: str, losses: list[float], **changes: Any) -> Row:
    """A method that finished."""
    mean = sum(losses) / len(losses)
    row = Row(
        method=method,
        title=f"The {method} method",
        status="ok",
        options={"rank": 8, "target_modules": ["q_proj", "v_proj"], "seed": 0},
        learning_rate=LearningRate(1e-3, GRID, [mean + 0.1, mean + 0.03, mean, mean + 0.05]),
        loss_before=BEFORE,
        loss=Summary.of(losses),
        trainable_parameters=614_400,
        budget_share=0.9982,
        adapter_bytes=2_459_000,
        peak_memory_bytes=1_932_735_283,
        seconds_per_step=0.4127,
        latency_ratio=1.083,
        merged_latency_ratio=1.002,
        curve=[fake_curve(seed, mean) for seed in range(len(losses))],
        adapter=f"adapters/{method}",
    )
    return replace(row, **changes)


def fake_results(*, seeds: int = 3) -> Results:
    """References, four methods that finished and one that failed."""

    def over_seeds(*losses: float) -> list[float]:
        return list(losses)[:seeds]

    untouched = Row(
        method="untouched",
        title="The model as it came",
        status="reference",
        options={},
        loss_before=BEFORE,
        loss=Summary.of([BEFORE]),
        trainable_parameters=0,
        latency_ratio=1.0,
    )
    full = fake_row(
        "full",
        over_seeds(2.8511, 2.8532, 2.8496),
        title="Full fine-tuning",
        status="reference",
        options={},
        trainable_parameters=134_515_008,
        budget_share=1.0,
        note="not held to the budget",
        adapter_bytes=269_060_552,
        peak_memory_bytes=4_932_735_283,
        seconds_per_step=0.9312,
        latency_ratio=1.0,
        merged_latency_ratio=None,
    )
    lora = fake_row(
        "lora",
        over_seeds(2.9542, 2.9518, 2.9571),
        trainable_parameters=589_824,
        budget_share=0.9583,
        note="4 % below the budget",
        learning_rate=LearningRate(3e-3, GRID, [3.1, 3.02, 2.98, 2.955]),
    )
    mos = fake_row(
        "mos",
        over_seeds(2.9211, 2.9263, 2.9189),
        seconds_per_step=0.4731,
        peak_memory_bytes=2_032_735_283,
        latency_ratio=1.121,
    )
    neuroada = fake_row(
        "neuroada",
        over_seeds(2.9198, 2.9246, 2.9171),
        trainable_parameters=612_352,
        budget_share=0.9949,
        seconds_per_step=0.3921,
        peak_memory_bytes=1_732_735_283,
        options={"per_neuron": 3, "select": "magnitude"},
    )
    hut = fake_row(
        "hut",
        over_seeds(3.0112, 3.0098, 3.0181),
        trainable_parameters=599_040,
        budget_share=0.9733,
        seconds_per_step=0.4402,
        merged_latency_ratio=None,
        learning_rate=LearningRate(1e-3, GRID, [3.2, 3.08, 3.01, None]),
    )
    sara = Row(
        method="sara",
        title="The sara method",
        status="failed",
        options={"threshold": 1e-3},
        loss_before=BEFORE,
        error="OutOfMemoryError: tried to allocate 2.00 GiB",
    )
    return Results(
        model={
            "name": "SmolLM2-135M",
            "source": "HuggingFaceTB/SmolLM2-135M",
            "parameters": 134_515_008,
        },
        data={
            "name": "docstrings",
            "block_length": 256,
            "train_tokens": 400_000,
            "selection_tokens": 20_000,
            "validation_tokens": 50_000,
            "leaked_paragraphs_dropped": 3,
            "fingerprint": "9f2c1ab04d",
        },
        budget={"text": "615.5k", "unit": "parameters", "limit": 615_500},
        settings={
            "steps": 400,
            "batch_size": 8,
            "schedule": "cosine, 5 % warm-up",
            "optimizer": "AdamW",
            "seeds": list(range(seeds)),
        },
        rows=[untouched, full, lora, mos, neuroada, hut, sara],
        environment={"device": "made-up CPU, 2 threads", "torch": "2.9.0", "sparing": "0.1.0"},
        created="2026-01-02T03:04:05Z",
    )


def crowded_results() -> Results:
    """Twelve methods with long names and nearly the same costs."""
    results = fake_results()
    noise = random.Random(1)
    rows = [
        fake_row(
            f"method-number-{number}",
            [2.9 + 0.01 * number + noise.gauss(0, 0.004) for _ in range(3)],
            trainable_parameters=615_000 - 250 * number,
            seconds_per_step=0.4 + 0.01 * noise.random(),
        )
        for number in range(12)
    ]
    return replace(results, rows=[*results.rows[:3], *rows])


def hostile_results(*, seeds: int = 3) -> Results:
    """Every text that comes from the user is an attack."""
    attack = r"<script>alert(1)</script>|`x`$\bad$"
    results = fake_results(seeds=seeds)
    rows = [
        replace(
            row,
            method=f"{row.method}{attack}",
            title=attack,
            note=attack,
            options={attack: attack},
            error=attack if row.status == "failed" else None,
            adapter=attack if row.adapter else None,
        )
        for row in results.rows
    ]
    return replace(
        results,
        model={"name": attack, "source": attack, "parameters": 1},
        data={"name": attack},
        budget={"text": attack, "unit": "parameters", "limit": 615_500},
        settings={attack: [attack]},
        environment={attack: attack},
        rows=rows,
    )
