"""attnhook's plugin for tinyserve: which of its functions go around which of tinyserve's.

`worker` is in each rank, at the model's passes; `requests` where requests come in and tokens are accepted; `server` at
the routes.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata

from attnhook.options import CaptureOptions
from attnhook.plugins import EngineInstallation, Hook, Hooks, RegisterBackend, hookimpl

_WANTED = "tinyserve 1.0"


class TinyserveBackend:
    """What the plugin registers."""

    name = "tinyserve"
    contract = 1
    servers = ("tinyserve",)  # which end where they could not capture, in place of serving without

    def available(self) -> bool:
        """Whether tinyserve can be imported, found out without importing it."""
        return importlib.util.find_spec("tinyserve") is not None

    def version(self) -> str | None:
        """Installed version of tinyserve, or None."""
        try:
            return metadata.version("tinyserve")
        except metadata.PackageNotFoundError:
            return None

    def models_in(self, target: object) -> tuple[object, ...]:
        """None: tinyserve captures by request, not by model."""
        return ()

    def install(self, options: CaptureOptions) -> EngineInstallation:
        """Patch tinyserve's modules now if they are imported, else when they are.

        Raises UnsupportedError, or OptionError for a guard rail's bad variable.
        """
        from attnhook.serving import Policy

        Policy.from_environ()
        installation = EngineInstallation(self.name, self.version(), hooks.patchers(), _WANTED)
        installation.start()
        return installation


hooks = Hooks(
    __name__,
    (
        Hook("worker.wrap_init", ("tinyserve.model:Model.__init__",)),
        Hook("worker.wrap_forward", ("tinyserve.model:Model.forward",)),
        Hook("worker.wrap_attend", ("tinyserve.model:Model.attend",)),
        Hook("requests.wrap_submit", ("tinyserve.engine:Engine.submit",)),
        Hook("requests.wrap_accept", ("tinyserve.engine:Engine.accept",)),
        Hook("server.wrap_choice", ("tinyserve.server:choice",)),
        Hook("server.wrap_completions", ("tinyserve.server:completions",)),
        Hook("server.wrap_make_app", ("tinyserve.server:make_app",)),
        Hook("server.wrap_make_parser", ("tinyserve.server:make_parser",)),
    ),
    lambda: f"tinyserve {TinyserveBackend().version()}",
    _WANTED,
)


@hookimpl
def attnhook_register_backends(register: RegisterBackend) -> None:
    register(TinyserveBackend())
