/* Unanswered requests in memory that outlives the daemon, for kernels that cannot be asked for them again. */
#ifndef RAMFS_MIRROR_H
#define RAMFS_MIRROR_H
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Use this memory from now on, and find in it what the daemon before left. Sends the answers that it had ready.
 * Returns the number of requests that mirror_read will hand out first. */
unsigned mirror_start(void *memory, size_t length, int fd);
/* Read a request as read(2) does; *again says whether it was read by the daemon before. */
ssize_t mirror_read(int fd, void *buffer, size_t size, int *again);
/* Write a reply as writev(2) does. */
ssize_t mirror_writev(int fd, struct iovec *iov, int count);
/* Requests that were read while no room was left: these a dying daemon takes with it. */
unsigned long long mirror_unkept(void);
#endif
