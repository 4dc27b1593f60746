"""The backend: wraps `echoengine.attend` once the engine is imported, and unwraps it again."""

from __future__ import annotations

import importlib.util
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from attnhook import UnsupportedError
from attnhook.options import CaptureOptions, resolve_layers
from attnhook.plugins import Patches, Row, SelfCheck, Session, StepCapture, sessions, wants_row

if TYPE_CHECKING:
    import torch  # registering a backend imports nothing heavy

ENGINE = "attnhook_thirdparty_example.echoengine"


class EchoBackend:
    """What the plugin registers."""

    name = "echo"

    def available(self) -> bool:
        """Always: the engine comes with this package."""
        return importlib.util.find_spec(ENGINE) is not None

    def version(self) -> str | None:
        """Version of the engine, known without importing it."""
        return "0.1"

    def self_check(self, model: str | None) -> SelfCheck:
        """Five tokens, captured and compared with the engine's own softmax. ``model`` is none of this engine's."""
        import attnhook
        from attnhook_thirdparty_example import echoengine

        prompt = [3, 1, 4, 1, 5]
        with attnhook.capture(top_k=3) as records:
            tokens = echoengine.generate(prompt, 5)
        worst = 0.0
        for record in records:
            q, k = echoengine._tables[:, :, tokens[: record.query_position + 1]]
            true = echoengine.attend("", 0, q[:, -1], k).mean(0)
            worst = max([worst, *(abs(float(true[at]) - p) for at, p in record.top())])
        problems = [] if worst < 1e-5 and len(records) == 5 else [f"{len(records)} records, off by {worst:.1e}"]
        return SelfCheck("self-check of echo", {"records": f"{len(records)}", "largest |dP|": f"{worst:.1e}"}, problems)

    def install(self, options: CaptureOptions) -> EchoInstallation:
        """Patch the engine now if it is imported, else when it is; a second call changes nothing."""
        _installation.options = options
        if not _installation.wanted:
            _installation.wanted = True
            # wrapt calls at once for a module that is imported; a left-over hook finds `wanted` unset or the
            # patch in place, and does nothing
            wrapt.register_post_import_hook(_installation.patch, ENGINE)
        return _installation


class EchoInstallation:
    """The patch on the engine."""

    def __init__(self) -> None:
        self.wanted = False
        self.options = CaptureOptions()  # of the process; what each listener wants is in its session
        self._patches = Patches()

    @property
    def active(self) -> bool:
        """Whether the engine is imported and patched."""
        return bool(self._patches.names())

    def describe(self) -> dict[str, str]:
        """Hook point -> state."""
        return {f"{ENGINE}.attend": "patched" if self.active else "waits for the import"}

    def uninstall(self) -> None:
        """Undo the patch."""
        self.wanted = False
        self._patches.undo()

    def patch(self, engine: ModuleType) -> None:
        """Wrap ``attend``. Raises UnsupportedError where the engine has none."""
        if not self.wanted or self.active:
            return
        if not hasattr(engine, "attend"):
            raise UnsupportedError(f"echoengine {engine.__version__}: attend() was not found; install echoengine 0.1")
        self._patches.set(engine, "attend", _observing(engine.attend, engine.SCALE))


_installation = EchoInstallation()


def _observing(attend: Any, scale: float) -> Any:
    @wraps(attend)
    def observed(request: str, step: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        for session in sessions():
            if wants_row(session.options, step):
                try:
                    _capture(session, request, step, q, k, scale)
                except Exception as error:
                    session.refuse(error, 1)
        return attend(request, step, q, k)

    return observed


def _capture(session: Session, request: str, step: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
    import torch

    from attnhook.plugins import PagedKeys

    position = k.shape[1] - 1
    row = Row(request_id=request, choice=0, position=position, decode_step=step, source=0)
    capture = StepCapture([row], resolve_layers(session.options.layers, [0]), session.options, model="echo")
    capture.add(
        0,
        q[None],
        PagedKeys.from_dense(k[None]),
        row_slot=torch.tensor([position], dtype=torch.int32),
        shift=torch.zeros(1, dtype=torch.int32),
        scale=scale,
    )
    session.deliver(capture.records(session.drop))
