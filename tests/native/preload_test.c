/*
 * Plays a QEMU for the preload library: maps guest memory as QEMU does while other threads, and a
 * signal handler, map and unmap what is none of its business.
 *
 *   preload_test all     maps 16 MiB anonymous, 32 MiB shared and 32 MiB private of a memfd, and
 *                        prints "ADDRESS SIZE" of each; waits until its standard input ends
 *   preload_test touch   writes to the first block before it maps the others
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1u << 20)
#define REQUIRE(what)                                                                              \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%d: %s (errno %d)\n", __LINE__, #what, errno);                        \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static atomic_int ending;
static atomic_ulong handled, churned;

static void churn_once(size_t size)
{
    char *area = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    REQUIRE(area != MAP_FAILED);
    REQUIRE(mmap(area, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                 0) == area);
    *(volatile char *)area = 1;
    REQUIRE(munmap(area, size) == 0);
}

static void *churn(void *argument)
{
    while (!ending) {
        churn_once(((uintptr_t)argument + 1) * 3 * MIB);
        churned++;
    }
    return NULL;
}

static void on_alarm(int number)
{
    int saved = errno;

    (void)number;
    churn_once(MIB);
    handled++;
    errno = saved;
}

/* As qemu_ram_mmap() does: a reservation first, the memory into it. */
static char *map_block(size_t size, int flags, int fd)
{
    char *area = mmap(NULL, size + 2 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *block;

    REQUIRE(area != MAP_FAILED);
    errno = 123;
    block = mmap64(area, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    REQUIRE(block == area && errno == 123);
    return block;
}

static unsigned long present(char *block, size_t size)
{
    static unsigned char pages[32 * MIB / 4096];
    unsigned long count = 0;

    REQUIRE(mincore(block, size, pages) == 0);
    for (size_t i = 0; i < size / 4096; i++)
        count += pages[i] & 1;
    return count;
}

int main(int argc, char **argv)
{
    struct itimerval every = { .it_interval = { .tv_usec = 500 }, .it_value = { .tv_usec = 500 } };
    struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    int fd = memfd_create("ram", MFD_CLOEXEC), status;
    pthread_t threads[4];
    char *blocks[3], byte;

    REQUIRE(argc == 2 && fd >= 0 && ftruncate(fd, 32 * MIB) == 0);
    REQUIRE(!getenv("LD_PRELOAD"));
    if (!strcmp(argv[1], "touch")) {
        *(volatile char *)map_block(16 * MIB, MAP_PRIVATE | MAP_ANONYMOUS, -1) = 1;
        return 2;
    }
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
    for (uintptr_t i = 0; i < 4; i++)
        REQUIRE(pthread_create(&threads[i], NULL, churn, (void *)i) == 0);
    REQUIRE(mlockall(MCL_FUTURE) == 0);
    blocks[0] = map_block(16 * MIB, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1);
    blocks[1] = map_block(32 * MIB, MAP_SHARED, fd);
    /* A child that maps guest memory instead of us ends; one that maps other things does not. */
    fflush(stdout);
    if (fork() == 0) {
        churn_once(5 * MIB);
        map_block(32 * MIB, MAP_SHARED, fd);
        _exit(3);
    }
    while (wait(&status) < 0)
        REQUIRE(errno == EINTR);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 97);
    /* Not at a fixed address: not guest memory, though it has the size. */
    REQUIRE(mmap(NULL, 32 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) !=
            MAP_FAILED);
    blocks[2] = map_block(32 * MIB, MAP_PRIVATE | MAP_NORESERVE, fd);
    /* All is mapped: from now on a mapping of that size is like any other. */
    *(volatile char *)map_block(32 * MIB, MAP_PRIVATE | MAP_ANONYMOUS, -1) = 1;
    for (int i = 0; i < 3; i++) {
        size_t size = (i ? 32 : 16) * MIB;

        REQUIRE(madvise(blocks[i], size, 23 /* MADV_POPULATE_WRITE */) == 0);
        REQUIRE(present(blocks[i], size) == 0);
        printf("%" PRIxPTR " %zu\n", (uintptr_t)blocks[i], size);
    }
    while (handled < 20 || churned < 200)
        usleep(1000);
    ending = 1;
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    return 0;
}
