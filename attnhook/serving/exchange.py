"""What the workers of one model tell each other after a pass, and what its requests get of it.

Every tensor-parallel rank says whether it captured the same rows and what went wrong; the first rank of each pipeline
stage hands its rows on; the last stage's first rank puts the layers together and answers.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

from attnhook.errors import UnsupportedError
from attnhook.record.token_record import TokenRecord, join_layers
from attnhook.serving.key_mass import Piece, join
from attnhook.serving.plan import Plan
from attnhook.serving.reduction import Key, Reduction
from attnhook.serving.wire import Share, worse

# rows, errors, checks and key masses of one stage
_Said = tuple[dict[Key, bytes], dict[str, str], dict[str, float], dict[str, list[Piece]]]


def answers(reduction: Reduction) -> dict[str, dict[str, Any]]:
    """The packed `Share` of every request of a pass that has ended; empty on ranks that do not answer.

    All workers of a model call it for the same passes.
    """
    plan = reduction.plan
    ranks = plan.model.ranks
    try:
        said = _said(plan, reduction)
    except UnsupportedError as error:  # the ranks have lost each other
        plan.fail(error, plan.sampled)
        said = [({}, plan.errors, {}, {})] if ranks.answers else []
    return _shares(plan, said) if said else {}


def _said(plan: Plan, reduction: Reduction) -> list[_Said]:
    """What every stage has to say, on the rank that answers; empty on the others."""
    ranks = plan.model.ranks
    ready = reduction.prepare()
    rows: dict[Key, bytes] = {}
    agreed = ranks.size == 1 or ranks.agree(
        crc32(repr([(one.group.options, len(one.group.rows)) for one in ready]).encode())
    )
    for one in ready if agreed else ():
        try:
            rows.update(reduction.reduce(one))
        except Exception as error:
            plan.fail(error, one.group.requests)
    errors: dict[str, str] = {}
    checks: dict[str, float] = {}
    for theirs, worst in ranks.collect((plan.errors, reduction.checks)):
        errors |= theirs  # another rank knows the cause of the NaN that it has added
        for request, difference in worst.items():
            checks[request] = worse(checks.get(request), difference)
    if not agreed:
        why = "the tensor-parallel ranks did not capture the same rows of this pass; their logs may say why"
        errors = {**dict.fromkeys(plan.sampled, why), **errors}
    return [] if ranks.rank else ranks.join((rows, errors, checks, reduction.masses))


def _shares(plan: Plan, said: list[_Said]) -> dict[str, dict[str, Any]]:
    """What goes to the requests, from what every stage has of them."""
    shares = {request: Share(reply=plan.reply.get(request, True)) for request in plan.sampled}
    rows: dict[Key, bytes] = {}
    for group in plan.groups.values():
        for row in group.rows:
            key = row.request_id, row.position
            parts = [found[key] for found, *_ in said if key in found]
            if len(said) > 1:
                parts = _joined(parts, group.layers)
            if parts:
                rows[key] = parts[0]
                if row.decode_step is None:
                    shares[row.request_id].prompt.append(parts[0])
    layers = {request: group.layers for group in plan.groups.values() for request in group.requests}
    for request, share in shares.items():
        if masses := [own[request] for *_, own in said if request in own]:
            share.pieces = join(masses, layers[request])
        # one place per token that may be sampled; the empty ones were not wanted
        share.generated = [rows.get((request, position), b"") for position in plan.sampled[request]]
        for _, errors, checks, _ in said:
            share.error = share.error or errors.get(request)
            share.check = worse(share.check, checks.get(request))
    return {request: share.pack() for request, share in shares.items()}


def _joined(parts: list[bytes], layers: tuple[int, ...]) -> list[bytes]:
    """The row of all layers from its parts; nothing where a stage has dropped it."""
    records = [TokenRecord.from_bytes(part) for part in parts]
    if sorted(layer for record in records for layer in record.layers) != list(layers):
        return []
    return [join_layers(records).to_bytes()]
