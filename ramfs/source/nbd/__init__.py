"""The NBD protocol without a socket, a loop or a clock: what to send, where received bytes go, what they mean.

- codec.py: the messages, as bytes and back, each number checked
- states.py: the handshake as a table
- connection.py: one connection, from the greeting to the end
- uri.py: NBD URIs

`ramfs.source.nbd_client` gives it sockets and TLS. The protocol is specified in doc/proto.md of the NBD project,
URIs in doc/uri.md.
"""
