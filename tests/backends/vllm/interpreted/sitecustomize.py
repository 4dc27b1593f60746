"""Python runs this at start where this folder is on PYTHONPATH: vLLM's model runner V2 without a GPU.

V2's own kernels are Triton's, which its interpreter runs; vLLM looks for a Triton backend "cpu" that no release
of Triton has.
"""

import os
from types import SimpleNamespace

import wrapt

os.environ["TRITON_INTERPRET"] = "1"


@wrapt.when_imported("triton.backends")
def pretend(module):
    module.backends["cpu"] = module.Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
