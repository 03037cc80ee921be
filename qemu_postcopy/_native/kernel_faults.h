/*
 * Whether a userfaultfd that another process has made also gets the faults of the kernel.
 *
 * One made with UFFD_USER_MODE_ONLY does not, and nothing tells so but the fault itself: KVM, a
 * system call or vhost then gets EFAULT in memory that is only late (handle_userfault,
 * fs/userfaultfd.c). So the kernel is had to touch a page, in a process made for this.
 */
#ifndef QPC_KERNEL_FAULTS_H
#define QPC_KERNEL_FAULTS_H

#include <stdint.h>

#include "error.h"

/* cdef-begin */
enum qpc_kernel_faults {
    QPC_KERNEL_FAULTS_TOLD = 0,    /* the fault waited to be answered: it was withdrawn */
    QPC_KERNEL_FAULTS_FAIL = 1,    /* EFAULT: for user mode only, or no memory there at all */
    QPC_KERNEL_FAULTS_UNKNOWN = 2  /* the page is present; nothing is known */
};

/*
 * Reads a byte at `address` of process `pid` by process_vm_readv(2). Nobody may read messages of
 * the userfaultfd meanwhile; none is left, and the page stays missing. Returns one of the above, or -1:
 * QPC_REFUSED where tracing `pid` is not permitted, QPC_TIMEOUT after a second. Any thread.
 */
int qpc_kernel_faults_probe(int uffd, int pid, uint64_t address, struct qpc_error *err);
/* cdef-end */

#endif
