"""One plain sentence on what sets a fingerprint apart from those that a map was fitted on.

Which numbers go together is read off the fitted principal components; nothing here says what a pattern should mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnhook.record import fingerprint as fp
from attnhook.record.zones import classify

if TYPE_CHECKING:
    from pathlib import Path

    from attnhook.analysis.manifold.fit import Components

_ORDINARY = 1.0  # standard deviations along every component within which nothing stands out
_NAMED = 3  # numbers that the sentence names, at most
_PART = 0.25  # of the largest one's part in the component's score that a number needs to be named
_HISTOGRAM_START: int = fp.HISTOGRAM.start


def explain(fingerprint: Sequence[float] | np.ndarray, artifact: Path | str) -> str:
    """What sets a fingerprint float [20] apart, by the map in the folder ``artifact``.

    Raises RecordError for a fingerprint that is none, and what `attnhook.analysis.manifold.artifact.load` raises.
    """
    from pathlib import Path

    from attnhook.analysis.manifold.artifact import load

    return sentence(load(Path(artifact))[0].components, fingerprint)


def sentence(components: Components, fingerprint: Sequence[float] | np.ndarray, *, what: str = "it") -> str:
    """The sentence, for fitted components.

    Along the component on which the fingerprint is furthest from the mean, in standard deviations, a number counts
    by its loading times its own distance from its mean; the largest are named, with their value and the mean.

    Raises RecordError for a fingerprint that is none.
    """
    row = np.asarray(fingerprint, np.float64)
    classify(row)  # refuses what is none
    own = components.standardise(row[None])[0]
    scores = (components.directions @ own) / np.sqrt(np.maximum(components.variance, 1e-12))
    first = int(np.abs(scores).argmax())
    where = f"component {first + 1} ({components.share[first]:.0%} of all variation)"
    if abs(scores[first]) < _ORDINARY:
        return (
            f"Nothing stands out: {what} is within {abs(scores[first]):.1f} standard deviations of the mean along "
            f"each of the {len(scores)} components, furthest along {where}."
        )
    parts = components.directions[first] * own * np.sign(scores[first])
    largest = [int(i) for i in np.argsort(-parts, kind="stable")[:_NAMED] if parts[i] >= _PART * parts.max()]
    named = [_told(i, row[i], components.center[i]) for i in largest]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    subject = what[0].upper() + what[1:]
    return (
        f"{subject} has {listed}; that puts {what} {abs(scores[first]):.1f} standard deviations from the mean along "
        f"{where}."
    )


def _told(index: int, value: float, mean: float) -> str:
    more = value > mean
    if index == fp.ENTROPY:
        return f"{'higher' if more else 'lower'} entropy ({value:.2f}, mean {mean:.2f})"
    return f"{'more' if more else 'less'} {_noun(index)} ({_share(value)}, mean {_share(mean)})"


def _noun(index: int) -> str:
    if index >= _HISTOGRAM_START:
        return f"attention {fp.bin_label(index - _HISTOGRAM_START)} tokens back"
    return {fp.LOCAL: "local attention", fp.MID: "mid-range attention", fp.LONG: "long-range attention"}[index]


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"
