"""The stages of the check, in the order of their worth, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage: a module of this package that runs in a process of its own."""

    name: str
    about: str
    seconds: float  # limit on a GPU
    archives: tuple[str, ...]  # the parts whose packages it runs from, the most particular first
    rehearsal_seconds: float = 900.0

    @property
    def module(self) -> str:
        """Of the stage's ``main``."""
        return f"tools.gpu.stage_{self.name}"


STAGES = (
    Stage("kernels", "the tests of the kernels on the device, CUDA graphs replayed", 120, ("base",)),
    Stage("speed", "bandwidth of the kernels against a copy and against rivals, extra memory", 110, ("base",)),
    Stage("sglang", "real SGLang: every row against Transformers, eager and graphs; tokens per second", 230,
          ("sglang", "base")),
    Stage("vllm", "real vLLM: both runners, eager, piecewise and full graphs; tokens per second", 220,
          ("vllm", "base")),
    Stage("transformers", "Transformers on the device: sdpa, flex, 32,768 tokens", 60, ("base",)),
    Stage("sanitizer", "compute-sanitizer on the awkward sizes", 60, ("base",)),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)
