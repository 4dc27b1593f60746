"""Keys for one server never follow a redirect to another: ``run --url``, ``verify --url``, ``probe --url``."""

from __future__ import annotations

import pytest

from attnhook.client.client import Client
from attnhook.errors import ServerError
from attnhook.probing.targets import ServerTarget
from attnhook.verify import server as servercheck
from tests.collector.test_monitor import serving

MODELS = b'{"data": [{"id": "m"}]}'


def ask(url: str) -> None:
    Client(url, api_key="secret", attention_key="secret").post("/v1/completions", {"prompt": "x"})


def verify(url: str) -> None:
    raise ServerError(*servercheck.run(url, api_key="secret", attention_key="secret").problems)


def probe(url: str) -> None:
    ServerTarget(url, api_key="secret", attention_key="secret")


@pytest.mark.slow
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("use", [ask, verify, probe])
def test_a_key_stays_with_the_server_that_it_is_for(use, status):
    with serving(200, MODELS) as (other, asked), serving(status, Location=other + "/v1/models") as (url, first):
        with pytest.raises(ServerError, match=f"HTTP {status}"):
            use(url)
        assert first and asked == []
