"""A model hub on this host."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 10, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass
class Hub:
    """A hub on this host: answers by path, and remembers what it was asked."""

    url: str = ""
    answers: dict[str, tuple[int, bytes, dict[str, str]]] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    delay_s: float = 0.0

    def add(self, hub_id: str, body: bytes, status: int = 200, **headers: str) -> None:
        """Answer for the config.json of this hub id."""
        self.answers[f"/{hub_id}/resolve/main/config.json"] = (status, body, headers)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append((self.path, self.headers.get("Authorization")))
            status, body, headers = hub.answers.get(self.path, (404, b"", {}))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                for byte in range(0, len(body), 16) if hub.delay_s else ():
                    self.wfile.write(body[byte : byte + 16])
                    time.sleep(hub.delay_s)
                if not hub.delay_s:
                    self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
