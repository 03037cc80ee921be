#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

#include "pager_state.h"
#include "uffd.h"

#define LONGEST_PAUSE_NS 16384u
#define RETURNED_PAGES_MAX 32768u /* on either side of what was removed */

/*
 * A thread on this processor that is woken by its timer must be let in at once, not when the one
 * that runs has gone to sleep: by then that one has queued its next event.
 */
static void come_first(struct qpc_pager *p)
{
    struct sched_param first = { .sched_priority = 1 };

    if (p->came_first || p->cannot_come_first)
        return;
    p->policy = sched_getscheduler(0);
    if (p->policy >= 0)
        p->policy &= ~SCHED_RESET_ON_FORK;
    if (p->policy == SCHED_FIFO || p->policy == SCHED_RR)
        return; /* it does already */
    if (p->policy < 0 || sched_getparam(0, &p->policy_param) ||
        sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first))
        p->cannot_come_first = 1; /* EPERM: needs CAP_SYS_NICE, or RLIMIT_RTPRIO (sched(7)) */
    else
        p->came_first = 1;
}

void qpc_pager_wait_window(struct qpc_pager *p)
{
    struct timespec time = { 0 };

    come_first(p);
    /* xorshift32 */
    p->random ^= p->random << 13;
    p->random ^= p->random >> 17;
    p->random ^= p->random << 5;
    time.tv_nsec = 1 + p->random % LONGEST_PAUSE_NS;
    nanosleep(&time, NULL);
}

void qpc_pager_leave_windows(struct qpc_pager *p)
{
    if (!p->came_first)
        return;
    p->came_first = 0;
    /* The flag stays: without CAP_SYS_NICE it cannot be taken back, nor the rest with it (sched(7)). */
    sched_setscheduler(0, p->policy | SCHED_RESET_ON_FORK, &p->policy_param);
}

static int needs_no_data(const struct block *b, uint64_t page)
{
    uint8_t state = page_state(b, page);

    return state == QPC_PAGE_PRESENT || state == QPC_PAGE_REMOVED;
}

void qpc_pager_return_removed(struct qpc_pager *p, struct block *b, uint64_t first, uint64_t last)
{
    uint64_t lowest = first > RETURNED_PAGES_MAX ? first - RETURNED_PAGES_MAX : 0;
    uint64_t highest = min_u64(last + RETURNED_PAGES_MAX, b->page_count - 1);

    if (p->rounds_lost < QPC_PAGER_STORM || p->ranges_returned >= QPC_PAGER_RETURNS ||
        !needs_no_data(b, first))
        return;
    while (first > lowest && needs_no_data(b, first - 1))
        first--;
    while (last < highest && needs_no_data(b, last + 1))
        last++;
    p->ranges_returned++;
    /* Only then into the ledger: a page that it has as returned is not answered for any more. */
    if (qpc_uffd_unregister(p->uffd, b->is.address + (first << b->page_shift),
                            (last - first + 1) << b->page_shift, NULL) == 0)
        qpc_pager_set_pages(p, b, first, last - first + 1, QPC_PAGE_RETURNED);
}
