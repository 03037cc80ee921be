/*
 * A mapper to measure with: maps memory, hands its userfaultfds over the socket that is its
 * standard input (one for each equal part of the memory, in order), waits for a byte, touches every page in the order asked for and times each touch.
 * Prints one line of JSON. Page n of the source is expected to hold word w = mix(n * 512 + w),
 * or zeros where the source has a hole; every page is compared in full afterwards.
 *
 *   toucher memfd|anonymous|hugetlb PAGES sequential|random THREADS CPU|-1 HOLE_EVERY DESCRIPTORS
 *
 * HOLE_EVERY = k: pages n with n % k == k - 1 are holes (0: none).
 */
#define _GNU_SOURCE
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
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "handover.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

struct work {
    pthread_t thread;
    const uint32_t *order;
    uint32_t *latency_ns;
    uint64_t first, last;
};

static char *memory;
static uint64_t page_size = 4096;
static pthread_barrier_t barrier;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void *touch(void *argument)
{
    struct work *w = argument;

    pthread_barrier_wait(&barrier);
    for (uint64_t i = w->first; i < w->last; i++) {
        uint64_t before = now_ns();

        *(volatile char *)(memory + w->order[i] * page_size);
        w->latency_ns[i] = (uint32_t)(now_ns() - before);
    }
    return NULL;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

static int open_userfaultfd(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd = -1;

    if (device >= 0)
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    return uffd;
}

int main(int argc, char **argv)
{
    uint64_t pages, bad = 0, begin, end, state = 88172645463325252ull, hole_every;
    unsigned threads;
    uint32_t *order, *latency;
    struct work *work;
    uint64_t descriptors;
    int cpu;
    char go;

    if (argc != 8)
        die("usage: toucher MEMORY PAGES ORDER THREADS CPU HOLE_EVERY DESCRIPTORS");
    pages = strtoull(argv[2], NULL, 0);
    threads = (unsigned)atoi(argv[4]);
    cpu = atoi(argv[5]);
    hole_every = strtoull(argv[6], NULL, 0);
    descriptors = strtoull(argv[7], NULL, 0);
    if (!pages || !threads || !descriptors || descriptors > pages)
        die("no pages, threads or descriptors");
    if (!strcmp(argv[1], "anonymous")) {
        memory = mmap(NULL, pages * page_size, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(memory, pages * page_size, MADV_NOHUGEPAGE);
    } else {
        int huge = !strcmp(argv[1], "hugetlb");
        int fd = memfd_create("toucher", huge ? MFD_HUGETLB : 0);

        if (huge)
            page_size = 2u << 20;
        if (fd < 0 || ftruncate(fd, (off_t)(pages * page_size)) < 0)
            die("memfd");
        memory = mmap(NULL, pages * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (memory == MAP_FAILED)
        die("mmap");
    order = malloc(pages * sizeof(*order));
    latency = calloc(pages, sizeof(*latency));
    work = calloc(threads, sizeof(*work));
    if (!order || !latency || !work)
        die("malloc");
    memset(latency, 1, pages * sizeof(*latency)); /* its own page faults must not be measured */
    for (uint64_t i = 0; i < pages; i++)
        order[i] = (uint32_t)i;
    if (!strcmp(argv[3], "random"))
        for (uint64_t i = pages - 1; i > 0; i--) {
            uint64_t j;
            uint32_t t;

            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            j = state % (i + 1);
            t = order[i], order[i] = order[j], order[j] = t;
        }
    if (cpu >= 0) {
        cpu_set_t set;

        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        sched_setaffinity(0, sizeof(set), &set);
    }
    for (uint64_t i = 0; i < descriptors; i++) {
        uint64_t first = pages * i / descriptors, last = pages * (i + 1) / descriptors;
        int uffd = open_userfaultfd();

        if (uffd < 0)
            die("userfaultfd");
        send_handover(STDIN_FILENO, uffd, (uintptr_t)memory + first * page_size,
                      (last - first) * page_size, page_size);
    }
    if (read(STDIN_FILENO, &go, 1) != 1)
        die("no go-ahead");

    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (unsigned i = 0; i < threads; i++) {
        work[i] = (struct work){ .order = order, .latency_ns = latency,
                                 .first = pages * i / threads, .last = pages * (i + 1) / threads };
        if (pthread_create(&work[i].thread, NULL, touch, &work[i]))
            die("pthread_create");
    }
    begin = now_ns(); /* before the barrier: the main thread may be the last to run after it */
    pthread_barrier_wait(&barrier);
    for (unsigned i = 0; i < threads; i++)
        pthread_join(work[i].thread, NULL);
    end = now_ns();

    for (uint64_t n = 0; n < pages; n++) {
        const uint64_t *words = (const uint64_t *)(memory + n * page_size);
        int hole = hole_every && n % hole_every == hole_every - 1;

        for (uint64_t w = 0; w < page_size / 8; w++)
            bad += words[w] != (hole ? 0 : mix(n * (page_size / 8) + w));
    }
    qsort(latency, pages, sizeof(*latency), compare);
    printf("{\"touches\": %llu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
           "\"max_us\": %.3f, \"bad_words\": %llu}\n",
           (unsigned long long)pages, (double)(end - begin) / 1e9, latency[pages / 2] / 1e3,
           latency[pages - 1 - pages / 100] / 1e3, latency[pages - 1] / 1e3,
           (unsigned long long)bad);
    return bad ? 1 : 0;
}
