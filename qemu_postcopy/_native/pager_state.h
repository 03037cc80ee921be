/*
 * What the parts of the pager share; nobody else includes it.
 *
 *   pager_events.c   messages of the userfaultfd into the queue and the ledger
 *   pager_answer.c   the queue answered, several faults together, or put off
 *   pager_fill.c     pages read from the source and put into the mapper
 *   pager_background.c  the rest filled while nobody waits
 *   pager_window.c   finding the moments in which the kernel lets a COPY through
 *   pager_prefetch.c what the first faults were, and filling those pages ahead the next time
 *   pager_account.c  faults and waiting counted by thread and by block, virtual CPUs stopped
 *   pager_trace.c    each fault recorded in memory that others read
 *   pager.c          life cycle, the thread's loop, waiting
 *
 * All of it is the pager thread's own, but for what is atomic.
 */
#ifndef QPC_PAGER_STATE_H
#define QPC_PAGER_STATE_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include <linux/userfaultfd.h>

#include "pager_account.h"
#include "pager_trace.h"

/* Faults read and not answered. A blocked thread has one, an asynchronous page fault one each. */
#ifndef QPC_PAGER_QUEUE_LENGTH
#define QPC_PAGER_QUEUE_LENGTH 16384u
#endif
#define QPC_PAGER_DOUBTS 64u
#define QPC_PAGER_BATCH 8u /* faults that are read, filled and woken together */
#define QPC_PAGER_BACKGROUND_UNIT (128 << 10)

/* Counters: one writer, any readers. A plain load and store is enough, and compiles to one add. */
#define COUNT(counter, n) \
    atomic_store_explicit(&(counter), GET(counter) + (n), memory_order_relaxed)
#define SET(counter, value) atomic_store_explicit(&(counter), (value), memory_order_relaxed)
#define GET(counter) atomic_load_explicit(&(counter), memory_order_relaxed)

struct block {
    struct qpc_pager_block is;
    uint64_t page_count;
    uint32_t page_shift;
    uint64_t cursor; /* where the background goes on: after the last fault */
    struct {
        _Atomic uint64_t faults, waiting, pages_data, pages_data_missing, pages_removed,
            pages_unmapped;
    } account; /* struct qpc_block_account */
};

struct fault {
    uint64_t page;
    uint64_t read_ns;
    uint64_t due_ns; /* 0 = now */
    uint32_t block;
    uint32_t tid;
    uint16_t attempts;
    uint16_t failed : 1; /* source or memory could not be had, rather than an event being first */
    uint16_t counted : 1; /* among those that wait */
    uint16_t slot : 14;  /* of the thread, in origins */
    uint16_t doubted : 1; /* it stands for all that wait for a huge page; see settle_doubt() */
};

struct qpc_pager {
    int uffd;
    int stop_fd;
    int notify_fd;
    uint64_t chunk_size;
    uint64_t spin_limit_ns;
    uint8_t *buffer; /* at least one chunk or page, whichever is larger; page-aligned */
    uint64_t buffer_size;
    struct uffd_msg *messages; /* the journal, or memory of our own */
    struct uffd_msg *own_messages;
    uint8_t *zeros;  /* one huge page of zeros (hugetlb has no ZEROPAGE), or NULL */

    struct fault *queue; /* ring of faults that were read and not answered */
    uint32_t queue_head;
    uint32_t queue_count;
    int faults_dropped;  /* the ring was full: a wake-up of everything makes them come again */

    /* Huge pages of which the kernel does not say whether they are there; see settle_doubt(). */
    struct doubt {
        uint64_t page;
        uint64_t woken_ns; /* when whoever waits was woken, to see for itself; 0 = not in use */
        uint32_t block;
        int standing;  /* a fault is in the queue that stands for all of this page */
        int refaulted; /* another has come since */
    } doubts[QPC_PAGER_DOUBTS];

    struct { uint64_t start, length; } wakes[QPC_PAGER_BATCH]; /* filled, and to be woken */
    uint32_t wake_count;
    int wake_later;

    uint64_t unsettled; /* pages that a pager before this one was filling: they may have arrived */

    uint64_t background_block;
    int64_t background_tokens; /* bytes; at most a burst */
    uint64_t background_refill_ns;
    uint64_t background_due_ns;
    uint64_t background_filled_ns; /* when the last unit was begun */
    uint32_t background_attempts;
    uint32_t background_windows; /* how often it has waited for one, for the unit that is next */

    uint64_t gap_ns;      /* running mean of the time between an answer and the next fault */
    uint64_t answered_ns; /* end of the last answer; 0 = none yet */
    int spin_armed;       /* a fault was answered since the last poll that found nothing */
    uint64_t gave_way_ns; /* when this thread last slept or yielded */
    uint64_t no_spin_before_ns;
    uint64_t busy_pause_ns;

    uint32_t random;       /* see qpc_pager_wait_window() */
    uint32_t rounds_lost;  /* tries of some milliseconds each, since one was not in vain */
    uint32_t ranges_returned;
    int came_first;        /* this thread has a real-time priority for the moment, instead of: */
    int policy;
    struct sched_param policy_param;
    int cannot_come_first; /* for want of rights */

    struct qpc_pager_page *prefetch; /* what is to be filled ahead, from prefetch_next on */
    uint32_t prefetch_count;
    uint32_t prefetch_next;
    int noting_first_faults;
    struct qpc_pager_page *first_faults; /* QPC_PAGER_FIRST_FAULTS of room */
    _Atomic uint32_t first_fault_count;  /* so many are written */

    struct qpc_trace *trace; /* or NULL */
    struct qpc_trace_record *trace_records;
    uint64_t trace_capacity, trace_count; /* ours: others can write to the file */

    pthread_t thread;
    int started;
    atomic_int stop;
    atomic_int thread_id;
    atomic_int background;
    _Atomic uint64_t background_rate;

    struct {
        _Atomic uint64_t state, faults, faults_waiting, pages_total, pages_data, pages_data_missing,
            pages_demand, pages_background, pages_prefetched, pages_zero, pages_removed, bytes_read, already_present,
            pages_foreign, foreign_block, foreign_page, retries, events_remove, events_unmap, events_other, wakes, source_errors, fill_errors,
            last_error, last_error_block, last_error_page, failing, reading_since_ns, reading_block,
            reading_page, spins_hit, spins_missed, started_ns,
            first_fault_ns, last_fault_ns, complete_ns, latency_us[24];
        _Atomic uint32_t timeline[2048];
    } statistics;

    struct {
        _Atomic uint64_t tid, faults, blocked_ns, waiting, waiting_since_ns, latency_us[24];
    } origins[QPC_ORIGIN_SLOTS];
    uint8_t is_vcpu[QPC_ORIGIN_SLOTS];
    uint32_t vcpu_version; /* of what was said of them that is heeded */
    struct {
        _Atomic uint64_t count, stopped, all_stopped_ns, all_stopped_since_ns;
    } vcpus; /* struct qpc_vcpu_account */
    _Atomic uint32_t named_vcpu_version, named_vcpu_count, named_vcpus[QPC_ORIGIN_TABLE];

    uint32_t block_count;
    struct block blocks[];
};

static inline uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline int stop_wanted(struct qpc_pager *p)
{
    return atomic_load_explicit(&p->stop, memory_order_relaxed);
}

static inline uint8_t page_state(const struct block *b, uint64_t page)
{
    return __atomic_load_n(&b->is.ledger[page], __ATOMIC_RELAXED);
}

static inline int has_data(const struct block *b, uint64_t page)
{
    return b->is.data_bitmap[page >> 3] >> (page & 7) & 1;
}

/* What became of the attempt to fill a range. */
enum fill {
    FILL_DONE,
    FILL_EVENT_FIRST, /* an event must be read, and the ledger asked again */
    FILL_LATER,       /* source or memory cannot be had now: back off */
    FILL_DOUBTFUL,    /* a huge page that was filled once is there, or none is free */
    FILL_GONE         /* the mapper, or this part of its memory, is not there any more */
};

/* Makes the notify descriptor readable. */
void qpc_pager_notify(struct qpc_pager *p);

/* Announces it, once, when the last data page is present (or was removed). */
void qpc_pager_check_complete(struct qpc_pager *p);

void qpc_pager_set_pages(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t count,
                         uint8_t state);

/*
 * Reads what is there, without waiting: faults go into the queue, events into the ledger. Returns
 * the count of events, and of faults in *faults. The kernel hands out faults before events, so a
 * fault may come ahead of a REMOVE that preceded it; hence no fault is served before the whole
 * batch is noted, and COPY gives EAGAIN while an event is unread.
 */
unsigned qpc_pager_read_messages(struct qpc_pager *p, unsigned *faults);

/* Notes the events of the last messages that a pager before this one has read. */
void qpc_pager_replay_journal(struct qpc_pager *p);

void qpc_pager_queue_fault(struct qpc_pager *p, const struct fault *fault);
struct fault qpc_pager_unqueue_fault(struct qpc_pager *p);

/*
 * Serves what is due; returns the time at which the next one is (0: nothing waits). A fault that
 * waits for a broken source delays nobody else.
 */
uint64_t qpc_pager_serve_queue(struct qpc_pager *p);

/*
 * The kernel gives EAGAIN for each COPY from the moment a thread of the mapper queues an event until,
 * after it was read here, that thread has run on (mmap_changing, fs/userfaultfd.c). Threads that
 * remove memory in a loop leave a window of some microseconds each time; a COPY goes through when all
 * of them are in theirs. So this sleeps for a random time of some microseconds that no message ends:
 * woken by the next event, we would come too late every time. Where it may, the thread has a real-time
 * priority from here to qpc_pager_leave_windows(), so that it interrupts a remover on its own
 * processor in the middle of its window; without that, two of them there are hardly ever caught.
 */
void qpc_pager_wait_window(struct qpc_pager *p);
void qpc_pager_leave_windows(struct qpc_pager *p);

/*
 * Where windows are waited for in vain (QPC_PAGER_STORM rounds), memory that was just removed is given
 * back to the kernel, with what around it needs no data any more: it reads as zero either way, and
 * whoever removes it again and again sends no more events. Each time may split a mapping, of which a
 * process has 65,530 at most, so this is done QPC_PAGER_RETURNS times and not more.
 */
#define QPC_PAGER_STORM 4u
#define QPC_PAGER_RETURNS 64u
void qpc_pager_return_removed(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last);

/*
 * Fills a page and what is missing of the chunk of `chunk_pages` (a power of two) around it; pages
 * with data count in `counter`.
 */
enum fill qpc_pager_fill_around(struct qpc_pager *p, struct block *b, uint64_t page,
                                uint64_t chunk_pages, _Atomic uint64_t *counter);

/*
 * The steps of that, for whoever reads several ranges before the first COPY.
 *
 * What to copy for a fault at `page`: the run of missing pages around it, within its chunk, that
 * begins and ends with data and has no long stretch of zero pages in it (a few zero pages between
 * data would cost a fault each). Returns 0 where there is none, since the page is removed, present,
 * or among many zeros; [*first, *last) is the whole chunk then.
 */
int qpc_pager_find_data_run(const struct block *b, uint64_t page, uint64_t chunk_pages,
                            uint64_t *first, uint64_t *last);

/* Where the missing pages with data that begin at `page` end, at `last` at most. */
uint64_t qpc_pager_data_run_end(const struct block *b, uint64_t page, uint64_t last);

/* A read begins: whoever waits can be told what for, should the source not answer. */
void qpc_pager_note_reading(struct qpc_pager *p, const struct block *b, uint64_t page,
                            uint64_t since_ns);

/*
 * Pages [first, last) were read: counts them. What the source has where the bitmap says zero means
 * nothing (mapped-ram leaves stale data).
 */
void qpc_pager_note_read(struct qpc_pager *p, const struct block *b, uint64_t first, uint64_t last,
                         uint8_t *buffer);

/* Both, with the read: pages [first, last) into p->buffer, all of them, or an errno says why not. */
int qpc_pager_read_source(struct qpc_pager *p, const struct block *b, uint64_t first,
                          uint64_t last);
enum fill qpc_pager_note_source_error(struct qpc_pager *p, const struct block *b, uint64_t page,
                                      int errnum);

/* No page can be had for this one. */
void qpc_pager_note_no_memory(struct qpc_pager *p, const struct block *b, uint64_t page);

/* Copies the buffer, which holds pages [first, last), into the mapper. */
enum fill qpc_pager_copy_run(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last,
                             const uint8_t *buffer, _Atomic uint64_t *counter);

/* Whoever waits for a page of this range; and for what was filled while p->wake_later was set. */
void qpc_pager_wake(struct qpc_pager *p, uint64_t start, uint64_t length);
void qpc_pager_wake_filled(struct qpc_pager *p);

/* Attempts are put off for longer and longer. */
#define QPC_PAGER_RETRY_EVENT_LAST_NS 2000000ull
#define QPC_PAGER_RETRY_SOURCE_FIRST_NS 10000000ull
#define QPC_PAGER_RETRY_SOURCE_LAST_NS 1000000000ull
static inline uint64_t backoff_ns(uint32_t attempts, uint64_t first, uint64_t last)
{
    return attempts >= 16 ? last : min_u64(first << attempts, last);
}

/* Notes a fault among the first ones, if it is one of them. */
void qpc_pager_note_first_fault(struct qpc_pager *p, uint32_t block, uint64_t page, uint64_t now);

/* The slot of a thread, taken for it if it has none; tid 0 = not known. */
uint16_t qpc_pager_origin_slot(struct qpc_pager *p, uint32_t tid);

/* A fault begins to wait; it ends to, answered or not; it was answered, in this bucket of latency_us. */
void qpc_pager_account_begin(struct qpc_pager *p, const struct fault *fault);
void qpc_pager_account_end(struct qpc_pager *p, const struct fault *fault, uint64_t now);
void qpc_pager_account_answer(struct qpc_pager *p, const struct fault *fault, unsigned bucket,
                              uint64_t now);

/* Fills one page ahead; returns 0 where nothing is left to be. */
int qpc_pager_fill_ahead(struct qpc_pager *p);

/*
 * Fills one unit. Returns the time before which nothing more is to be done in the background: 0 =
 * go on at once, UINT64_MAX = nothing left.
 */
uint64_t qpc_pager_fill_background(struct qpc_pager *p);

/* Records an answer; only where there is a trace. */
void qpc_pager_trace_answer(struct qpc_pager *p, const struct fault *fault, uint64_t now,
                            int is_gone);

#endif
