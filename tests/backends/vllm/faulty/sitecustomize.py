"""Python runs this at start where this folder is on PYTHONPATH: a fault inside the capture step, on request.

With FAULTY_RANK only the workers of that rank are faulty, in two places.
"""

import os

import wrapt

FAULT, FAULT_WHILE_TAKING = 13, 11  # values of top_k
_RANK = os.environ.get("FAULTY_RANK")


def _fail(wrong):
    if wrong and _RANK is not None:
        import torch.distributed as dist

        wrong = dist.is_initialized() and dist.get_rank() == int(_RANK)
    if wrong:
        raise RuntimeError("injected by a test")


def _before(owner, name, look):
    whole = getattr(owner, name)

    def faulty(self, *arguments, **options):
        _fail(look(self))
        return whole(self, *arguments, **options)

    setattr(owner, name, faulty)


@wrapt.when_imported("attnhook.capture.step")
def in_records(module):
    if _RANK is None:
        _before(module.StepCapture, "_finished", lambda capture: capture.options.top_k == FAULT)


@wrapt.when_imported("attnhook.kernels.topk.split")
def in_kernel(module):
    _before(module.SplitStep, "_sum", lambda step: step._selection.top_k == FAULT)


@wrapt.when_imported("attnhook.serving.reduction")
def in_step(module):
    def wanted(step):
        return any(group.options.top_k == FAULT_WHILE_TAKING for group in step.plan.groups.values())

    _before(module.Reduction, "take", wanted)
