"""Python runs this at start where this folder is on PYTHONPATH: what lets SGLang run on this CPU, and faults.

PyPI's torchvision is built for CUDA: next to a CPU torch its import fails for want of two operators' schemas.
SGLang imports it for image models, which no test uses; the schemas without kernels are enough.
"""

import importlib
import os

import wrapt

if os.environ.get("IDLE_IMPORT"):  # benchmarks/in_engine.py
    importlib.import_module(os.environ["IDLE_IMPORT"])

FAULT = 13  # a top_k that makes the capture step raise


@wrapt.when_imported("torch")
def declare(torch):
    if torch.version.cuda is not None:
        return  # the torch that torchvision was built for
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._torchvision_schemas = library  # the schemas live as long as this object


@wrapt.when_imported("attnhook.capture.step")
def inject(module):
    step = module.StepCapture
    whole = step._finished

    def finished(self, dropped):
        if self.options.top_k == FAULT:
            raise RuntimeError("injected by a test")
        return whole(self, dropped)

    step._finished = finished


@wrapt.when_imported("attnhook.backends.sglang.adapter")
def tell(module):
    """What tests want to know of a capture goes to the file SGLANG_TEST_NOTES."""
    notes = os.environ.get("SGLANG_TEST_NOTES")
    if not notes:
        return
    from attnhook.serving.worker import Worker

    take_kept, view = Worker._take_kept, module.pool.view

    def note(line):
        with open(notes, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _take_kept(self, reduction, kept):
        note(f"kept {sorted(reduction.missing)}")
        return take_kept(self, reduction, kept)

    def _view(pool, *args, **kwargs):
        note(f"pool {type(pool).__name__}")
        return view(pool, *args, **kwargs)

    Worker._take_kept, module.pool.view = _take_kept, _view
