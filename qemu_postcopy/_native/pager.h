/*
 * The pager: one thread that answers the faults of one userfaultfd.
 *
 *   read a batch -> note REMOVE and UNMAP in the ledger -> serve the faults
 *   (page data from its source by COPY, known zeros by ZEROPAGE) -> fill in the
 *   background while nobody waits -> spin for a little, then sleep
 *
 * After qpc_pager_start() that thread alone touches the pager, the ledger and
 * the descriptors; it takes no lock and allocates nothing. Everything another
 * thread reads or sets is a relaxed atomic. Two rules hold on every path: a page
 * gets zeros only where zero is known (a hole of the source, or removed by the
 * guest), and a fault that cannot be served stays blocked until it can.
 */
#ifndef QPC_PAGER_H
#define QPC_PAGER_H

#include "error.h"
#include "source.h"

/* cdef-begin */
/* One byte per page in the ledger, written by the pager thread only. */
enum qpc_page_state {
    QPC_PAGE_MISSING = 0,
    QPC_PAGE_FILLING = 1, /* about to be filled: it may or may not have arrived */
    QPC_PAGE_PRESENT = 2, /* filled once; if it is missing now, the guest removed it */
    QPC_PAGE_REMOVED = 3, /* given back by the guest: reads as zero for ever */
    QPC_PAGE_UNMAPPED = 4, /* not the mapper's any more: never written to, whatever lies there now */
    QPC_PAGE_RETURNED = 5  /* there or removed, and unregistered: the kernel's own affair */
};

/* One RAM block. All lengths and addresses are multiples of page_size. */
struct qpc_pager_block {
    uint64_t address;           /* in the mapper */
    uint64_t length;            /* bytes */
    uint64_t page_size;         /* 4096, or the huge page size of the back-end */
    uint64_t source_offset;     /* of the block's first byte in the source */
    struct qpc_source *source;  /* not closed by the pager */
    const uint8_t *data_bitmap; /* one bit per page, least significant first: 1 = data, 0 = known zero */
    uint8_t *ledger;            /* one enum qpc_page_state per page */
};

enum { QPC_PAGER_JOURNAL_SIZE = 2048 };

enum qpc_background {
    QPC_BACKGROUND_OFF = 0,
    QPC_BACKGROUND_ON = 1,     /* when no fault has come for a moment */
    QPC_BACKGROUND_AT_ONCE = 2 /* between any two faults: page data will not be there for long */
};

struct qpc_pager_options {
    int userfaultfd;          /* O_NONBLOCK, registered; not closed by the pager */
    uint64_t chunk_size;      /* bytes filled around a fault: a power of two, 4 KiB to 2 MiB */
    int background;           /* fill the rest while nobody waits: enum qpc_background */
    uint64_t background_rate; /* bytes per second; 0 = as fast as it goes */
    uint32_t spin_limit_us;   /* longest poll for the next fault before sleeping; 0 = never */
    int note_first_faults;    /* see qpc_pager_first_faults() */
    /*
     * QPC_PAGER_JOURNAL_SIZE bytes, or NULL: where messages are read into. The mapper's thread runs
     * on as soon as its REMOVE was read, before that is in the ledger. If the journal outlives the
     * process as the ledger does, the next pager finds the message there and makes up for it.
     */
    void *journal;
};

enum qpc_pager_state {
    QPC_PAGER_IDLE = 0,       /* not started, or stopped: faults wait */
    QPC_PAGER_SERVING = 1,
    QPC_PAGER_COMPLETE = 2,   /* every data page is present; still serving */
    QPC_PAGER_MAPPER_GONE = 3 /* the mapper has exited: nothing left to serve */
};

/*
 * Counters since qpc_pager_create(). Read while the pager runs they are each right, but not of one
 * and the same moment.
 */
struct qpc_pager_statistics {
    uint64_t state;              /* enum qpc_pager_state */
    uint64_t faults;             /* messages read */
    uint64_t faults_waiting;     /* read, not yet answered: stays above 0 while a source fails */
    uint64_t pages_total;
    uint64_t pages_data;         /* pages that the source has data for */
    uint64_t pages_data_missing; /* of these, not yet present */
    uint64_t pages_demand;       /* with data, copied around a fault */
    uint64_t pages_background;   /* copied with nobody waiting */
    uint64_t pages_prefetched;   /* copied ahead, because an earlier guest of this image used them */
    uint64_t pages_zero;         /* known to be zero, and filled with zeros */
    uint64_t pages_removed;      /* given back by the guest */
    uint64_t bytes_read;         /* from the source */
    uint64_t already_present;    /* EEXIST answers */
    uint64_t pages_foreign;      /* with data, and there before they were filled: another process that
                                    maps this memory has made them, of zeros */
    uint64_t foreign_block;      /* index; of the first of these */
    uint64_t foreign_page;       /* index */
    uint64_t retries;            /* EAGAIN answers */
    uint64_t events_remove;
    uint64_t events_unmap;
    uint64_t events_other;
    uint64_t wakes;
    uint64_t source_errors;      /* failed or short reads */
    uint64_t fill_errors;        /* COPY or ZEROPAGE failed for want of memory and the like */
    uint64_t last_error;         /* errno of the last of these two; ENODATA = the file is too short */
    uint64_t last_error_block;   /* index */
    uint64_t last_error_page;    /* index */
    uint64_t failing;            /* faults (and the background, as one) that wait for data now */
    uint64_t reading_since_ns;   /* a read of the source is under way: CLOCK_MONOTONIC since when
                                    somebody waits for it; 0 = none is */
    uint64_t reading_block;      /* index; of the read that is under way, or was last */
    uint64_t reading_page;       /* index */
    uint64_t spins_hit;          /* a fault came while polling */
    uint64_t spins_missed;
    uint64_t started_ns;         /* CLOCK_MONOTONIC of qpc_pager_start() */
    uint64_t first_fault_ns;     /* CLOCK_MONOTONIC; 0 = none yet */
    uint64_t last_fault_ns;
    uint64_t complete_ns;        /* CLOCK_MONOTONIC of the last data page; 0 = not yet */
    uint64_t latency_us[24];     /* faults answered in less than 2^i microseconds after being read */
    uint32_t timeline[2048];     /* faults read in each 10 ms since the start */
};

struct qpc_pager;

/*
 * Checks the blocks and options; allocates all that will be needed. Pages whose ledger byte is
 * MISSING or FILLING are to be filled, all others are done. The blocks are copied; bitmaps, ledgers, journal, sources and
 * descriptors must live until qpc_pager_destroy().
 */
struct qpc_pager *qpc_pager_create(const struct qpc_pager_options *options,
                                   const struct qpc_pager_block *blocks, uint32_t block_count,
                                   struct qpc_error *err);
/* Stops first, if need be. NULL is allowed. */
void qpc_pager_destroy(struct qpc_pager *pager);

/* A page that is asked for. */
struct qpc_pager_page {
    uint32_t block; /* index */
    uint64_t page;  /* index */
};

enum { QPC_PAGER_FIRST_FAULTS = 2048 };

/*
 * Before qpc_pager_start(): these pages are filled in this order, as soon as the pager runs, whenever
 * no fault waits. What cannot be had then is left to the faults. At most QPC_PAGER_FIRST_FAULTS
 * pages; the list is copied.
 */
int qpc_pager_prefetch(struct qpc_pager *pager, const struct qpc_pager_page *pages, uint32_t count,
                       struct qpc_error *err);

/*
 * The pages of the first faults, in their order: those of the first tenth of a second after the very
 * first one, at most QPC_PAGER_FIRST_FAULTS. While they are noted, and nothing was filled ahead, a
 * fault fills no more than its own page, else most pages that the guest wants would not show. ret has room for so many; returns how
 * many there are. May be called at any time, from any thread.
 */
uint32_t qpc_pager_first_faults(const struct qpc_pager *pager, struct qpc_pager_page *ret);

int qpc_pager_start(struct qpc_pager *pager, struct qpc_error *err);
/*
 * Ends the thread between two fills and waits for it; faults then wait. It can be started again:
 * faults that were read and not answered are answered then.
 */
int qpc_pager_stop(struct qpc_pager *pager, struct qpc_error *err);

/* May be called at any time, from any thread. background: enum qpc_background. */
void qpc_pager_set_background(struct qpc_pager *pager, int background, uint64_t rate);
void qpc_pager_read_statistics(const struct qpc_pager *pager, struct qpc_pager_statistics *ret);

/*
 * An eventfd that becomes readable when something happened that an operator or the session wants
 * to know: complete, the mapper gone, errors begun or ended, a thread's first fault. Owned by the
 * pager.
 */
int qpc_pager_notify_fd(const struct qpc_pager *pager);

/* The thread's id for pinning (sched_setaffinity), or 0 while stopped. */
int qpc_pager_thread_id(const struct qpc_pager *pager);
/* cdef-end */

#endif
