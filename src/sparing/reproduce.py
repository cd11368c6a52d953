"""Run the small experiments under `reproductions/` and keep what they show as evidence."""

import importlib.util
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

import sparing
from sparing.catalog import CATALOG
from sparing.checkpoint import write_json
from sparing.errors import ConfigError, near_matches

Verdict = Literal[
    "holds", "holds in direction", "does not hold at this scale", "not measurable here"
]


@dataclass(frozen=True)
class Claim:
    """What a paper says.

    Arguments:
        text: the claim, paraphrased.
        number: the paper's own figure, or "not found".
        source: where in the paper, or in whose report of it.
    """

    text: str
    number: str
    source: str


@dataclass(frozen=True)
class Check:
    """One statement about measurements, with the threshold that was declared before the run.

    Arguments:
        statement: in words, with the threshold, such as "MoS loss < 0.9 x LoRA loss".
        measured: the figure compared, averaged over seeds unless the statement says otherwise.
        threshold: what it is compared with.
        holds: the outcome.
    """

    statement: str
    measured: float
    threshold: float
    holds: bool

    @classmethod
    def below(cls, statement: str, measured: float, threshold: float) -> "Check":
        """The check that holds if `measured` is under `threshold`."""
        return cls(statement, float(measured), float(threshold), bool(measured < threshold))

    @classmethod
    def above(cls, statement: str, measured: float, threshold: float) -> "Check":
        """The check that holds if `measured` is over `threshold`."""
        return cls(statement, float(measured), float(threshold), bool(measured > threshold))


@dataclass(frozen=True)
class Evidence:
    """What a reproduction found.

    Arguments:
        measured: figures by name; lists are one value a seed.
        checks: the claim's own statements.
        controls: statements that must hold for the experiment to mean anything, such as that a
            faked method fails it.
        verdict: see `verdict_of`.
        notes: what a reader should know about the scale and the limits.
    """

    measured: dict[str, Any]
    checks: list[Check]
    controls: list[Check]
    verdict: Verdict
    notes: str = ""
    seconds: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


def verdict_of(checks: Sequence[Check], controls: Sequence[Check]) -> Verdict:
    """All checks and controls hold: "holds"; some checks: "holds in direction"; none, or a failed
    control: "does not hold at this scale"."""
    if not all(control.holds for control in controls) or not any(c.holds for c in checks):
        return "does not hold at this scale"
    return "holds" if all(check.holds for check in checks) else "holds in direction"


def folder() -> Path:
    """Where the reproductions are: in a checkout beside `src`, in an installed wheel inside it."""
    package = Path(sparing.__file__).parent
    checkout = package.parents[1] / "reproductions"
    return checkout if checkout.is_dir() else package / "reproductions"


def available() -> list[str]:
    """Slugs that have a reproduction, in catalog order."""
    return [m.slug for m in CATALOG if (folder() / f"{m.slug.replace('-', '_')}.py").exists()]


def load(slug: str) -> ModuleType:
    """The module of one reproduction.

    Raises:
        ConfigError: there is none of that name.
    """
    if slug not in available():
        raise ConfigError(
            "reproduction",
            expected="the slug of a method with a reproduction",
            found=repr(slug),
            mend=near_matches(slug, available()),
        )
    if str(folder()) not in sys.path:
        sys.path.insert(0, str(folder()))  # reproductions share private modules, such as _digits
    name = slug.replace("-", "_")
    spec = importlib.util.spec_from_file_location(
        f"sparing_reproductions.{name}", folder() / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reproduce(
    slug: str, *, device: str = "cpu", seeds: Sequence[int] = (0, 1, 2), out: Path | None = None
) -> tuple[Claim, Evidence]:
    """Run one reproduction; with `out`, write `out/<slug>.json`."""
    module = load(slug)
    run: Callable[[str, Sequence[int]], Evidence] = module.run
    start = time.perf_counter()
    found = run(device, seeds)
    evidence = Evidence(
        **{
            **{name: getattr(found, name) for name in Evidence.__dataclass_fields__},
            "seconds": round(time.perf_counter() - start, 1),
            "environment": environment(device),
        }
    )
    if out is not None:
        record = {"slug": slug, "seeds": list(seeds), "claim": asdict(module.CLAIM)}
        write_json(out / f"{slug}.json", record | asdict(evidence))
    return module.CLAIM, evidence


def environment(device: str = "cpu") -> dict[str, str]:
    """The machine and the versions that a figure depends on."""
    import peft
    import transformers

    name = torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name()
    return {
        "device": f"{name}, {torch.get_num_threads()} threads",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "sparing": sparing.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
