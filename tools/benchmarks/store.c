/* store FILE SIZE SEED: the rates of stores into a MAP_SHARED mapping that is resident.

   "words": every 8-byte word in order, as a guest that clears or copies memory;
   "pages": one word of each page in random order, as a guest with a large working set.
   Each once with all pages dirty already, and once after msync(MS_SYNC), when the first
   store to a page has to make it writable again. Prints JSON, in seconds. */
#include "probe.h"

static char *base;
static size_t size;
static uint32_t *order;

static double words(uint64_t value) {
    uint64_t before = now_ns(), *word = (uint64_t *)base, *end = (uint64_t *)(base + size);
    for (; word < end; word++)
        *word = value++;
    __asm__ volatile("" ::: "memory");
    return (now_ns() - before) / 1e9;
}

static double pages(uint64_t value) {
    uint64_t before = now_ns();
    for (size_t i = 0; i < size / PAGE; i++)
        *(uint64_t *)(base + order[i] * PAGE) = value++;
    __asm__ volatile("" ::: "memory");
    return (now_ns() - before) / 1e9;
}

static void flush(void) {
    if (msync(base, size, MS_SYNC))
        die("msync");
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    size = strtoull(argv[2], NULL, 0);
    uint64_t state = seeded(argv[3]);
    int fd = open(argv[1], O_RDWR);
    if (fd < 0)
        die(argv[1]);
    base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        die("mmap");
    order = malloc(size / PAGE * sizeof *order);
    for (size_t i = 0; i < size / PAGE; i++)
        order[i] = i;
    shuffle(order, size / PAGE, &state);

    pages(state); /* faults every page in and makes it dirty */
    double words_dirty = words(state + 1), pages_dirty = pages(state + 2);
    flush();
    double words_flushed = words(state + 3);
    uint64_t before = now_ns();
    flush();
    double msync_all = (now_ns() - before) / 1e9;
    double pages_flushed = pages(state + 4);
    printf("{\"words_dirty\": %.6f, \"pages_dirty\": %.6f, \"words_flushed\": %.6f, \"msync\": %.6f,"
           " \"pages_flushed\": %.6f}\n",
           words_dirty, pages_dirty, words_flushed, msync_all, pages_flushed);
}
