/*
 * A source in front of another that misbehaves by a schedule: for chaos runs and tests.
 *
 * Each read is numbered, and what happens to it is a function of seed and number alone: the same
 * reads in the same order meet the same mischief. What a failed read leaves in the buffer is
 * rubbish on purpose: whoever used it would be found out.
 */
#ifndef QPC_SOURCE_CHAOS_H
#define QPC_SOURCE_CHAOS_H

#include "source.h"

/* cdef-begin */
enum { QPC_CHAOS_ERRORS_MAX = 16, QPC_CHAOS_RANGES_MAX = 16 };

/* Probabilities are parts of 2^32 and add up to that at most; ranges of numbers have both ends in. */
struct qpc_chaos_schedule {
    uint64_t seed;
    uint64_t fail;               /* the read ends with one of `errors` */
    uint64_t truncate;           /* only a part is read, then the source has ended (ENODATA) */
    uint64_t delay;              /* it takes longer by delay_us */
    uint64_t stall;              /* it takes longer by stall_us; last = 0: until qpc_chaos_release() */
    uint32_t error_count;
    int errors[16];
    uint64_t delay_us_first, delay_us_last;
    uint64_t stall_us_first, stall_us_last;
    uint32_t burst_first, burst_last; /* so many reads in a row fail or are cut, once one is */
    uint64_t limit;              /* failed and cut reads in all; 0: no limit */
    uint32_t range_count;        /* 0: everywhere */
    uint64_t range_begin[16];    /* bytes of the source; a read that touches one is meant */
    uint64_t range_end[16];
};

/* What was done so far. */
struct qpc_chaos_counts {
    uint64_t reads;
    uint64_t failed;
    uint64_t truncated;
    uint64_t delayed;
    uint64_t stalled;
    uint64_t stalled_now;
};

/* Takes `inner` over, but not if this fails. The schedule is copied. */
struct qpc_source *qpc_source_open_chaos(struct qpc_source *inner,
                                         const struct qpc_chaos_schedule *schedule,
                                         struct qpc_error *err);

/* These take a source of qpc_source_open_chaos() and may be called by any thread. */
void qpc_chaos_enable(struct qpc_source *source, int on); /* off: all reads are good; on at first */
void qpc_chaos_release(struct qpc_source *source);        /* reads that are held up go on */
void qpc_chaos_read_counts(struct qpc_source *source, struct qpc_chaos_counts *ret);
/* cdef-end */

#endif
