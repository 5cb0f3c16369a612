"""One HTTP request with a deadline, by the standard library.

No redirect is followed, for the key would go along; a proxy that the environment names is not
asked.
"""

import dataclasses
import functools
import http.client
import io
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping

MAX_BODY = 16 << 20  # bytes of a response's body; more are no answer
CONNECT_SECONDS = 10.0  # for the connection alone
POLL_SECONDS = 0.25  # how soon a request that waits learns that the run stops


@dataclasses.dataclass(frozen=True)
class Address:
  """Where a server's interface is.

  Attributes:
    secure: whether by TLS.
    host: its name or number.
    port: None for the scheme's own.
    path: of the interface, without a slash at its end: "/v1".
  """

  secure: bool
  host: str
  port: int | None
  path: str

  def __str__(self) -> str:
    host = f"[{self.host}]" if ":" in self.host else self.host
    port = "" if self.port is None else f":{self.port}"
    return f"{'https' if self.secure else 'http'}://{host}{port}{self.path}"


def address(url: str) -> Address:
  """The address that a base URL means.

  Raises:
    ValueError: it is none; the text says what it must be, and holds nothing of the URL, which may
      hold a password.
  """
  right = 'a base URL as "https://HOST/v1" or "http://HOST:PORT/v1"'
  try:
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname, parts.port
  except ValueError as error:  # a port that is no number, half a bracket
    raise ValueError(right) from error
  if parts.username is not None or parts.password is not None:
    raise ValueError(f"{right}, without a name or password in it")
  if parts.query or parts.fragment:
    raise ValueError(f"{right}, without anything after ? or #")
  plain = url.isascii() and url.isprintable() and " " not in url
  if parts.scheme not in ("http", "https") or not host or not plain:
    raise ValueError(right)
  path = parts.path.rstrip("/").removesuffix("/chat/completions")
  return Address(parts.scheme == "https", host, port, path.rstrip("/"))


@dataclasses.dataclass(frozen=True)
class Response:
  """What a server answers. `headers` have names in lower case."""

  status: int
  headers: Mapping[str, str]
  body: bytes


class Stopped(Exception):
  """The run stops: nobody waits for the answer any more."""


def post(
  to: Address,
  name: str,
  body: bytes,
  headers: Mapping[str, str],
  *,
  seconds: float,
  stopped: threading.Event,
) -> Response:
  """Sends a body to `to`/`name`, on a connection of its own, and reads the response whole.

  Args:
    to: the server's interface.
    name: of what is asked there, "/chat/completions".
    body: of the request.
    headers: besides those that HTTP needs.
    seconds: to the last byte read, however slowly they come.
    stopped: once it is set, the request is given up within POLL_SECONDS.

  Raises:
    TimeoutError: the deadline has passed.
    OSError: no connection, or it broke.
    http.client.HTTPException: what comes back is no HTTP, or was cut off.
    ValueError: the body is longer than MAX_BODY.
    Stopped: `stopped` was set.
  """
  deadline = time.monotonic() + seconds
  kind = http.client.HTTPSConnection if to.secure else http.client.HTTPConnection
  how = {"context": _tls()} if to.secure else {}
  connection = kind(to.host, to.port, timeout=min(seconds, CONNECT_SECONDS), **how)
  try:
    connection.connect()
  except TimeoutError as error:
    raise ConnectionError(f"no connection within {connection.timeout:g} s") from error
  own = connection.sock
  try:
    connection.sock = _Watched(own, deadline, stopped)
    connection.request("POST", to.path + name, body, {"Connection": "close", **headers})
    response = connection.getresponse()
    return Response(
      response.status,
      {name.lower(): value for name, value in response.getheaders()},
      _body(response),
    )
  finally:
    own.close()


@functools.cache
def _tls() -> ssl.SSLContext:
  """Made once, for it reads all certificates that this machine trusts."""
  return ssl.create_default_context()


def _body(response: http.client.HTTPResponse) -> bytes:
  data = b""
  while part := response.read(1 << 16):
    data += part
    if len(data) > MAX_BODY:
      raise ValueError(f"a body of more than {MAX_BODY >> 20} MiB")
  if response.length:  # promised by Content-Length; read(n) does not look at that
    raise http.client.IncompleteRead(data, response.length)
  return data


class _Watched:
  """A socket as http.client uses it, whose reads end at the deadline or when the run stops.

  A timeout of the socket alone would begin anew with each byte of a response that trickles.
  """

  def __init__(self, own: socket.socket, deadline: float, stopped: threading.Event):
    self._own, self._deadline, self._stopped = own, deadline, stopped

  def sendall(self, data: bytes) -> None:
    self._own.settimeout(max(self._deadline - time.monotonic(), 1e-3))
    self._own.sendall(data)

  def makefile(self, mode: str) -> io.BufferedReader:
    del mode  # http.client reads alone
    return io.BufferedReader(_Reads(self._own, self._deadline, self._stopped))

  def close(self) -> None:
    """Nothing: http.client closes before it reads the body, `post` when that is read."""


class _Reads(io.RawIOBase):
  def __init__(self, own: socket.socket, deadline: float, stopped: threading.Event):
    super().__init__()
    self._own, self._deadline, self._stopped = own, deadline, stopped

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: bytearray) -> int:
    while True:
      left = self._deadline - time.monotonic()
      if self._stopped.is_set():
        raise Stopped
      if left <= 0:
        raise TimeoutError("the deadline has passed")
      self._own.settimeout(min(left, POLL_SECONDS))
      try:
        return self._own.recv_into(buffer)
      except TimeoutError:  # of the poll
        continue
