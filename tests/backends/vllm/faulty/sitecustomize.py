"""Python runs this at start where this folder is on PYTHONPATH: a fault inside the capture step, on request."""

import wrapt

FAULT = 13


@wrapt.when_imported("attnhook.capture")
def inject(module):
    step = module.StepCapture
    whole = step.records

    def records(self, dropped):
        if self.options.top_k == FAULT:
            raise RuntimeError("injected by a test")
        return whole(self, dropped)

    step.records = records
