/* Preloaded into a daemon: kills it between a request's execution and its answer, or at a call on the way there.
 *
 * The daemon reads requests with read(2) and answers them with writev(2), both through the dynamic linker. The first
 * request of the wanted kind is followed from the one to the other. A page of shared memory, the file that ASSASSIN
 * names, tells what is wanted and what was done; conftest.py has the other side. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static struct {
    uint32_t opcode; /* kind of the request, 0: look at none */
    uint32_t step;   /* 0: at the answer; n: at the n-th call that changes files */
    uint32_t kills;  /* daemons to kill, one after the other */
    uint32_t killed;
    uint32_t again;  /* how often the request came again */
    uint32_t calls;  /* that were made for it, when it was to be answered last */
} volatile *control;

static volatile uint64_t followed; /* the number of the request, 0: none */
static volatile uint32_t calls;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("ASSASSIN");
    int fd = path ? REAL(open)(path, O_RDWR | O_CLOEXEC) : -1;
    void *memory = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    control = memory == MAP_FAILED ? NULL : memory;
    if (fd >= 0)
        REAL(close)(fd);
}

static void strike(void)
{
    if (control->killed >= control->kills)
        return;
    control->killed++;
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static void step(void)
{
    if (followed && __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == control->step)
        strike();
}

ssize_t read(int fd, void *buffer, size_t size)
{
    ssize_t got = REAL(read)(fd, buffer, size);
    const struct fuse_in_header *in = buffer;
    if (control && control->opcode && size > 1 << 20 && got >= (ssize_t)sizeof *in && in->len == got &&
        in->opcode == control->opcode) {
        followed = in->unique;
        calls = 0;
        control->again += in->unique >> 63;
    }
    return got;
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
    const struct fuse_out_header *out = iov[0].iov_base;
    if (followed && iov[0].iov_len == sizeof *out && out->unique == followed) {
        control->calls = calls;
        if (control->step == 0)
            strike();
        followed = 0;
    }
    step(); /* what the kernel is told besides */
    return REAL(writev)(fd, iov, count);
}

#define STEP(type, name, parameters, arguments) \
    type name parameters                        \
    {                                           \
        step();                                 \
        return REAL(name) arguments;            \
    }

STEP(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
STEP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
STEP(int, fsync, (int fd), (fd))
STEP(int, fdatasync, (int fd), (fd))
STEP(int, ftruncate, (int fd, off_t size), (fd, size))
STEP(int, ftruncate64, (int fd, off_t size), (fd, size))
STEP(int, unlink, (const char *path), (path))
STEP(int, rename, (const char *from, const char *to), (from, to))
STEP(int, fallocate, (int fd, int mode, off_t from, off_t size), (fd, mode, from, size))
STEP(int, close, (int fd), (fd))

#define STEP_OPEN(name)                                     \
    int name(const char *path, int flags, ...)              \
    {                                                       \
        va_list more;                                       \
        va_start(more, flags);                              \
        mode_t mode = va_arg(more, mode_t);                 \
        va_end(more);                                       \
        step();                                             \
        return REAL(name)(path, flags, mode);               \
    }

STEP_OPEN(open)
STEP_OPEN(open64)
