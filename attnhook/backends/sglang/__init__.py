"""SGLang: exact attention from an unmodified server or `sglang.Engine`, per request.

`worker` captures rows in the scheduler processes, `pool` reads the engine's keys, `results` sends records along
with the tokens that they belong to, `stages` from one pipeline stage to another, `frontend` takes requests,
`reading` takes records out of results, `server` is the HTTP surface, `older` does what versions before 0.5.15 lack.
SGLang loads `load` through the entry point group ``sglang.srt.plugins``; its extra HTTP workers, which load no
plugins, are reached by ``attnhook.pth``.
"""

from __future__ import annotations

from attnhook.options import CaptureOptions
from attnhook.plugins.hooked import HookedBackend
from attnhook.plugins.hooks import Hook, Hooks
from attnhook.plugins.patching import EngineInstallation

_WANTED = "SGLang 0.5.11 or newer (tested: 0.5.11, 0.5.21, 0.5.23)"
_SRT = "sglang.srt"

# our file and wrapper: the place of SGLang that it goes to, as module:Class.attribute; where versions differ, the
# newest first, and the first one that is there is taken
_HOOKS: dict[str, tuple[str, ...]] = {
    "worker.wrap_init_attention_backends": (
        f"{_SRT}.model_executor.model_runner:ModelRunner.init_attention_backends",
        f"{_SRT}.model_executor.model_runner:ModelRunner.init_attention_backend",
    ),
    "worker.wrap_model_forward": (f"{_SRT}.model_executor.model_runner:ModelRunner.forward",),
    "worker.wrap_forward_batch_generation": (f"{_SRT}.managers.tp_worker:TpModelWorker.forward_batch_generation",),
    "worker.wrap_compute_max_prefix_len": (
        f"{_SRT}.managers.schedule_batch:Req._compute_max_prefix_len",
        f"{_SRT}.managers.schedule_batch:Req.init_next_round_input",
    ),
    "results.wrap_maybe_collect_customized_info": (
        f"{_SRT}.managers.scheduler_components.batch_result_processor:"
        "SchedulerBatchResultProcessor._maybe_collect_customized_info",
        f"{_SRT}.managers.scheduler_output_processor_mixin:SchedulerOutputProcessorMixin.maybe_collect_customized_info",
    ),
    "stages.wrap_pp_prepare_tensor_dict": (
        f"{_SRT}.managers.scheduler_pp_mixin:SchedulerPPMixin._pp_prepare_tensor_dict",
    ),
    "stages.wrap_pp_prep_batch_result": (f"{_SRT}.managers.scheduler_pp_mixin:SchedulerPPMixin._pp_prep_batch_result",),
    "frontend.wrap_init": (f"{_SRT}.managers.tokenizer_manager:TokenizerManager.__init__",),
    "frontend.wrap_generate_request": (f"{_SRT}.managers.tokenizer_manager:TokenizerManager.generate_request",),
    "frontend.wrap_validate_one_request": (
        f"{_SRT}.managers.tokenizer_manager:TokenizerManager._validate_one_request",
    ),
    "server.wrap_handle_request": (f"{_SRT}.entrypoints.openai.serving_base:OpenAIServingBase.handle_request",),
    "server.wrap_add_cli_args": (f"{_SRT}.server_args:ServerArgs.add_cli_args",),
    "server.add_routes": (f"{_SRT}.entrypoints.http_server:app.router.routes",),
    "server.add_middleware": (f"{_SRT}.entrypoints.http_server:app.user_middleware",),
}
# what only older versions need: the place, and a name in the same module by which a newer one shows that it does not
_OLDER: tuple[tuple[str, str, str], ...] = (
    (
        "older.wrap_stream_output_generation",
        f"{_SRT}.managers.scheduler_output_processor_mixin:SchedulerOutputProcessorMixin.stream_output_generation",
        "",
    ),
    (
        "older.wrap_stream_output_generation",
        f"{_SRT}.managers.scheduler_components.output_streamer:SchedulerOutputStreamer._stream_output_generation",
        "wrap_as_pickle",
    ),
    (
        "older.wrap_extract_field_by_index",
        f"{_SRT}.managers.multi_tokenizer_mixin:_extract_field_by_index",
        "unwrap_from_pickle",
    ),
    (
        "older.wrap_handle_batch_output",
        f"{_SRT}.managers.tokenizer_manager:TokenizerManager._handle_batch_output",
        "ReqState.customized_info_accumulated",
    ),
    (
        "older.add_meta_info_keys",
        f"{_SRT}.managers.tokenizer_manager:_INCREMENTAL_STREAMING_META_INFO_KEYS",
        "ReqState.customized_info_accumulated",
    ),
)
#: What each kind of process must have, by the file of its wrappers; the HTTP server's are checked where there is one.
WORKER, FRONTEND, SERVER = ("worker.", "results.", "stages."), ("frontend.",), ("server.",)


HOOKS = Hooks(
    __name__,
    (
        *(Hook(wrapper, places) for wrapper, places in _HOOKS.items()),
        *(Hook(wrapper, (place,), newer) for wrapper, place, newer in _OLDER),
    ),
    lambda: f"sglang {SglangBackend().version()}",
    _WANTED,
)


class SglangBackend(HookedBackend):
    """The backend object that the plugin registers."""

    name = "sglang"
    modules = ("sglang",)
    distributions = ("sglang",)
    hooks = HOOKS

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """As any hooked backend; raises OptionError too, for a guard rail's bad variable."""
        from attnhook.serving.policy import Policy  # which needs what engines bring along, so not before one is here

        Policy.from_environ()
        return super().install(options)
