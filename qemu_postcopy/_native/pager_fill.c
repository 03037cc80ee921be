#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "pager_state.h"
#include "uffd.h"

#define MERGED_ZEROS 8 /* pages */
#define WAKE_TOGETHER 4 /* faults: see serve_batch() */
/* The background waits until no fault came for so long, but fills a unit now and then anyway. */
#define BACKGROUND_QUIET_NS 1000000ull
#define BACKGROUND_AT_LEAST_NS 20000000ull
#define RETRY_EVENT_AT_ONCE_NS 100000ull   /* see serve_fault() */
#define RETRY_EVENT_PAUSING_NS 2000000ull  /* all in all, with pauses */
#define RETRY_EVENT_WINDOWS 64             /* background: tries before it waits for longer */
#define RETRY_EVENT_FIRST_NS 20000ull      /* the other side is between our read and its wake-up */
#define RETRY_EVENT_LAST_NS 2000000ull
#define RETRY_SOURCE_FIRST_NS 10000000ull
#define RETRY_SOURCE_LAST_NS 1000000000ull

/* --- filling --------------------------------------------------------------------------------- */

static void note_error(struct qpc_pager *p, const struct block *b, uint64_t page, int errnum)
{
    SET(p->statistics.last_error, (uint64_t)errnum);
    SET(p->statistics.last_error_block, (uint64_t)(b - p->blocks));
    SET(p->statistics.last_error_page, page);
}

static void wake(struct qpc_pager *p, uint64_t start, uint64_t length)
{
    COUNT(p->statistics.wakes, 1u);
    qpc_uffd_wake(p->uffd, start, length, NULL);
}

static void wake_now(struct qpc_pager *p)
{
    for (uint32_t i = 0; i < p->wake_count; i++)
        qpc_uffd_wake(p->uffd, p->wakes[i].start, p->wakes[i].length, NULL);
    p->wake_count = 0;
}

static void wake_afterwards(struct qpc_pager *p, uint64_t start, uint64_t length)
{
    if (p->wake_count == QPC_PAGER_BATCH)
        wake_now(p);
    p->wakes[p->wake_count].start = start;
    p->wakes[p->wake_count++].length = length;
}

/* Whoever waits can be told what for, should the source not answer. */
static void note_reading(struct qpc_pager *p, const struct block *b, uint64_t page, uint64_t since_ns)
{
    SET(p->statistics.reading_block, (uint64_t)(b - p->blocks));
    SET(p->statistics.reading_page, page);
    SET(p->statistics.reading_since_ns, since_ns);
}

/*
 * Pages [first, last) were read: counts them. What the source has where the bitmap says zero means
 * nothing (mapped-ram leaves stale data).
 */
static void note_read(struct qpc_pager *p, const struct block *b, uint64_t first, uint64_t last,
                      uint8_t *buffer)
{
    COUNT(p->statistics.bytes_read, (last - first) << b->page_shift);
    for (uint64_t page = first; page < last; page++)
        if (!has_data(b, page))
            memset(buffer + ((page - first) << b->page_shift), 0, b->is.page_size);
}

/* Reads pages [first, last) into the buffer: all of them, or an errno says why not. */
static int read_source(struct qpc_pager *p, const struct block *b, uint64_t first, uint64_t last)
{
    int errnum;

    note_reading(p, b, first, now_ns());
    errnum = qpc_source_read(b->is.source, b->is.source_offset + (first << b->page_shift),
                             (last - first) << b->page_shift, p->buffer);
    SET(p->statistics.reading_since_ns, 0);
    if (!errnum)
        note_read(p, b, first, last, p->buffer);
    return errnum;
}

static enum fill note_source_error(struct qpc_pager *p, const struct block *b, uint64_t page,
                                   int errnum)
{
    if (errnum == ECANCELED && stop_wanted(p))
        return FILL_LATER; /* ours: qpc_pager_stop() */
    COUNT(p->statistics.source_errors, 1u);
    note_error(p, b, page, errnum);
    return FILL_LATER;
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
            outcome = qpc_uffd_copy(p->uffd, address, data, length, !p->wake_later, &done);
        else if (!p->zeros || page_size == 4096)
            outcome = qpc_uffd_zeropage(p->uffd, address, length, &done);
        else
            outcome = qpc_uffd_copy(p->uffd, address, p->zeros, page_size, 1, &done);

        pages_done = done >> b->page_shift;
        qpc_pager_set_pages(p, b, page, pages_done, final);
        if (data && done && p->wake_later)
            wake_afterwards(p, address, done);
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
            /*
             * Where no huge page is free, COPY says EEXIST too, not ENOMEM (seen on Linux 6.18). Of a
             * page that was never filled here it can mean nothing else: all memory was empty, and
             * what arrived from a pager before us was noted. To take it for present would have the
             * next fault answered with zeros.
             */
            if (page_size > 4096 && page_state(b, page) != QPC_PAGE_PRESENT &&
                page_state(b, page) != QPC_PAGE_REMOVED) {
                COUNT(p->statistics.fill_errors, 1u);
                note_error(p, b, page, ENOMEM);
                return FILL_LATER;
            }
            /* Somebody was quicker, or a second message for a page that is there. */
            COUNT(p->statistics.already_present, 1u);
            if (page_state(b, page) != QPC_PAGE_REMOVED)
                qpc_pager_set_pages(p, b, page, 1, QPC_PAGE_PRESENT);
            wake(p, b->is.address + (page << b->page_shift), page_size);
            page++;
            if (data)
                data += page_size;
            continue;
        case QPC_TARGET_GONE:
            if (GET(p->statistics.state) != QPC_PAGER_MAPPER_GONE) {
                SET(p->statistics.state, QPC_PAGER_MAPPER_GONE);
                qpc_pager_notify(p);
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
            /* Not unmapped, as far as was told: an error like any other. */
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

/* What a page gets; up to KIND_ZERO it is missing. */
enum kind { KIND_DATA, KIND_ZERO, KIND_REMOVED, KIND_PRESENT, KIND_NOT_OURS };

static enum kind page_kind(const struct block *b, uint64_t page)
{
    switch (page_state(b, page)) {
    case QPC_PAGE_PRESENT:
        return KIND_PRESENT;
    case QPC_PAGE_REMOVED:
        return KIND_REMOVED;
    case QPC_PAGE_UNMAPPED:
    case QPC_PAGE_RETURNED:
        return KIND_NOT_OURS;
    default:
        return has_data(b, page) ? KIND_DATA : KIND_ZERO;
    }
}

/* Copies the buffer, which holds pages [first, last), into the mapper. */
static enum fill copy_run(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last,
                          const uint8_t *buffer, _Atomic uint64_t *counter)
{
    enum fill result;

    qpc_pager_set_pages(p, b, first, last - first, QPC_PAGE_FILLING);
    result = fill_pages(p, b, first, last - first, buffer, QPC_PAGE_PRESENT);
    if (result == FILL_DONE) {
        uint64_t data = 0;

        for (uint64_t page = first; page < last; page++)
            data += (uint64_t)has_data(b, page);
        COUNT(*counter, data);
        COUNT(p->statistics.pages_zero, last - first - data);
        return result;
    }
    for (uint64_t page = first; page < last; page++)
        if (page_state(b, page) == QPC_PAGE_FILLING)
            qpc_pager_set_pages(p, b, page, 1, QPC_PAGE_MISSING);
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

/*
 * What to copy for a fault at `page`: the run of missing pages around it, within [*first, *last),
 * that begins and ends with data and has no longer stretch of zero pages in it than MERGED_ZEROS:
 * zero pages between data would cost a fault each. Returns 0 where there is none: the page is
 * removed, present, or among many zeros.
 */
static int find_data_run(const struct block *b, uint64_t page, uint64_t *first, uint64_t *last)
{
    uint64_t from = page, to = page, zeros = 0;

    if (page_kind(b, page) > KIND_ZERO)
        return 0;
    for (uint64_t i = page; i < *last && page_kind(b, i) <= KIND_ZERO && zeros <= MERGED_ZEROS; i++) {
        zeros = has_data(b, i) ? 0 : zeros + 1;
        if (!zeros)
            to = i + 1;
    }
    zeros = 0;
    for (uint64_t i = page; page_kind(b, i) <= KIND_ZERO && zeros <= MERGED_ZEROS; i--) {
        zeros = has_data(b, i) ? 0 : zeros + 1;
        if (!zeros)
            from = i;
        if (i == *first)
            break;
    }
    if (!has_data(b, page) && (to == page || from == page))
        return 0; /* at the edge of the data, or away from it */
    *first = from;
    *last = to;
    return 1;
}

/* Pages filled for one fault; one alone while it is noted for the first time what a guest wants. */
static uint64_t pages_per_fault(const struct qpc_pager *p, const struct block *b)
{
    if ((p->noting_first_faults && !p->prefetch) || p->chunk_size <= b->is.page_size)
        return 1;
    return p->chunk_size >> b->page_shift;
}

static void chunk_around(const struct block *b, uint64_t page, uint64_t chunk_pages,
                         uint64_t *first, uint64_t *last)
{
    *first = page & ~(chunk_pages - 1);
    *last = min_u64(*first + chunk_pages, b->page_count);
}

enum fill qpc_pager_fill_around(struct qpc_pager *p, struct block *b, uint64_t page,
                                uint64_t chunk_pages, _Atomic uint64_t *counter)
{
    enum kind kind = page_kind(b, page);
    uint64_t first, last;
    enum fill result;
    int errnum;

    chunk_around(b, page, chunk_pages, &first, &last);
    if (find_data_run(b, page, &first, &last))
        kind = KIND_DATA;
    switch (kind) {
    case KIND_DATA:
        errnum = read_source(p, b, first, last);
        if (errnum && has_data(b, page)) {
            /* The page itself may be readable all the same. */
            first = page;
            last = page + 1;
            errnum = read_source(p, b, first, last);
            if (errnum)
                return note_source_error(p, b, page, errnum);
        }
        if (errnum) /* known to be zero: needs no source */
            result = fill_pages(p, b, page, 1, NULL, QPC_PAGE_PRESENT);
        else
            result = copy_run(p, b, first, last, p->buffer, counter);
        break;
    case KIND_ZERO:
        find_run(b, page, kind, &first, &last);
        result = fill_pages(p, b, first, last - first, NULL, QPC_PAGE_PRESENT);
        break;
    case KIND_NOT_OURS:
        /* Something else may lie there by now, under another userfaultfd: COPY would not ask. */
        return FILL_GONE;
    default:
        /*
         * Removed; or filled once and faulting again: then the guest removed it in a way that
         * sends no event (hole punched in the memfd), unless it turns out to be there.
         */
        last = page + 1;
        result = fill_pages(p, b, page, 1, NULL, QPC_PAGE_REMOVED);
    }
    if (result == FILL_DONE)
        b->cursor = last;
    return result;
}

static enum fill serve_page(struct qpc_pager *p, struct block *b, uint64_t page)
{
    return qpc_pager_fill_around(p, b, page, pages_per_fault(p, b), &p->statistics.pages_demand);
}

static void note_latency(struct qpc_pager *p, const struct fault *fault, uint64_t now)
{
    uint64_t us = (now - fault->read_ns) / 1000;
    unsigned bucket = us ? 64u - (unsigned)__builtin_clzll(us) : 0;

    bucket = bucket < 24 ? bucket : 23;
    COUNT(p->statistics.latency_us[bucket], 1u);
    qpc_pager_account_answer(p, fault, bucket, now);
}

static void note_answered(struct qpc_pager *p, const struct fault *fault, uint64_t now)
{
    note_latency(p, fault, now);
    if (p->trace)
        qpc_pager_trace_answer(p, fault, now, 0);
    p->answered_ns = now;
    p->spin_armed = 1;
    p->rounds_lost = 0;
}

static uint64_t backoff_ns(uint32_t attempts, uint64_t first, uint64_t last)
{
    return attempts >= 16 ? last : min_u64(first << attempts, last);
}

/*
 * Answers one fault, or puts it back with a time.
 *
 * Where an event is in the way the next attempts are made at once, then each after a wait for a
 * window, and events are read before each: those on a timer alone would hardly ever meet a window.
 */
static void serve_fault(struct qpc_pager *p, struct fault fault)
{
    struct block *b = &p->blocks[fault.block];
    uint64_t now, at_once_until_ns = 0;
    unsigned faults;

    for (;;) {
        enum fill result = serve_page(p, b, fault.page);

        now = now_ns();
        if (result != FILL_EVENT_FIRST)
            qpc_pager_leave_windows(p);
        switch (result) {
        case FILL_DONE:
            note_answered(p, &fault, now);
            return;
        case FILL_GONE:
            /* Nobody can be waiting for it properly: let the thread see for itself. */
            wake(p, b->is.address + (fault.page << b->page_shift), b->is.page_size);
            qpc_pager_account_end(p, &fault, now);
            if (p->trace)
                qpc_pager_trace_answer(p, &fault, now, 1);
            return;
        case FILL_EVENT_FIRST:
            if (!at_once_until_ns)
                at_once_until_ns = now + RETRY_EVENT_AT_ONCE_NS;
            if (!qpc_pager_read_messages(p, &faults) && now < at_once_until_ns)
                sched_yield();
            if (now >= at_once_until_ns)
                qpc_pager_wait_window(p);
            if (now < at_once_until_ns + RETRY_EVENT_PAUSING_NS)
                continue;
            p->rounds_lost++;
            qpc_pager_leave_windows(p);
            fault.due_ns = now + backoff_ns(fault.attempts++, RETRY_EVENT_FIRST_NS,
                                            RETRY_EVENT_LAST_NS);
            qpc_pager_queue_fault(p, &fault);
            return;
        case FILL_LATER:
            fault.failed = 1;
            fault.due_ns = now + backoff_ns(fault.attempts++, RETRY_SOURCE_FIRST_NS,
                                            RETRY_SOURCE_LAST_NS);
            qpc_pager_queue_fault(p, &fault);
            return;
        }
    }
}

/* A fault of a batch, and what is filled for it. */
struct planned {
    struct fault fault;
    uint64_t first, last; /* pages */
};

/* The part that fills the page of this fault as well, or -1. */
static int find_planned(const struct planned *planned, uint32_t count, const struct fault *fault)
{
    for (uint32_t i = 0; i < count; i++)
        if (planned[i].fault.block == fault->block && planned[i].first <= fault->page &&
            fault->page < planned[i].last)
            return (int)i;
    return -1;
}

/*
 * Takes up to `most` faults from the queue and answers them together: all reads, then all COPYs.
 * A source can have several reads at the same time, or check once for all of them. Where many
 * threads wait they are woken after the last COPY: somebody else runs there meanwhile, and wake-ups
 * one after the other cost less. Nobody reads messages between planning and COPY, so the ledger is
 * what it was. What does not go straight through is served one by one afterwards. Returns how many
 * faults were taken.
 */
static uint32_t serve_batch(struct qpc_pager *p, uint32_t most)
{
    struct planned planned[QPC_PAGER_BATCH];
    struct qpc_source_part parts[QPC_PAGER_BATCH];
    struct { struct fault fault; int part; } others[QPC_PAGER_BATCH];
    int filled[QPC_PAGER_BATCH] = { 0 };
    uint32_t taken = 0, count = 0, other_count = 0, next;
    uint64_t used = 0, now;

    while (taken < most && count < QPC_PAGER_BATCH && other_count < QPC_PAGER_BATCH) {
        struct fault fault = qpc_pager_unqueue_fault(p);
        struct block *b = &p->blocks[fault.block];
        uint64_t first, last, length;
        int part;

        taken++;
        if (fault.due_ns && fault.due_ns > now_ns()) {
            qpc_pager_queue_fault(p, &fault);
            continue;
        }
        part = find_planned(planned, count, &fault);
        chunk_around(b, fault.page, pages_per_fault(p, b), &first, &last);
        if (fault.due_ns || part >= 0 || !find_data_run(b, fault.page, &first, &last)) {
            others[other_count].fault = fault;
            others[other_count++].part = part;
            continue;
        }
        length = (last - first) << b->page_shift;
        if (used + length > p->buffer_size) {
            others[other_count].fault = fault;
            others[other_count++].part = -1;
            break;
        }
        planned[count] = (struct planned){ fault, first, last };
        parts[count++] = (struct qpc_source_part){
            b->is.source_offset + (first << b->page_shift), length, p->buffer + used, 0
        };
        used += length;
    }
    for (uint32_t i = 0; i < count; i = next) {
        struct qpc_source *source = p->blocks[planned[i].fault.block].is.source;

        for (next = i + 1; next < count; next++)
            if (p->blocks[planned[next].fault.block].is.source != source)
                break;
        note_reading(p, &p->blocks[planned[i].fault.block], planned[i].fault.page,
                     planned[i].fault.read_ns);
        qpc_source_read_parts(source, &parts[i], next - i);
    }
    SET(p->statistics.reading_since_ns, 0);
    p->wake_later = count >= WAKE_TOGETHER;
    for (uint32_t i = 0; i < count; i++) {
        struct block *b = &p->blocks[planned[i].fault.block];

        if (parts[i].errnum)
            continue;
        note_read(p, b, planned[i].first, planned[i].last, parts[i].buffer);
        if (copy_run(p, b, planned[i].first, planned[i].last, parts[i].buffer,
                     &p->statistics.pages_demand) != FILL_DONE)
            continue;
        filled[i] = 1;
        b->cursor = planned[i].last;
    }
    p->wake_later = 0;
    wake_now(p);
    now = now_ns();
    for (uint32_t i = 0; i < count; i++)
        if (filled[i])
            note_answered(p, &planned[i].fault, now);
        else
            serve_fault(p, planned[i].fault);
    for (uint32_t i = 0; i < other_count; i++)
        /* Whoever waited for any page of a part was woken with it. */
        if (others[i].part >= 0 && filled[others[i].part])
            note_answered(p, &others[i].fault, now);
        else
            serve_fault(p, others[i].fault);
    return taken;
}

/* How many attempts stand failed now; the operator is told when that begins and when it ends. */
static void tell_failing(struct qpc_pager *p, uint64_t faults_failed)
{
    uint64_t failing = faults_failed, before = GET(p->statistics.failing);

    if (p->background_attempts && GET(p->statistics.state) == QPC_PAGER_SERVING &&
        atomic_load_explicit(&p->background, memory_order_relaxed))
        failing++;
    SET(p->statistics.failing, failing);
    if (!failing != !before)
        qpc_pager_notify(p);
}

uint64_t qpc_pager_serve_queue(struct qpc_pager *p)
{
    uint64_t next = 0, failed = 0;

    for (uint32_t left = p->queue_count; left && !stop_wanted(p);)
        left -= serve_batch(p, left);
    SET(p->statistics.faults_waiting, p->queue_count);
    if (p->faults_dropped && p->queue_count < QPC_PAGER_QUEUE_LENGTH / 2) {
        /* Threads whose fault found no room fault anew. */
        p->faults_dropped = 0;
        for (uint32_t i = 0; i < p->block_count; i++)
            wake(p, p->blocks[i].is.address, p->blocks[i].is.length);
    }
    for (uint32_t i = 0; i < p->queue_count; i++) {
        const struct fault *fault = &p->queue[(p->queue_head + i) % QPC_PAGER_QUEUE_LENGTH];

        if (!next || fault->due_ns < next)
            next = fault->due_ns ? fault->due_ns : 1;
        failed += fault->failed;
    }
    tell_failing(p, failed);
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

uint64_t qpc_pager_fill_background(struct qpc_pager *p)
{
    uint64_t rate = GET(p->background_rate);
    uint64_t now = now_ns(), quiet_ns;

    if (GET(p->statistics.state) != QPC_PAGER_SERVING)
        return UINT64_MAX;
    if (now < p->background_due_ns)
        return p->background_due_ns;
    /* A thread that just got its page is likely to need the next: a unit would keep it waiting. */
    quiet_ns = min_u64(p->answered_ns + BACKGROUND_QUIET_NS,
                       p->background_filled_ns + BACKGROUND_AT_LEAST_NS);
    if (now < quiet_ns)
        return quiet_ns;
    if (rate) {
        uint64_t burst = rate / 20 > p->buffer_size ? rate / 20 : p->buffer_size;
        uint64_t elapsed = min_u64(now - p->background_refill_ns, 1000000000ull);

        p->background_tokens =
            min_u64(p->background_tokens + (uint64_t)((__uint128_t)rate * elapsed / 1000000000ull),
                    burst);
        p->background_refill_ns = now;
        if (p->background_tokens < min_u64(QPC_PAGER_BACKGROUND_UNIT, burst)) {
            uint64_t missing = min_u64(QPC_PAGER_BACKGROUND_UNIT, burst) - p->background_tokens;
            return now + (uint64_t)((__uint128_t)missing * 1000000000ull / rate) + 1000;
        }
    }
    for (uint32_t i = 0; i < p->block_count; i++) {
        struct block *b = &p->blocks[p->background_block];
        int64_t page = next_missing(b);
        uint64_t first, last, unit;
        unsigned faults;
        int errnum;

        if (page < 0) {
            p->background_block = (p->background_block + 1) % p->block_count;
            continue;
        }
        unit = QPC_PAGER_BACKGROUND_UNIT >> b->page_shift;
        unit = unit ? unit : 1;
        first = (uint64_t)page;
        last = min_u64(min_u64(first + unit, b->page_count),
                       first + (p->buffer_size >> b->page_shift));
        find_run(b, first, KIND_DATA, &first, &last);
        errnum = read_source(p, b, first, last);
        switch (errnum ? note_source_error(p, b, first, errnum)
                       : copy_run(p, b, first, last, p->buffer,
                                &p->statistics.pages_background)) {
        case FILL_DONE:
            qpc_pager_leave_windows(p);
            b->cursor = last;
            p->background_attempts = p->background_windows = p->rounds_lost = 0;
            p->background_filled_ns = now;
            if (rate) {
                uint64_t used = (last - first) << b->page_shift;
                p->background_tokens -= min_u64(used, p->background_tokens);
            }
            qpc_pager_check_complete(p);
            return 0;
        case FILL_EVENT_FIRST:
            qpc_pager_read_messages(p, &faults);
            if (faults)
                return 0;
            if (p->background_windows++ < RETRY_EVENT_WINDOWS) {
                qpc_pager_wait_window(p);
                return 0;
            }
            p->rounds_lost++;
            qpc_pager_leave_windows(p);
            p->background_windows = 0;
            p->background_due_ns = now + RETRY_EVENT_LAST_NS;
            return p->background_due_ns;
        case FILL_GONE:
        case FILL_LATER:
            qpc_pager_leave_windows(p);
            b->cursor = last; /* the rest may be readable */
            p->background_due_ns = now + backoff_ns(p->background_attempts++, RETRY_SOURCE_FIRST_NS,
                                                    RETRY_SOURCE_LAST_NS);
            return p->background_due_ns;
        }
    }
    return UINT64_MAX;
}
