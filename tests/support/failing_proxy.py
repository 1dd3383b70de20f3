"""A TLS proxy before a SuperLink that can answer 500 in its place."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


class FailingProxy:
    """Listens on ``port`` until the block ends; ``fail(seconds)`` has it answer 500 for so long."""

    def __init__(self, folder, to_port):
        self.failing_until, self.failed = 0.0, Counter()
        self._trusted = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        self._to = to_port
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, headers, answer = proxy.answer(self.path, dict(self.headers), body)
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *words):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def fail(self, seconds):
        self.failing_until = time.monotonic() + seconds

    def answer(self, path, headers, body):
        if time.monotonic() < self.failing_until:
            self.failed[path.rpartition("/")[2]] += 1
            return 500, [("Content-Type", "application/json")], b'{"detail": "database is locked"}'
        to = http.client.HTTPSConnection("127.0.0.1", self._to, timeout=60, context=self._trusted)
        try:
            to.request("POST", path, body, headers)
            response = to.getresponse()
            return response.status, response.getheaders(), response.read()
        except OSError:
            return 502, [], b""
        finally:
            to.close()
