/* uffd FILE SIZE ORDER STEP THREADS SEED CPU

   What touch does, in anonymous memory whose faults a process of its own answers from FILE, as the example handler of
   Firecracker does for a snapshot: it gets the userfaultfd over a Unix socket, maps the memory file, and copies a page for
   each fault. CPU: the one that it runs on, -1 for any. Prints JSON. */
#include "touching.h"
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>

struct layout { /* what goes with the descriptor */
    uint64_t base, size;
};

static void hand_over(int socket, int uffd, struct layout layout) {
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(sizeof uffd)];
    } control = {.head = {CMSG_LEN(sizeof uffd), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.head), &uffd, sizeof uffd);
    struct iovec iov = {&layout, sizeof layout};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(socket, &message, 0) != sizeof layout)
        die("sendmsg");
}

static int take(int socket, struct layout *layout) {
    int uffd;
    char control[CMSG_SPACE(sizeof uffd)] __attribute__((aligned(8)));
    struct iovec iov = {layout, sizeof *layout};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    if (recvmsg(socket, &message, 0) != sizeof *layout)
        die("recvmsg");
    memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof uffd);
    return uffd;
}

static void handle(int socket, const char *path, int cpu) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (int i = 0; i < CPU_SETSIZE; i++) /* the probe may be pinned, and this its child */
        if (cpu < 0 || i == cpu)
            CPU_SET(i, &cpus);
    if (sched_setaffinity(0, sizeof cpus, &cpus))
        die("sched_setaffinity");
    struct layout layout;
    int uffd = take(socket, &layout), fd = open(path, O_RDONLY);
    char *memory = fd < 0 ? MAP_FAILED : mmap(NULL, layout.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED)
        die(path);
    if (write(socket, "", 1) != 1)
        die("write");
    struct pollfd ready = {uffd, POLLIN, 0};
    for (;;) {
        struct uffd_msg message;
        if (poll(&ready, 1, -1) < 0)
            die("poll");
        if (read(uffd, &message, sizeof message) != sizeof message) {
            if (errno == EAGAIN)
                continue;
            die("read");
        }
        uint64_t at = message.arg.pagefault.address & ~(PAGE - 1);
        struct uffdio_copy copy = {.dst = at, .src = (uint64_t)(memory + (at - layout.base)), .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
            die("UFFDIO_COPY");
    }
}

int main(int argc, char **argv) {
    if (argc != 8)
        return 2;
    size_t size = strtoull(argv[2], NULL, 0);
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        die("socketpair");
    pid_t handler = fork();
    if (handler < 0)
        die("fork");
    if (!handler)
        handle(pair[1], argv[1], atoi(argv[7]));
    base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register all = {.range = {(uint64_t)base, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (base == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &all))
        die("userfaultfd");
    hand_over(pair[0], uffd, (struct layout){(uint64_t)base, size});
    char byte;
    close(pair[1]); /* so that read ends when the handler does */
    if (read(pair[0], &byte, 1) != 1)
        return 1;
    seed = seeded(argv[6]);
    size_t count = choose(size / PAGE, strtoull(argv[4], NULL, 0), !strcmp(argv[3], "random"));
    report(touch(count, atoi(argv[5])), 0, 0);
    return kill(handler, SIGKILL);
}
