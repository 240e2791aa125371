/* Before Linux 6.9 the kernel cannot be asked for the requests again that a daemon has read and not answered: whoever
 * made them would wait for ever. There each request is read into a slot of shared memory and stays until its answer
 * was written. A daemon that takes over finds it.
 *
 * A slot is in use when the message in it has a number (unique). The kernel itself writes that, so there is no moment
 * in which a request is neither in the kernel's queue nor here. A small answer is put beside its request before it is
 * written: when the daemon dies between the two, the next one writes the same answer again, and the kernel takes it if
 * it had none. (An OPEN must not be carried out twice, if the kernel has the handle of the first.) Large answers are
 * those of READ, which may be carried out twice.
 *
 * Requests without an answer (FORGET) are not kept. One that is lost costs some memory until the unmount.
 */
#define _GNU_SOURCE
#include "_mirror.h"
#include <errno.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { SLOTS = 256, MESSAGE = (1 << 20) + 4096, ANSWER = 64 << 10, PREPARED = 4 };

struct slot {
    uint64_t answered; /* length of the answer, 0 for none yet */
    char answer[ANSWER];
    char message[MESSAGE];
};

static struct slot *slots;
static unsigned count, used;       /* slots there are; slots in use */
static unsigned order[SLOTS];      /* the numbers of the slots: those in use first, then the free ones */
static unsigned backlog, next_old; /* requests of the daemon before, at the start of order, and which is next */
static unsigned long long unkept;

static struct fuse_in_header *request_of(unsigned place)
{
    return (struct fuse_in_header *)slots[order[place]].message;
}

static void swap(unsigned a, unsigned b)
{
    unsigned kept = order[a];
    order[a] = order[b];
    order[b] = kept;
}

unsigned mirror_start(void *memory, size_t length, int fd)
{
    slots = memory;
    count = length / sizeof *slots < SLOTS ? (unsigned)(length / sizeof *slots) : SLOTS;
    used = next_old = 0;
    for (unsigned i = 0; i < count; i++)
        order[i] = i;
    for (unsigned i = 0; i < count; i++) {
        struct slot *slot = &slots[order[i]];
        if (!request_of(i)->unique) {
            if (slot->answered)
                slot->answered = 0; /* the daemon died between the two stores that free a slot */
            continue;
        }
        if (slot->answered) {
            (void)!write(fd, slot->answer, slot->answered); /* ENOENT: the kernel had it */
            request_of(i)->unique = 0;
            slot->answered = 0;
        } else {
            swap(used++, i);
        }
    }
    /* The kernel fails a request with EIO if the reader dies while it has to bring in memory to copy it to. */
    madvise(slots, PREPARED * sizeof *slots, MADV_POPULATE_WRITE);
    return backlog = used;
}

ssize_t mirror_read(int fd, void *buffer, size_t size, int *again)
{
    *again = 0;
    if (next_old < backlog) {
        struct fuse_in_header *request = request_of(next_old);
        if (request->len <= size) {
            next_old++;
            *again = 1;
            memcpy(buffer, request, request->len);
            return request->len;
        }
    }
    if (used == count || size > MESSAGE) {
        ssize_t length = read(fd, buffer, size);
        unkept += length > 0;
        return length;
    }
    struct fuse_in_header *request = request_of(used);
    ssize_t length = read(fd, request, size);
    if (length > 0) {
        memcpy(buffer, request, (size_t)length);
        if (request->opcode == FUSE_FORGET || request->opcode == FUSE_BATCH_FORGET || request->opcode == FUSE_INTERRUPT)
            request->unique = 0;
        else
            used++;
    }
    return length;
}

ssize_t mirror_writev(int fd, struct iovec *iov, int parts)
{
    const struct fuse_out_header *out = iov[0].iov_base;
    unsigned place = used;
    if (out->unique) /* else a notification */
        for (place = 0; place < used && request_of(place)->unique != out->unique; place++)
            ;
    struct slot *slot = place < used ? &slots[order[place]] : NULL;
    if (slot && out->len <= ANSWER) {
        size_t at = 0;
        for (int i = 0; i < parts; i++) {
            memcpy(slot->answer + at, iov[i].iov_base, iov[i].iov_len);
            at += iov[i].iov_len;
        }
        __atomic_store_n(&slot->answered, at, __ATOMIC_RELEASE);
    }
    ssize_t written = writev(fd, iov, parts);
    int error = errno;
    if (slot && (written >= 0 || error == ENOENT)) {
        __atomic_store_n(&request_of(place)->unique, 0, __ATOMIC_RELEASE);
        __atomic_store_n(&slot->answered, 0, __ATOMIC_RELEASE);
        /* The others keep their order. What was of the daemon before comes first until it is handed out. */
        unsigned freed = order[place];
        memmove(order + place, order + place + 1, (used - place - 1) * sizeof *order);
        order[--used] = freed;
        backlog -= place < backlog;
        next_old -= place < next_old;
    } else if (slot) {
        __atomic_store_n(&slot->answered, 0, __ATOMIC_RELEASE); /* libfuse answers with the error then */
    }
    errno = error;
    return written;
}

unsigned long long mirror_unkept(void)
{
    return unkept;
}
