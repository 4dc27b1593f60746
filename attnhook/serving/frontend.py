"""A server's front end: who may ask for what, what it may come to, and what the server says of itself.

An engine's routes hand a request's fields to `FrontEnd.carry`. What is asked for in any other way is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from attnhook.errors import OptionError
from attnhook.options import (
    REQUEST_FIELDS,
    RequestOptions,
    check_heads,
    check_reach,
    check_rows,
    resolve_choice,
)
from attnhook.serving.budget import check_key_mass, check_repeating, count_groups, count_heads, count_layers, measure
from attnhook.serving.capabilities import attention_layers, capabilities
from attnhook.serving.gate import Gate, Place, leave_with_the_reply
from attnhook.serving.policy import Policy
from attnhook.serving.refusal import Refusal
from attnhook.serving.wire import ASK, asked


@dataclass(frozen=True)
class ServedModel:
    """What a front end knows of the model that it serves; None where only the workers know."""

    name: str
    layers: Sequence[int] | None = None  # numbers of the attention layers; empty: the model has none
    heads: int | None = None  # query heads
    dtype: str | None = None  # such as "bfloat16"
    device: str | None = None  # such as "cuda"
    generates: bool = True  # false: it makes embeddings, so there are no rows
    config: Any = None  # Hugging Face's, of the text model: how many layers and kv heads a reply is measured with

    @classmethod
    def of(cls, name: str, config: Any, *, dtype: Any = None, **known: Any) -> ServedModel:
        """From a text model's Hugging Face configuration and torch's dtype; ``known`` wins over what it tells."""
        told = {"layers": attention_layers(config), "heads": getattr(config, "num_attention_heads", None)}
        text = None if dtype is None else str(dtype).removeprefix("torch.")
        return cls(name, config=config, dtype=text, **{**told, **known})


class Admitted(NamedTuple):
    """A request that may capture: its options as this server serves them, for each of its prompts or once for all."""

    options: list[RequestOptions | None]
    place: Place | None  # None: none of its prompts asks


class FrontEnd:
    """The front end of one server process.

    Parameters
    ----------
    engine
        Its name.
    version
        Tells the engine's version, or None.
    model
        Tells what is known of the model by now.
    carrying
        Paths of the routes whose replies have choices that records fit into.
    key_mass
        Whether the adapter gives the sums of keys back, with `Gathered`; else who asks for them is refused.
    """

    def __init__(
        self,
        engine: str,
        version: Callable[[], str | None],
        model: Callable[[], ServedModel],
        carrying: Collection[str],
        *,
        key_mass: bool = False,
    ) -> None:
        self.engine, self.version, self.model = engine, version, model
        self.gate = Gate()
        self._key_mass = key_mass
        self._carrying = frozenset(carrying)

    @cached_property
    def policy(self) -> Policy:
        """The guard rails; read when the first request comes, after the server's flags have been."""
        return Policy.from_environ()

    def carrying(self) -> Collection[str]:
        """Paths of the routes that carry records; none where the model generates no tokens."""
        return self._carrying if self.model().generates else ()

    def options(self, fields: Mapping[str, Any] | None) -> RequestOptions | None:
        """What fields ask for, checked against the model; None where they do not ask. Raises OptionError."""
        if not fields or ASK not in fields:
            return None
        options = asked(fields)
        if options is not None:
            self._check_model(options)
        return options

    def _check_model(self, options: RequestOptions) -> None:
        if options.key_mass and not self._key_mass:
            name = REQUEST_FIELDS["key_mass"]
            raise OptionError(
                name, f"{name}={options.key_mass!r}: the plugin of {self.engine} tells no key mass: drop it"
            )
        model = self.model()
        if not model.generates:
            raise OptionError(
                ASK, f"{ASK}=true: {model.name} generates no tokens, so there is nothing to capture: drop it"
            )
        if model.layers is not None:
            if not model.layers:
                raise OptionError(
                    ASK, f"{ASK}=true: {model.name} has no attention layer, so there is nothing to capture: drop it"
                )
            names = REQUEST_FIELDS["layers"], REQUEST_FIELDS["heads"]
            resolve_choice(options.layers, options.heads, list(model.layers), names)
        if model.heads:
            check_heads(options.heads, model.heads, REQUEST_FIELDS["heads"])

    def admit(self, prompts: Sequence[Mapping[str, Any]], headers: Mapping[str, str]) -> Admitted:
        """The options that a client's fields ask for, one set of fields or one for each prompt, and a place.

        Raises OptionError for what is wrong with them, and Refusal for who or what is not served.
        """
        if any(fields.get(ASK) for fields in prompts):  # who may not ask learns nothing from how fields are checked
            self.policy.admit(headers)
        found = [self.options(fields) for fields in prompts]
        options = [None if one is None else self.policy.apply(one) for one in found]
        return Admitted(options, self.gate.place(self.policy.max_concurrent) if any(options) else None)

    async def carry(
        self,
        fields: Mapping[str, Any],
        headers: Mapping[str, str],
        run: Callable[[RequestOptions | None, Place | None], Awaitable[tuple[Any, bool]]],
        refuse: Callable[[OptionError | Refusal], Any],
    ) -> Any:
        """The reply of one route to a body whose fields name `ASK`.

        ``run`` answers it, with the options where it asks and None where it does not, and tells whether its reply is a
        stream: then the stream gives the place back (`LeavingStream`). ``refuse`` makes a reply of an error.
        """
        place, streams = None, False
        try:
            (options,), place = self.admit([fields], headers)
            reply, streams = await run(options, place)
            return reply
        except (OptionError, Refusal) as error:
            return refuse(error)
        finally:
            if place is not None and not streams:
                leave_with_the_reply(place)

    def everything(self) -> RequestOptions | None:
        """What is captured of requests that do not ask, for the sinks only; None: nothing (ATTNHOOK_CAPTURE_ALL)."""
        model = self.model()
        if not self.policy.capture_all or not model.generates or (model.layers is not None and not model.layers):
            return None
        return RequestOptions.resolve(arguments={"mode": "fingerprint"})

    def measure(
        self,
        options: RequestOptions,
        place: Place | None,
        prompt: int,
        new: int,
        choices: int,
        *,
        repeats: bool = False,
    ) -> None:
        """Refuse a prompt of so many tokens, with at most ``new`` more, before any work is done.

        ``place`` is that of a client's request, None of who calls the engine in Python; with ``repeats`` each event of
        its stream holds all rows so far. Raises OptionError for what reaches beyond the request, tells more than this
        server allows or comes to more bytes, and Refusal where there is no room for it now.
        """
        check_reach(options.spans, prompt + new, REQUEST_FIELDS["spans"])
        check_rows(options.rows, prompt, REQUEST_FIELDS["rows"])
        if place is None:
            return
        model = self.model()
        layers, heads = count_layers(options, model.layers, model.config), count_heads(model.heads, model.config)
        if options.key_mass:
            groups = count_groups(options, heads, model.config)
            check_key_mass(layers * groups * choices, prompt + new, self.policy.key_mass_bytes)
        if repeats:
            check_repeating(options, layers, prompt, new, choices, self.policy.max_bytes, heads)
        measure(self.policy, place, options, layers, prompt, new, choices, heads)

    async def capabilities(self) -> dict[str, Any]:
        """What ``GET /v1/attention/capabilities`` answers."""
        model = self.model()
        layers = None if model.layers is None else list(model.layers)
        return capabilities(
            self.engine, self.version(), model.name, layers, model.heads, self.policy,
            dtype=model.dtype, device=model.device, generates=model.generates, key_mass=self._key_mass,
        )  # fmt: skip
