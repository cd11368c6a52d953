"""Time and memory of merging, against mergekit on the same inputs and against a plain copy.

Every arm is a fresh process; arms take turns, and the median of the repeats counts. Time is that of
the merge alone for us and for the copy; mergekit is timed as a whole and without its imports. The
copy reads all inputs and writes one model, which is what a merge has to do at least.

    python benchmarks/merge.py --mergekit /path/to/venv/bin/python --out benchmarks/merge.json

mergekit has to be in an environment of its own; without `--mergekit` it is left out.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparing.checkpoint import write_json
from sparing.reproduce import environment
from sparing.shards import Checkpoint, pieces

TARGETS = {
    "throughput over copy, at least": 0.5,
    "peak RSS over 4 x largest tensor x experts + 300 MB, at most": 1.0,
}
DENSITY, SCALE = 0.2, 0.4
MERGEKIT_METHODS = ("task-arithmetic", "ties")

OURS = """
import json, sys, time
from sparing.merge import merge
base, experts, method, out, options = json.loads(sys.argv[1])
start = time.perf_counter()
merge(base, experts, method, out, **options)
print(time.perf_counter() - start, *(line.split()[1] for line in open("/proc/self/status")
                                     if line.startswith("VmHWM")))
"""
COPY = """
import json, os, sys, time
base, experts, _, out, _ = json.loads(sys.argv[1])
start = time.perf_counter()
os.makedirs(out)
for folder in (base, *experts):
    with open(folder + "/model.safetensors", "rb", buffering=0) as source, \\
         open(out + "/model.safetensors" if folder == base else os.devnull, "wb", 0) as target:
        while piece := source.read(1 << 22):
            target.write(piece)
        if folder == base:
            os.fsync(target.fileno())
print(time.perf_counter() - start, *(line.split()[1] for line in open("/proc/self/status")
                                     if line.startswith("VmHWM")))
"""
MERGEKIT = """
import json, sys, time
import mergekit.merge
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
config, out = json.loads(sys.argv[1])
start = time.perf_counter()
mergekit.merge.run_merge(MergeConfiguration.model_validate(config), out,
                         MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
print(time.perf_counter() - start, *(line.split()[1] for line in open("/proc/self/status")
                                     if line.startswith("VmHWM")))
"""


def models(root: Path, experts: int, hidden: int, layers: int) -> tuple[str, list[str]]:
    """A random Llama in bfloat16 and fine-tunes of it."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=16_000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(root / "base")
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for number in range(experts):
        for name, tensor in base.state_dict().items():
            tensor.copy_(state[name] + 0.002 * torch.randn(tensor.shape))
        base.save_pretrained(root / f"expert{number}")
    return str(root / "base"), [str(root / f"expert{number}") for number in range(experts)]


def measure(python: str, script: str, arguments: Any) -> tuple[float, float, int]:
    """Seconds inside the script, of the whole process, and its peak resident bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [python, "-W", "ignore", "-c", script, json.dumps(arguments)],
            stdout=output,
            stderr=subprocess.DEVNULL,
        )
        process.wait()
        whole = time.perf_counter() - start
        output.seek(0)
        lines = output.read().split()
    if process.returncode:
        raise SystemExit(f"failed: {python} {script}")
    return float(lines[-2]), whole, int(lines[-1]) * 1024


def mergekit_config(base: str, experts: list[str], method: str) -> dict[str, Any]:
    """What our methods do, in mergekit's words."""
    each = {"weight": SCALE} if method == "task-arithmetic" else {"weight": 1, "density": DENSITY}
    return {
        "merge_method": method.replace("-", "_"),
        "base_model": base,
        "models": [{"model": expert, "parameters": each} for expert in experts],
        "parameters": {"normalize": method == "ties"},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def difference(first: Path, second: Path) -> dict[str, float]:
    """Largest difference of two results, and the share of numbers that are not equal."""
    largest, unequal, total = 0.0, 0, 0
    with Checkpoint(first) as a, Checkpoint(second) as b:
        for name in a.tensors:
            for ends in pieces(a.tensors[name].numel, 1 << 20):
                gap = (a.read(name, *ends).float() - b.read(name, *ends).float()).abs()
                largest = max(largest, gap.max().item())
                unequal += int((gap > 0).sum())
                total += gap.numel()
    return {"largest": largest, "share unequal": unequal / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="ours whose name starts so")
    parser.add_argument("--mergekit", help="python of an environment with mergekit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ours: dict[str, tuple[str, dict[str, Any]]] = {
        "average": ("average", {}),
        "task-arithmetic": ("task-arithmetic", {"scale": SCALE}),
        "task-arithmetic, no hashes": ("task-arithmetic", {"scale": SCALE, "hash_inputs": False}),
        "ties": ("ties", {"density": DENSITY, "scope": "tensor"}),
        "ties, whole model": ("ties", {"density": DENSITY}),
        "dare": ("dare", {}),
        "pcb-merging": ("pcb-merging", {}),
    }
    runs: dict[str, list[tuple[float, float, int]]] = {}
    equal: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        base, experts = models(root, arguments.experts, arguments.hidden, arguments.layers)
        with Checkpoint(Path(base)) as checkpoint:
            size = sum(info.nbytes for info in checkpoint.tensors.values())
            largest = max(info.nbytes for info in checkpoint.tensors.values())
        for _ in range(arguments.repeats):
            results = {}
            shutil.rmtree(root / "copy", ignore_errors=True)
            what = [base, experts, "", str(root / "copy"), {}]
            runs.setdefault("copy", []).append(measure(sys.executable, COPY, what))
            for name, (method, options) in ours.items():
                if arguments.only and not name.startswith(arguments.only):
                    continue
                results[name] = root / f"ours {name}"
                what = [base, experts, method, str(results[name]), options]
                runs.setdefault(name, []).append(measure(sys.executable, OURS, what))
            for method in MERGEKIT_METHODS if arguments.mergekit else ():
                out = root / f"mergekit {method}"
                shutil.rmtree(out, ignore_errors=True)
                what = [mergekit_config(base, experts, method), str(out)]
                found = measure(arguments.mergekit, MERGEKIT, what)
                runs.setdefault(f"mergekit {method}", []).append(found)
                equal[method] = difference(results[method], out)
    moved = size * (arguments.experts + 2)
    bound = 4 * largest * arguments.experts + 300e6
    table = {}
    for name, found in runs.items():
        seconds, whole, rss = (statistics.median(column) for column in zip(*found, strict=True))
        table[name] = {
            "seconds": seconds,
            "seconds with imports": whole,
            "GB/s": moved / seconds / 1e9,
            "peak RSS MB": rss / 1e6,
            "peak RSS over bound": rss / bound,
        }
        table[name]["throughput over copy"] = table["copy"]["seconds"] / seconds
        print(f"{name:28}", "  ".join(f"{key} {value:.3g}" for key, value in table[name].items()))
    print(json.dumps(equal))
    if arguments.out:
        content = {
            "model": {"bytes": size, "largest tensor": largest, "experts": arguments.experts},
            "targets": TARGETS,
            "measured": table,
            "difference from mergekit": equal,
            "environment": environment(),
        }
        write_json(arguments.out, content)


if __name__ == "__main__":
    main()
