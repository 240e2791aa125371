/* work: jobs over a piece of memory, each a line on standard input, answered on standard output.

   compute N   N rounds of a hash, over 8 KiB               -> "= NS"
   order N     N times every word of the memory in order    -> "= NS"
   random N    N words of the memory at random              -> "= NS"
   steady KIB  stores into so much memory each second, a word in each of so many random pages every 2 ms, until the
               next line; each time it ticks                -> "= steady", and at the end "= NS TICKS"

   Each but the first loads and stores what it meets. NS is the time it took, in nanoseconds of CLOCK_MONOTONIC. It is
   the init of a guest, in memory of its own, with its size in the environment (work=MIB) and a byte at the port of
   isa-debugcon for each tick; or it is `work MIB FILE`, over a file. In both it has stored into all of it at first.  */
#include "probe.h"
#include <poll.h>
#include <sched.h>
#include <sys/io.h>
#include <termios.h>

enum { PORT = 0xe9, QUANTUM = 2000000 /* ns */ };

static uint64_t *memory, words, table[1024];

static uint64_t compute(uint64_t count)
{
    uint64_t hash = 1;
    for (uint64_t i = 0; i < count; i++) {
        hash = (hash ^ table[hash & 1023]) * 0x9e3779b97f4a7c15UL;
        hash ^= hash >> 29;
        table[i & 1023] = hash;
    }
    return hash;
}

static uint64_t order(uint64_t count)
{
    while (count--)
        for (uint64_t i = 0; i < words; i++)
            memory[i] = memory[i] * 3 + 1;
    return 0;
}

static uint64_t random_words(uint64_t count)
{
    uint64_t state = 1;
    while (count--)
        memory[rnd(&state) & (words - 1)] += count;
    return 0;
}

static void steady(uint64_t kib)
{
    uint64_t state = 1, ticks = 0, begun = now_ns(), next = begun, pages = kib * QUANTUM / 4 / 1000000000;
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};

    puts("= steady");
    while (!poll(&input, 1, 0)) {
        for (uint64_t i = 0; i < pages; i++)
            memory[rnd(&state) & (words - 1) & -512UL] += 1;
        outb('.', PORT);
        ticks++;
        next += QUANTUM;
        /* What was missed is not made up for. */
        if (next < now_ns())
            next = now_ns();
        struct timespec until = {next / 1000000000, next % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    }
    uint64_t took = now_ns() - begun;
    if (scanf("%*s") != EOF)
        printf("= %lu %lu\n", took, ticks);
}

int main(int argc, char **argv)
{
    const char *size = argc == 3 ? argv[1] : getenv("work");
    int fd = argc == 3 ? open(argv[2], O_RDWR) : -1;
    struct termios line;
    char job[32];
    unsigned long count;

    if (!size || (argc == 3 && fd < 0))
        die("work");
    if (!tcgetattr(STDIN_FILENO, &line)) {
        cfmakeraw(&line);
        tcsetattr(STDIN_FILENO, TCSANOW, &line);
        ioperm(PORT, 1, 1);
    }
    words = (strtoull(size, NULL, 0) << 20) / sizeof *memory;
    memory = mmap(NULL, words * sizeof *memory, PROT_READ | PROT_WRITE,
                  fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    for (uint64_t i = 0; i < words; i++)
        memory[i] = i * 0x9e3779b97f4a7c15UL | 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("= ready");
    while (scanf("%31s %lu", job, &count) == 2) {
        uint64_t begun = now_ns();
        if (!strcmp(job, "steady")) {
            steady(count);
            continue;
        }
        volatile uint64_t end = !strcmp(job, "compute") ? compute(count) : !strcmp(job, "order") ? order(count)
                                                                                                 : random_words(count);
        (void)end;
        printf("= %lu\n", now_ns() - begun);
    }
    return 0;
}
