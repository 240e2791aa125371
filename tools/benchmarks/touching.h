/* Touching pages of memory in some order, and how long each touch took: shared by touch.c and uffd.c. */
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

struct touched {
    size_t count;
    uint64_t zeros, wrong, ns;
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

/* Choose one page in every step; returns how many. */
static size_t choose(size_t pages, size_t step, int shuffled) {
    size_t count = pages / step;
    uint64_t state = seed;
    order = malloc(count * sizeof *order);
    taken = malloc(count * sizeof *taken);
    for (size_t i = 0; i < count; i++) {
        order[i] = i * step + (shuffled ? rnd(&state) % step : 0);
        taken[i] = 0; /* faults the array in before the clock runs */
    }
    if (shuffled)
        shuffle(order, count, &state);
    each = shuffled || writing; /* a sequential read is timed as a whole: the clock would cost more than the touch */
    return count;
}

/* Touch them, each thread its part. */
static struct touched touch(size_t count, int threads) {
    struct slice *slices = calloc(threads, sizeof *slices);
    pthread_barrier_init(&ready, NULL, threads);
    for (int t = 0; t < threads; t++) {
        slices[t].from = count * t / threads;
        slices[t].to = count * (t + 1) / threads;
        pthread_create(&slices[t].thread, NULL, work, &slices[t]);
    }
    struct touched all = {.count = count};
    uint64_t begun = UINT64_MAX, ended = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(slices[t].thread, NULL);
        all.zeros += slices[t].zeros;
        all.wrong += slices[t].wrong;
        begun = slices[t].begun < begun ? slices[t].begun : begun;
        ended = slices[t].ended > ended ? slices[t].ended : ended;
    }
    all.ns = ended - begun;
    free(slices);
    return all;
}

/* Print it, with how much was in memory before. */
static void report(struct touched all, double resident, double again) {
    qsort(taken, all.count, sizeof *taken, ascending);
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, \"seconds\": %.6f, \"again\": %.6f,"
           " \"resident\": %.4f, \"zeros\": %lu, \"wrong\": %lu}\n",
           taken[all.count / 2] / 1e3, taken[all.count * 99 / 100] / 1e3, taken[all.count - 1] / 1e3, all.ns / 1e9,
           again, resident, all.zeros, all.wrong);
}
