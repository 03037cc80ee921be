#define _GNU_SOURCE
#include <sched.h>

#include "pager_state.h"

#define WAKE_TOGETHER 4 /* faults: see serve_batch() */
#define RETRY_EVENT_AT_ONCE_NS 100000ull  /* see serve_fault() */
#define RETRY_EVENT_PAUSING_NS 2000000ull /* all in all, with pauses */
#define MESSAGE_LATE_NS 2000000ull /* a message may be read so long after its thread was woken */
#define STANDING_NS 4000000000ull  /* a fault that stands for others is tried again by then */
#define RETRY_EVENT_FIRST_NS 20000ull     /* the other side is between our read and its wake-up */

/* Pages filled for one fault; one alone while it is noted for the first time what a guest wants. */
static uint64_t pages_per_fault(const struct qpc_pager *p, const struct block *b)
{
    if ((p->noting_first_faults && !p->prefetch) || p->chunk_size <= b->is.page_size)
        return 1;
    return p->chunk_size >> b->page_shift;
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

static struct doubt *doubt_of(struct qpc_pager *p, const struct fault *fault)
{
    return &p->doubts[(fault->page + 31 * fault->block) % QPC_PAGER_DOUBTS];
}

/*
 * Of a huge page that was filled once, or given back by the guest, COPY says EEXIST where it is there
 * and where none is free. Whoever waits for it can tell: woken, it faults anew where the page is not
 * there. So the first messages are answered by a wake-up. One that is read well after that stays in
 * the queue, and says so to the operator; it is tried again, with a wake-up each time, until the page
 * can be filled or nobody has faulted anew. Returns whether this fault is over.
 */
static int settle_doubt(struct qpc_pager *p, const struct fault *fault, uint64_t now)
{
    struct block *b = &p->blocks[fault->block];
    struct doubt *d = doubt_of(p, fault);
    int is_known = d->woken_ns && d->block == fault->block && d->page == fault->page;

    if (is_known && fault->doubted && !d->refaulted) {
        d->woken_ns = 0;
        return 1;
    }
    if (is_known && !fault->doubted && d->standing && now < d->woken_ns + STANDING_NS) {
        d->refaulted = 1;
        return 1;
    }
    if (is_known && !fault->doubted && fault->read_ns > d->woken_ns + MESSAGE_LATE_NS) {
        d->woken_ns = now;
        d->standing = d->refaulted = 1;
        return 0;
    }
    if (!is_known || fault->doubted)
        *d = (struct doubt){ .page = fault->page, .block = fault->block, .woken_ns = now,
                             .standing = fault->doubted };
    COUNT(p->statistics.already_present, 1u);
    qpc_pager_wake(p, b->is.address + (fault->page << b->page_shift), b->is.page_size);
    return !fault->doubted;
}

static void end_doubt(struct qpc_pager *p, const struct fault *fault)
{
    struct doubt *d = doubt_of(p, fault);

    if (d->block == fault->block && d->page == fault->page)
        d->woken_ns = 0;
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
            end_doubt(p, &fault);
            note_answered(p, &fault, now);
            return;
        case FILL_DOUBTFUL:
            if (settle_doubt(p, &fault, now)) {
                note_answered(p, &fault, now);
                return;
            }
            qpc_pager_note_no_memory(p, b, fault.page);
            fault.doubted = 1;
            fault.failed = 1;
            fault.due_ns = now + backoff_ns(fault.attempts++, QPC_PAGER_RETRY_SOURCE_FIRST_NS,
                                            QPC_PAGER_RETRY_SOURCE_LAST_NS);
            qpc_pager_queue_fault(p, &fault);
            return;
        case FILL_GONE:
            /* Nobody can be waiting for it properly: let the thread see for itself. */
            qpc_pager_wake(p, b->is.address + (fault.page << b->page_shift), b->is.page_size);
            qpc_pager_account_end(p, &fault, now);
            end_doubt(p, &fault);
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
                                            QPC_PAGER_RETRY_EVENT_LAST_NS);
            qpc_pager_queue_fault(p, &fault);
            return;
        case FILL_LATER:
            fault.failed = 1;
            fault.due_ns = now + backoff_ns(fault.attempts++, QPC_PAGER_RETRY_SOURCE_FIRST_NS,
                                            QPC_PAGER_RETRY_SOURCE_LAST_NS);
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
        if (fault.due_ns || part >= 0 ||
            !qpc_pager_find_data_run(b, fault.page, pages_per_fault(p, b), &first, &last)) {
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
        qpc_pager_note_reading(p, &p->blocks[planned[i].fault.block], planned[i].fault.page,
                     planned[i].fault.read_ns);
        qpc_source_read_parts(source, &parts[i], next - i);
    }
    SET(p->statistics.reading_since_ns, 0);
    p->wake_later = count >= WAKE_TOGETHER;
    for (uint32_t i = 0; i < count; i++) {
        struct block *b = &p->blocks[planned[i].fault.block];

        if (parts[i].errnum)
            continue;
        qpc_pager_note_read(p, b, planned[i].first, planned[i].last, parts[i].buffer);
        if (qpc_pager_copy_run(p, b, planned[i].first, planned[i].last, parts[i].buffer,
                     &p->statistics.pages_demand) != FILL_DONE)
            continue;
        filled[i] = 1;
        b->cursor = planned[i].last;
    }
    p->wake_later = 0;
    qpc_pager_wake_filled(p);
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
            qpc_pager_wake(p, p->blocks[i].is.address, p->blocks[i].is.length);
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
