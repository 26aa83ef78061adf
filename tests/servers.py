"""HTTP servers on loopback that behave, and misbehave, like servers of weights."""
import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = '0123456789abcdef0123456789abcdef01234567'


class Handler(BaseHTTPRequestHandler):
    """Handler that serves `server.files`, with the headers that clients of the Hugging Face hub need.

    While `server.cut` is above 0, the connection closes after half of the Content-Length bytes.
    """

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool):
        path = self.server.files.get(self.path.split('?')[0].lstrip('/'))
        self.server.requests.append((self.command, self.path))
        if path is None or not path.exists():
            self.send_response(404)
            self.send_header('X-Error-Code', 'EntryNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header('X-Repo-Commit', COMMIT)
        self.end_headers()
        if not body:
            return
        if self.server.cut:
            self.server.cut -= 1
            content = content[:len(content) // 2]
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(files: dict, *, cut: int = 0, port: int = 0):
    """Serve `files` (path on the server -> file), at `port` or any free port.

    Yields:
        The server, with `url`, `requests` (all received) and `cut`.
    """
    server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
    server.files, server.cut, server.requests = {name: Path(path) for name, path in files.items()}, cut, []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def downloads(server) -> list:
    """Return the paths of the downloaded files, in order."""
    return [path for command, path in server.requests if command == 'GET' and path.lstrip('/') in server.files]
