"""SGLang: exact attention from an unmodified server or `sglang.Engine`, per request.

`worker` captures rows in the scheduler processes, `pool` reads the engine's keys, `results` sends records along
with the tokens that they belong to, `stages` from one pipeline stage to another, `frontend` takes requests,
`reading` takes records out of results, `server` is the HTTP surface, `older` does what versions before 0.5.15 lack.
SGLang loads `load` through the entry point group ``sglang.srt.plugins``; its extra HTTP workers, which load no
plugins, are reached by ``attnhook.pth``.
"""

from __future__ import annotations

import importlib.util
from functools import partial, reduce
from importlib import import_module, metadata
from types import ModuleType

from attnhook.errors import AttnhookError, UnsupportedError
from attnhook.options import CaptureOptions, enabled
from attnhook.plugins.patching import EngineInstallation
from attnhook.serving.policy import Policy
from attnhook.system import switch

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
#: What each kind of process must have; the HTTP server's are checked where there is one.
WORKER = tuple(name for name in _HOOKS if name.startswith(("worker.", "results.", "stages.")))
FRONTEND = tuple(name for name in _HOOKS if name.startswith("frontend."))
SERVER = tuple(name for name in _HOOKS if name.startswith("server."))


class SglangBackend:
    """The backend object that the plugin registers."""

    name = "sglang"

    def available(self) -> bool:
        """Whether SGLang can be imported, found out without importing it."""
        return importlib.util.find_spec("sglang") is not None

    def version(self) -> str | None:
        """Installed version of SGLang, or None."""
        try:
            return metadata.version("sglang")
        except metadata.PackageNotFoundError:
            return None

    def models_in(self, target: object) -> tuple[object, ...]:
        """None: SGLang captures by request, not by model."""
        return ()

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch SGLang's modules now if they are imported, else when they are.

        Raises UnsupportedError, or OptionError for a guard rail's bad variable.
        """
        Policy.from_environ()
        installation = EngineInstallation(self.name, self.version(), _PATCHERS, _WANTED)
        installation.start()
        return installation


def load() -> None:
    """Entry point of ``sglang.srt.plugins``: does nothing unless ``ATTNHOOK=1``.

    SGLang logs a plugin's exception and goes on without it; a server that was asked to capture must not. A script that
    runs SGLang itself goes on, and its log tells.
    """
    try:
        if enabled():
            from attnhook.process import lifecycle

            lifecycle.start()
    except AttnhookError as error:
        switch.refuse(error)


#: Attribute of what we put in place, so that `check_hooks` knows it.
MARK = "_attnhook_hook"


def check_hooks(names: tuple[str, ...]) -> None:
    """Raise UnsupportedError naming the first of these hooks that is not in place."""
    for name in names:
        if not any(_in_place(name, place) for place in _HOOKS[name]):
            wanted = " or ".join(place.replace(":", ".") for place in _HOOKS[name])
            raise UnsupportedError(
                f"sglang {SglangBackend().version()}: {wanted} was not found, so its attention cannot be "
                f"captured; attnhook needs {_WANTED}"
            )


def _in_place(name: str, place: str) -> bool:
    module, _, path = place.partition(":")
    try:
        return getattr(_resolve(import_module(module), path), MARK, None) == name
    except (ImportError, AttributeError):
        return False


def _resolve(start: object, path: str) -> object:
    return reduce(getattr, path.split("."), start)


def _has(module: ModuleType, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        holder = _resolve(module, owner) if owner else module
    except AttributeError:
        return False
    # a dataclass's fields without a plain default are annotations only
    return hasattr(holder, name) or name in getattr(holder, "__annotations__", ())


def _patch(installation: EngineInstallation, module: ModuleType) -> None:
    """Put the hooks of one of SGLang's modules in place; ours is imported now, when SGLang's is.

    A module may have moved altogether, so `check_hooks` looks for all of them when the engine starts.
    """
    for name, places in _HOOKS.items():
        here = [path for where, _, path in (place.partition(":") for place in places) if where == module.__name__]
        if here:
            _put(installation, module, name, next((path for path in here if _has(module, path)), here[0]))
    for name, place, newer in _OLDER:
        where, _, path = place.partition(":")
        if where == module.__name__ and not (newer and _has(module, newer)):
            _put(installation, module, name, path)


def _put(installation: EngineInstallation, module: ModuleType, name: str, path: str) -> None:
    owner, _, attribute = path.rpartition(".")
    holder: object = module
    for part in owner.split(".") if owner else ():
        holder = installation.need(holder, part)
    installation.wrap(holder, attribute, partial(_marked, name))


def _marked(name: str, original: object) -> object:
    file, function = name.split(".")
    wrapped = getattr(import_module(f"{__name__}.{file}"), function)(original)
    setattr(wrapped, MARK, name)
    return wrapped


_PLACES = (*(place for places in _HOOKS.values() for place in places), *(place for _, place, _ in _OLDER))
_PATCHERS = {place.partition(":")[0]: _patch for place in _PLACES}
