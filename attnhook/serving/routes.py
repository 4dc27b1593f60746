"""Around a server's routes: records go into the replies of those that carry them; asking on another is refused."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from attnhook.serving.pieces import Pieces, pieces
from attnhook.serving.wire import ASK, FIELDS, KEY, foreign

_Scope = dict[str, Any]
_Receive = Callable[[], Awaitable[dict[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


class RouteGuard:
    """ASGI middleware: records in the place of their marks (`Pieces`), HTTP 400 where a route cannot carry any.

    Parameters
    ----------
    app
        The application behind it.
    carrying
        Tells the paths of the routes whose replies carry records now; none where the model generates no tokens.
    """

    def __init__(self, app: Any, carrying: Callable[[], Collection[str]]) -> None:
        self.app, self.carrying = app, carrying

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Carry records, or look at the body of a request to another route before the route does."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        if path_of(scope) in self.carrying():
            await self._carry(scope, receive, send)
            return
        messages = []
        while True:  # a route reads its body whole, too
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        body = b"".join(message.get("body", b"") for message in messages)
        name = asks(body)
        if name is not None:
            await _refuse(name, path_of(scope), sorted(self.carrying()), send)
            return
        left = iter(messages)

        async def again() -> dict[str, Any]:
            message = next(left, None)
            return await receive() if message is None else message

        await self.app(scope, again, send)

    async def _carry(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        mine = Pieces()

        async def sending(message: dict[str, Any]) -> None:
            if not mine:
                await send(message)
            elif message["type"] == "http.response.start":  # marks are in the body already, whose length will change
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
                await send({**message, "headers": headers})
            elif message["type"] == "http.response.body":
                async for part in mine.expand(message.get("body", b"")):
                    if part:
                        await send({**message, "body": part, "more_body": True})
                if not message.get("more_body"):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await send(message)

        token = pieces.set(mine)
        try:
            await self.app(scope, receive, sending)
        finally:
            pieces.reset(token)
            mine.end()


# where engines take a client's own parameters
_PARAMETERS = ("sampling_params", "vllm_xargs", "extra_args", "custom_params")
_NAMES = tuple(name.encode() for name in (*FIELDS, KEY))


def asks(body: bytes) -> str | None:
    """The name by which a body asks for attention: `ASK` among its fields, or any of ours among its parameters."""
    written_otherwise = b"\\u" in body or b"\0" in body  # escaped, or two bytes a letter
    if not written_otherwise and not any(name in body for name in _NAMES):
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        # a form, whose fields are named in quotes; anything else the route refuses by itself
        return ASK if f'name="{ASK}"'.encode() in body else None
    if not isinstance(fields, dict):
        return None
    return ASK if fields.get(ASK) not in (None, False) else _hidden(fields)


def _hidden(fields: dict[str, Any], depth: int = 3) -> str | None:
    for place in _PARAMETERS:
        inner = fields.get(place)
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, dict):
                found = foreign(one) or (_hidden(one, depth - 1) if depth else None)
                if found:
                    return found
    return None


def path_of(scope: Mapping[str, Any]) -> str:
    """A request's path as the application's routes have it, without the prefix of a proxy."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return (path.removeprefix(root) if root else path).rstrip("/")


async def _refuse(name: str, path: str, carrying: list[str], send: _Send) -> None:
    remedy = (
        f"ask on {', '.join(carrying)}, or drop the field" if carrying else "the model generates no tokens: drop it"
    )
    message = f"{name}: {path[:200]} cannot carry attention; {remedy}"
    error = {"message": message, "type": "BadRequestError", "param": name, "code": 400}
    data = json.dumps({"object": "error", "message": message, "error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": data})
