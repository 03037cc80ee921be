/*
 * The trace: a record of each fault and its answer in mapped memory, which a file may be behind.
 * Written by the pager thread without a lock, an allocation or a system call.
 */
#ifndef QPC_PAGER_TRACE_H
#define QPC_PAGER_TRACE_H

#include <stdint.h>

/* cdef-begin */
/* How a fault was answered. */
enum qpc_trace_answer {
    QPC_TRACE_DATA = 0, /* from the source */
    QPC_TRACE_ZERO = 1, /* known to be zero, or removed by the guest */
    QPC_TRACE_GONE = 2  /* woken: this memory is not the mapper's any more */
};

/* A fault in the trace: 24 bytes, little-endian. Records are in the order of the answers. */
struct qpc_trace_record {
    uint64_t read_ns;    /* CLOCK_MONOTONIC when the message was read */
    uint32_t tid;        /* as the thread itself sees it; 0: not known */
    uint32_t page;       /* index in its block */
    uint32_t latency_ns; /* from then to the answer; UINT32_MAX: as much or more */
    uint16_t block;      /* index */
    uint8_t answer;      /* enum qpc_trace_answer */
    uint8_t attempts;    /* times put off; 255: as many or more */
};

/* The part of the file's header that the pager writes. When it is full, faults are only counted. */
struct qpc_trace {
    uint64_t capacity; /* records; written by whoever made the file */
    uint64_t count;    /* records that are complete */
    uint64_t lost;     /* faults that found no room */
};

struct qpc_pager;

/*
 * Before qpc_pager_start(): has every fault recorded. Header and records must live until
 * qpc_pager_destroy(), in memory that has been allocated: a disk that is full when a page of it is
 * first touched would end the process.
 */
void qpc_pager_record(struct qpc_pager *pager, struct qpc_trace *trace,
                      struct qpc_trace_record *records);
/* cdef-end */

#endif
