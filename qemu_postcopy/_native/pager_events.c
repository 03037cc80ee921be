#define _GNU_SOURCE
#include <string.h>
#include <unistd.h>

#include "pager_state.h"
#include "uffd.h"

#define MESSAGES_PER_READ (QPC_PAGER_JOURNAL_SIZE / sizeof(struct uffd_msg))
#define TIMELINE_BUCKET_NS 10000000ull

void qpc_pager_notify(struct qpc_pager *p)
{
    uint64_t one = 1;
    ssize_t n = write(p->notify_fd, &one, sizeof(one));

    (void)n; /* EAGAIN: it is readable already */
}

/* --- the ledger ------------------------------------------------------------------------------ */

void qpc_pager_check_complete(struct qpc_pager *p)
{
    if (GET(p->statistics.pages_data_missing) == 0 &&
        GET(p->statistics.state) == QPC_PAGER_SERVING) {
        SET(p->statistics.complete_ns, now_ns());
        SET(p->statistics.state, QPC_PAGER_COMPLETE);
        qpc_pager_notify(p);
    }
}

static void set_page_state(struct qpc_pager *p, struct block *b, uint64_t page, uint8_t state)
{
    uint8_t old = page_state(b, page);
    int was_missing = old == QPC_PAGE_MISSING || old == QPC_PAGE_FILLING;
    int is_missing = state == QPC_PAGE_MISSING || state == QPC_PAGE_FILLING;

    if (old == QPC_PAGE_UNMAPPED || old == QPC_PAGE_RETURNED)
        return;
    if (has_data(b, page) && was_missing != is_missing) {
        COUNT(p->statistics.pages_data_missing, is_missing ? 1u : (uint64_t)-1);
        COUNT(b->account.pages_data_missing, is_missing ? 1u : (uint64_t)-1);
    }
    if (state == QPC_PAGE_REMOVED && old != QPC_PAGE_REMOVED) {
        COUNT(p->statistics.pages_removed, 1u);
        COUNT(b->account.pages_removed, 1u);
    }
    if (state == QPC_PAGE_UNMAPPED)
        COUNT(b->account.pages_unmapped, 1u);
    /* Release: at take-over 'filled' must never be seen without the COPY that it stands for. */
    __atomic_store_n(&b->is.ledger[page], state, __ATOMIC_RELEASE);
}

void qpc_pager_set_pages(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t count,
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

void qpc_pager_queue_fault(struct qpc_pager *p, const struct fault *fault)
{
    struct fault *place;

    if (p->queue_count == QPC_PAGER_QUEUE_LENGTH) {
        p->faults_dropped = 1;
        if (fault->counted)
            qpc_pager_account_end(p, fault, now_ns());
        return;
    }
    place = &p->queue[(p->queue_head + p->queue_count++) % QPC_PAGER_QUEUE_LENGTH];
    *place = *fault;
    if (!place->counted) {
        place->counted = 1;
        qpc_pager_account_begin(p, place);
    }
    SET(p->statistics.faults_waiting, p->queue_count);
}

struct fault qpc_pager_unqueue_fault(struct qpc_pager *p)
{
    struct fault fault = p->queue[p->queue_head];

    p->queue_head = (p->queue_head + 1) % QPC_PAGER_QUEUE_LENGTH;
    p->queue_count--;
    return fault;
}

static void note_fault(struct qpc_pager *p, uint64_t address, uint32_t tid, uint64_t now)
{
    struct block *b = block_at(p, address);
    uint16_t slot = qpc_pager_origin_slot(p, tid);
    uint64_t bucket;

    COUNT(p->statistics.faults, 1u);
    COUNT(p->origins[slot].faults, 1u);
    if (!GET(p->statistics.first_fault_ns))
        SET(p->statistics.first_fault_ns, now);
    SET(p->statistics.last_fault_ns, now);
    bucket = (now - GET(p->statistics.started_ns)) / TIMELINE_BUCKET_NS;
    if (bucket < 2048)
        COUNT(p->statistics.timeline[bucket], 1u);
    if (b) {
        struct fault fault = {
            .page = (address - b->is.address) >> b->page_shift,
            .read_ns = now,
            .block = (uint32_t)(b - p->blocks),
            .tid = tid,
            .slot = slot,
        };

        COUNT(b->account.faults, 1u);
        if (p->noting_first_faults)
            qpc_pager_note_first_fault(p, fault.block, fault.page, now);
        qpc_pager_queue_fault(p, &fault);
    }
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

/* Removed or unmapped pages. */
static void note_lost(struct qpc_pager *p, uint64_t start, uint64_t end, uint8_t state)
{
    for (uint32_t i = 0; i < p->block_count; i++) {
        uint64_t first, last;

        if (!overlap(&p->blocks[i], start, end, &first, &last))
            continue;
        qpc_pager_set_pages(p, &p->blocks[i], first, last - first + 1, state);
        if (state == QPC_PAGE_REMOVED)
            qpc_pager_return_removed(p, &p->blocks[i], first, last);
    }
}

static void note_event(struct qpc_pager *p, const struct uffd_msg *m)
{
    switch (m->event) {
    case UFFD_EVENT_REMOVE:
        note_lost(p, m->arg.remove.start, m->arg.remove.end, QPC_PAGE_REMOVED);
        break;
    case UFFD_EVENT_UNMAP:
        note_lost(p, m->arg.remove.start, m->arg.remove.end, QPC_PAGE_UNMAPPED);
        break;
    case UFFD_EVENT_REMAP:
        /* QEMU never moves guest RAM; the old place is gone in any case. */
        note_lost(p, m->arg.remap.from, m->arg.remap.from + m->arg.remap.len,
                  QPC_PAGE_UNMAPPED);
        break;
    }
}

/* What was noted already may be noted again: a removed page stays removed. */
void qpc_pager_replay_journal(struct qpc_pager *p)
{
    for (size_t i = 0; i < MESSAGES_PER_READ; i++)
        note_event(p, &p->messages[i]);
}

unsigned qpc_pager_read_messages(struct qpc_pager *p, unsigned *faults)
{
    unsigned events = 0;
    ssize_t n;

    *faults = 0;
    n = read(p->uffd, p->messages, QPC_PAGER_JOURNAL_SIZE);
    if (n <= 0)
        return 0;
    for (size_t i = 0, count = (size_t)n / sizeof(p->messages[0]), now = now_ns(); i < count; i++) {
        const struct uffd_msg *m = &p->messages[i];

        if (m->event == UFFD_EVENT_PAGEFAULT) {
            note_fault(p, m->arg.pagefault.address, m->arg.pagefault.feat.ptid, now);
            ++*faults;
            continue;
        }
        events++;
        note_event(p, m);
        if (m->event == UFFD_EVENT_REMOVE)
            COUNT(p->statistics.events_remove, 1u);
        else if (m->event == UFFD_EVENT_UNMAP)
            COUNT(p->statistics.events_unmap, 1u);
        else
            COUNT(p->statistics.events_other, 1u);
    }
    if (events)
        qpc_pager_check_complete(p);
    return events;
}
