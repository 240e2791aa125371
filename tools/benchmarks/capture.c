/* What ramfs capture is measured by.

   hold FILE SIZE RUN STRIDE SEED: maps FILE privately and stores into RUN bytes at every STRIDE; prints the address,
   then waits until its standard input ends.
   copy PID ADDRESS SIZE FILE: the same work by hand, for one mapping: finds the pages that the process has of its own,
   reads them and writes them to FILE one behind the other. Prints JSON. */
#include "probe.h"
#include <inttypes.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

struct region {
    uint64_t start, end, categories;
};
struct scan { /* struct pm_scan_arg, Linux 6.7 */
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, all, any, told;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct scan)
#define IS_FILE 4
#define IS_PRESENT 8
#define IS_SWAPPED 16
#define REGIONS 1024
#define BUFFER (8UL << 20)

static int hold(char **argv) {
    size_t size = strtoull(argv[1], NULL, 0), run = strtoull(argv[2], NULL, 0), stride = strtoull(argv[3], NULL, 0);
    uint64_t state = seeded(argv[4]);
    int fd = open(argv[0], O_RDONLY);
    if (fd < 0)
        die(argv[0]);
    char *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (base == MAP_FAILED)
        die("mmap");
    for (size_t at = 0; at + run <= size; at += stride)
        random_bytes(base + at, run, &state);
    printf("%" PRIuPTR "\n", (uintptr_t)base);
    fflush(stdout);
    char byte;
    return read(0, &byte, 1) < 0;
}

static int copy(char **argv) {
    uint64_t begun = now_ns();
    pid_t pid = atoi(argv[0]);
    uint64_t at = strtoull(argv[1], NULL, 0), end = at + strtoull(argv[2], NULL, 0), done = 0;
    char path[64], *buffer = mmap(NULL, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    snprintf(path, sizeof path, "/proc/%d/pagemap", pid);
    int pagemap = open(path, O_RDONLY), out = open(argv[3], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (pagemap < 0 || out < 0 || buffer == MAP_FAILED)
        die("open");
    static struct region regions[REGIONS];
    while (at < end) {
        struct scan scan = {.size = sizeof scan, .start = at, .end = end, .vec = (uintptr_t)regions, .vec_len = REGIONS,
                            .max_pages = BUFFER / PAGE, .inverted = IS_FILE, .all = IS_FILE,
                            .any = IS_PRESENT | IS_SWAPPED};
        int count = ioctl(pagemap, PAGEMAP_SCAN, &scan);
        if (count < 0)
            die("PAGEMAP_SCAN");
        struct iovec there[REGIONS], here = {buffer, 0};
        for (int i = 0; i < count; i++) {
            there[i] = (struct iovec){(void *)regions[i].start, regions[i].end - regions[i].start};
            here.iov_len += there[i].iov_len;
        }
        if (count && process_vm_readv(pid, &here, 1, there, count, 0) != (ssize_t)here.iov_len)
            die("process_vm_readv");
        write_all(out, buffer, here.iov_len, done);
        done += here.iov_len;
        /* Where it stopped for want of room; else the number may be an older one. */
        at = count == REGIONS || here.iov_len == BUFFER ? scan.walk_end : end;
    }
    if (fsync(out))
        die("fsync");
    printf("{\"seconds\": %.6f, \"bytes\": %" PRIu64 "}\n", (now_ns() - begun) / 1e9, done);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 7 && !strcmp(argv[1], "hold"))
        return hold(argv + 2);
    if (argc == 6 && !strcmp(argv[1], "copy"))
        return copy(argv + 2);
    return 2;
}
