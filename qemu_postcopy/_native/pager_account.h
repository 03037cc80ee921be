/*
 * Whose faults the pager answers, and how long each thread was kept waiting.
 *
 * Step "serve" of the flow: the pager thread counts per thread id, in a table that never grows;
 * who these threads are is found out later, and by others (vm/origin.py). No allocation, no lock
 * and no system call.
 */
#ifndef QPC_PAGER_ACCOUNT_H
#define QPC_PAGER_ACCOUNT_H

#include "pager.h"

/* cdef-begin */
enum {
    QPC_ORIGIN_TABLE = 256,    /* slots for threads; the two after them are: */
    QPC_ORIGIN_OTHER = 256,    /* threads that found no room */
    QPC_ORIGIN_UNKNOWN = 257,  /* faults whose thread the kernel does not tell */
    QPC_ORIGIN_SLOTS = 258
};

/* The faults of one thread. */
struct qpc_origin {
    uint64_t tid;            /* in the thread's own PID namespace; 0 = none yet, or see above */
    uint64_t faults;         /* read */
    uint64_t blocked_ns;     /* sum of the times from reading to answering */
    uint64_t latency_us[24]; /* as in struct qpc_pager_statistics */
};

/*
 * Copies all slots, QPC_ORIGIN_SLOTS of them. Each number is right, but not of the same moment. May be
 * called at any time, from any thread.
 */
void qpc_pager_read_origins(const struct qpc_pager *pager, struct qpc_origin *ret);
/* cdef-end */

#endif
