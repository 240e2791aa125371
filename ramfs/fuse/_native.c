/* What pyfuse3 lacks, added from below.
 *
 * pyfuse3 calls libfuse through the dynamic linker. This module is loaded with RTLD_GLOBAL before pyfuse3, so
 * the functions of libfuse that are defined here again are found first:
 *
 *   fuse_session_new          completes the table of operations, keeps the session, sets what INIT asks for
 *   fuse_session_receive_buf  answers READ and WRITE at once, without a turn through the event loop, and what
 *                             libfuse has no word for (raw requests)
 *   fuse_reply_open, _create  can tell the kernel more of an open file than pyfuse3 has words for (mark_open)
 *
 * and the INIT reply gets flags that libfuse does not know (edit_init).
 *
 * Everything here runs in pyfuse3's loop, which enters libfuse with the GIL held. Operations are handed to
 * Python functions that answer at once (see operations.py); one more operation of libfuse is a row in HANDLERS,
 * a field in the table of fuse_session_new and a function that translates the arguments. An operation that libfuse
 * does not know either is an entry of the dict "raw": its opcode, and a Python function that is given the number of
 * the inode and what follows the header of the request, and returns what follows the header of the reply.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#define FUSE_USE_VERSION 35
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <linux/fs.h>
#include <linux/fuse.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_mirror.h"

enum { PAGE = 4096 };
enum { ON_READ, ON_MAP, ON_ABSENT, ON_WRITE, ON_COPY, ON_IOCTL, ON_RAW, ON_FALLOCATE, ON_LSEEK, ON_PAUSE, HANDLERS };
static const char *const handler_names[HANDLERS] = {"read",  "map_layer", "absent",    "write", "copy_file_range",
                                                    "ioctl", "raw",       "fallocate", "lseek", "pause"};
enum { POPULATE_READ = 22 }; /* of Linux 5.14 */
/* Of Linux 6.9, which older headers lack: */
enum { INIT_EXT = 1 << 30, DIRECT_IO_ALLOW_MMAP = 1 << 4, PASSTHROUGH = 1 << 5 /* both of flags2 */ };
enum { STACK_DEPTH = 0 /* of unused */ };
static PyObject *handlers[HANDLERS];

static unsigned max_background = 64, max_readahead = 1 << 20, max_write = 1 << 20;
static int want_passthrough, offered, passthrough; /* asked for by us, offered by the kernel, agreed on */
static int want_direct_mmap, direct_mmap_offered;
static long spin_ns = 0;    /* how long to look for the next request, without sleeping */
static int loop_fd = -1;    /* readable when the loop has something to do; -1 if that is not known */
static const long turn_ns = 4000000; /* how long requests are answered before it is seen whether others want a turn */

static struct fuse_session *session;
static struct fuse_lowlevel_ops theirs; /* pyfuse3's operations */
static struct fuse_conn_info negotiated;
static unsigned long long answered;
static const struct fuse_in_header *current; /* the request being answered at once, as the kernel wrote it */
static unsigned long long unique;            /* of the request that is being, or was last, handed to Python */
static uint32_t xattr_flags;                 /* of the last SETXATTR */
static char init_request[256];               /* INIT as the kernel sent it */
static int initialising, replaying;          /* its reply is to be edited; to be thrown away */
static int again;                            /* the request under way was read by the daemon before */
static Py_buffer mirror;                     /* where requests are kept (_mirror.c); without memory where none are */
static struct { uint64_t fh; uint32_t flags; int32_t backing; } marked; /* what the next reply to an OPEN bears too */
static int opening;                                                     /* that reply is on its way */

static ssize_t reply_writev(int fd, struct iovec *iov, int count, void *userdata);

static struct fuse_session *(*real_session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
static int (*real_receive_buf)(struct fuse_session *, struct fuse_buf *);
static void (*real_process_buf)(struct fuse_session *, const struct fuse_buf *);
static int (*real_reply_open)(fuse_req_t, const struct fuse_file_info *);
static int (*real_reply_create)(fuse_req_t, const struct fuse_entry_param *, const struct fuse_file_info *);

/* The error number of an answer that is not what it should be; the handler's own errors come as -errno. */
static int broken(int which, PyObject *answer)
{
    if (answer != NULL && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "handler %s returned %R", handler_names[which], answer);
    PyErr_WriteUnraisable(handlers[which]);
    return EIO;
}

/* -errno as an int, or 0 when the answer is no negative int. */
static int error_of(PyObject *answer)
{
    if (answer == NULL || !PyLong_Check(answer))
        return 0;
    long value = PyLong_AsLong(answer);
    return value < 0 && value > -4096 ? (int)-value : 0;
}

/* Which pages of a layer's file the kernel was handed; HandedMarks of ramfs/store/behind.py. */
enum { CHUNK_SHIFT = 10 };
struct marks {
    uint64_t pages;  /* the address of a byte for each page, ... */
    uint64_t chunks; /* ... and of one for each chunk of them */
    uint64_t set;    /* grows when some are set */
};

/* Where the pages of a layer are; a row of Layers.places. */
struct place {
    uint64_t base;  /* the address at which page 0 would lie, 0 if not mapped */
    uint64_t limit; /* pages from 0 on that the mapping reaches */
    uint64_t marks; /* the address of a struct marks, 0 if nobody asks */
    int64_t shift;  /* page i is page i + shift of the file */
    uint64_t here;  /* the address of a byte for each page of the file, 0 while it is absent; 0 if all are here */
};

/* What a READ handler returns for a file: where its pages are. */
struct plan {
    Py_buffer entries; /* uint32 for each page of the range: its layer, 0 for zeros */
    Py_buffer places;  /* a struct place for each layer */
    long long offset, end;
};

enum { MOST_PAGES = (1 << 20) / PAGE + 2 };
static char zeros[1 << 20]; /* never written: .bss costs no memory */

/* The address of a page, after asking for its layer to be mapped if need be; NULL with *error set. */
static const char *address_of(const struct plan *plan, uint32_t layer, uint64_t page, int *error)
{
    const struct place *place = (const struct place *)plan->places.buf + layer;
    if (layer < plan->places.len / sizeof *place && place->base && page < place->limit)
        return (const char *)(uintptr_t)(place->base + page * PAGE);
    PyObject *answer = PyObject_CallFunction(handlers[ON_MAP], "IK", layer, (unsigned long long)page);
    unsigned long long address = answer != NULL && PyLong_Check(answer) ? PyLong_AsUnsignedLongLong(answer) : 0;
    *error = error_of(answer);
    if (*error == 0 && address == 0)
        *error = broken(ON_MAP, answer);
    PyErr_Clear();
    Py_XDECREF(answer);
    return *error ? NULL : (const char *)(uintptr_t)address;
}

/* Note that pages of a layer are handed to the kernel, which keeps them from now on. (One that was mapped for this
 * very request, into a larger table of places, is noted the next time.) */
static void mark(const struct plan *plan, uint32_t layer, uint64_t page, uint64_t run)
{
    const struct place *place = (const struct place *)plan->places.buf + layer;
    if (layer >= plan->places.len / sizeof *place || !place->marks || page + run > place->limit)
        return;
    struct marks *marks = (struct marks *)(uintptr_t)place->marks;
    uint64_t first = page + (uint64_t)place->shift, last = first + run - 1;
    memset((char *)(uintptr_t)(marks->pages + first), 1, run);
    memset((char *)(uintptr_t)(marks->chunks + (first >> CHUNK_SHIFT)), 1, (last >> CHUNK_SHIFT) - (first >> CHUNK_SHIFT) + 1);
    marks->set += run;
}

/* Have pages of a layer that is mapped arrived? (Of one that was mapped for this very request, into a larger table of
 * places, nothing is known here: then it is asked for anew.) */
static int is_here(const struct plan *plan, uint32_t layer, uint64_t page, uint64_t run)
{
    const struct place *place = (const struct place *)plan->places.buf + layer;
    if (layer >= plan->places.len / sizeof *place)
        return 0;
    return !place->here || !memchr((const char *)(uintptr_t)place->here + page + (uint64_t)place->shift, 0, run);
}

enum { NOT_HERE = -4096 }; /* beyond every -errno */

/* The pieces of memory that hold the range of a plan; returns their number, -errno, or NOT_HERE. */
static int gather(const struct plan *plan, struct iovec *iov)
{
    const uint32_t *entries = plan->entries.buf;
    uint64_t first = (uint64_t)plan->offset / PAGE, pages = plan->entries.len / sizeof *entries;
    int count = 0, error = 0;
    if (pages == 0 || pages > MOST_PAGES)
        return -EINVAL;
    for (uint64_t i = 0; i < pages;) {
        uint64_t run = 1;
        while (i + run < pages && entries[i + run] == entries[i])
            run++;
        long long low = (long long)((first + i) * PAGE), high = (long long)((first + i + run) * PAGE);
        long long start = low < plan->offset ? plan->offset : low, stop = high > plan->end ? plan->end : high;
        const char *at = zeros;
        if (stop - start > (long long)sizeof zeros)
            return -EINVAL;
        if (entries[i]) {
            /* the last page first: when it is mapped, so are those before it */
            at = address_of(plan, entries[i], first + i + run - 1, &error);
            if (at == NULL)
                return -error;
            if (!is_here(plan, entries[i], first + i, run))
                return NOT_HERE;
            at += start - (high - PAGE);
            mark(plan, entries[i], first + i, run);
        }
        iov[count].iov_base = (void *)at;
        iov[count++].iov_len = (size_t)(stop - start);
        i += run;
    }
    return count;
}

/* Have the pages of a reply in this process's page table. The kernel takes them from there even when the process was
 * just killed; what it must look for then makes it fail the request with EIO, which a guest would die of. */
static void populate(const struct iovec *iov, int count)
{
    for (int i = 0; i < count; i++) {
        uintptr_t start = (uintptr_t)iov[i].iov_base & -(uintptr_t)PAGE, end = (uintptr_t)iov[i].iov_base + iov[i].iov_len;
        if (iov[i].iov_base < (void *)zeros || iov[i].iov_base >= (void *)(zeros + sizeof zeros))
            madvise((void *)start, end - start, POPULATE_READ); /* before Linux 5.14 it does not know how */
    }
}

/* Answer a READ by -errno, bytes (or other memory) or a plan; or return NOT_HERE. */
static int send_read(fuse_req_t req, PyObject *answer)
{
    int error = error_of(answer), count = 0;
    struct iovec iov[MOST_PAGES];
    struct plan plan;
    Py_buffer memory;
    if (error)
        fuse_reply_err(req, error);
    else if (answer != NULL && PyObject_CheckBuffer(answer) && !PyObject_GetBuffer(answer, &memory, PyBUF_SIMPLE)) {
        fuse_reply_buf(req, memory.buf, (size_t)memory.len);
        PyBuffer_Release(&memory);
    } else if (answer == NULL || !PyTuple_Check(answer) ||
             !PyArg_ParseTuple(answer, "y*LLy*", &plan.entries, &plan.offset, &plan.end, &plan.places))
        fuse_reply_err(req, broken(ON_READ, answer));
    else {
        count = gather(&plan, iov);
        /* A page that the disk cannot read makes writev fail with EFAULT, and the kernel ends the request with EIO. */
        if (count >= 0) {
            populate(iov, count);
            fuse_reply_iov(req, iov, count);
        } else if (count != NOT_HERE)
            fuse_reply_err(req, -count);
        PyBuffer_Release(&plan.entries);
        PyBuffer_Release(&plan.places);
    }
    return count == NOT_HERE ? NOT_HERE : 0;
}

/* The request that is being answered, until later() takes it away. Then reply() answers it, by a token: a capsule of this
 * name, whose context is the operation. */
static struct {
    fuse_req_t req;
    int which;
    int taken; /* it was, and is not answered: a task of the loop has work */
} at_hand;
static const char waiting[] = "request", done_with[] = "answered request";

static void take_up(fuse_req_t req, int which)
{
    at_hand.req = req;
    at_hand.which = which;
}

/* Answer a request by the result of its operation or -errno. */
static void send_result(fuse_req_t req, int which, long long value)
{
    if (value < 0 || which == ON_FALLOCATE)
        fuse_reply_err(req, (int)-value);
    else if (which == ON_LSEEK)
        fuse_reply_lseek(req, value);
    else
        fuse_reply_write(req, (size_t)value);
}

/* Answer the request at hand by what its handler returned: a result or -errno; None if it took the request away. */
static void answer_at_hand(PyObject *answer)
{
    fuse_req_t req = at_hand.req;
    int which = at_hand.which;
    at_hand.req = NULL;
    if (req == NULL) {
        if (answer != Py_None)
            broken(which, answer);
    } else if (answer == NULL || !PyLong_Check(answer))
        send_result(req, which, -broken(which, answer));
    else
        send_result(req, which, PyLong_AsLongLong(answer));
    Py_XDECREF(answer);
}

/* Nobody can answer it any more: the kernel must not wait for ever. */
static void forget_request(PyObject *token)
{
    if (PyCapsule_IsValid(token, waiting))
        fuse_reply_err(PyCapsule_GetPointer(token, waiting), EIO);
}

static void on_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
    (void)ino;
    take_up(req, ON_READ);
    PyObject *answer = PyObject_CallFunction(handlers[ON_READ], "KLn", (unsigned long long)fi->fh, (long long)offset,
                                             (Py_ssize_t)size);
    if (at_hand.req == NULL) { /* it is answered later */
        answer_at_hand(answer);
        return;
    }
    at_hand.req = NULL;
    int sent = send_read(req, answer);
    Py_XDECREF(answer);
    if (sent == NOT_HERE) {
        take_up(req, ON_READ);
        answer_at_hand(PyObject_CallFunction(handlers[ON_ABSENT], "KLn", (unsigned long long)fi->fh, (long long)offset,
                                             (Py_ssize_t)size));
    }
}

static void on_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *bufv, off_t offset,
                         struct fuse_file_info *fi)
{
    size_t size = fuse_buf_size(bufv);
    void *copy = NULL, *data = bufv->buf[0].mem;
    (void)ino;
    if (bufv->count != 1 || bufv->buf[0].flags & FUSE_BUF_IS_FD) { /* spliced: not asked for, but allowed */
        struct fuse_bufvec flat = FUSE_BUFVEC_INIT(size);
        data = flat.buf[0].mem = copy = malloc(size);
        if (copy == NULL || fuse_buf_copy(&flat, bufv, 0) != (ssize_t)size) {
            free(copy);
            fuse_reply_err(req, EIO);
            return;
        }
    }
    /* libfuse does not tell whether the writer may keep the set-user-ID bit; the request does. */
    int kill = current != NULL && ((const struct fuse_write_in *)(current + 1))->write_flags & FUSE_WRITE_KILL_SUIDGID;
    PyObject *view = PyMemoryView_FromMemory(data, (Py_ssize_t)size, PyBUF_READ), *answer = NULL;
    take_up(req, ON_WRITE);
    if (view != NULL)
        answer = PyObject_CallFunction(handlers[ON_WRITE], "KLOi", (unsigned long long)fi->fh, (long long)offset, view,
                                       kill);
    answer_at_hand(answer);
    Py_XDECREF(view);
    free(copy);
}

static void on_copy_file_range(fuse_req_t req, fuse_ino_t from, off_t from_offset, struct fuse_file_info *from_fi,
                               fuse_ino_t to, off_t to_offset, struct fuse_file_info *to_fi, size_t length, int flags)
{
    (void)from;
    (void)to;
    take_up(req, ON_COPY);
    answer_at_hand(PyObject_CallFunction(handlers[ON_COPY], "KLKLni", (unsigned long long)from_fi->fh,
                                         (long long)from_offset, (unsigned long long)to_fi->fh, (long long)to_offset,
                                         (Py_ssize_t)length, flags));
}

static void on_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned cmd, void *arg, struct fuse_file_info *fi, unsigned flags,
                     const void *in, size_t in_size, size_t out_size)
{
    PyObject *answer = PyObject_CallFunction(handlers[ON_IOCTL], "KIy#n", (unsigned long long)ino, cmd, in ? in : "",
                                             (Py_ssize_t)in_size, (Py_ssize_t)out_size);
    int error = error_of(answer);
    (void)arg;
    (void)fi;
    (void)flags;
    if (error == 0 && (answer == NULL || !PyBytes_Check(answer) || (size_t)PyBytes_GET_SIZE(answer) > out_size))
        error = broken(ON_IOCTL, answer);
    if (error)
        fuse_reply_err(req, error);
    else
        fuse_reply_ioctl(req, 0, PyBytes_AS_STRING(answer), (size_t)PyBytes_GET_SIZE(answer));
    Py_XDECREF(answer);
}

static void on_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                         struct fuse_file_info *fi)
{
    (void)ino;
    take_up(req, ON_FALLOCATE);
    answer_at_hand(PyObject_CallFunction(handlers[ON_FALLOCATE], "KiLLI", (unsigned long long)fi->fh, mode,
                                         (long long)offset, (long long)length, fuse_req_ctx(req)->uid));
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *fi)
{
    (void)ino;
    take_up(req, ON_LSEEK);
    answer_at_hand(PyObject_CallFunction(handlers[ON_LSEEK], "KLi", (unsigned long long)fi->fh, (long long)offset,
                                         whence));
}

static void on_init(void *userdata, struct fuse_conn_info *conn)
{
    theirs.init(userdata, conn);
    conn->max_background = max_background;
    conn->congestion_threshold = max_background - max_background / 4;
    if (conn->max_readahead > max_readahead)
        conn->max_readahead = max_readahead;
    if (conn->max_write > max_write)
        conn->max_write = max_write;
    /* A changed mtime must not drop the cache of a mapped guest; only this mount changes its files. */
    conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
    conn->want |= conn->capable & FUSE_CAP_EXPLICIT_INVAL_DATA;
    /* Written bytes are looked at (zero pages), so a pipe would only be one more copy. */
    conn->want &= ~FUSE_CAP_SPLICE_READ;
    negotiated = *conn;
}

static int make_inbox(void);

static int resolve(void)
{
    void *fuse = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_NOLOAD);
    if (fuse == NULL)
        return -1;
    real_session_new = dlsym(fuse, "fuse_session_new");
    real_receive_buf = dlsym(fuse, "fuse_session_receive_buf");
    real_process_buf = dlsym(fuse, "fuse_session_process_buf");
    real_reply_open = dlsym(fuse, "fuse_reply_open");
    real_reply_create = dlsym(fuse, "fuse_reply_create");
    return real_session_new && real_receive_buf && real_process_buf && real_reply_open && real_reply_create ? make_inbox()
                                                                                                            : -1;
}

__attribute__((visibility("default"))) struct fuse_session *
fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size, void *userdata)
{
    struct fuse_lowlevel_ops ops;
    if (op_size > sizeof ops) /* pyfuse3 was built for a newer libfuse than this file */
        return NULL;
    memset(&ops, 0, sizeof ops);
    memcpy(&ops, op, op_size);
    theirs = ops;
    ops.init = on_init;
    if (handlers[ON_READ])
        ops.read = on_read;
    if (handlers[ON_WRITE])
        ops.write_buf = on_write_buf;
    if (handlers[ON_COPY])
        ops.copy_file_range = on_copy_file_range;
    if (handlers[ON_IOCTL])
        ops.ioctl = on_ioctl;
    if (handlers[ON_FALLOCATE])
        ops.fallocate = on_fallocate;
    if (handlers[ON_LSEEK])
        ops.lseek = on_lseek;
    session = real_session_new(args, &ops, sizeof ops, userdata);
    return session;
}

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* INIT came, from the kernel or by py_replay_init. */
static void note_init(const struct fuse_in_header *request)
{
    const struct fuse_init_in *init = (const void *)(request + 1);
    memmove(init_request, request, request->len);
    uint32_t flags2 = request->len >= sizeof *request + sizeof *init && init->flags & INIT_EXT ? init->flags2 : 0;
    offered = !!(flags2 & PASSTHROUGH);
    direct_mmap_offered = !!(flags2 & DIRECT_IO_ALLOW_MMAP);
    initialising = 1;
}

/* Remember of a request what handlers may ask for. */
static void note(const struct fuse_in_header *request)
{
    unique = request->unique | (again ? 1ULL << 63 : 0); /* as the kernel marks those that it sends again */
    if (request->opcode == FUSE_SETXATTR)
        xattr_flags = ((const struct fuse_setxattr_in *)(request + 1))->flags;
    if (request->opcode == FUSE_INIT && request->len <= sizeof init_request)
        note_init(request);
}

static int answers(uint32_t opcode)
{
    return (opcode == FUSE_READ && handlers[ON_READ]) || (opcode == FUSE_WRITE && handlers[ON_WRITE]);
}

/* The handler of a request that libfuse does not know; NULL if it is none of ours either. */
static PyObject *raw_handler(uint32_t opcode)
{
    PyObject *key = handlers[ON_RAW] ? PyLong_FromUnsignedLong(opcode) : NULL;
    PyObject *handler = key ? PyDict_GetItemWithError(handlers[ON_RAW], key) : NULL; /* borrowed */
    PyErr_Clear();
    Py_XDECREF(key);
    return handler;
}

static void answer_raw(const struct fuse_in_header *in, PyObject *handler)
{
    PyObject *answer = PyObject_CallFunction(handler, "Ky#", (unsigned long long)in->nodeid, (const char *)(in + 1),
                                             (Py_ssize_t)(in->len - sizeof *in));
    struct fuse_out_header out = {.unique = in->unique, .error = -error_of(answer)};
    struct iovec iov[2] = {{.iov_base = &out, .iov_len = sizeof out}};
    if (out.error == 0 && (answer == NULL || !PyBytes_Check(answer)))
        out.error = -broken(ON_RAW, answer);
    if (out.error == 0) {
        iov[1].iov_base = PyBytes_AS_STRING(answer);
        iov[1].iov_len = (size_t)PyBytes_GET_SIZE(answer);
    }
    out.len = (uint32_t)(iov[0].iov_len + iov[1].iov_len);
    /* As with libfuse's own replies, one that fails has nobody left who waits for it. */
    (void)!reply_writev(fuse_session_fd(session), iov, out.error ? 1 : 2, NULL);
    Py_XDECREF(answer);
}

/* libfuse does not know FUSE_TMPFILE either, but its request and its reply are those of FUSE_CREATE. The name tells
 * them apart: the kernel calls a file without a name "/", which is no name. */
static void translate(struct fuse_in_header *in)
{
    const char *name = (const char *)(in + 1) + sizeof(struct fuse_create_in);
    if (in->opcode == FUSE_TMPFILE && in->len >= sizeof *in + sizeof(struct fuse_create_in) + 2 && !memcmp(name, "/", 2))
        in->opcode = FUSE_CREATE;
}

/* Where requests are read to. It is there before the first one: the kernel fails a request with EIO if the daemon is
 * killed while the kernel has to bring in memory to copy it to. */
static struct fuse_buf inbox;
enum { INBOX = (1 << 20) + PAGE }; /* libfuse's own size: the largest WRITE and its header */

static int make_inbox(void)
{
    void *memory = mmap(NULL, INBOX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    inbox.mem = memory == MAP_FAILED ? NULL : memory;
    return inbox.mem ? 0 : -1;
}

/* Give a request to pyfuse3, in memory that pyfuse3 frees. */
static int hand_out(struct fuse_buf *buf, int length)
{
    void *memory = realloc(buf->mem, (size_t)length);
    if (memory == NULL)
        return -ENOMEM;
    buf->mem = memcpy(memory, inbox.mem, (size_t)length);
    buf->size = (size_t)length;
    buf->flags = 0;
    return length;
}

/* For how many ms the loop can be left waiting, at most; 0 if one of its tasks can run. */
static int pause_ms(void)
{
    if (loop_fd < 0)
        return 0;
    PyObject *answer = PyObject_CallNoArgs(handlers[ON_PAUSE]);
    long most = answer != NULL && PyLong_Check(answer) ? PyLong_AsLong(answer) : (broken(ON_PAUSE, answer), 0);
    Py_XDECREF(answer);
    return (int)most;
}

/* Sleep until there is a request or something for the loop to do, as the loop would, but without its turn, which costs
 * more than most requests. Returns whether it may be a request. */
static int doze(void)
{
    struct pollfd fds[2] = {{.fd = fuse_session_fd(session), .events = POLLIN}, {.fd = loop_fd, .events = POLLIN}};
    int most = pause_ms();
    int ready = 0;
    if (most > 0) {
        Py_BEGIN_ALLOW_THREADS
        ready = poll(fds, 2, most);
        Py_END_ALLOW_THREADS
    }
    return ready > 0 && !fds[1].revents;
}

/* Has the loop something to do? Now and then it is not asked: what pause tells is no promise. */
static int loop_is_wanted(void)
{
    enum { NOT_ASKED = 16 };
    static unsigned asked;
    struct pollfd fd = {.fd = loop_fd, .events = POLLIN};
    return ++asked % NOT_ASKED == 0 || pause_ms() == 0 || poll(&fd, 1, 0) != 0;
}

/* Read the request that comes after one that was just answered, if it comes soon; else -EAGAIN.
 *
 * A client on another core is at its next fault before this thread could sleep and be woken, so it is looked for without
 * sleeping. One on this core cannot fault while we look. Nobody tells which it is; but there to look is always in vain. */
static int receive_next(struct fuse_session *se, long long done, int close_together)
{
    enum { IN_A_ROW = 3, TRY_AGAIN = 512 };
    static unsigned in_vain, left_out;
    int res = -EAGAIN;
    if (close_together && (in_vain < IN_A_ROW || ++left_out % TRY_AGAIN == 0)) {
        do
            res = real_receive_buf(se, &inbox);
        while (res == -EAGAIN && now_ns() < done + spin_ns);
        in_vain = res == -EAGAIN ? in_vain + 1 : 0;
    }
    return res == -EAGAIN && doze() ? real_receive_buf(se, &inbox) : res;
}

__attribute__((visibility("default"))) int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
    static int close_together;
    static long long done; /* when the last request was answered */
    if (se != session)
        return real_receive_buf(se, buf);
    for (long long begun = 0;;) {
        int res = real_receive_buf(se, &inbox);
        if (res == -EAGAIN && begun)
            res = receive_next(se, done, close_together);
        if (res == -EAGAIN) /* the descriptor does not block; pyfuse3 waits again after EINTR */
            return -EINTR;
        if (res <= 0)
            return res;
        struct fuse_in_header *in = inbox.mem;
        PyObject *raw = NULL;
        note(in);
        if (!answers(in->opcode) && !(raw = raw_handler(in->opcode))) {
            translate(in);
            return hand_out(buf, res);
        }
        /* Look for the next one only while they come close together, or an idle guest would cost a core. */
        long long now = now_ns();
        close_together = spin_ns && now - done < 2 * spin_ns;
        if (!begun)
            begun = now;
        current = in;
        at_hand.taken = 0;
        if (raw)
            answer_raw(in, raw);
        else
            real_process_buf(se, &inbox);
        current = NULL;
        answered++;
        done = now_ns();
        if (at_hand.taken)
            return -EINTR;
        if (done - begun > turn_ns) {
            if (loop_is_wanted())
                return -EINTR;
            begun = done;
        }
    }
}

__attribute__((visibility("default"))) int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
    opening = fi->fh == marked.fh;
    int res = real_reply_open(req, fi);
    opening = 0;
    return res;
}

__attribute__((visibility("default"))) int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *entry,
                                                             const struct fuse_file_info *fi)
{
    opening = fi->fh == marked.fh;
    int res = real_reply_create(req, entry, fi);
    opening = 0;
    return res;
}

static PyObject *py_mark_open(PyObject *self, PyObject *args)
{
    unsigned long long fh;
    (void)self;
    if (!PyArg_ParseTuple(args, "KIi", &fh, &marked.flags, &marked.backing))
        return NULL;
    marked.fh = fh;
    Py_RETURN_NONE;
}

/* Answer a request that was taken away. False, and it can still be answered, for a READ whose plan names what is absent. */
static PyObject *py_reply(PyObject *self, PyObject *args)
{
    PyObject *token, *answer;
    fuse_req_t req;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &token, &answer))
        return NULL;
    if ((req = PyCapsule_GetPointer(token, waiting)) == NULL)
        return NULL;
    intptr_t which = (intptr_t)PyCapsule_GetContext(token);
    if (which == ON_READ) {
        if (send_read(req, answer) == NOT_HERE)
            Py_RETURN_FALSE;
    } else {
        long long value = PyLong_AsLongLong(answer);
        if (value == -1 && PyErr_Occurred())
            return NULL;
        send_result(req, (int)which, value);
    }
    PyCapsule_SetName(token, done_with);
    at_hand.taken = 0;
    Py_RETURN_TRUE;
}

static PyObject *py_watch_loop(PyObject *self, PyObject *args)
{
    PyObject *pause;
    (void)self;
    if (!PyArg_ParseTuple(args, "iO", &loop_fd, &pause))
        return NULL;
    Py_INCREF(pause);
    Py_XSETREF(handlers[ON_PAUSE], pause);
    Py_RETURN_NONE;
}

static PyObject *py_later(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    if (at_hand.req == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "no request is at hand that can be answered later");
        return NULL;
    }
    PyObject *token = PyCapsule_New(at_hand.req, waiting, forget_request);
    if (token == NULL)
        return NULL;
    PyCapsule_SetContext(token, (void *)(intptr_t)at_hand.which);
    at_hand.req = NULL;
    at_hand.taken = 1;
    return token;
}

static PyObject *py_asker(PyObject *self, PyObject *token)
{
    fuse_req_t req = PyCapsule_GetPointer(token, waiting);
    (void)self;
    return req == NULL ? NULL : PyLong_FromLong(fuse_req_ctx(req)->pid);
}

static PyObject *py_unique(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    return PyLong_FromUnsignedLongLong(unique);
}

static PyObject *py_install(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"read", "map_layer", "absent", "write", "copy_file_range", "ioctl", "raw", "fallocate",
                            "lseek", "max_background", "max_readahead", "max_write", "spin_ns", "passthrough", "direct_mmap",
                            NULL};
    PyObject *given[ON_PAUSE] = {NULL};
    (void)self;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$OOOOOOO!OOIIIlpp", names, &given[ON_READ], &given[ON_MAP],
                                     &given[ON_ABSENT], &given[ON_WRITE], &given[ON_COPY], &given[ON_IOCTL],
                                     &PyDict_Type, &given[ON_RAW], &given[ON_FALLOCATE], &given[ON_LSEEK],
                                     &max_background, &max_readahead, &max_write, &spin_ns, &want_passthrough,
                                     &want_direct_mmap))
        return NULL;
    for (size_t i = 0; i < sizeof zeros; i += PAGE)
        (void)*(volatile char *)(zeros + i); /* see populate() */
    for (int i = 0; i < ON_PAUSE; i++) {
        Py_INCREF(given[i]);
        Py_XSETREF(handlers[i], given[i]);
    }
    Py_RETURN_NONE;
}

/* Replies on their way to the kernel. INIT: the kernel asks for the attribute security.capability before every
 * write(2) unless the server promises to drop privileges itself, for which libfuse 3.14 has no word; nor has it
 * one for files that the kernel reads from the store without us. OPEN and CREATE: see mark_open. */
static ssize_t reply_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    (void)userdata;
    if (opening && count >= 2 && iov[1].iov_len >= sizeof(struct fuse_open_out)) { /* the last part, also of CREATE's */
        struct fuse_open_out *out =
            (struct fuse_open_out *)((char *)iov[1].iov_base + iov[1].iov_len - sizeof(struct fuse_open_out));
        out->open_flags |= marked.flags;
        out->padding = (uint32_t)marked.backing; /* its name before Linux 6.9 */
    }
    if (initialising && count >= 2 && iov[1].iov_len == sizeof(struct fuse_init_out)) {
        struct fuse_init_out *out = iov[1].iov_base;
        if (out->major == FUSE_KERNEL_VERSION) {
            out->flags |= FUSE_HANDLE_KILLPRIV_V2;
            if (want_direct_mmap && direct_mmap_offered) {
                out->flags |= INIT_EXT;
                out->flags2 |= DIRECT_IO_ALLOW_MMAP;
            }
            if (want_passthrough && offered) {
                out->flags |= INIT_EXT;
                out->flags2 |= PASSTHROUGH;
                out->unused[STACK_DEPTH] = 1; /* their file system may not be stacked itself; one may stand on ours */
                passthrough = 1;
            }
            initialising = 0;
        }
    }
    if (replaying) {
        ssize_t length = 0;
        for (int i = 0; i < count; i++)
            length += (ssize_t)iov[i].iov_len;
        return length;
    }
    return mirror.buf ? mirror_writev(fd, iov, count) : writev(fd, iov, count);
}

static ssize_t request_read(int fd, void *buffer, size_t size, void *userdata)
{
    (void)userdata;
    if (size > INBOX)
        size = INBOX;
    return mirror.buf ? mirror_read(fd, buffer, size, &again) : read(fd, buffer, size);
}

static PyObject *py_edit_init(PyObject *self, PyObject *none)
{
    static const struct fuse_custom_io io = {.writev = reply_writev, .read = request_read};
    (void)self;
    (void)none;
    return PyLong_FromLong(session == NULL ? -EINVAL
                                           : fuse_session_custom_io(session, &io, fuse_session_fd(session)));
}

static PyObject *py_init_request(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    return PyBytes_FromStringAndSize(init_request, ((const struct fuse_in_header *)init_request)->len);
}

/* INIT comes once for a connection. Where another daemon got it, libfuse gets it again from here, to settle the same;
 * the kernel, which has its reply, gets none. */
static PyObject *py_replay_init(PyObject *self, PyObject *args)
{
    Py_buffer request;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*", &request))
        return NULL;
    if (session != NULL && request.len >= (Py_ssize_t)sizeof(struct fuse_in_header) &&
        request.len <= (Py_ssize_t)sizeof init_request &&
        ((const struct fuse_in_header *)request.buf)->len == request.len) {
        memcpy(init_request, request.buf, (size_t)request.len);
        note_init((const struct fuse_in_header *)init_request);
        struct fuse_buf buf = {.mem = init_request, .size = (size_t)request.len};
        replaying = 1;
        real_process_buf(session, &buf);
        replaying = 0;
    }
    PyBuffer_Release(&request);
    Py_RETURN_NONE;
}

/* Ask the kernel for the requests again that were read and not answered. Returns 0 or -errno; -EINVAL before 6.9. */
static PyObject *py_resend(PyObject *self, PyObject *none)
{
    enum { NOTIFY_RESEND = 7 };
    struct fuse_out_header out = {.len = sizeof out, .error = NOTIFY_RESEND};
    (void)self;
    (void)none;
    ssize_t written = session == NULL ? -1 : write(fuse_session_fd(session), &out, sizeof out);
    return PyLong_FromLong(written == (ssize_t)sizeof out ? 0 : session == NULL ? -EINVAL : -errno);
}

static PyObject *py_resends(PyObject *self, PyObject *none)
{
    enum { HAS_RESEND = 1 << 7 /* of flags2 */ };
    const struct fuse_in_header *request = (const void *)init_request;
    const struct fuse_init_in *init = (const void *)(request + 1);
    (void)self;
    (void)none;
    return PyBool_FromLong(request->len >= sizeof *request + sizeof *init && init->flags & INIT_EXT &&
                           init->flags2 & HAS_RESEND);
}

static PyObject *py_mirror(PyObject *self, PyObject *args)
{
    Py_buffer memory;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*", &memory))
        return NULL;
    if (mirror.buf)
        PyBuffer_Release(&mirror);
    mirror = memory; /* as long as there is a session */
    return PyLong_FromUnsignedLong(mirror_start(mirror.buf, (size_t)mirror.len, fuse_session_fd(session)));
}

static PyObject *py_xattr_flags(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    return PyLong_FromUnsignedLong(xattr_flags);
}

static PyObject *py_session_fd(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    return PyLong_FromLong(session == NULL ? -1 : fuse_session_fd(session));
}

static PyObject *py_connection(PyObject *self, PyObject *none)
{
    (void)self;
    (void)none;
    return Py_BuildValue("{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:K,s:K,s:i}", "proto_major", negotiated.proto_major, "proto_minor",
                         negotiated.proto_minor, "max_background", negotiated.max_background, "max_readahead",
                         negotiated.max_readahead, "max_write", negotiated.max_write, "capable", negotiated.capable,
                         "want", negotiated.want, "answered", answered, "unkept",
                         mirror_unkept(), "passthrough", passthrough);
}

static PyMethodDef methods[] = {
    {"install", (PyCFunction)(void (*)(void))py_install, METH_VARARGS | METH_KEYWORDS,
     "Set the handlers and the limits that fuse_session_new and INIT will use."},
    {"mark_open", py_mark_open, METH_VARARGS,
     "The reply that gives the kernel handle fh next bears these FOPEN_ flags too, and a backing id (0: none)."},
    {"watch_loop", py_watch_loop, METH_VARARGS,
     "From now on wait for requests in the loop's stead, for as many ms as a function says, or until its descriptor is readable."},
    {"reply", py_reply, METH_VARARGS,
     "Answer the request of a token by its result or -errno. False, and not yet answered, if pages of it are absent."},
    {"later", py_later, METH_NOARGS,
     "A token for the request under way, of those whose handler may return None, as it then does."},
    {"asker", py_asker, METH_O, "The id of the thread that the request of a token is from, 0 if it has none here."},
    {"unique", py_unique, METH_NOARGS, "The number of the request under way: ask at a handler's start."},
    {"xattr_flags", py_xattr_flags, METH_NOARGS, "XATTR_CREATE or XATTR_REPLACE of a SETXATTR: ask at its handler's start."},
    {"init_request", py_init_request, METH_NOARGS, "The kernel's INIT request, empty before it came."},
    {"replay_init", py_replay_init, METH_VARARGS, "Let libfuse have the INIT request of a connection that is taken over."},
    {"resends", py_resends, METH_NOARGS, "Whether the kernel can be asked for unanswered requests, as its INIT says."},
    {"mirror", py_mirror, METH_VARARGS,
     "Keep unanswered requests in this memory from now on; returns how many the daemon before left there."},
    {"resend", py_resend, METH_NOARGS, "Ask for the unanswered requests of the daemon before; 0 or -errno."},
    {"session_fd", py_session_fd, METH_NOARGS, "The descriptor of the session that pyfuse3 made, -1 if it made none here."},
    {"edit_init", py_edit_init, METH_NOARGS, "Complete the INIT reply; call after pyfuse3.init. Returns 0 or -errno."},
    {"connection", py_connection, METH_NOARGS, "What INIT settled, and how many requests were answered at once."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "Completes pyfuse3.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    if (fuse_version() < 313 || resolve()) {
        PyErr_Format(PyExc_ImportError, "libfuse %s lacks what ramfs needs (3.13 or newer, with the low-level API of 3.x)",
                     fuse_pkgversion());
        return NULL;
    }
    PyObject *made = PyModule_Create(&module);
    if (made == NULL || PyModule_AddIntMacro(made, FS_IOC_GETFLAGS) || PyModule_AddIntMacro(made, FS_IOC_SETFLAGS) ||
        PyModule_AddIntMacro(made, FS_IOC_FSGETXATTR) || PyModule_AddIntMacro(made, FS_IOC_FSSETXATTR) ||
        PyModule_AddIntMacro(made, FS_IMMUTABLE_FL) || PyModule_AddIntMacro(made, FS_XFLAG_IMMUTABLE))
        Py_CLEAR(made);
    return made;
}
