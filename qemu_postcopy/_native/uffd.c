#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int qpc_uffd_open(struct qpc_error *err)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd;

    if (device >= 0) {
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
        if (uffd >= 0)
            return uffd;
    }
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        return qpc_error_set(err, QPC_REFUSED, errno,
                             "neither /dev/userfaultfd nor userfaultfd(2) gives a descriptor that "
                             "gets the kernel's faults, as KVM's are");
    return uffd;
}

int qpc_uffd_api(int uffd, uint64_t features, struct qpc_error *err)
{
    struct uffdio_api api = { .api = UFFD_API, .features = features };

    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "UFFDIO_API with features %#llx failed",
                             (unsigned long long)features);
    return 0;
}

int qpc_uffd_features(uint64_t *features, struct qpc_error *err)
{
    struct uffdio_api api = { .api = UFFD_API };
    int uffd = qpc_uffd_open(err);

    if (uffd < 0)
        return -1;
    if (ioctl(uffd, UFFDIO_API, &api) < 0) {
        int errnum = errno;
        close(uffd);
        return qpc_error_set(err, QPC_SYSTEM, errnum, "UFFDIO_API failed");
    }
    close(uffd);
    *features = api.features;
    return 0;
}

uint64_t qpc_uffd_wanted_features(uint64_t available)
{
    uint64_t wanted = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
                      UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_MISSING_SHMEM |
                      UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_PAGEFAULT_FLAG_WP |
                      UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED |
                      UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_THREAD_ID;

    return wanted & available;
}

int qpc_uffd_register(int uffd, uint64_t start, uint64_t length, struct qpc_error *err)
{
    struct uffdio_register reg = { .range = { .start = start, .len = length } };

    reg.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP;
    if (ioctl(uffd, UFFDIO_REGISTER, &reg) == 0)
        return (int)reg.mode;
    if (errno == EINVAL) {
        reg.mode = UFFDIO_REGISTER_MODE_MISSING;
        if (ioctl(uffd, UFFDIO_REGISTER, &reg) == 0)
            return (int)reg.mode;
    }
    return qpc_error_set(err, errno == EBUSY ? QPC_REFUSED : QPC_SYSTEM, errno,
                         errno == EBUSY ? "another userfaultfd has registered %#llx+%#llx already"
                                        : "cannot register %#llx+%#llx",
                         (unsigned long long)start, (unsigned long long)length);
}

int qpc_uffd_unregister(int uffd, uint64_t start, uint64_t length, struct qpc_error *err)
{
    struct uffdio_range range = { .start = start, .len = length };

    if (ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0)
        return qpc_error_set(err, errno == ESRCH ? QPC_GONE : QPC_SYSTEM, errno,
                             "cannot unregister %#llx+%#llx", (unsigned long long)start,
                             (unsigned long long)length);
    return 0;
}

int qpc_uffd_wake(int uffd, uint64_t start, uint64_t length, struct qpc_error *err)
{
    struct uffdio_range range = { .start = start, .len = length };

    if (ioctl(uffd, UFFDIO_WAKE, &range) < 0)
        return qpc_error_set(err, QPC_SYSTEM, errno, "UFFDIO_WAKE of %#llx+%#llx failed",
                             (unsigned long long)start, (unsigned long long)length);
    return 0;
}

int qpc_uffd_event_pending(int uffd)
{
    struct uffdio_zeropage nothing = { 0 };

    /* EAGAIN comes before the range is looked at; EINVAL for this one, of no length, after it. */
    return ioctl(uffd, UFFDIO_ZEROPAGE, &nothing) < 0 && errno == EAGAIN;
}

/*
 * The result field is signed: bytes done, or a negative errno where nothing was done. The ioctl
 * itself says EAGAIN for a partial fill as well, so the field is asked first.
 */
static enum qpc_outcome outcome_of(int64_t result, uint64_t *done)
{
    if (result > 0) {
        *done = (uint64_t)result;
        return QPC_RETRY;
    }
    *done = 0;
    switch (errno) {
    case EEXIST:
        return QPC_ALREADY_PRESENT;
    case EAGAIN:
        return QPC_RETRY;
    case ESRCH:
        return QPC_TARGET_GONE;
    case ENOENT:
        return QPC_NOT_REGISTERED;
    default:
        return QPC_FAILED;
    }
}

enum qpc_outcome qpc_uffd_copy(int uffd, uint64_t start, const void *from, uint64_t length,
                               int wake, uint64_t *done)
{
    struct uffdio_copy copy = { .dst = start, .src = (uintptr_t)from, .len = length,
                                .mode = wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE };

    if (ioctl(uffd, UFFDIO_COPY, &copy) == 0) {
        *done = length;
        return QPC_FILLED;
    }
    return outcome_of(copy.copy, done);
}

enum qpc_outcome qpc_uffd_zeropage(int uffd, uint64_t start, uint64_t length, uint64_t *done)
{
    struct uffdio_zeropage zero = { .range = { .start = start, .len = length } };

    if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0) {
        *done = length;
        return QPC_FILLED;
    }
    return outcome_of(zero.zeropage, done);
}
