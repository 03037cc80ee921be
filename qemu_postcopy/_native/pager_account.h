/*
 * Whose faults the pager answers, in which block, and how long each thread was kept waiting.
 *
 * Step "serve" of the flow: the pager thread counts per thread id, in a table that never grows;
 * who these threads are others find out (vm/origin.py), who are woken by the notify descriptor when
 * a thread faults for the first time: it may have ended a moment later. No allocation and no lock.
 *
 * A virtual CPU is stopped from the moment its fault is read until it is answered; the time in which
 * all of them are is what QEMU calls postcopy-blocktime (query-migrate; migration/postcopy-ram.c).
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
    uint64_t waiting;        /* read, not yet answered */
    uint64_t waiting_since_ns; /* CLOCK_MONOTONIC: it has not been without one since; 0 = none */
    uint64_t latency_us[24]; /* as in struct qpc_pager_statistics */
};

/* What became of one block; pages are counted in its own page size. */
struct qpc_block_account {
    uint64_t faults;             /* read */
    uint64_t waiting;            /* of these, not yet answered */
    uint64_t pages_data;         /* pages that the source has data for */
    uint64_t pages_data_missing; /* of these, not yet present */
    uint64_t pages_removed;      /* given back by the guest */
    uint64_t pages_unmapped;     /* gone from the mapper: all of them when the block was taken away */
};

/* The virtual CPUs, since qpc_pager_name_vcpus(). */
struct qpc_vcpu_account {
    uint64_t count;                /* threads that run virtual CPUs; 0 = not known */
    uint64_t stopped;              /* of these, so many wait for a page now */
    uint64_t all_stopped_ns;       /* so long all of them did, at the same time */
    uint64_t all_stopped_since_ns; /* CLOCK_MONOTONIC: they do now, since then; 0 = they do not */
};

/*
 * Copies all slots, QPC_ORIGIN_SLOTS of them. Each number is right, but not of the same moment. May be
 * called at any time, from any thread.
 */
void qpc_pager_read_origins(const struct qpc_pager *pager, struct qpc_origin *ret);

/* Likewise, an entry for each block. */
void qpc_pager_read_blocks(const struct qpc_pager *pager, struct qpc_block_account *ret);

/*
 * Says which threads run virtual CPUs, in the numbers of their own PID namespace; again whenever
 * that changes. More than QPC_ORIGIN_TABLE are none. May be called at any time, by one thread at a
 * time; the pager heeds it from the next fault or answer on.
 */
void qpc_pager_name_vcpus(struct qpc_pager *pager, const uint32_t *tids, uint32_t count);
void qpc_pager_read_vcpus(const struct qpc_pager *pager, struct qpc_vcpu_account *ret);
/* cdef-end */

#endif
