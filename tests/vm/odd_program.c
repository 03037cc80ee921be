/*
 * A program that is no QEMU and that the preload library must not harm: it maps, protects and gives
 * back memory as QEMU does, in a constructor, in threads and in children; closes descriptors that it
 * did not open; and ends under a filter that allows no system call but read, write and exit.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
enum { SIZE = 16 << 20 }; /* as large as a block that the sidecar waits for */
__attribute__((constructor(101))) static void early(void)
{
    char *at = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    at[SIZE - 1] = 1;
    if (munmap(at, SIZE))
        abort();
}
static void *work(void *unused)
{
    for (int i = 0; i < 50; i++) {
        char *at = mmap(0, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char *same = mmap(at, SIZE, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (at == MAP_FAILED || same != at)
            abort();
        memset(at, i, 1 << 16);
        if (madvise(at, SIZE, MADV_DONTNEED) || at[1] || mprotect(at, SIZE, PROT_READ) ||
            mlock(at, 4096))
            abort();
        munmap(at, SIZE);
    }
    return unused;
}
int main(void)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], 0, work, 0);
    if (!fork()) {
        work(0);
        _exit(0);
    }
    if (!vfork())
        execl("/bin/true", "true", NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], 0);
    while (wait(0) > 0)
        ;
    for (int i = 3; i < 1024; i++)
        close(i);
    printf("well\n");
    fflush(stdout);
    prctl(PR_SET_SECCOMP, 1 /* SECCOMP_MODE_STRICT */);
    syscall(SYS_write, 1, "so far\n", 7);
    syscall(SYS_exit, 7);
}
