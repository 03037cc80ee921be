#define _GNU_SOURCE
#include "uffd_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "probe.h"

/* Younger than some systems' headers: UFFDIO_POISON is of Linux 6.6, UFFDIO_MOVE of 6.8. */
struct move_argument {
    uint64_t destination;
    uint64_t source;
    uint64_t length;
    uint64_t mode;
    int64_t moved;
};

struct poison_argument {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};

#define CALL_MOVE _IOWR(0xAA, QPC_OPERATION_MOVE, struct move_argument)
#define CALL_POISON _IOWR(0xAA, QPC_OPERATION_POISON, struct poison_argument)

/* The kernel takes size and number together: what is built here is what it was built with. */
_Static_assert(sizeof(struct uffd_msg) == 32, "struct uffd_msg");
_Static_assert(offsetof(struct uffd_msg, arg) == 8, "struct uffd_msg.arg");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.address) == 16, "uffd_msg address");
_Static_assert(offsetof(struct uffd_msg, arg.pagefault.feat.ptid) == 24, "uffd_msg thread id");
_Static_assert(sizeof(struct uffdio_api) == 24, "struct uffdio_api");
_Static_assert(sizeof(struct uffdio_range) == 16, "struct uffdio_range");
_Static_assert(sizeof(struct uffdio_register) == 32, "struct uffdio_register");
_Static_assert(sizeof(struct uffdio_copy) == 40, "struct uffdio_copy");
_Static_assert(sizeof(struct uffdio_zeropage) == 32, "struct uffdio_zeropage");
_Static_assert(sizeof(struct uffdio_writeprotect) == 24, "struct uffdio_writeprotect");
_Static_assert(sizeof(struct uffdio_continue) == 32, "struct uffdio_continue");
_Static_assert(sizeof(struct move_argument) == 40, "struct uffdio_move");
_Static_assert(sizeof(struct poison_argument) == 32, "struct uffdio_poison");
/* As on x86-64 and aarch64; powerpc, mips and sparc number their ioctls in another way. */
#if defined(__x86_64__) || defined(__aarch64__)
_Static_assert(UFFDIO_API == 0xC018AA3F, "UFFDIO_API");
_Static_assert(UFFDIO_REGISTER == 0xC020AA00, "UFFDIO_REGISTER");
_Static_assert(UFFDIO_UNREGISTER == 0x8010AA01, "UFFDIO_UNREGISTER");
_Static_assert(UFFDIO_WAKE == 0x8010AA02, "UFFDIO_WAKE");
_Static_assert(UFFDIO_COPY == 0xC028AA03, "UFFDIO_COPY");
_Static_assert(UFFDIO_ZEROPAGE == 0xC020AA04, "UFFDIO_ZEROPAGE");
_Static_assert(CALL_MOVE == 0xC028AA05, "UFFDIO_MOVE");
_Static_assert(UFFDIO_WRITEPROTECT == 0xC018AA06, "UFFDIO_WRITEPROTECT");
_Static_assert(UFFDIO_CONTINUE == 0xC020AA07, "UFFDIO_CONTINUE");
_Static_assert(CALL_POISON == 0xC020AA08, "UFFDIO_POISON");
_Static_assert(USERFAULTFD_IOC_NEW == 0xAA00, "USERFAULTFD_IOC_NEW");
#endif
_Static_assert(QPC_FEATURE_PAGEFAULT_FLAG_WP == UFFD_FEATURE_PAGEFAULT_FLAG_WP, "feature");
_Static_assert(QPC_FEATURE_EVENT_FORK == UFFD_FEATURE_EVENT_FORK, "feature");
_Static_assert(QPC_FEATURE_EVENT_REMAP == UFFD_FEATURE_EVENT_REMAP, "feature");
_Static_assert(QPC_FEATURE_EVENT_REMOVE == UFFD_FEATURE_EVENT_REMOVE, "feature");
_Static_assert(QPC_FEATURE_MISSING_HUGETLBFS == UFFD_FEATURE_MISSING_HUGETLBFS, "feature");
_Static_assert(QPC_FEATURE_MISSING_SHMEM == UFFD_FEATURE_MISSING_SHMEM, "feature");
_Static_assert(QPC_FEATURE_EVENT_UNMAP == UFFD_FEATURE_EVENT_UNMAP, "feature");
_Static_assert(QPC_FEATURE_SIGBUS == UFFD_FEATURE_SIGBUS, "feature");
_Static_assert(QPC_FEATURE_THREAD_ID == UFFD_FEATURE_THREAD_ID, "feature");
_Static_assert(QPC_FEATURE_WP_HUGETLBFS_SHMEM == UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "feature");
_Static_assert(QPC_FEATURE_WP_UNPOPULATED == UFFD_FEATURE_WP_UNPOPULATED, "feature");
_Static_assert(QPC_FEATURE_WP_ASYNC == UFFD_FEATURE_WP_ASYNC, "feature");

int qpc_call_open(int way, int nonblocking, int user_mode_only)
{
    /* UFFD_USER_MODE_ONLY is bit 0 of the flags (Linux 5.11). */
    int flags = O_CLOEXEC | (nonblocking ? O_NONBLOCK : 0) | (user_mode_only ? 1 : 0);
    int device, uffd, errnum;

    if (way == QPC_WAY_SYSCALL) {
        uffd = (int)syscall(SYS_userfaultfd, flags);
        return uffd < 0 ? -errno : uffd;
    }
    if (way != QPC_WAY_DEVICE)
        return -EINVAL;
    device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return -errno;
    uffd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
    errnum = errno;
    close(device);
    return uffd < 0 ? -errnum : uffd;
}

int qpc_call_api(int uffd, uint64_t features, uint64_t *known, uint64_t *ioctls)
{
    struct uffdio_api api = { .api = UFFD_API, .features = features };
    int result = ioctl(uffd, UFFDIO_API, &api) < 0 ? -errno : 0;

    /* On failure the kernel hands zeros back. */
    *known = api.features;
    *ioctls = api.ioctls;
    return result;
}

int qpc_call_register(int uffd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls)
{
    struct uffdio_register reg = { .range = { .start = start, .len = length }, .mode = mode };

    if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
        return -errno;
    *ioctls = reg.ioctls;
    return 0;
}

int qpc_call_operation(int uffd, int operation, uint64_t start, uint64_t from, uint64_t length,
                       uint64_t mode, int64_t *done)
{
    struct uffdio_range range = { .start = start, .len = length };
    struct uffdio_copy copy = { .dst = start, .src = from, .len = length, .mode = mode };
    struct move_argument move = { .destination = start, .source = from, .length = length,
                                  .mode = mode };
    struct uffdio_zeropage zero = { .range = range, .mode = mode };
    struct uffdio_continue minor = { .range = range, .mode = mode };
    struct poison_argument poison = { .range = range, .mode = mode };
    struct uffdio_writeprotect protect = { .range = range, .mode = mode };
    unsigned long request;
    void *argument;
    int64_t *field = NULL;
    int result;

    switch (operation) {
    case QPC_OPERATION_UNREGISTER:
        request = UFFDIO_UNREGISTER, argument = &range;
        break;
    case QPC_OPERATION_WAKE:
        request = UFFDIO_WAKE, argument = &range;
        break;
    case QPC_OPERATION_WRITEPROTECT:
        request = UFFDIO_WRITEPROTECT, argument = &protect;
        break;
    case QPC_OPERATION_COPY:
        request = UFFDIO_COPY, argument = &copy, field = (int64_t *)&copy.copy;
        break;
    case QPC_OPERATION_ZEROPAGE:
        request = UFFDIO_ZEROPAGE, argument = &zero, field = (int64_t *)&zero.zeropage;
        break;
    case QPC_OPERATION_CONTINUE:
        request = UFFDIO_CONTINUE, argument = &minor, field = (int64_t *)&minor.mapped;
        break;
    case QPC_OPERATION_MOVE:
        request = CALL_MOVE, argument = &move, field = &move.moved;
        break;
    case QPC_OPERATION_POISON:
        request = CALL_POISON, argument = &poison, field = &poison.updated;
        break;
    default:
        *done = 0;
        return -EINVAL;
    }
    result = ioctl(uffd, request, argument) < 0 ? -errno : 0;
    if (field)
        *done = *field;
    else
        *done = result == 0 ? (int64_t)length : 0;
    return result;
}
