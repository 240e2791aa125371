"""NBD URIs: taken apart as the specification has them, put together again, and refused in one clear line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramfs.errors import UsageError
from ramfs.source.nbd.uri import PORT, NbdUri, parse

GOOD = {
    "nbd://example.com/disk": NbdUri("example.com", export="disk"),
    "nbd://example.com/": NbdUri("example.com"),
    "nbd://example.com": NbdUri("example.com"),
    "nbd://example.com//disk": NbdUri("example.com", export="/disk"),
    "nbd://example.com/hello%20world": NbdUri("example.com", export="hello world"),
    "nbd://example.com/a/b@c:d": NbdUri("example.com", export="a/b@c:d"),
    "nbd://example.com/100%25%3F%23": NbdUri("example.com", export="100%?#"),
    "nbd://example.com/pc.ram@0x0": NbdUri("example.com", export="pc.ram@0x0"),
    "nbd://example.com/a+b": NbdUri("example.com", export="a+b"),
    "nbd://example.com/%C3%B6": NbdUri("example.com", export="ö"),
    "nbd://example.com/ö": NbdUri("example.com", export="ö"),
    "NBD://h:1/x": NbdUri("h", 1, export="x"),
    "nbd://h:/x": NbdUri("h", export="x"),
    "nbd://h:65535": NbdUri("h", 65535),
    "nbd://127.0.0.1:10810/": NbdUri("127.0.0.1", 10810),
    "nbd://[::1]": NbdUri("::1"),
    "nbd://[fe80::1%25eth0]:10810/x": NbdUri("fe80::1%eth0", 10810, export="x"),
    "nbds://example.com/x": NbdUri("example.com", export="x", tls=True),
    "nbds://h/x?tls-certificates=/etc/pki&tls-hostname=other": NbdUri(
        "h", export="x", tls=True, certificates="/etc/pki", hostname="other"
    ),
    "nbds://h/?tls-verify-peer=1&tls-type=x509": NbdUri("h", tls=True),
    "nbd+unix:///?socket=/run/nbd.sock": NbdUri(socket="/run/nbd.sock"),
    "nbd+unix://?socket=nbd.sock": NbdUri(socket="nbd.sock"),
    "nbd+unix:///disk?socket=/tmp/a%20b+c": NbdUri(socket="/tmp/a b+c", export="disk"),
    "nbd+unix:///?socket=%00/abstract": NbdUri(socket="\0/abstract"),
    "nbds+unix:///x?socket=s&tls-hostname=h": NbdUri(socket="s", export="x", tls=True, hostname="h"),
}

BAD = {
    "": "does not begin with",
    "/a/path": "does not begin with",
    "nbd:example.com": "does not begin with",
    "http://example.com/": "does not begin with",
    "nbd:///x": "names no host",
    "nbd://:10809/x": "names no host",
    "nbd://h:0/x": "not a port",
    "nbd://h:65536/x": "not a port",
    "nbd://h:-1/x": "not a port",
    "nbd://h:१/x": "not a port",
    "nbd://::1/x": "stands in brackets",
    "nbd://[::1/x": "stands in brackets",
    "nbd://[h]/x": "not an IPv6 address",
    "nbd://[::1]x/": "stands in brackets",
    "nbd://user@h/x": "names a user",
    "nbd://h%2Fx/": "not the name of a host",
    "nbd://h/%zz": "two hexadecimal digits",
    "nbd://h/%ff": "not UTF-8",
    "nbd://h/a%00b": "NUL",
    "nbd://h/" + "x" * 4097: "longer than 4096",
    "nbd://h/a b": "blank",
    "nbd://h/a\nb": "blank",
    "nbd://h/x#y": "fragment",
    "nbd://h/?socket=/s": "names a socket",
    "nbd://h/?tls-certificates=/x": "scheme is one without",
    "nbds://h/?tls-verify-peer=0": "always verified",
    "nbds://h/?tls-type=psk": "x509",
    "nbds://h/?tls-hostname=a&tls-hostname=b": "twice",
    "nbds://h/?tls-hostname=%00": "not the name of a host",
    "nbds://h/?tls-hostname=a..b": "not the name of a host",
    "nbds://h/?tls-certificates=%00": "NUL",
    "nbd://a..b/": "not the name of a host",
    "nbd://" + "a" * 64 + "/": "not the name of a host",
    "nbd://h/?x-colour=red": "no parameter",
    "nbd+unix:///x": "names no socket",
    "nbd+unix:///x?socket=": "names no socket",
    "nbd+unix:///x?socket=%00": "names no socket",
    "nbd+unix:///x?socket=a%00b": "NUL",
    "nbd+unix://host/x?socket=s": "names a host",
    "nbd+unix:///x?socket=" + "s" * 108: "longer than 107",
}


@pytest.mark.parametrize("text", GOOD)
def test_good(text: str) -> None:
    uri = parse(text)
    assert uri == GOOD[text]
    assert parse(str(uri)) == uri
    assert str(uri).isascii()


@pytest.mark.parametrize("text", BAD)
def test_bad(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_in_the_certificate() -> None:
    assert parse("nbds://h/").server_name == "h"
    assert parse("nbds://h/?tls-hostname=other").server_name == "other"
    assert parse("nbds+unix:///?socket=s").server_name == "localhost"
    assert parse("nbd://h:7/a").with_export("b c") == NbdUri("h", 7, export="b c")
    assert parse("nbd://h").port == PORT == 10809


NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@given(export=NAME, socket=NAME.filter(bool).filter(lambda name: len(name.encode()) <= 107), tls=st.booleans())
def test_any_name_goes_there_and_back(export: str, socket: str, tls: bool) -> None:
    for uri in (NbdUri("h", 1, export=export, tls=tls), NbdUri(socket=socket, export=export, tls=tls)):
        assert parse(str(uri)) == uri


@given(st.text() | st.text().map(lambda rest: f"nbd://{rest}") | st.text().map(lambda rest: f"nbds+unix:///{rest}"))
def test_anything_is_taken_or_refused(text: str) -> None:
    try:
        uri = parse(text)
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017
    else:
        assert parse(str(uri)) == uri
