"""The model: which layer holds each page of an image. Arithmetic only: no files, no sockets, no trio."""
