"""HTTP client of a llama-server that may be anything: an answer in its form, within limits of size and time, or none.

The address asked is the only one that is: no redirect is followed, which would take the key along, and no proxy from
the environment is asked about this machine.
"""

import asyncio
import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import ValidationError as PydanticError

from mode_gguf.errors import InputError, MissingResourceError, UsageError
from mode_gguf.llama_cpp.server_answers import Answer
from mode_gguf.plain_text import one_line

if TYPE_CHECKING:
    import httpx2

API_KEY: Final = "LLAMA_API_KEY"
"""The environment variable that llama-server reads its key from, too."""
BODY_SECONDS: Final = 30.0
"""For the rest of an answer that has begun, besides a second per megabyte that it may have."""
_HEALTH_SECONDS: Final = 5.0
_ERROR_BYTES: Final = 4096
_SHOWN: Final = 200

AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Limits of an answer: seconds until it is there as a whole, and bytes."""

    seconds: float
    n_bytes: int


class ServerClient:
    """A client of the llama-server at `url`, such as http://127.0.0.1:8080.

    Raises:
        UsageError: the address is none, or holds a password.
        InputError: the key in the environment cannot be sent.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._trusts_environment = not _is_this_machine(_host(self.url))
        self._headers = {"Accept-Encoding": "identity", **_authorization()}

    def ask(
        self, path: str, form: type[AnswerT], limits: AnswerLimits, body: Mapping[str, Any] | None = None
    ) -> AnswerT:
        """The answer of `path` in its form; with a `body` that is sent as JSON.

        Raises:
            MissingResourceError: nobody answers in time, or not as a whole, or the key is not accepted.
            InputError: the server refuses, is another program, or does not keep to the form or the limits.
        """
        data = asyncio.run(self._fetch(path, body, limits))
        try:
            return form.model_validate_json(data)
        except PydanticError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            found = one_line(f"{where}: {first['msg']}" if where else first["msg"], _SHOWN)
            raise InputError(
                f"{self.url}{path}: is no answer of a llama-server of 2026 ({found}); name the address of one"
            ) from None

    async def _fetch(self, path: str, body: Mapping[str, Any] | None, limits: AnswerLimits) -> bytes:
        """Bytes of the answer; raises as `ask` does."""
        import httpx2

        address = f"{self.url}{path}"
        try:
            async with asyncio.timeout(limits.seconds):
                async with self._client() as client:
                    request = self._request(client, path, body)
                    response = await client.send(request, stream=True, follow_redirects=False)
                    try:
                        return await _read(response, address, limits)
                    finally:
                        await response.aclose()
        except TimeoutError:
            raise MissingResourceError(
                f"{address}: no llama-server answers there within {limits.seconds:g} s, or not to the end; see what "
                "runs there"
            ) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError, ImportError, ValueError) as error:
            # ImportError and ValueError: of a proxy in the environment
            reason = one_line(str(error), _SHOWN) or type(error).__name__
            raise MissingResourceError(
                f"{address}: no llama-server answers there ({reason}); start one with: mode-gguf run MODEL "
                "--mmproj FILE"
            ) from None

    def _client(self) -> "httpx2.AsyncClient":
        import httpx2

        return httpx2.AsyncClient(
            verify=_certificates(), trust_env=self._trusts_environment, timeout=None, headers=self._headers
        )

    def _request(self, client: "httpx2.AsyncClient", path: str, body: Mapping[str, Any] | None) -> "httpx2.Request":
        if body is None:
            return client.build_request("GET", f"{self.url}{path}")
        headers = {"Content-Type": "application/json"}
        return client.build_request("POST", f"{self.url}{path}", content=json.dumps(body).encode(), headers=headers)


def is_healthy(url: str) -> bool:
    """Whether a server that was started on this machine says that it is ready; nothing of its answer is read."""

    import httpx2

    async def asked() -> bool:
        async with (
            asyncio.timeout(_HEALTH_SECONDS),
            httpx2.AsyncClient(verify=_certificates(), trust_env=False) as client,
            client.stream("GET", f"{url}/health", follow_redirects=False) as response,
        ):
            return response.status_code == httpx2.codes.OK

    with suppress(httpx2.HTTPError, OSError):
        return asyncio.run(asked())
    return False


async def _read(response: "httpx2.Response", address: str, limits: AnswerLimits) -> bytes:
    """Bytes of an answer that has begun, of which there may be so many."""
    status = response.status_code
    if 300 <= status < 400:
        where = one_line(response.headers.get("Location", "elsewhere"), _SHOWN)
        raise InputError(
            f"{address}: the server sends to {where} ({status}), which is not followed; name the address itself"
        )
    if encoding := response.headers.get("Content-Encoding", "").replace("identity", ""):
        raise InputError(f"{address}: answers compressed ({one_line(encoding, 40)}), which was not asked for")
    n_bytes = limits.n_bytes if status == 200 else _ERROR_BYTES
    data = bytearray()
    async with asyncio.timeout(BODY_SECONDS + n_bytes / 1e6):
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > n_bytes:
                break
    if status != 200:
        raise _refusal(address, status, bytes(data[:_ERROR_BYTES]))
    if len(data) > n_bytes:
        raise InputError(f"{address}: answers with more than {n_bytes:,} bytes, which no llama-server does")
    return bytes(data)


def _refusal(address: str, status: int, body: bytes) -> InputError:
    said = f"{address}: the server says {status}: {_message(body)}"
    if status in (401, 403):
        return MissingResourceError(f"{said}; give its key in {API_KEY}")
    return InputError(said)


def _message(body: bytes) -> str:
    try:
        text = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode("utf-8", "replace")
    return one_line(str(text), _SHOWN)


def _host(url: str) -> str:
    """The host of an address; raises UsageError."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise UsageError(f"{url}: is no address ({error}); give one such as http://127.0.0.1:8080") from None
    if parsed.userinfo:
        raise UsageError(
            f"{parsed.scheme}://{parsed.host}: the address holds a password, which reports would show; give the key of "
            f"the server in {API_KEY}"
        )
    if (
        parsed.scheme not in ("http", "https")
        or not parsed.host
        or parsed.query
        or parsed.fragment
        or (parsed.port or 0) > 65535
    ):
        raise UsageError(f"{url}: is no address of a server; give one such as http://127.0.0.1:8080")
    return parsed.host


def _is_this_machine(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(OSError):  # 127.1, as the system reads it
        name = str(ipaddress.ip_address(socket.inet_aton(name)))
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def _authorization() -> dict[str, str]:
    key = os.environ.get(API_KEY)
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{API_KEY}: holds more than printable ASCII characters, which no header takes")
    return {"Authorization": f"Bearer {key}"}


@cache
def _certificates() -> ssl.SSLContext:
    """Certificates that are trusted, read once: that takes longer than a question."""
    import httpx2

    return httpx2.create_ssl_context()
