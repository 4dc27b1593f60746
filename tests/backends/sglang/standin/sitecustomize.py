"""Python runs this at start where this folder is on PYTHONPATH: what lets SGLang run on this CPU, and faults.

PyPI's torchvision is built for CUDA: next to a CPU torch its import fails for want of two operators' schemas.
SGLang imports it for image models, which no test uses; the schemas without kernels are enough.
"""

import wrapt

FAULT = 13  # a top_k that makes the capture step raise


@wrapt.when_imported("torch")
def declare(torch):
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._torchvision_schemas = library  # the schemas live as long as this object


@wrapt.when_imported("attnhook.capture")
def inject(module):
    step = module.StepCapture
    whole = step.records

    def records(self, dropped):
        if self.options.top_k == FAULT:
            raise RuntimeError("injected by a test")
        return whole(self, dropped)

    step.records = records
