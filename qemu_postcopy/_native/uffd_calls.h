/*
 * The whole kernel interface of userfaultfd as plain calls, for qemu_postcopy.userfaultfd: each
 * ioctl once, with its errno and its signed result (ioctl_userfaultfd(2),
 * Documentation/admin-guide/mm/userfaultfd.rst). The restore path's own operations are in uffd.h.
 *
 * Every call returns 0 (or a descriptor), or -errno. Any thread may call; none of them allocates.
 */
#ifndef QPC_UFFD_CALLS_H
#define QPC_UFFD_CALLS_H

#include <stdint.h>

#include "uffd.h"

/* cdef-begin */
/* UFFD_FEATURE_*, each as the kernel has numbered it; Linux 6.18 knows these. */
enum qpc_feature {
    QPC_FEATURE_PAGEFAULT_FLAG_WP = 0x1,
    QPC_FEATURE_EVENT_FORK = 0x2,
    QPC_FEATURE_EVENT_REMAP = 0x4,
    QPC_FEATURE_EVENT_REMOVE = 0x8,
    QPC_FEATURE_MISSING_HUGETLBFS = 0x10,
    QPC_FEATURE_MISSING_SHMEM = 0x20,
    QPC_FEATURE_EVENT_UNMAP = 0x40,
    QPC_FEATURE_SIGBUS = 0x80,
    QPC_FEATURE_THREAD_ID = 0x100,
    QPC_FEATURE_MINOR_HUGETLBFS = 0x200,
    QPC_FEATURE_MINOR_SHMEM = 0x400,
    QPC_FEATURE_EXACT_ADDRESS = 0x800,
    QPC_FEATURE_WP_HUGETLBFS_SHMEM = 0x1000,
    QPC_FEATURE_WP_UNPOPULATED = 0x2000,
    QPC_FEATURE_POISON = 0x4000,
    QPC_FEATURE_WP_ASYNC = 0x8000,
    QPC_FEATURE_MOVE = 0x10000
};

/* The ioctls' numbers; an answer of UFFDIO_API or UFFDIO_REGISTER has bit 1 << number for each. */
enum qpc_operation {
    QPC_OPERATION_REGISTER = 0x0,
    QPC_OPERATION_UNREGISTER = 0x1,
    QPC_OPERATION_WAKE = 0x2,
    QPC_OPERATION_COPY = 0x3,
    QPC_OPERATION_ZEROPAGE = 0x4,
    QPC_OPERATION_MOVE = 0x5,
    QPC_OPERATION_WRITEPROTECT = 0x6,
    QPC_OPERATION_CONTINUE = 0x7,
    QPC_OPERATION_POISON = 0x8,
    QPC_OPERATION_API = 0x3f
};

/* A fresh descriptor, by QPC_WAY_DEVICE or QPC_WAY_SYSCALL; always close-on-exec. */
int qpc_call_open(int way, int nonblocking, int user_mode_only);

/* UFFDIO_API with exactly these features; *known are all that this kernel has. */
int qpc_call_api(int uffd, uint64_t features, uint64_t *known, uint64_t *ioctls);

/* UFFDIO_REGISTER; *ioctls are the operations that this range allows. */
int qpc_call_register(int uffd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls);

/*
 * One operation on [start, start+length). `from` is the source of COPY and MOVE; `mode` is that of
 * the ioctl. *done is the kernel's own result: bytes, or a negative errno, or 0 where it gave none;
 * for those without a result (UNREGISTER, WAKE, WRITEPROTECT) `length` or 0. A partial result comes
 * with -EAGAIN.
 */
int qpc_call_operation(int uffd, int operation, uint64_t start, uint64_t from, uint64_t length,
                       uint64_t mode, int64_t *done);
/* cdef-end */

#endif
