"""``attnhook verify``: versions, engines, hooks, a self-check against eager attention, a verdict.

`servercheck` does it for a running server.
"""

from __future__ import annotations

from attnhook.errors import AttnhookError
from attnhook.plugins import manager as plugins
from attnhook.process import lifecycle
from attnhook.verify.report import Report, own_versions


def run(model: str | None = None) -> Report:
    """Collect everything; failures become ``problems``, they do not raise."""
    report = Report()
    report.sections["versions"] = own_versions()
    try:
        _engines(report)
        _self_check(report, model)
    except AttnhookError as error:
        report.problems.append(str(error))
    except Exception as error:  # a bug of ours or of the engine is what this command is there to report
        report.problems.append(f"the check broke off: {type(error).__name__}: {error}")
    return report


def _engines(report: Report) -> None:
    backends = plugins.backends()
    report.sections["engines"] = {
        name: f"{backend.version()}" if backend.available() else "not installed" for name, backend in backends.items()
    }
    report.sections["sinks"] = {f"{scheme}:": sink.__module__ for scheme, sink in plugins.sink_classes().items()}
    third_party = [name for name, _ in plugins.manager().list_name_plugin() if name not in plugins.BUILT_INS]
    report.sections["plugins"] = dict.fromkeys(third_party, "loaded") or {"none": ""}


def _self_check(report: Report, model: str | None) -> None:
    from attnhook.backends.transformers import selfcheck

    was_on = bool(lifecycle.installed())
    hooks: dict[str, str] = {}
    result = selfcheck.compare_with_eager(model)
    for name, installation in result.installations.items():
        hooks |= {f"{name}: {hook}": state for hook, state in installation.items()}
    report.sections["hooks"] = {"installed before this check": "yes" if was_on else "no", **hooks}
    report.sections["self-check against eager attention"] = {
        "model": result.model,
        "rows x layers compared": f"{result.rows} x {result.layers}",
        "largest |dP|": f"{result.worst:.1e} (allowed {selfcheck.TOLERANCE:.0e})",
        "largest |d histogram bin|": f"{result.worst_bin:.1e} (allowed {selfcheck.BIN_TOLERANCE:.0e})",
        "top-k lists equal up to ties": f"{result.same_order:.2%}",
        "answer with capture = without": "yes" if result.same_text else "NO",
    }
    if result.rows != result.expected_rows:
        report.problems.append(f"{result.rows} of {result.expected_rows} rows were captured")
    if not result.worst <= selfcheck.TOLERANCE:  # NaN is one too
        report.problems.append(f"probabilities differ from eager attention by {result.worst:.1e}")
    if not result.worst_bin <= selfcheck.BIN_TOLERANCE:
        report.problems.append(f"fingerprints differ from eager attention by {result.worst_bin:.1e}")
    if result.same_order < 1:
        report.problems.append(f"only {result.same_order:.2%} of the top-k lists equal those of eager attention")
    if not result.same_text:
        report.problems.append("the model's answer changes when capture is on")
