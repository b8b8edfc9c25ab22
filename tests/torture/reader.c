/* Reads a file by raw system calls, without the loader and without libc's own functions, and prints its sum and size.
   It is linked statically and is itself large: a file that the kernel reads to start it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned char weight[2 << 20] = {3};
static unsigned char buffer[1 << 16];

int main(int count, char **words)
{
    long file = syscall(SYS_openat, AT_FDCWD, words[1], O_RDONLY, 0);
    if (file < 0)
        return 2;
    unsigned long sum = 0, size = 0;
    if (count > 2) {
        struct stat status;
        if (fstat((int)file, &status) != 0)
            return 3;
        const unsigned char *bytes = mmap(0, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, (int)file, 0);
        if (bytes == MAP_FAILED)
            return 4;
        for (; size < (unsigned long)status.st_size; size++)
            sum = sum * 31 + bytes[size] * weight[0];
    } else {
        long got;
        while ((got = syscall(SYS_read, file, buffer, sizeof buffer)) > 0)
            for (long n = 0; n < got; n++, size++)
                sum = sum * 31 + buffer[n] * weight[0];
    }
    printf("%lx %lu\n", sum, size);
    return 0;
}
