"""``attnhook verify``: versions, engines, hooks, every engine's own self-check, a verdict.

`attnhook.verify.server` does it for a running server.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from attnhook.errors import AttnhookError, PluginError
from attnhook.errors import install as how_to_install
from attnhook.options import CaptureOptions
from attnhook.plugins import manager as plugins
from attnhook.plugins.contracts import Backend, SelfCheck
from attnhook.process import lifecycle
from attnhook.verify.report import Report, own_versions


def run(model: str | None = None) -> Report:
    """Collect everything; failures become ``problems``, they do not raise."""
    report = Report()
    report.sections["versions"] = own_versions()
    try:
        _check(report, model)
    except Exception as error:
        report.problems.append(_told(error))
    return report


def _check(report: Report, model: str | None) -> None:
    backends = plugins.backends()
    report.sections["engines"] = {
        name: f"{backend.version()}" if backend.available() else "not installed" for name, backend in backends.items()
    }
    report.sections["sinks"] = {f"{scheme}:": sink.__module__ for scheme, sink in plugins.sink_classes().items()}
    third_party = sorted(name for name, _ in plugins.manager().list_name_plugin() if name not in plugins.BUILT_INS)
    report.sections["plugins"] = dict.fromkeys(third_party, "loaded") or {"none": ""}
    hooks = report.sections["hooks"] = {"installed before this check": "yes" if lifecycle.installed() else "no"}
    able = {name: one for name, one in backends.items() if isinstance(one, _ChecksItself) and one.available()}
    if not able:
        raise PluginError(f"no engine that can check itself is installed here: {how_to_install('transformers')}")
    for name, backend in able.items():
        _self_check(report, f"{name}: " if len(able) > 1 else "", backend, model)
    # the engines that were checked are imported by now
    with lifecycle.hooks(CaptureOptions.resolve(plugins=plugins.variables)):
        for name, installation in lifecycle.installed().items():
            hooks.update({f"{name}: {hook}": state for hook, state in installation.describe().items()})


@runtime_checkable
class _ChecksItself(Backend, Protocol):
    """A backend with that part of the contract, which is optional."""

    def self_check(self, model: str | None) -> object: ...


def _self_check(report: Report, whose: str, backend: _ChecksItself, model: str | None) -> None:
    """One backend's own check; what goes wrong in it keeps no other from being made."""
    try:
        result = backend.self_check(model)
        if not isinstance(result, SelfCheck):
            raise PluginError(
                f"its self_check gave {result!r}, which is no attnhook.plugins.SelfCheck: mend the plugin"
            )
    except Exception as error:
        report.problems.append(f"{whose}{_told(error)}")
        return
    title = f"{whose}{result.title}" if result.title in report.sections else result.title
    report.sections[title] = dict(result.found)
    report.problems += [f"{whose}{problem}" for problem in result.problems]


def _told(error: Exception) -> str:
    # what is no error of ours is a bug of ours or of the engine, which this command is there to report
    if isinstance(error, AttnhookError):
        return str(error)
    return f"the check broke off: {type(error).__name__}: {error}"
