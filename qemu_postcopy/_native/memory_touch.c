#define _GNU_SOURCE
#include "memory_touch.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

int64_t qpc_memory_map(uint64_t length, uint64_t alignment, int descriptor, int shared)
{
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | (descriptor < 0 ? MAP_ANONYMOUS : 0);
    uint64_t whole = length + alignment, base, start;
    char *reserved = mmap(NULL, whole, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (reserved == MAP_FAILED)
        return -errno;
    base = (uintptr_t)reserved;
    start = (base + alignment - 1) / alignment * alignment;
    if (mmap((void *)start, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, descriptor, 0) ==
        MAP_FAILED) {
        int errnum = errno;
        munmap(reserved, whole);
        return -errnum;
    }
    if (start > base)
        munmap(reserved, start - base);
    if (start + length < base + whole)
        munmap((void *)(start + length), base + whole - start - length);
    return (int64_t)start;
}

int qpc_memory_unmap(uint64_t address, uint64_t length)
{
    return munmap((void *)address, length) < 0 ? -errno : 0;
}

int qpc_memory_remap(uint64_t address, uint64_t length, uint64_t to)
{
    void *moved = mremap((void *)address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                         (void *)to);

    return moved == MAP_FAILED ? -errno : 0;
}

int qpc_memory_advise(uint64_t address, uint64_t length, int advice)
{
    return madvise((void *)address, length, advice) < 0 ? -errno : 0;
}

uint64_t qpc_memory_load(uint64_t address)
{
    return *(volatile uint64_t *)address;
}

void qpc_memory_store(uint64_t address, uint64_t value)
{
    *(volatile uint64_t *)address = value;
}

void qpc_memory_fill(uint64_t address, uint64_t length, int byte)
{
    memset((void *)address, byte, length);
}

void qpc_memory_read(uint64_t address, void *into, uint64_t length)
{
    memcpy(into, (const void *)address, length);
}

void qpc_memory_write(uint64_t address, const void *from, uint64_t length)
{
    memcpy((void *)address, from, length);
}

int64_t qpc_memory_compare(uint64_t address, const void *expected, uint64_t length)
{
    const unsigned char *have = (const unsigned char *)address, *want = expected;

    if (memcmp(have, want, length) == 0)
        return -1;
    for (uint64_t i = 0; i < length; i++)
        if (have[i] != want[i])
            return (int64_t)i;
    return -1;
}

int64_t qpc_memory_read_by_kernel(uint64_t address, void *into, uint64_t length)
{
    struct iovec local = { .iov_base = into, .iov_len = length };
    struct iovec remote = { .iov_base = (void *)address, .iov_len = length };
    ssize_t count = process_vm_readv(getpid(), &local, 1, &remote, 1, 0);

    return count < 0 ? -errno : count;
}

int qpc_memory_load_in_child(uint64_t address)
{
    pid_t child = fork();

    if (child == 0)
        _exit((int)(*(volatile uint64_t *)address & 0xff));
    return child < 0 ? -errno : child;
}

struct toucher {
    struct qpc_touchers *all;
    pthread_t thread;
    int joined;
    uint32_t *order;
};

struct qpc_touchers {
    uint64_t address, page_size, pages, base;
    int touch;
    uint32_t threads;
    uint64_t touched, wrong; /* atomic */
    struct toucher each[];
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *touch_pages(void *argument)
{
    struct toucher *self = argument;
    struct qpc_touchers *all = self->all;

    for (uint64_t i = 0; i < all->pages; i++) {
        uint64_t page = self->order[i];
        volatile uint64_t *word = (volatile uint64_t *)(all->address + page * all->page_size);
        uint64_t value = word[0];

        if (all->touch != QPC_TOUCH_READ && value != all->base + page)
            __atomic_fetch_add(&all->wrong, 1, __ATOMIC_RELAXED);
        if (all->touch == QPC_TOUCH_COUNT)
            __atomic_fetch_add(&word[1], 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&all->touched, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

void qpc_touchers_destroy(struct qpc_touchers *touchers)
{
    for (uint32_t i = 0; i < touchers->threads; i++)
        free(touchers->each[i].order);
    free(touchers);
}

struct qpc_touchers *qpc_touchers_create(uint64_t address, uint64_t page_size, uint64_t pages,
                                         uint32_t threads, int touch, uint64_t base,
                                         uint64_t seed, int *errnum)
{
    struct qpc_touchers *all = calloc(1, sizeof(*all) + threads * sizeof(all->each[0]));
    uint64_t state = seed * 2 + 1;
    uint32_t started;

    *errnum = ENOMEM;
    if (!all)
        return NULL;
    all->address = address;
    all->page_size = page_size;
    all->pages = pages;
    all->base = base;
    all->touch = touch;
    all->threads = threads;
    for (uint32_t i = 0; i < threads; i++) {
        uint32_t *order = malloc(pages * sizeof(*order));

        all->each[i].all = all;
        all->each[i].order = order;
        if (!order) {
            qpc_touchers_destroy(all);
            return NULL;
        }
        for (uint64_t page = 0; page < pages; page++)
            order[page] = (uint32_t)page;
        for (uint64_t left = pages; left > 1; left--) {
            uint64_t other = next_random(&state) % left;
            uint32_t kept = order[left - 1];

            order[left - 1] = order[other];
            order[other] = kept;
        }
    }
    for (started = 0; started < threads; started++) {
        *errnum = pthread_create(&all->each[started].thread, NULL, touch_pages,
                                 &all->each[started]);
        if (*errnum)
            break;
    }
    if (started == threads)
        return all;
    /* Those that run may stand in a fault: what they use is theirs for good. */
    for (uint32_t i = 0; i < started; i++)
        pthread_detach(all->each[i].thread);
    if (started == 0)
        qpc_touchers_destroy(all);
    return NULL;
}

uint64_t qpc_touchers_touched(struct qpc_touchers *touchers)
{
    return __atomic_load_n(&touchers->touched, __ATOMIC_RELAXED);
}

uint64_t qpc_touchers_wrong(struct qpc_touchers *touchers)
{
    return __atomic_load_n(&touchers->wrong, __ATOMIC_RELAXED);
}

int qpc_touchers_join(struct qpc_touchers *touchers, uint64_t timeout_ms)
{
    struct timespec deadline;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += (time_t)(timeout_ms / 1000);
    deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (deadline.tv_nsec >= 1000000000) {
        deadline.tv_sec++;
        deadline.tv_nsec -= 1000000000;
    }
    for (uint32_t i = 0; i < touchers->threads; i++) {
        struct toucher *one = &touchers->each[i];

        if (!one->joined) {
            /* glibc 2.31 */
            int failed = pthread_clockjoin_np(one->thread, NULL, CLOCK_MONOTONIC, &deadline);

            if (failed)
                return -failed;
            one->joined = 1;
        }
    }
    return 0;
}
