"""A server of chat completions in a thread of the test, which behaves as it is told."""

import contextlib
import http.server
import json
import threading
import time


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with self.server.lock:
      number = len(self.server.asked)
      self.server.asked.append((self.path, dict(self.headers), body))
    with contextlib.suppress(OSError):  # whoever asked has gone
      self.server.behave(self, number, body)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def serving(behave):
  """Runs a server; `behave(handler, number of the request, its body)` answers.

  Yields the server: `url`, and `asked`, which has (path, headers, body) of each request.
  """
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.daemon_threads, server.block_on_close = True, False
  server.behave, server.asked, server.lock = behave, [], threading.Lock()
  server.url = f"http://127.0.0.1:{server.server_port}/v1"
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def send(handler, body, status=200, kind="application/json", **headers):
  """Sends a whole response; `body` is text, bytes, or what JSON is made of."""
  if not isinstance(body, (bytes, str)):
    body = json.dumps(body)
  data = body.encode() if isinstance(body, str) else body
  handler.send_response(status)
  fields = {"Content-Type": kind, "Content-Length": str(len(data))}
  fields |= {name.replace("_", "-"): value for name, value in headers.items()}
  for name, value in fields.items():
    handler.send_header(name, value)
  handler.end_headers()
  handler.wfile.write(data)


def completion(content, *, tokens=None, finish="stop", **message):
  """The body of a response, as OpenAI writes it."""
  said = {"role": "assistant", "content": content, **message}
  usage = {} if tokens is None else {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
  choice = {"index": 0, "message": said, "finish_reason": finish}
  return {"id": "c", "object": "chat.completion", "choices": [choice], **usage}


def trickle(handler, head: bytes, part: bytes = b" ", seconds: float = 0.02):
  """Sends `head`, then `part` again and again until nobody reads."""
  handler.wfile.write(head)
  while True:
    handler.wfile.write(part)
    handler.wfile.flush()
    time.sleep(seconds)
