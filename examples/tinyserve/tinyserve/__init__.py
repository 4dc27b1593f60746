"""A small server engine for Llama models on a CPU: continuous batching, paged keys, tensor parallelism.

    python -m tinyserve MODEL --port 8009 --tensor-parallel 2

It knows nothing of attnhook; `tinyserve_attnhook` is the plugin that does.
"""

__version__ = "1.0"
