/* Whether the kernel makes huge pages out of memory whose small pages are missing on purpose. */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "uffd.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { PAGE_BYTES = 4096, HUGE_BYTES = 2 << 20, BLOCK_BYTES = 512 };

/* Bytes of the file that are there, by the kernel's own count. */
static int64_t filled_bytes(int fd)
{
    struct stat status;

    return fstat(fd, &status) < 0 ? -1 : (int64_t)status.st_blocks * BLOCK_BYTES;
}

/* Puts one page at the begin of the range, by a COPY, which never brings more. */
static int fill_first_page(int uffd, uint8_t *range, const uint8_t *page)
{
    uint64_t done;

    return qpc_uffd_copy(uffd, (uintptr_t)range, page, PAGE_BYTES, 1, &done) == QPC_FILLED ? 0 : -1;
}

static int compare(int uffd, int fd, uint8_t *memory, struct qpc_error *err)
{
    static const uint8_t page[PAGE_BYTES] __attribute__((aligned(PAGE_BYTES))) = { 1 };
    uint8_t *control = memory + HUGE_BYTES;
    int64_t before, after;

    if (qpc_uffd_register(uffd, (uintptr_t)memory, 2 * HUGE_BYTES, err) < 0)
        return -1;
    if (fill_first_page(uffd, memory, page) < 0 || fill_first_page(uffd, control, page) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "UFFDIO_COPY");
    before = filled_bytes(fd);
    madvise(memory, HUGE_BYTES, MADV_COLLAPSE); /* is to fail */
    after = filled_bytes(fd);
    if (after != before)
        return 0;
    /* That says something only if it does work where no page is kept missing. */
    if (qpc_uffd_unregister(uffd, (uintptr_t)control, HUGE_BYTES, err) < 0)
        return -1;
    if (madvise(control, HUGE_BYTES, MADV_COLLAPSE) < 0)
        return qpc_error_set(err, QPC_UNSUPPORTED, errno, "MADV_COLLAPSE (Linux 6.1)");
    if (filled_bytes(fd) != before - PAGE_BYTES + HUGE_BYTES)
        return qpc_error_set(err, QPC_UNSUPPORTED, 0, "MADV_COLLAPSE did nothing");
    return 1;
}

int qpc_probe_collapse(struct qpc_error *err)
{
    uint8_t *space, *memory;
    int fd, uffd, result = -1;
    uint64_t features;

    uffd = qpc_uffd_open(err);
    if (uffd < 0)
        return -1;
    /* A descriptor is negotiated once, so another one is asked what there is. */
    if (qpc_uffd_features(&features, err) < 0 ||
        qpc_uffd_api(uffd, features & UFFD_FEATURE_MISSING_SHMEM, err) < 0)
        goto close_uffd;
    fd = memfd_create("qpc-probe", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, 2 * HUGE_BYTES) < 0) {
        qpc_error_set(err, QPC_SYSTEM, errno, "memfd_create");
        goto close_fd;
    }
    space = mmap(NULL, 3 * HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (space == MAP_FAILED) {
        qpc_error_set(err, QPC_SYSTEM, errno, "mmap");
        goto close_fd;
    }
    /* A huge page wants address and offset in the file to be multiples of its size. */
    memory = (uint8_t *)(((uintptr_t)space + HUGE_BYTES - 1) & ~(uintptr_t)(HUGE_BYTES - 1));
    if (mmap(memory, 2 * HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
        MAP_FAILED)
        qpc_error_set(err, QPC_SYSTEM, errno, "mmap of a memfd");
    else
        result = compare(uffd, fd, memory, err);
    munmap(space, 3 * HUGE_BYTES);
close_fd:
    if (fd >= 0)
        close(fd);
close_uffd:
    close(uffd);
    return result;
}
