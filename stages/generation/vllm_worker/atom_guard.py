"""The guard of a vLLM server: it passes on only requests that carry the signature of the run, and signs the answers.

vLLM puts it around all of its routes (`--middleware`). `--api-key` of vLLM guards some prefixes only. Its development
mode, which the transfer of weights needs, opens routes that run any method of the workers or show the environment. So
a signed request reaches the routes that this project uses, and no other.

    Atom-Nonce        random number of the client, new for each request
    Atom-Body         SHA-256 of the body of a request
    Atom-Instance     random number of this start of the server, in its answers
    Atom-Signature    in a request: of method, target, instance, nonce and body
                      in an answer: of instance, nonce, status and body

A request is signed for one start of one server, and that server takes each nonce once. So nobody who listens on the
network can send a request again. The exception is /health, which changes nothing: it is signed without an instance,
because its answer tells it, and its nonce is not remembered.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from atom_secret import VARIABLE, is_signed, read, sign  # type: ignore[import-not-found]

HEALTH = "/health"
# The paths that this project uses: two of its own server of a reward model, and vLLM's, the last two in tests.
PATHS = {
    "/atom/model", "/atom/score",
    HEALTH, "/inference/v1/generate", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights",
    "/finish_weight_update", "/pause", "/resume", "/is_paused", "/weight_info",
}  # fmt: skip
# Bytes of the body of a request, at most.
MOST_BYTES = 1 << 30

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """The guard, as ASGI middleware."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app, self.key, self.instance = app, read(Path(os.environ[VARIABLE])), secrets.token_hex(16)
        # Nonces of the signed requests so far, but for /health; some 100 bytes each.
        self.nonces: set[str] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            # This project uses no web sockets.
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        nonce, digest = headers.get("atom-nonce", ""), headers.get("atom-body", "")
        target = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        instance = "" if scope["path"] == HEALTH else self.instance
        parts = (scope["method"], target, instance, nonce, digest)
        # Before the body is read: nobody without the key can fill the memory.
        if not is_signed(headers.get("atom-signature", ""), self.key, "request", *parts):
            return await _answer(send, 401, "this server answers signed requests of its run only")
        body = await _body(receive)
        if body is None or hashlib.sha256(body).hexdigest() != digest:
            return await _answer(send, 401, "the body is not the one that was signed")
        if nonce in self.nonces:
            return await _answer(send, 401, "this request was sent before")
        if scope["path"] != HEALTH:
            self.nonces.add(nonce)  # without an await since the look-up, so two requests at once cannot both pass
        answer = _SignedAnswer(send, self.key, self.instance, nonce)
        if scope["path"] not in PATHS:
            return await _answer(answer, 404, "this server has no such path")
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        try:
            await self.app(scope, replay, answer)
        except Exception as error:
            if not answer.is_sent:  # the application's own answer to it would be made outside of the guard
                await _answer(answer, 500, str(error))
            raise


class _SignedAnswer:
    """Takes the messages of an answer, and sends them signed once the last is there."""

    def __init__(self, send: Send, key: bytes, instance: str, nonce: str) -> None:
        self.send, self.key, self.instance, self.nonce = send, key, instance, nonce
        self.start: Message = {}
        self.body = bytearray()
        self.is_sent = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # Held back: the signature covers the body, and headers are sent before it.
            self.start, self.body = message, bytearray()
            return
        self.body += message.get("body", b"")
        if message.get("more_body"):
            return
        body = bytes(self.body)
        digest, status = hashlib.sha256(body).hexdigest(), str(self.start["status"])
        signature = sign(self.key, "answer", self.instance, self.nonce, status, digest)
        self.is_sent = True
        proof = [(b"atom-instance", self.instance.encode()), (b"atom-signature", signature.encode())]
        await self.send({**self.start, "headers": [*self.start.get("headers", ()), *proof]})
        await self.send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes | None:
    """Returns the body of a request; None if it is too large or the client is gone."""
    body = bytearray()
    while len(body) <= MOST_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)
    return None


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": {"message": sentence}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
