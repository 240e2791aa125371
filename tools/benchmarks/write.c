/* write FILE SIZE CHUNK SEED: overwrite FILE in order with write(2), CHUNK bytes a call, then fsync.
   The data is random and differs from page to page. Prints JSON, in seconds. */
#include "probe.h"

#define POOL (16UL << 20)

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    size_t size = strtoull(argv[2], NULL, 0), chunk = strtoull(argv[3], NULL, 0);
    uint64_t state = seeded(argv[4]);
    char *pool = aligned_alloc(PAGE, POOL);
    random_bytes(pool, POOL, &state);
    int fd = open(argv[1], O_RDWR);
    if (fd < 0)
        die(argv[1]);
    uint64_t before = now_ns();
    for (size_t at = 0; at < size; at += chunk) {
        char *from = pool + at % POOL;
        for (size_t i = 0; i < chunk / PAGE; i++)
            stamp(from + i * PAGE, at / PAGE + i);
        write_all(fd, from, chunk, at);
    }
    uint64_t written = now_ns();
    if (fsync(fd))
        die("fsync");
    printf("{\"write\": %.6f, \"fsync\": %.6f}\n", (written - before) / 1e9, (now_ns() - written) / 1e9);
    return close(fd) ? 1 : 0;
}
