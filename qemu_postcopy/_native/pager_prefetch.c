#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "pager_state.h"

/*
 * Which pages a guest wants first repeats between restores of one image, their order less so. The
 * list is bounded in time and number: one that grew with the guest's life would in the end be all
 * of its memory.
 */
#define FIRST_FAULTS_NS 100000000ull

/* QEMU loads its device state meanwhile, perhaps on this processor. */
#define PAGES_BETWEEN_YIELDS 16

void qpc_pager_note_first_fault(struct qpc_pager *p, uint32_t block, uint64_t page, uint64_t now)
{
    uint32_t count = atomic_load_explicit(&p->first_fault_count, memory_order_relaxed);

    if (count == QPC_PAGER_FIRST_FAULTS ||
        now - GET(p->statistics.first_fault_ns) > FIRST_FAULTS_NS) {
        p->noting_first_faults = 0;
        return;
    }
    p->first_faults[count] = (struct qpc_pager_page){ .block = block, .page = page };
    /* Release: who reads the count reads the entries that it stands for. */
    atomic_store_explicit(&p->first_fault_count, count + 1, memory_order_release);
}

uint32_t qpc_pager_first_faults(const struct qpc_pager *p, struct qpc_pager_page *ret)
{
    uint32_t count = atomic_load_explicit(&p->first_fault_count, memory_order_acquire);

    memcpy(ret, p->first_faults, count * sizeof(*ret));
    return count;
}

int qpc_pager_prefetch(struct qpc_pager *p, const struct qpc_pager_page *pages, uint32_t count,
                       struct qpc_error *err)
{
    if (p->started || p->prefetch)
        return qpc_error_set(err, QPC_INVALID, 0, "what to fill ahead is said once, before the start");
    if (count > QPC_PAGER_FIRST_FAULTS)
        return qpc_error_set(err, QPC_INVALID, 0, "%u pages are too many to fill ahead", count);
    for (uint32_t i = 0; i < count; i++)
        if (pages[i].block >= p->block_count ||
            pages[i].page >= p->blocks[pages[i].block].page_count)
            return qpc_error_set(err, QPC_INVALID, 0, "page %u to fill ahead is in no block", i);
    p->prefetch = calloc(count ? count : 1, sizeof(*p->prefetch));
    if (!p->prefetch)
        return qpc_error_set(err, QPC_SYSTEM, ENOMEM, "no memory for the list of pages");
    memcpy(p->prefetch, pages, count * sizeof(*pages));
    p->prefetch_count = count;
    return 0;
}

int qpc_pager_fill_ahead(struct qpc_pager *p)
{
    while (p->prefetch_next < p->prefetch_count) {
        const struct qpc_pager_page *next = &p->prefetch[p->prefetch_next];
        struct block *b = &p->blocks[next->block];
        uint8_t state = page_state(b, next->page);

        if (state != QPC_PAGE_MISSING && state != QPC_PAGE_FILLING) {
            p->prefetch_next++;
            continue;
        }
        switch (qpc_pager_fill_around(p, b, next->page, 1, &p->statistics.pages_prefetched)) {
        case FILL_EVENT_FIRST:
            /* It is read next, with the faults that may have come. */
            return 1;
        case FILL_GONE:
            p->prefetch_next = p->prefetch_count;
            return 0;
        case FILL_LATER: /* a fault will try again, and tell */
        case FILL_DOUBTFUL:
        case FILL_DONE:
            if (++p->prefetch_next % PAGES_BETWEEN_YIELDS == 0)
                sched_yield();
            return 1;
        }
    }
    return 0;
}
