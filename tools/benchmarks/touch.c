/* touch FILE SIZE ORDER STEP ACCESS ADVICE THREADS SEED

   Maps FILE (MAP_SHARED) with none of it in the page cache, and touches one page in
   every STEP pages. ORDER: random (a random page of each step, steps shuffled) or
   sequential. ACCESS: read or write; private or cow, which are the same in a private mapping
   of a file that is open for reading only, as a dense clone has its template.
   ADVICE: none, random, huge. Prints JSON.

   In random order with STEP 16 no touch lies in the 64 KiB that an earlier one mapped
   around itself, so each is a fault, on tmpfs too. The file is opened once and its size
   is not asked for: qemu-storage-daemon drops what is cached when it is opened again. */
#include "probe.h"
#include <pthread.h>

static char *base;
static uint32_t *order, *taken;
static int writing, each;
static uint64_t seed;
static pthread_barrier_t ready;

struct slice {
    pthread_t thread;
    size_t from, to;
    uint64_t zeros, wrong, begun, ended;
};

static void *work(void *argument) {
    struct slice *s = argument;
    pthread_barrier_wait(&ready);
    uint64_t before = s->begun = now_ns();
    for (size_t i = s->from; i < s->to; i++) {
        volatile uint64_t *page = (uint64_t *)(base + order[i] * PAGE);
        if (writing) {
            page[1] = seed + i;
        } else {
            uint64_t seen = page[0];
            s->zeros += seen == 0;
            s->wrong += seen != 0 && seen != order[i] + 1UL;
        }
        if (each) {
            uint64_t after = now_ns();
            taken[i] = after - before;
            before = after;
        }
    }
    s->ended = now_ns();
    return NULL;
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv) {
    if (argc != 9)
        return 2;
    size_t size = strtoull(argv[2], NULL, 0), pages = size / PAGE;
    int shuffled = !strcmp(argv[3], "random");
    size_t step = strtoull(argv[4], NULL, 0), count = pages / step;
    int private = !strcmp(argv[5], "private") || !strcmp(argv[5], "cow");
    writing = !strcmp(argv[5], "write") || !strcmp(argv[5], "cow");
    int threads = atoi(argv[7]);
    uint64_t state = seed = seeded(argv[8]);

    int fd = open(argv[1], private ? O_RDONLY : O_RDWR);
    if (fd < 0)
        die(argv[1]);
    if (fsync(fd))
        die("fsync");
    if ((errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)))
        die("posix_fadvise");
    base = mmap(NULL, size, PROT_READ | PROT_WRITE, private ? MAP_PRIVATE : MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        die("mmap");
    unsigned char *in_core = malloc(pages);
    if (mincore(base, size, in_core))
        die("mincore");
    size_t resident = 0;
    for (size_t i = 0; i < pages; i++)
        resident += in_core[i] & 1;

    if (!strcmp(argv[6], "random") && madvise(base, size, MADV_RANDOM))
        die("madvise");
    if (!strcmp(argv[6], "huge") && madvise(base, size, MADV_HUGEPAGE))
        die("madvise");

    order = malloc(count * sizeof *order);
    taken = malloc(count * sizeof *taken);
    for (size_t i = 0; i < count; i++) {
        order[i] = i * step + (shuffled ? rnd(&state) % step : 0);
        taken[i] = 0; /* faults the array in before the clock runs */
    }
    if (shuffled)
        shuffle(order, count, &state);
    each = shuffled || writing; /* a sequential read is timed as a whole: the clock would cost more than the touch */

    struct slice *slices = calloc(threads, sizeof *slices);
    pthread_barrier_init(&ready, NULL, threads);
    for (int t = 0; t < threads; t++) {
        slices[t].from = count * t / threads;
        slices[t].to = count * (t + 1) / threads;
        pthread_create(&slices[t].thread, NULL, work, &slices[t]);
    }
    uint64_t zeros = 0, wrong = 0, begun = UINT64_MAX, ended = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(slices[t].thread, NULL);
        zeros += slices[t].zeros;
        wrong += slices[t].wrong;
        begun = slices[t].begun < begun ? slices[t].begun : begun;
        ended = slices[t].ended > ended ? slices[t].ended : ended;
    }
    qsort(taken, count, sizeof *taken, ascending);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, \"seconds\": %.6f,"
           " \"resident\": %.4f, \"zeros\": %lu, \"wrong\": %lu}\n",
           taken[count / 2] / 1e3, taken[count * 99 / 100] / 1e3, taken[count - 1] / 1e3, (ended - begun) / 1e9,
           (double)resident / pages, zeros, wrong);
}
