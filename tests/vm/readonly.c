/* Lets QEMU 7.2 open the files whose paths begin with READONLY as QEMU 8.2 does with readonly=on,rom=off: for
 * reading only. (Both map them privately with share=off.) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/* What open(path, O_RDWR) of a program that was built with _FORTIFY_SOURCE calls. */
int __open64_2(const char *path, int flags)
{
    int (*real)(const char *, int) = (int (*)(const char *, int))dlsym(RTLD_NEXT, "__open64_2");
    const char *readonly = getenv("READONLY");
    if (readonly != NULL && strncmp(path, readonly, strlen(readonly)) == 0)
        flags = (flags & ~O_ACCMODE) | O_RDONLY;
    return real(path, flags);
}
