/* fill FILE SIZE runs RUN STRIDE SEED: make FILE of SIZE bytes, RUN bytes of data at every STRIDE.
   fill FILE SIZE pages COUNT SEED:     write COUNT pages, each in another random place. */
#include "probe.h"

static char buffer[1 << 20];

static void fresh(size_t bytes, uint64_t first, uint64_t *state) {
    random_bytes(buffer, bytes, state);
    for (size_t i = 0; i < bytes / PAGE; i++)
        stamp(buffer + i * PAGE, first + i);
}

int main(int argc, char **argv) {
    if (argc < 6)
        return 2;
    size_t size = strtoull(argv[2], NULL, 0), amount = strtoull(argv[4], NULL, 0);
    uint64_t state = seeded(argv[argc - 1]);
    int fd = open(argv[1], O_RDWR | O_CREAT, 0644);
    if (fd < 0)
        die(argv[1]);
    if (!strcmp(argv[3], "runs")) {
        size_t stride = strtoull(argv[5], NULL, 0);
        if (ftruncate(fd, size))
            die("ftruncate");
        for (size_t at = 0; at < size; at += stride)
            for (size_t done = 0; done < amount;) {
                size_t part = amount - done < sizeof buffer ? amount - done : sizeof buffer;
                fresh(part, (at + done) / PAGE, &state);
                write_all(fd, buffer, part, at + done);
                done += part;
            }
    } else {
        size_t pages = size / PAGE;
        uint32_t *order = malloc(pages * sizeof *order);
        for (size_t i = 0; i < pages; i++)
            order[i] = i;
        shuffle(order, pages, &state);
        for (size_t i = 0; i < amount; i++) {
            fresh(PAGE, order[i], &state);
            write_all(fd, buffer, PAGE, (off_t)order[i] * PAGE);
        }
    }
    return close(fd) ? 1 : 0;
}
