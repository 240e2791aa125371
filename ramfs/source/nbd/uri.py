"""NBD URIs (doc/uri.md of the NBD project): ``nbd://HOST[:PORT]/[EXPORT]``, ``nbd+unix:///[EXPORT]?socket=PATH``.

``nbds://`` and ``nbds+unix://`` mean TLS, and nothing without it. Query parameters are those of libnbd:

    socket            of a Unix domain socket; a name that begins with %00 is in the abstract namespace
    tls-certificates  directory with ca-cert.pem, and client-cert.pem and client-key.pem where the server wants them;
                      or a file with certificates of authorities. Without it the system's authorities are believed
    tls-hostname      the name in the server's certificate, where it is not the host of the URI
"""

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ramfs.errors import UsageError
from ramfs.source.nbd.codec import MAX_STRING

#: The port that is NBD's.
PORT: Final = 10809

_SCHEMES: Final = {"nbd": (False, False), "nbds": (True, False), "nbd+unix": (False, True), "nbds+unix": (True, True)}
_MAX_SOCKET: Final = 107  # bytes in sun_path


@dataclass(frozen=True)
class NbdUri:
    """Where a server is and which of its exports is meant; ``str()`` is the URI again."""

    host: str = ""
    port: int = PORT
    socket: str = ""
    """Path of a Unix domain socket; then there is no host."""
    export: str = ""
    tls: bool = False
    certificates: str = ""
    hostname: str = ""

    @property
    def server_name(self) -> str:
        """The name that the server's certificate has to bear."""
        return self.hostname or self.host or "localhost"

    def with_export(self, name: str) -> "NbdUri":
        """Another export of the same server."""
        return replace(self, export=name)

    def __str__(self) -> str:
        scheme = ("nbds" if self.tls else "nbd") + ("+unix" if self.socket else "")
        authority = f"[{quote(self.host, ':')}]" if ":" in self.host else quote(self.host)
        if not self.socket and self.port != PORT:
            authority += f":{self.port}"
        query = {"socket": self.socket, "tls-certificates": self.certificates, "tls-hostname": self.hostname}
        parts = "&".join(f"{key}={quote(value, '/:')}" for key, value in query.items() if value)
        return f"{scheme}://{authority}/{quote(self.export, '/:@')}" + (f"?{parts}" if parts else "")


def parse(text: str) -> NbdUri:
    """Take an NBD URI apart.

    :raises UsageError: it is none, or asks for what there is not; one sentence.
    """
    try:
        return _parse(text)
    except ValueError as error:
        shown = text if text.isprintable() else ascii(text)
        raise UsageError(f"{shown} is not an NBD URI that can be used: {error}") from None


def _parse(text: str) -> NbdUri:
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise ValueError("it holds a blank or a control character; write it as %20 and so on")
    if "#" in text:
        raise ValueError("it has a fragment (#...); write # in a name as %23")
    scheme, colon, rest = text.partition("://")
    if not colon or scheme.lower() not in _SCHEMES:
        raise ValueError("it does not begin with nbd://, nbds://, nbd+unix:// or nbds+unix://")
    tls, local = _SCHEMES[scheme.lower()]
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    export = _decoded(path, "the export's name")
    if len(export.encode()) > MAX_STRING:
        raise ValueError(f"the export's name is longer than {MAX_STRING} bytes")
    if "\0" in export:
        raise ValueError("the export's name holds a NUL")
    values = _query(query)
    if not tls and (values.keys() & {"tls-certificates", "tls-hostname"}):
        raise ValueError("it has parameters for TLS, and its scheme is one without; use nbds:// or nbds+unix://")
    certificates, hostname = values.get("tls-certificates", ""), values.get("tls-hostname", "")
    if "\0" in certificates:
        raise ValueError("the parameter tls-certificates holds a NUL")
    if hostname:
        _check_host(hostname)
    uri = NbdUri(export=export, tls=tls, certificates=certificates, hostname=hostname)
    socket = values.get("socket", "")
    if local:
        if authority:
            raise ValueError(
                f"it names a host ({authority}) beside a socket; the form is nbd+unix:///EXPORT?socket=PATH"
            )
        if not socket or socket == "\0":
            raise ValueError("it names no socket; the form is nbd+unix:///EXPORT?socket=PATH")
        if "\0" in socket[1:]:
            raise ValueError("the path of its socket holds a NUL")
        if len(socket.encode()) > _MAX_SOCKET:
            raise ValueError(f"the path of its socket is longer than {_MAX_SOCKET} bytes, more than a socket can have")
        return replace(uri, socket=socket)
    if "socket" in values:
        raise ValueError("it names a socket, and its scheme is one for hosts; use nbd+unix:// or nbds+unix://")
    host, port = _authority(authority)
    return replace(uri, host=host, port=port)


def _authority(authority: str) -> tuple[str, int]:
    if "@" in authority:
        raise ValueError("it names a user, and no such login is offered; leave out what stands before the @")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", authority)
    if bracketed:
        host, number = _decoded(bracketed[1], "the host"), bracketed[2]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"[{host}] is not an IPv6 address") from None
    else:
        if authority.count(":") > 1 or "[" in authority or "]" in authority:
            raise ValueError("an IPv6 address stands in brackets, as in nbd://[::1]/")
        name, _, number = authority.partition(":")
        host = _decoded(name, "the host")
        if not host:
            raise ValueError("it names no host")
        _check_host(host)
    if not number:
        return host, PORT
    if not re.fullmatch(r"[0-9]{1,5}", number) or not 0 < int(number) < 1 << 16:
        raise ValueError(f"{number!a} is not a port (1 to 65535)")
    return host, int(number)


def _check_host(name: str) -> None:
    try:
        name.encode("idna")  # empty and overlong labels; what asks for an address or a certificate does the same
    except UnicodeError:
        known = False
    else:
        known = re.fullmatch(r"[\w.:~!$&'()*+,;=-]+", name, re.ASCII) is not None
    if not known:
        raise ValueError(f"{name!a} is not the name of a host")


def _query(query: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in query.split("&") if query else []:
        name, _, value = part.partition("=")
        key = _decoded(name, "a parameter's name")
        if key in values:
            raise ValueError(f"it has the parameter {key} twice")
        values[key] = _decoded(value, f"the parameter {key}")
        if key == "tls-verify-peer" and values[key] not in ("1", "true"):
            raise ValueError("a server that uses TLS is always verified; give its authority with tls-certificates=DIR")
        if key == "tls-type" and values[key] != "x509":
            raise ValueError("of the kinds of TLS, x509 is the one that is offered")
        if key not in ("socket", "tls-certificates", "tls-hostname", "tls-verify-peer", "tls-type"):
            raise ValueError(f"there is no parameter {key!a}")
    return values


def _decoded(part: str, what: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})", part):
        raise ValueError(f"{what} has a % that is not followed by two hexadecimal digits; write % as %25")
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
