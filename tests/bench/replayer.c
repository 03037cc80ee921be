/*
 * Touches memory as a trace of faults says: the stand-in for the guest that was traced.
 *
 *   replayer SCHEDULE timed|fast CPU|-1       (the pager is at the other end of standard input)
 *
 * Maps each block of the schedule as a memfd, hands one userfaultfd over and each block's memfd, as
 * the descriptor of a message of its own, waits for a byte, and has one thread for each of the
 * trace's read a byte of every page that that one had faulted on, in its order: at the times of the
 * trace, or as fast as it goes. Prints one line of JSON; then waits for the other end to hang up,
 * so that what lies in the memfds can be compared.
 *
 * SCHEDULE, native byte order: struct header, header.blocks of struct block, header.threads of
 * struct thread, the entries.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "handover.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

struct header { uint32_t blocks, threads; };
struct block { uint64_t length, page_size; };
struct thread { uint64_t first, count; }; /* entries */
struct entry { uint64_t due_ns; uint32_t block, page; };

struct work {
    pthread_t thread;
    const struct entry *entries;
    uint64_t count, latest_ns;
    uint32_t *latency_ns;
};

static char **memory;
static const struct block *blocks;
static int timed;
static uint64_t begin_ns;
static pthread_barrier_t ready, go;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *touch(void *argument)
{
    struct work *w = argument;

    prctl(PR_SET_TIMERSLACK, 1);
    pthread_barrier_wait(&ready);
    pthread_barrier_wait(&go);
    for (uint64_t i = 0; i < w->count; i++) {
        const struct entry *e = &w->entries[i];
        uint64_t due = begin_ns + e->due_ns, before, spent;

        if (timed && now_ns() < due) {
            struct timespec t = { (time_t)(due / 1000000000ull), (long)(due % 1000000000ull) };

            while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR)
                ;
        }
        before = now_ns();
        if (timed && before > due && before - due > w->latest_ns)
            w->latest_ns = before - due;
        *(volatile char *)(memory[e->block] + e->page * blocks[e->block].page_size);
        spent = now_ns() - before;
        w->latency_ns[i] = spent < UINT32_MAX ? (uint32_t)spent : UINT32_MAX;
    }
    return NULL;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    const struct header *header;
    const struct thread *threads;
    const struct entry *entries;
    uint64_t touches = 0, latest = 0, end;
    uint32_t *latency;
    struct work *work;
    struct stat status;
    int file, device, uffd, cpu;
    char byte;

    if (argc != 4)
        die("usage: replayer SCHEDULE timed|fast CPU");
    timed = !strcmp(argv[2], "timed");
    cpu = atoi(argv[3]);
    file = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) < 0)
        die(argv[1]);
    header = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    if (header == MAP_FAILED)
        die("mapping the schedule");
    blocks = (const struct block *)(header + 1);
    threads = (const struct thread *)(blocks + header->blocks);
    entries = (const struct entry *)(threads + header->threads);
    for (uint32_t i = 0; i < header->threads; i++)
        touches += threads[i].count;
    memory = calloc(header->blocks, sizeof(*memory));
    work = calloc(header->threads, sizeof(*work));
    latency = malloc((touches ? touches : 1) * sizeof(*latency));
    if (!memory || !work || !latency)
        die("malloc");
    memset(latency, 1, touches * sizeof(*latency)); /* its own page faults must not be measured */
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    uffd = device < 0 ? -1 : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        die("userfaultfd");
    send_handover(STDIN_FILENO, uffd, 0, 0, 0);
    for (uint32_t i = 0; i < header->blocks; i++) {
        int fd = memfd_create("replayer",
                              MFD_CLOEXEC | (blocks[i].page_size > 4096 ? MFD_HUGETLB : 0));

        if (fd < 0 || ftruncate(fd, (off_t)blocks[i].length) < 0)
            die("memfd");
        /* Unreserved: of a large block few huge pages may be touched. */
        memory[i] = mmap(NULL, blocks[i].length, PROT_READ | PROT_WRITE,
                         MAP_SHARED | MAP_NORESERVE, fd, 0);
        if (memory[i] == MAP_FAILED)
            die("mmap");
        send_handover(STDIN_FILENO, fd, (uintptr_t)memory[i], blocks[i].length,
                      blocks[i].page_size);
        close(fd);
    }
    if (cpu >= 0) {
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        sched_setaffinity(0, sizeof(set), &set);
    }
    pthread_barrier_init(&ready, NULL, header->threads + 1);
    pthread_barrier_init(&go, NULL, header->threads + 1);
    for (uint32_t i = 0; i < header->threads; i++) {
        work[i] = (struct work){ .entries = entries + threads[i].first,
                                 .count = threads[i].count,
                                 .latency_ns = latency + threads[i].first };
        if (pthread_create(&work[i].thread, NULL, touch, &work[i]))
            die("pthread_create");
    }
    pthread_barrier_wait(&ready);
    if (read(STDIN_FILENO, &byte, 1) != 1)
        die("no go-ahead");
    begin_ns = now_ns();
    pthread_barrier_wait(&go);
    for (uint32_t i = 0; i < header->threads; i++) {
        pthread_join(work[i].thread, NULL);
        if (work[i].latest_ns > latest)
            latest = work[i].latest_ns;
    }
    end = now_ns();
    qsort(latency, touches, sizeof(*latency), compare);
    printf("{\"touches\": %llu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
           "\"max_us\": %.3f, \"latest_ms\": %.3f}\n",
           (unsigned long long)touches, (double)(end - begin_ns) / 1e9,
           touches ? latency[touches / 2] / 1e3 : 0, touches ? latency[touches - 1 - touches / 100] / 1e3 : 0,
           touches ? latency[touches - 1] / 1e3 : 0, (double)latest / 1e6);
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;
    return 0;
}
