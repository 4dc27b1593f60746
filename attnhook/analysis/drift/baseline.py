"""What a drift monitor compares with: fitted from requests' means, calibrated by resampling, kept in one file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from attnhook import __version__
from attnhook.analysis.drift.calibration import null_maxima, whiten
from attnhook.errors import AttnhookError, OptionError, PluginError, RecordError
from attnhook.record import fingerprint as fp
from attnhook.system import untrusted

FORMAT: Final = "attnhook-drift-baseline"
FORMAT_VERSION: Final = 1
MIN_REQUESTS: Final = 100
WARNING_FACTOR: Final = 5  # a warning is so many times as frequent as an alarm, at most one run in two
_KEPT_VARIANCE = 0.999
_CONSTANT = 1e-6  # standard deviation of a number that does not vary
_MAX_COMPONENTS = 8
_MAX_BYTES = 16 * 2**20
_ARRAYS = {"mean": (fp.SIZE,), "spread": (fp.SIZE,), "whitening": (None, fp.SIZE), "thresholds": (2,)}


@dataclass(frozen=True)
class DriftSettings:
    """How a baseline is fitted."""

    window: int = 50  # requests that are compared with the baseline at a time
    false_alarm_rate: float = 0.01  # probability of an alarm or more in `horizon` requests without drift
    horizon: int = 1000  # requests, counted from the first full window
    block: int = 1  # consecutive requests that are resampled together: more than 1 where neighbours are alike
    simulations: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "window": (2, 10_000),
            "horizon": (1, 100_000),
            "block": (1, 1000),
            "simulations": (100, 100_000),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise OptionError(name, f"{name}={value!r} must be a whole number from {low} to {high}")
        if not 0.0001 <= self.false_alarm_rate <= 0.5:
            raise OptionError(
                "false_alarm_rate", f"false_alarm_rate={self.false_alarm_rate!r} must be from 0.0001 to 0.5"
            )
        if self.simulations * self.false_alarm_rate < 20:
            raise OptionError(
                "simulations",
                f"simulations={self.simulations} are too few for a false-alarm rate of {self.false_alarm_rate:g}: "
                f"give at least {int(np.ceil(20 / self.false_alarm_rate))}",
            )


@dataclass(frozen=True, eq=False)
class Baseline:
    """A fitted baseline; d components. Arrays are not to be written to."""

    settings: DriftSettings
    model: str  # whose rows it was fitted on; empty: any
    rows: str  # all, prompt or generated
    requests: int  # that it was fitted on
    mean: np.ndarray  # float64 [20] of the requests' means
    spread: np.ndarray  # float64 [20] standard deviation over requests, 0 where constant
    whitening: np.ndarray  # float64 [d, 20]: (mean - baseline) @ whitening.T has variance 1 over requests
    warning: float  # statistic beyond which it warns
    alarm: float
    autocorrelation: float  # the largest between neighbouring requests, over the components
    layers: tuple[int, ...] = ()  # that its rows are means over; empty: several sets, or not told
    without_sink: bool = False  # its rows are taken without the attention sink, position 0

    def statistic(self, means: np.ndarray, window: int) -> np.ndarray:
        """Squared Mahalanobis distance, [...], of means [..., 20] over ``window`` requests each."""
        apart = (np.asarray(means, np.float64) - self.mean) @ self.whitening.T
        squares: np.ndarray = window * (apart**2).sum(axis=-1)
        return squares


def fit(
    means: np.ndarray,
    *,
    model: str = "",
    rows: str = "all",
    layers: tuple[int, ...] = (),
    without_sink: bool = False,
    settings: DriftSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Baseline:
    """Fit a baseline to the means of requests' fingerprints, float [R, 20], in the order in which they came.

    ``model``, ``rows``, ``layers`` and ``without_sink`` note what the fingerprints are of.
    Numbers that are constant take no part in the statistic. Thresholds hold the stated rate including the error of
    the baseline itself: each simulated run draws a baseline of its own and then ``horizon`` requests, both from the
    given ones (docs/drift.md).

    Raises
    ------
    OptionError
        Fewer requests than `MIN_REQUESTS`, four windows, or 20 blocks.
    RecordError
        Wrong shape, NaN, or all requests are the same.
    """
    settings = settings or DriftSettings()
    means = np.asarray(means, np.float64)
    if means.ndim != 2 or means.shape[1] != fp.SIZE:
        raise RecordError(f"means of fingerprints have shape [R, {fp.SIZE}], got {list(means.shape)}")
    if not np.isfinite(means).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(means))[0])
        raise RecordError(f"request {row}: {fp.NAMES[column]} is {means[row, column]}; leave damaged requests out")
    needed = max(MIN_REQUESTS, 4 * settings.window, 20 * settings.block)
    if len(means) < needed:
        raise OptionError(
            "window",
            f"{len(means)} requests are too few for a baseline with window {settings.window} and block "
            f"{settings.block}: at least {needed} are needed; store more, or choose a smaller window",
        )
    mean, spread = means.mean(axis=0), means.std(axis=0, ddof=1)
    spread = np.where(spread > _CONSTANT, spread, 0)
    if not spread.any():
        raise RecordError(f"all {len(means)} requests have the same mean fingerprint; check what was stored")
    varying = (means - mean) * (spread > 0)
    covariance = varying.T @ varying / (len(means) - 1)
    kept = _components(covariance, spread, most=max(1, min(_MAX_COMPONENTS, len(means) // 20)))
    whitening = whiten(covariance, kept)
    components = varying @ whitening.T
    maxima = null_maxima(
        varying,
        components=kept,
        window=settings.window,
        horizon=settings.horizon,
        block=settings.block,
        runs=settings.simulations,
        seed=settings.seed,
        progress=progress,
    )
    rate = settings.false_alarm_rate
    warning, alarm = np.quantile(maxima, [1 - min(WARNING_FACTOR * rate, 0.5), 1 - rate], method="higher").tolist()
    neighbours = (components[1:] * components[:-1]).mean(axis=0) / (components**2).mean(axis=0)
    return Baseline(
        settings=settings,
        model=model,
        rows=rows,
        requests=len(means),
        mean=mean,
        spread=spread,
        whitening=whitening,
        warning=warning,
        alarm=max(alarm, warning),
        autocorrelation=float(neighbours[np.abs(neighbours).argmax()]),
        layers=layers,
        without_sink=without_sink,
    )


def _components(covariance: np.ndarray, spread: np.ndarray, *, most: int) -> int:
    """How many directions hold nearly all variance of the numbers that vary, ``most`` at most."""
    own = spread > 0
    correlations = covariance[np.ix_(own, own)] / spread[own][:, None] / spread[own]
    variance = np.linalg.eigvalsh(correlations)[::-1]
    share = np.cumsum(variance) / variance.sum()
    return min(int(np.searchsorted(share, _KEPT_VARIANCE)) + 1, int((variance > 1e-6 * variance[0]).sum()), most)


def save(baseline: Baseline, path: Path) -> None:
    """Write the baseline to a new file, whole or not at all.

    Raises OptionError where the file is there, AttnhookError where the file system refuses.
    """
    check_new(path)
    arrays = {
        "mean": baseline.mean,
        "spread": baseline.spread,
        "whitening": baseline.whitening,
        "thresholds": np.array([baseline.warning, baseline.alarm]),
    }
    arrays = {name: np.ascontiguousarray(array, "<f8") for name, array in arrays.items()}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint_schema": fp.SCHEMA_VERSION,
        "attnhook": __version__,
        "settings": asdict(baseline.settings),
        "model": baseline.model,
        "rows": baseline.rows,
        "requests": baseline.requests,
        "autocorrelation": baseline.autocorrelation,
        "layers": list(baseline.layers),
        "without_sink": baseline.without_sink,
        "arrays": {name: {"shape": array.shape, "sha256": _digest(array)} for name, array in arrays.items()},
    }
    text = json.dumps(manifest, indent=1).encode()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        manifest=np.frombuffer(text, np.uint8),
        manifest_sha256=np.frombuffer(hashlib.sha256(text).digest(), np.uint8),
        **arrays,  # type: ignore[arg-type]
    )
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(scratch, "xb") as file:
                file.write(buffer.getvalue())
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise AttnhookError(
            f"the baseline cannot be written to {path}: {error.strerror or error}; name a file on a disk with "
            f"{len(buffer.getvalue()):,} free bytes that you may write to"
        ) from error


def check_new(path: Path) -> None:
    """Raise OptionError unless ``path`` can be made: nothing is overwritten."""
    if path.exists():
        raise OptionError("out", f"--out {path} is there already and nothing is overwritten: name a new file")
    if not path.parent.is_dir():
        raise OptionError("out", f"--out {path}: the folder {path.parent} does not exist: create it first")


def load(path: Path) -> Baseline:
    """Read a baseline; nothing in the file can run code.

    Raises PluginError where it is no baseline, is damaged or was changed, or is of a newer format.
    """
    arrays, manifest = _read(path)
    version, schema = manifest.get("format_version"), manifest.get("fingerprint_schema")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION or schema != fp.SCHEMA_VERSION:
        raise PluginError(
            f"baseline {path} has format version {version!r} and fingerprint schema {schema!r}; this attnhook reads "
            f"{FORMAT_VERSION} and {fp.SCHEMA_VERSION}: upgrade attnhook, or fit it again"
        )
    try:
        for name, shape in _ARRAYS.items():
            array, noted = arrays[name], manifest["arrays"][name]
            fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=True))
            if array.dtype != np.dtype("<f8") or not fits or noted["sha256"] != _digest(array):
                raise ValueError(f"{name} is not what its manifest says")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a number that is not finite")
        known = {field.name for field in fields(DriftSettings)}
        settings = DriftSettings(**{name: manifest["settings"][name] for name in known})
        warning, alarm = arrays["thresholds"].tolist()
        return Baseline(
            settings=settings,
            model=str(manifest["model"]),
            rows=str(manifest["rows"]),
            requests=int(manifest["requests"]),
            mean=arrays["mean"],
            spread=arrays["spread"],
            whitening=arrays["whitening"],
            warning=warning,
            alarm=alarm,
            autocorrelation=float(manifest["autocorrelation"]),
            layers=tuple(int(layer) for layer in manifest.get("layers", ())),  # files before 0.1.0 have none
            without_sink=bool(manifest.get("without_sink", False)),  # nor those before 0.2
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        found = untrusted.arrays(path, _MAX_BYTES)  # more than any baseline
        arrays = {name: found[name] for name in ("manifest", "manifest_sha256", *_ARRAYS)}
        text = arrays.pop("manifest").tobytes()
        if hashlib.sha256(text).digest() != arrays.pop("manifest_sha256").tobytes():
            raise ValueError("its manifest does not have the digest that is stored beside it")
        manifest = untrusted.loads(text)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError("its manifest is that of something else")
    except OSError as error:
        reason = error.strerror or error
        raise PluginError(f"baseline {path} cannot be read: {reason}; name a file that drift fit made") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return arrays, manifest


def _damaged(path: Path, error: Exception) -> PluginError:
    return PluginError(f"{path} is no baseline, is damaged or was changed: {error}; fit it again")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
