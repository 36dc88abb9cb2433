"""A stand-in for an SGLang server that takes weight updates, without a model: it answers and notes the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web
from fault_proxy import Answer, FaultProxy


class StandIn(FaultProxy):
    """calls: paths in order, with the tags of those that have some. Faults befall it as they do a real one's proxy.

    memory: what it says to occupy, in GiB. on_call: called with every call and its body before it is answered.
    """

    def __init__(self, memory: dict[str, float] | None = None) -> None:
        super().__init__("")
        self.calls: list[str] = []
        self.version = "-1"
        self.on_call: Callable[[str, Answer], None] = lambda call, asked: None
        self.info = {
            "version": "0.5.23",
            "tp_size": 1,
            "dp_size": 1,
            "enable_memory_saver": True,
            "internal_states": [{"memory_usage": memory or {}}],
        }

    async def forward(
        self, request: web.Request, body: bytes, change: Callable[[Answer], Answer] | None = None
    ) -> web.Response:
        if request.method == "GET" and request.path == "/begin_weight_update":
            return web.Response(status=405)
        asked = orjson.loads(body) if body else {}
        if request.method == "POST":
            call = " ".join([request.path, *asked.get("tags", [])])
            self.on_call(call, asked)
            self.calls.append(call)
            self.version = asked.get("weight_version", self.version)
        answer: dict[str, Any] = {"success": True, "message": "", "weight_version": self.version}
        answer = self.info if request.path == "/server_info" else answer
        return web.json_response(change(answer) if change else answer)
