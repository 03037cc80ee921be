#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "uffd.h"

#define MESSAGES_PER_READ 64
/* Faults read and not answered. A blocked thread has one, an asynchronous page fault one each. */
#define QUEUE_LENGTH 16384u
#define RETRY_EVENT_FIRST_NS 20000ull      /* the other side is between our read and its wake-up */
#define RETRY_EVENT_LAST_NS 2000000ull
#define RETRY_SOURCE_FIRST_NS 10000000ull
#define RETRY_SOURCE_LAST_NS 1000000000ull
#define BUSY_YIELD_NS 50000ull  /* sched_yield() took that long: somebody else needs this processor */
#define BUSY_PAUSE_NS 10000000ull
#define BACKGROUND_UNIT (128u << 10)
#define TIMELINE_BUCKET_NS 10000000ull

/* Counters: one writer, any readers. A plain load and store is enough, and compiles to one add. */
#define COUNT(counter, n) \
    atomic_store_explicit(&(counter), atomic_load_explicit(&(counter), memory_order_relaxed) + (n), \
                          memory_order_relaxed)
#define SET(counter, value) atomic_store_explicit(&(counter), (value), memory_order_relaxed)
#define GET(counter) atomic_load_explicit(&(counter), memory_order_relaxed)

struct block {
    struct qpc_pager_block is;
    uint64_t page_count;
    uint32_t page_shift;
    uint64_t cursor;        /* where the background goes on: after the last fault */
    uint64_t unmapped_from; /* pages [from, to) are gone from the mapper; from == to: none */
    uint64_t unmapped_to;
};

struct fault {
    uint64_t page;
    uint64_t read_ns;
    uint64_t due_ns; /* 0 = now */
    uint32_t block;
    uint32_t attempts;
};

/* What became of the attempt to fill a range. */
enum fill {
    FILL_DONE,
    FILL_EVENT_FIRST, /* an event must be read, and the ledger asked again */
    FILL_LATER,       /* source or memory cannot be had now: back off */
    FILL_GONE         /* the mapper, or this part of its memory, is not there any more */
};

struct qpc_pager {
    int uffd;
    int stop_fd;
    int notify_fd;
    uint64_t chunk_size;
    uint64_t spin_limit_ns;
    uint8_t *buffer; /* one chunk or one page, whichever is larger; page-aligned */
    uint64_t buffer_size;
    uint8_t *zeros;  /* one huge page of zeros (hugetlb has no ZEROPAGE), or NULL */

    struct fault *queue; /* ring of faults that were read and not answered */
    uint32_t queue_head;
    uint32_t queue_count;
    int faults_dropped;  /* the ring was full: a wake-up of everything makes them come again */
    int failing;         /* the last attempt at the source or at memory failed */

    uint64_t background_block;
    uint64_t background_tokens;
    uint64_t background_refill_ns;
    uint64_t background_due_ns;
    uint32_t background_attempts;

    uint64_t gap_ns;       /* running mean of the time between an answer and the next fault */
    uint64_t answered_ns;  /* end of the last answer; 0 = asleep since */
    uint64_t no_spin_before_ns;

    pthread_t thread;
    int started;
    atomic_int stop;
    atomic_int thread_id;
    atomic_int background;
    _Atomic uint64_t background_rate;

    struct {
        _Atomic uint64_t state, faults, faults_waiting, pages_total, pages_data, pages_data_missing,
            pages_demand, pages_background, pages_zero, pages_removed, bytes_read, already_present,
            retries, events_remove, events_unmap, events_other, wakes, source_errors, fill_errors,
            last_error, last_error_block, last_error_page, spins_hit, spins_missed, started_ns,
            first_fault_ns, last_fault_ns, complete_ns, latency_us[24];
        _Atomic uint32_t timeline[2048];
    } statistics;

    uint32_t block_count;
    struct block blocks[];
};

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void notify(struct qpc_pager *p)
{
    uint64_t one = 1;
    ssize_t n = write(p->notify_fd, &one, sizeof(one));

    (void)n; /* EAGAIN: it is readable already */
}

/* --- the ledger ------------------------------------------------------------------------------ */

static uint8_t page_state(const struct block *b, uint64_t page)
{
    return __atomic_load_n(&b->is.ledger[page], __ATOMIC_RELAXED);
}

static int has_data(const struct block *b, uint64_t page)
{
    return b->is.data_bitmap[page >> 3] >> (page & 7) & 1;
}

static void check_complete(struct qpc_pager *p)
{
    if (GET(p->statistics.pages_data_missing) == 0 &&
        GET(p->statistics.state) == QPC_PAGER_SERVING) {
        SET(p->statistics.complete_ns, now_ns());
        SET(p->statistics.state, QPC_PAGER_COMPLETE);
        notify(p);
    }
}

static void set_page_state(struct qpc_pager *p, struct block *b, uint64_t page, uint8_t state)
{
    uint8_t old = page_state(b, page);
    int was_missing = old == QPC_PAGE_MISSING || old == QPC_PAGE_FILLING;
    int is_missing = state == QPC_PAGE_MISSING || state == QPC_PAGE_FILLING;

    if (has_data(b, page) && was_missing != is_missing)
        COUNT(p->statistics.pages_data_missing, is_missing ? 1u : (uint64_t)-1);
    if (state == QPC_PAGE_REMOVED && old != QPC_PAGE_REMOVED)
        COUNT(p->statistics.pages_removed, 1u);
    /* Release: at take-over 'filled' must never be seen without the COPY that it stands for. */
    __atomic_store_n(&b->is.ledger[page], state, __ATOMIC_RELEASE);
}

static void set_pages(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t count,
                      uint8_t state)
{
    for (uint64_t page = first; page < first + count; page++)
        set_page_state(p, b, page, state);
}

/* --- messages -------------------------------------------------------------------------------- */

static struct block *block_at(struct qpc_pager *p, uint64_t address)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[i];
        if (address - b->is.address < b->is.length)
            return b;
    }
    return NULL;
}

static void queue_fault(struct qpc_pager *p, const struct fault *fault)
{
    if (p->queue_count == QUEUE_LENGTH) {
        p->faults_dropped = 1;
        return;
    }
    p->queue[(p->queue_head + p->queue_count++) % QUEUE_LENGTH] = *fault;
    SET(p->statistics.faults_waiting, p->queue_count);
}

static struct fault unqueue_fault(struct qpc_pager *p)
{
    struct fault fault = p->queue[p->queue_head];

    p->queue_head = (p->queue_head + 1) % QUEUE_LENGTH;
    p->queue_count--;
    return fault;
}

static void note_fault(struct qpc_pager *p, uint64_t address, uint64_t now)
{
    struct block *b = block_at(p, address);
    uint64_t bucket;

    COUNT(p->statistics.faults, 1u);
    if (!GET(p->statistics.first_fault_ns))
        SET(p->statistics.first_fault_ns, now);
    SET(p->statistics.last_fault_ns, now);
    bucket = (now - GET(p->statistics.started_ns)) / TIMELINE_BUCKET_NS;
    if (bucket < 2048)
        COUNT(p->statistics.timeline[bucket], 1u);
    if (b)
        queue_fault(p, &(struct fault){
            .page = (address - b->is.address) >> b->page_shift,
            .read_ns = now,
            .block = (uint32_t)(b - p->blocks),
        });
}

/* The pages of b that lie wholly or partly in [start, end). */
static int overlap(const struct block *b, uint64_t start, uint64_t end, uint64_t *first,
                   uint64_t *last)
{
    uint64_t block_end = b->is.address + b->is.length;

    if (start < b->is.address)
        start = b->is.address;
    if (end > block_end)
        end = block_end;
    if (start >= end)
        return 0;
    *first = (start - b->is.address) >> b->page_shift;
    *last = (end - 1 - b->is.address) >> b->page_shift;
    return 1;
}

static void note_removed(struct qpc_pager *p, uint64_t start, uint64_t end)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        uint64_t first, last;

        if (overlap(&p->blocks[i], start, end, &first, &last))
            set_pages(p, &p->blocks[i], first, last - first + 1, QPC_PAGE_REMOVED);
    }
}

static void note_unmapped(struct qpc_pager *p, uint64_t start, uint64_t end)
{
    note_removed(p, start, end);
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[i];
        uint64_t first, last;

        if (!overlap(b, start, end, &first, &last))
            continue;
        if (b->unmapped_from == b->unmapped_to) {
            b->unmapped_from = first;
            b->unmapped_to = last + 1;
        } else {
            b->unmapped_from = min_u64(b->unmapped_from, first);
            b->unmapped_to = b->unmapped_to > last + 1 ? b->unmapped_to : last + 1;
        }
    }
}

/*
 * Reads what is there, without waiting: faults go into the queue, events into the ledger. Returns
 * the count of events, and of faults in *faults. The kernel hands out faults before events, so a
 * fault may come ahead of a REMOVE that preceded it; hence no fault is served before the whole
 * batch is noted, and COPY gives EAGAIN while an event is unread.
 */
static unsigned read_messages(struct qpc_pager *p, unsigned *faults)
{
    struct uffd_msg messages[MESSAGES_PER_READ];
    unsigned events = 0;
    ssize_t n;

    *faults = 0;
    n = read(p->uffd, messages, sizeof(messages));
    if (n <= 0)
        return 0;
    for (size_t i = 0, count = (size_t)n / sizeof(messages[0]), now = now_ns(); i < count; i++) {
        const struct uffd_msg *m = &messages[i];

        switch (m->event) {
        case UFFD_EVENT_PAGEFAULT:
            note_fault(p, m->arg.pagefault.address, now);
            ++*faults;
            break;
        case UFFD_EVENT_REMOVE:
            COUNT(p->statistics.events_remove, 1u);
            note_removed(p, m->arg.remove.start, m->arg.remove.end);
            events++;
            break;
        case UFFD_EVENT_UNMAP:
            COUNT(p->statistics.events_unmap, 1u);
            note_unmapped(p, m->arg.remove.start, m->arg.remove.end);
            events++;
            break;
        case UFFD_EVENT_REMAP:
            /* QEMU never moves guest RAM; the old place is gone in any case. */
            COUNT(p->statistics.events_other, 1u);
            note_unmapped(p, m->arg.remap.from, m->arg.remap.from + m->arg.remap.len);
            events++;
            break;
        default:
            COUNT(p->statistics.events_other, 1u);
            events++;
        }
    }
    if (events)
        check_complete(p);
    return events;
}

/* --- filling --------------------------------------------------------------------------------- */

static void note_error(struct qpc_pager *p, const struct block *b, uint64_t page, int errnum)
{
    SET(p->statistics.last_error, (uint64_t)errnum);
    SET(p->statistics.last_error_block, (uint64_t)(b - p->blocks));
    SET(p->statistics.last_error_page, page);
    if (!p->failing) {
        p->failing = 1;
        notify(p);
    }
}

static void note_working(struct qpc_pager *p)
{
    if (p->failing) {
        p->failing = 0;
        notify(p);
    }
}

static void wake(struct qpc_pager *p, uint64_t start, uint64_t length)
{
    COUNT(p->statistics.wakes, 1u);
    qpc_uffd_wake(p->uffd, start, length, NULL);
}

/*
 * Reads pages into the buffer: all of them, or it is an error. The size is asked again after the
 * data was read: a file cut short meanwhile shows zeros in the rest of its last page, and what was
 * read while the size still covered it was data.
 */
static int read_source(struct qpc_pager *p, struct block *b, uint64_t page, uint64_t length)
{
    uint64_t offset = b->is.source_offset + (page << b->page_shift);
    uint64_t done = 0;
    struct stat st;

    while (done < length) {
        ssize_t n = pread(b->is.source_fd, p->buffer + done, length - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            COUNT(p->statistics.source_errors, 1u);
            note_error(p, b, page, n < 0 ? errno : ENODATA);
            return -1;
        }
        done += (uint64_t)n;
    }
    if (fstat(b->is.source_fd, &st) < 0 ||
        (S_ISREG(st.st_mode) && (uint64_t)st.st_size < offset + length)) {
        COUNT(p->statistics.source_errors, 1u);
        note_error(p, b, page, ENODATA);
        return -1;
    }
    COUNT(p->statistics.bytes_read, length);
    return 0;
}

/*
 * Fills [page, page+count) with the buffer (data) or with zeros. Pages are FILLING on entry for
 * data; for zeros `final` is the state they get.
 */
static enum fill fill_pages(struct qpc_pager *p, struct block *b, uint64_t page, uint64_t count,
                            const uint8_t *data, uint8_t final)
{
    uint64_t page_size = b->is.page_size;
    uint64_t end = page + count;

    while (page < end) {
        uint64_t address = b->is.address + (page << b->page_shift);
        uint64_t length = (end - page) << b->page_shift;
        uint64_t done = 0, pages_done;
        enum qpc_outcome outcome;

        if (data)
            outcome = qpc_uffd_copy(p->uffd, address, data, length, &done);
        else if (!p->zeros || page_size == 4096)
            outcome = qpc_uffd_zeropage(p->uffd, address, length, &done);
        else
            outcome = qpc_uffd_copy(p->uffd, address, p->zeros, page_size, &done);

        pages_done = done >> b->page_shift;
        set_pages(p, b, page, pages_done, final);
        page += pages_done;
        if (data)
            data += done;
        else
            COUNT(p->statistics.pages_zero, pages_done);

        switch (outcome) {
        case QPC_FILLED:
            continue;
        case QPC_RETRY:
            if (pages_done)
                continue;
            COUNT(p->statistics.retries, 1u);
            return FILL_EVENT_FIRST;
        case QPC_ALREADY_PRESENT:
            /* Somebody was quicker, or a second message for a page that is there. */
            COUNT(p->statistics.already_present, 1u);
            if (page_state(b, page) != QPC_PAGE_REMOVED)
                set_page_state(p, b, page, QPC_PAGE_PRESENT);
            wake(p, b->is.address + (page << b->page_shift), page_size);
            page++;
            if (data)
                data += page_size;
            continue;
        case QPC_TARGET_GONE:
            if (GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE) {
                SET(p->statistics.state, QPC_PAGER_MAPPER_GONE);
                notify(p);
            }
            return FILL_GONE;
        case QPC_NOT_REGISTERED:
            /* The range may cross a border inside the mapping (madvise splits it): page by page. */
            if (page + 1 < end) {
                enum fill one = fill_pages(p, b, page, 1, data, final);

                if (one != FILL_DONE)
                    return one;
                page++;
                if (data)
                    data += page_size;
                continue;
            }
            if (page >= b->unmapped_from && page < b->unmapped_to)
                return FILL_GONE;
            /* An unread UNMAP would explain it; without one it is an error like any other. */
            COUNT(p->statistics.fill_errors, 1u);
            note_error(p, b, page, ENOENT);
            return FILL_LATER;
        case QPC_FAILED:
            COUNT(p->statistics.fill_errors, 1u);
            note_error(p, b, page, errno);
            return FILL_LATER;
        }
    }
    return FILL_DONE;
}

/* What a missing page gets. */
enum kind { KIND_DATA, KIND_ZERO, KIND_REMOVED, KIND_PRESENT };

static enum kind page_kind(const struct block *b, uint64_t page)
{
    switch (page_state(b, page)) {
    case QPC_PAGE_PRESENT:
        return KIND_PRESENT;
    case QPC_PAGE_REMOVED:
        return KIND_REMOVED;
    default:
        return has_data(b, page) ? KIND_DATA : KIND_ZERO;
    }
}

/* Fills pages [first, last) of one kind, as far as they are of that kind still. */
static enum fill fill_run(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last,
                          enum kind kind, _Atomic uint64_t *counter)
{
    enum fill result;

    if (kind != KIND_DATA)
        /*
         * A page that was filled once and faults again was removed by the guest in a way that
         * sends no event (hole punched in the memfd): zero, unless it turns out to be there.
         */
        return fill_pages(p, b, first, last - first, NULL,
                          kind == KIND_ZERO ? QPC_PAGE_PRESENT : QPC_PAGE_REMOVED);
    if (read_source(p, b, first, (last - first) << b->page_shift) < 0)
        return FILL_LATER;
    set_pages(p, b, first, last - first, QPC_PAGE_FILLING);
    result = fill_pages(p, b, first, last - first, p->buffer, QPC_PAGE_PRESENT);
    if (result == FILL_DONE) {
        COUNT(*counter, last - first);
        note_working(p);
        return result;
    }
    for (uint64_t page = first; page < last; page++)
        if (page_state(b, page) == QPC_PAGE_FILLING)
            set_page_state(p, b, page, QPC_PAGE_MISSING);
    return result;
}

/* The run of pages of the same kind around `page`, within [*first, *last). */
static void find_run(const struct block *b, uint64_t page, enum kind kind, uint64_t *first,
                     uint64_t *last)
{
    uint64_t from = page, to = page + 1;

    while (from > *first && page_kind(b, from - 1) == kind)
        from--;
    while (to < *last && page_kind(b, to) == kind)
        to++;
    *first = from;
    *last = to;
}

static uint64_t pages_per_chunk(const struct qpc_pager *p, const struct block *b)
{
    return p->chunk_size > b->is.page_size ? p->chunk_size >> b->page_shift : 1;
}

static enum fill serve_page(struct qpc_pager *p, struct block *b, uint64_t page)
{
    uint64_t chunk_pages = pages_per_chunk(p, b);
    uint64_t first = page & ~(chunk_pages - 1);
    uint64_t last = min_u64(first + chunk_pages, b->page_count);
    enum kind kind = page_kind(b, page);
    enum fill result;

    if (kind == KIND_PRESENT) {
        first = page;
        last = page + 1;
    } else {
        find_run(b, page, kind, &first, &last);
    }
    result = fill_run(p, b, first, last, kind, &p->statistics.pages_demand);
    if (result == FILL_DONE)
        b->cursor = last;
    return result;
}

static void note_latency(struct qpc_pager *p, uint64_t read_ns, uint64_t now)
{
    uint64_t us = (now - read_ns) / 1000;
    unsigned bucket = us ? 64u - (unsigned)__builtin_clzll(us) : 0;

    COUNT(p->statistics.latency_us[bucket < 24 ? bucket : 23], 1u);
}

static uint64_t backoff_ns(uint32_t attempts, uint64_t first, uint64_t last)
{
    return attempts >= 16 ? last : min_u64(first << attempts, last);
}

/* Answers one fault, or puts it back with a time. */
static void serve_fault(struct qpc_pager *p, struct fault fault)
{
    struct block *b = &p->blocks[fault.block];
    uint64_t now;
    unsigned faults;

    for (;;) {
        enum fill result = serve_page(p, b, fault.page);

        now = now_ns();
        switch (result) {
        case FILL_DONE:
            note_latency(p, fault.read_ns, now);
            p->answered_ns = now;
            return;
        case FILL_GONE:
            /* Nobody can be waiting for it properly: let the thread see for itself. */
            wake(p, b->is.address + (fault.page << b->page_shift), b->is.page_size);
            return;
        case FILL_EVENT_FIRST:
            if (read_messages(p, &faults))
                continue;
            fault.due_ns = now + backoff_ns(fault.attempts++, RETRY_EVENT_FIRST_NS,
                                            RETRY_EVENT_LAST_NS);
            queue_fault(p, &fault);
            return;
        case FILL_LATER:
            fault.due_ns = now + backoff_ns(fault.attempts++, RETRY_SOURCE_FIRST_NS,
                                            RETRY_SOURCE_LAST_NS);
            queue_fault(p, &fault);
            return;
        }
    }
}

/*
 * Serves what is due; returns the time at which the next one is (0: nothing waits). New faults have
 * been read before each call, so one that waits for a broken source delays nobody else.
 */
static uint64_t serve_queue(struct qpc_pager *p)
{
    uint64_t next = 0;

    for (uint32_t left = p->queue_count; left && !atomic_load_explicit(&p->stop, memory_order_relaxed);
         left--) {
        struct fault fault = unqueue_fault(p);

        if (fault.due_ns && fault.due_ns > now_ns())
            queue_fault(p, &fault);
        else
            serve_fault(p, fault);
    }
    SET(p->statistics.faults_waiting, p->queue_count);
    if (p->faults_dropped && p->queue_count < QUEUE_LENGTH / 2) {
        /* Threads whose fault found no room fault anew. */
        p->faults_dropped = 0;
        for (uint32_t i = 0; i < p->block_count; i++)
            wake(p, p->blocks[i].is.address, p->blocks[i].is.length);
    }
    for (uint32_t i = 0; i < p->queue_count; i++) {
        uint64_t due = p->queue[(p->queue_head + i) % QUEUE_LENGTH].due_ns;

        if (!next || due < next)
            next = due ? due : 1;
    }
    return next;
}

/* --- the background -------------------------------------------------------------------------- */

/* The next data page that is missing, from the cursor on and round; -1 if there is none. */
static int64_t next_missing(struct block *b)
{
    for (int round = 0; round < 2; round++) {
        uint64_t end = round ? min_u64(b->cursor, b->page_count) : b->page_count;

        for (uint64_t page = round ? 0 : b->cursor; page < end;) {
            const uint8_t *hit = memchr(b->is.ledger + page, QPC_PAGE_MISSING, end - page);

            if (!hit)
                break;
            page = (uint64_t)(hit - b->is.ledger);
            if (has_data(b, page))
                return (int64_t)page;
            page++;
            /* Skip over holes a byte of the bitmap at a time. */
            while (!(page & 7) && page < end && !b->is.data_bitmap[page >> 3])
                page += 8;
        }
    }
    return -1;
}

/*
 * Fills one unit. Returns the time before which nothing more is to be done in the background: 0 =
 * go on at once, UINT64_MAX = nothing left.
 */
static uint64_t fill_background(struct qpc_pager *p)
{
    uint64_t rate = GET(p->background_rate);
    uint64_t now = now_ns();

    if (GET(p->statistics.state) != QPC_PAGER_SERVING)
        return UINT64_MAX;
    if (now < p->background_due_ns)
        return p->background_due_ns;
    if (rate) {
        uint64_t burst = rate / 20 > p->buffer_size ? rate / 20 : p->buffer_size;
        uint64_t elapsed = min_u64(now - p->background_refill_ns, 1000000000ull);

        p->background_tokens =
            min_u64(p->background_tokens + (uint64_t)((__uint128_t)rate * elapsed / 1000000000ull),
                    burst);
        p->background_refill_ns = now;
        if (p->background_tokens < min_u64(BACKGROUND_UNIT, burst)) {
            uint64_t missing = min_u64(BACKGROUND_UNIT, burst) - p->background_tokens;
            return now + (uint64_t)((__uint128_t)missing * 1000000000ull / rate) + 1000;
        }
    }
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[p->background_block];
        int64_t page = next_missing(b);
        uint64_t first, last, unit;
        unsigned faults;

        if (page < 0) {
            p->background_block = (p->background_block + 1) % p->block_count;
            continue;
        }
        unit = BACKGROUND_UNIT > b->is.page_size ? BACKGROUND_UNIT >> b->page_shift : 1;
        first = (uint64_t)page;
        last = min_u64(min_u64(first + unit, b->page_count),
                       first + (p->buffer_size >> b->page_shift));
        find_run(b, first, KIND_DATA, &first, &last);
        switch (fill_run(p, b, first, last, KIND_DATA, &p->statistics.pages_background)) {
        case FILL_DONE:
            b->cursor = last;
            p->background_attempts = 0;
            if (rate) {
                uint64_t used = (last - first) << b->page_shift;
                p->background_tokens -= min_u64(used, p->background_tokens);
            }
            check_complete(p);
            return 0;
        case FILL_EVENT_FIRST:
            if (!read_messages(p, &faults))
                p->background_due_ns = now + RETRY_EVENT_LAST_NS;
            return p->background_due_ns;
        case FILL_GONE:
        case FILL_LATER:
            p->background_due_ns = now + backoff_ns(p->background_attempts++, RETRY_SOURCE_FIRST_NS,
                                                    RETRY_SOURCE_LAST_NS);
            return p->background_due_ns;
        }
    }
    return UINT64_MAX;
}

/* --- waiting --------------------------------------------------------------------------------- */

/*
 * Polls for the next fault where it is likely to come soon: waking a sleeping processor costs more
 * than the fault itself. Bounded by spin_limit; not at all after the machine proved busy, and not
 * when faults come further apart than the limit.
 */
static int spin(struct qpc_pager *p, uint64_t until_ns)
{
    uint64_t begin = now_ns(), now = begin, budget;
    unsigned faults;

    if (!p->spin_limit_ns || !p->answered_ns || begin < p->no_spin_before_ns ||
        p->gap_ns > p->spin_limit_ns)
        return 0;
    budget = min_u64(4 * p->gap_ns + 20000, p->spin_limit_ns);
    while (now - begin < budget && now < until_ns) {
        uint64_t before;

        if (atomic_load_explicit(&p->stop, memory_order_relaxed))
            return 1;
        if (read_messages(p, &faults) || faults) {
            COUNT(p->statistics.spins_hit, 1u);
            p->gap_ns = (7 * p->gap_ns + (now_ns() - p->answered_ns)) / 8;
            return 1;
        }
        before = now_ns();
        sched_yield();
        now = now_ns();
        if (now - before > BUSY_YIELD_NS) {
            p->no_spin_before_ns = now + BUSY_PAUSE_NS;
            break;
        }
    }
    COUNT(p->statistics.spins_missed, 1u);
    return 0;
}

static void sleep_until(struct qpc_pager *p, uint64_t due_ns)
{
    struct pollfd fds[2] = {
        { .fd = p->uffd, .events = POLLIN },
        { .fd = p->stop_fd, .events = POLLIN },
    };
    uint64_t now = now_ns();
    struct timespec timeout = { 0 };

    if (due_ns != UINT64_MAX && due_ns > now) {
        timeout.tv_sec = (time_t)((due_ns - now) / 1000000000ull);
        timeout.tv_nsec = (long)((due_ns - now) % 1000000000ull);
    }
    if (ppoll(fds, 2, due_ns == UINT64_MAX ? NULL : &timeout, NULL) > 0) {
        if (fds[1].revents) {
            uint64_t kicks;
            ssize_t n = read(p->stop_fd, &kicks, sizeof(kicks));
            (void)n;
        }
        if ((fds[0].revents & POLLIN) && p->answered_ns) {
            uint64_t gap = min_u64(now_ns() - p->answered_ns, 4 * p->spin_limit_ns + 1);
            p->gap_ns = (3 * p->gap_ns + gap) / 4;
        }
        if (fds[0].revents & (POLLERR | POLLHUP | POLLNVAL)) {
            /* POLLERR: the descriptor is blocking, or was never initialised. */
            SET(p->statistics.state, QPC_PAGER_MAPPER_GONE);
            notify(p);
        }
    }
}

static void *pager_thread(void *argument)
{
    struct qpc_pager *p = argument;

    pthread_setname_np(pthread_self(), "qpc-pager");
    atomic_store_explicit(&p->thread_id, (int)syscall(SYS_gettid), memory_order_relaxed);
    p->background_refill_ns = now_ns();
    check_complete(p);
    while (!atomic_load_explicit(&p->stop, memory_order_relaxed) &&
           GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE) {
        uint64_t due, background_due = UINT64_MAX;
        unsigned faults;

        read_messages(p, &faults);
        due = serve_queue(p);
        check_complete(p);
        if (due && due <= now_ns())
            continue;
        if (atomic_load_explicit(&p->background, memory_order_relaxed) && !faults) {
            background_due = fill_background(p);
            if (background_due == 0)
                continue;
        }
        if (faults)
            continue;
        due = due ? min_u64(due, background_due) : background_due;
        if (!spin(p, due))
            sleep_until(p, due);
    }
    atomic_store_explicit(&p->thread_id, 0, memory_order_relaxed);
    return NULL;
}

/* --- life cycle ------------------------------------------------------------------------------ */

static int check_block(const struct qpc_pager_block *b, uint32_t index, struct qpc_error *err)
{
    uint64_t size = b->page_size;

    if (size < 4096 || (size & (size - 1)) || size > (1ull << 30))
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: bad page size %llu", index,
                             (unsigned long long)size);
    if (!b->length || b->length % size || b->address % size || b->address + b->length < b->address)
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: address or length is not page-aligned",
                             index);
    if (b->source_fd < 0 || !b->data_bitmap || !b->ledger)
        return qpc_error_set(err, QPC_INVALID, 0, "block %u: no source, bitmap or ledger", index);
    return 0;
}

static void *allocate_pages(uint64_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

static void count_pages(struct qpc_pager *p)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[i];
        uint64_t data = 0, missing = 0, removed = 0;

        for (uint64_t page = 0; page < b->page_count; page++) {
            uint8_t state = page_state(b, page);

            /* A page that was about to be filled when a pager ended: tried again, EEXIST tells. */
            if (state == QPC_PAGE_FILLING) {
                __atomic_store_n(&b->is.ledger[page], QPC_PAGE_MISSING, __ATOMIC_RELAXED);
                state = QPC_PAGE_MISSING;
            }
            removed += state == QPC_PAGE_REMOVED;
            if (has_data(b, page)) {
                data++;
                missing += state == QPC_PAGE_MISSING;
            }
        }
        COUNT(p->statistics.pages_total, b->page_count);
        COUNT(p->statistics.pages_data, data);
        COUNT(p->statistics.pages_data_missing, missing);
        COUNT(p->statistics.pages_removed, removed);
    }
}

struct qpc_pager *qpc_pager_create(const struct qpc_pager_options *options,
                                   const struct qpc_pager_block *blocks, uint32_t block_count,
                                   struct qpc_error *err)
{
    uint64_t chunk = options->chunk_size, largest_page = 0;
    struct qpc_pager *p;

    if (chunk < 4096 || chunk > (2u << 20) || (chunk & (chunk - 1))) {
        qpc_error_set(err, QPC_INVALID, 0, "chunk size %llu is not a power of two from 4 KiB to 2 MiB",
                      (unsigned long long)chunk);
        return NULL;
    }
    if (!block_count) {
        qpc_error_set(err, QPC_INVALID, 0, "no block to serve");
        return NULL;
    }
    for (uint32_t i = 0; i < block_count; i++) {
        if (check_block(&blocks[i], i, err) < 0)
            return NULL;
        if (blocks[i].page_size > largest_page)
            largest_page = blocks[i].page_size;
    }
    p = calloc(1, sizeof(*p) + block_count * sizeof(p->blocks[0]));
    if (!p) {
        qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for the pager");
        return NULL;
    }
    p->stop_fd = p->notify_fd = -1;
    p->uffd = options->userfaultfd;
    p->chunk_size = chunk;
    p->spin_limit_ns = options->spin_limit_us * 1000ull;
    p->block_count = block_count;
    atomic_init(&p->background, options->background);
    atomic_init(&p->background_rate, options->background_rate);
    for (uint32_t i = 0; i < block_count; i++) {
        p->blocks[i].is = blocks[i];
        p->blocks[i].page_shift = (uint32_t)__builtin_ctzll(blocks[i].page_size);
        p->blocks[i].page_count = blocks[i].length >> p->blocks[i].page_shift;
    }
    p->buffer_size = chunk > BACKGROUND_UNIT ? chunk : BACKGROUND_UNIT;
    if (p->buffer_size < largest_page)
        p->buffer_size = largest_page;
    p->buffer = allocate_pages(p->buffer_size);
    p->queue = calloc(QUEUE_LENGTH, sizeof(*p->queue));
    p->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (largest_page > 4096)
        p->zeros = allocate_pages(largest_page);
    if (!p->buffer || !p->queue || p->stop_fd < 0 || p->notify_fd < 0 ||
        (largest_page > 4096 && !p->zeros)) {
        qpc_error_set(err, QPC_SYSTEM, errno, "no memory or descriptors for the pager");
        qpc_pager_destroy(p);
        return NULL;
    }
    count_pages(p);
    return p;
}

void qpc_pager_destroy(struct qpc_pager *p)
{
    uint64_t largest_page = 0;

    if (!p)
        return;
    qpc_pager_stop(p, NULL);
    for (uint32_t i = 0; i < p->block_count; i++)
        if (p->blocks[i].is.page_size > largest_page)
            largest_page = p->blocks[i].is.page_size;
    if (p->buffer)
        munmap(p->buffer, p->buffer_size);
    if (p->zeros)
        munmap(p->zeros, largest_page);
    if (p->stop_fd >= 0)
        close(p->stop_fd);
    if (p->notify_fd >= 0)
        close(p->notify_fd);
    free(p->queue);
    free(p);
}

int qpc_pager_start(struct qpc_pager *p, struct qpc_error *err)
{
    int result;

    if (p->started)
        return qpc_error_set(err, QPC_INVALID, 0, "the pager is running already");
    if (GET(p->statistics.state) == QPC_PAGER_IDLE)
        SET(p->statistics.state, GET(p->statistics.complete_ns) ? QPC_PAGER_COMPLETE
                                                                : QPC_PAGER_SERVING);
    if (!GET(p->statistics.started_ns))
        SET(p->statistics.started_ns, now_ns());
    atomic_store(&p->stop, 0);
    result = pthread_create(&p->thread, NULL, pager_thread, p);
    if (result)
        return qpc_error_set(err, QPC_SYSTEM, result, "cannot start the pager thread");
    p->started = 1;
    return 0;
}

static void kick(struct qpc_pager *p)
{
    uint64_t one = 1;
    ssize_t n = write(p->stop_fd, &one, sizeof(one));

    (void)n; /* EAGAIN: it is readable already */
}

int qpc_pager_stop(struct qpc_pager *p, struct qpc_error *err)
{
    int result;

    if (!p->started)
        return 0;
    atomic_store(&p->stop, 1);
    kick(p);
    result = pthread_join(p->thread, NULL);
    if (result)
        return qpc_error_set(err, QPC_SYSTEM, result, "cannot join the pager thread");
    p->started = 0;
    if (GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE)
        SET(p->statistics.state, QPC_PAGER_IDLE);
    return 0;
}

void qpc_pager_set_background(struct qpc_pager *p, int background, uint64_t rate)
{
    atomic_store_explicit(&p->background_rate, rate, memory_order_relaxed);
    atomic_store_explicit(&p->background, background, memory_order_relaxed);
    kick(p);
}

void qpc_pager_read_statistics(const struct qpc_pager *p, struct qpc_pager_statistics *ret)
{
    const _Atomic uint64_t *from = (const _Atomic uint64_t *)&p->statistics;
    uint64_t *to = (uint64_t *)ret;

    _Static_assert(sizeof(p->statistics) == sizeof(*ret), "the two lists of counters must match");
    for (size_t i = 0; i < offsetof(struct qpc_pager_statistics, timeline) / sizeof(*to); i++)
        to[i] = atomic_load_explicit(&from[i], memory_order_relaxed);
    for (size_t i = 0; i < sizeof(ret->timeline) / sizeof(ret->timeline[0]); i++)
        ret->timeline[i] = atomic_load_explicit(&p->statistics.timeline[i], memory_order_relaxed);
}

int qpc_pager_notify_fd(const struct qpc_pager *p)
{
    return p->notify_fd;
}

int qpc_pager_thread_id(const struct qpc_pager *p)
{
    return atomic_load_explicit(&p->thread_id, memory_order_relaxed);
}
