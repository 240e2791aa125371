/* steady mapped|calls|names PATH MIB SEED: uses a file system until SIGTERM, checks every byte, and tells its stalls.

   mapped: loads and stores of whole pages of a file through a shared mapping, msync, and pages that are dropped
           and faulted in again;
   calls:  pwrite, pread, O_APPEND and fsync;
   names:  files and directories that are made, renamed, linked and removed.
   Whatever it finds to be other than it left it, and every error, ends it with a sentence and status 1. At the end it
   reads all once more and prints JSON: the operations, and start and end of those that took long, in seconds of
   CLOCK_MONOTONIC. PATH.seen has what each page should be, for
   steady check PATH: does the file, mounted again perhaps, still have all of it?  */
#include "probe.h"
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/time.h>

enum { WORDS = PAGE / 8, STALLS = 1 << 16, RECORD = 64 };
static const uint64_t LONG = 5000000; /* ns */

static volatile sig_atomic_t ended;
static uint64_t state, operations, begun;
static struct { uint64_t from, to; } stalls[STALLS];
static unsigned stalled;
static const char *path;
static uint32_t *seen; /* what each page was last filled with */
static size_t pages, appended;

static void end(int number) { (void)number; ended = 1; }

static void wrong(const char *text, ...)
{
    va_list more;
    va_start(more, text);
    vfprintf(stderr, text, more);
    fprintf(stderr, " (%s, operation %lu)\n", path, operations);
    va_end(more);
    exit(1);
}

static void failed(const char *what) { wrong("%s: %s", what, strerror(errno)); }

static void start(void) { begun = now_ns(); }

static void done(void)
{
    uint64_t now = now_ns();
    operations++;
    if (now - begun > LONG && stalled < STALLS)
        stalls[stalled].from = begun, stalls[stalled++].to = now;
}

static uint64_t word(size_t page, uint32_t number, size_t i)
{
    return number ? (page << 40 ^ (uint64_t)number << 12 ^ i) * 0x9e3779b97f4a7c15UL + 1 : 0;
}

static void fill(uint64_t *at, size_t page, uint32_t number)
{
    for (size_t i = 0; i < WORDS; i++)
        at[i] = word(page, number, i);
}

static void check(const uint64_t *at, size_t page)
{
    for (size_t i = 0; i < WORDS; i++)
        if (at[i] != word(page, seen[page], i))
            wrong("word %zu of page %zu is %lx, not %lx: fill %u", i, page, at[i], word(page, seen[page], i), seen[page]);
}

/* Another fill for a page; now and then zeros, which are not stored. */
static void refill(size_t page) { seen[page] = rnd(&state) % 16 ? seen[page] % 1000000 + 1 : 0; }

static void keep(void)
{
    char name[4096];
    snprintf(name, sizeof name, "%s.seen", path);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0)
        failed(name);
    uint64_t head[2] = {pages, appended};
    write_all(fd, (char *)head, sizeof head, 0);
    write_all(fd, (char *)seen, pages * sizeof *seen, sizeof head);
    if (fsync(fd) || close(fd))
        failed("fsync");
}

static void mapped(int fd)
{
    uint64_t *base = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        failed("mmap");
    while (!ended) {
        size_t page = rnd(&state) % pages;
        start();
        check(base + page * WORDS, page);
        if (operations % 3 == 0) {
            refill(page);
            fill(base + page * WORDS, page, seen[page]);
        }
        if (operations % 4096 == 0 && msync(base, pages * PAGE, MS_SYNC))
            failed("msync");
        if (operations % 4096 == 0) { /* what is clean now is dropped, and comes again by faults */
            madvise(base, pages * PAGE, MADV_DONTNEED);
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        }
        done();
    }
    for (size_t page = 0; page < pages; page++)
        check(base + page * WORDS, page);
    if (msync(base, pages * PAGE, MS_SYNC) || munmap(base, pages * PAGE))
        failed("msync");
}

static int open_log(void)
{
    char name[4096];
    snprintf(name, sizeof name, "%s.log", path);
    int fd = open(name, O_RDWR | O_APPEND | O_CREAT, 0600);
    if (fd < 0)
        failed(name);
    return fd;
}

static void check_log(void)
{
    int fd = open_log();
    struct stat found;
    uint64_t record[RECORD / 8];
    if (fstat(fd, &found) || (size_t)found.st_size != appended * RECORD)
        wrong("the log has %ld bytes, not %zu", (long)found.st_size, appended * RECORD);
    for (size_t n = 0; n < appended; n++)
        if (pread(fd, record, RECORD, n * RECORD) != RECORD || record[0] != n || record[7] != ~n)
            wrong("record %zu of the log is that of %lu", n, record[0]);
    close(fd);
}

static void calls(int fd)
{
    static uint64_t buffer[WORDS];
    int log = open_log();
    while (!ended) {
        size_t page = rnd(&state) % pages;
        refill(page);
        fill(buffer, page, seen[page]);
        start();
        if (pwrite(fd, buffer, PAGE, page * PAGE) != PAGE)
            failed("pwrite");
        done();
        page = rnd(&state) % pages;
        posix_fadvise(fd, page * PAGE, PAGE, POSIX_FADV_DONTNEED);
        start();
        if (pread(fd, buffer, PAGE, page * PAGE) != PAGE)
            failed("pread");
        done();
        check(buffer, page);
        uint64_t record[RECORD / 8] = {appended, [7] = ~appended};
        start();
        if (write(log, record, RECORD) != RECORD)
            failed("write");
        done();
        appended++;
        start();
        if (operations % 1024 == 0 && fsync(fd))
            failed("fsync");
        done();
        usleep(500);
    }
    close(log);
    check_log();
}

static void names(void)
{
    char a[4096], b[4096];
    if (mkdir(path, 0700) || chdir(path))
        failed(path);
    for (uint64_t n = 0; !ended; n++) {
        snprintf(a, sizeof a, "f%lu", n);
        snprintf(b, sizeof b, "g%lu", n % 7);
        start();
        int fd = open(a, O_RDWR | O_CREAT | O_EXCL, 0600);
        if (fd < 0 || write(fd, &n, sizeof n) != sizeof n || close(fd))
            failed(a);
        done();
        start();
        if (mkdir("d", 0700) || (n % 2 ? rename(a, b) : link(a, "l") || rename("l", b) || unlink(a)))
            failed("link");
        done();
        start();
        uint64_t found = 0;
        fd = open(b, O_RDONLY);
        if (fd < 0 || read(fd, &found, sizeof found) != sizeof found || close(fd) || found != n)
            wrong("%s has %lu, not %lu: %s", b, found, n, strerror(errno));
        done();
        start();
        if (symlink(b, "s") || unlink("s") || rmdir("d") || (n % 5 == 0 && unlink(b)))
            failed("unlink");
        if (access(a, F_OK) == 0 || errno != ENOENT)
            wrong("%s is there", a);
        done();
        usleep(2000);
    }
}

static void verify(int fd)
{
    static uint64_t buffer[WORDS];
    char name[4096];
    uint64_t head[2];
    snprintf(name, sizeof name, "%s.seen", path);
    int kept = open(name, O_RDONLY);
    if (kept < 0 || pread(kept, head, sizeof head, 0) != sizeof head)
        failed(name);
    pages = head[0], appended = head[1];
    seen = calloc(pages, sizeof *seen);
    if (pread(kept, seen, pages * sizeof *seen, sizeof head) != (ssize_t)(pages * sizeof *seen))
        failed(name);
    for (size_t page = 0; page < pages; page++) {
        if (pread(fd, buffer, PAGE, page * PAGE) != PAGE)
            failed("pread");
        check(buffer, page);
    }
    check_log();
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    path = argv[2];
    int named = !strcmp(argv[1], "names"), fd = named ? -1 : open(path, O_RDWR | O_CREAT, 0600);
    if (!named && fd < 0)
        failed(path);
    if (!strcmp(argv[1], "check")) {
        verify(fd);
        return 0;
    }
    if (argc != 5)
        return 2;
    pages = strtoull(argv[3], NULL, 0) << 20 >> 12;
    state = seeded(argv[4]);
    seen = calloc(pages, sizeof *seen);
    /* not restarted: a call that a signal comes to must be carried out all the same */
    struct sigaction act = {.sa_handler = end};
    sigaction(SIGTERM, &act, NULL);
    if (!named && ftruncate(fd, pages * PAGE))
        failed("ftruncate");
    if (named)
        names();
    else if (!strcmp(argv[1], "mapped"))
        mapped(fd);
    else
        calls(fd);
    if (!named)
        keep();
    printf("{\"operations\": %lu, \"stalls\": [", operations);
    for (unsigned n = 0; n < stalled; n++)
        printf("%s[%.6f, %.6f]", n ? ", " : "", stalls[n].from / 1e9, stalls[n].to / 1e9);
    printf("]}\n");
}
