/* What the probes share: clock, random numbers, and dying with a sentence. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* xorshift64*: fast enough to fill gigabytes with bytes that no one can elide or compress. */
static inline uint64_t rnd(uint64_t *state) {
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 2685821657736338717UL;
}

static inline uint64_t seeded(const char *text) {
    return strtoull(text, NULL, 0) * 0x9e3779b97f4a7c15UL + 1;
}

static inline void random_bytes(void *at, size_t bytes, uint64_t *state) {
    for (uint64_t *word = at; (char *)word < (char *)at + bytes; word++)
        *word = rnd(state);
}

/* Each page starts with its own number (plus one, so that no page is zero): a reader
   can then tell that a peer served the right page and not just any page. */
static inline void stamp(void *page, uint64_t number) { *(uint64_t *)page = number + 1; }

static inline void shuffle(uint32_t *items, size_t count, uint64_t *state) {
    for (size_t i = count; i > 1; i--) {
        size_t j = rnd(state) % i;
        uint32_t item = items[i - 1];
        items[i - 1] = items[j];
        items[j] = item;
    }
}

static inline void write_all(int fd, const char *from, size_t bytes, off_t offset) {
    while (bytes) {
        ssize_t done = pwrite(fd, from, bytes, offset);
        if (done <= 0)
            die("pwrite");
        from += done;
        bytes -= done;
        offset += done;
    }
}
