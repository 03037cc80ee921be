#include <string.h>

#include "pager_state.h"

/* The background waits until no fault came for so long, but fills a unit now and then anyway. */
#define BACKGROUND_QUIET_NS 1000000ull
#define BACKGROUND_AT_LEAST_NS 20000000ull
#define RETRY_EVENT_WINDOWS 64 /* tries before it waits for longer */

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
    if (now < quiet_ns && GET(p->background) != QPC_BACKGROUND_AT_ONCE)
        return quiet_ns;
    if (rate) {
        int64_t burst = (int64_t)(rate / 20 > p->buffer_size ? rate / 20 : p->buffer_size);
        uint64_t elapsed = now - p->background_refill_ns;
        __uint128_t earned = (__uint128_t)rate * elapsed / 1000000000ull;
        int64_t room = burst - p->background_tokens;

        if (room <= 0 || earned >= (__uint128_t)room)
            p->background_tokens = burst;
        else
            p->background_tokens += (int64_t)earned;
        p->background_refill_ns = now;
        if (p->background_tokens < QPC_PAGER_BACKGROUND_UNIT) {
            int64_t missing = QPC_PAGER_BACKGROUND_UNIT - p->background_tokens;

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
        last = qpc_pager_data_run_end(b, first, last);
        errnum = qpc_pager_read_source(p, b, first, last);
        switch (errnum ? qpc_pager_note_source_error(p, b, first, errnum)
                       : qpc_pager_copy_run(p, b, first, last, p->buffer,
                                            &p->statistics.pages_background)) {
        case FILL_DONE:
            qpc_pager_leave_windows(p);
            b->cursor = last;
            p->background_attempts = p->background_windows = p->rounds_lost = 0;
            p->background_filled_ns = now;
            if (rate) /* a huge page is more than a unit: then it is in debt for a while */
                p->background_tokens -= (int64_t)((last - first) << b->page_shift);
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
            p->background_due_ns = now + QPC_PAGER_RETRY_EVENT_LAST_NS;
            return p->background_due_ns;
        case FILL_GONE:
        case FILL_LATER:
        case FILL_DOUBTFUL: /* of a page that is missing for certain it is not said */
            qpc_pager_leave_windows(p);
            b->cursor = last; /* the rest may be readable */
            p->background_due_ns =
                now + backoff_ns(p->background_attempts++, QPC_PAGER_RETRY_SOURCE_FIRST_NS,
                                 QPC_PAGER_RETRY_SOURCE_LAST_NS);
            return p->background_due_ns;
        }
    }
    return UINT64_MAX;
}
