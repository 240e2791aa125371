/*
 * Known data for the test guest: every page is made from a seed and its own number, so a page that is
 * missing, old, or in another's place is found, and named.
 *
 *   pages fill  FILE SEED FIRST COUNT    make the pages; the file grows as needed
 *   pages check FILE SEED FIRST COUNT    compare; prints "bad=N first=PAGE" and exits 1 when some differ
 *   pages churn FILE 0 FIRST COUNT       make them anew ten times a second until killed
 *
 * A program and not a shell script because the guest runs under emulation, where a shell needs
 * seconds for a megabyte.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t) };

static void make(uint64_t *page, uint64_t seed, uint64_t number)
{
    uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u ^ (number + 1) * 0xbf58476d1ce4e5b9u;

    for (int i = 0; i < WORDS; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        page[i] = x;
    }
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: pages fill|check|churn FILE SEED FIRST COUNT\n");
        return 2;
    }
    uint64_t seed = strtoull(argv[3], NULL, 10);
    size_t first = strtoull(argv[4], NULL, 10), count = strtoull(argv[5], NULL, 10);
    off_t end = (off_t)(first + count) * PAGE;
    struct stat st;
    int fd = open(argv[2], O_RDWR | O_CREAT, 0600);

    if (fd < 0 || fstat(fd, &st) || (st.st_size < end && ftruncate(fd, end))) {
        perror(argv[2]);
        return 2;
    }
    char *map = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)first * PAGE);
    if (map == MAP_FAILED) {
        perror("mmap");
        return 2;
    }

    if (!strcmp(argv[1], "check")) {
        size_t bad = 0, first_bad = 0;
        uint64_t expected[WORDS];

        for (size_t i = 0; i < count; i++) {
            make(expected, seed, first + i);
            if (memcmp(map + i * PAGE, expected, PAGE) && !bad++)
                first_bad = first + i;
        }
        if (bad)
            printf("bad=%zu first=%zu\n", bad, first_bad);
        return bad != 0;
    }
    do {
        for (size_t i = 0; i < count; i++)
            make((uint64_t *)(map + i * PAGE), seed, first + i);
        seed++;
    } while (!strcmp(argv[1], "churn") && !usleep(100000));
    return 0;
}
