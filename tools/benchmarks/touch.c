/* touch FILE SIZE ORDER STEP ACCESS ADVICE THREADS SEED

   Maps FILE (MAP_SHARED) with none of it in the page cache, and touches one page in
   every STEP pages. ORDER: random (a random page of each step, steps shuffled) or
   sequential, then also a second time, mapped anew ("again"). ACCESS: read or write; private or
   cow, which are the same in a private mapping of a file that is open for reading only, as a
   dense clone has its template. ADVICE: none, random, huge. Prints JSON.

   In random order with STEP 16 no touch lies in the 64 KiB that an earlier one mapped
   around itself, so each is a fault, on tmpfs too. The file is opened once and its size
   is not asked for: qemu-storage-daemon drops what is cached when it is opened again. */
#include "touching.h"

int main(int argc, char **argv) {
    if (argc != 9)
        return 2;
    size_t size = strtoull(argv[2], NULL, 0), pages = size / PAGE, step = strtoull(argv[4], NULL, 0);
    int shuffled = !strcmp(argv[3], "random"), threads = atoi(argv[7]);
    int private = !strcmp(argv[5], "private") || !strcmp(argv[5], "cow");
    int flags = private ? MAP_PRIVATE : MAP_SHARED;
    writing = !strcmp(argv[5], "write") || !strcmp(argv[5], "cow");
    seed = seeded(argv[8]);

    int fd = open(argv[1], private ? O_RDONLY : O_RDWR);
    if (fd < 0)
        die(argv[1]);
    if (fsync(fd))
        die("fsync");
    if ((errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)))
        die("posix_fadvise");
    base = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
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

    size_t count = choose(pages, step, shuffled);
    struct touched all = touch(count, threads);
    double again = 0;
    if (!each) {
        /* the new one first: ramfs and its peers write back what is dirty when a mapping goes */
        char *old = base;
        base = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (base == MAP_FAILED || munmap(old, size))
            die("mmap");
        again = touch(count, threads).ns / 1e9;
    }
    report(all, (double)resident / pages, again);
}
