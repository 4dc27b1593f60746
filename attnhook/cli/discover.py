"""``attnhook discover``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from attnhook.analysis.manifold.settings import Settings
from attnhook.cli import options as cli_options
from attnhook.cli import stores as cli_stores
from attnhook.cli.progress import Work, progress
from attnhook.errors import OptionError, require

_DEFAULTS = Settings()
#: About how long a stage takes in comparison, so that the bar and its estimate move evenly.
_WORK = {"read": 3, "components": 1, "sample": 1, "embed": 40, "cluster": 2, "assign": 4, "measure": 45, "picture": 8}


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("discover")(discover)


def discover(
    store: cli_options.Store,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder for what is found.")],
    sample: Annotated[
        int, typer.Option(metavar="N", help="Fingerprints that the map is fitted on, at most.")
    ] = _DEFAULTS.sample,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same files.")] = _DEFAULTS.seed,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only the records of this model.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="A row for each stored layer (all), or these: 0,14. Default: a record's mean over its own.",
        ),
    ] = None,
    without_sink: Annotated[
        str | None,
        typer.Option(
            metavar="SPAN",
            help="Of a store before 0.2: the span that tells the mass of position 0; attnhook probe's is sink.",
        ),
    ] = None,
    with_sink: Annotated[
        bool,
        typer.Option("--with-sink", help="Leave position 0 in. By default it is taken out where its mass is told."),
    ] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Put several models, or means over different layers, on one map.")
    ] = False,
    neighbours: Annotated[
        int, typer.Option(metavar="N", help="Neighbours of a point on the map.")
    ] = _DEFAULTS.neighbours,
    min_distance: Annotated[
        float, typer.Option(metavar="NUMBER", help="Least distance of points on the map.")
    ] = _DEFAULTS.min_distance,
    epochs: Annotated[int, typer.Option(metavar="N", help="Rounds of the map's layout.")] = _DEFAULTS.epochs,
    min_cluster_share: Annotated[
        float, typer.Option(metavar="NUMBER", help="Smallest cluster, share of the sample.")
    ] = _DEFAULTS.min_cluster_share,
    variance: Annotated[
        float, typer.Option(metavar="NUMBER", help="Variance that the principal components kept explain.")
    ] = _DEFAULTS.variance,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N", help="Refits over seeds, and as many over bootstraps, that stability is measured with."
        ),
    ] = _DEFAULTS.repeats,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was ended early.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is in --out, once all is made; discard an unfinished run.")
    ] = False,
    register_run: Annotated[
        bool, typer.Option("--register", help="Note the run and its clusters in the store too (sqlite: only).")
    ] = False,
) -> None:
    """Find the kinds of attention in a store: a map, its clusters, and how far they can be believed."""
    settings = Settings(
        sample=sample,
        seed=seed,
        model=model,
        layers=_layers(layers),
        with_sink=with_sink,
        without_sink=without_sink,
        allow_mixed=allow_mixed,
        variance=variance,
        neighbours=neighbours,
        min_distance=min_distance,
        epochs=epochs,
        min_cluster_share=min_cluster_share,
        repeats=repeats,
    )
    require("attnhook discover", "analysis", "pyarrow", "sklearn", "umap", "hdbscan", "matplotlib")
    store = cli_stores.readable(store)
    if register_run and not store.startswith("sqlite:"):
        raise OptionError("register", f"--register writes to sqlite: stores only, not to {store}: drop it")
    from attnhook.analysis.manifold.run import discover as run

    bar = _Bar()
    try:
        with progress("reading", sum(_WORK.values())) as bar.work:
            found = run(store, out, settings, resume=resume, force=force, progress=bar.progress)
    except KeyboardInterrupt:
        _tell_how_to_go_on(bar.stage, out)
        raise
    if register_run:
        _note(store, found.manifest)
    _show(found.manifest, Console())
    if not (found.manifest["without_sink"] or with_sink):
        cli_stores.tell_sink_is_in("map", store)
    Console().print(f"wrote {out}", soft_wrap=True, markup=False, highlight=False)


def _tell_how_to_go_on(stage: str, out: Path) -> None:
    again = shlex.join(["attnhook", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    Console(stderr=True).print(
        f"stopped while at stage {stage}; what is finished is in {out}.partial. Go on with:\n{again}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _layers(text: str | None) -> tuple[int, ...] | str | None:
    if text is None or text == "all":
        return text
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise OptionError("layers", f"--layers {text!r} must be all, or stored layers such as 0,14") from None


class _Bar:
    """How far a run is, by the work of its stages."""

    work: Work

    def __init__(self) -> None:
        self.stage = "read"

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move to a stage, or on in it."""
        self.stage = stage
        names = list(_WORK)
        before = sum(_WORK[name] for name in names[: names.index(stage)]) if stage in _WORK else sum(_WORK.values())
        part = _WORK.get(stage, 0) * (done / total if total else 0)
        text = f"{stage} {done:,}/{total:,}" if total > 1 else stage
        reached = before + part
        self.work.tell(reached, text=text, count=f"{reached / sum(_WORK.values()):.0%}")


def _note(store: str, manifest: dict[str, Any]) -> None:
    """Keep the run in the store's own tables."""
    import numpy as np

    from attnhook.sinks import config
    from attnhook.store import discoveries

    path, _ = config.split(store.partition(":")[2])
    clusters = [
        discoveries.Cluster(one["label"], one["size"], one["zone"], np.array(one["centroid"], np.float32))
        for one in manifest["clusters"]
    ]
    parameters = {"settings": manifest["settings"], "versions": manifest["versions"], "digest": manifest["digest"]}
    discoveries.save(path, parameters, manifest["rows"], clusters)


def _show(manifest: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("cluster", "rows", "share", "zone", "of it"):
        table.add_column(name, justify="left" if name == "zone" else "right", no_wrap=True)
    probes = any(one["pack"] for one in manifest["clusters"])
    if probes:
        table.add_column("pack", no_wrap=True)
        table.add_column("of it", justify="right", no_wrap=True)
    table.add_column("what sets it apart")
    for one in manifest["clusters"]:
        pack = [one["pack"] or "-", f"{one['pack_share']:.0%}" if one["pack"] else "-"] if probes else []
        note = one["note"].partition(";")[0].partition(":")[0].removeprefix("Its mean has ").removesuffix(".")
        table.add_row(
            str(one["label"]), f"{one['size']:,}", f"{one['share']:.1%}", one["zone"], f"{one['zone_share']:.0%}",
            *pack, note,
        )  # fmt: skip
    console.print(table)
    quality = manifest["quality"]
    stable = quality["stability"]
    told = {
        "rows": f"{manifest['rows']:,}, fitted on {manifest['sample']:,}",
        "attention sink": "left out" if manifest["without_sink"] else "left in",
        "in no cluster": f"{quality['noise']:.1%}",
        "trustworthiness": _number(quality["trustworthiness"]),
        "DBCV": _number(quality["dbcv"]),
        "silhouette": _number(quality["silhouette"]),
        "stability over seeds": "not measured" if stable is None else _number(stable["seeds_mean"]),
        "over bootstraps": "not measured" if stable is None else _number(stable["bootstraps_mean"]),
        "ARI with probe packs": _number(quality["ari_packs"]),
        "with zones": _number(quality["ari_zones"]),
        "with layers": _number(quality["ari_layers"]),
        "with the position's octave": _number(quality["ari_octaves"]),
    }
    console.print("; ".join(f"{name} {value}" for name, value in told.items()), soft_wrap=True, highlight=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
